"""Guessing together with everything else that a cell does at the same time: the same tokens."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.dispatcher import Dispatcher
from braid_orchestrator.launcher import MODULES
from braid_orchestrator.overlap import OverlapMode
from braid_orchestrator.request import Finish, Finished, Request, Token, fan_out, merged
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.speculative import Speculator
from braid_orchestrator.step import Step
from braid_orchestrator.store import Limits
from braid_orchestrator.walker import Walker
from braid_wire.batch import MODE_CODES, Batch
from braid_wire.layers import Mode, Role
from checkpoints import QWEN
from drafts import save_with_mtp
from harness import sequences
from spec_cells import LIMITS, Script, cell, idle, poison, submit, tokens_of

GUESSES = 4
COUNT = 24
LENGTHS = [20, 33, 7, 1, 50]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_mtp(QWEN[2], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Cell]:
    """No guesses, no cache, room for everything."""
    with cell(model, Limits(512, 8, 1024, 8, 1 << 28), prefix_cache=False) as made:
        yield made


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    return sequences(90, lengths, seed=seed)


def serve(running: Cell, requests: Iterable[Request]) -> list[list[int]]:
    works = list(requests)
    submit(running, works)
    return [tokens_of(work) for work in works]


def script(monkeypatch: pytest.MonkeyPatch, truths: dict[str, list[int]], *pattern: int | None) -> Script:
    """Puts guesses of known worth in the place of the draft's."""
    found = Script(truths, itertools.cycle(pattern))
    monkeypatch.setattr(Speculator, "follow", lambda self, progress: found.follow(self, progress))
    return found


