"""Times a body's segments without its attention: the C++ kernels against torch's operators, in one run.

    python benchmarks/segments.py [--model DIR] [--tokens 1 8 64 2048] [--families]

Layers answer at once, so that what is left is the body: embedding, norms, projections, MLPs, head. The
fraction is the time in matrix products of all the time that the kernels take. `--families` compares
instead a random small model of each family with the body as it is, and names the operators that are left
to torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from braid_orchestrator.bench.model import checkpoint
from braid_orchestrator.body import LoadRequest, load_body
from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_orchestrator.segments.base import SegmentedRole
from braid_orchestrator.segments.cut import cut
from braid_orchestrator.segments.eager import EagerCompiler
from braid_orchestrator.segments.native import NativeCompiler
from braid_orchestrator.segments.trace import trace
from braid_orchestrator.threads import use_threads
from braid_wire.layers import Role

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "segments"), str(TESTS / "bodies")]

from test_segments_families import FAMILIES  # noqa: E402
from walks import COUNTS, MAX_TOKENS, PoisonedBuffers, Step, as_it_is, in_segments, load  # noqa: E402

SECONDS = 1.0
"""How long each way is measured for each number of tokens."""


def main() -> None:
    """Print the table."""
    arguments = parse()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    use_threads(1)
    if arguments.families:
        compare_families()
    else:
        with checkpoint(arguments.model) as directory:
            time_body(directory, arguments.tokens)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint; a random one of 10 M")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 2048])
    parser.add_argument("--families", action="store_true", help="compare every family instead")
    return parser.parse_args()


def time_body(directory: Path, counts: list[int]) -> None:
    """Both ways for each number of tokens, in turns."""
    body = load_body(LoadRequest(directory, build_plans(load_config(directory)), torch.float32))
    role, most = body.roles[Role.TARGET], max(counts)
    whole, buffers = cut(trace(role)), PoisonedBuffers(role, most)
    for tensor in buffers.tensors():
        tensor.normal_()
    native = NativeCompiler().compile(whole, buffers, most)
    eager = EagerCompiler().compile(whole, buffers, most)
    print(f"{'tokens':>6}  {'kernels':>10}  {'torch':>10}  {'ratio':>5}  {'in products':>11}")
    for tokens in counts:
        steps = [stepper(role, one, tokens) for one in (native, eager)]
        ours, theirs = in_turns(*steps)
        native.measure(True)
        before, began = native.matmul_ns(), time.perf_counter_ns()
        for _ in range(3):
            steps[0]()
        fraction = (native.matmul_ns() - before) / (time.perf_counter_ns() - began)
        native.measure(False)
        seconds = f"{ours * 1e3:7.3f} ms  {theirs * 1e3:7.3f} ms"
        print(f"{tokens:6}  {seconds}  {theirs / ours:5.1f}  {fraction:11.1%}", flush=True)


def stepper(role: RoleBody, body: SegmentedRole, tokens: int) -> Callable[[], None]:
    """One step of so many tokens, with the logits of up to 64 of them."""
    step, rows = Step.random(role, tokens), torch.arange(min(tokens, 64))

    def run() -> None:
        body.start(step.ids, step.positions)
        for segment in body.segments:
            body.run(segment.index)
        body.logits(rows)

    return run


def in_turns(*steps: Callable[[], None]) -> list[float]:
    """The least seconds of each; every one is run in every round, so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    deadline = time.monotonic() + SECONDS * len(steps)
    while time.monotonic() < deadline or len(times[0]) < 3:
        for step, found in zip(steps, times, strict=True):
            began = time.perf_counter()
            step()
            found.append(time.perf_counter() - began)
    return [min(found) for found in times]


def compare_families() -> None:
    """One line for each family."""
    for name, save in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            role = load(save(Path(directory))).roles[Role.TARGET]
        buffers = PoisonedBuffers(role)
        body = NativeCompiler().compile(cut(trace(role)), buffers, MAX_TOKENS)
        worst = 0.0
        for tokens in COUNTS:
            step = Step.random(role, tokens, seed=tokens)
            for found, wanted in zip(
                in_segments(role, body, buffers, step), as_it_is(role, step), strict=True
            ):
                worst = max(worst, float((found - wanted).abs().max() / (wanted.max() - wanted.min())))
        graphs = (*body.lowered.segments, body.lowered.head)
        left = sorted({str(node.target) for graph in graphs for node in graph.left_to_torch})
        print(
            f"{name:18} error {worst:.1e} of the range; left to torch: {', '.join(left) or 'nothing'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
