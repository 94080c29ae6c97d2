"""`attach(model)`: the attention of a model in this process runs in services of its own."""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from braid_wire.errors import ConfigInvalid, RequestInvalid, StepOrder
from braid_wire.layers import Kind, Mode, Role
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from braid_orchestrator.attach.cache import BraidCache, Sequences
from braid_orchestrator.attach.graft import Graft, Packing, override
from braid_orchestrator.attach.services import Services
from braid_orchestrator.body.base import Target
from braid_orchestrator.body.checkpoint import refuse_unrunnable_config
from braid_orchestrator.body.family import family
from braid_orchestrator.body.loading import NO_MASK
from braid_orchestrator.layer_plan import ModelPlans, build_plans
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.store import Limits
from braid_orchestrator.walker import RECOVERABLE

REPLAYS = 10
"""Times that one step is run again after a service was lost."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "packed_seq_ids")
"""Arguments by which several sequences are told apart inside one row."""


def attach(model: PreTrainedModel, limits: Limits | None = None, threads: int = 0) -> Attachment:
    """Let the attention of a model run in two service processes of its own.

    Only this instance is changed, and only what `forward` of its attention does. Its own code and
    weights do all the rest: `model(…)` and `model.generate(…)` go on as before. What the services need
    of the weights (of convolutions, decays and latent projections) is copied once, now.

    Args:
        model: a causal language model of transformers with its head, on the CPU, in `eval()`.
        limits: most tokens of a step (longer inputs are fed in pieces), rows of a batch, tokens of a row,
            and bytes for keys, values and states.
        threads: of each service; 0: shared out as in a cell.

    Returns:
        A handle; its `detach()`, or the end of its `with` block, restores the model.

    Raises:
        ConfigInvalid: no body is known for the model, its layers are not what its configuration says, its
            weights are quantised, or it is not on the CPU.
        StepOrder: it is attached already.
        ServiceLost: a service did not come up.
    """
    _check(model)
    config = json.loads(model.config.to_json_string(use_diff=False))
    refuse_unrunnable_config(config)
    plans = build_plans(config)
    graft = Graft(model, plans, family(plans.family, plans.model_type))
    return Attachment(model, plans, graft, limits or Limits(), threads)


def _check(model: Any) -> None:
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        raise ConfigInvalid(
            f"{type(model).__name__} is no causal language model of transformers with its head; "
            "give the …ForCausalLM",
            field="model",
            value=type(model).__name__,
        )
    elsewhere = sorted({str(parameter.device) for parameter in model.parameters()} - {"cpu"})
    if elsewhere:
        raise ConfigInvalid(
            f"the model has parameters on {', '.join(elsewhere)}; tensors are shared on the CPU",
            field="device",
            value=elsewhere[0],
        )
    if isinstance(vars(model).get("generate"), _Generate):
        raise StepOrder("the model is attached already")


class Attachment:
    """A model whose attention runs elsewhere.

    Args:
        model: on which `forward` of the backbone and `generate` are wrapped.
        plans: of its configuration.
        graft: its adapters.
        limits: sizes.
        threads: of each service.
    """

    def __init__(self, model: Any, plans: ModelPlans, graft: Graft, limits: Limits, threads: int) -> None:
        self.model = model
        self.limits = limits
        self._graft = graft
        self._plan = plans.target
        self._recurrent = any(spec.linear is not None for spec in plans.target)
        target = Target(
            model=model,
            plan=plans.target,
            point=graft.point,
            head=graft.parts.head,
            backbone=graft.parts.backbone,
            hidden_size=plans.hidden_size,
            mrope=graft.parts.mrope,
        )
        self._services = Services(target, graft.params, limits, threads)
        self._closing = weakref.finalize(self, self._services.close)
        self._sequences = Sequences(self._services.store)
        self._base = model.base_model
        self._signature = inspect.signature(self._base.forward)
        self._own_forward: Callable[..., Any] = self._base.forward
        graft.insert()
        self._restore = [
            override(self._base, "forward", self._forward),
            override(model, "generate", _Generate(self, model.generate)),
        ]

    @property
    def attached(self) -> bool:
        """Whether the model's attention runs in the services."""
        return bool(self._restore)

    @property
    def replays(self) -> int:
        """Steps that were run again because a service was lost in them."""
        return self._services.walker.replays

    @property
    def used(self) -> Mapping[str, int]:
        """Pages and slots that live caches hold."""
        memory = self._sequences.memory
        return {pool.name: pool.used for pool in (memory.pages, memory.slots) if pool is not None}

    def pid(self, kind: Kind) -> int:
        """The process of one service; StepOrder while it is being started again."""
        return self._services.pid(kind)

    def new_cache(self) -> BraidCache:
        """An empty `past_key_values`.

        Raises:
            StepOrder: the model is detached.
        """
        if not self.attached:
            raise StepOrder("the model is detached")
        return BraidCache(self._sequences)

    def detach(self) -> None:
        """Restore the model and end the services; caches cannot be used any more. Twice does nothing."""
        while self._restore:
            self._restore.pop()()
        self._graft.remove()
        self._sequences.open = False
        self._closing()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # The backbone's forward.

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the backbone's forward gives, its layers run as steps of the services."""
        given = self._signature.bind(*args, **kwargs)
        asked = {**given.arguments, **given.arguments.get("kwargs", {})}
        asked.pop("kwargs", None)
        self._refuse(asked)
        return_dict = asked.pop("return_dict", None)
        use_cache = asked.pop("use_cache", None)
        use_cache = self._base.config.use_cache if use_cache is None else use_cache
        past = asked.pop("past_key_values", None)
        cache = self._cache(past)
        try:
            output = self._run(asked, cache)
        finally:
            if not use_cache and past is None:
                cache.release()
        output["past_key_values"] = cache if use_cache else None
        whole = self._base.config.return_dict if return_dict is None else return_dict
        return output if whole else output.to_tuple()

    def _refuse(self, asked: Mapping[str, Any]) -> None:
        """RequestInvalid for what services do not do, naming the argument."""
        if self._base.training:
            raise RequestInvalid(
                "the model is in training mode; attention in services has no gradients: call model.eval()",
                field="training",
                value=True,
            )
        weights = asked.get("output_attentions")
        if self._base.config.output_attentions if weights is None else weights:
            raise RequestInvalid(
                "output_attentions is not done: services give no attention weights",
                field="output_attentions",
                value=True,
            )
        for name in _PACKED:
            if asked.get(name) is not None:
                raise RequestInvalid(
                    f"{name}: several sequences in one row are not told apart; give a row to each", field=name
                )

    def _cache(self, past: Any) -> BraidCache:
        if past is None:
            return self.new_cache()
        if not isinstance(past, BraidCache) or not past.belongs_to(self._sequences):
            raise RequestInvalid(
                f"past_key_values is a {type(past).__name__} of somewhere else; leave it out, or give what "
                "this model returned or its attachment's new_cache()",
                field="past_key_values",
                value=type(past).__name__,
            )
        return past

    def _run(self, asked: dict[str, Any], cache: BraidCache) -> Any:
        """All columns, in pieces that fit into a step."""
        tokens = asked.get("input_ids")
        if tokens is None:
            tokens = asked.get("inputs_embeds")
        if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2 or not tokens.shape[1]:
            raise RequestInvalid("input_ids or inputs_embeds must have rows and columns", field="input_ids")
        rows, columns = tokens.shape[:2]
        memories = cache.rows(rows)
        mask = self._mask(asked.pop("attention_mask", None), cache, rows, columns)
        positions = asked.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(columns)[None] + cache.get_seq_length()
        _check_positions(positions, mask)
        self._check_size(memories, mask)
        width = max(self.limits.max_tokens // rows, 1)
        if columns <= width:
            return self._piece({**asked, "position_ids": positions}, cache, mask)
        if asked.get("output_router_logits"):
            raise RequestInvalid(
                f"output_router_logits is done for inputs of one step alone, {width} columns here",
                field="output_router_logits",
                value=True,
            )
        outputs = []
        for begin in range(0, columns, width):
            part = slice(begin, begin + width)
            piece = {
                name: value[:, part] if _is_columns(value, tokens) else value for name, value in asked.items()
            }
            outputs.append(self._piece({**piece, "position_ids": positions[..., part]}, cache, mask[:, part]))
        return _joined(outputs)

    def _mask(self, given: Any, cache: BraidCache, rows: int, columns: int) -> torch.Tensor:
        """bool [B, S]: which of the new columns are tokens."""
        seen = cache.seen
        past = cache.get_seq_length()
        if given is None:
            if seen is not None and not bool(seen.all()):
                raise RequestInvalid(
                    "attention_mask must be given: past_key_values has padding", field="attention_mask"
                )
            return torch.ones(rows, columns, dtype=torch.bool)
        if not isinstance(given, torch.Tensor) or given.ndim != 2:
            raise RequestInvalid(
                "attention_mask must have two dimensions, rows and columns; others are not done",
                field="attention_mask",
            )
        mask = given != 0
        if mask.shape != (rows, past + columns):
            raise RequestInvalid(
                f"attention_mask is {list(mask.shape)}; past and new columns make {[rows, past + columns]}",
                field="attention_mask",
            )
        if bool((given[mask] != 1).any()):
            raise RequestInvalid("attention_mask must have 0 and 1 alone", field="attention_mask")
        if seen is not None and not torch.equal(mask[:, :past], seen):
            raise RequestInvalid(
                "attention_mask says something else of columns that were fed already", field="attention_mask"
            )
        if self._recurrent and bool((mask[:, 1:] & ~mask[:, :-1] & (mask.cumsum(1)[:, :-1] > 0)).any()):
            raise RequestInvalid(
                "attention_mask has padding between tokens; recurrent layers cannot skip it: pad on the left",
                field="attention_mask",
            )
        return mask[:, past:]

    def _check_size(self, memories: Sequence[SequenceMemory], mask: torch.Tensor) -> None:
        if len(memories) > self.limits.max_sequences or len(memories) > self.limits.max_tokens:
            most = min(self.limits.max_sequences, self.limits.max_tokens)
            raise RequestInvalid(
                f"the batch has {len(memories)} rows; limits.max_sequences is {most}",
                field="max_sequences",
                value=len(memories),
            )
        longest = max(m.length + n for m, n in zip(memories, mask.sum(1).tolist(), strict=True))
        if longest > self.limits.max_context:
            raise RequestInvalid(
                f"a row would have {longest} tokens; limits.max_context is {self.limits.max_context}",
                field="max_context",
                value=longest,
            )

    def _piece(self, asked: dict[str, Any], cache: BraidCache, mask: torch.Tensor) -> Any:
        """One step; again from its start where a service is lost in it."""
        spans = _spans(cache.rows(len(mask)), mask)
        walker = self._services.walker
        with walker.exclusive():
            for attempt in range(REPLAYS + 1):
                try:
                    output = self._step(spans, Packing(mask), asked)
                    break
                except RECOVERABLE as error:
                    if attempt == REPLAYS:
                        raise
                    # A log that keeps the error must not keep the frames, and the caches in them.
                    walker.recover(error.with_traceback(None))
        cache.extend(mask)
        return output

    def _step(self, spans: Sequence[Span], packing: Packing, asked: dict[str, Any]) -> Any:
        config = self._base.config
        masks, config._attn_implementation = config._attn_implementation, NO_MASK

        def backbone() -> Any:
            return self._own_forward(**asked, use_cache=False, return_dict=True)

        try:
            if not spans:
                # Adapters need a row: one of the padding, whose output means nothing.
                alone = torch.zeros_like(packing.mask)
                alone[0, 0] = True
                return self._graft.run(Packing(alone), self._nothing, backbone)
            with self._services.walker.step(Role.TARGET, spans) as (_, step):
                return self._graft.run(packing, step.attend, backbone)
        finally:
            config._attn_implementation = masks

    def _nothing(
        self, layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
    ) -> torch.Tensor:
        """A layer of a step that has padding alone."""
        spec = self._services.walker.dispatcher.spec(Role.TARGET, layer_id)
        sole = Kind.FULL if spec.full is not None else Kind.LINEAR
        return torch.zeros_like(self._services.store.buffers(spec, side or sole, 1).output)


class _Generate:
    """`model.generate` with a cache of the attachment, where the caller gives none."""

    def __init__(self, attachment: Attachment, generate: Callable[..., Any]) -> None:
        self._attachment = weakref.proxy(attachment)
        self._generate = generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = self._attachment.model.generation_config if chosen is None else chosen
        settings = {**vars(config), **kwargs}
        if settings.get("cache_implementation") is not None:
            raise RequestInvalid(
                f"cache_implementation {settings['cache_implementation']!r}: keys and states lie in services",
                field="cache_implementation",
                value=settings["cache_implementation"],
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if settings.get(name) is not None:
                raise RequestInvalid(
                    f"{name}: assisted generation does not run with attached attention", field=name
                )
        if settings.get("use_cache") is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self._attachment.new_cache()
        return self._generate(*args, **kwargs)


def _spans(memories: Sequence[SequenceMemory], mask: torch.Tensor) -> list[Span]:
    """What each row with tokens feeds."""
    return [
        Span(
            memory,
            np.zeros(count, dtype=np.int64),
            Mode.DECODE if memory.length and count == 1 else Mode.EXTEND,
        )
        for memory, count in zip(memories, mask.sum(1).tolist(), strict=True)
        if count
    ]


def _check_positions(positions: torch.Tensor, mask: torch.Tensor) -> None:
    """RequestInvalid where positions of a row's tokens do not rise: several sequences are packed in it."""
    if positions.ndim != 2 or positions.shape[1] < 2:
        return
    spread = positions.expand(mask.shape[0], -1)
    before = torch.where(mask, spread, -1).cummax(1).values[:, :-1]
    if bool((mask[:, 1:] & (spread[:, 1:] <= before)).any()):
        raise RequestInvalid(
            "position_ids do not rise along a row; several sequences in one row are not told apart",
            field="position_ids",
        )


def _is_columns(value: Any, tokens: torch.Tensor) -> bool:
    """Whether an argument has a place for every column, as the tokens do."""
    return isinstance(value, torch.Tensor) and value.shape[:2] == tokens.shape[:2]


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of pieces as one, along the columns."""
    joined: dict[str, Any] = {}
    for name, first in outputs[0].items():
        values = [output[name] for output in outputs]
        if isinstance(first, torch.Tensor):
            joined[name] = torch.cat(values, dim=1)
        elif isinstance(first, tuple):
            joined[name] = tuple(torch.cat(parts, dim=1) for parts in zip(*values, strict=True))
    kind: type[ModelOutput] = type(outputs[0])
    return kind(**joined)
