"""`braid plan`."""

from __future__ import annotations

from pathlib import Path

import click

from braid_orchestrator import console
from braid_orchestrator.plan_view import DEFAULT_CONTEXT, ROLES, plan_command


@click.command()
@click.argument("config", metavar="CONFIG_OR_MODEL_DIR", type=click.Path(path_type=Path))
@click.option("--json", "json_out", is_flag=True, help="Print JSON.")
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=DEFAULT_CONTEXT,
    show_default=True,
    help="Tokens per sequence that the totals are for.",
)
@click.option("--compact", is_flag=True, help="One row per run of identical layers.")
@click.option(
    "--role", type=click.Choice(ROLES), default="both", show_default=True, help="Whose layers to show."
)
def plan(config: Path, json_out: bool, context: int, compact: bool, role: str) -> int:
    """Show which layer runs where, from a config.json alone."""
    return plan_command(config, json_out, context, compact, role, console.stdout())
