"""Full attention in plain torch over gathered pages: two backends that differ in what they can.

"direct" plans nothing and takes one span after the other. "gather" works out every position's place in
the pages once per step, so it needs its plan, and has mla prompts attend to their prefix in chunks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from braid_kernels.backend import (
    Capabilities,
    FullBackend,
    FullKernel,
    FullLayer,
    FullPlan,
    Planning,
    Ragged,
)
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.errors import PlanError
from braid_kernels.geometry import FullGeometry, Gqa, Mla, signature
from braid_kernels.metadata import PagedMeta
from braid_kernels.planning import (
    DEFAULT_CHUNK_TOKENS,
    PREFIX_CHUNK_TOKENS,
    check_plan,
    expanded_bytes,
    expands,
    extends,
    number_option,
    plan_chunks,
    summarise_plan,
)
from braid_kernels.reference.attention import expand_latent, first_key, merge_lse
from braid_kernels.reference.backend import check_pages, check_spans

BLOCK_ROWS = 128  # query rows whose scores are held at a time


@dataclass(frozen=True, eq=False)
class Places:
    """One span: rows begin..end of the batch, and where its positions 0..context + rows lie."""

    begin: int
    end: int
    context: int
    page: Tensor  # int64 [context + rows], where the caches lie
    offset: Tensor  # int64 [context + rows], likewise
    expand: bool
    chunks: tuple[tuple[int, int], ...]  # mla: (first position, positions) of each part of the prefix


def find_places(meta: PagedMeta, page_size: int, device: torch.device | None = None) -> list[Places]:
    """The spans that have rows; how mla attends is left to the caller."""
    cu, table = meta.cu_seqlens.tolist(), meta.page_table.long()
    places = []
    for b, context in enumerate(meta.context_lens.tolist()):
        begin, end = cu[b], cu[b + 1]
        if begin == end:
            continue
        position = torch.arange(context + end - begin)
        page, offset = table[b, position // page_size], position % page_size
        if device is not None:
            page, offset = page.to(device), offset.to(device)
        places.append(Places(begin, end, context, page, offset, False, ()))
    return places


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, ahead: int, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows q [L, Hq, D] over k [n, Hkv, D], v [n, Hkv, Dv]: out [L, Hq, Dv], natural-log lse [L, Hq]; fp32.

    ahead: position of the first row less that of the first key. Row i sees keys up to ahead + i, and
    under a window w only the last w of them. A row without a key is out 0, lse -inf.
    """
    rows, heads, _ = q.shape
    keys, kv_heads, _ = k.shape
    k, v = k.permute(1, 2, 0), v.transpose(0, 1)  # [Hkv, D, n], [Hkv, n, Dv]
    out = q.new_empty(rows, heads, v.shape[2])
    lse = q.new_empty(rows, heads)
    for begin in range(0, rows, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, rows)
        # The query heads of one KV head are rows of one product.
        block = q[begin:end].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, L, D]
        scores = scale * (block.flatten(1, 2) @ k).unflatten(1, (-1, end - begin))  # [Hkv, G, L, n]
        position = ahead + torch.arange(begin, end, device=q.device)[:, None]
        key = torch.arange(keys, device=q.device)
        hidden = key > position
        if window:
            hidden |= key <= position - window
        scores.masked_fill_(hidden, float("-inf"))
        total = torch.logsumexp(scores, dim=-1)  # [Hkv, G, L]
        weights = torch.exp(scores - total.masked_fill(total == float("-inf"), 0.0)[..., None])
        result = weights.flatten(1, 2) @ v
        out[begin:end] = result.unflatten(1, (-1, end - begin)).permute(2, 0, 1, 3).flatten(1, 2)
        lse[begin:end] = total.permute(2, 0, 1).flatten(1, 2)
    return out, lse


