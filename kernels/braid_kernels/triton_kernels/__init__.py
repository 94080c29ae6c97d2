"""Triton kernels: the linear mechanisms on a GPU, one recurrent kernel and one family of chunk kernels.

Importing this package imports Triton. Under TRITON_INTERPRET=1, set before, the kernels run on the CPU.
"""

from braid_kernels.triton_kernels.backend import TritonLinearBackend, TritonLinearKernel
from braid_kernels.triton_kernels.gates import INTERPRETED
from braid_kernels.triton_kernels.launch import Launch
from braid_kernels.triton_kernels.plan import HostSpans, LinearPlan, plan_step
from braid_kernels.triton_kernels.tuning import Tuning

__all__ = [
    "INTERPRETED",
    "HostSpans",
    "Launch",
    "LinearPlan",
    "TritonLinearBackend",
    "TritonLinearKernel",
    "Tuning",
    "plan_step",
]
