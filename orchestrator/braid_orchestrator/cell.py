"""The orchestrator's side of a cell, put together: model, memory, services, engine."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from braid_wire.arena import ArenaOwner
from braid_wire.devices import CPU
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Gqa, Kind, Role

from braid_orchestrator.body import Body, LoadRequest, load_body
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.dispatcher import Dispatcher
from braid_orchestrator.engine import Engine
from braid_orchestrator.layer_plan import ModelPlans, build_plans, load_config
from braid_orchestrator.link import Link
from braid_orchestrator.memory import VERSIONS
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.overlap import Overlap, OverlapMode
from braid_orchestrator.prefix_cache import PrefixCache
from braid_orchestrator.scheduler import MAX_WAITING
from braid_orchestrator.segments.choice import OFF, segmented
from braid_orchestrator.speculative import Speculator, check_speculative
from braid_orchestrator.store import Dtypes, Limits, Store
from braid_orchestrator.text import Tokenizer
from braid_orchestrator.walker import Walker

if TYPE_CHECKING:
    from braid_orchestrator.tracing import Traces

log = logging.getLogger(__name__)


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
    segments: str = "auto"
    """What runs the body between its layers: one of `segments.choice.NAMES`."""
    overlap: OverlapMode = OverlapMode.AUTO
    """Whether steps run in two lanes, one in the body while the other is in a service."""
    prefix_cache: bool = True
    """Whether requests go on from what others with the same first tokens computed."""
    state_spacing: int = 256
    """Prompt tokens between two recurrent states that the prefix cache keeps, beside those at branches."""
    max_waiting: int = MAX_WAITING
    """Requests that may wait for a place."""
    speculative: int = 0
    """Tokens that the model's draft guesses ahead of each request; 0: none."""
    speculative_adaptive: bool = True
    """Whether fewer are guessed, or none, where that has shown to be faster."""
    device: torch.device = CPU
    """Of the body, and of parameters, pages, states and activations."""
    plan_options: Mapping[str, str] = field(default_factory=dict)
    """For the services' backends, with every Plan ("prefix_chunk_tokens": "4096")."""


class Cell:
    """A model, its shared memory and its engine; the services are reached by `links`.

    Args:
        model: checkpoint directory.
        links: the two services, by kind.
        handover: Unix socket to hand arenas over at; its directory must be private.
        options: how it is set up.
        traces: gets a trace of each request; it is the cell's to close. None: there are none.

    Raises:
        ConfigInvalid: the model is unknown, or cannot be loaded.
        LayerPlanDisputed: a service does not accept its layers; the ids are named.
        ServiceLost: a service did not come up in time.
    """

    def __init__(
        self,
        model: Path,
        links: Mapping[Kind, Link],
        handover: Path,
        options: CellOptions | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.traces = traces
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
        check_speculative(self.options.speculative, self.body)
        self.body.to(self.options.device)
        self.owner = ArenaOwner(handover)
        refusal = self._overlap_refusal(links)
        self.store = Store(
            self.owner,
            self.body.plans,
            self.body.take_params(),
            self.options.limits,
            Dtypes(self.options.dtype, self.options.state_dtype),
            lanes=1 if refusal else 2,
            state_spacing=self.options.state_spacing if self.options.prefix_cache else 0,
            versions=VERSIONS + self.options.speculative,
            device=self.options.device,
        )
        self.segments = segmented(self.options.segments, self.body, self.store)
        self.metrics.model(model.name)
        self.metrics.watch_pools(self.store.memory)
        self.dispatcher = Dispatcher(
            self.store, links, self.options.dispatch, self.metrics, model.name, self.options.plan_options
        )
        self.dispatcher.connect(self.options.connect_s)
        overlap = self._overlap(refusal)
        self.walker = Walker(
            self.body, self.dispatcher, self.metrics, segments=self.segments, overlap=overlap
        )
        self.engine = Engine(
            self.walker,
            self.options.limits,
            self.plans.vocab_size,
            self.metrics,
            self.options.max_waiting,
            self._prefix_cache(),
            self._speculator(),
            None if traces is None else traces.ended,
        )
        self.engine.start()

    def _speculator(self) -> Speculator | None:
        options = self.options
        if not options.speculative:
            return None
        return Speculator(
            self.walker,
            options.speculative,
            self.metrics,
            options.limits.max_tokens,
            options.speculative_adaptive,
        )

    def _prefix_cache(self) -> PrefixCache | None:
        if not self.options.prefix_cache:
            return None
        return PrefixCache(self.walker.memory(Role.TARGET), self.options.state_spacing)

    def _overlap_refusal(self, links: Mapping[Kind, Link]) -> str:
        """Why steps cannot or need not run in two lanes here; empty where they may.

        Raises:
            ConfigInvalid: two lanes were asked for by name and cannot be.
        """
        options = self.options
        if options.overlap is OverlapMode.OFF:
            return "overlap is off"
        if options.dispatch is not Dispatch.WALK:
            return self._refuse_overlap(f"dispatch is {options.dispatch.value}; lanes need walk")
        if options.segments == OFF:
            return self._refuse_overlap("segments is off; lanes take turns between segments")
        if options.overlap is OverlapMode.AUTO:
            if not all(link.remote for link in links.values()):
                return "both services run in this process"
            if len(os.sched_getaffinity(0)) < 2:
                return "there is one core"
        return ""

    def _overlap(self, refusal: str) -> Overlap | None:
        """What decides about lanes; None where every step runs in one."""
        if not refusal:
            refusal = self._segments_refusal()
        if refusal:
            log.info("steps run in one lane: %s", refusal)
            return None
        return Overlap(self.options.overlap, self._prompts_can_be_cut())

    def _prompts_can_be_cut(self) -> bool:
        """Whether a prompt in two pieces gives the same bits as in one.

        It does with the C++ kernels, but not in latent attention, which merges a cached prefix with
        what is new by its log-sum-exp.
        """
        backends = {description.backend for description in self.dispatcher.descriptions.values()}
        layers = [spec.full for plan in self.body.plans.values() for spec in plan.side(Kind.FULL)]
        return backends == {"cpp"} and all(isinstance(layer, Gqa) for layer in layers)

    def _segments_refusal(self) -> str:
        for role in self.body.plans:
            found = self.segments.get((role, 0))
            if found is None:
                return self._refuse_overlap(f"the {role.value} body does not run in segments")
            if not found.batch_invariant:
                return self._refuse_overlap(
                    f"the {role.value} body's results depend on a batch's size, so that two lanes could "
                    "give other tokens than one"
                )
        return ""

    def _refuse_overlap(self, reason: str) -> str:
        if self.options.overlap is OverlapMode.ON:
            raise ConfigInvalid(f"overlap is on, but {reason}", field="overlap", value="on")
        return reason

    def close(self) -> None:
        """Stop the engine, let go of the services, give the memory back."""
        self.engine.close()
        self.dispatcher.close()
        self.store.close()
        self.owner.close()
        if self.traces is not None:
            self.traces.close()


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
