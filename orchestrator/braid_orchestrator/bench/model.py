"""The model that is measured: a checkpoint of the caller's, or random weights of a fixed shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_CONFIG = "bench-10m.json"


@contextmanager
def checkpoint(given: Path | None) -> Iterator[Path]:
    """The directory to measure; without one, a 10 M-parameter hybrid with random weights is made.

    It has 8 layers (3 linear to 1 full), hidden size 256, Gated DeltaNet with 4 key and 8 value heads
    of 64, attention with 4 query and 2 key/value heads of 64.
    """
    if given is not None:
        yield given
        return
    with TemporaryDirectory(prefix="braid-bench-") as name:
        directory = Path(name)
        text = resources.files(__package__).joinpath(_CONFIG).read_text()
        (directory / "config.json").write_text(text)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
        model.save_pretrained(directory)
        yield directory
