"""Which kernels a service runs: by name, or the fastest for its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from braid_kernels import errors as kernel_errors
from braid_kernels.backend import FullBackend, LinearBackend

from braid_wire.errors import RequestInvalid, ServiceFault

B = TypeVar("B", FullBackend, LinearBackend)


def choose(
    name: str,
    device: torch.device,
    fastest: Callable[[str], B],
    named: Callable[[str], B],
    threads: int,
    peers: bool,
) -> B:
    """A backend with its kernels loaded, which this process runs on so many threads.

    Args:
        name: of the backend, or "auto".
        device: what it must run on.
        fastest: the backend for a type of device; for "auto".
        named: the backend of a name.
        threads: of a kernel, process-wide.
        peers: whether other processes look out for what this one makes.

    Raises:
        RequestInvalid: no backend has this name, or it does not run there.
        ServiceFault: its kernels cannot be built.
    """
    try:
        found = fastest(device.type) if name == "auto" else named(name)
    except kernel_errors.UnknownBackendError as error:
        raise RequestInvalid(str(error), field="backend", value=name) from error
    except kernel_errors.BuildError as error:
        raise ServiceFault(str(error), backend=name) from error
    if device.type not in found.capabilities.devices:
        raise RequestInvalid(
            f"backend {found.name} runs on {', '.join(sorted(found.capabilities.devices))}, not on {device}",
            field="backend",
            value=name,
        )
    torch.set_num_threads(threads)
    if found.name == "cpp":
        from braid_kernels.native import mind_peers, set_num_threads

        set_num_threads(threads)
        if peers:
            mind_peers()
    return found
