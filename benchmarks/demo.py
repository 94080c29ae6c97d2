"""What Braid is, in one screen: `make demo`.

Starts a cell of three processes on the small model in models/tiny, streams text from it, shows from
the three /metrics endpoints where every layer went and what it cost, and kills a service in the
middle of a generation to show that nothing is lost.

    python benchmarks/demo.py [MODEL]
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from braid_orchestrator import console as consoles
from braid_orchestrator.client import Client, Sampling
from braid_orchestrator.launcher import Launched, launch
from braid_orchestrator.plan_view import strip
from braid_orchestrator.scrape import LayerTimes, layer_times
from braid_orchestrator.settings import Settings, layer_summary
from braid_wire.errors import BraidError
from braid_wire.process import EXIT_FAULT, EXIT_OK, setup_logging
from rich.console import Console
from rich.table import Table

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
PROMPT = '''def read_lines(path, encoding="utf-8"):
    """Read a file and return its lines."""'''
SAMPLING = Sampling(temperature=0.7, top_p=0.9, seed=2)
TOKENS = 72
KILL_AT = 24
PAIRS = {"path": 41, "name": 73, "line": 58, "value": 26}
ASKED = "line"


def main() -> int:
    """Run the demo and give the exit code."""
    began = time.monotonic()
    console = consoles.stdout()
    settings = Settings(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY)
    setup_logging("demo", "error")
    try:
        show_layers(settings, console)
        with launch(settings, log_level="error") as cell, cell.client() as client:
            introduce(cell, console, time.monotonic() - began)
            tokens = stream_text(client, console)
            recall(client, console)
            console.print()
            console.print(table(layer_times(cell.info.metrics)))
            same = survive_kill(cell, client, tokens, console)
    except BraidError as error:
        print(f"error {error.reason}: {error.message}", file=sys.stderr)
        return EXIT_FAULT
    farewell(settings, console, time.monotonic() - began)
    return EXIT_OK if same else EXIT_FAULT


def show_layers(settings: Settings, console: Console) -> None:
    """The strip: one mark per layer, by the service that runs it."""
    plans = settings.plans()
    console.print(f"[bold]{settings.model.resolve().name}[/]  {layer_summary(plans)}")
    console.print(strip(plans.target, console.width, console.options.ascii_only))
    console.print()


def introduce(cell: Launched, console: Console, seconds: float) -> None:
    """The three processes."""
    names = [f"{name} {cell.pid(name)}" for name in ("orchestrator", "full", "linear")]
    console.print(f"three processes in {seconds:.1f} s: {', '.join(names)}", style="dim")
    console.print()


def stream_text(client: Client, console: Console) -> tuple[int, ...]:
    """Print a prompt and its continuation as it is made; gives the tokens."""
    console.print(PROMPT, style="dim", end="", markup=False)
    began = time.monotonic()
    generation = client.generate(PROMPT, TOKENS, SAMPLING, ignore_eos=True)
    for chunk in generation:
        console.print(chunk.text, end="", markup=False, soft_wrap=True)
        console.file.flush()
    seconds = time.monotonic() - began
    made = generation.completion.completion_tokens
    console.print()
    console.print(f"{made} tokens, {made / seconds:.0f} per second", style="dim")
    console.print()
    return generation.completion.token_ids


def recall(client: Client, console: Console) -> None:
    """Ask for a value that stands in the prompt: a wrong state or a wrong page would show here."""
    pairs = ", ".join(f'"{key}": {value}' for key, value in PAIRS.items())
    prompt = f'data = {{{pairs}}}\nprint(data["{ASKED}"])  # '
    answer = client.complete(prompt, max_tokens=1).text.strip()
    right = answer == str(PAIRS[ASKED])
    console.print(prompt, style="dim", end="", markup=False, soft_wrap=True)
    verdict = "[green]right[/]" if right else f"[red]wrong, it is {PAIRS[ASKED]}[/]"
    console.print(f"[bold]{answer}[/]   {verdict}")


def table(layers: list[LayerTimes]) -> Table:
    """Where every layer went, as the endpoints tell it."""
    made = consoles.table(
        ("layer", "right"),
        ("mechanism", "left"),
        ("service", "left"),
        ("dispatches", "left"),
        ("queue µs", "right"),
        ("compute µs", "right"),
        ("hop µs", "right"),
    )
    for layer in layers:
        made.add_row(
            str(layer.layer_id),
            layer.mechanism,
            f"[{'magenta' if layer.side == 'full' else 'cyan'}]{layer.side}[/]",
            consoles.by_mode(layer.dispatches.items()),
            consoles.microseconds(layer.queue_s),
            consoles.microseconds(layer.compute_s),
            consoles.microseconds(layer.hop_s),
        )
    return made


def survive_kill(cell: Launched, client: Client, expected: tuple[int, ...], console: Console) -> bool:
    """The same generation again, its linear service killed on the way; True where nothing differs."""
    victim = cell.pid("linear")
    generation = client.generate(PROMPT, TOKENS, SAMPLING, ignore_eos=True)
    for count, _ in enumerate(generation, start=1):
        if count == KILL_AT and victim is not None:
            os.kill(victim, signal.SIGKILL)
    same = generation.completion.token_ids == expected
    replays = client.status().replays
    verdict = "[green]the same tokens came out[/]" if same else "[red]other tokens came out[/]"
    console.print()
    console.print(
        f"kill -9 {victim} (linear) after {KILL_AT} of {TOKENS} tokens: {verdict}, replays={replays}, "
        f"the service is back as {cell.pid('linear')}"
    )
    return same and replays > 0


def farewell(settings: Settings, console: Console, seconds: float) -> None:
    """What to try next."""
    model = os.path.relpath(settings.model)
    braid = "braid" if shutil.which("braid") else os.path.relpath(Path(sys.executable).with_name("braid"))
    console.print()
    console.print(f"{seconds:.1f} s in all; try next:", style="dim")
    for command in (
        f"{braid} plan {model}",
        f'{braid} generate {model} "def read_lines(path):" --temperature 0.7',
        f"{braid} serve {model} --grpc 127.0.0.1:50051     # then, beside it: {braid} status",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
