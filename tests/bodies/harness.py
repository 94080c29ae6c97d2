"""Random small checkpoints, cells with both services in this process, and the one safe oracle.

The oracle is one transformers forward over each whole sequence, without a cache: stock code is
wrong for several families when it continues from its cache or is given packed sequences.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from braid_full_attn.core import load as load_full
from braid_linear_attn.core import load as load_linear
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.link import EmbeddedLink
from braid_orchestrator.request import Failed, Request, Scored
from braid_orchestrator.store import Limits
from braid_wire.attention_host import AttentionHost
from braid_wire.layers import Kind
from braid_wire.metrics import ProcessMetrics
from transformers import AutoModelForCausalLM

FLOAT32_ABSOLUTE = 2e-4
BFLOAT16_OF_RANGE = 2e-2
CROWD_ABSOLUTE = 2e-5
LENGTHS = (1, 6, 33, 70)
"""One token, less than a conv window and a bit, and across several pages and chunks."""
LIMITS = Limits(max_tokens=96, max_sequences=8, max_context=160, page_size=8, pool_bytes=1 << 28)


@dataclass(frozen=True)
class Schedule:
    """How sequences are fed: the most tokens of one in a step, and how many one at a time."""

    name: str
    chunk: int = 0
    decode_tail: int = 0


SCHEDULES = (
    Schedule("one-shot"),
    Schedule("chunk 1", chunk=1),
    Schedule("chunk 7", chunk=7),
    Schedule("chunk 64", chunk=64),
    Schedule("mixed", chunk=16, decode_tail=5),
)


def save_random(
    model_class: Any,
    config: Any,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "50GB",
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """A randomly initialised checkpoint in the hub's layout.

    Vectors (norm weights, biases, …) start as ones or zeros, which would hide a norm or a bias that
    is left out; they are shaken.

    Args:
        shard: most bytes of one file ("20KB" makes several files and an index).
        prepare: changes the model before it is saved.
    """
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if prepare is not None:
        prepare(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


@contextmanager
def cell(
    model: Path,
    backend: str = "cpp",
    *,
    dtype: torch.dtype = torch.float32,
    dispatch: Dispatch = Dispatch.WALK,
    limits: Limits = LIMITS,
    segments: str = "off",
) -> Iterator[Cell]:
    """A cell with both services in this process; with segments "off" the model's own modules run."""
    links = {
        Kind.FULL: EmbeddedLink(Kind.FULL, AttentionHost(load_full(backend, 1), ProcessMetrics("full", "0"))),
        Kind.LINEAR: EmbeddedLink(
            Kind.LINEAR, AttentionHost(load_linear(backend, 1), ProcessMetrics("linear", "0"))
        ),
    }
    with tempfile.TemporaryDirectory(prefix="braid") as private:
        options = CellOptions(dtype=dtype, dispatch=dispatch, limits=limits, segments=segments)
        made = Cell(model, links, Path(private) / "arenas", options)
        try:
            yield made
        finally:
            made.close()


def sequences(vocab_size: int, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    """Random token ids, int64 [L] each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).astype(np.int64) for length in lengths]


def score(
    running: Cell,
    prompts: Sequence[np.ndarray],
    schedule: Schedule = SCHEDULES[0],
    mrope: Sequence[np.ndarray | None] | None = None,
) -> list[torch.Tensor]:
    """float32 [L, V] of each sequence, all of them in the same steps.

    Args:
        mrope: int64 [3, L] positions of each sequence, for models that take them.
    """
    grids = mrope or [None] * len(prompts)
    requests = [
        _request(prompt, schedule, mrope_positions=grid) for prompt, grid in zip(prompts, grids, strict=True)
    ]
    return [found.logits for found in _run(running, requests)]


def score_mtp(
    running: Cell,
    prompts: Sequence[np.ndarray],
    schedule: Schedule = SCHEDULES[0],
    mrope: Sequence[np.ndarray | None] | None = None,
) -> list[torch.Tensor | None]:
    """float32 [L−1, V] of each sequence: the draft's logits; None for a single token."""
    grids = mrope or [None] * len(prompts)
    requests = [
        _request(prompt, schedule, mtp=True, mrope_positions=grid)
        for prompt, grid in zip(prompts, grids, strict=True)
    ]
    return [found.mtp_logits for found in _run(running, requests)]


_request_ids = itertools.count()


def _request(prompt: np.ndarray, schedule: Schedule, **more: Any) -> Request:
    return Request(
        f"score-{next(_request_ids)}",
        prompt,
        chunk=schedule.chunk,
        decode_tail=schedule.decode_tail,
        **more,
    )


def _run(running: Cell, requests: Sequence[Request]) -> list[Scored]:
    for request in requests:
        running.engine.submit(request)
    return [_scored(request) for request in requests]


def _scored(request: Request) -> Scored:
    found: Scored | None = None
    for event in request.stream():
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Scored):
            found = event
    assert found is not None
    return found


