"""Devices by name, as options and messages have them."""

from __future__ import annotations

import re

import torch

from braid_wire.errors import RequestInvalid

CPU = torch.device("cpu")

_NAME = re.compile(r"cpu|cuda(:\d{1,3})?")


def device_of(name: str) -> torch.device:
    """The device "cpu", "cuda" (the first GPU) or "cuda:N".

    Raises:
        RequestInvalid: it is no such name, or this process has no such GPU.
    """
    if _NAME.fullmatch(name) is None:
        raise RequestInvalid(
            f"device is {name!r}; it must be cpu, cuda or cuda:N", field="device", value=name
        )
    if name == "cpu":
        return CPU
    device = torch.device("cuda", int(name.partition(":")[2] or 0))
    count = torch.cuda.device_count()
    if device.index >= count:
        raise RequestInvalid(
            f"device is {name!r}; this process sees {count} GPUs", field="device", value=name
        )
    return device


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, in the order of the current stream.

    From pinned memory: a copy from any other may make this thread wait for the stream, which may itself
    wait for another process.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
