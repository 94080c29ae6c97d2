"""Loads the compiled library and declares its C interface."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from braid_kernels.build import build, cores
from braid_kernels.errors import BuildError, FieldError, InputError, KernelError, MetadataError, PlanError

_VOID, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_CROWDED_WORK = 4e6
_INPUT = (_VOID, _I64, _I32)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def default_threads() -> int:
    """OMP_NUM_THREADS where it is a positive number, else the processors this process may use."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    return cores()


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; built on first use. Raises BuildError (again at every call)."""
    path = build()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} could not be loaded: {error}") from error
    lib.braid_linear.restype = _I64
    lib.braid_linear.argtypes = [_VOID, *_INPUT * 3, _VOID, _I64, _VOID, _VOID, _I64, *_INPUT]
    lib.braid_full.restype = _I64
    plan = (_VOID, _VOID, _I64, _VOID)  # chunk_starts, chunk_lengths, chunks, paths
    lib.braid_full.argtypes = [_VOID, *_INPUT * 4, _VOID, _VOID, _VOID, _I64, _I64, _I64, *_INPUT, *plan]
    metadata = (_VOID, _I64, _VOID, _VOID, _I64)  # cu_seqlens, batch, state_in, state_out, tokens
    lib.braid_mamba1.restype = lib.braid_short_conv.restype = _I64
    lib.braid_mamba1.argtypes = [_VOID, *_INPUT, *metadata, *_INPUT]
    lib.braid_short_conv.argtypes = [_VOID, _I64, *_INPUT, *metadata, *_INPUT]
    for name in (
        "braid_linear_desc_size",
        "braid_full_desc_size",
        "braid_mamba1_desc_size",
        "braid_conv_desc_size",
    ):
        getattr(lib, name).restype = _I64
    lib.braid_set_threads.argtypes = [_I32]
    lib.braid_set_spin_us.argtypes = [_I32]
    lib.braid_set_shared_work.argtypes = [ctypes.c_double]
    lib.braid_set_threads(default_threads())
    return lib


def set_num_threads(count: int) -> None:
    """Threads that one kernel call may use, the calling one included; process-wide."""
    if count < 1:
        raise FieldError("num_threads", count, "must be >= 1")
    library().braid_set_threads(count)


def num_threads() -> int:
    return int(library().braid_get_threads())


def mind_peers() -> None:
    """Other processes look out for what this one makes, as those of a cell do; process-wide, for good.

    Where threads take every core, one of them is in a peer's way, or the peer in its, and a region of a few
    microseconds waits for a thread that has no core. Then only regions of at least 4 million multiply-adds,
    100 us and more, are shared among threads.
    """
    if num_threads() >= cores():
        library().braid_set_shared_work(_CROWDED_WORK)


def set_spin_us(microseconds: int) -> None:
    """How long an idle worker watches for more work before it sleeps. Process-wide; default 50."""
    if microseconds < 0:
        raise FieldError("spin_us", microseconds, "must be >= 0")
    library().braid_set_spin_us(microseconds)


def check_descriptor(size: int, expected: int, name: str) -> None:
    """Raise BuildError where a ctypes mirror and its C struct differ."""
    if size != expected:
        raise BuildError(f"{name} is {size} bytes here and {expected} in the library")


def dtype_code(name: str, tensor: torch.Tensor) -> int:
    """The library's code for the dtype of a call's tensor. Raises InputError for what it cannot read."""
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None or not tensor.is_cpu:
        raise InputError(name, f"{tensor.dtype} on {tensor.device}", "must be float32 or bfloat16 on the CPU")
    return code


def failure(status: int, values: dict[str, torch.Tensor]) -> KernelError:
    """The error behind a non-zero status (see `Code` in cpp/common.h)."""
    code, index = status >> 32, status & 0xFFFFFFFF
    match code:
        case 1:
            name, rule = "cu_seqlens", "must start at 0, never decrease, and end at num_tokens"
        case 2:
            name, rule = "state_in", "must be -1 or an existing slot"
        case 3:
            name, rule = "state_out", "must be -1 or an existing slot"
        case 4:
            name, rule = "state_out", "is read or written elsewhere in this step"
        case 5:
            name, rule = "context_lens", "must be >= 0 and, with the new tokens, fit the page table"
        case 6:
            name, rule = "page_table", "must be an existing page"
        case 8:
            return PlanError("plan.prefix_chunks", index, "does not cover the prefix of this sequence")
        case _:
            return BuildError("the kernel ran out of memory for its workspace")
    flat = values[name].reshape(-1)
    where = f"{name}[{index}]"
    if name == "page_table":
        width = values[name].shape[1]
        where = f"page_table[{index // width}][{index % width}]"
    return MetadataError(where, int(flat[index]), rule)
