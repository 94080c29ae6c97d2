"""Linear-attention kernels as an attention core."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from braid.v1 import attention_pb2, common_pb2
from braid_kernels import errors as kernel_errors
from braid_kernels.backend import LinearBackend, LinearKernel, LinearLayer
from braid_kernels.geometry import (
    GatedDelta,
    KimiDelta,
    Lightning,
    LinearGeometry,
    Mamba1,
    Mamba2,
    ShortConv,
)
from braid_kernels.metadata import LinearMeta
from braid_kernels.registry import default_linear_backend, linear_backend
from braid_wire import backends, dtypes
from braid_wire.attention_core import AttentionCore, CheckedBatch, LayerRunner, PlannedBatch
from braid_wire.audit import Sample
from braid_wire.devices import CPU, device_of
from braid_wire.errors import (
    BatchInvalid,
    BraidError,
    ConfigInvalid,
    LayerPlanDisputed,
    MechanismUnsupported,
    ServiceFault,
    ViewInvalid,
)
from braid_wire.layers import Geometry, Kind, LayerPlan, LayerSpec
from braid_wire.metrics import versions

from braid_linear_attn.audit import sample

GEOMETRIES: Mapping[str, type[LinearGeometry]] = {
    cls.mechanism: cls for cls in (GatedDelta, KimiDelta, Lightning, Mamba2, Mamba1, ShortConv)
}
STATE_DTYPES = (torch.float32, torch.bfloat16)

VERSIONS = ("braid-attention", "grpcio", "torch")
GPU_VERSIONS = ("triton", "cuda-bindings")

REFUSALS: Mapping[type[Exception], type[BraidError]] = {
    kernel_errors.MetadataError: BatchInvalid,
    kernel_errors.InputError: ViewInvalid,
    kernel_errors.LayerError: ViewInvalid,
    kernel_errors.GeometryError: ConfigInvalid,
    kernel_errors.UnsupportedError: MechanismUnsupported,
}


@dataclass(frozen=True)
class _Planned:
    """What the runners of one batch need."""

    given: LinearMeta
    """In host memory: the private copies of the batch."""
    meta: LinearMeta
    """What the backend made of it."""


class LinearAttention(AttentionCore):
    """Recurrences over states of fixed size.

    Args:
        backend: the kernels.
        max_tokens: most tokens in one step; 0: no limit.
        device: where they run.
    """

    kind = Kind.LINEAR
    refusals = REFUSALS

    def __init__(self, backend: LinearBackend, max_tokens: int = 0, device: torch.device = CPU) -> None:
        self._backend = backend
        self.device = device
        self._max_tokens = max_tokens

    def describe(self) -> attention_pb2.DescribeResponse:
        can = self._backend.capabilities
        return attention_pb2.DescribeResponse(
            kind=common_pb2.KIND_LINEAR,
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
        if state_dtype not in STATE_DTYPES:
            return f"states are float32 or bfloat16, not {dtypes.name_of(state_dtype)}"
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
        layer = LinearLayer(_kernel_geometry(geometry), params, memory.get("state"), memory.get("conv"))
        return _Runner(self._backend.layer(layer))

    def plan(
        self, plan: LayerPlan, batch: CheckedBatch, page_size: int, options: Mapping[str, str]
    ) -> PlannedBatch:
        given = _given(batch)
        # A recurrence has nothing to plan: the batch was checked, and no option is known.
        summary = attention_pb2.PlanSummary(
            qo_indptr_last=batch.num_tokens, kv_tokens=batch.keys, ignored_options=sorted(options)
        )
        return PlannedBatch(summary, _Planned(given, self._backend.prepare(given)))

    def sample(
        self,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        payload: object,
    ) -> Sample | None:
        if not isinstance(payload, _Planned):
            raise ServiceFault("a linear layer was given a batch that another core planned")
        return sample(_kernel_geometry(geometry), params, memory, inputs, payload.given)


def _given(batch: CheckedBatch) -> LinearMeta:
    """The batch as the kernels take it, before they prepare it."""
    if batch.like is not None and isinstance(batch.like.payload, _Planned):
        # Another object, because kernels may keep what they worked out of one.
        return copy.copy(batch.like.payload.given)
    arrays = batch.arrays
    return LinearMeta(arrays["cu_seqlens"], arrays["state_in"], arrays["state_out"])


@dataclass(frozen=True)
class _Runner:
    """One resolved layer."""

    kernel: LinearKernel

    def __call__(self, inputs: Mapping[str, torch.Tensor], planned: PlannedBatch, out: torch.Tensor) -> None:
        batch = planned.payload
        if not isinstance(batch, _Planned):
            raise ServiceFault("a linear layer was given a batch that another core planned")
        self.kernel(inputs, batch.meta, out)


def _kernel_geometry(geometry: Geometry) -> LinearGeometry:
    """The kernels' own form of a geometry of the wire."""
    found = GEOMETRIES.get(geometry.mechanism)
    if found is None:
        raise LayerPlanDisputed(f"{geometry.mechanism} is no linear attention", mechanism=geometry.mechanism)
    return found(**asdict(geometry))


def load(
    backend: str, threads: int, max_tokens: int = 0, device: str = "cpu", peers: bool = False
) -> LinearAttention:
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
    found = backends.choose(backend, where, default_linear_backend, linear_backend, threads, peers)
    return LinearAttention(found, max_tokens, where)