def test_two_lanes(model: Path, alone: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that verify in one lane or both, beside prompts of which one lies in both lanes."""

    def works() -> list[Request]:
        return [Request(f"{n}", one, max_tokens=COUNT) for n, one in enumerate(prompts([9, 600, 40, 3, 530]))]

    wanted = serve(alone, works())
    lanes: set[tuple[int, frozenset[str]]] = set()
    opened = Dispatcher.open

    def noted(self: Dispatcher, batches: Sequence[Batch]) -> Sequence[Step]:
        if batches[0].role is Role.TARGET:
            lanes.add((len(batches), frozenset(batch.mode for batch in batches)))
        return opened(self, batches)

    monkeypatch.setattr(Dispatcher, "open", noted)
    with cell(
        model,
        Limits(600, 8, 1024, 8, 1 << 28),
        speculative=GUESSES,
        segments="native",
        overlap=OverlapMode.ON,
    ) as running:
        poison(running)
        assert serve(running, works()) == wanted  # by the model's own draft
        script(monkeypatch, {f"{n}": one for n, one in enumerate(wanted)}, 0, 1, 2, 3, 4, None)
        assert serve(running, works()) == wanted
        assert idle(running)
    verified_in_two = [modes for count, modes in lanes if count == 2 and Mode.VERIFY.value in modes]
    assert verified_in_two


def test_a_conversation_goes_on_behind_states_that_a_verified_step_kept(
    model: Path, alone: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that end inside a verified span have the state of their last token, not of a rejected one."""
    history, own = prompts([21], seed=3)[0].tolist(), prompts([9] * 4, seed=4)
    turns: list[list[int]] = []
    for turn, more in enumerate(own):
        (found,) = serve(alone, [Request(f"t{turn}", np.array(history), max_tokens=COUNT)])
        turns.append(found)
        history += [*found, *more.tolist()]
    found_script = script(
        monkeypatch, {f"t{n}": one for n, one in enumerate(turns)}, GUESSES, 1, 0, 3, None, 2
    )
    with cell(model, LIMITS, speculative=GUESSES) as running:
        poison(running)
        history, cached = prompts([21], seed=3)[0].tolist(), []
        for turn, more in enumerate(own):
            request = Request(f"t{turn}", np.array(history), max_tokens=COUNT)
            assert serve(running, [request]) == [turns[turn]]
            cached.append(request.cached_tokens)
            history += [*turns[turn], *more.tolist()]
        assert idle(running)
    assert sum(found_script.verified) > 40
    # All that was fed, down to a whole page of 8: 21 + 23 tokens in the first turn, and so on.
    assert cached == [0, 40, 72, 104]


@pytest.mark.parametrize("pattern", [(GUESSES,), (0, 2, None)], ids=["all right", "mixed"])
def test_min_tokens_hold_off_stop_tokens_among_guesses(
    model: Path, alone: Cell, monkeypatch: pytest.MonkeyPatch, pattern: tuple[int | None, ...]
) -> None:
    prompt = prompts()[0]
    (plain,) = serve(alone, [Request("plain", prompt, max_tokens=COUNT)])
    stop = plain[2]
    sampling = Sampling(min_tokens=9)

    def work() -> Request:
        return Request("held off", prompt, sampling, COUNT, frozenset({stop}))

    first = work()
    alone.engine.submit(first)
    wanted = list(first.stream())
    tokens = [event.token_id for event in wanted if isinstance(event, Token)]
    assert len(tokens) >= 9 and stop not in tokens
    script(monkeypatch, {"held off": [*tokens, stop]}, *pattern)
    with cell(model, speculative=GUESSES) as running:
        again = work()
        running.engine.submit(again)
        assert list(again.stream()) == wanted
        assert isinstance(wanted[-1], Finished) and wanted[-1].reason in (Finish.STOP, Finish.LENGTH)
        assert idle(running)


def test_several_completions_of_one_prompt(model: Path, alone: Cell) -> None:
    def made(running: Cell) -> dict[int, list[int]]:
        request = Request("n", prompts()[1], Sampling(1.0, seed=5), COUNT)
        several = fan_out(request, 3)
        submit(running, several)
        found: dict[int, list[int]] = {}
        for index, event in merged(several):
            if isinstance(event, Token):
                found.setdefault(index, []).append(event.token_id)
        return found

    wanted = made(alone)
    with cell(model, speculative=GUESSES) as running:
        assert made(running) == wanted
        assert idle(running)
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3


def test_guesses_take_no_others_turn(model: Path, alone: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step has room for all that decode but not for their guesses, all decode in every step."""

    def works() -> list[Request]:
        return [Request(f"{n}", one, max_tokens=COUNT) for n, one in enumerate(prompts([3] * 8, seed=6))]

    wanted = serve(alone, works())
    verified = script(monkeypatch, {f"{n}": one for n, one in enumerate(wanted)}, GUESSES)
    sizes: list[int] = []
    target = Walker.target

    def noted(self: Walker, spans: Sequence[Any], *more: Any) -> Any:
        if all(span.mode is not Mode.EXTEND for span in spans):
            sizes.append(len(spans))
        return target(self, spans, *more)

    monkeypatch.setattr(Walker, "target", noted)
    with cell(model, Limits(12, 8, 64, 8, 1 << 28), speculative=GUESSES) as running:
        assert serve(running, works()) == wanted
        assert idle(running)
    assert verified.verified
    assert sizes[0] == 8
    assert len(sizes) < COUNT  # and what is left of it goes to guesses


def test_a_step_of_the_draft_holds_no_more_rows_than_any(
    model: Path, alone: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    """With more requests than a step has room for their guesses, the last ones get fewer."""

    def works() -> list[Request]:
        return [Request(f"{n}", one, max_tokens=COUNT) for n, one in enumerate(prompts([3] * 8, seed=6))]

    wanted = serve(alone, works())
    with cell(model, Limits(10, 8, 64, 8, 1 << 28), speculative=GUESSES) as running:
        poison(running)
        assert serve(running, works()) == wanted
        metrics = running.metrics
        assert metrics.accepted_tokens._value.get() + metrics.rejected_tokens._value.get() > 0
        assert idle(running)
    assert "nothing is guessed" not in caplog.text


@contextmanager
def remote(model: Path) -> Iterator[Cell]:
    """Both services are processes that are started again when they are killed."""
    with Services(1) as services:
        options = CellOptions(limits=LIMITS, segments="off", speculative=3, speculative_adaptive=False)
        with services.remote(model, options) as made:
            yield made


def children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def command(pid: int) -> str:
    """Command line of a process; empty where it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def kill(word: str, others: set[int]) -> None:
    """SIGKILL for this process's child with a word in its command line; back when it is gone.

    Args:
        others: children that are left alone, whatever their command line.
    """
    (victim,) = [pid for pid in children() - others if word in command(pid)]
    os.kill(victim, signal.SIGKILL)
    while command(victim):
        time.sleep(0.001)


def test_a_service_killed_in_every_kind_of_step(
    model: Path, alone: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the draft follows, where it goes on alone, and where the target verifies."""

    def works() -> list[Request]:
        return [
            Request(f"{n}", one, Sampling(0.8, seed=n), max_tokens=COUNT) for n, one in enumerate(prompts())
        ]

    wanted, others = serve(alone, works()), children()
    alone_in: list[bool] = []
    draft, opened = Walker.draft, Dispatcher.open

    def noted(self: Walker, *given: Any, forget: bool = False) -> Any:
        alone_in.append(forget)
        return draft(self, *given, forget=forget)

    kinds: dict[str, Callable[[Batch], bool]] = {
        "follows": lambda batch: batch.role is Role.DRAFT and not alone_in[-1],
        "goes on": lambda batch: batch.role is Role.DRAFT and alone_in[-1],
        "verifies": lambda batch: batch.role is Role.TARGET and MODE_CODES[Mode.VERIFY] in batch.modes,
    }
    left = [
        (kinds[kind], MODULES[service])
        for kind in kinds
        for service in (("full",) if kind != "verifies" else ("full", "linear"))
    ]
    done = 0

    def killing(self: Dispatcher, batches: Sequence[Batch]) -> Sequence[Step]:
        nonlocal done
        steps = opened(self, batches)
        if left and left[0][0](batches[0]):
            kill(left.pop(0)[1], others)
            done += 1
        return steps

    with remote(model) as running:
        monkeypatch.setattr(Walker, "draft", noted)
        monkeypatch.setattr(Dispatcher, "open", killing)
        assert serve(running, works()) == wanted
        assert (done, left) == (4, [])
        assert running.walker.replays >= done
        assert running.metrics.accepted_tokens._value.get() > 0
        assert idle(running)
