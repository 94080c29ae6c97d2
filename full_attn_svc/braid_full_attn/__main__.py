"""`python -m braid_full_attn`: serves full attention."""

from __future__ import annotations

import click
from braid_wire.attention_servicer import run_service
from braid_wire.metrics import PORTS
from braid_wire.process import ServiceOptions, service_options, thread_count

from braid_full_attn.core import load


@click.command("braid-full-attn")
@service_options(metrics_port=PORTS["full"])
def main(options: ServiceOptions) -> None:
    """Serve softmax attention over paged keys and values.

    Prints one line of JSON on stdout once it serves. Exits with 0 after SIGTERM, 2 on bad usage, 1
    on a fault.
    """
    run_service(
        "full",
        options,
        lambda: load(
            options.backend, thread_count(options.threads), options.max_tokens, options.device, peers=True
        ),
    )


if __name__ == "__main__":
    main(prog_name="braid-full-attn")
