"""Layer geometries: what one attention layer looks like, apart from its weights.

A geometry fixes every shape at the kernel boundary: `signature(geometry)` lists inputs, parameters,
state and output, and both backends (and the services that check views) read that one table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from braid_kernels.errors import GeometryError

Shape: TypeAlias = tuple[int, ...]


def _positive(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GeometryError(field, value, "must be an integer >= 1")


def _finite(field: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise GeometryError(field, value, "must be a finite number")


def _scale(value: float) -> None:
    _finite("scale", value)
    if value <= 0:
        raise GeometryError("scale", value, "must be > 0")


def _divides(field: str, value: int, of: str, whole: int) -> None:
    if whole % value:
        raise GeometryError(field, value, f"must divide {of} ({whole})")


def _conv(value: int) -> None:
    _positive("conv_width", value)
    if not 2 <= value <= 16:
        raise GeometryError("conv_width", value, "must be in 2..16 (the current input included)")


@dataclass(frozen=True)
class Gqa:
    """Grouped-query softmax attention; query head h reads KV head h // (num_q_heads / num_kv_heads).

    scale: factor on q·k. sliding_window: 0 = none, else w: position p sees keys p-w+1..p
    (the transformers convention).
    """

    mechanism: ClassVar[str] = "gqa"
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    sliding_window: int = 0

    def __post_init__(self) -> None:
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "v_head_dim"):
            _positive(name, getattr(self, name))
        _divides("num_kv_heads", self.num_kv_heads, "num_q_heads", self.num_q_heads)
        _scale(self.scale)
        if self.sliding_window < 0:
            raise GeometryError("sliding_window", self.sliding_window, "must be >= 0 (0 = none)")


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention: one latent [kv_lora_rank + qk_rope_head_dim] per token is cached.

    qk_rope_head_dim may be 0 (NoPE everywhere). scale: factor on q·k, usually (dn + dr)^-1/2.
    """

    mechanism: ClassVar[str] = "mla"
    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    scale: float

    def __post_init__(self) -> None:
        for name in ("num_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"):
            _positive(name, getattr(self, name))
        if self.qk_rope_head_dim < 0:
            raise GeometryError("qk_rope_head_dim", self.qk_rope_head_dim, "must be >= 0")
        _scale(self.scale)

    @property
    def latent_dim(self) -> int:
        """Width of one cached row: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class GatedDelta:
    """Gated delta rule (GDN); value head h uses key head h // (num_v_heads / num_k_heads).

    beta = beta_scale * sigmoid(b); beta_scale is 2.0 where negative eigenvalues are allowed.
    """

    mechanism: ClassVar[str] = "gated_delta"
    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_width: int
    scale: float
    beta_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_k_heads", "num_v_heads", "k_head_dim", "v_head_dim"):
            _positive(name, getattr(self, name))
        _divides("num_k_heads", self.num_k_heads, "num_v_heads", self.num_v_heads)
        _conv(self.conv_width)
        _scale(self.scale)
        _finite("beta_scale", self.beta_scale)
        if self.beta_scale <= 0:
            raise GeometryError("beta_scale", self.beta_scale, "must be > 0")

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: q, k and v side by side."""
        return 2 * self.num_k_heads * self.k_head_dim + self.num_v_heads * self.v_head_dim


