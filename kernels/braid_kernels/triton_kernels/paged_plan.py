"""Planning of one step of full attention: where new rows go, and which tiles attend to what."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from braid_kernels.errors import MetadataError
from braid_kernels.metadata import PagedMeta
from braid_kernels.planning import summarise_plan
from braid_kernels.triton_kernels.plan import Ints, upload


@dataclass(frozen=True, eq=False)
class HostPages:
    """The values of a PagedMeta's tensors, on the host."""

    cu_seqlens: Ints  # [B+1]
    context_lens: Ints  # [B]
    page_table: Ints  # [B, P]

    @staticmethod
    def of(meta: PagedMeta) -> HostPages:
        """Copies from the device where they lie there."""
        return HostPages(*(x.cpu().numpy() for x in (meta.cu_seqlens, meta.context_lens, meta.page_table)))


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of BLOCK_R rows, int32 on the device: the span of each, and its first row inside it."""

    span: Tensor
    row: Tensor
    rows: Tensor
    """Of the batch, all that lie in these tiles."""
    longest: int
    """Keys of the longest sequence among them."""

    def __len__(self) -> int:
        return int(self.span.shape[0])


@dataclass(frozen=True, eq=False)
class PagedPlan:
    """One step, laid out for the kernels. All tensors int32, on the device of the caches.

    row_page, row_offset [T]: where each new row goes. short: spans of one row, a tile each; long: all
    others, in tiles of `long_rows` rows.
    """

    num_tokens: int
    cu_seqlens: Tensor
    context_lens: Tensor
    page_table: Tensor
    row_page: Tensor
    row_offset: Tensor
    short: Tiles
    long: Tiles
    long_rows: int
    host: HostPages

    def check_pages(self, page_size: int, num_pages: int, window: int) -> None:
        """Raise MetadataError unless every page that some position of the step needs exists."""
        host = self.host
        lengths = np.diff(host.cu_seqlens)
        last = (host.context_lens + lengths - 1) // page_size
        first = np.maximum(host.context_lens - window + 1, 0) // page_size if window else np.zeros_like(last)
        column = np.arange(host.page_table.shape[1])
        needed = (column >= first[:, None]) & (column <= last[:, None]) & (lengths > 0)[:, None]
        wrong = needed & ((host.page_table < 0) | (host.page_table >= num_pages))
        if wrong.any():
            b, i = (int(x) for x in np.argwhere(wrong)[0])
            raise MetadataError(
                f"page_table[{b}][{i}]", int(host.page_table[b, i]), f"must be a page below {num_pages}"
            )


def plan_pages(meta: PagedMeta, page_size: int, device: torch.device, long_rows: int) -> PagedPlan:
    """Plan a step for caches on `device`.

    long_rows: rows of a tile of a span with more than one row.
    Raises MetadataError for spans that cannot be.
    """
    summarise_plan(meta, page_size, {})
    host = HostPages.of(meta)
    lengths = np.diff(host.cu_seqlens)
    ends = host.context_lens + lengths
    span = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    position = np.arange(len(span), dtype=np.int32) - host.cu_seqlens[span] + host.context_lens[span]
    pages = host.page_table[span, position // page_size] if len(span) else np.zeros(0, np.int32)
    one, more = np.flatnonzero(lengths == 1), np.flatnonzero(lengths > 1)
    counts = -(-lengths[more] // long_rows)
    first = [np.arange(count, dtype=np.int32) * long_rows for count in counts.tolist()]
    parts: Sequence[Ints] = [
        pages.astype(np.int32),
        (position % page_size).astype(np.int32),
        one.astype(np.int32),
        np.zeros(len(one), np.int32),
        host.cu_seqlens[one].astype(np.int32),
        np.repeat(more, counts).astype(np.int32),
        np.concatenate([np.zeros(0, np.int32), *first]),
        np.flatnonzero(np.isin(span, more)).astype(np.int32),
        host.cu_seqlens.astype(np.int32),
        host.context_lens.astype(np.int32),
        host.page_table.astype(np.int32).reshape(-1),
    ]
    views = upload(parts, device)
    return PagedPlan(
        num_tokens=meta.num_tokens,
        cu_seqlens=views[8],
        context_lens=views[9],
        page_table=views[10].view(host.page_table.shape),
        row_page=views[0],
        row_offset=views[1],
        short=Tiles(views[2], views[3], views[4], int(ends[one].max(initial=0))),
        long=Tiles(views[5], views[6], views[7], int(ends[more].max(initial=0))),
        long_rows=long_rows,
        host=host,
    )


class PagedPlanCache:
    """The plan of each PagedMeta, kept as long as the PagedMeta lives. Safe between threads."""

    def __init__(self, long_rows: int) -> None:
        self._long_rows = long_rows
        self._plans: WeakKeyDictionary[PagedMeta, dict[tuple[int, torch.device], PagedPlan]]
        self._plans = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, meta: PagedMeta, page_size: int, device: torch.device) -> PagedPlan:
        """The plan for caches on `device`. Raises MetadataError."""
        with self._lock:
            plans = self._plans.setdefault(meta, {})
            key = page_size, device
            if key not in plans:
                plans[key] = plan_pages(meta, page_size, device, self._long_rows)
            return plans[key]
