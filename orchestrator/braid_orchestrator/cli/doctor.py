"""`braid doctor`."""

from __future__ import annotations

import json

import click

from braid_orchestrator import console as consoles
from braid_orchestrator.doctor import State, Wanted, examine, healthy
from braid_orchestrator.machine import Machine

_STYLES = {State.OK: "green", State.WARN: "yellow", State.FAIL: "red", State.SKIP: "dim"}
EXIT_UNHEALTHY = 1


@click.command()
@click.option("--gpu", is_flag=True, help="The services are to run on a GPU.")
@click.option("--mps", is_flag=True, help="They are to share it by NVIDIA's Multi-Process Service.")
@click.option("--gateway", is_flag=True, help="An OpenAI-compatible server is to run too.")
@click.option("--peer", "peers", type=int, multiple=True, help="Process id to compare namespaces with.")
@click.option("--json", "json_out", is_flag=True, help="Print JSON.")
def doctor(gpu: bool, mps: bool, gateway: bool, peers: tuple[int, ...], json_out: bool) -> int:
    """Check what this machine has for Braid, and say what to mend.

    Exits with 1 where something keeps Braid from running; a warning does not.
    """
    findings = list(examine(Machine(), Wanted(gpu or mps, mps, gateway, peers)))
    if json_out:
        said = {"healthy": healthy(findings), "findings": [finding.to_json() for finding in findings]}
        print(json.dumps(said, indent=2))
    else:
        console = consoles.stdout()
        for finding in findings:
            style = _STYLES[finding.state]
            console.print(f"[{style}]{finding.state.value:4}[/]  {finding.name:18} ", end="")
            console.print(finding.found, markup=False, highlight=False)
            if finding.mend:
                console.print(f"      {'':18} → {finding.mend}", markup=False, highlight=False)
    return 0 if healthy(findings) else EXIT_UNHEALTHY
