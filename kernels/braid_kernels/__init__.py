"""The attention mathematics of Braid: plain reference and CPU kernels behind one interface.

backend = default_linear_backend()
kernel = backend.layer(LinearLayer(geometry, params, state_pool, conv_pool))   # once
kernel({"mixed_qkv": x, "a": a, "b": b}, LinearMeta(cu_seqlens, state_in, state_out), out)  # per step
"""

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
    Ragged,
)
from braid_kernels.errors import (
    BuildError,
    FieldError,
    GeometryError,
    InputError,
    KernelError,
    LayerError,
    MetadataError,
    PlanError,
    UnknownBackendError,
    UnsupportedError,
)
from braid_kernels.geometry import (
    FullGeometry,
    GatedDelta,
    Geometry,
    Gqa,
    KimiDelta,
    Lightning,
    LinearGeometry,
    Mamba1,
    Mamba2,
    Mla,
    ShortConv,
    Signature,
    signature,
)
from braid_kernels.metadata import NO_SLOT, LinearMeta, PagedMeta
from braid_kernels.registry import (
    default_full_backend,
    default_linear_backend,
    full_backend,
    linear_backend,
    set_num_threads,
)

__all__ = [
    "NO_SLOT",
    "BuildError",
    "Capabilities",
    "FieldError",
    "FullBackend",
    "FullGeometry",
    "FullKernel",
    "FullLayer",
    "FullPlan",
    "GatedDelta",
    "Geometry",
    "GeometryError",
    "Gqa",
    "InputError",
    "KernelError",
    "KimiDelta",
    "LayerError",
    "Lightning",
    "LinearBackend",
    "LinearGeometry",
    "LinearKernel",
    "LinearLayer",
    "LinearMeta",
    "Mamba1",
    "Mamba2",
    "MetadataError",
    "Mla",
    "PagedMeta",
    "PlanError",
    "Planning",
    "Ragged",
    "ShortConv",
    "Signature",
    "UnknownBackendError",
    "UnsupportedError",
    "default_full_backend",
    "default_linear_backend",
    "full_backend",
    "linear_backend",
    "set_num_threads",
    "signature",
]
