"""The Triton backend: linear layers on an NVIDIA GPU, or under Triton's interpreter for tests."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton.language as tl
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
from braid_kernels.errors import InputError, LayerError, UnsupportedError
from braid_kernels.geometry import GatedDelta, KimiDelta, Lightning, Mamba1, Mamba2, ShortConv, signature
from braid_kernels.graphs import Recorder
from braid_kernels.metadata import LinearMeta
from braid_kernels.triton_kernels import gates
from braid_kernels.triton_kernels.chunk import (
    chunk_gate_kernel,
    chunk_output_kernel,
    chunk_scores_kernel,
    chunk_solve_kernel,
    chunk_state_kernel,
)
from braid_kernels.triton_kernels.conv import conv_kernel
from braid_kernels.triton_kernels.gates import INTERPRETED
from braid_kernels.triton_kernels.graphs import DecodeSteps, GraphedKernel, host_spans
from braid_kernels.triton_kernels.launch import Launch
from braid_kernels.triton_kernels.plan import HostSpans, LinearPlan, plan_step
from braid_kernels.triton_kernels.recurrent import recurrent_kernel
from braid_kernels.triton_kernels.scan import selective_scan_kernel
from braid_kernels.triton_kernels.tuning import MIN_BLOCK, SUB_BLOCK, Tuning, power_of_two

DTYPES = frozenset({torch.float32, torch.bfloat16})
PLAIN_WIDTH = 64


@dataclass(frozen=True)
class Groups:
    """Channels of a convolution: `first` groups of `first_width`, then `second` of `width`.

    norm: whether the first ones (heads of q and k) are L2-normalised.
    """

    first: int
    first_width: int
    second: int
    width: int
    norm: bool


def _plain_groups(channels: int) -> Groups:
    """Channels without heads: groups that fill a block, and the rest."""
    full, rest = divmod(channels, PLAIN_WIDTH)
    return Groups(full, PLAIN_WIDTH, 1 if rest else 0, max(rest, 1), norm=False)


@dataclass(frozen=True)
class Recipe:
    """How a mechanism is an instance of the one recurrence.

    q, k, v: (input, first column); a convolution's output replaces input `mixed` where there is one.
    gate, step: inputs of the log decay and of beta ("" = none).
    """

    key_heads: int
    heads: int
    dk: int
    dv: int
    q: tuple[str, int]
    k: tuple[str, int]
    v: tuple[str, int]
    gate: str
    step: str
    decay: int
    beta: int
    scale: float
    delta: bool = False
    silu: bool = False
    mixed: str = ""
    groups: Groups | None = None
    beta_scale: float = 1.0
    bound: float = 0.0
    low: float = 0.0
    high: float = math.inf

    @property
    def channel(self) -> bool:
        """Whether the decay is one per key channel."""
        return self.decay in (gates.SOFTPLUS_CHANNEL.value, gates.BOUNDED_CHANNEL.value)


def _gated_delta(g: GatedDelta) -> Recipe:
    key_dim = g.num_k_heads * g.k_head_dim
    return Recipe(
        key_heads=g.num_k_heads,
        heads=g.num_v_heads,
        dk=g.k_head_dim,
        dv=g.v_head_dim,
        q=("mixed_qkv", 0),
        k=("mixed_qkv", key_dim),
        v=("mixed_qkv", 2 * key_dim),
        gate="a",
        step="b",
        decay=gates.SOFTPLUS_HEAD.value,
        beta=gates.SIGMOID.value,
        scale=g.scale,
        delta=True,
        mixed="mixed_qkv",
        groups=Groups(2 * g.num_k_heads, g.k_head_dim, g.num_v_heads, g.v_head_dim, norm=True),
        beta_scale=g.beta_scale,
    )


def _kimi_delta(g: KimiDelta) -> Recipe:
    width = g.num_heads * g.head_dim
    return Recipe(
        key_heads=g.num_heads,
        heads=g.num_heads,
        dk=g.head_dim,
        dv=g.head_dim,
        q=("mixed_qkv", 0),
        k=("mixed_qkv", width),
        v=("mixed_qkv", 2 * width),
        gate="a",
        step="b",
        decay=(gates.BOUNDED_CHANNEL if g.gate_lower_bound else gates.SOFTPLUS_CHANNEL).value,
        beta=gates.SIGMOID.value,
        scale=g.scale,
        delta=True,
        mixed="mixed_qkv",
        groups=Groups(2 * g.num_heads, g.head_dim, g.num_heads, g.head_dim, norm=True),
        bound=g.gate_lower_bound,
    )


def _lightning(g: Lightning) -> Recipe:
    return Recipe(
        key_heads=g.num_heads,
        heads=g.num_heads,
        dk=g.head_dim,
        dv=g.head_dim,
        q=("q", 0),
        k=("k", 0),
        v=("v", 0),
        gate="",
        step="",
        decay=gates.CONSTANT.value,
        beta=gates.ONE.value,
        scale=g.scale,
        silu=g.activation == "silu",
    )


def _mamba2(g: Mamba2) -> Recipe:
    inner, group_dim = g.num_heads * g.head_dim, g.num_groups * g.state_dim
    return Recipe(
        key_heads=g.num_groups,
        heads=g.num_heads,
        dk=g.state_dim,
        dv=g.head_dim,
        q=("xBC", inner + group_dim),
        k=("xBC", inner),
        v=("xBC", 0),
        gate="dt",
        step="dt",
        decay=gates.TIME_STEP.value,
        beta=gates.STEP.value,
        scale=1.0,
        mixed="xBC",
        groups=_plain_groups(g.conv_channels),
        low=g.dt_min,
        high=g.dt_max,
    )


def recipe(geometry: object) -> Recipe:
    """The recipe of a geometry. Raises UnsupportedError for mechanisms that are not the recurrence's."""
    match geometry:
        case GatedDelta():
            return _gated_delta(geometry)
        case KimiDelta():
            return _kimi_delta(geometry)
        case Lightning():
            return _lightning(geometry)
        case Mamba2():
            return _mamba2(geometry)
        case _:
            raise UnsupportedError("geometry", geometry, "is no mechanism of the Triton backend")


