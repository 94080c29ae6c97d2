"""Layer plans: which layer attends how, and the tensors each mechanism takes.

A geometry is the one statement of a mechanism's contract: what it takes per token, what it gives,
what it keeps. Both sides of the wire size and check their tensors from it, so a disagreement is
found at the boundary and not inside a kernel.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from braid_wire.errors import ConfigInvalid, LayerMisrouted, LayerUnknown

Shape = tuple[int, ...]


class _Name(Enum):
    """An enumeration whose members are keys of what every layer looks up."""

    # Members are equal only to themselves; hashing their names would cost a call in Python each time.
    __hash__ = object.__hash__


class Kind(_Name):
    """Which kind of attention a layer has; the value is the name on the wire and in metrics."""

    FULL = "full"
    LINEAR = "linear"
    PARALLEL = "parallel"
    NONE = "none"


class Role(_Name):
    """Whose layer ids these are: the target model's or its draft's."""

    TARGET = "target"
    DRAFT = "draft"


class Mode(_Name):
    """What a sequence's span of tokens is for; sent with every batch, never inferred."""

    EXTEND = "extend"
    DECODE = "decode"
    VERIFY = "verify"


@dataclass(frozen=True)
class Geometry(ABC):
    """Base of all geometries: sizes are positive integers unless a field says otherwise."""

    mechanism: ClassVar[str]
    kind: ClassVar[Kind]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            minimum = item.metadata.get("minimum", 1)
            if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
                raise ConfigInvalid(
                    f"{self.mechanism}.{item.name} is {value}; it must be at least {minimum}",
                    field=item.name,
                    value=value,
                )
            if isinstance(value, float) and math.isnan(value):
                raise ConfigInvalid(f"{self.mechanism}.{item.name} is NaN", field=item.name)

    @abstractmethod
    def inputs(self) -> Mapping[str, Shape]:
        """Name → shape per token (without the leading T) of what the layer takes."""

    @abstractmethod
    def output(self) -> Shape:
        """Shape per token (without the leading T) of what the layer gives."""

    def params(self) -> Mapping[str, Shape]:
        """Name → shape of the static parameters that go to the service."""
        return {}

    def optional_params(self) -> frozenset[str]:
        """Those of `params` that a checkpoint may lack."""
        return frozenset()


@dataclass(frozen=True)
class FullGeometry(Geometry):
    """A mechanism that keeps one row per position in pages."""

    kind: ClassVar[Kind] = Kind.FULL

    @abstractmethod
    def caches(self) -> Mapping[str, Shape]:
        """Name → shape per position (without [num_pages, page_size]) of what lies in the pages."""

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one position takes in the pages of one layer."""
        return sum(math.prod(shape) for shape in self.caches().values()) * itemsize


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """A mechanism that keeps a recurrent state (and mostly a conv state) of fixed size."""

    kind: ClassVar[Kind] = Kind.LINEAR

    @abstractmethod
    def state(self) -> Shape | None:
        """Shape of one recurrent state (without [num_slots]); None where there is none."""

    def conv(self) -> Shape | None:
        """Shape [C, K-1] of one conv state (without [num_slots]); None where there is no conv."""
        return None

    def state_bytes(self, itemsize: int, state_itemsize: int = 4) -> int:
        """Bytes of one slot of one layer: recurrent state plus conv state."""
        state, conv = self.state(), self.conv()
        return (math.prod(state) * state_itemsize if state else 0) + (
            math.prod(conv) * itemsize if conv else 0
        )


@dataclass(frozen=True)
class Gqa(FullGeometry):
    """Grouped-query attention over paged keys and values, after norm and rotary."""

    mechanism: ClassVar[str] = "gqa"

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    sliding_window: int = field(default=0, metadata={"minimum": 0})
    """Key positions p-w+1 .. p are seen; 0 means all of the past."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _divides("num_kv_heads", self.num_kv_heads, "num_q_heads", self.num_q_heads)

    def inputs(self) -> Mapping[str, Shape]:
        return {
            "q": (self.num_q_heads, self.head_dim),
            "k": (self.num_kv_heads, self.head_dim),
            "v": (self.num_kv_heads, self.v_head_dim),
        }

    def output(self) -> Shape:
        return (self.num_q_heads, self.v_head_dim)

    def caches(self) -> Mapping[str, Shape]:
        return {"k": (self.num_kv_heads, self.head_dim), "v": (self.num_kv_heads, self.v_head_dim)}


