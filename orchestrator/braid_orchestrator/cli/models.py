"""`braid models`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from braid_orchestrator import console as consoles


@click.command()
@click.option("--json", "json_out", is_flag=True, help="Print JSON.")
def models(json_out: bool) -> None:
    """List the families of models that can be run, and what was verified for each.

    An error is the largest absolute difference of a float32 logit over all checkpoints compared and
    all ways to feed them; `benchmarks/families.py` measures it again.
    """
    from braid_orchestrator.body.catalog import ENTRIES, verified

    found = verified()
    if json_out:
        rows = [
            {**asdict(entry), "verified": asdict(found[entry.family]) if entry.family in found else None}
            for entry in ENTRIES
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = consoles.table(
        ("family", "left"),
        ("models", "left"),
        ("mechanisms", "left"),
        ("max error", "right"),
        ("draft", "right"),
    )
    for entry in ENTRIES:
        row = found.get(entry.family)
        error = "-" if row is None else f"{row.error:.1e}"
        draft = "-" if row is None or row.draft_error is None else f"{row.draft_error:.1e}"
        table.add_row(entry.family, entry.models, " + ".join(entry.mechanisms), error, draft)
    console = consoles.stdout()
    console.print(table)
    console.print(
        "largest difference of a float32 logit from one forward without a cache in transformers "
        "(Ling 2.x, Ring 2.x: the publisher's code)",
        style="dim",
    )
