"""Triton kernels: the linear mechanisms and paged attention on a GPU.

Importing this package imports Triton. Under TRITON_INTERPRET=1, set before, the kernels run on the CPU.
"""

from braid_kernels.triton_kernels.backend import LaunchedKernel, TritonLinearBackend, TritonLinearKernel
from braid_kernels.triton_kernels.full import TritonFullBackend, TritonFullKernel
from braid_kernels.triton_kernels.gates import INTERPRETED
from braid_kernels.triton_kernels.launch import Launch
from braid_kernels.triton_kernels.plan import HostSpans, LinearPlan, plan_step
from braid_kernels.triton_kernels.tuning import FullTuning, Tuning

__all__ = [
    "INTERPRETED",
    "FullTuning",
    "HostSpans",
    "Launch",
    "LaunchedKernel",
    "LinearPlan",
    "TritonFullBackend",
    "TritonFullKernel",
    "TritonLinearBackend",
    "TritonLinearKernel",
    "Tuning",
    "plan_step",
]
