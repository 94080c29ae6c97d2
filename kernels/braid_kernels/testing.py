"""Cases for tests and benchmarks: random layers over poisoned memory, and how far results differ.

Everything that a kernel has no business reading or must overwrite is NaN: outputs, slots that are not
read, pages and page tails beyond a sequence's end, and the gaps between strided input rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from braid_kernels.backend import FullBackend, FullLayer, LinearBackend, LinearLayer
from braid_kernels.geometry import (
    FullGeometry,
    GatedDelta,
    KimiDelta,
    Lightning,
    LinearGeometry,
    Mamba1,
    Mamba2,
    Shape,
    ShortConv,
    signature,
)
from braid_kernels.metadata import NO_SLOT, LinearMeta, PagedMeta

NAN = float("nan")


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def cumulative(lengths: Sequence[int]) -> Tensor:
    return int32([0, *torch.tensor(list(lengths), dtype=torch.int64).cumsum(0).tolist()])


def poisoned_rows(rows: int, inner: Shape, dtype: torch.dtype, pad: int) -> Tensor:
    """NaN [rows, *inner] whose rows lie `pad` elements apart in a NaN buffer."""
    width = math.prod(inner)
    buffer = torch.full((rows, width + pad), NAN, dtype=dtype)
    return buffer[:, :width].view(rows, *inner)


def random_rows(rows: int, inner: Shape, dtype: torch.dtype, pad: int, g: torch.Generator) -> Tensor:
    tensor = poisoned_rows(rows, inner, dtype, pad)
    tensor.copy_(torch.randn(rows, *inner, generator=g))
    return tensor


def linear_params(geometry: LinearGeometry, g: torch.Generator, bias: bool = False) -> dict[str, Tensor]:
    """Parameters in the ranges that checkpoints have."""
    shapes = signature(geometry).params
    params = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if "conv_weight" in params:
        params["conv_weight"] *= 0.5
    if not bias:
        params.pop("conv_bias", None)
    for name in ("x_proj", "dt_proj"):
        if name in params:
            params[name] /= math.sqrt(shapes[name][1])
    if "A_log" in params:
        params["A_log"] = torch.empty(shapes["A_log"]).uniform_(-2.0, 2.0, generator=g)
    if isinstance(geometry, Lightning):
        heads = torch.arange(geometry.num_heads, dtype=torch.float32)
        params["log_decay"] = -(2.0 ** (-8.0 * (heads + 1) / geometry.num_heads))
    return params


@dataclass(frozen=True)
class Span:
    """One sequence's part of a step: tokens, slot read, slots written (one per token)."""

    length: int
    state_in: int = NO_SLOT
    state_out: tuple[int, ...] = ()

    @staticmethod
    def final(length: int, state_in: int, state_out: int) -> Span:
        """Writes only the state after the last token."""
        return Span(length, state_in, (NO_SLOT,) * (length - 1) + (state_out,) if length else ())


def linear_meta(spans: Sequence[Span]) -> LinearMeta:
    outs = [s.state_out or (NO_SLOT,) * s.length for s in spans]
    return LinearMeta(
        cumulative([s.length for s in spans]),
        int32([s.state_in for s in spans]),
        int32([slot for out in outs for slot in out]),
    )


@dataclass
class LinearCase:
    """A linear layer, its pools and one step's inputs."""

    geometry: LinearGeometry
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    meta: LinearMeta
    state_pool: Tensor  # [slots, 0] for a mechanism without a recurrent state
    conv_pool: Tensor | None
    dtype: torch.dtype
    pad: int = 0
    out: Tensor = field(default_factory=lambda: torch.empty(0))

    def run(self, backend: LinearBackend) -> LinearCase:
        """A copy of the case after the step: fresh pools, `out` filled."""
        state = _clone_pool(self.state_pool)
        conv = None if self.conv_pool is None else _clone_pool(self.conv_pool)
        out = poisoned_rows(self.meta.num_tokens, signature(self.geometry).output, self.dtype, self.pad)
        given = None if signature(self.geometry).state is None else state
        kernel = backend.layer(LinearLayer(self.geometry, self.params, given, conv))
        kernel(self.inputs, self.meta, out)
        return replace(self, state_pool=state, conv_pool=conv, out=out)


def _clone_pool(pool: Tensor) -> Tensor:
    """A copy with the same gaps between slots (clone() would close them)."""
    gap = pool.stride(0) - math.prod(pool.shape[1:])
    copy = _pool(pool.shape[0], tuple(pool.shape[1:]), pool.dtype, gap)
    return copy.copy_(pool)


def _pool(slots: int, inner: Shape, dtype: torch.dtype, gap: int) -> Tensor:
    """NaN [slots, *inner] whose slots lie `gap` elements apart."""
    width = math.prod(inner)
    return torch.full((slots, width + gap), NAN, dtype=dtype)[:, :width].view(slots, *inner)


