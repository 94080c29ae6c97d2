"""What a backend is: two small interfaces, one per kind of attention.

A layer is resolved once (`backend.layer(...)`: shapes checked, pointers taken, small parameters
copied to fp32) and then called once per step with that step's rows and metadata.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from braid_kernels.checks import check_full_layer, check_linear_layer
from braid_kernels.errors import LayerError, MetadataError, PlanError
from braid_kernels.geometry import FullGeometry, LinearGeometry
from braid_kernels.metadata import LinearMeta, PagedMeta


class Planning(Enum):
    """Whether attention may run without a plan."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


class Ragged(Enum):
    """Whether the backend has a ragged (non-paged) prefill path."""

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


@dataclass(frozen=True, eq=False)
class FullPlan:
    """Summary of a plan. The caller checks `qo_indptr_last == num_tokens` before any layer runs.

    qo_indptr_last: query rows the plan covers. kv_tokens: cached positions after the step, summed over
    the batch. workspace_bytes: scratch that attending will use. ignored_options: names of options the
    backend does not have. prefix_chunks: backend's own description. payload: for the backend alone.
    """

    qo_indptr_last: int
    kv_tokens: int
    workspace_bytes: int = 0
    ignored_options: tuple[str, ...] = ()
    prefix_chunks: tuple[object, ...] = ()
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
    def plan(self, meta: PagedMeta, page_size: int, options: Mapping[str, str]) -> FullPlan:
        """Plan one step. Unknown options are named in `ignored_options`, never an error."""


def summarise_plan(meta: PagedMeta, page_size: int, options: Mapping[str, str]) -> FullPlan:
    """The plan of a CPU backend that needs none: checked spans, and no option known.

    Raises MetadataError for spans that are not monotone, do not end at num_tokens, or outgrow the page
    table.
    """
    if page_size < 1:
        raise MetadataError("page_size", page_size, "must be >= 1")
    cu = meta.cu_seqlens.tolist()
    contexts = meta.context_lens.tolist()
    max_pages = meta.page_table.shape[1]
    if cu[0] != 0:
        raise MetadataError("cu_seqlens[0]", cu[0], "must be 0")
    if cu[-1] != meta.num_tokens:
        raise MetadataError("cu_seqlens[-1]", cu[-1], f"must equal num_tokens ({meta.num_tokens})")
    total = 0
    for b, context in enumerate(contexts):
        length = cu[b + 1] - cu[b]
        if length < 0:
            raise MetadataError(f"cu_seqlens[{b + 1}]", cu[b + 1], "must not be less than its predecessor")
        if context < 0:
            raise MetadataError(f"context_lens[{b}]", context, "must be >= 0")
        if length and context + length > max_pages * page_size:
            raise MetadataError(
                f"context_lens[{b}]",
                context,
                f"+ {length} new tokens outgrow {max_pages} pages of {page_size}",
            )
        total += context + length
    return FullPlan(qo_indptr_last=cu[-1], kv_tokens=total, ignored_options=tuple(sorted(options)))


def check_plan(plan: FullPlan | None, meta: PagedMeta, planning: Planning) -> None:
    """Raise PlanError where a required plan is missing or a plan is not this batch's."""
    if plan is None:
        if planning is Planning.REQUIRED:
            raise PlanError("plan", None, "this backend requires a plan")
        return
    if plan.qo_indptr_last != meta.num_tokens:
        rule = f"must equal num_tokens ({meta.num_tokens})"
        raise PlanError("plan.qo_indptr_last", plan.qo_indptr_last, rule)
