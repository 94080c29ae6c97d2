"""The rules of a batch, checked for every step: in C++ where all is well, by `batch.check` otherwise."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from braid_kernels.build import WIRE, build
from braid_kernels.errors import BuildError

from braid_wire.batch import PAGE_FIELDS, SHARED_DTYPES, STATE_FIELDS, Pools, check

_SPANS = ("cu_seqlens", "context_lens", "modes", "sequence_ids")


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (*_SPANS, *PAGE_FIELDS)),
        ("columns", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("pages", ctypes.c_int64),
        ("page_generation", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in STATE_FIELDS),
        ("slots", ctypes.c_int64),
        ("slot_generation", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(build(WIRE)))
    except (BuildError, OSError):
        return None  # whoever looks for doorbells says why, once
    library.braid_batch_holds.restype = ctypes.c_int32
    library.braid_batch_holds.argtypes = [ctypes.c_void_p]
    return library


class BatchCheck:
    """Checks the batches of one role in one service.

    Args:
        pools: what their references are checked against; kept alive by this object.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._names: tuple[str, ...] = _SPANS
        self._batch = _Batch(page_size=pools.page_size)
        if pools.page_generation is not None:
            self._names += PAGE_FIELDS
            self._batch.pages = len(pools.page_generation)
            self._batch.page_generation = pools.page_generation.ctypes.data
        if pools.slot_generation is not None:
            self._names += STATE_FIELDS
            self._batch.slots = len(pools.slot_generation)
            self._batch.slot_generation = pools.slot_generation.ctypes.data

    def __call__(self, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        """Check a batch's private copies, whose dtypes and shapes are right; raises as `batch.check`."""
        library = _library()
        if library is None or not self._obeys(library, arrays, num_tokens):
            check({name: array.numpy() for name, array in arrays.items()}, num_tokens, self._pools)

    def holds(self, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> bool:
        """Whether a batch is known to obey every rule; False where it does not, or nobody can tell."""
        library = _library()
        return (
            library is not None
            and self._fits(arrays, num_tokens)
            and self._obeys(library, arrays, num_tokens)
        )

    def _obeys(self, library: ctypes.CDLL, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> bool:
        batch = self._batch
        batch.tokens, batch.sequences = num_tokens, len(arrays["context_lens"])
        if "page_table" in self._names:
            batch.columns = arrays["page_table"].shape[1]
        for name in self._names:
            setattr(batch, name, arrays[name].data_ptr())
        return bool(library.braid_batch_holds(ctypes.addressof(batch)))

    def _fits(self, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> bool:
        """Whether the arrays are as large as they are read."""
        if any(name not in arrays for name in self._names):
            return False
        sequences = len(arrays["context_lens"])
        for name in self._names:
            array, wanted = arrays[name], sequences
            if name in PAGE_FIELDS:
                if array.dim() != 2 or array.shape != arrays["page_table"].shape:
                    return False
            elif array.dim() != 1:
                return False
            if name == "cu_seqlens":
                wanted += 1
            elif name.startswith("state_out"):
                wanted = num_tokens
            if len(array) != wanted or array.dtype is not SHARED_DTYPES[name] or not array.is_contiguous():
                return False
        return True