@dataclass(frozen=True)
class Mla(FullGeometry):
    """Multi-head latent attention: pages keep the compressed latent and the shared rotary key."""

    mechanism: ClassVar[str] = "mla"

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int = field(metadata={"minimum": 0})
    v_head_dim: int
    kv_lora_rank: int
    scale: float

    def inputs(self) -> Mapping[str, Shape]:
        return {
            "q_nope": (self.num_heads, self.qk_nope_head_dim),
            "q_pe": (self.num_heads, self.qk_rope_head_dim),
            "c_kv": (self.kv_lora_rank,),
            "k_pe": (self.qk_rope_head_dim,),
        }

    def output(self) -> Shape:
        return (self.num_heads, self.v_head_dim)

    def params(self) -> Mapping[str, Shape]:
        return {
            "w_uk": (self.num_heads, self.qk_nope_head_dim, self.kv_lora_rank),
            "w_uv": (self.num_heads, self.kv_lora_rank, self.v_head_dim),
        }

    def caches(self) -> Mapping[str, Shape]:
        return {"latent": (self.kv_lora_rank + self.qk_rope_head_dim,)}


@dataclass(frozen=True)
class GatedDelta(LinearGeometry):
    """Gated DeltaNet (GDN): conv, SiLU, L2 norm, per-head decay, delta rule."""

    mechanism: ClassVar[str] = "gated_delta"

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_width: int
    scale: float
    beta_scale: float = 1.0
    """beta = beta_scale · sigmoid(b); 2 where negative eigenvalues are allowed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _divides("num_k_heads", self.num_k_heads, "num_v_heads", self.num_v_heads)

    @property
    def channels(self) -> int:
        """Width of the mixed q, k, v row that goes through the conv."""
        return 2 * self.num_k_heads * self.k_head_dim + self.num_v_heads * self.v_head_dim

    def inputs(self) -> Mapping[str, Shape]:
        return {"mixed_qkv": (self.channels,), "a": (self.num_v_heads,), "b": (self.num_v_heads,)}

    def output(self) -> Shape:
        return (self.num_v_heads, self.v_head_dim)

    def params(self) -> Mapping[str, Shape]:
        return {
            "conv_weight": (self.channels, self.conv_width),
            "conv_bias": (self.channels,),
            "A_log": (self.num_v_heads,),
            "dt_bias": (self.num_v_heads,),
        }

    def optional_params(self) -> frozenset[str]:
        return frozenset({"conv_bias"})

    def state(self) -> Shape:
        return (self.num_v_heads, self.k_head_dim, self.v_head_dim)

    def conv(self) -> Shape:
        return (self.channels, self.conv_width - 1)


@dataclass(frozen=True)
class KimiDelta(LinearGeometry):
    """Kimi Delta Attention (KDA): as gated_delta, with a decay per channel."""

    mechanism: ClassVar[str] = "kimi_delta"

    num_heads: int
    head_dim: int
    conv_width: int
    scale: float
    gate_lower_bound: float = 0.0
    """0: log decay −e^A·softplus(x + dt_bias); otherwise bound·sigmoid(e^A·(x + dt_bias))."""

    @property
    def channels(self) -> int:
        """Width of the mixed q, k, v row that goes through the conv."""
        return 3 * self.num_heads * self.head_dim

    def inputs(self) -> Mapping[str, Shape]:
        return {
            "mixed_qkv": (self.channels,),
            "a": (self.num_heads * self.head_dim,),
            "b": (self.num_heads,),
        }

    def output(self) -> Shape:
        return (self.num_heads, self.head_dim)

    def params(self) -> Mapping[str, Shape]:
        return {
            "conv_weight": (self.channels, self.conv_width),
            "conv_bias": (self.channels,),
            "A_log": (self.num_heads,),
            "dt_bias": (self.num_heads * self.head_dim,),
        }

    def optional_params(self) -> frozenset[str]:
        return frozenset({"conv_bias"})

    def state(self) -> Shape:
        return (self.num_heads, self.head_dim, self.head_dim)

    def conv(self) -> Shape:
        return (self.channels, self.conv_width - 1)


@dataclass(frozen=True)
class Lightning(LinearGeometry):
    """Lightning attention: fixed decay per head, no delta rule, no conv."""

    mechanism: ClassVar[str] = "lightning"

    num_heads: int
    head_dim: int
    scale: float
    activation: str = "none"
    """Applied to q, k and v first: "none" (Ling, Ring) or "silu" (MiniMax)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ("none", "silu"):
            raise ConfigInvalid(
                f"lightning.activation is {self.activation!r}; it must be 'none' or 'silu'",
                field="activation",
            )

    def inputs(self) -> Mapping[str, Shape]:
        return dict.fromkeys(("q", "k", "v"), (self.num_heads, self.head_dim))

    def output(self) -> Shape:
        return (self.num_heads, self.head_dim)

    def params(self) -> Mapping[str, Shape]:
        return {"log_decay": (self.num_heads,)}

    def state(self) -> Shape:
        return (self.num_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True)
