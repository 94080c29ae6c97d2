"""What a cell says of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braid_wire.errors import ConfigInvalid

from braid_orchestrator.cell import Cell
from braid_orchestrator.layer_plan import load_config

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN_TEMPERATURE = 1.0


@dataclass(frozen=True)
class ModelInfo:
    """A model, as a frontend wants to know it."""

    path: Path
    """Directory of the checkpoint, where its tokenizer lies too."""
    name: str
    """What callers name it by."""
    model_type: str
    architecture: str | None
    vocab_size: int
    max_context: int
    """Tokens of one sequence, prompt and completion."""
    end_tokens: tuple[int, ...]
    bos_token: int
    """0 where the model names none."""
    pad_token: int
    sampling: Mapping[str, float]
    """The checkpoint's own choice of how tokens are chosen; what it does not say is not in it."""

    @classmethod
    def of(cls, cell: Cell) -> ModelInfo:
        """Of the model that a cell serves.

        Raises:
            ConfigInvalid: `generation_config.json` cannot be read.
        """
        config = load_config(cell.model)
        return cls(
            path=cell.model.resolve(),
            name=cell.model.resolve().name,
            model_type=cell.plans.model_type,
            architecture=cell.plans.architecture,
            vocab_size=cell.plans.vocab_size,
            max_context=cell.options.limits.max_context,
            end_tokens=tuple(sorted(cell.stop_ids)),
            bos_token=_token(config, "bos_token_id"),
            pad_token=_token(config, "pad_token_id"),
            sampling=_sampling(cell.model / "generation_config.json"),
        )

    @property
    def temperature(self) -> float:
        """Of requests that name none."""
        return self.sampling.get("temperature", _PLAIN_TEMPERATURE)

    @property
    def sampling_json(self) -> str:
        """The checkpoint's choice as a JSON object; empty where it makes none."""
        return json.dumps(dict(self.sampling)) if self.sampling else ""


def _sampling(path: Path) -> Mapping[str, float]:
    """The defaults of a generation config; one that says not to sample means temperature 0."""
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"{path} cannot be read: {error}", field="generation_config") from error
    found = {name: config[name] for name in _SAMPLING if _is_number(config.get(name))}
    return {**found, "temperature": 0.0} if config.get("do_sample") is False else found


def _token(config: Mapping[str, Any], name: str) -> int:
    text: Mapping[str, Any] = config.get("text_config") or {}
    value = config.get(name, text.get(name))
    return value if isinstance(value, int) else 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
