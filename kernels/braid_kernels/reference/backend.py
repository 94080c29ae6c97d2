"""The reference backend: the naive functions wired to the layer interface.

Computes in float64 and casts on the way out. Stands in where there is no compiler.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from braid_kernels.backend import (
    Capabilities,
    FullBackend,
    FullKernel,
    FullLayer,
    FullPlan,
    LinearBackend,
    LinearKernel,
    LinearLayer,
    Planning,
    PrefixChunk,
    Ragged,
)
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.errors import MetadataError
from braid_kernels.geometry import (
    FullGeometry,
    GatedDelta,
    Gqa,
    KimiDelta,
    Lightning,
    Mamba1,
    Mamba2,
    Mla,
    ShortConv,
    signature,
)
from braid_kernels.metadata import NO_SLOT, LinearMeta, PagedMeta
from braid_kernels.planning import (
    PREFIX_CHUNK_TOKENS,
    check_chunks,
    check_plan,
    expanded_bytes,
    extends,
    number_option,
    plan_chunks,
    summarise_plan,
)
from braid_kernels.reference.attention import (
    append_kv,
    attend,
    expand_latent,
    gather,
    merge_lse,
    mla_rows,
    paged_attention,
)
from braid_kernels.reference.conv import causal_conv, silu
from braid_kernels.reference.gates import (
    bounded_log_decay,
    l2norm,
    mamba2_dt,
    sigmoid_beta,
    softplus,
    softplus_log_decay,
)
from braid_kernels.reference.mamba1 import rms_norm, selective_scan
from braid_kernels.reference.recurrence import recurrence

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float64})


def check_spans(cu: list[int], rows: int) -> None:
    """Raise MetadataError unless cu starts at 0, never decreases and ends at rows."""
    if cu[0] != 0:
        raise MetadataError("cu_seqlens[0]", cu[0], "must be 0")
    for b in range(len(cu) - 1):
        if cu[b + 1] < cu[b]:
            raise MetadataError(f"cu_seqlens[{b + 1}]", cu[b + 1], "must not be less than its predecessor")
    if cu[-1] != rows:
        raise MetadataError("cu_seqlens[-1]", cu[-1], f"must equal num_tokens ({rows})")


def check_slots(state_in: list[int], state_out: list[int], num_slots: int) -> None:
    """Raise MetadataError unless slots exist, state_out is distinct and disjoint from state_in."""
    for field, slots in (("state_in", state_in), ("state_out", state_out)):
        for i, slot in enumerate(slots):
            if not NO_SLOT <= slot < num_slots:
                raise MetadataError(f"{field}[{i}]", slot, f"must be -1 or a slot below {num_slots}")
    taken = set(state_in)
    for t, slot in enumerate(state_out):
        if slot == NO_SLOT:
            continue
        if slot in taken:
            raise MetadataError(f"state_out[{t}]", slot, "is read or written elsewhere in this step")
        taken.add(slot)


def check_pages(meta: PagedMeta, cu: list[int], page_size: int, num_pages: int, window: int) -> None:
    """Raise MetadataError unless every page that some position of the step needs exists."""
    table = meta.page_table.tolist()
    for b, context in enumerate(meta.context_lens.tolist()):
        end = context + cu[b + 1] - cu[b]
        if end == context:
            continue
        first = max(0, context - window + 1) if window else 0
        if context < 0 or end > len(table[b]) * page_size:
            raise MetadataError(f"context_lens[{b}]", context, f"must be >= 0, room for {end - context} more")
        for i in range(first // page_size, (end - 1) // page_size + 1):
            if not 0 <= table[b][i] < num_pages:
                raise MetadataError(f"page_table[{b}][{i}]", table[b][i], f"must be a page below {num_pages}")


class ReferenceLinearKernel(LinearKernel):
    """One linear layer, naively."""

    def __init__(self, layer: LinearLayer) -> None:
        self._layer = layer
        self._signature = signature(layer.geometry)

    def __call__(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> None:
        check_inputs(inputs, meta.num_tokens, self._signature.inputs)
        check_rows("out", out, meta.num_tokens, self._signature.output)
        cu, slots_in, slots_out = (x.tolist() for x in (meta.cu_seqlens, meta.state_in, meta.state_out))
        check_spans(cu, meta.num_tokens)
        check_slots(slots_in, slots_out, self._layer.num_slots)
        spans = (cu, slots_in, slots_out)
        match self._layer.geometry:
            case GatedDelta() as g:
                result = self._gated_delta(g, inputs, spans)
            case KimiDelta() as g:
                result = self._kimi_delta(g, inputs, spans)
            case Lightning() as g:
                result = self._lightning(g, inputs, spans)
            case Mamba2() as g:
                result = self._mamba2(g, inputs, spans)
            case Mamba1() as g:
                result = self._mamba1(g, inputs, spans)
            case ShortConv():
                result = self._conv(inputs["x"], spans)
        out.copy_(result)

    def _conv(self, x: Tensor, spans: tuple[list[int], list[int], list[int]]) -> Tensor:
        """Causal convolution; float64 [T, C]."""
        params = self._layer.params
        return causal_conv(x, params["conv_weight"], params.get("conv_bias"), *spans, self._layer.conv)

    def _gated_delta(
        self, g: GatedDelta, x: Mapping[str, Tensor], spans: tuple[list[int], list[int], list[int]]
    ) -> Tensor:
        p, rows, key_dim = self._layer.params, x["a"].shape[0], g.num_k_heads * g.k_head_dim
        mixed = silu(self._conv(x["mixed_qkv"], spans))
        q, k, v = mixed.split([key_dim, key_dim, g.num_v_heads * g.v_head_dim], dim=-1)
        return recurrence(
            l2norm(q.view(rows, g.num_k_heads, g.k_head_dim)),
            l2norm(k.view(rows, g.num_k_heads, g.k_head_dim)),
            v.view(rows, g.num_v_heads, g.v_head_dim),
            softplus_log_decay(x["a"], p["A_log"], p["dt_bias"]),
            sigmoid_beta(x["b"], g.beta_scale),
            True,
            g.scale,
            None,
            *spans,
            self._layer.state,
        )

    def _kimi_delta(
        self, g: KimiDelta, x: Mapping[str, Tensor], spans: tuple[list[int], list[int], list[int]]
    ) -> Tensor:
        p, rows = self._layer.params, x["b"].shape[0]
        q, k, v = silu(self._conv(x["mixed_qkv"], spans)).view(rows, 3, g.num_heads, g.head_dim).unbind(1)
        gate = x["a"].view(rows, g.num_heads, g.head_dim)
        A_log, dt_bias = p["A_log"][:, None], p["dt_bias"].view(g.num_heads, g.head_dim)
        if g.gate_lower_bound:
            log_alpha = bounded_log_decay(gate, A_log, dt_bias, g.gate_lower_bound)
        else:
            log_alpha = softplus_log_decay(gate, A_log, dt_bias)
        beta = sigmoid_beta(x["b"])
        return recurrence(
            l2norm(q), l2norm(k), v, log_alpha, beta, True, g.scale, None, *spans, self._layer.state
        )

    def _lightning(
        self, g: Lightning, x: Mapping[str, Tensor], spans: tuple[list[int], list[int], list[int]]
    ) -> Tensor:
        q, k, v = x["q"], x["k"], x["v"]
        if g.activation == "silu":
            q, k, v = silu(q), silu(k), silu(v)
        log_alpha = self._layer.params["log_decay"].double().expand(q.shape[0], -1)
        beta = torch.ones(log_alpha.shape, dtype=torch.float64)
        return recurrence(q, k, v, log_alpha, beta, False, g.scale, None, *spans, self._layer.state)

    def _mamba2(
        self, g: Mamba2, inputs: Mapping[str, Tensor], spans: tuple[list[int], list[int], list[int]]
    ) -> Tensor:
        p, rows, group_dim = self._layer.params, inputs["dt"].shape[0], g.num_groups * g.state_dim
        mixed = silu(self._conv(inputs["xBC"], spans))
        x, B, C = mixed.split([g.num_heads * g.head_dim, group_dim, group_dim], dim=-1)
        dt = mamba2_dt(inputs["dt"], p["dt_bias"], g.dt_min, g.dt_max)  # [T, H]
        return recurrence(
            C.view(rows, g.num_groups, g.state_dim),
            B.view(rows, g.num_groups, g.state_dim),
            x.view(rows, g.num_heads, g.head_dim),
            -p["A_log"].double().exp() * dt,
            dt,
            False,
            1.0,
            p["D"],
            *spans,
            self._layer.state,
        )

    def _mamba1(
        self, g: Mamba1, inputs: Mapping[str, Tensor], spans: tuple[list[int], list[int], list[int]]
    ) -> Tensor:
        p = self._layer.params
        u = silu(self._conv(inputs["x"], spans))
        low, B, C = (u @ p["x_proj"].double().T).split([g.dt_rank, g.state_dim, g.state_dim], dim=-1)
        low, B, C = (
            rms_norm(x, p.get(name), g.norm_eps)
            for x, name in ((low, "dt_norm"), (B, "B_norm"), (C, "C_norm"))
        )
        dt = softplus(low @ p["dt_proj"].double().T + p["dt_bias"].double())  # [T, I]
        return selective_scan(u, dt, p["A_log"], B, C, p["D"], *spans, self._layer.state)


_Spans = tuple[list[int], list[int], list[list[int]]]
"""cu_seqlens, context_lens, page_table."""


class ReferenceFullKernel(FullKernel):
    """One full layer, naively: absorbed and in one go, unless a plan has mla attend in chunks."""

    def __init__(self, layer: FullLayer) -> None:
        self._layer = layer
        self._signature = signature(layer.geometry)

    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        check_plan(plan, meta, Planning.OPTIONAL)
        check_inputs(inputs, meta.num_tokens, self._signature.inputs)
        check_rows("out", out, meta.num_tokens, self._signature.output)
        cu = meta.cu_seqlens.tolist()
        check_spans(cu, meta.num_tokens)
        geometry = self._layer.geometry
        window = geometry.sliding_window if isinstance(geometry, Gqa) else 0
        check_pages(meta, cu, self._layer.page_size, self._layer.num_pages, window)
        spans = (cu, meta.context_lens.tolist(), meta.page_table.tolist())
        chunks = None if plan is None or plan.payload is None else plan.prefix_chunks
        if chunks is not None:
            check_chunks(chunks, meta)
        match geometry:
            case Gqa():
                result = self._gqa(geometry, inputs, spans)
            case Mla():
                result = self._mla(geometry, inputs, spans)
                if chunks is not None:
                    self._expanded(geometry, inputs, spans, extends(meta), chunks, result)
        out.copy_(result)

    def _gqa(self, g: Gqa, x: Mapping[str, Tensor], spans: _Spans) -> Tensor:
        caches = self._layer.caches
        append_kv(x["k"], caches["k"], *spans)
        append_kv(x["v"], caches["v"], *spans)
        return paged_attention(x["q"], caches["k"], caches["v"], *spans, g.scale, g.sliding_window)[0]

    def _mla(self, g: Mla, x: Mapping[str, Tensor], spans: _Spans) -> Tensor:
        p, cache = self._layer.params, self._layer.caches["latent"]
        q, rows = mla_rows(x["q_nope"], x["q_pe"], p["w_uk"], x["c_kv"], x["k_pe"])
        append_kv(rows, cache, *spans)
        keys = cache[:, :, None, :]  # one latent "head" serves every query head
        latent, _ = paged_attention(q, keys, keys[..., : g.kv_lora_rank], *spans, g.scale)
        return torch.einsum("thr,hrv->thv", latent, p["w_uv"].double())

    def _expanded(
        self,
        g: Mla,
        x: Mapping[str, Tensor],
        spans: _Spans,
        extend: list[bool],
        chunks: tuple[PrefixChunk, ...],
        result: Tensor,
    ) -> None:
        """The rows of spans that continue a prompt, as planned; the latents are in their pages already."""
        p, cache = self._layer.params, self._layer.caches["latent"]
        q = torch.cat([x["q_nope"], x["q_pe"]], dim=-1).double()  # [T, H, dn + dr]
        for b, context in enumerate(spans[1]):
            begin, end, pages = spans[0][b], spans[0][b + 1], spans[2][b]
            if begin == end or not extend[b]:
                continue
            new = gather(cache, pages, context, context + end - begin)
            out, lse = attend(q[begin:end], *expand_latent(new, p["w_uk"], p["w_uv"]), g.scale, causal=True)
            for chunk in chunks:
                first, length = chunk.starts[b], chunk.lengths[b]
                k, v = expand_latent(gather(cache, pages, first, first + length), p["w_uk"], p["w_uv"])
                out, lse = merge_lse(out, lse, *attend(q[begin:end], k, v, g.scale, causal=False))
            result[begin:end] = out


class ReferenceLinearBackend(LinearBackend):
    """All linear mechanisms in float64."""

    name = "reference"
    capabilities = Capabilities(
        planning=Planning.NONE,
        chunked_prefix=True,
        ragged=Ragged.SUPPORTED,
        graphs=False,
        mechanisms=frozenset({"gated_delta", "kimi_delta", "lightning", "mamba2", "mamba1", "short_conv"}),
        dtypes=DTYPES,
    )

    def layer(self, layer: LinearLayer) -> LinearKernel:
        return ReferenceLinearKernel(layer)


class ReferenceFullBackend(FullBackend):
    """gqa and mla in float64. Option: prefix_chunk_tokens, by which mla prompts attend in chunks."""

    name = "reference"
    capabilities = Capabilities(
        planning=Planning.OPTIONAL,
        chunked_prefix=True,
        ragged=Ragged.FORCED_OFF,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=DTYPES,
    )

    def layer(self, layer: FullLayer) -> FullKernel:
        self.capabilities.check(layer.geometry.mechanism)
        return ReferenceFullKernel(layer)

    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        checked = summarise_plan(meta, page_size, options, {PREFIX_CHUNK_TOKENS})
        plan = plan_chunks(checked, meta, page_size, number_option(options, PREFIX_CHUNK_TOKENS), layers)
        return replace(plan, workspace_bytes=expanded_bytes(plan.prefix_chunks, layers, 8))
