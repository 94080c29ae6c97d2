"""Speed of the CPU kernels, each figure beside its torch peer in the same run.

    python -m braid_kernels.bench [--threads N] [--json FILE] [--only TEXT]

Every case is first run against the float64 reference, and the peer too: where either disagrees nothing
is reported and the exit status is 1. Times are whole layer calls from Python (convolution, gates,
recurrence; or append and attention) or single matrix products, median of the repetitions, best in
brackets. A product's weight is one of several copies in turn, which no cache of one core holds together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from braid_kernels.backend import FullBackend, FullLayer, LinearBackend, LinearLayer
from braid_kernels.errors import KernelError
from braid_kernels.geometry import GatedDelta, Gqa, KimiDelta, Lightning, LinearGeometry, Mamba2, signature
from braid_kernels.native import set_num_threads
from braid_kernels.native.gemm import Gemm, Part, pack
from braid_kernels.native.library import default_threads
from braid_kernels.registry import full_backend, linear_backend
from braid_kernels.testing import FullCase, LinearCase, Span, difference, full_case, linear_case

KERNEL_TOLERANCE = 5e-6  # fp32 against float64, see tests/kernels
PEER_TOLERANCE = 1e-3  # the peers' chunked fp32 sums are looser; this only proves that they do the same work
BF16_TOLERANCE = 2.0**-8  # one rounding of the largest output
MIN_SECONDS = 0.4
WEIGHT_BYTES = 40e6  # of a product's copies together

Step: TypeAlias = Callable[[], Tensor]
Conv: TypeAlias = Callable[[Tensor], Tensor]
Params: TypeAlias = dict[str, Tensor]


class WrongResultError(KernelError):
    """A kernel or a peer disagrees with the reference; its speed means nothing."""


@dataclass(frozen=True)
class Result:
    """One case. Times in microseconds per call; tokens per call."""

    case: str
    tokens: int
    cpp_us: float
    cpp_best_us: float
    peer: str
    peer_us: float
    error: float

    @property
    def row(self) -> str:
        rate = f"{self.tokens / self.cpp_us * 1e6:>12,.0f}"
        return (
            f"{self.case:<46} {self.cpp_us:>10.1f} ({self.cpp_best_us:>9.1f}) {rate} "
            f"{self.peer_us:>12.1f} {self.peer_us / self.cpp_us:>8.1f}x  {self.error:.0e}  {self.peer}"
        )


HEADER = (
    f"{'case':<38} {'cpp us':>10} ({'best':>9}) {'tokens/s':>12} {'torch us':>12} {'ratio':>9}  error  peer"
)


def measure(step: Callable[[], object]) -> tuple[float, float]:
    """Median and best time of `step` in microseconds, after a warm-up."""
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < MIN_SECONDS / 2:
        step()
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < MIN_SECONDS:
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def compare(
    name: str,
    tokens: int,
    expected: Tensor,
    kernel: Step,
    peer_name: str,
    peer: Step,
    tolerance: float = KERNEL_TOLERANCE,
) -> Result:
    """Check both against `expected`, then time both. Raises WrongResultError."""
    error, peer_error = difference(kernel(), expected), difference(peer(), expected)
    if error > tolerance:
        raise WrongResultError(f"{name}: the kernel is {error:.1e} off the reference")
    if peer_error > max(tolerance, PEER_TOLERANCE):
        raise WrongResultError(f"{name}: the peer ({peer_name}) is {peer_error:.1e} off the reference")
    middle, best = measure(kernel)
    return Result(name, tokens, middle, best, peer_name, measure(peer)[0], error)


# ---- linear ----


def linear_step(backend: LinearBackend, case: LinearCase) -> Step:
    """The kernel on `case`, in place on its pools (slots read and written are disjoint)."""
    out = torch.empty(case.meta.num_tokens, *signature(case.geometry).output)
    kernel = backend.layer(LinearLayer(case.geometry, case.params, case.state_pool, case.conv_pool))

    def step() -> Tensor:
        kernel(case.inputs, case.meta, out)
        return out

    return step


def torch_l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Parts:
    """One recurrent step: q, k [B, H, dk], v [B, H, dv], log decay [B, H, 1|dk, 1], beta [B, H, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    scale: float
    skip: float | Tensor = 0.0


def torch_heads(rows: Tensor, count: int, to: int) -> Tensor:
    """[B, count * d] -> [B, to, d], each head repeated."""
    return rows.view(rows.shape[0], count, -1).repeat_interleave(to // count, dim=1)


def gated_delta_parts(g: GatedDelta, p: Params, x: Params, conv: Conv) -> Parts:
    key = g.num_k_heads * g.k_head_dim
    q, k, v = torch.split(conv(x["mixed_qkv"]), [key, key, g.num_v_heads * g.v_head_dim], dim=-1)
    decay = -p["A_log"].exp() * F.softplus(x["a"] + p["dt_bias"])
    q, k = (torch_l2(torch_heads(rows, g.num_k_heads, g.num_v_heads)) for rows in (q, k))
    v = torch_heads(v, g.num_v_heads, g.num_v_heads)
    return Parts(q, k, v, decay[..., None, None], g.beta_scale * x["b"].sigmoid()[..., None], g.scale)


def kimi_delta_parts(g: KimiDelta, p: Params, x: Params, conv: Conv) -> Parts:
    q, k, v = (torch_heads(rows, g.num_heads, g.num_heads) for rows in conv(x["mixed_qkv"]).chunk(3, dim=-1))
    gate = torch_heads(x["a"] + p["dt_bias"], g.num_heads, g.num_heads)
    decay = -p["A_log"].exp()[:, None] * F.softplus(gate)
    return Parts(torch_l2(q), torch_l2(k), v, decay[..., None], x["b"].sigmoid()[..., None], g.scale)


def lightning_parts(g: Lightning, p: Params, x: Params, conv: Conv) -> Parts:
    return Parts(x["q"], x["k"], x["v"], p["log_decay"][:, None, None], torch.ones(1, 1, 1), g.scale)


def mamba2_parts(g: Mamba2, p: Params, x: Params, conv: Conv) -> Parts:
    group = g.num_groups * g.state_dim
    v, k, q = torch.split(conv(x["xBC"]), [g.num_heads * g.head_dim, group, group], dim=-1)
    q, k = (torch_heads(rows, g.num_groups, g.num_heads) for rows in (q, k))
    dt = F.softplus(x["dt"] + p["dt_bias"]).clamp(g.dt_min, g.dt_max)
    decay = (-p["A_log"].exp() * dt)[..., None, None]
    v = torch_heads(v, g.num_heads, g.num_heads)
    return Parts(q, k, v, decay, dt[..., None], 1.0, p["D"][:, None] * v)


def torch_parts(case: LinearCase, conv: Conv) -> Parts:
    match case.geometry:
        case GatedDelta() as g:
            parts = gated_delta_parts(g, case.params, case.inputs, conv)
        case KimiDelta() as g:
            parts = kimi_delta_parts(g, case.params, case.inputs, conv)
        case Lightning() as g:
            parts = lightning_parts(g, case.params, case.inputs, conv)
        case Mamba2() as g:
            parts = mamba2_parts(g, case.params, case.inputs, conv)
    return parts


def torch_decode(case: LinearCase) -> Step:
    """Batched one-token step in plain torch: what transformers' recurrent rules do, states gathered."""
    read, write = case.meta.state_in.long(), case.meta.state_out.long()
    delta = isinstance(case.geometry, GatedDelta | KimiDelta)

    def conv(rows: Tensor) -> Tensor:
        if case.conv_pool is None:
            return rows
        window = torch.cat([case.conv_pool[read], rows[:, :, None]], dim=-1)  # [B, C, K]
        case.conv_pool[write] = window[:, :, 1:]
        return F.silu((window * case.params["conv_weight"]).sum(-1))

    def step() -> Tensor:
        x = torch_parts(case, conv)
        state = case.state_pool[read] * x.decay.exp()
        seen = (state * x.k[..., None]).sum(-2) if delta else 0.0
        state = state + x.k[..., None] * ((x.v - seen) * x.beta)[..., None, :]
        case.state_pool[write] = state
        return x.scale * (state * x.q[..., None]).sum(-2) + x.skip

    return step


def chunk_prefill(case: LinearCase, g: GatedDelta) -> Step:
    """transformers' chunked gated delta rule with its convolution, one sequence from a zero state."""
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    p, x = case.params, case.inputs
    key = g.num_k_heads * g.k_head_dim

    def step() -> Tensor:
        mixed = peer.causal_conv1d_fn(x["mixed_qkv"].T[None], p["conv_weight"], activation="silu")[0].T
        q, k, v = mixed.split([key, key, g.num_v_heads * g.v_head_dim], dim=-1)
        q, k = (r.unflatten(-1, (g.num_k_heads, -1))[None] for r in (q, k))
        decay = -p["A_log"].exp() * F.softplus(x["a"] + p["dt_bias"])
        out = peer.torch_chunk_gated_delta_rule(
            q,
            k,
            v.unflatten(-1, (g.num_v_heads, -1))[None],
            g=decay[None],
            beta=x["b"].sigmoid()[None],
            use_qk_l2norm_in_kernel=True,
            output_final_state=True,
        )[0]
        return torch.as_tensor(out[0])

    return step


def linear_results(only: str) -> Iterator[Result]:
    cpp, reference = linear_backend("cpp"), linear_backend("reference")
    small = GatedDelta(8, 8, 64, 64, 4, 64**-0.5)
    large = GatedDelta(16, 32, 128, 128, 4, 128**-0.5)
    for name, geometry, tokens in (("8 heads d 64", small, 2048), ("16/32 heads d 128", large, 1024)):
        label = f"gated_delta prefill {tokens}, {name}"
        if only in label:
            case = linear_case(geometry, [Span.final(tokens, -1, 0)], slots=1)
            expected = case.run(reference).out
            peer = chunk_prefill(case, geometry)
            yield compare(label, tokens, expected, linear_step(cpp, case), "transformers chunk rule", peer)
    layers: list[tuple[str, LinearGeometry]] = [
        ("8 heads d 64", small),
        ("16/32 heads d 128", large),
        ("16 heads d 128", KimiDelta(16, 128, 4, 128**-0.5)),
        ("16 heads d 128", Lightning(16, 128, 128**-0.5)),
        ("64 heads 64 x 128", Mamba2(64, 64, 128, 1, 4)),
    ]
    for name, layer in layers:
        for batch in (1, 8, 64):
            label = f"{layer.mechanism} decode b {batch}, {name}"
            if only in label:
                spans = [Span(1, i, (batch + i,)) for i in range(batch)]
                case = linear_case(layer, spans, slots=2 * batch)
                expected = case.run(reference).out
                yield compare(
                    label, batch, expected, linear_step(cpp, case), "torch recurrent step", torch_decode(case)
                )


# ---- full ----


def full_step(backend: FullBackend, case: FullCase) -> Step:
    """The kernel on `case`, in place on its caches (appending the same rows again changes nothing)."""
    out = torch.empty(case.meta.num_tokens, *signature(case.geometry).output)
    kernel = backend.layer(FullLayer(case.geometry, case.params, case.caches))

    def step() -> Tensor:
        kernel(case.inputs, case.meta, None, out)
        return out

    return step


def gather_sdpa(case: FullCase, g: Gqa) -> Step:
    """Append, gather the pages, SDPA with the query group as rows; equal spans and contexts."""
    meta, q, k, v = case.meta, *(case.inputs[n] for n in "qkv")
    batch, context = meta.num_sequences, int(meta.context_lens[0])
    length, group = meta.num_tokens // batch, g.num_q_heads // g.num_kv_heads
    size, total = case.caches["k"].shape[1], context + meta.num_tokens // batch
    positions = torch.arange(context, total)
    pages = meta.page_table.long()
    rows_page, rows_offset = pages[:, positions // size].reshape(-1), (positions % size).repeat(batch)
    # rows of one KV head: group x length; row (g, t) sees keys up to context + t
    mask = torch.arange(total)[None] <= (context + torch.arange(length))[:, None]
    mask = mask.repeat(group, 1)

    def step() -> Tensor:
        gathered = []
        for name, new in (("k", k), ("v", v)):
            cache = case.caches[name]
            cache[rows_page, rows_offset] = new
            gathered.append(cache[pages].flatten(1, 2)[:, :total].transpose(1, 2))  # [B, Hkv, N, D]
        queries = q.view(batch, length, g.num_kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            queries, gathered[0], gathered[1], attn_mask=None if length == 1 else mask, scale=g.scale
        )
        out = out.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4)  # [B, L, Hkv, G, Dv]
        return out.reshape(meta.num_tokens, g.num_q_heads, -1)

    return step


def full_results(only: str) -> Iterator[Result]:
    cpp, reference = full_backend("cpp"), full_backend("reference")
    geometry = Gqa(16, 4, 128, 128, 128**-0.5)
    for name, batch, length, context in (
        ("decode b 1, 2k context", 1, 1, 2047),
        ("decode b 8, 2k context", 8, 1, 2047),
        ("verify 4 x b 8, 2k context", 8, 4, 2044),
        ("prefill 1024", 1, 1024, 0),
        ("prefill 512 after 1536", 1, 512, 1536),
    ):
        label = f"gqa {name}, 16/4 heads d 128"
        if only in label:
            case = full_case(geometry, [length] * batch, [context] * batch)
            for cache in case.caches.values():
                cache.nan_to_num_(0.0)  # SDPA reads page tails and masks them afterwards
            expected = case.run(reference).out
            peer = gather_sdpa(case, geometry)
            yield compare(label, batch * length, expected, full_step(cpp, case), "gather + SDPA", peer)


# ---- products ----


def in_turn(steps: list[Step]) -> Step:
    """A step that runs the next of `steps` each time."""
    turn = itertools.cycle(steps)
    return lambda: next(turn)()


def gemm_step(x: Tensor, weight: Tensor) -> Step:
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    product = Gemm(x, pack(weight), [Part(out, 0)])

    def step() -> Tensor:
        product()
        return out

    return step


def linear_layer_step(x: Tensor, weight: Tensor) -> Step:
    return lambda: F.linear(x, weight)


def gemm_results(only: str) -> Iterator[Result]:
    for dtype, name, tolerance in (
        (torch.float32, "fp32", KERNEL_TOLERANCE),
        (torch.bfloat16, "bf16", BF16_TOLERANCE),
    ):
        for k, n in ((256, 1568), (512, 256), (768, 256), (256, 4096)):
            for rows in (1, 4, 16, 64, 2048):
                label = f"gemm {name} {rows} x {k} x {n}"
                if only not in label:
                    continue
                x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
                copies = int(WEIGHT_BYTES / (weight.numel() * weight.element_size())) if rows <= 64 else 1
                weights = [weight.clone() for _ in range(copies)]
                kernel = in_turn([gemm_step(x, w) for w in weights])
                peer = in_turn([linear_layer_step(x, w) for w in weights])
                expected = x.double() @ weight.double().T
                yield compare(label, rows, expected, kernel, "F.linear", peer, tolerance)


def run(only: str = "", report: Callable[[Result], None] | None = None) -> list[Result]:
    """All cases whose name contains `only`. Raises WrongResultError."""
    results = []
    for results_of in (linear_results, full_results, gemm_results):
        for result in results_of(only):
            results.append(result)
            if report is not None:
                report(result)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m braid_kernels.bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=default_threads(), help="of the kernels and of torch")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    set_num_threads(options.threads)
    print(f"threads {options.threads}, torch {torch.__version__}, fp32 unless named\n{HEADER}", flush=True)
    try:
        results = run(options.only, lambda result: print(result.row, flush=True))
    except WrongResultError as error:
        print(f"refusing to report: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        document = {
            "threads": options.threads,
            "torch": torch.__version__,
            "results": [asdict(r) for r in results],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if results:
        ratio = math.exp(statistics.fmean(math.log(r.peer_us / r.cpp_us) for r in results))
        print(f"geometric mean of the ratios: {ratio:.1f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
