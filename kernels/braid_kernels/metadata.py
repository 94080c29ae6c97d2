"""Batch metadata: which rows belong to which sequence, and where their memory lies.

Batches are packed: T token rows, B sequences, `cu_seqlens[b] .. cu_seqlens[b+1]` are the rows of
sequence b. A span may be empty. Construction checks dtypes, shapes and contiguity; the values are
checked by the kernels, which have to walk them anyway (MetadataError).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braid_kernels.errors import MetadataError

NO_SLOT = -1


def _int32(field: str, value: Tensor, dims: int) -> None:
    if value.dtype != torch.int32:
        raise MetadataError(field, value.dtype, "must be int32")
    if value.dim() != dims:
        raise MetadataError(field, tuple(value.shape), f"must have {dims} dimension(s)")
    if not value.is_contiguous():
        raise MetadataError(field, tuple(value.stride()), "must be contiguous")


def _sequences(field: str, value: Tensor, batch: int) -> None:
    if value.shape[0] != batch:
        raise MetadataError(field, tuple(value.shape), f"must have one entry per sequence ({batch})")


def _batch(cu_seqlens: Tensor) -> int:
    _int32("cu_seqlens", cu_seqlens, 1)
    if cu_seqlens.shape[0] < 1:
        raise MetadataError("cu_seqlens", tuple(cu_seqlens.shape), "must have B + 1 >= 1 entries")
    return cu_seqlens.shape[0] - 1


@dataclass(frozen=True, eq=False)
class LinearMeta:
    """Spans and state slots of one step on the linear layers.

    cu_seqlens: int32 [B+1], first 0, non-decreasing, last T.
    state_in: int32 [B], slot that holds the state before the span; -1 = start from zero.
    state_out: int32 [T], slot that receives the state AFTER that token; -1 = none.
    num_tokens: T; derived from state_out where it is not given.

    Precondition, checked by the CPU backends: the slots named in state_out are distinct and none of
    them is in any state_in. Several sequences may share one state_in. Slots that are not named in
    state_out are never written.
    """

    cu_seqlens: Tensor
    state_in: Tensor
    state_out: Tensor
    num_tokens: int = -1

    def __post_init__(self) -> None:
        batch = _batch(self.cu_seqlens)
        _int32("state_in", self.state_in, 1)
        _sequences("state_in", self.state_in, batch)
        _int32("state_out", self.state_out, 1)
        rows = self.state_out.shape[0]
        if self.num_tokens == -1:
            object.__setattr__(self, "num_tokens", rows)
        if self.num_tokens != rows:
            raise MetadataError("num_tokens", self.num_tokens, f"must equal the rows of state_out ({rows})")

    @property
    def num_sequences(self) -> int:
        return self.state_in.shape[0]


@dataclass(frozen=True, eq=False)
class PagedMeta:
    """Spans and KV pages of one step on the full layers.

    cu_seqlens: int32 [B+1], first 0, non-decreasing, last T.
    context_lens: int32 [B], tokens already in the cache before this step.
    page_table: int32 [B, max_pages], page that holds positions [i*page_size, (i+1)*page_size).
    Entries that no position of the sequence needs (beyond its end, or wholly before its sliding
    window) are never read and may hold anything.
    num_tokens: T; read from cu_seqlens where it is not given (which synchronises on a GPU).
    extend: bool [B], true where the span continues a prompt, false where it decodes or verifies; None:
    true for all. It steers how a plan has a span computed, never what comes out.
    """

    cu_seqlens: Tensor
    context_lens: Tensor
    page_table: Tensor
    num_tokens: int = -1
    extend: Tensor | None = None

    def __post_init__(self) -> None:
        batch = _batch(self.cu_seqlens)
        _int32("context_lens", self.context_lens, 1)
        _sequences("context_lens", self.context_lens, batch)
        _int32("page_table", self.page_table, 2)
        _sequences("page_table", self.page_table, batch)
        if self.extend is not None:
            if self.extend.dtype != torch.bool or self.extend.dim() != 1:
                raise MetadataError(
                    "extend", (self.extend.dtype, tuple(self.extend.shape)), "must be bool [B]"
                )
            _sequences("extend", self.extend, batch)
        if self.num_tokens == -1:
            object.__setattr__(self, "num_tokens", int(self.cu_seqlens[-1]))
        if self.num_tokens < 0:
            raise MetadataError("num_tokens", self.num_tokens, "must be >= 0")

    @property
    def num_sequences(self) -> int:
        return self.context_lens.shape[0]
