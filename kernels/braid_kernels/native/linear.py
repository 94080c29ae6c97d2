"""Linear layers on the C++ kernel: one C call per layer and step."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor

from braid_kernels.backend import (
    Capabilities,
    LinearBackend,
    LinearKernel,
    LinearLayer,
    Planning,
    Ragged,
)
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.geometry import GatedDelta, KimiDelta, Lightning, Mamba1, Mamba2, ShortConv, signature
from braid_kernels.metadata import LinearMeta
from braid_kernels.native.library import DTYPE_CODES, check_descriptor, failure, library
from braid_kernels.native.mamba1 import CppMamba1Kernel, CppShortConvKernel
from braid_kernels.native.tensors import Calls, Kept, on_cpu, rows_of

# enum Decay and enum Beta in cpp/linear.cpp
CONSTANT, SOFTPLUS_HEAD, SOFTPLUS_CHANNEL, BOUNDED_CHANNEL, TIME_STEP = range(5)
ONE, SIGMOID, STEP = range(3)


class LinearDesc(ctypes.Structure):
    """struct LinearDesc in cpp/linear.cpp, field by field."""

    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("delta", "l2", "silu", "decay", "beta", "conv_width")],
        *[(n, ctypes.c_int32) for n in ("k_heads", "v_heads", "dk", "dv")],
        *[(n, ctypes.c_int32) for n in ("q_input", "q_column", "k_input", "k_column", "v_input", "v_column")],
        *[(n, ctypes.c_int32) for n in ("gate_input", "beta_input", "channels")],
        *[(n, ctypes.c_int32) for n in ("state_dtype", "conv_dtype", "spare")],
        *[(n, ctypes.c_float) for n in ("scale", "beta_scale", "gate_bound", "dt_min", "dt_max", "spare_f")],
        *[(n, ctypes.c_int64) for n in ("num_slots", "state_stride", "conv_stride")],
        *[(n, ctypes.c_void_p) for n in ("state", "conv")],
        *[(n, ctypes.c_void_p) for n in ("conv_weight", "conv_bias", "rate", "dt_bias", "skip")],
    ]


def _describe_gated_delta(d: LinearDesc, g: GatedDelta) -> None:
    key_dim = g.num_k_heads * g.k_head_dim
    d.delta, d.l2, d.decay, d.beta = 1, 1, SOFTPLUS_HEAD, SIGMOID
    d.k_heads, d.v_heads, d.dk, d.dv = g.num_k_heads, g.num_v_heads, g.k_head_dim, g.v_head_dim
    d.k_column, d.v_column = key_dim, 2 * key_dim
    d.gate_input, d.beta_input = 1, 2
    d.scale, d.beta_scale = g.scale, g.beta_scale


def _describe_kimi_delta(d: LinearDesc, g: KimiDelta) -> None:
    width = g.num_heads * g.head_dim
    d.delta, d.l2, d.beta = 1, 1, SIGMOID
    d.decay = BOUNDED_CHANNEL if g.gate_lower_bound else SOFTPLUS_CHANNEL
    d.k_heads, d.v_heads, d.dk, d.dv = g.num_heads, g.num_heads, g.head_dim, g.head_dim
    d.k_column, d.v_column = width, 2 * width
    d.gate_input, d.beta_input = 1, 2
    d.scale, d.beta_scale, d.gate_bound = g.scale, 1.0, g.gate_lower_bound


def _describe_lightning(d: LinearDesc, g: Lightning) -> None:
    d.silu, d.decay, d.beta = int(g.activation == "silu"), CONSTANT, ONE
    d.k_heads, d.v_heads, d.dk, d.dv = g.num_heads, g.num_heads, g.head_dim, g.head_dim
    d.k_input, d.v_input = 1, 2
    d.scale = g.scale


def _describe_mamba2(d: LinearDesc, g: Mamba2) -> None:
    inner = g.num_heads * g.head_dim
    d.decay, d.beta = TIME_STEP, STEP
    d.k_heads, d.v_heads, d.dk, d.dv = g.num_groups, g.num_heads, g.state_dim, g.head_dim
    d.q_column, d.k_column = inner + g.num_groups * g.state_dim, inner
    d.gate_input, d.beta_input = 1, 1
    d.scale, d.dt_min, d.dt_max = 1.0, g.dt_min, g.dt_max


class CppLinearKernel(LinearKernel):
    """One linear layer: a descriptor with every pointer resolved, and the tensors that it points into."""

    def __init__(self, layer: LinearLayer) -> None:
        lib = library()
        check_descriptor(ctypes.sizeof(LinearDesc), lib.braid_linear_desc_size(), "LinearDesc")
        self._run = lib.braid_linear
        self._layer = layer
        sig = signature(layer.geometry)
        self._inputs = dict(sig.inputs)
        self._names = tuple(sig.inputs)
        self._output = sig.output
        self._kept = Kept()
        self._calls = Calls()
        self._desc = self._describe(layer)
        self._desc_address = ctypes.addressof(self._desc)

    def _describe(self, layer: LinearLayer) -> LinearDesc:
        d = LinearDesc()
        match layer.geometry:
            case GatedDelta() as g:
                _describe_gated_delta(d, g)
            case KimiDelta() as g:
                _describe_kimi_delta(d, g)
            case Lightning() as g:
                _describe_lightning(d, g)
            case Mamba2() as g:
                _describe_mamba2(d, g)
        params, kept = layer.params, self._kept
        d.rate = kept.floats(params["log_decay"] if "log_decay" in params else params["A_log"], exp=True)
        d.dt_bias = kept.floats(params.get("dt_bias"))
        d.skip = kept.floats(params.get("D"))
        self._pools(d, layer)
        return d

    def _pools(self, d: LinearDesc, layer: LinearLayer) -> None:
        pool, conv = layer.state, layer.conv_pool
        on_cpu("state_pool", pool)
        d.num_slots, d.state_stride = pool.shape[0], pool.stride(0)
        d.state, d.state_dtype = pool.data_ptr(), DTYPE_CODES[pool.dtype]
        if conv is None:
            return
        on_cpu("conv_pool", conv)
        weight = layer.params["conv_weight"]  # [C, K]
        d.channels, d.conv_width = weight.shape
        d.conv, d.conv_dtype, d.conv_stride = conv.data_ptr(), DTYPE_CODES[conv.dtype], conv.stride(0)
        d.conv_weight = self._kept.floats(weight.T)  # [K, C]: channels in the lanes
        d.conv_bias = self._kept.floats(layer.params.get("conv_bias"))

    def __call__(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> None:
        rows = meta.num_tokens
        tensors = (out, meta.cu_seqlens, meta.state_in, meta.state_out, *map(inputs.get, self._names))
        args = self._calls.find(rows, *tensors)
        if args is None or len(inputs) != len(self._names):
            args = self._calls.keep(self._arguments(inputs, meta, out), rows, *tensors)
        status = self._run(*args)
        if status:
            raise failure(
                status,
                {"cu_seqlens": meta.cu_seqlens, "state_in": meta.state_in, "state_out": meta.state_out},
            )

    def _arguments(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> list[int | None]:
        """The call, as the library takes it."""
        rows = meta.num_tokens
        check_inputs(inputs, rows, self._inputs)
        check_rows("out", out, rows, self._output)
        args: list[int | None] = [self._desc_address]
        for name in self._names:
            args += rows_of(name, inputs[name])
        if len(self._names) == 2:
            args += (None, 0, 0)
        args += (meta.cu_seqlens.data_ptr(), meta.num_sequences, meta.state_in.data_ptr())
        return [*args, meta.state_out.data_ptr(), rows, *rows_of("out", out)]


class CppLinearBackend(LinearBackend):
    """All linear mechanisms, fp32 and bf16. Raises BuildError where the library cannot be built."""

    name = "cpp"
    capabilities = Capabilities(
        planning=Planning.NONE,
        chunked_prefix=True,
        ragged=Ragged.FORCED_OFF,
        graphs=False,
        mechanisms=frozenset({"gated_delta", "kimi_delta", "lightning", "mamba2", "mamba1", "short_conv"}),
        dtypes=frozenset(DTYPE_CODES),
    )

    def __init__(self) -> None:
        library()

    def layer(self, layer: LinearLayer) -> LinearKernel:
        match layer.geometry:
            case Mamba1() as g:
                return CppMamba1Kernel(layer, g)
            case ShortConv():
                return CppShortConvKernel(layer)
            case _:
                return CppLinearKernel(layer)
