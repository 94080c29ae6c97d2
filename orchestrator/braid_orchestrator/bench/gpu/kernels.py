"""Checks of kernels on the card: against the CPU's, against others', against the card's own rates."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from braid.v1 import attention_pb2 as pb
from braid_kernels import (
    FullGeometry,
    FullLayer,
    GatedDelta,
    Gqa,
    KimiDelta,
    Lightning,
    LinearGeometry,
    LinearLayer,
    LinearMeta,
    Mamba1,
    Mamba2,
    Mla,
    PagedMeta,
    ShortConv,
    default_full_backend,
    default_linear_backend,
    full_backend,
    linear_backend,
    signature,
)
from braid_kernels.errors import BuildError
from braid_kernels.graphs import Compute, GraphRecorder
from braid_kernels.testing import Span, difference, full_case, linear_case, small_linear_geometries
from braid_wire.cuda_arena import context_of
from braid_wire.cuda_doorbell import handovers_of, sharing_of
from torch import Tensor

from braid_orchestrator.bench.gpu.outcome import Outcome, Skip

DEVICE = torch.device("cuda", 0)
BF16, FP32 = 2e-2, 1e-4
"""Bounds of differences: bf16 rounds operands and chunk states to 2^-8."""

RATES = "rates.json"

# The shapes of models that are in use, heads of 128 where the mechanism has them.
LAYERS: Mapping[str, LinearGeometry] = {
    "gated_delta": GatedDelta(16, 32, 128, 128, 4, 128**-0.5),
    "kimi_delta": KimiDelta(32, 128, 4, 128**-0.5),
    "lightning": Lightning(32, 128, 128**-0.5),
    "mamba2": Mamba2(64, 64, 128, 8, 4),
    "mamba1": Mamba1(4096, 16, 128, 4),
    "short_conv": ShortConv(2048, 3),
}
PREFILL_TOKENS = 8192
MIXED = (
    Span.final(65, 0, 1),
    Span(0),
    Span.final(1, 2, 3),
    Span(4, 0, (4, 5, 6, 7)),
    Span(1),
    Span.final(33, -1, 8),
    Span(2),
    Span(200, 2, (-1,) * 99 + (9,) + (-1,) * 99 + (10,)),
)


def seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call on the device; launches are enqueued ahead of it."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) * 1e-3


def device(outcome: Outcome, work: Path) -> None:
    """Name the card, and measure the two rates that others are compared with."""
    properties = torch.cuda.get_device_properties(DEVICE)
    context = context_of(0)
    outcome.note("name", properties.name)
    outcome.note("multiprocessors", float(properties.multi_processor_count))
    outcome.note("memory", properties.total_memory / 2**30, "GiB")
    ways = [pb.DeviceHandover.Name(way) for way in handovers_of(context)]
    outcome.note("hand-overs that work", ", ".join(ways) or "none")
    outcome.note("sharing", pb.DeviceSharing.Name(sharing_of(context)))
    source = torch.randn(1 << 30, device=DEVICE)  # 4 GiB: far beyond the cache
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(_call(target.copy_, source), 5)
    del source, target
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    matmul = 2 * 8192**3 / seconds(lambda: left @ right, 10)
    outcome.note("copy", copy * 1e-12, "TB/s, read and written")
    outcome.note("matrix product bf16", matmul * 1e-12, "TFLOP/s")
    (work / RATES).write_text(json.dumps({"copy": copy, "matmul": matmul}))


def rate(work: Path, name: str) -> float:
    """A rate that `device` measured.

    Raises:
        Skip: it did not.
    """
    path = work / RATES
    if not path.exists():
        raise Skip("the check `device` has not measured the card's rates")
    return float(json.loads(path.read_text())[name])


def _there(tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def linear(outcome: Outcome, work: Path) -> None:
    """Every mechanism, mixed batches and large shapes, fp32 and bf16."""
    ours, theirs = linear_backend("triton"), default_linear_backend()
    cases: dict[str, tuple[LinearGeometry, tuple[Span, ...], int]] = {
        f"small {name}": (g, MIXED, 12) for name, g in small_linear_geometries().items()
    }
    long = (
        Span.final(1030, -1, 1),
        *(Span.final(1, 0, 2 + b) for b in range(8)),
        Span(4, 0, (10, 11, 12, 13)),
    )
    cases |= {f"large {name}": (g, long, 14) for name, g in LAYERS.items()}
    for label, (geometry, spans, slots) in cases.items():
        for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, BF16)):
            case = linear_case(geometry, spans, slots=slots, dtype=dtype, pad=3, gap=5, bias=True)
            expected = case.run(theirs)
            state, conv = _there(case.state_pool), None
            if case.conv_pool is not None:
                conv = _there(case.conv_pool)
            params = {name: p.to(DEVICE) for name, p in case.params.items()}
            given = None if signature(geometry).state is None else state
            kernel = ours.layer(LinearLayer(geometry, params, given, conv))
            out = torch.full(expected.out.shape, float("nan"), dtype=dtype, device=DEVICE)
            kernel({name: _there(x) for name, x in case.inputs.items()}, ours.prepare(case.meta), out)
            torch.cuda.synchronize()
            worst = max(difference(out.cpu(), expected.out), difference(state.cpu(), expected.state_pool))
            outcome.note(f"{label} {str(dtype)[6:]}", worst, "", f"<= {bound}")


FULL_LAYERS: Mapping[str, FullGeometry] = {
    "gqa 128": Gqa(32, 8, 128, 128, 128**-0.5),
    "gqa 256": Gqa(16, 2, 256, 256, 256**-0.5),
    "window": Gqa(8, 2, 64, 64, 0.125, sliding_window=100),
    "odd": Gqa(6, 2, 33, 47, 0.2),
    "mla": Mla(16, 128, 64, 128, 512, 192**-0.5),
}


def full(outcome: Outcome, work: Path) -> None:
    """Every backend: decode, prompts with and without a prefix, verification."""
    lengths, contexts = (1, 70, 0, 3, 130, 1), (700, 0, 9, 120, 257, 0)
    extend = torch.tensor([False, True, True, False, True, True])
    for backend_name in ("triton", "flashinfer", "gather", "direct"):
        try:
            backend = full_backend(backend_name)
        except BuildError as error:
            outcome.note(backend_name, f"not installed: {error.reason}")
            continue
        for label, geometry in FULL_LAYERS.items():
            for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, BF16)):
                case = full_case(geometry, lengths, contexts, page_size=16, dtype=dtype)
                meta = dataclasses.replace(case.meta, extend=extend)
                expected = dataclasses.replace(case, meta=meta).run(default_full_backend())
                caches = {name: _there(cache) for name, cache in case.caches.items()}
                params = {name: p.to(DEVICE) for name, p in case.params.items()}
                kernel = backend.layer(FullLayer(geometry, params, caches))
                plan = backend.plan(meta, 16, {"prefix_chunk_tokens": "128"}, (geometry,))
                out = torch.full(expected.out.shape, float("nan"), dtype=dtype, device=DEVICE)
                kernel({name: _there(x) for name, x in case.inputs.items()}, meta, plan, out)
                torch.cuda.synchronize()
                worst = difference(out.cpu(), expected.out)
                outcome.note(f"{backend_name} {label} {str(dtype)[6:]}", worst, "", f"<= {bound}")


def _rows(shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(rows, *shape, device=DEVICE).to(torch.bfloat16) for name, shape in shapes.items()
    }


def _layer(geometry: LinearGeometry, slots: int) -> LinearLayer:
    """A layer of the CPU cases' parameter ranges, with pools on the device."""
    sig = signature(geometry)
    small = linear_case(geometry, [Span(1)], slots=1)
    state = None if sig.state is None else 0.1 * torch.randn(slots, *sig.state, device=DEVICE)
    conv = None
    if sig.conv is not None:
        conv = torch.randn(slots, *sig.conv, device=DEVICE).to(torch.bfloat16)
    return LinearLayer(geometry, {name: p.to(DEVICE) for name, p in small.params.items()}, state, conv)