class GatheredKernel(FullKernel):
    """One full layer; it uses the plan's places where `planning` is REQUIRED, else finds its own."""

    def __init__(self, layer: FullLayer, planning: Planning) -> None:
        self._layer = layer
        self._planning = planning
        self._signature = signature(layer.geometry)
        self._device = next(iter(layer.caches.values())).device
        self._params = {name: param.to(self._device).float() for name, param in layer.params.items()}

    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        check_plan(plan, meta, self._planning)
        check_inputs(inputs, meta.num_tokens, self._signature.inputs)
        check_rows("out", out, meta.num_tokens, self._signature.output)
        cu, geometry = meta.cu_seqlens.tolist(), self._layer.geometry
        check_spans(cu, meta.num_tokens)
        window = geometry.sliding_window if isinstance(geometry, Gqa) else 0
        check_pages(meta, cu, self._layer.page_size, self._layer.num_pages, window)
        for place in self._places(meta, plan):
            rows = {name: tensor[place.begin : place.end] for name, tensor in inputs.items()}
            match geometry:
                case Gqa():
                    result = self._gqa(geometry, rows, place)
                case Mla():
                    result = self._mla(geometry, rows, place)
            out[place.begin : place.end] = result

    def _places(self, meta: PagedMeta, plan: FullPlan | None) -> list[Places]:
        if self._planning is not Planning.REQUIRED:
            geometry = self._layer.geometry
            places = find_places(meta, self._layer.page_size, self._device)
            if not isinstance(geometry, Mla):
                return places
            return [replace(p, expand=expands(geometry, p.end - p.begin, p.context)) for p in places]
        if plan is None or not isinstance(plan.payload, _Payload):
            raise PlanError("plan.payload", plan, "was made by another backend")
        if plan.payload.meta is not meta or plan.payload.page_size != self._layer.page_size:
            raise PlanError("plan", plan, "was made for another batch")
        return plan.payload.on(self._device)

    def _append(self, name: str, rows: Tensor, place: Places) -> None:
        cache = self._layer.caches[name]
        new = slice(place.context, None)
        cache[place.page[new], place.offset[new]] = rows.to(cache.dtype)

    def _read(self, name: str, place: Places, first: int, end: int) -> Tensor:
        """Positions first..end of one sequence, float32 [end - first, …]."""
        return self._layer.caches[name][place.page[first:end], place.offset[first:end]].float()

    def _gqa(self, g: Gqa, x: Mapping[str, Tensor], place: Places) -> Tensor:
        for name in ("k", "v"):
            self._append(name, x[name], place)
        first, end = first_key(place.context, g.sliding_window), place.context + place.end - place.begin
        k, v = (self._read(name, place, first, end) for name in ("k", "v"))
        return attend(x["q"].float(), k, v, g.scale, place.context - first, g.sliding_window)[0]

    def _mla(self, g: Mla, x: Mapping[str, Tensor], place: Places) -> Tensor:
        self._append("latent", torch.cat([x["c_kv"], x["k_pe"]], dim=-1), place)
        q_nope, q_pe = x["q_nope"].float(), x["q_pe"].float()
        end = place.context + place.end - place.begin
        if not place.expand:
            absorbed = torch.einsum("thd,hdr->thr", q_nope, self._params["w_uk"])
            keys = self._read("latent", place, 0, end)[:, None]  # one key for all heads
            values = keys[..., : g.kv_lora_rank]
            latent, _ = attend(torch.cat([absorbed, q_pe], dim=-1), keys, values, g.scale, place.context)
            return torch.einsum("thr,hrv->thv", latent, self._params["w_uv"])
        q = torch.cat([q_nope, q_pe], dim=-1)
        parts = [*place.chunks, (place.context, end - place.context)] if place.chunks else [(0, end)]
        out, lse = self._part(g, q, place, *parts[0])
        for first, length in parts[1:]:
            out, lse = merge_lse(out, lse, *self._part(g, q, place, first, length))
        return out

    def _part(self, g: Mla, q: Tensor, place: Places, first: int, length: int) -> tuple[Tensor, Tensor]:
        """The span's rows over expanded positions first..first + length."""
        latent = self._read("latent", place, first, first + length)
        k, v = expand_latent(latent, self._params["w_uk"], self._params["w_uv"])
        return attend(q, k, v, g.scale, place.context - first)


@dataclass(frozen=True, eq=False)
class _Payload:
    """What the kernels of "gather" need of a plan."""

    meta: PagedMeta
    page_size: int
    places: list[Places]
    elsewhere: dict[torch.device, list[Places]] = field(default_factory=dict)

    def on(self, device: torch.device) -> list[Places]:
        """The places with their tensors on a device; copied for the first layer that asks."""
        if device.type == "cpu":
            return self.places
        if device not in self.elsewhere:
            self.elsewhere[device] = [
                replace(place, page=place.page.to(device), offset=place.offset.to(device))
                for place in self.places
            ]
        return self.elsewhere[device]


class _GatheredBackend(FullBackend):
    """The kernel that both backends below share; they differ in whether they plan it."""

    def layer(self, layer: FullLayer) -> FullKernel:
        self.capabilities.check(layer.geometry.mechanism)
        return GatheredKernel(layer, self.capabilities.planning)


class DirectFullBackend(_GatheredBackend):
    """gqa and mla, span by span; plans nothing and has no option."""

    name = "direct"
    capabilities = Capabilities(
        planning=Planning.NONE,
        chunked_prefix=False,
        ragged=Ragged.FORCED_OFF,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        devices=frozenset({"cpu", "cuda"}),
    )

    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        return summarise_plan(meta, page_size, options)


class GatherFullBackend(_GatheredBackend):
    """gqa and mla by planned places. Option: prefix_chunk_tokens (8192 where it is not given)."""

    name = "gather"
    capabilities = Capabilities(
        planning=Planning.REQUIRED,
        chunked_prefix=True,
        ragged=Ragged.FORCED_OFF,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        devices=frozenset({"cpu", "cuda"}),
    )

    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        plan = summarise_plan(meta, page_size, options, {PREFIX_CHUNK_TOKENS})
        budget = number_option(options, PREFIX_CHUNK_TOKENS) or DEFAULT_CHUNK_TOKENS
        plan = plan_chunks(plan, meta, page_size, budget, layers)
        cu, extend = meta.cu_seqlens.tolist(), extends(meta)
        spans = [b for b in range(meta.num_sequences) if cu[b] < cu[b + 1]]
        places = []
        for b, place in zip(spans, find_places(meta, page_size), strict=True):
            parts = [(chunk.starts[b], chunk.lengths[b]) for chunk in plan.prefix_chunks]
            chunks = tuple((start, length) for start, length in parts if length)
            places.append(replace(place, expand=extend[b], chunks=chunks))
        size = expanded_bytes(plan.prefix_chunks, layers, 4)
        return replace(plan, workspace_bytes=size, payload=_Payload(meta, page_size, places))
