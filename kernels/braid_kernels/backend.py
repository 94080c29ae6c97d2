"""What a backend is: two small interfaces, one per kind of attention.

A layer is resolved once (`backend.layer(...)`: shapes checked, pointers taken, small parameters
copied to fp32) and then called once per step with that step's rows and metadata.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from braid_kernels.checks import check_full_layer, check_linear_layer
from braid_kernels.errors import LayerError, UnsupportedError
from braid_kernels.geometry import FullGeometry, LinearGeometry
from braid_kernels.metadata import LinearMeta, PagedMeta


class Planning(Enum):
    """Whether attention may run without a plan."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


class Ragged(Enum):
    """Whether spans of different lengths run as one batch, or one by one (what comes out is the same)."""

    SUPPORTED = "supported"
    FORCED_OFF = "forced_off"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; declared here, never probed."""

    planning: Planning
    chunked_prefix: bool
    ragged: Ragged
    graphs: bool
    mechanisms: frozenset[str]
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str] = frozenset({"cpu"})
    """Types of devices on which it runs."""

    def check(self, mechanism: str) -> None:
        """Raise UnsupportedError for a mechanism that is not declared."""
        if mechanism not in self.mechanisms:
            raise UnsupportedError("mechanism", mechanism, f"is not one of {sorted(self.mechanisms)}")


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One linear layer's static tensors. Raises LayerError where they do not fit the geometry.

    state_pool: [num_slots, *signature.state] fp32 or bf16; None for mechanisms without a recurrent state.
    conv_pool: [num_slots, C, conv_width - 1] in the activation dtype, the last inputs of the convolution,
    oldest first; None for mechanisms without a convolution. Both may be strided views on dim 0 only.
    """

    geometry: LinearGeometry
    params: Mapping[str, Tensor]
    state_pool: Tensor | None
    conv_pool: Tensor | None = None

    def __post_init__(self) -> None:
        check_linear_layer(self.geometry, self.params, self.state_pool, self.conv_pool)

    @property
    def state(self) -> Tensor:
        """The state pool of a mechanism that has one."""
        if self.state_pool is None:
            raise LayerError("state_pool", None, f"{self.geometry.mechanism} has none")
        return self.state_pool

    @property
    def conv(self) -> Tensor:
        """The convolution's pool of a mechanism that has one."""
        if self.conv_pool is None:
            raise LayerError("conv_pool", None, f"{self.geometry.mechanism} has none")
        return self.conv_pool

    @property
    def num_slots(self) -> int:
        return (self.conv if self.state_pool is None else self.state_pool).shape[0]


@dataclass(frozen=True, eq=False)
class FullLayer:
    """One full layer's static tensors. Raises LayerError where they do not fit the geometry.

    caches, gqa: "k" [num_pages, page_size, Hkv, D] and "v" [num_pages, page_size, Hkv, Dv];
    mla: "latent" [num_pages, page_size, r + dr]. Strided views on dim 0 only.
    """

    geometry: FullGeometry
    params: Mapping[str, Tensor]
    caches: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_full_layer(self.geometry, self.params, self.caches)

    @property
    def page_size(self) -> int:
        return next(iter(self.caches.values())).shape[1]

    @property
    def num_pages(self) -> int:
        return next(iter(self.caches.values())).shape[0]


@dataclass(frozen=True)
class PrefixChunk:
    """A run of mla attention over part of the cached prefixes.

    Every new token of sequence b attends, not causally, to positions starts[b] .. starts[b] + lengths[b]
    of its own prefix, whose keys and values are expanded for this chunk alone. The results of all chunks,
    and that of the new tokens among themselves (causal), merge by log-sum-exp: natural logarithm, lse
    [T, H]; a row without a key in a part is out 0, lse -inf there.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]  # 0: the sequence has no part in this chunk


@dataclass(frozen=True, eq=False)
class FullPlan:
    """Summary of a plan. The caller checks it against the batch before any layer runs.

    qo_indptr_last: query rows the plan covers. kv_tokens: cached positions after the step, summed over
    the batch. workspace_bytes: scratch for expanded keys and values. ignored_options: names of options
    the backend does not have. prefix_chunks: in the order in which they run; of a sequence that continues
    a prompt they cover the prefix exactly once, of any other sequence nothing; empty: the kernel cuts
    as it likes. payload: for the backend alone; None: nothing was planned.
    """

    qo_indptr_last: int
    kv_tokens: int
    workspace_bytes: int = 0
    ignored_options: tuple[str, ...] = ()
    prefix_chunks: tuple[PrefixChunk, ...] = ()
    payload: object = None


class LinearKernel(ABC):
    """One resolved linear layer."""

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> None:
        """Run the layer over one step's rows.

        inputs: `signature(geometry).inputs`, each [T, ...] with dense inner dimensions (rows may be
        strided). out: [T, *signature.output], every row of it is written. Reads slots in state_in,
        writes slots in state_out (state and conv), touches no other slot.
        Raises InputError for tensors, MetadataError for spans and slots; nothing is written then.
        """


class FullKernel(ABC):
    """One resolved full layer."""

    @abstractmethod
    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        """Write the new keys and values into their pages, then attend (causally) from every row.

        inputs: `signature(geometry).inputs`, each [T, ...]. out: [T, *signature.output].
        Raises InputError, MetadataError or PlanError before anything is written.
        """


class LinearBackend(ABC):
    """A family of linear kernels."""

    name: str
    capabilities: Capabilities

    def prepare(self, meta: LinearMeta) -> LinearMeta:
        """What a step's layers are to be called with: `meta`, planned, or what stands for it.

        Called once for a step, before its first layer, with metadata on the host. Optional.
        Raises MetadataError.
        """
        return meta

    @abstractmethod
    def layer(self, layer: LinearLayer) -> LinearKernel:
        """Resolve one layer. Raises UnsupportedError for what `capabilities` does not declare."""


class FullBackend(ABC):
    """A family of full-attention kernels."""

    name: str
    capabilities: Capabilities

    @abstractmethod
    def layer(self, layer: FullLayer) -> FullKernel:
        """Resolve one layer. Raises UnsupportedError for what `capabilities` does not declare."""

    @abstractmethod
    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        """Plan one step for the layers with these geometries.

        Options that the backend does not have are named in `ignored_options`, never an error; one that it
        has with a value that it cannot use raises OptionError. Raises MetadataError for spans.
        """