@dataclass(frozen=True)
class KimiDelta:
    """Kimi delta attention (KDA): the delta rule with one decay per key channel.

    gate_lower_bound: 0 = unbounded, log alpha = -e^A softplus(x + dt_bias); a negative value lb =
    bounded, log alpha = lb * sigmoid(e^A (x + dt_bias)).
    """

    mechanism: ClassVar[str] = "kimi_delta"
    num_heads: int
    head_dim: int
    conv_width: int
    scale: float
    gate_lower_bound: float = 0.0

    def __post_init__(self) -> None:
        _positive("num_heads", self.num_heads)
        _positive("head_dim", self.head_dim)
        _conv(self.conv_width)
        _scale(self.scale)
        _finite("gate_lower_bound", self.gate_lower_bound)
        if self.gate_lower_bound > 0:
            raise GeometryError(
                "gate_lower_bound", self.gate_lower_bound, "must be <= 0 (bounds a log decay; 0 = none)"
            )

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: q, k and v side by side."""
        return 3 * self.num_heads * self.head_dim


@dataclass(frozen=True)
class Lightning:
    """Lightning attention: a linear attention with one constant decay per head, no convolution.

    activation is applied to q, k and v here ("silu" for MiniMax, "none" for Ling/Ring).
    """

    mechanism: ClassVar[str] = "lightning"
    num_heads: int
    head_dim: int
    scale: float
    activation: str = "none"

    def __post_init__(self) -> None:
        _positive("num_heads", self.num_heads)
        _positive("head_dim", self.head_dim)
        _scale(self.scale)
        if self.activation not in ("none", "silu"):
            raise GeometryError("activation", self.activation, 'must be "none" or "silu"')


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2 (SSD): k = B, q = C, v = x, beta = dt; head h uses group h // (num_heads / num_groups).

    dt = clamp(softplus(dt + dt_bias), dt_min, dt_max).
    """

    mechanism: ClassVar[str] = "mamba2"
    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_width: int
    dt_min: float = 0.0
    dt_max: float = math.inf

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "state_dim", "num_groups"):
            _positive(name, getattr(self, name))
        _divides("num_groups", self.num_groups, "num_heads", self.num_heads)
        _conv(self.conv_width)
        _finite("dt_min", self.dt_min)
        if self.dt_min < 0:
            raise GeometryError("dt_min", self.dt_min, "must be >= 0")
        if not self.dt_max >= self.dt_min:
            raise GeometryError("dt_max", self.dt_max, f"must be >= dt_min ({self.dt_min})")

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.num_heads * self.head_dim + 2 * self.num_groups * self.state_dim


@dataclass(frozen=True)
class Mamba1:
    """Mamba (selective scan): one decay per channel and state column, B and C shared by all channels.

    What lies between convolution and scan (x_proj; RMS norms of dt, B and C, each where its weight is
    given; dt_proj) belongs to the layer, for it reads the convolution's output.
    """

    mechanism: ClassVar[str] = "mamba1"
    inner_dim: int
    state_dim: int
    dt_rank: int
    conv_width: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("inner_dim", "state_dim", "dt_rank"):
            _positive(name, getattr(self, name))
        _conv(self.conv_width)
        _finite("norm_eps", self.norm_eps)
        if self.norm_eps < 0:
            raise GeometryError("norm_eps", self.norm_eps, "must be >= 0")

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution."""
        return self.inner_dim


@dataclass(frozen=True)
class ShortConv:
    """A causal convolution without activation (LFM2); its last inputs are the only state."""

    mechanism: ClassVar[str] = "short_conv"
    channels: int
    conv_width: int

    def __post_init__(self) -> None:
        _positive("channels", self.channels)
        _conv(self.conv_width)

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution."""
        return self.channels


FullGeometry: TypeAlias = Gqa | Mla
LinearGeometry: TypeAlias = GatedDelta | KimiDelta | Lightning | Mamba2 | Mamba1 | ShortConv
Geometry: TypeAlias = FullGeometry | LinearGeometry


@dataclass(frozen=True)
class Signature:
    """Shapes at the boundary of one layer.

    inputs, output: per-token shapes, i.e. without the leading T. params: full shapes; those in
    `optional_params` may be absent. state, conv: one slot of the linear pools (None: the mechanism
    has none). caches: one position of the paged caches.
    """

    inputs: Mapping[str, Shape]
    output: Shape
    params: Mapping[str, Shape]
    optional_params: frozenset[str] = frozenset()
    state: Shape | None = None
    conv: Shape | None = None
    caches: Mapping[str, Shape] = field(default_factory=dict)


def signature(geometry: Geometry) -> Signature:
    """The shapes that `geometry` implies. Raises GeometryError for a type that is no geometry."""
    match geometry:
        case Gqa():
            return _gqa(geometry)
        case Mla():
            return _mla(geometry)
        case GatedDelta():
            return _gated_delta(geometry)
        case KimiDelta():
            return _kimi_delta(geometry)
        case Lightning():
            return _lightning(geometry)
        case Mamba2():
            return _mamba2(geometry)
        case Mamba1():
            return _mamba1(geometry)
        case ShortConv():
            return _short_conv(geometry)
        case _:
            raise GeometryError("geometry", geometry, "is not one of the geometry classes")


def _gqa(g: Gqa) -> Signature:
    k, v = (g.num_kv_heads, g.head_dim), (g.num_kv_heads, g.v_head_dim)
    return Signature(
        inputs={"q": (g.num_q_heads, g.head_dim), "k": k, "v": v},
        output=(g.num_q_heads, g.v_head_dim),
        params={},
        caches={"k": k, "v": v},
    )