def load_reference(model: Path, auto: Any = AutoModelForCausalLM, **how: Any) -> Any:
    """The same checkpoint in stock transformers, float32."""
    return auto.from_pretrained(model, dtype=torch.float32, attn_implementation="eager", **how).eval()


@torch.no_grad()
def reference(
    model: Any, prompts: Sequence[np.ndarray], mrope: Sequence[np.ndarray | None] | None = None
) -> list[torch.Tensor]:
    """float32 [L, V] of each sequence from one forward without a cache."""
    found = []
    for prompt, positions in zip(prompts, mrope or [None] * len(prompts), strict=True):
        ids = torch.from_numpy(prompt)[None]
        place = torch.arange(len(prompt))[None] if positions is None else torch.from_numpy(positions)[:, None]
        found.append(model(input_ids=ids, position_ids=place, use_cache=False).logits[0].float())
    return found


def worst(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    return max(
        float((a - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in zip(found, expected, strict=True)
    )


@dataclass(frozen=True)
class Comparison:
    """What one checkpoint's comparison with the oracle gave."""

    errors: Mapping[str, float]
    """Schedule → largest absolute error, float32."""
    crowd: float
    """Largest difference between a sequence alone and among others."""
    logit_range: float
    mechanisms: tuple[str, ...]

    @property
    def error(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values())


def compare(
    model: Path,
    oracle: Any | None = None,
    *,
    backend: str = "cpp",
    schedules: Sequence[Schedule] = SCHEDULES,
    lengths: Sequence[int] = LENGTHS,
    expected: Callable[[Sequence[np.ndarray]], list[torch.Tensor]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Run a checkpoint in a cell on every schedule and compare with the oracle, float32.

    Args:
        oracle: a loaded reference model; None loads stock transformers on the same directory.
        expected: gives the reference logits instead of `oracle`.
    """
    if expected is None:
        loaded = oracle or load_reference(model)
        expected = lambda prompts: reference(loaded, prompts)  # noqa: E731
    with cell(model, backend) as running:
        prompts = sequences(running.plans.vocab_size, lengths, seed)
        wanted = expected(prompts)
        errors = {s.name: worst(score(running, prompts, s), wanted) for s in schedules}
        together = score(running, prompts)
        alone = [score(running, [prompt])[0] for prompt in prompts]
        mechanisms = sorted({spec.mechanism for spec in running.plans.target} - {"-"})
    return Comparison(
        errors, worst(alone, together), max(float(w.max() - w.min()) for w in wanted), tuple(mechanisms)
    )


def check(model: Path, oracle: Any | None = None, **how: Any) -> Comparison:
    """As `compare`, and every error lies within its bound."""
    found = compare(model, oracle, **how)
    for name, error in found.errors.items():
        assert error <= FLOAT32_ABSOLUTE, f"{name}: {error:.2e} of a range of {found.logit_range:.1f}"
    assert found.crowd <= CROWD_ABSOLUTE, f"alone and in a crowd differ by {found.crowd:.2e}"
    return found


def bfloat16_error(model: Path, oracle: Any | None = None, backend: str = "cpp") -> float:
    """Largest error of a bfloat16 cell against the float32 oracle, relative to the logit range."""
    loaded = oracle or load_reference(model)
    with cell(model, backend, dtype=torch.bfloat16) as running:
        prompts = sequences(running.plans.vocab_size)
        wanted = reference(loaded, prompts)
        found = [score(running, prompts, schedule) for schedule in (SCHEDULES[0], SCHEDULES[-1])]
    span = max(float(w.max() - w.min()) for w in wanted)
    return max(worst(logits, wanted) for logits in found) / span


def bfloat16_rows(model: Path, backend: str = "cpp") -> tuple[torch.Tensor, torch.Tensor]:
    """Largest error of each token's logits against float32, relative to the logit range.

    A router in bfloat16 sends a token with nearly equal scores to another expert, in any
    implementation; such a token's error says nothing, so rows are given and not their maximum.

    Returns:
        [tokens] of a bfloat16 cell, and [tokens] of stock transformers in bfloat16.
    """
    exact = load_reference(model)
    rounded = type(exact).from_pretrained(model, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with cell(model, backend, dtype=torch.bfloat16) as running:
        prompts = sequences(running.plans.vocab_size)
        found = score(running, prompts, SCHEDULES[-1])
    wanted = reference(exact, prompts)
    span = max(float(w.max() - w.min()) for w in wanted)
    ours, stock = (
        torch.cat([(a - b).abs().amax(-1) for a, b in zip(logits, wanted, strict=True)]) / span
        for logits in (found, reference(rounded, prompts))
    )
    return ours, stock


def smaller(limits: Limits = LIMITS, **changes: int) -> Limits:
    """The usual limits with some changed."""
    return replace(limits, **changes)