def conv_launch(
    layer: LinearLayer,
    weight: Tensor,
    bias: Tensor,
    groups: Groups,
    x: Tensor,
    work: Tensor,
    plan: LinearPlan,
    tuning: Tuning,
    activation: bool = True,
) -> Launch:
    """The convolution of a layer: x [T, C] to work [T, C].

    weight [C, K] and bias [C] in fp32, contiguous; the layer has a bias or `bias` is not read.
    """
    pool, block = layer.conv, tuning.conv_tokens
    return Launch(
        conv_kernel,
        (-(-plan.num_tokens // block), groups.first + groups.second),
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "pool": pool,
            "work": work,
            "token_span": plan.token_span,
            "cu_seqlens": plan.cu_seqlens,
            "state_in": plan.state_in,
            "state_out": plan.state_out,
            "num_tokens": plan.num_tokens,
            "x_row": x.stride(0),
            "work_row": work.stride(0),
            "pool_slot": pool.stride(0),
        },
        {
            "FIRST": groups.first,
            "FIRST_WIDTH": groups.first_width,
            "WIDTH": groups.width,
            "NORM": groups.norm,
            "SILU": activation,
            "BIAS": "conv_bias" in layer.params,
            "TAPS": pool.shape[2] + 1,
            "BLOCK_T": block,
            "BLOCK_C": power_of_two(max(groups.first_width if groups.first else 1, groups.width)),
        },
        warps=tuning.conv_warps,
        unspecialised=frozenset({"num_tokens"}),
    )


class PlanCache:
    """The plan of each LinearMeta, kept as long as the LinearMeta lives.

    Made by the first layer that runs; the step's other layers find it. Safe between threads.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._plans: WeakKeyDictionary[LinearMeta, LinearPlan] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, meta: LinearMeta, device: torch.device, host: HostSpans | None = None) -> LinearPlan:
        """The plan for pools on `device`. Raises MetadataError."""
        with self._lock:
            plan = self._plans.get(meta)
            if plan is None or plan.token_span.device != device:
                plan = plan_step(meta, device, self._tuning.chunk, self._tuning.short_span, host)
                self._plans[meta] = plan
            return plan


class LaunchedKernel(LinearKernel):
    """One linear layer as a sequence of launches.

    Args:
        layer: its parameters and pools.
        tuning: of the launches.
        plans: of the steps.
        pool: of the two, the one that tells the device and the number of slots.
    """

    def __init__(self, layer: LinearLayer, tuning: Tuning, plans: PlanCache, pool: Tensor) -> None:
        self._layer = layer
        self._signature = signature(layer.geometry)
        self._tuning = tuning
        self._plans = plans
        self._device = pool.device
        self._conv_weight = self._floats(layer.params.get("conv_weight"))
        self._conv_bias = self._floats(layer.params.get("conv_bias"))

    def _floats(self, tensor: Tensor | None) -> Tensor:
        """A contiguous fp32 copy; for an absent parameter one zero, which no kernel reads."""
        if tensor is None:
            return torch.zeros(1, dtype=torch.float32, device=self._device)
        return tensor.detach().to(self._device, torch.float32).contiguous()

    def __call__(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> None:
        if not (INTERPRETED or out.is_cuda):
            raise InputError("out", out.device, "must be on a CUDA device")
        with torch.cuda.device_of(out):  # Triton launches on the current device
            for launch in self.launches(inputs, meta, out):
                launch.run()

    def launches(self, inputs: Mapping[str, Tensor], meta: LinearMeta, out: Tensor) -> Iterator[Launch]:
        """The step's launches, in order. Raises InputError or MetadataError before the first."""
        check_inputs(inputs, meta.num_tokens, self._signature.inputs)
        check_rows("out", out, meta.num_tokens, self._signature.output)
        for name, tensor in (*inputs.items(), ("out", out)):
            if tensor.dtype not in DTYPES:
                raise InputError(name, tensor.dtype, "must be float32 or bfloat16")
            if tensor.device != self._device:
                raise InputError(name, tensor.device, f"must be on {self._device}, where the pools are")
        plan = self._plans.get(meta, self._device)
        plan.check_pool(self._layer.num_slots)
        return self._steps(inputs, plan, out) if plan.num_tokens else iter(())

    @abstractmethod
    def _steps(self, inputs: Mapping[str, Tensor], plan: LinearPlan, out: Tensor) -> Iterator[Launch]:
        """The launches of a step with rows, whose inputs have been checked."""

    def _conv(
        self, groups: Groups, x: Tensor, work: Tensor, plan: LinearPlan, activation: bool = True
    ) -> Launch:
        weight, bias = self._conv_weight, self._conv_bias
        return conv_launch(self._layer, weight, bias, groups, x, work, plan, self._tuning, activation)


class TritonLinearKernel(LaunchedKernel):
    """One layer of the common recurrence: its parameters in fp32, and the launches of each step."""

    def __init__(self, layer: LinearLayer, tuning: Tuning, plans: PlanCache) -> None:
        super().__init__(layer, tuning, plans, layer.state)
        self._recipe = recipe(layer.geometry)
        self._pool = layer.state
        params = layer.params
        self._rate = self._floats(
            params["log_decay"] if "log_decay" in params else params["A_log"].double().exp()
        )
        self._dt_bias = self._floats(params.get("dt_bias"))
        self._skip = self._floats(params.get("D"))

    def _steps(self, inputs: Mapping[str, Tensor], plan: LinearPlan, out: Tensor) -> Iterator[Launch]:
        if self._recipe.groups is not None:
            mixed = inputs[self._recipe.mixed]
            work = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
            yield self._conv(self._recipe.groups, mixed, work, plan)
            inputs = {**inputs, self._recipe.mixed: work}
        if plan.recurrent.shape[0]:
            yield self._recurrent(inputs, plan, out)
        if plan.num_chunks:
            yield from self._chunked(inputs, plan, out)

    def _rows(self, inputs: Mapping[str, Tensor], *names: str) -> dict[str, Tensor | int | float]:
        """Kernel arguments `name` and `name_row` for each of q, k, v, gate and step that is named."""
        r = self._recipe
        args: dict[str, Tensor | int | float] = {}
        for name in names:
            tensor, row = self._rate, 1  # absent: never read
            if name in ("q", "k", "v"):
                source, column = {"q": r.q, "k": r.k, "v": r.v}[name]
                row = inputs[source].stride(0)
                tensor = inputs[source][:, column:] if column else inputs[source]
            elif source := r.gate if name == "gate" else r.step:
                tensor, row = inputs[source], inputs[source].stride(0)
            args[name], args[f"{name}_row"] = tensor, row
        return args

    def _shape(self) -> dict[str, Any]:
        r = self._recipe
        return {"HEADS": r.heads, "GROUP": r.heads // r.key_heads, "DK": r.dk}

    def _recurrent(self, inputs: Mapping[str, Tensor], plan: LinearPlan, out: Tensor) -> Launch:
        r = self._recipe
        block = min(self._tuning.recurrent_columns, power_of_two(r.dv))
        return Launch(
            recurrent_kernel,
            (-(-r.dv // block), r.heads, plan.recurrent.shape[0]),
            {
                **self._rows(inputs, "q", "k", "v", "gate", "step"),
                "out": out,
                "pool": self._pool,
                "rate": self._rate,
                "bias": self._dt_bias,
                "skip": self._skip,
                "spans": plan.recurrent,
                "cu_seqlens": plan.cu_seqlens,
                "state_in": plan.state_in,
                "state_out": plan.state_out,
                "out_row": out.stride(0),
                "pool_slot": self._pool.stride(0),
                "scale": float(r.scale),
                "beta_scale": float(r.beta_scale),
                "bound": float(r.bound),
                "low": float(r.low),
                "high": float(r.high),
            },
            {
                **self._shape(),
                "DV": r.dv,
                "CHANNEL": r.channel,
                "DECAY": r.decay,
                "BETA": r.beta,
                "DELTA": r.delta,
                "SILU": r.silu,
                "SKIP": "D" in self._layer.params,
                "BLOCK_K": power_of_two(r.dk),
                "BLOCK_V": block,
            },
            warps=self._tuning.recurrent_warps,
        )

    def _chunked(self, inputs: Mapping[str, Tensor], plan: LinearPlan, out: Tensor) -> Iterator[Launch]:
        r, tuning = self._recipe, self._tuning
        rows, chunks = plan.num_tokens, plan.num_chunks
        work_dtype = inputs[r.q[0]].dtype
        where = {"chunk_row": plan.chunk_row, "chunk_len": plan.chunk_len}
        # Products of fp32 operands take three tf32 products each, which is as exact as fp32. The solution of
        # the triangular system is rounded to the operands' dtype, so one tf32 product is enough for bf16.
        half = work_dtype == torch.bfloat16
        products = {"DOT": tl.bfloat16 if half else tl.float32, "PRECISION": "tf32x3"}

        def block(limit: int, width: int) -> int:
            """Columns of a block: fp32 operands take twice the registers of bf16 ones."""
            return min(limit if half else max(MIN_BLOCK, limit // 2), power_of_two(width))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        decay = empty(rows, r.heads * r.dk if r.channel else r.heads)
        yield self._chunk_gate(inputs, decay, where, chunks)

        key_scores = query_scores = w = u = fresh = decay  # never read where the mechanism has none
        if r.channel:
            key_scores, query_scores = (empty(rows, r.heads, tuning.chunk) for _ in range(2))
            yield Launch(
                chunk_scores_kernel,
                (chunks, tuning.chunk // SUB_BLOCK, r.heads),
                {
                    **self._rows(inputs, "q", "k"),
                    "decay": decay,
                    "key_scores": key_scores,
                    "query_scores": query_scores,
                    **where,
                },
                {
                    **self._shape(),
                    **products,
                    "CHUNK": tuning.chunk,
                    "SUB": SUB_BLOCK,
                    "BLOCK_K": block(tuning.key_columns, r.dk),
                },
            )
        shape = {**self._shape(), **products, "DV": r.dv, "CHANNEL": r.channel, "CHUNK": tuning.chunk}
        if r.delta:
            w = empty(rows, r.heads, r.dk, dtype=work_dtype)
            u, fresh = (empty(rows, r.heads, r.dv, dtype=work_dtype) for _ in range(2))
            yield Launch(
                chunk_solve_kernel,
                (chunks, r.heads),
                {
                    **self._rows(inputs, "k", "v", "step"),
                    "decay": decay,
                    "key_scores": key_scores,
                    "w": w,
                    "u": u,
                    **where,
                    "beta_scale": float(r.beta_scale),
                },
                {
                    **shape,
                    "SUB": SUB_BLOCK,
                    "BLOCK_K": block(tuning.key_columns, r.dk),
                    "BLOCK_V": block(tuning.solve_columns, r.dv),
                    "SOLVE_PRECISION": "tf32" if half else "tf32x3",
                },
                warps=tuning.solve_warps,
            )
        states = empty(chunks, r.heads, r.dk, r.dv, dtype=work_dtype)
        columns = block(tuning.state_columns, r.dv)
        form = {**shape, "BETA": r.beta, "DELTA": r.delta, "SILU": r.silu}
        yield Launch(
            chunk_state_kernel,
            (-(-r.dv // columns), r.heads, plan.chunked.shape[0]),
            {
                **self._rows(inputs, "k", "v", "step"),
                "decay": decay,
                "w": w,
                "u": u,
                "fresh": fresh,
                "states": states,
                "pool": self._pool,
                "bias": self._dt_bias,
                "spans": plan.chunked,
                "span_chunks": plan.span_chunks,
                **where,
                "state_in": plan.state_in,
                "state_out": plan.state_out,
                "pool_slot": self._pool.stride(0),
                "low": float(r.low),
                "high": float(r.high),
            },
            {**form, "BLOCK_K": power_of_two(r.dk), "BLOCK_V": columns},
            warps=tuning.state_warps,
            stages=tuning.state_stages,
        )
        columns = block(tuning.output_columns, r.dv)
        yield Launch(
            chunk_output_kernel,
            (-(-r.dv // columns), r.heads, chunks),
            {
                **self._rows(inputs, "q", "k", "v", "step"),
                "decay": decay,
                "query_scores": query_scores,
                "fresh": fresh,
                "states": states,
                "out": out,
                "bias": self._dt_bias,
                "skip": self._skip,
                **where,
                "out_row": out.stride(0),
                "scale": float(r.scale),
                "low": float(r.low),
                "high": float(r.high),
            },
            {
                **form,
                "SKIP": "D" in self._layer.params,
                "BLOCK_K": block(tuning.key_columns, r.dk),
                "BLOCK_V": columns,
            },
            warps=tuning.output_warps,
        )

    def _chunk_gate(
        self, inputs: Mapping[str, Tensor], decay: Tensor, where: Mapping[str, Tensor], chunks: int
    ) -> Launch:
        r, columns = self._recipe, decay.shape[1]
        block = min(64, power_of_two(columns))
        return Launch(
            chunk_gate_kernel,
            (chunks, -(-columns // block)),
            {
                **self._rows(inputs, "gate"),
                "decay": decay,
                "rate": self._rate,
                "bias": self._dt_bias,
                **where,
                "bound": float(r.bound),
                "low": float(r.low),
                "high": float(r.high),
            },
            {
                "COLUMNS": columns,
                "PER_HEAD": columns // r.heads,
                "DECAY": r.decay,
                "CHUNK": self._tuning.chunk,
                "BLOCK_C": block,
            },
        )


class TritonMamba1Kernel(LaunchedKernel):
    """One Mamba-1 layer. Convolution and scan are kernels; the projections between them are torch's."""

    def __init__(self, layer: LinearLayer, geometry: Mamba1, tuning: Tuning, plans: PlanCache) -> None:
        super().__init__(layer, tuning, plans, layer.state)
        self._geometry = geometry
        params = layer.params
        self._rate = self._floats(params["A_log"].double().exp())
        self._dt_bias, self._skip = self._floats(params["dt_bias"]), self._floats(params["D"])
        self._x_proj, self._dt_proj = (self._floats(params[name]).T for name in ("x_proj", "dt_proj"))
        self._norms = [
            self._floats(params[name]) if name in params else None for name in ("dt_norm", "B_norm", "C_norm")
        ]

    def _steps(self, inputs: Mapping[str, Tensor], plan: LinearPlan, out: Tensor) -> Iterator[Launch]:
        g = self._geometry
        # fp32 throughout: dt stands in an exponent, where a rounding to bf16 is multiplied by the context.
        u = torch.empty(inputs["x"].shape, dtype=torch.float32, device=self._device)
        yield self._conv(_plain_groups(g.inner_dim), inputs["x"], u, plan)
        parts = (u @ self._x_proj).split([g.dt_rank, g.state_dim, g.state_dim], dim=-1)
        low, B, C = (
            part if norm is None else torch.nn.functional.rms_norm(part, part.shape[1:], norm, g.norm_eps)
            for part, norm in zip(parts, self._norms, strict=True)
        )
        dt = low @ self._dt_proj
        pool, block = self._layer.state, min(self._tuning.scan_channels, power_of_two(g.inner_dim))
        yield Launch(
            selective_scan_kernel,
            (-(-g.inner_dim // block), plan.state_in.shape[0]),
            {
                "u": u,
                "dt": dt,
                "B": B,
                "C": C,
                "out": out,
                "pool": pool,
                "rate": self._rate,
                "bias": self._dt_bias,
                "skip": self._skip,
                "cu_seqlens": plan.cu_seqlens,
                "state_in": plan.state_in,
                "state_out": plan.state_out,
                "u_row": u.stride(0),
                "dt_row": dt.stride(0),
                "B_row": B.stride(0),
                "C_row": C.stride(0),
                "out_row": out.stride(0),
                "pool_slot": pool.stride(0),
            },
            {"INNER": g.inner_dim, "N": g.state_dim, "BLOCK_I": block, "BLOCK_N": power_of_two(g.state_dim)},
            warps=self._tuning.scan_warps,
        )


class TritonShortConvKernel(LaunchedKernel):
    """One short convolution, straight into the output."""

    def __init__(self, layer: LinearLayer, geometry: ShortConv, tuning: Tuning, plans: PlanCache) -> None:
        super().__init__(layer, tuning, plans, layer.conv)
        self._groups = _plain_groups(geometry.channels)

    def _steps(self, inputs: Mapping[str, Tensor], plan: LinearPlan, out: Tensor) -> Iterator[Launch]:
        yield self._conv(self._groups, inputs["x"], out, plan, activation=False)


class TritonLinearBackend(LinearBackend):
    """All linear mechanisms on a CUDA device, fp32 and bf16.

    Runs on the CPU only under Triton's interpreter (TRITON_INTERPRET=1 before this package's import).
    One-token and short spans run token by token, long ones in chunks; see `Tuning`.

    Args:
        tuning: launch shapes.
        recorder: records the decode steps that `prepare` was told of; None: every step is launched.
    """

    name = "triton"
    capabilities = Capabilities(
        planning=Planning.OPTIONAL,
        chunked_prefix=True,
        ragged=Ragged.FORCED_OFF,
        graphs=True,
        mechanisms=frozenset({"gated_delta", "kimi_delta", "lightning", "mamba2", "mamba1", "short_conv"}),
        dtypes=DTYPES,
        devices=frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"}),
    )

    def __init__(self, tuning: Tuning | None = None, recorder: Recorder | None = None) -> None:
        self._tuning = tuning or Tuning()
        self._plans = PlanCache(self._tuning)
        self._recorder = recorder
        self._decodes: dict[torch.device, DecodeSteps] = {}
        """Of the devices that layers lie on."""

    def prepare(self, meta: LinearMeta) -> LinearMeta:
        """Plan a step, so that no layer of it has to; decode steps get metadata that graphs can read."""
        if len(self._decodes) != 1:
            return meta  # layers on no device, or on several: each plans for its own
        ((device, steps),) = self._decodes.items()
        found = steps.take(meta) if self._recorder is not None else None
        if found is None:
            self._plans.get(meta, device)
            return meta
        self._plans.get(found, device, host_spans(found))
        return found

    def layer(self, layer: LinearLayer) -> LinearKernel:
        """Resolve one layer. Raises UnsupportedError, or LayerError where the pools are not on a GPU."""
        pools = {"state_pool": layer.state_pool, "conv_pool": layer.conv_pool}
        given = {name: pool for name, pool in pools.items() if pool is not None}
        device = next(iter(given.values())).device
        for name, pool in given.items():
            if not (INTERPRETED or pool.device.type == "cuda"):
                raise LayerError(name, pool.device, "must be on a CUDA device")
            if pool.device != device:
                raise LayerError(name, pool.device, f"must be on {device}")
        self._decodes.setdefault(device, DecodeSteps(device))
        kernel = self._launched(layer)
        return kernel if self._recorder is None else GraphedKernel(kernel, self._recorder)

    def _launched(self, layer: LinearLayer) -> LaunchedKernel:
        match layer.geometry:
            case Mamba1() as g:
                return TritonMamba1Kernel(layer, g, self._tuning, self._plans)
            case ShortConv() as g:
                return TritonShortConvKernel(layer, g, self._tuning, self._plans)
            case _:
                return TritonLinearKernel(layer, self._tuning, self._plans)

    def plan(self, meta: LinearMeta, device: torch.device, host: HostSpans | None = None) -> LinearPlan:
        """Plan a step before its first layer runs, so that no layer has to wait for the device.

        host: the values of the metadata, where the caller has them; without it they are copied from the
        device. The plan is kept with `meta`, which must not change afterwards.
        Raises MetadataError.
        """
        return self._plans.get(meta, device, host)
