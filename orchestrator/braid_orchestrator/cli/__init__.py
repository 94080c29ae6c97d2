"""The command `braid`.

Exit codes: 0 done · 1 a fault of Braid's own · 2 bad usage, or refused with an error of the table
(`error REASON: message` on stderr) · 3 the cell, or one of its services, cannot be reached · 130
interrupted by Ctrl-C · 143 ended by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from types import FrameType

import click
from braid_wire.errors import BraidError, ServiceFault, ServiceLost
from braid_wire.process import EXIT_FAULT, EXIT_OK, EXIT_USAGE

from braid_orchestrator.cli.bench import bench
from braid_orchestrator.cli.doctor import doctor
from braid_orchestrator.cli.generate import generate
from braid_orchestrator.cli.models import models
from braid_orchestrator.cli.plan import plan
from braid_orchestrator.cli.score import score
from braid_orchestrator.cli.serve import serve
from braid_orchestrator.cli.status import drain, status
from braid_orchestrator.cli.trace import trace

EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

_EPILOG = (
    "Exit codes: 0 done, 1 a fault, 2 bad usage or refused (`error REASON: message`), "
    "3 the cell cannot be reached, 130 interrupted."
)


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("braid-attention"), prog_name="braid")
def braid() -> None:
    """Serve hybrid-attention language models with both kinds of attention in services of their own."""


for command in (serve, generate, score, plan, models, status, drain, bench, trace, doctor):
    braid.add_command(command)


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and give its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = braid.main(list(arguments), prog_name="braid", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BraidError as error:
        print(f"error {error.reason}: {error.message}", file=sys.stderr)
        return _exit_code(error)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return code if isinstance(code, int) else EXIT_OK


def _exit_code(error: BraidError) -> int:
    if isinstance(error, ServiceLost):
        return EXIT_UNREACHABLE
    return EXIT_FAULT if isinstance(error, ServiceFault) else EXIT_USAGE


def _terminated(number: int, frame: FrameType | None) -> None:
    # As an exception, so that a cell that this process started is stopped and its directory removed.
    sys.exit(EXIT_TERMINATED)
