"""Threads of the process that runs the body."""

from __future__ import annotations

import logging

import torch
from braid_kernels.errors import BuildError
from braid_kernels.native import set_num_threads

log = logging.getLogger(__name__)


def use_threads(count: int) -> None:
    """Let torch and the C++ kernels use so many threads each, the calling one included; process-wide.

    Only one of the two computes at a time.
    """
    torch.set_num_threads(count)
    try:
        set_num_threads(count)
    except BuildError as error:
        log.debug("no C++ kernels to give threads to: %s", error)
