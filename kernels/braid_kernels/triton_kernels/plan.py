"""Planning of one step: which spans run token by token and which in chunks, and where the chunks lie.

A plan depends on the metadata alone, so one serves all linear layers of a step. Making it needs the
spans on the host: pass them where they are known, or planning copies them from the device, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braid_kernels.errors import MetadataError
from braid_kernels.metadata import NO_SLOT, LinearMeta
from braid_kernels.reference.backend import check_slots, check_spans

Ints = NDArray[np.int32]

_ALIGNED = 4  # elements of 4 bytes


@dataclass(frozen=True, eq=False)
class HostSpans:
    """The values of a LinearMeta's three tensors, on the host."""

    cu_seqlens: Ints  # [B+1]
    state_in: Ints  # [B]
    state_out: Ints  # [T]

    @staticmethod
    def of(meta: LinearMeta) -> HostSpans:
        """Copies from the device in one transfer (and so one synchronisation)."""
        if meta.cu_seqlens.device.type == "cpu":
            parts = [meta.cu_seqlens.numpy(), meta.state_in.numpy(), meta.state_out.numpy()]
        else:
            batch = meta.num_sequences
            both = torch.cat([meta.cu_seqlens, meta.state_in, meta.state_out]).cpu().numpy()
            parts = [both[: batch + 1], both[batch + 1 : 2 * batch + 1], both[2 * batch + 1 :]]
        return HostSpans(*parts)


@dataclass(frozen=True, eq=False)
class LinearPlan:
    """One step, laid out for the kernels. All tensors int32, on the device of the pools.

    token_span [T]: the sequence of each row. recurrent [R]: sequences that run token by token.
    chunked [S]: sequences that run in chunks, whose chunks are span_chunks[s] .. span_chunks[s+1] of
    chunk_row [N] (first row) and chunk_len [N] (rows). A chunk ends where its span ends, where it is
    full, or where a state is asked for.
    """

    num_tokens: int
    cu_seqlens: Tensor
    state_in: Tensor
    state_out: Tensor
    token_span: Tensor
    recurrent: Tensor
    chunked: Tensor
    span_chunks: Tensor
    chunk_row: Tensor
    chunk_len: Tensor
    host: HostSpans
    max_slot: int

    @property
    def num_chunks(self) -> int:
        return self.chunk_row.shape[0]

    def check_pool(self, num_slots: int) -> None:
        """Raise MetadataError where a slot lies outside a pool of `num_slots`."""
        if self.max_slot >= num_slots:
            check_slots(self.host.state_in.tolist(), self.host.state_out.tolist(), num_slots)


def _check(host: HostSpans, rows: int) -> int:
    """The largest slot named. Raises MetadataError for spans or slots that cannot be."""
    cu = host.cu_seqlens
    if cu[0] != 0 or cu[-1] != rows or (np.diff(cu) < 0).any():
        check_spans(cu.tolist(), rows)
    written = host.state_out[host.state_out != NO_SLOT]
    named = np.concatenate([host.state_in, written])
    lowest, highest = int(named.min(initial=NO_SLOT)), int(named.max(initial=NO_SLOT))
    distinct = np.unique(written).size == written.size
    if lowest < NO_SLOT or not distinct or np.isin(written, host.state_in).any():
        check_slots(host.state_in.tolist(), host.state_out.tolist(), highest + 1)
    return highest


def _cut(begin: int, end: int, asked: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """(first row, rows) of the chunks of one span; `asked`: its rows whose state is written."""
    cuts: list[tuple[int, int]] = []
    for stop in sorted({*(t + 1 for t in asked), end}):
        cuts += [(row, min(chunk, stop - row)) for row in range(begin, stop, chunk)]
        begin = stop
    return cuts


def upload(parts: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Host arrays on the device, in one copy in the order of the current stream.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for every other alignment.
    """
    room = [-(-part.shape[0] // _ALIGNED) * _ALIGNED for part in parts]
    packed = torch.zeros(sum(room), dtype=torch.int32)
    places = packed.split(room)
    for place, part in zip(places, parts, strict=True):
        place[: part.shape[0]] = torch.from_numpy(part)
    if device.type == "cuda":
        places = packed.pin_memory().to(device, non_blocking=True).split(room)
    return [place[: part.shape[0]] for place, part in zip(places, parts, strict=True)]


def plan_step(
    meta: LinearMeta, device: torch.device, chunk: int, short_span: int, host: HostSpans | None = None
) -> LinearPlan:
    """Plan a step for pools on `device`.

    Spans of at most short_span tokens, and those whose chunks would hold fewer than that on average
    (verification asks for a state at every token), run token by token.
    Raises MetadataError for spans or slots that cannot be, or a `host` of other sizes.
    """
    if host is None:
        host = HostSpans.of(meta)
    elif (len(host.state_in), len(host.state_out)) != (meta.num_sequences, meta.num_tokens):
        raise MetadataError("host", (len(host.state_in), len(host.state_out)), "is not this step's")
    highest = _check(host, meta.num_tokens)
    cu, lengths = host.cu_seqlens.tolist(), np.diff(host.cu_seqlens)
    asked = np.flatnonzero(host.state_out != NO_SLOT)
    recurrent: list[int] = []
    chunked: list[int] = []
    counts = [0]
    chunks: list[tuple[int, int]] = []
    for b in np.flatnonzero(lengths).tolist():
        begin, end = cu[b], cu[b + 1]
        if end - begin <= short_span:
            recurrent.append(b)
            continue
        inside = asked[np.searchsorted(asked, begin) : np.searchsorted(asked, end)]
        cuts = _cut(begin, end, inside.tolist(), chunk)
        if len(cuts) > 1 and len(cuts) * short_span > end - begin:
            recurrent.append(b)
            continue
        chunked.append(b)
        chunks += cuts
        counts.append(len(chunks))
    parts: list[Ints] = [
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        np.array(recurrent, np.int32),
        np.array(chunked, np.int32),
        np.array(counts, np.int32),
        np.array([row for row, _ in chunks], np.int32),
        np.array([rows for _, rows in chunks], np.int32),
    ]
    if meta.cu_seqlens.device == device:
        given = [meta.cu_seqlens, meta.state_in, meta.state_out]
    else:
        given = []
        parts += [host.cu_seqlens, host.state_in, host.state_out]
    views = upload(parts, device)
    cu_seqlens, state_in, state_out = given or views[6:]
    token_span, recurrent_spans, chunked_spans, span_chunks, chunk_row, chunk_len = views[:6]
    return LinearPlan(
        num_tokens=meta.num_tokens,
        cu_seqlens=cu_seqlens,
        state_in=state_in,
        state_out=state_out,
        token_span=token_span,
        recurrent=recurrent_spans,
        chunked=chunked_spans,
        span_chunks=span_chunks,
        chunk_row=chunk_row,
        chunk_len=chunk_len,
        host=host,
        max_slot=highest,
    )