def decode(outcome: Outcome, work: Path) -> None:
    """Bytes of states read and written a second, as a part of the copy rate; launches replayed as a graph."""
    copy = rate(work, "copy")
    backend = linear_backend("triton")
    for name in ("gated_delta", "kimi_delta", "lightning", "mamba2"):
        geometry = LAYERS[name]
        for batch in (1, 8, 64, 128, 256):
            sig = signature(geometry)
            layer = _layer(geometry, 2 * batch)
            slots = torch.arange(2 * batch, dtype=torch.int32).view(2, batch)
            cu = torch.arange(batch + 1, dtype=torch.int32)
            inputs, out = _rows(sig.inputs, batch), torch.empty(batch, *sig.output, device=DEVICE).bfloat16()
            kernel = backend.layer(layer)
            meta = backend.prepare(LinearMeta(cu, slots[0].contiguous(), slots[1].contiguous()))
            took = seconds(_call(kernel, inputs, meta, out))
            moved = 2 * batch * layer.state[0].nbytes + sum(x.nbytes for x in inputs.values()) + out.nbytes
            bound = ">= 0.8" if batch >= 64 else ""
            outcome.note(f"{name}, batch {batch}", moved / took / copy, "of the copy rate", bound)
    _full_decode(outcome, copy)


def _call(function: Any, *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _nothing(run: Callable[[], object]) -> Compute:
    """As what is recorded: it writes where it always writes, and gives nothing."""

    def compute() -> tuple[Tensor, ...]:
        run()
        return ()

    return compute


def _full_decode(outcome: Outcome, copy: float) -> None:
    """Paged decode of 64 sequences over 4096 positions."""
    geometry, batch, context, page = Gqa(16, 2, 256, 256, 256**-0.5), 64, 4095, 16
    pages = (context + 1) // page
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    cu = torch.arange(batch + 1, dtype=torch.int32)
    meta = PagedMeta(
        cu,
        torch.full((batch,), context, dtype=torch.int32),
        table,
        batch,
        torch.zeros(batch, dtype=torch.bool),
    )
    shape = (batch * pages, page, 2, 256)
    caches = {name: torch.randn(shape, device=DEVICE).bfloat16() for name in ("k", "v")}
    inputs, out = (
        _rows(signature(geometry).inputs, batch),
        torch.empty(batch, 16, 256, device=DEVICE).bfloat16(),
    )
    moved = sum(cache.nbytes for cache in caches.values())
    for name in ("triton", "flashinfer"):
        try:
            backend = full_backend(name)
        except BuildError:
            continue
        kernel = backend.layer(FullLayer(geometry, {}, caches))
        plan = backend.plan(meta, page, {}, (geometry,))
        recording = GraphRecorder().record(_nothing(_call(kernel, inputs, meta, plan, out)))
        took = seconds(recording.replay)
        outcome.note(
            f"{name}, paged decode, batch {batch}, context 4096", moved / took / copy, "of the copy rate"
        )


def prefill(outcome: Outcome, work: Path) -> None:
    """Tokens a second of one prompt; the core of the mechanism beside flash-linear-attention's, where that
    is installed (ours runs its convolution and gates too)."""
    backend = linear_backend("triton")
    theirs = _others() if importlib.util.find_spec("fla") is not None else {}
    if not theirs:
        outcome.note("flash-linear-attention", "not installed: no comparison")
    tokens = PREFILL_TOKENS
    for name, geometry in LAYERS.items():
        sig = signature(geometry)
        layer = _layer(geometry, 2)
        out_slots = torch.full((tokens,), -1, dtype=torch.int32)
        out_slots[-1] = 1
        meta = LinearMeta(
            torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), out_slots
        )
        kernel = backend.layer(layer)
        meta = backend.prepare(meta)
        inputs, out = _rows(sig.inputs, tokens), torch.empty(tokens, *sig.output, device=DEVICE).bfloat16()
        took = seconds(_call(kernel, inputs, meta, out), 10)
        outcome.note(f"{name}, tokens", tokens / took * 1e-6, "million a second")
        if name in theirs:
            outcome.note(
                f"{name}, against flash-linear-attention", seconds(theirs[name](), 10) / took, "times", ">= 1"
            )


