"""Compares every family with its reference and prints the table that the README shows.

    python benchmarks/families.py [--only FAMILY …] [--backend cpp] [--write] [--out FILE]

Each family runs on random small checkpoints in the hub's layout, with both services in this process,
one-shot, chunked and in mixed steps, several sequences in every step. `--write` keeps the errors in
the package, where `braid models` finds them; `--out` writes the table to a file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import transformers

BODIES = Path(__file__).resolve().parent.parent / "tests" / "bodies"
sys.path.insert(0, str(BODIES))

import mamba_checkpoints  # noqa: E402
from braid_orchestrator.body import catalog  # noqa: E402
from braid_orchestrator.body.catalog import Verified  # noqa: E402
from braid_orchestrator.threads import use_threads  # noqa: E402
from checkpoints import CASES, QWEN  # noqa: E402
from drafts import load_head, save_with_mtp  # noqa: E402
from goldens import GOLDENS, NAMES, compare_golden, golden_mtp_errors  # noqa: E402
from harness import (  # noqa: E402
    LENGTHS,
    SCHEDULES,
    Comparison,
    cell,
    compare,
    load_reference,
    score_mtp,
    sequences,
    worst,
)
from published import save_as_published  # noqa: E402

DRAFT_KINDS = (("full",), ("linear",))
Compare = Callable[[Path], Comparison]


def main() -> int:
    """Run the comparisons and give the exit code."""
    arguments = parse()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    use_threads(1)
    found: dict[str, Verified] = {}
    for entry in catalog.ENTRIES:
        if arguments.only and entry.family not in arguments.only:
            continue
        row = verify(entry.family, arguments.backend)
        if row is None:
            print(f"{entry.family:18} no checkpoint to compare here", flush=True)
            continue
        found[entry.family] = row
        draft = "" if row.draft_error is None else f"  draft {row.draft_error:.1e}"
        print(
            f"{entry.family:18} {row.checkpoints} checkpoint(s)  error {row.error:.1e}  "
            f"in a crowd {row.crowd:.1e}{draft}",
            flush=True,
        )
    if arguments.write:
        names = ("torch", "transformers")
        catalog.record(found, {name: importlib.metadata.version(name) for name in names})
    if arguments.out is not None:
        arguments.out.write_text(catalog.markdown() + "\n", encoding="utf-8")
    return 0 if all(row.error <= 2e-4 and row.crowd <= 2e-5 for row in found.values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", metavar="FAMILY", help="families to compare; all")
    parser.add_argument("--backend", default="cpp", help="kernels of both services")
    parser.add_argument("--write", action="store_true", help="keep the errors in the package")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to this file")
    return parser.parse_args()


def verify(family: str, backend: str) -> Verified | None:
    """Compare all checkpoints of a family; None where there is none on this machine."""
    found = []
    for run in comparisons(family, backend):
        with tempfile.TemporaryDirectory() as directory:
            found.append(run(Path(directory)))
    if not found:
        return None
    return Verified(
        checkpoints=len(found),
        error=max(one.error for one in found),
        crowd=max(one.crowd for one in found),
        draft_error=draft_error(family, backend),
    )


def comparisons(family: str, backend: str) -> Iterator[Compare]:
    """One comparison for each checkpoint of a family."""
    for case in CASES:
        if case.family == family:
            yield lambda directory, case=case: compare(case.save(directory), backend=backend)
    if family in mamba_checkpoints.FAMILIES:
        yield lambda directory: compare(mamba_checkpoints.save(family, directory), backend=backend)
    if family == "minimax_text_01":
        yield lambda directory: compare(*save_as_published(directory), backend=backend)
    if family == "bailing_moe_v2_5" and GOLDENS.is_dir():
        for name in NAMES:
            yield lambda _, name=name: compare_golden(name, backend)


def draft_error(family: str, backend: str) -> float | None:
    """Largest error of a family's MTP heads; None where it has none that can be run."""
    if family == "bailing_moe_v2_5" and GOLDENS.is_dir():
        return max(golden_mtp_errors(backend).values())
    cases = [case for case in QWEN if case.family == family]
    errors = []
    for case in cases[:1]:
        for kinds in DRAFT_KINDS:
            with tempfile.TemporaryDirectory() as directory:
                model = save_with_mtp(case, Path(directory), kinds)
                target, head = load_reference(model), load_head(model, kinds)
                with cell(model, backend) as running:
                    prompts = sequences(running.plans.vocab_size, LENGTHS)
                    wanted = [head.logits(target, prompt) for prompt in prompts if len(prompt) > 1]
                    for schedule in SCHEDULES:
                        logits = [one for one in score_mtp(running, prompts, schedule) if one is not None]
                        errors.append(worst(logits, wanted))
    return max(errors, default=None)


if __name__ == "__main__":
    sys.exit(main())
