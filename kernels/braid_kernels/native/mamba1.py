"""Mamba-1 and short-conv layers on the C++ kernels: one C call per layer and step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

from torch import Tensor

from braid_kernels.backend import LinearKernel, LinearLayer
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.geometry import Mamba1, signature
from braid_kernels.metadata import LinearMeta
from braid_kernels.native.library import DTYPE_CODES, check_descriptor, failure, library
from braid_kernels.native.tensors import ConvDesc, Kept, on_cpu, rows_of


class Mamba1Desc(ctypes.Structure):
    """struct Mamba1Desc in cpp/mamba1.cpp, field by field."""

    _fields_ = [
        ("conv", ConvDesc),
        *[(n, ctypes.c_int32) for n in ("inner", "state", "rank", "state_dtype", "x_dtype", "dt_dtype")],
        *[(n, ctypes.c_float) for n in ("norm_eps", "spare_f")],
        *[(n, ctypes.c_int64) for n in ("num_slots", "state_stride", "x_row", "dt_row")],
        *[(n, ctypes.c_void_p) for n in ("state_pool", "x_proj", "dt_proj", "dt_bias", "skip", "rate")],
        *[(n, ctypes.c_void_p) for n in ("dt_norm", "b_norm", "c_norm")],
    ]


class _OneInputKernel(LinearKernel):
    """A layer whose only input is x: checks the step's tensors and calls `run(x …, spans …, out …)`."""

    def __init__(self, layer: LinearLayer, run: Callable[..., int]) -> None:
        self._layer = layer  # keeps the pools
        self._run = run
        sig = signature(layer.geometry)
        self._inputs, self._output = dict(sig.inputs), sig.output

    def __call__(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> None:
        rows = meta.num_tokens
        check_inputs(inputs, rows, self._inputs)
        check_rows("out", out, rows, self._output)
        status = self._run(
            *rows_of("x", inputs["x"]),
            meta.cu_seqlens.data_ptr(),
            meta.num_sequences,
            meta.state_in.data_ptr(),
            meta.state_out.data_ptr(),
            rows,
            *rows_of("out", out),
        )
        if status:
            raise failure(
                status,
                {"cu_seqlens": meta.cu_seqlens, "state_in": meta.state_in, "state_out": meta.state_out},
            )


class CppMamba1Kernel(_OneInputKernel):
    """One Mamba-1 layer: a descriptor with every pointer resolved, and the tensors that it points into."""

    def __init__(self, layer: LinearLayer, geometry: Mamba1) -> None:
        lib = library()
        check_descriptor(ctypes.sizeof(Mamba1Desc), lib.braid_mamba1_desc_size(), "Mamba1Desc")
        self._kept = Kept()
        self._desc = _describe(layer, geometry, self._kept)
        address = ctypes.addressof(self._desc)
        super().__init__(layer, lambda *args: lib.braid_mamba1(address, *args))


class CppShortConvKernel(_OneInputKernel):
    """One short-conv layer."""

    def __init__(self, layer: LinearLayer) -> None:
        lib = library()
        check_descriptor(ctypes.sizeof(ConvDesc), lib.braid_conv_desc_size(), "Conv")
        self._kept = Kept()
        self._desc = self._kept.conv(layer)
        address, slots = ctypes.addressof(self._desc), layer.num_slots
        super().__init__(layer, lambda *args: lib.braid_short_conv(address, slots, *args))


def _describe(layer: LinearLayer, g: Mamba1, kept: Kept) -> Mamba1Desc:
    p, pool = layer.params, layer.state
    on_cpu("state_pool", pool)
    x_proj, dt_proj = kept.matrix(p["x_proj"]), kept.matrix(p["dt_proj"])
    d = Mamba1Desc()
    d.conv = kept.conv(layer)
    d.inner, d.state, d.rank, d.norm_eps = g.inner_dim, g.state_dim, g.dt_rank, g.norm_eps
    d.state_pool, d.state_dtype = pool.data_ptr(), DTYPE_CODES[pool.dtype]
    d.num_slots, d.state_stride = layer.num_slots, pool.stride(0)
    d.x_proj, d.x_dtype, d.x_row = x_proj.data_ptr(), DTYPE_CODES[x_proj.dtype], x_proj.stride(0)
    d.dt_proj, d.dt_dtype, d.dt_row = dt_proj.data_ptr(), DTYPE_CODES[dt_proj.dtype], dt_proj.stride(0)
    d.dt_bias, d.skip = kept.floats(p["dt_bias"]), kept.floats(p["D"])
    d.rate = kept.floats(p["A_log"].T, exp=True)  # [N, I]: channels in the lanes
    d.dt_norm, d.b_norm, d.c_norm = (kept.floats(p.get(name)) for name in ("dt_norm", "B_norm", "C_norm"))
    return d
