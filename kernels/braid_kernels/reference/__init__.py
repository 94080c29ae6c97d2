"""Naive float64 reference of every mechanism, and the backend that wires it.

Written to be read and to be right; speed is no goal. Every other backend is tested against it.
"""

from braid_kernels.reference.attention import (
    append_kv,
    attend,
    expand_latent,
    merge_lse,
    mla_rows,
    paged_attention,
)
from braid_kernels.reference.backend import ReferenceFullBackend, ReferenceLinearBackend
from braid_kernels.reference.conv import causal_conv, silu
from braid_kernels.reference.gates import (
    bounded_log_decay,
    l2norm,
    mamba2_dt,
    sigmoid_beta,
    softplus_log_decay,
)
from braid_kernels.reference.recurrence import recurrence

__all__ = [
    "ReferenceFullBackend",
    "ReferenceLinearBackend",
    "append_kv",
    "attend",
    "bounded_log_decay",
    "causal_conv",
    "expand_latent",
    "l2norm",
    "mamba2_dt",
    "merge_lse",
    "mla_rows",
    "paged_attention",
    "recurrence",
    "sigmoid_beta",
    "silu",
    "softplus_log_decay",
]