def _others() -> dict[str, Callable[[], Callable[[], object]]]:
    """Mechanism → makes inputs of the same shapes, and gives the call of flash-linear-attention's kernel."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    def rows(*shape: int) -> Tensor:
        return torch.randn(1, PREFILL_TOKENS, *shape, device=DEVICE).bfloat16()

    def gates(*shape: int) -> Tensor:
        return -torch.rand(1, PREFILL_TOKENS, *shape, device=DEVICE)

    def gated_delta() -> Callable[[], object]:
        q, k, v = rows(32, 128), rows(32, 128), rows(32, 128)
        g, beta = gates(32), torch.rand(1, PREFILL_TOKENS, 32, device=DEVICE).bfloat16()
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return lambda: chunk_gated_delta_rule(q, k, v, g, beta, **options)

    def kimi_delta() -> Callable[[], object]:
        q, k, v = rows(32, 128), rows(32, 128), rows(32, 128)
        g, beta = gates(32, 128), torch.rand(1, PREFILL_TOKENS, 32, device=DEVICE).bfloat16()
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return lambda: chunk_kda(q, k, v, g, beta, **options)

    def simple(heads: int, dk: int, dv: int) -> Callable[[], Callable[[], object]]:
        def made() -> Callable[[], object]:
            q, k, v, g = rows(heads, dk), rows(heads, dk), rows(heads, dv), gates(heads)
            return lambda: chunk_simple_gla(q, k, v, g, output_final_state=True)

        return made

    return {
        "gated_delta": gated_delta,
        "kimi_delta": kimi_delta,
        "lightning": simple(32, 128, 128),
        "mamba2": simple(64, 128, 64),
    }