class Mamba2(LinearGeometry):
    """Mamba-2 (SSD): conv, scalar decay per head, B and C shared by groups of heads, D skip."""

    mechanism: ClassVar[str] = "mamba2"

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_width: int
    dt_min: float = 0.0
    dt_max: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        _divides("num_groups", self.num_groups, "num_heads", self.num_heads)
        if self.dt_min > self.dt_max:
            raise ConfigInvalid(f"mamba2.dt_min {self.dt_min} exceeds dt_max {self.dt_max}", field="dt_min")

    @property
    def channels(self) -> int:
        """Width of the x, B, C row that goes through the conv."""
        return self.num_heads * self.head_dim + 2 * self.num_groups * self.state_dim

    def inputs(self) -> Mapping[str, Shape]:
        return {"xBC": (self.channels,), "dt": (self.num_heads,)}

    def output(self) -> Shape:
        return (self.num_heads, self.head_dim)

    def params(self) -> Mapping[str, Shape]:
        return {
            "conv_weight": (self.channels, self.conv_width),
            "conv_bias": (self.channels,),
            "A_log": (self.num_heads,),
            "D": (self.num_heads,),
            "dt_bias": (self.num_heads,),
        }

    def optional_params(self) -> frozenset[str]:
        return frozenset({"conv_bias"})

    def state(self) -> Shape:
        return (self.num_heads, self.state_dim, self.head_dim)

    def conv(self) -> Shape:
        return (self.channels, self.conv_width - 1)


@dataclass(frozen=True)
class Mamba1(LinearGeometry):
    """Mamba (selective scan): a decay per channel and state column, B and C shared by all channels.

    Between conv and scan lie learned projections of the conv's output (x_proj, the norms of dt, B
    and C, dt_proj), so they go to the service as parameters too.
    """

    mechanism: ClassVar[str] = "mamba1"

    inner_dim: int
    state_dim: int
    dt_rank: int
    conv_width: int
    norm_eps: float = 1e-6

    def inputs(self) -> Mapping[str, Shape]:
        return {"x": (self.inner_dim,)}

    def output(self) -> Shape:
        return (self.inner_dim,)

    def params(self) -> Mapping[str, Shape]:
        return {
            "conv_weight": (self.inner_dim, self.conv_width),
            "conv_bias": (self.inner_dim,),
            "x_proj": (self.dt_rank + 2 * self.state_dim, self.inner_dim),
            "dt_norm": (self.dt_rank,),
            "B_norm": (self.state_dim,),
            "C_norm": (self.state_dim,),
            "dt_proj": (self.inner_dim, self.dt_rank),
            "dt_bias": (self.inner_dim,),
            "A_log": (self.inner_dim, self.state_dim),
            "D": (self.inner_dim,),
        }

    def optional_params(self) -> frozenset[str]:
        return frozenset({"conv_bias", "dt_norm", "B_norm", "C_norm"})

    def state(self) -> Shape:
        return (self.inner_dim, self.state_dim)

    def conv(self) -> Shape:
        return (self.inner_dim, self.conv_width - 1)


@dataclass(frozen=True)
class ShortConv(LinearGeometry):
    """Gated short convolution (LFM2): the state is the conv's last inputs alone."""

    mechanism: ClassVar[str] = "short_conv"

    channels: int
    conv_width: int

    def inputs(self) -> Mapping[str, Shape]:
        return {"x": (self.channels,)}

    def output(self) -> Shape:
        return (self.channels,)

    def params(self) -> Mapping[str, Shape]:
        return {"conv_weight": (self.channels, self.conv_width), "conv_bias": (self.channels,)}

    def optional_params(self) -> frozenset[str]:
        return frozenset({"conv_bias"})

    def state(self) -> None:
        return None

    def conv(self) -> Shape:
        return (self.channels, self.conv_width - 1)