def _mla(g: Mla) -> Signature:
    return Signature(
        inputs={
            "q_nope": (g.num_heads, g.qk_nope_head_dim),
            "q_pe": (g.num_heads, g.qk_rope_head_dim),
            "c_kv": (g.kv_lora_rank,),
            "k_pe": (g.qk_rope_head_dim,),
        },
        output=(g.num_heads, g.v_head_dim),
        params={
            "w_uk": (g.num_heads, g.qk_nope_head_dim, g.kv_lora_rank),
            "w_uv": (g.num_heads, g.kv_lora_rank, g.v_head_dim),
        },
        caches={"latent": (g.latent_dim,)},
    )


def _gated_delta(g: GatedDelta) -> Signature:
    return Signature(
        inputs={"mixed_qkv": (g.conv_channels,), "a": (g.num_v_heads,), "b": (g.num_v_heads,)},
        output=(g.num_v_heads, g.v_head_dim),
        params={
            "conv_weight": (g.conv_channels, g.conv_width),
            "conv_bias": (g.conv_channels,),
            "A_log": (g.num_v_heads,),
            "dt_bias": (g.num_v_heads,),
        },
        optional_params=frozenset({"conv_bias"}),
        state=(g.num_v_heads, g.k_head_dim, g.v_head_dim),
        conv=(g.conv_channels, g.conv_width - 1),
    )


def _kimi_delta(g: KimiDelta) -> Signature:
    return Signature(
        inputs={
            "mixed_qkv": (g.conv_channels,),
            "a": (g.num_heads * g.head_dim,),
            "b": (g.num_heads,),
        },
        output=(g.num_heads, g.head_dim),
        params={
            "conv_weight": (g.conv_channels, g.conv_width),
            "conv_bias": (g.conv_channels,),
            "A_log": (g.num_heads,),
            "dt_bias": (g.num_heads * g.head_dim,),
        },
        optional_params=frozenset({"conv_bias"}),
        state=(g.num_heads, g.head_dim, g.head_dim),
        conv=(g.conv_channels, g.conv_width - 1),
    )


def _lightning(g: Lightning) -> Signature:
    row = (g.num_heads, g.head_dim)
    return Signature(
        inputs={"q": row, "k": row, "v": row},
        output=row,
        params={"log_decay": (g.num_heads,)},
        state=(g.num_heads, g.head_dim, g.head_dim),
    )


def _mamba2(g: Mamba2) -> Signature:
    return Signature(
        inputs={"xBC": (g.conv_channels,), "dt": (g.num_heads,)},
        output=(g.num_heads, g.head_dim),
        params={
            "conv_weight": (g.conv_channels, g.conv_width),
            "conv_bias": (g.conv_channels,),
            "A_log": (g.num_heads,),
            "D": (g.num_heads,),
            "dt_bias": (g.num_heads,),
        },
        optional_params=frozenset({"conv_bias"}),
        state=(g.num_heads, g.state_dim, g.head_dim),
        conv=(g.conv_channels, g.conv_width - 1),
    )


def _mamba1(g: Mamba1) -> Signature:
    return Signature(
        inputs={"x": (g.inner_dim,)},
        output=(g.inner_dim,),
        params={
            "conv_weight": (g.inner_dim, g.conv_width),
            "conv_bias": (g.inner_dim,),
            "x_proj": (g.dt_rank + 2 * g.state_dim, g.inner_dim),
            "dt_norm": (g.dt_rank,),
            "B_norm": (g.state_dim,),
            "C_norm": (g.state_dim,),
            "dt_proj": (g.inner_dim, g.dt_rank),
            "dt_bias": (g.inner_dim,),
            "A_log": (g.inner_dim, g.state_dim),
            "D": (g.inner_dim,),
        },
        optional_params=frozenset({"conv_bias", "dt_norm", "B_norm", "C_norm"}),
        state=(g.inner_dim, g.state_dim),
        conv=(g.inner_dim, g.conv_width - 1),
    )


def _short_conv(g: ShortConv) -> Signature:
    return Signature(
        inputs={"x": (g.channels,)},
        output=(g.channels,),
        params={"conv_weight": (g.channels, g.conv_width), "conv_bias": (g.channels,)},
        optional_params=frozenset({"conv_bias"}),
        conv=(g.channels, g.conv_width - 1),
    )
