"""`braid generate`."""

from __future__ import annotations

import json
import math
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from braid_wire.errors import RequestInvalid, ServiceFault, ServiceLost
from rich.console import Console

from braid_orchestrator import console as consoles
from braid_orchestrator.cli.generation_options import SECTIONS, generation_options
from braid_orchestrator.cli.options import connect_options, placement_option, setting_options
from braid_orchestrator.cli.sections import SectionedCommand
from braid_orchestrator.cli.session import Session, session
from braid_orchestrator.client import Chunk, Completion, GenerateOptions, Generation, Prompt, Sampling
from braid_orchestrator.scrape import scrape, total
from braid_orchestrator.settings import Settings

_LOOK_S = 0.2  # between two looks at how far a prompt is
_SPECIAL_TOKENS = 16  # more than any tokenizer puts around a prompt
_HEADER_WIDTH = 60


@click.command(
    cls=SectionedCommand,
    sections={**SECTIONS, "Input and output": ("ids", "json_out", "help")},
    rest="The cell",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@generation_options
@click.option("--ids", is_flag=True, help='Prompts are token ids ("1 2 3"), and so is what is printed.')
@click.option("--json", "json_out", is_flag=True, help="Print one line of JSON for each completion.")
@placement_option
@connect_options
@setting_options(without=("max_tokens",))
def generate(
    settings: Settings,
    model: Path,
    prompts: tuple[str, ...],
    max_tokens: int | None,
    sampling: Sampling,
    options: GenerateOptions,
    ids: bool,
    json_out: bool,
    placement: str,
    connect: str | None,
    ca: Path | None,
) -> None:
    """Continue prompts; text appears as it is made.

    Starts a cell of its own, or joins a running one with --connect (MODEL is not looked at then).
    Several prompts and completions run at once and are printed in their order. The prompt `-` is read
    from stdin.
    """
    wanted = [_prompt(text, ids) for text in prompts]
    if connect is None:
        # A tokenizer makes at most one token of a byte.
        longest = [len(p.encode()) + _SPECIAL_TOKENS if isinstance(p, str) else len(p) for p in wanted]
        lengths = [length + (max_tokens or 1) for length in longest for _ in range(options["n"])]
        settings = replace(settings, model=model).raised_for(lengths)
    terminal = consoles.stderr()
    with session(settings, connect, ca, placement, terminal) as cell:
        runs = [
            _Run(prompt, cell.client.generate(prompt, max_tokens, sampling, **options), options["n"])
            for prompt in wanted
        ]
        began = time.monotonic()
        with _feeding(cell, wanted, terminal) as stop_feeding:
            several = len(runs) * options["n"] > 1
            echo = not several and not json_out and sys.stdout.isatty()
            look = _Look(ids, json_out, headed=several, echo=echo)
            for run in runs:
                run.show(look, stop_feeding)
        made = sum(each.completion_tokens for run in runs for each in run.completions)
        _sum_up(made, time.monotonic() - began, terminal)


def _prompt(text: str, ids: bool) -> Prompt:
    """A prompt as it was typed, or read from stdin."""
    if text == "-":
        text = sys.stdin.read()
    if not ids:
        return text
    words = [word for word in re.split(r"[\s,]+", text.strip("[] \n")) if word]
    try:
        return [int(word) for word in words]
    except ValueError:
        raise RequestInvalid(f"{text!r} is no list of token ids", field="prompt") from None


@dataclass(frozen=True)
class _Look:
    """How completions are printed."""

    ids: bool
    json: bool
    headed: bool
    echo: bool
    """Show the prompt before what continues it."""


class _Run:
    """One generation, read on a thread of its own so that none holds up the others."""

    def __init__(self, prompt: Prompt, generation: Generation, completions: int) -> None:
        self._prompt = prompt
        self._generation = generation
        self._events: list[queue.SimpleQueue[Chunk | BaseException | None]] = [
            queue.SimpleQueue() for _ in range(completions)
        ]
        threading.Thread(target=self._read, name="generation", daemon=True).start()

    @property
    def completions(self) -> tuple[Completion, ...]:
        return self._generation.completions

    def show(self, look: _Look, before_first: threading.Event) -> None:
        """Print what comes, as it comes, one completion behind the other.

        Args:
            look: how.
            before_first: set as soon as there is something to print.
        """
        if look.echo and isinstance(self._prompt, str):
            consoles.stdout().print(self._prompt, style="dim", end="", markup=False, soft_wrap=True)
        for index in range(len(self._events)):
            self._show(index, look, before_first)

    def _show(self, index: int, look: _Look, before_first: threading.Event) -> None:
        headed, ends_line = False, True
        for chunk in self._chunks(index):
            before_first.set()
            if look.json:
                continue
            if look.headed and not headed:
                print(f"==> {self._heading(index)} <==")
                headed = True
            text = "".join(f"{token} " for token in chunk.token_ids) if look.ids else chunk.text
            sys.stdout.write(text)
            sys.stdout.flush()
            ends_line = text.endswith("\n") if text else ends_line
        if look.json:
            print(_json(self._prompt, self.completions[index]), flush=True)
        elif not ends_line:
            print(flush=True)

    def _heading(self, index: int) -> str:
        """Which prompt, and which of several completions."""
        several = len(self._events)
        return _short(self._prompt) + (f" ({index + 1} of {several})" if several > 1 else "")

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            for chunk in self._generation:
                self._events[chunk.index].put(chunk)
        except BaseException as error:
            end = error  # raised again where the chunks are taken
        for events in self._events:
            events.put(end)

    def _chunks(self, index: int) -> Iterator[Chunk]:
        while True:
            event = self._events[index].get()
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            yield event


def _json(prompt: Prompt, completion: Completion) -> str:
    """One line; lists of log-probabilities only where they were asked for."""
    told = asdict(completion)
    for name in ("logprobs", "prompt_logprobs"):
        if not told[name]:
            del told[name]
    return json.dumps({"prompt": prompt, **_finite(told)}, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with null for the log-probability of what cannot be, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if value == -math.inf else value


def _short(prompt: Prompt) -> str:
    """A prompt as a heading: its first line, or its first ids."""
    text = " ".join((prompt if isinstance(prompt, str) else " ".join(map(str, prompt))).split())
    return text if len(text) <= _HEADER_WIDTH else text[: _HEADER_WIDTH - 1] + "…"


@contextmanager
def _feeding(cell: Session, prompts: list[Prompt], terminal: Console) -> Iterator[threading.Event]:
    """Say on a terminal how much of the prompts has been fed, until the event is set."""
    done = threading.Event()
    if not terminal.is_terminal or cell.info is None:
        yield done
        return
    port = cell.info.metrics["orchestrator"]
    known = None if any(isinstance(p, str) for p in prompts) else sum(len(p) for p in prompts)
    watcher = threading.Thread(target=_watch_prompts, args=(port, known, terminal, done), daemon=True)
    watcher.start()
    try:
        yield done
    finally:
        done.set()
        watcher.join()


def _watch_prompts(port: int, known: int | None, terminal: Console, done: threading.Event) -> None:
    """Show a line as soon as feeding takes longer than a moment; the text must not be mixed with it."""
    if done.wait(2 * _LOOK_S):
        return
    with terminal.status("reading the prompt") as status:
        before: float | None = None
        while not done.wait(_LOOK_S):
            try:
                fed = total(scrape(port), "braid_prompt_tokens_total")
            except (ServiceLost, ServiceFault):
                continue  # it comes back, or the generation fails and says why
            before = fed if before is None else before
            of = f" of {known:,}" if known is not None else ""
            status.update(f"reading the prompt: {fed - before:,.0f}{of} tokens")


def _sum_up(made: int, seconds: float, terminal: Console) -> None:
    if terminal.is_terminal:
        terminal.print(f"{made:,} tokens in {seconds:.2f} s, {made / seconds:,.1f} tokens/s", style="dim")