GEOMETRIES: Mapping[str, type[Geometry]] = {
    cls.mechanism: cls for cls in (Gqa, Mla, GatedDelta, KimiDelta, Lightning, Mamba2, Mamba1, ShortConv)
}


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a plan: its id in its role, and how it attends.

    `full` is set for FULL and PARALLEL layers, `linear` for LINEAR and PARALLEL ones; a NONE layer
    (an MLP or MoE block that has an id) has neither.
    """

    layer_id: int
    kind: Kind
    full: FullGeometry | None = None
    linear: LinearGeometry | None = None

    def __post_init__(self) -> None:
        if self.layer_id < 0:
            raise ConfigInvalid(f"layer_id is {self.layer_id}; it must not be negative", field="layer_id")
        wants_full = self.kind in (Kind.FULL, Kind.PARALLEL)
        wants_linear = self.kind in (Kind.LINEAR, Kind.PARALLEL)
        if wants_full != (self.full is not None) or wants_linear != (self.linear is not None):
            raise ConfigInvalid(
                f"layer {self.layer_id} is {self.kind.name} but has "
                f"{'a' if self.full else 'no'} full and {'a' if self.linear else 'no'} linear geometry",
                layer_id=self.layer_id,
            )

    @property
    def mechanism(self) -> str:
        """Name for people and metric labels: "gqa", "mamba2+gqa", or "-" for a NONE layer."""
        return "+".join(g.mechanism for g in (self.linear, self.full) if g is not None) or "-"

    def geometry(self, side: Kind) -> Geometry:
        """The geometry of one side of this layer.

        Args:
            side: `Kind.FULL` or `Kind.LINEAR`.

        Raises:
            LayerMisrouted: the layer has no such side.
        """
        found = self.full if side is Kind.FULL else self.linear
        if found is None:
            raise LayerMisrouted(
                f"layer {self.layer_id} is {self.kind.name}; it cannot run on the {side.value} service",
                layer_id=self.layer_id,
                kind=self.kind.value,
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """A canonical JSON form; the digest is over it."""
        return {
            "layer_id": self.layer_id,
            "kind": self.kind.value,
            "full": _geometry_json(self.full),
            "linear": _geometry_json(self.linear),
        }


@dataclass(frozen=True)
class LayerPlan:
    """The ordered layers of one role.

    Raises:
        ConfigInvalid: an id stands twice.
    """

    role: Role
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for spec in self.layers:
            if spec.layer_id in seen:
                raise ConfigInvalid(
                    f"layer id {spec.layer_id} stands twice in the {self.role.value} plan",
                    layer_id=spec.layer_id,
                )
            seen.add(spec.layer_id)

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, layer_id: int) -> LayerSpec:
        """The layer with this id.

        Raises:
            LayerUnknown: no layer of this role has it.
        """
        for spec in self.layers:
            if spec.layer_id == layer_id:
                return spec
        raise LayerUnknown(
            f"layer {layer_id} is not in the {self.role.value} plan", layer_id=layer_id, role=self.role.value
        )

    def side(self, side: Kind) -> tuple[LayerSpec, ...]:
        """The layers that have a full side (`Kind.FULL`) or a linear one (`Kind.LINEAR`)."""
        wanted = (side, Kind.PARALLEL)
        return tuple(spec for spec in self.layers if spec.kind in wanted)

    def count(self, kind: Kind) -> int:
        """How many layers are of exactly this kind."""
        return sum(spec.kind is kind for spec in self.layers)


def digest(layers: Iterable[LayerSpec]) -> str:
    """SHA-256 (hex) over the canonical JSON of some layers, in their order."""
    text = json.dumps([spec.to_json() for spec in layers], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _geometry_json(geometry: Geometry | None) -> dict[str, Any] | None:
    if geometry is None:
        return None
    # repr of a float is exact and names inf, which JSON cannot.
    sizes = {k: repr(v) if isinstance(v, float) else v for k, v in asdict(geometry).items()}
    return {"mechanism": geometry.mechanism, **sizes}


def _divides(small: str, divisor: int, large: str, value: int) -> None:
    if value % divisor:
        raise ConfigInvalid(f"{large} ({value}) is not a multiple of {small} ({divisor})", field=large)
