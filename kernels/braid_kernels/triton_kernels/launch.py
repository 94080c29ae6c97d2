"""One kernel launch as a value: run it, or compile it for a GPU that is not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from braid_kernels.errors import UnsupportedError

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Launch:
    """kernel[grid](**args, **constants); constants are compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Tensor | int | float]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    unspecialised: frozenset[str] = field(default_factory=frozenset)

    def run(self) -> None:
        self.kernel[self.grid](**self.args, **self.constants, **self._options())

    def _options(self) -> dict[str, Any]:
        # Fusion is said aloud because Triton's default differs between versions.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def compile(self, capability: int) -> Any:
        """The compiled kernel for compute capability `capability` (90: Hopper); needs no GPU.

        Arguments are specialised as a run would: integers that are 1 are compiled in, and addresses and
        integers that are multiples of 16 are declared so.
        Raises UnsupportedError under the interpreter, and Triton's own errors.
        """
        if not isinstance(self.kernel, JITFunction):
            raise UnsupportedError("compile", "interpreter", "needs kernels defined without TRITON_INTERPRET")
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                constants[(index,)] = self.constants[name]
                continue
            value = self.args[name]
            aligned = False
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned = value.data_ptr() % ALIGNMENT == 0
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and name not in self.unspecialised:
                signature[name] = "constexpr"
                constants[(index,)] = 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % ALIGNMENT == 0 and name not in self.unspecialised
            if aligned:
                attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self._options())
