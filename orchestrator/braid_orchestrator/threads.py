"""Threads of the process that runs the body."""

from __future__ import annotations

import logging

import torch
from braid_kernels.errors import BuildError
from braid_kernels.native import mind_peers, set_num_threads

log = logging.getLogger(__name__)


def use_threads(count: int, peers: bool = False) -> None:
    """Let torch and the C++ kernels use so many threads each, the calling one included; process-wide.

    Only one of the two computes at a time.

    Args:
        count: of threads.
        peers: whether services in other processes look out for what this one makes.
    """
    torch.set_num_threads(count)
    try:
        set_num_threads(count)
        if peers:
            mind_peers()
    except BuildError as error:
        log.debug("no C++ kernels to give threads to: %s", error)
