"""What becomes of every field of the requests of `vllm.grpc.engine.VllmEngine`.

A field that asks for something which the cell does not do is refused by its name: nobody shall get an
answer to half of what was asked. So is a field that is not in the table, and one that is newer than the
stubs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from braid_wire.errors import RequestInvalid
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from braid_orchestrator.newer import refuse_newer

_LONGEST_VALUE = 60


class Use(Enum):
    """What the servicer does with a field."""

    HANDLED = "handled"
    REFUSED = "refused"
    HARMLESS = "harmless"


@dataclass(frozen=True)
class Rule:
    """What becomes of a field, and why."""

    use: Use
    why: str = ""


_HANDLED = Rule(Use.HANDLED)
_UNCONSTRAINED = Rule(Use.REFUSED, "the cell does not constrain what is made")
_NO_MEDIA = Rule(Use.REFUSED, "the cell takes token ids or text, and no media")
_NO_TRANSFER = Rule(Use.REFUSED, "the cell runs prompts and decoding itself, so nothing is transferred")
_TEXT_IS_YOURS = Rule(Use.HARMLESS, "the answer holds token ids; who makes text of them decides this")

FIELDS: Mapping[str, Mapping[str, Rule]] = {
    "GenerateRequest": {
        "request_id": _HANDLED,
        "tokenized": _HANDLED,
        "text": _HANDLED,
        "sampling_params": _HANDLED,
        "stream": _HANDLED,
        "data_parallel_rank": _HANDLED,
        "kv_transfer_params": _NO_TRANSFER,
        "kv_transfer_params_json": _NO_TRANSFER,
        "mm_inputs": _NO_MEDIA,
        "extra_mm_inputs": _NO_MEDIA,
        "media_refs": _NO_MEDIA,
    },
    "TokenizedInput": {
        "input_ids": _HANDLED,
        "original_text": Rule(Use.HARMLESS, "the token ids say the same"),
    },
    "SamplingParams": {
        "temperature": _HANDLED,
        "top_p": _HANDLED,
        "top_k": _HANDLED,
        "min_p": _HANDLED,
        "frequency_penalty": _HANDLED,
        "presence_penalty": _HANDLED,
        "repetition_penalty": _HANDLED,
        "max_tokens": _HANDLED,
        "min_tokens": _HANDLED,
        "stop": _HANDLED,
        "stop_token_ids": _HANDLED,
        "ignore_eos": _HANDLED,
        "n": _HANDLED,
        "logprobs": _HANDLED,
        "prompt_logprobs": _HANDLED,
        "seed": _HANDLED,
        "include_stop_str_in_output": _HANDLED,
        "logit_bias": _HANDLED,
        "skip_special_tokens": _TEXT_IS_YOURS,
        "spaces_between_special_tokens": _TEXT_IS_YOURS,
        "grammar_from_first_token": Rule(Use.HARMLESS, "it is about a constraint, and those are refused"),
        "truncate_prompt_tokens": Rule(Use.REFUSED, "a prompt is used whole; send a shorter one"),
        "json_schema": _UNCONSTRAINED,
        "regex": _UNCONSTRAINED,
        "grammar": _UNCONSTRAINED,
        "structural_tag": _UNCONSTRAINED,
        "json_object": _UNCONSTRAINED,
        "choice": _UNCONSTRAINED,
    },
    "AbortRequest": {"request_ids": _HANDLED},
    "GetLoadsRequest": {
        "dp_rank": _HANDLED,
        "include": Rule(Use.HARMLESS, "the answer has the core section, which is part of every choice"),
    },
    "FlushCacheRequest": {"timeout_s": Rule(Use.HARMLESS, "nothing has to be idle for it")},
    "HealthCheckRequest": {},
    "GetModelInfoRequest": {},
    "GetServerInfoRequest": {},
    "GetTokenizerRequest": {},
}
"""Message → field → what becomes of it."""

UNSERVED: Mapping[str, str] = {
    "Embed": "the cell makes tokens, and no embeddings",
    "StartProfile": "the cell has no profiler; its /metrics tell the time of every layer",
    "StopProfile": "the cell has no profiler; its /metrics tell the time of every layer",
    "SubscribeKvEvents": "the cell publishes no events of its pages; ask GetLoads",
}
"""Method → why it is UNIMPLEMENTED."""


def refuse_unsupported(message: Message, path: str = "") -> None:
    """Check a request and the messages in it.

    Raises:
        RequestInvalid: a field is set that asks for what the cell does not do; it names the field.
    """
    name = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        here = f"{path}{field.name}"
        rule = FIELDS.get(name, {}).get(field.name, Rule(Use.REFUSED, "it is not known here"))
        if rule.use is Use.REFUSED:
            raise RequestInvalid(
                f"{here} is {_shown(field, value)}; it must not be set: {rule.why}",
                field=here,
                value=_shown(field, value),
            )
        if rule.use is Use.HANDLED and isinstance(value, Message):
            refuse_unsupported(value, f"{here}.")
    refuse_newer(message, path)


def _shown(field: FieldDescriptor, value: object) -> str:
    if isinstance(value, Message):
        return "there"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
