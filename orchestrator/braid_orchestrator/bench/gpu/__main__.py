"""`python -m braid_orchestrator.bench.gpu`: every check that needs a GPU, in under eight minutes.

Exits with 0 where everything held, 1 where something failed, 2 on bad usage, and 3 on a machine without a
CUDA device, where nothing is checked.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from braid_orchestrator.bench.gpu.runner import Check, child, run_all, succeeded

EXIT_NO_DEVICE = 3

_KERNELS, _SHARING, _CELLS = (
    f"braid_orchestrator.bench.gpu.{name}" for name in ("kernels", "sharing", "cells")
)

CHECKS = (
    Check("device", f"{_KERNELS}:device", 60, "What the card is, its copy and matrix product rates."),
    Check("arenas", f"{_SHARING}:arenas", 60, "Memory shared with another process by IPC handles."),
    Check("doorbells", f"{_SHARING}:doorbells", 60, "Streams of two processes that wait for one another."),
    Check("linear", f"{_KERNELS}:linear", 90, "Triton kernels of every mechanism against the CPU's."),
    Check("full", f"{_KERNELS}:full", 90, "Paged attention, every backend, against the CPU's."),
    Check("decode", f"{_KERNELS}:decode", 60, "Recurrent decode against the measured copy rate."),
    Check("prefill", f"{_KERNELS}:prefill", 90, "Chunked prefill of 8192 tokens, beside others' kernels."),
    Check("cell", f"{_CELLS}:small", 90, "A small model in three processes and in one, against the CPU."),
    Check("kill", f"{_CELLS}:kill", 90, "A service is killed and comes back; no memory is left behind."),
    Check(
        "slice", f"{_CELLS}:slice_of_a_model", 180, "12 layers of Qwen3-Next's shape: split, embedded, alone."
    ),
)


@click.command("gpu-check")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Where the report goes.",
)
@click.option(
    "--only", multiple=True, type=click.Choice([check.name for check in CHECKS]), help="Just these."
)
@click.option("--seconds", type=click.FloatRange(min=1), default=460.0, show_default=True, help="For all.")
@click.option("--child", "name", hidden=True)
@click.option("--function", hidden=True)
@click.option("--work", type=click.Path(path_type=Path), hidden=True)
def main(
    out: Path,
    only: tuple[str, ...],
    seconds: float,
    name: str | None,
    function: str | None,
    work: Path | None,
) -> None:
    """Check on a GPU what cannot be checked without one, and write a report."""
    if name is not None and function is not None and work is not None:
        sys.exit(child(name, function, work))
    # Imported here: a check that needs little must not wait for all of it.
    import torch

    from braid_orchestrator.bench.gpu import report

    if not torch.cuda.is_available():
        click.echo("gpu-check: this machine has no CUDA device; nothing was checked", err=True)
        sys.exit(EXIT_NO_DEVICE)
    checks = [check for check in CHECKS if not only or check.name in only]
    with TemporaryDirectory(prefix="braid-gpu-") as shared:
        outcomes = run_all(checks, Path(shared), seconds, lambda text: click.echo(text, err=True))
    facts = {
        "name": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }
    command = shlex.join(["make", "gpu-check"] if len(sys.argv) == 1 else ["gpu-check", *sys.argv[1:]])
    paths = report.write(out, command, checks, outcomes, facts)
    click.echo(f"{paths[1]}: " + ", ".join(f"{one.check} {one.status}" for one in outcomes))
    sys.exit(0 if succeeded(outcomes) else 1)


if __name__ == "__main__":
    main(prog_name="gpu-check")
