"""Full-attention kernels as an attention core."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from braid.v1 import attention_pb2, common_pb2
from braid_kernels import errors as kernel_errors
from braid_kernels.backend import FullBackend, FullKernel, FullLayer, FullPlan
from braid_kernels.geometry import FullGeometry, Gqa, Mla
from braid_kernels.metadata import PagedMeta
from braid_kernels.registry import default_full_backend, full_backend
from braid_wire import backends, dtypes
from braid_wire.attention_core import AttentionCore, CheckedBatch, LayerRunner, PlannedBatch
from braid_wire.audit import Sample
from braid_wire.batch import MODE_CODES
from braid_wire.devices import CPU, device_of
from braid_wire.errors import (
    BatchInvalid,
    BraidError,
    ConfigInvalid,
    LayerPlanDisputed,
    MechanismUnsupported,
    PlanMismatch,
    RequestInvalid,
    ServiceFault,
    ViewInvalid,
)
from braid_wire.layers import Geometry, Kind, LayerPlan, LayerSpec, Mode, Role
from braid_wire.metrics import versions

from braid_full_attn.audit import sample

GEOMETRIES: Mapping[str, type[FullGeometry]] = {cls.mechanism: cls for cls in (Gqa, Mla)}

VERSIONS = ("braid-attention", "grpcio", "torch")
GPU_VERSIONS = ("triton", "flashinfer-python", "cuda-bindings")

REFUSALS: Mapping[type[Exception], type[BraidError]] = {
    kernel_errors.MetadataError: BatchInvalid,
    kernel_errors.PlanError: PlanMismatch,
    kernel_errors.OptionError: RequestInvalid,
    kernel_errors.InputError: ViewInvalid,
    kernel_errors.LayerError: ViewInvalid,
    kernel_errors.GeometryError: ConfigInvalid,
    kernel_errors.UnsupportedError: MechanismUnsupported,
}


@dataclass(frozen=True)
class _Planned:
    """What the runners of one batch need."""

    meta: PagedMeta
    plan: FullPlan


class FullAttention(AttentionCore):
    """Softmax attention over paged keys and values.

    Args:
        backend: the kernels.
        max_tokens: most tokens in one step; 0: no limit.
        device: where they run.
    """

    kind = Kind.FULL
    refusals = REFUSALS

    def __init__(self, backend: FullBackend, max_tokens: int = 0, device: torch.device = CPU) -> None:
        self._backend = backend
        self.device = device
        self._max_tokens = max_tokens
        self._known: dict[Role, tuple[LayerPlan, tuple[FullGeometry, ...]]] = {}

    def describe(self) -> attention_pb2.DescribeResponse:
        can = self._backend.capabilities
        return attention_pb2.DescribeResponse(
            kind=common_pb2.KIND_FULL,
            backend=self._backend.name,
            mechanisms=sorted(can.mechanisms),
            devices=[str(self.device)],
            dtypes=dtypes.to_pb_all(can.dtypes),
            planning=attention_pb2.Planning.Value(f"PLANNING_{can.planning.name}"),
            chunked_prefix=can.chunked_prefix,
            ragged=attention_pb2.Ragged.Value(f"RAGGED_{can.ragged.name}"),
            graphs=can.graphs,
            max_tokens=self._max_tokens,
            versions=versions(VERSIONS if self.device.type == "cpu" else VERSIONS + GPU_VERSIONS),
        )

    def supports(
        self, geometry: Geometry, activation_dtype: torch.dtype, state_dtype: torch.dtype
    ) -> str | None:
        can = self._backend.capabilities
        if geometry.mechanism not in can.mechanisms:
            return f"backend {self._backend.name} has no kernel for {geometry.mechanism}"
        if activation_dtype not in can.dtypes:
            return f"backend {self._backend.name} does not take {dtypes.name_of(activation_dtype)}"
        try:
            _kernel_geometry(geometry)
        except kernel_errors.GeometryError as error:
            return str(error)
        return None

    def runner(
        self,
        spec: LayerSpec,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        page_size: int,
    ) -> LayerRunner:
        kernel = self._backend.layer(FullLayer(_kernel_geometry(geometry), params, memory))
        return _Runner(kernel)

    def plan(
        self, plan: LayerPlan, batch: CheckedBatch, page_size: int, options: Mapping[str, str]
    ) -> PlannedBatch:
        meta = _meta(batch)
        found = self._backend.plan(meta, page_size, options, self._geometries(plan))
        summary = attention_pb2.PlanSummary(
            qo_indptr_last=found.qo_indptr_last,
            kv_tokens=found.kv_tokens,
            prefix_chunks=[
                attention_pb2.PrefixChunk(starts=chunk.starts, lengths=chunk.lengths)
                for chunk in found.prefix_chunks
            ],
            workspace_bytes=found.workspace_bytes,
            ignored_options=found.ignored_options,
            planned=found.payload is not None,
        )
        return PlannedBatch(summary, _Planned(meta, found))

    def sample(
        self,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        payload: object,
    ) -> Sample | None:
        if not isinstance(payload, _Planned):
            raise ServiceFault("a full layer was given a batch that another core planned")
        return sample(_kernel_geometry(geometry), params, memory, inputs, payload.meta)

    def _geometries(self, plan: LayerPlan) -> tuple[FullGeometry, ...]:
        """The different geometries of a role's full layers; worked out once for each plan."""
        known = self._known.get(plan.role)
        if known is None or known[0] is not plan:
            distinct = dict.fromkeys(spec.geometry(Kind.FULL) for spec in plan.side(Kind.FULL))
            known = plan, tuple(_kernel_geometry(geometry) for geometry in distinct)
            self._known[plan.role] = known
        return known[1]


