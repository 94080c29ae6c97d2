"""The model that is measured: a checkpoint of the caller's, or random weights of a fixed shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from braid_wire.errors import RequestInvalid
from transformers import AutoConfig, AutoModelForCausalLM

_CONFIG = "bench-10m.json"
_LINEAR_TO_FULL = 3


@contextmanager
def checkpoint(given: Path | None, layers: int | None = None) -> Iterator[Path]:
    """The directory to measure; without one, a 10 M-parameter hybrid with random weights is made.

    It has hidden size 256, Gated DeltaNet with 4 key and 8 value heads of 64, attention with 4 query
    and 2 key/value heads of 64, and 8 layers, 3 linear to 1 full.

    Args:
        given: a checkpoint of the caller's.
        layers: of the model that is made, at least 4; None: 8.

    Raises:
        RequestInvalid: fewer layers, of which none would be full.
    """
    if given is not None:
        yield given
        return
    config = json.loads(resources.files(__package__).joinpath(_CONFIG).read_text())
    if layers is not None:
        if layers <= _LINEAR_TO_FULL:
            raise RequestInvalid(
                f"layers is {layers}; it must be at least {_LINEAR_TO_FULL + 1}", field="layers", value=layers
            )
        config["num_hidden_layers"] = layers
        config["layer_types"] = [_layer_type(index) for index in range(layers)]
    with TemporaryDirectory(prefix="braid-bench-") as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
        model.save_pretrained(directory)
        del model
        yield directory


def _layer_type(index: int) -> str:
    period = _LINEAR_TO_FULL + 1
    return "full_attention" if index % period == _LINEAR_TO_FULL else "linear_attention"