def linear_case(
    geometry: LinearGeometry,
    spans: Sequence[Span],
    *,
    slots: int,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pad: int = 0,
    gap: int = 0,
    bias: bool = False,
) -> LinearCase:
    """A random case: pools are NaN but for the slots that `spans` read."""
    g = torch.Generator().manual_seed(seed)
    sig = signature(geometry)
    meta = linear_meta(spans)
    inputs = {n: random_rows(meta.num_tokens, s, dtype, pad, g) for n, s in sig.inputs.items()}
    state = _pool(slots, sig.state or (0,), state_dtype, gap)
    conv = None if sig.conv is None else _pool(slots, sig.conv, dtype, gap)
    for slot in sorted({s.state_in for s in spans if s.state_in != NO_SLOT}):
        state[slot] = 0.3 * torch.randn(state.shape[1:], generator=g)
        if conv is not None:
            conv[slot] = torch.randn(conv.shape[1:], generator=g)
    return LinearCase(geometry, linear_params(geometry, g, bias), inputs, meta, state, conv, dtype, pad)


@dataclass
class FullCase:
    """A full layer, its caches and one step's inputs."""

    geometry: FullGeometry
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    meta: PagedMeta
    caches: dict[str, Tensor]
    dtype: torch.dtype
    pad: int = 0
    out: Tensor = field(default_factory=lambda: torch.empty(0))

    def run(
        self, backend: FullBackend, *, planned: bool = False, options: Mapping[str, str] | None = None
    ) -> FullCase:
        """A copy of the case after the step: fresh caches, `out` filled; with a plan where `options` are."""
        caches = {name: _clone_pool(cache) for name, cache in self.caches.items()}
        out = poisoned_rows(self.meta.num_tokens, signature(self.geometry).output, self.dtype, self.pad)
        layer = FullLayer(self.geometry, self.params, caches)
        plan = None
        if planned or options is not None:
            plan = backend.plan(self.meta, layer.page_size, options or {}, (self.geometry,))
        backend.layer(layer)(self.inputs, self.meta, plan, out)
        return replace(self, caches=caches, out=out)


def full_case(
    geometry: FullGeometry,
    lengths: Sequence[int],
    contexts: Sequence[int],
    *,
    page_size: int = 16,
    spare_pages: int = 2,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
    pad: int = 0,
    gap: int = 0,
) -> FullCase:
    """A random case over shuffled pages: caches are NaN but for each sequence's context."""
    g = torch.Generator().manual_seed(seed)
    sig = signature(geometry)
    needed = [-(-(n + c) // page_size) for n, c in zip(lengths, contexts, strict=True)]
    order = torch.randperm(sum(needed) + spare_pages, generator=g).tolist()
    width = max([*needed, 1])
    table = [[order.pop() for _ in range(n)] + [-1] * (width - n) for n in needed]
    meta = PagedMeta(
        cumulative(lengths), int32(contexts), torch.tensor(table, dtype=torch.int32).view(-1, width)
    )
    pages = max(1, sum(needed) + spare_pages)
    caches = {}
    for name, inner in sig.caches.items():
        cache = _pool(pages, (page_size, *inner), cache_dtype or dtype, gap)
        for row, context in zip(table, contexts, strict=True):
            for p in range(context):
                cache[row[p // page_size], p % page_size] = torch.randn(inner, generator=g)
        caches[name] = cache
    rows = meta.num_tokens
    inputs = {n: random_rows(rows, s, dtype, pad, g) for n, s in sig.inputs.items()}
    params = {n: torch.randn(s, generator=g) / math.sqrt(s[1]) for n, s in sig.params.items()}
    return FullCase(geometry, params, inputs, meta, caches, dtype, pad)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected| in units of the largest |expected|; NaN in one alone is infinite."""
    if actual.numel() == 0:
        return 0.0
    a, e = actual.double(), expected.double()
    if not torch.equal(a.isnan(), e.isnan()):
        return math.inf
    a, e = a.nan_to_num(0.0), e.nan_to_num(0.0)
    return float((a - e).abs().max() / e.abs().max().clamp(min=1e-3))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN payloads and signs of zero included."""
    view = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def select_inputs(inputs: Mapping[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[begin:end] for name, tensor in inputs.items()}


def small_linear_geometries() -> dict[str, LinearGeometry]:
    """One small geometry per mechanism, with groups, an odd dimension or an option where there is one."""
    return {
        "gated_delta": GatedDelta(2, 4, 32, 64, 4, 32**-0.5),
        "gated_delta_odd": GatedDelta(1, 3, 33, 47, 3, 33**-0.5, beta_scale=2.0),
        "kimi_delta": KimiDelta(2, 32, 4, 32**-0.5),
        "kimi_delta_bounded": KimiDelta(2, 40, 4, 40**-0.5, gate_lower_bound=-5.0),
        "lightning": Lightning(3, 32, 32**-0.5),
        "lightning_silu": Lightning(2, 36, 1.0, activation="silu"),
        "mamba2": Mamba2(4, 32, 48, 2, 4),
        "mamba2_one_group": Mamba2(12, 20, 33, 1, 4, dt_min=0.01, dt_max=0.5),
        "mamba1": Mamba1(48, 16, 32, 4),
        "mamba1_odd": Mamba1(37, 11, 5, 3),
        "short_conv": ShortConv(53, 3),
    }
