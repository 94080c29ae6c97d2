"""What an audit of a full-attention layer copies, and how the reference computes it again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from braid_kernels.backend import FullLayer
from braid_kernels.geometry import FullGeometry, Gqa, signature
from braid_kernels.metadata import PagedMeta
from braid_kernels.reference import ReferenceFullBackend
from braid_wire.audit import MOST_BYTES, MOST_TOKENS, OUTPUT, Sample, copied


def sample(
    geometry: FullGeometry,
    params: Mapping[str, torch.Tensor],
    caches: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    meta: PagedMeta,
) -> Sample | None:
    """Copies of a step's rows and of the pages that it reads or writes; None where they are too many.

    Args:
        geometry: the layer's, as the kernels have it.
        params: name → tensor.
        caches: name → [num_pages, page_size, …].
        inputs: name → [T, …].
        meta: spans and pages of the step.
    """
    if not 0 < meta.num_tokens <= MOST_TOKENS:
        return None
    page_size = next(iter(caches.values())).shape[1]
    needed = _needed(meta, page_size, geometry.sliding_window if isinstance(geometry, Gqa) else 0)
    pages, places = torch.unique(meta.page_table.cpu()[needed].long(), return_inverse=True)
    if sum(cache[0].nbytes for cache in caches.values()) * len(pages) > MOST_BYTES:
        return None
    table = torch.zeros(meta.page_table.shape, dtype=torch.int32)
    table[needed] = places.to(torch.int32)
    before = _pages(caches, pages)
    rows = {name: copied(tensor) for name, tensor in inputs.items()}
    local = PagedMeta(copied(meta.cu_seqlens), copied(meta.context_lens), table, meta.num_tokens)

    def recompute() -> Mapping[str, torch.Tensor]:
        layer = FullLayer(geometry, {name: copied(tensor) for name, tensor in params.items()}, before)
        output = torch.empty((local.num_tokens, *signature(geometry).output), dtype=torch.float64)
        ReferenceFullBackend().layer(layer)(rows, local, None, output)
        return {OUTPUT: output, **before}

    return Sample(lambda: _pages(caches, pages), recompute)


def _needed(meta: PagedMeta, page_size: int, window: int) -> torch.Tensor:
    """bool [B, max_pages]: the entries of the page table that some position of the step needs."""
    context, cu = meta.context_lens.cpu(), meta.cu_seqlens.cpu()
    lengths = cu.diff()
    first = (context - window + 1).clamp_min(0) // page_size if window else torch.zeros_like(context)
    last = torch.where(lengths > 0, (context + lengths - 1) // page_size, -1)
    index = torch.arange(meta.page_table.shape[1])
    return (index >= first[:, None]) & (index <= last[:, None])


def _pages(caches: Mapping[str, torch.Tensor], pages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Private copies of some pages, name → [len(pages), page_size, …]."""
    return {name: cache[pages.to(cache.device)].cpu() for name, cache in caches.items()}
