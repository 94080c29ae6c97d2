"""Requests for the engine, from messages of `vllm.grpc.engine.VllmEngine`."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

import numpy as np
from braid_wire.errors import ConfigInvalid, RequestInvalid
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from braid_orchestrator.cell import Cell
from braid_orchestrator.frontends.model_info import ModelInfo
from braid_orchestrator.frontends.vllm_fields import refuse_unsupported
from braid_orchestrator.request import Request, fan_out
from braid_orchestrator.sampling import Sampling


def requests_of(
    message: pb.GenerateRequest, cell: Cell, model: ModelInfo, trace: Mapping[str, str] | None = None
) -> list[Request]:
    """What a message asks for: one request for each of the completions that it wants.

    A number that the protocol cannot tell from an unset one (`top_p`, `repetition_penalty` and `n` of
    0) is unset.

    Args:
        cell: that will run them.
        model: whose defaults fill what is unset.
        trace: W3C trace context of the call, by header.

    Raises:
        RequestInvalid: a field breaks its rule, or asks for what the cell does not do.
        ConfigInvalid: the prompt is text, and the model has no tokenizer.
    """
    refuse_unsupported(message)
    _check_rank(message)
    given = message.sampling_params
    request = Request(
        request_id=message.request_id or uuid.uuid4().hex,
        prompt=np.array(_prompt(message, cell), dtype=np.int64),
        sampling=_sampling(given, model),
        max_tokens=_max_tokens(given),
        stop_ids=frozenset(given.stop_token_ids),
        stop_strings=tuple(given.stop),
        include_stop_str_in_output=given.include_stop_str_in_output,
        end_ids=cell.stop_ids,
        ignore_eos=given.ignore_eos,
        # The answer holds token ids; text is made only to find stop strings in it.
        tokenizer=cell.tokenizer if given.stop else None,
        trace=trace or {},
    )
    return fan_out(request, given.n or 1)


def _check_rank(message: pb.GenerateRequest) -> None:
    if message.data_parallel_rank != 0:
        raise RequestInvalid(
            f"data_parallel_rank is {message.data_parallel_rank}; it must be 0: a cell is one rank",
            field="data_parallel_rank",
            value=message.data_parallel_rank,
        )


def _prompt(message: pb.GenerateRequest, cell: Cell) -> Sequence[int]:
    which = message.WhichOneof("input")
    if which is None:
        raise RequestInvalid("the request has no input", field="input")
    if which == "tokenized":
        return message.tokenized.input_ids
    if cell.tokenizer is None:
        raise ConfigInvalid(f"{cell.model.name} has no tokenizer; send token ids", field="text")
    return cell.tokenizer.encode(message.text)


def _max_tokens(given: pb.SamplingParams) -> int | None:
    if not given.HasField("max_tokens"):
        return None
    if given.max_tokens < 1:
        raise RequestInvalid("max_tokens is 0; it must be at least 1", field="max_tokens", value=0)
    return given.max_tokens


def _sampling(given: pb.SamplingParams, model: ModelInfo) -> Sampling:
    return Sampling(
        temperature=given.temperature if given.HasField("temperature") else model.temperature,
        top_k=given.top_k,
        top_p=given.top_p or 1.0,
        min_p=given.min_p,
        seed=given.seed if given.HasField("seed") else None,
        repetition_penalty=given.repetition_penalty or 1.0,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=dict(given.logit_bias),
        min_tokens=given.min_tokens,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        prompt_logprobs=given.prompt_logprobs if given.HasField("prompt_logprobs") else None,
    )
