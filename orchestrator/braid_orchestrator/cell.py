"""The orchestrator's side of a cell, put together: model, memory, services, engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from braid_wire.arena import ArenaOwner
from braid_wire.layers import Kind

from braid_orchestrator.body import Body, LoadRequest, load_body
from braid_orchestrator.dispatcher import Dispatch, Dispatcher
from braid_orchestrator.engine import Engine
from braid_orchestrator.layer_plan import ModelPlans, build_plans, load_config
from braid_orchestrator.link import Link
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.store import Dtypes, Limits, Store
from braid_orchestrator.text import Tokenizer
from braid_orchestrator.walker import Walker


@dataclass(frozen=True)
class CellOptions:
    """How a cell is set up."""

    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    dispatch: Dispatch = Dispatch.WALK
    limits: Limits = field(default_factory=Limits)
    trust_remote_code: bool = False
    connect_s: float = 180.0
    """Longest wait for a service that is starting; one that runs for the first time builds its kernels."""
    plan_options: Mapping[str, str] = field(default_factory=dict)
    """For the services' backends, with every Plan ("prefix_chunk_tokens": "4096")."""


class Cell:
    """A model, its shared memory and its engine; the services are reached by `links`.

    Args:
        model: checkpoint directory.
        links: the two services, by kind.
        handover: Unix socket to hand arenas over at; its directory must be private.
        options: how it is set up.

    Raises:
        ConfigInvalid: the model is unknown, or cannot be loaded.
        LayerPlanDisputed: a service does not accept its layers; the ids are named.
        ServiceLost: a service did not come up in time.
    """

    def __init__(
        self, model: Path, links: Mapping[Kind, Link], handover: Path, options: CellOptions | None = None
    ) -> None:
        self.options = options or CellOptions()
        self.model = model
        config = load_config(model)
        self.plans: ModelPlans = build_plans(config)
        self.tokenizer = Tokenizer.load(model)
        self.stop_ids = _end_tokens(model, config)
        self.metrics = CellMetrics(metadata.version("braid-attention"))
        self.body: Body = load_body(
            LoadRequest(model, self.plans, self.options.dtype, self.options.trust_remote_code)
        )
        self.owner = ArenaOwner(handover)
        self.store = Store(
            self.owner,
            self.body.plans,
            self.body.take_params(),
            self.options.limits,
            Dtypes(self.options.dtype, self.options.state_dtype),
        )
        self.metrics.watch_pools(self.store.memory)
        self.dispatcher = Dispatcher(
            self.store, links, self.options.dispatch, self.metrics, model.name, self.options.plan_options
        )
        self.dispatcher.connect(self.options.connect_s)
        self.walker = Walker(self.body, self.dispatcher, self.metrics)
        self.engine = Engine(self.walker, self.options.limits, self.plans.vocab_size, self.metrics)
        self.engine.start()

    def close(self) -> None:
        """Stop the engine, let go of the services, give the memory back."""
        self.engine.close()
        self.dispatcher.close()
        self.store.close()
        self.owner.close()


def _end_tokens(model: Path, config: Mapping[str, object]) -> frozenset[int]:
    """The model's own end tokens: generation_config.json's, else config.json's."""
    path = model / "generation_config.json"
    sources = [json.loads(path.read_text()) if path.exists() else {}, config, config.get("text_config") or {}]
    for source in sources:
        value = source.get("eos_token_id") if isinstance(source, Mapping) else None
        if isinstance(value, int):
            return frozenset({value})
        if isinstance(value, list) and value:
            return frozenset(int(token) for token in value)
    return frozenset()
