"""The C++ backend: ctypes over the library that `braid_kernels.build` compiles."""

from braid_kernels.native.full import CppFullBackend
from braid_kernels.native.library import mind_peers, num_threads, set_num_threads
from braid_kernels.native.linear import CppLinearBackend

__all__ = ["CppFullBackend", "CppLinearBackend", "mind_peers", "num_threads", "set_num_threads"]
