"""Linear-attention kernels as an attention core."""

from __future__ import annotations

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
from braid_wire import dtypes
from braid_wire.attention_core import AttentionCore, LayerRunner, PlannedBatch
from braid_wire.errors import (
    BatchInvalid,
    BraidError,
    ConfigInvalid,
    LayerPlanDisputed,
    MechanismUnsupported,
    RequestInvalid,
    ServiceFault,
    ViewInvalid,
)
from braid_wire.layers import Geometry, Kind, LayerPlan, LayerSpec
from braid_wire.metrics import versions

GEOMETRIES: Mapping[str, type[LinearGeometry]] = {
    cls.mechanism: cls for cls in (GatedDelta, KimiDelta, Lightning, Mamba2, Mamba1, ShortConv)
}
STATE_DTYPES = (torch.float32, torch.bfloat16)

REFUSALS: Mapping[type[Exception], type[BraidError]] = {
    kernel_errors.MetadataError: BatchInvalid,
    kernel_errors.InputError: ViewInvalid,
    kernel_errors.LayerError: ViewInvalid,
    kernel_errors.GeometryError: ConfigInvalid,
    kernel_errors.UnsupportedError: MechanismUnsupported,
}


class LinearAttention(AttentionCore):
    """Recurrences over states of fixed size.

    Args:
        backend: the kernels.
        max_tokens: most tokens in one step; 0: no limit.
    """

    kind = Kind.LINEAR
    refusals = REFUSALS

    def __init__(self, backend: LinearBackend, max_tokens: int = 0) -> None:
        self._backend = backend
        self._max_tokens = max_tokens

    def describe(self) -> attention_pb2.DescribeResponse:
        can = self._backend.capabilities
        return attention_pb2.DescribeResponse(
            kind=common_pb2.KIND_LINEAR,
            backend=self._backend.name,
            mechanisms=sorted(can.mechanisms),
            devices=["cpu"],
            dtypes=dtypes.to_pb_all(can.dtypes),
            planning=attention_pb2.Planning.Value(f"PLANNING_{can.planning.name}"),
            chunked_prefix=can.chunked_prefix,
            ragged=attention_pb2.Ragged.Value(f"RAGGED_{can.ragged.name}"),
            graphs=can.graphs,
            max_tokens=self._max_tokens,
            versions=versions(("braid-attention", "grpcio", "torch")),
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
        self, plan: LayerPlan, arrays: Mapping[str, torch.Tensor], page_size: int, options: Mapping[str, str]
    ) -> PlannedBatch:
        meta = LinearMeta(arrays["cu_seqlens"], arrays["state_in"], arrays["state_out"])
        # A recurrence has nothing to plan: the batch was checked, and no option is known.
        summary = attention_pb2.PlanSummary(
            qo_indptr_last=int(meta.cu_seqlens[-1]),
            kv_tokens=int(arrays["context_lens"].sum()) + meta.num_tokens,
            ignored_options=sorted(options),
        )
        return PlannedBatch(summary, meta)


@dataclass(frozen=True)
class _Runner:
    """One resolved layer."""

    kernel: LinearKernel

    def __call__(self, inputs: Mapping[str, torch.Tensor], planned: PlannedBatch, out: torch.Tensor) -> None:
        meta = planned.payload
        if not isinstance(meta, LinearMeta):
            raise ServiceFault("a linear layer was given a batch that another core planned")
        self.kernel(inputs, meta, out)


def _kernel_geometry(geometry: Geometry) -> LinearGeometry:
    """The kernels' own form of a geometry of the wire."""
    found = GEOMETRIES.get(geometry.mechanism)
    if found is None:
        raise LayerPlanDisputed(f"{geometry.mechanism} is no linear attention", mechanism=geometry.mechanism)
    return found(**asdict(geometry))


def load(backend: str, threads: int, max_tokens: int = 0) -> LinearAttention:
    """A core with its kernels loaded.

    Args:
        backend: name, or "auto" for the fastest that loads.
        threads: of the kernels.
        max_tokens: most tokens in one step; 0: no limit.

    Raises:
        RequestInvalid: no backend has this name.
        ServiceFault: the kernels cannot be built.
    """
    try:
        found = default_linear_backend() if backend == "auto" else linear_backend(backend)
    except kernel_errors.UnknownBackendError as error:
        raise RequestInvalid(str(error), field="backend", value=backend) from error
    except kernel_errors.BuildError as error:
        raise ServiceFault(str(error), backend=backend) from error
    torch.set_num_threads(threads)
    if found.name == "cpp":
        from braid_kernels.native import set_num_threads

        set_num_threads(threads)
    return LinearAttention(found, max_tokens)