def _meta(batch: CheckedBatch) -> PagedMeta:
    """The batch as the kernels take it."""
    modes = batch.arrays["modes"]
    if batch.like is not None and isinstance(batch.like.payload, _Planned):
        # Another object, because kernels may keep what they worked out of one.
        meta = copy.copy(batch.like.payload.meta)
        if meta.extend is not None:
            torch.eq(modes, MODE_CODES[Mode.EXTEND], out=meta.extend)
        return meta
    return PagedMeta(
        batch.arrays["cu_seqlens"],
        batch.arrays["context_lens"],
        batch.arrays["page_table"],
        num_tokens=batch.num_tokens,
        extend=modes == MODE_CODES[Mode.EXTEND],
    )


@dataclass(frozen=True)
class _Runner:
    """One resolved layer."""

    kernel: FullKernel

    def __call__(self, inputs: Mapping[str, torch.Tensor], planned: PlannedBatch, out: torch.Tensor) -> None:
        batch = planned.payload
        if not isinstance(batch, _Planned):
            raise ServiceFault("a full layer was given a batch that another core planned")
        self.kernel(inputs, batch.meta, batch.plan, out)


def _kernel_geometry(geometry: Geometry) -> FullGeometry:
    """The kernels' own form of a geometry of the wire."""
    found = GEOMETRIES.get(geometry.mechanism)
    if found is None:
        raise LayerPlanDisputed(f"{geometry.mechanism} is no full attention", mechanism=geometry.mechanism)
    return found(**asdict(geometry))


def load(
    backend: str, threads: int, max_tokens: int = 0, device: str = "cpu", peers: bool = False
) -> FullAttention:
    """A core with its kernels loaded.

    Args:
        backend: name, or "auto" for the fastest that loads.
        threads: of the kernels.
        max_tokens: most tokens in one step; 0: no limit.
        device: "cpu", "cuda" or "cuda:N".
        peers: whether other processes look out for what this one makes.

    Raises:
        RequestInvalid: no backend has this name, or it does not run there; or there is no such device.
        ServiceFault: the kernels cannot be built.
    """
    where = device_of(device)
    found = backends.choose(backend, where, default_full_backend, full_backend, threads, peers)
    return FullAttention(found, max_tokens, where)
