"""Private copies of a batch's arrays, and the rules they obey, checked for every step.

Both are C++ where all is well; a batch that breaks a rule is looked at by `batch.check`, which says why.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from braid_kernels.build import WIRE, build
from braid_kernels.errors import BuildError

from braid_wire.batch import MODE_CODES, PAGE_FIELDS, SHARED_DTYPES, STATE_FIELDS, Pools, check, mode_label

_SPANS = ("cu_seqlens", "context_lens", "modes", "sequence_ids")


_LABELS = {-1: "mixed", **{code: mode.value for mode, code in MODE_CODES.items()}}
"""By the number that the library gives."""


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
        ("keys", ctypes.c_int64),
        ("mode", ctypes.c_int64),
    )


class _Copy(ctypes.Structure):
    _fields_ = (("to", ctypes.c_void_p), ("source", ctypes.c_void_p), ("bytes", ctypes.c_int64))


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(build(WIRE)))
    except (BuildError, OSError):
        return None  # whoever looks for doorbells says why, once
    library.braid_batch_holds.restype = ctypes.c_int32
    library.braid_batch_holds.argtypes = [ctypes.c_void_p]
    library.braid_copy_arrays.restype = None
    library.braid_copy_arrays.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


class Snapshot:
    """Private copies of arrays in shared memory.

    Checks and kernels read the same copies, so a peer that changes the memory after the check reaches no
    kernel.

    Args:
        places: name → array in shared memory; kept alive by this object.
    """

    def __init__(self, places: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._places = dict(places)
        self.arrays: Mapping[str, torch.Tensor] = {
            name: torch.empty(place.shape, dtype=place.dtype) for name, place in self._places.items()
        }
        dense = [name for name, place in self._places.items() if place.is_contiguous()]
        self._strided = [name for name in self._places if name not in dense]
        self._copies = (_Copy * len(dense))()
        for copy, name in zip(self._copies, dense, strict=True):
            place = self._places[name]
            copy.to, copy.source = self.arrays[name].data_ptr(), place.data_ptr()
            copy.bytes = place.numel() * place.itemsize
        self._address = ctypes.addressof(self._copies)

    def refresh(self) -> None:
        """Copy what the shared arrays hold now."""
        library = _library()
        if library is None:
            for name, place in self._places.items():
                self.arrays[name].copy_(place)
            return
        library.braid_copy_arrays(self._address, len(self._copies))
        for name in self._strided:
            self.arrays[name].copy_(self._places[name])


class BatchCheck:
    """Checks the batches of one role in one service.

    Args:
        pools: what their references are checked against; kept alive by this object.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._names: tuple[str, ...] = _SPANS
        if pools.page_generation is not None:
            self._names += PAGE_FIELDS
        if pools.slot_generation is not None:
            self._names += STATE_FIELDS

    def __call__(self, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        """Check a batch's private copies, whose dtypes and shapes are right; raises as `batch.check`."""
        self.bind(arrays, num_tokens)()

    def bind(self, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> BoundCheck:
        """The check of arrays whose values change from step to step, and nothing else of them."""
        pools = self._pools
        batch = _Batch(page_size=pools.page_size, tokens=num_tokens, sequences=len(arrays["context_lens"]))
        if pools.page_generation is not None:
            batch.pages = len(pools.page_generation)
            batch.page_generation = pools.page_generation.ctypes.data
            batch.columns = arrays["page_table"].shape[1]
        if pools.slot_generation is not None:
            batch.slots = len(pools.slot_generation)
            batch.slot_generation = pools.slot_generation.ctypes.data
        for name in self._names:
            setattr(batch, name, arrays[name].data_ptr())
        return BoundCheck(batch, arrays, num_tokens, pools)

    def holds(self, arrays: Mapping[str, torch.Tensor], num_tokens: int) -> bool:
        """Whether a batch is known to obey every rule; False where it does not, or nobody can tell."""
        return self._fits(arrays, num_tokens) and self.bind(arrays, num_tokens).holds()

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


class BoundCheck:
    """The rules of a batch, bound to the arrays that they are checked on."""

    def __init__(
        self, batch: _Batch, arrays: Mapping[str, torch.Tensor], num_tokens: int, pools: Pools
    ) -> None:
        self._batch = batch
        self._address = ctypes.addressof(batch)
        self._arrays = arrays
        self._num_tokens = num_tokens
        self._pools = pools

    def __call__(self) -> tuple[str, int]:
        """Check what the arrays hold now; raises as `batch.check`.

        Returns:
            The mode of all sequences, or "mixed"; and the sum of contexts and tokens.
        """
        if self.holds():
            return _LABELS[self._batch.mode], self._batch.keys
        arrays = {name: array.numpy() for name, array in self._arrays.items()}
        check(arrays, self._num_tokens, self._pools)
        return mode_label(arrays["modes"]), int(arrays["context_lens"].sum(dtype=np.int64)) + self._num_tokens

    def holds(self) -> bool:
        """Whether they are known to obey every rule; False where they do not, or nobody can tell."""
        library = _library()
        return library is not None and bool(library.braid_batch_holds(self._address))
