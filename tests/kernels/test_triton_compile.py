"""Every launch of the Triton kernels compiles to Hopper machine code, on a machine without a GPU.

What is compiled are the launches that a step would run, with the same constants and specialisations.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from braid_kernels import (
    FullGeometry,
    FullLayer,
    GatedDelta,
    Gqa,
    KimiDelta,
    Lightning,
    LinearGeometry,
    LinearLayer,
    Mamba1,
    Mamba2,
    Mla,
    ShortConv,
    signature,
)
from braid_kernels.testing import Span, full_case, linear_case

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

if TYPE_CHECKING:
    from braid_kernels.triton_kernels import Launch

HOPPER = 90
SHARED_MEMORY = 227 * 1024  # of one program, on Hopper

BF16 = {
    "gated_delta": GatedDelta(2, 4, 128, 128, 4, 0.1),
    "kimi_delta": KimiDelta(2, 128, 4, 0.1),
    "kimi_delta_bounded": KimiDelta(2, 64, 4, 0.1, gate_lower_bound=-5.0),
    "lightning": Lightning(2, 128, 0.1),
    "mamba2": Mamba2(4, 64, 128, 2, 4),
    "mamba1": Mamba1(128, 16, 8, 4),
    "short_conv": ShortConv(128, 3),
}
FULL = {
    "gqa": Gqa(8, 2, 128, 128, 0.1),
    "gqa_256": Gqa(8, 1, 256, 256, 0.1),
    "window": Gqa(4, 2, 64, 64, 0.1, sliding_window=128),
    "mla": Mla(16, 128, 64, 128, 512, 0.1),
}
FP32 = {
    "gated_delta_odd": GatedDelta(1, 3, 33, 47, 3, 0.1),
    "kimi_delta": KimiDelta(2, 32, 4, 0.1),
    "lightning_silu": Lightning(2, 32, 1.0, activation="silu"),
}
KERNELS = {
    "gated_delta": ("conv", "recurrent", "chunk_gate", "chunk_solve", "chunk_state", "chunk_output"),
    "kimi_delta": (
        *("conv", "recurrent", "chunk_gate", "chunk_scores", "chunk_solve", "chunk_state", "chunk_output"),
    ),
    "lightning": ("recurrent", "chunk_gate", "chunk_state", "chunk_output"),
    "mamba2": ("conv", "recurrent", "chunk_gate", "chunk_state", "chunk_output"),
    "mamba1": ("conv", "selective_scan"),
    "short_conv": ("conv",),
}


def resources(cubin: bytes, path: Path) -> tuple[int, int]:
    """Registers per thread, and bytes of stack: registers that spill, for the kernels keep no arrays."""
    import triton

    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise ValueError(said.stdout)
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        *(pytest.param(g, torch.bfloat16, id=f"{name}-bf16") for name, g in BF16.items()),
        *(pytest.param(g, torch.float32, id=f"{name}-fp32") for name, g in FP32.items()),
    ],
)
def test_every_kernel_compiles_for_hopper(
    geometry: LinearGeometry, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from braid_kernels.triton_kernels import INTERPRETED, LaunchedKernel, TritonLinearBackend
    from braid_kernels.triton_kernels import backend as module

    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there are only interpreted kernels in this process")
    case = linear_case(geometry, [Span.final(80, 0, 1), Span(1, 0, (2,))], slots=3, dtype=dtype, bias=True)
    state = None if signature(geometry).state is None else case.state_pool
    layer = LinearLayer(geometry, case.params, state, case.conv_pool)
    # Tensors on the CPU are enough to compile for a GPU, but the backend takes them only to interpret.
    monkeypatch.setattr(module, "INTERPRETED", True)
    kernel = TritonLinearBackend().layer(layer)
    assert isinstance(kernel, LaunchedKernel)
    out = torch.empty(case.meta.num_tokens, *signature(geometry).output, dtype=dtype)
    names = compiled_names(kernel.launches(case.inputs, case.meta, out), dtype, tmp_path)
    assert names == KERNELS[geometry.mechanism]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", FULL)
def test_every_kernel_of_full_attention_compiles_for_hopper(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from braid_kernels.triton_kernels import INTERPRETED, TritonFullBackend
    from braid_kernels.triton_kernels import full as module

    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there are only interpreted kernels in this process")
    geometry: FullGeometry = FULL[name]
    case = full_case(geometry, (1, 40), (600, 20), page_size=16, dtype=dtype)
    monkeypatch.setattr(module, "INTERPRETED", True)
    kernel = TritonFullBackend().layer(FullLayer(geometry, case.params, case.caches))
    out = torch.empty(case.meta.num_tokens, *signature(geometry).output, dtype=dtype)
    names = compiled_names(kernel.launches(case.inputs, case.meta, out), dtype, tmp_path)
    # A decode over a long context in parts that are merged, and a prompt.
    decode = ("paged_attention", "merge_parts")
    assert names == ("append", "append", *decode, "paged_attention")


def compiled_names(launches: Iterable[Launch], dtype: torch.dtype, folder: Path) -> tuple[str, ...]:
    """Compile launches for Hopper; their kernels' names."""
    names = []
    for launch in launches:
        compiled = launch.compile(HOPPER)
        names.append(launch.kernel.__name__.removesuffix("_kernel"))
        registers, stack = resources(compiled.asm["cubin"], folder / "kernel.cubin")
        print(
            f"{names[-1]}: {registers} registers, {stack} bytes of stack, {compiled.metadata.shared} shared"
        )
        assert compiled.metadata.shared <= SHARED_MEMORY
        if dtype == torch.bfloat16:  # fp32 products in three tf32 ones do spill; that form is for exactness
            assert stack == 0, names[-1]
    return tuple(names)
