"""`vllm.grpc.engine.VllmEngine` over a cell, by its stubs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from braid_orchestrator.client import Client
from braid_orchestrator.frontends.tokenizer_archive import CHUNK_BYTES, TokenizerArchive, has_tokenizer
from braid_orchestrator.frontends.vllm_engine import SERVICE_NAME
from braid_orchestrator.frontends.vllm_fields import UNSERVED
from braid_orchestrator.servicer import SERVICE_NAME as NATIVE_NAME
from braid_wire.errors import (
    BraidError,
    ConfigInvalid,
    Draining,
    MechanismUnsupported,
    QueueFull,
    RequestCancelled,
    RequestInvalid,
    from_rpc_error,
)
from front_harness import ENDLESS, LIMITS, MAX_WAITING, TINY, Front, eventually
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2
from prometheus_client import generate_latest
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from transformers import AutoTokenizer

PROMPT = [318, 817, 11]
HOT = {"temperature": 1.2, "max_tokens": 12}


def error_of(call: Callable[[], object]) -> BraidError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value, "the cell")


def status_of(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code


@pytest.fixture(scope="module")
def native(shared_front: Front) -> list[int]:
    """What the cell's own service makes of the prompt, greedily."""
    with Client(shared_front.address) as client:
        return list(client.complete(PROMPT, 24).token_ids)


def test_streamed_and_whole_are_what_the_own_service_makes(front: Front, native: list[int]) -> None:
    whole = front.complete(PROMPT, temperature=0, max_tokens=24)
    assert list(whole.output_ids) == native
    assert (whole.finish_reason, whole.prompt_tokens, whole.completion_tokens) == ("length", 3, 24)
    *chunks, last = front.generate(PROMPT, stream=True, temperature=0, max_tokens=24)
    assert [list(chunk.chunk.token_ids) for chunk in chunks] == [[token] for token in native]
    assert {chunk.chunk.completion_tokens for chunk in chunks} == {1}
    assert {chunk.chunk.prompt_tokens for chunk in chunks} == {3}
    assert list(last.complete.output_ids) == []
    assert (last.complete.finish_reason, last.complete.completion_tokens) == ("length", 24)
    assert not last.complete.HasField("output_logprobs")


def test_what_is_unset_is_the_checkpoints_own(front: Front, native: list[int]) -> None:
    assert json.loads((TINY / "generation_config.json").read_text())["do_sample"] is False
    assert list(front.complete(PROMPT, max_tokens=24).output_ids) == native
    assert front.complete(PROMPT, max_tokens=24, temperature=1.0).output_ids != native


def test_without_max_tokens_it_goes_to_the_end_of_the_context(front: Front) -> None:
    prompt = [100 + place % 1000 for place in range(LIMITS.max_context - 20)]
    done = front.complete(prompt, ignore_eos=True)
    assert (done.finish_reason, done.completion_tokens) == ("length", 20)


def test_text_is_a_prompt_too(front: Front, native: list[int]) -> None:
    sampling = pb.SamplingParams(max_tokens=24)
    (response,) = front.stub.Generate(pb.GenerateRequest(text="def add(", sampling_params=sampling))
    assert list(response.complete.output_ids) == native


def test_a_seed_decides_and_completions_count_on_from_it(front: Front) -> None:
    alone = [list(front.complete(PROMPT, seed=seed, **HOT).output_ids) for seed in (7, 8, 9)]
    assert len({tuple(made) for made in alone}) == 3
    together = [response.complete for response in front.generate(PROMPT, n=3, seed=7, **HOT)]
    assert [complete.index for complete in together] == [0, 1, 2]
    assert [list(complete.output_ids) for complete in together] == alone
    streamed: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ends = []
    for response in front.generate(PROMPT, stream=True, n=3, seed=7, **HOT):
        streamed[response.chunk.index] += response.chunk.token_ids
        ends += [response.complete.index] if response.HasField("complete") else []
    assert [streamed[index] for index in range(3)] == alone
    assert sorted(ends) == [0, 1, 2]


def test_a_negative_seed_is_one(front: Front) -> None:
    first, second = (front.complete(PROMPT, seed=-5, **HOT).output_ids for _ in range(2))
    assert first == second


def test_stop_tokens_and_strings_say_that_they_matched(front: Front, native: list[int]) -> None:
    by_token = front.complete(PROMPT, max_tokens=24, stop_token_ids=[native[4]])
    assert list(by_token.output_ids) == native[: native.index(native[4])]
    assert (by_token.finish_reason, by_token.matched_token_id) == ("stop", native[4])
    text = front.cell.tokenizer
    assert text is not None
    word = text.decode(native[3:5])
    by_string = front.complete(PROMPT, max_tokens=24, stop=["never in it", word])
    assert (by_string.finish_reason, by_string.matched_stop_str) == ("stop", word)
    # All tokens are told, those of the string too: who makes the text cuts it.
    assert list(by_string.output_ids) == native[:5]
    *_, last = front.generate(PROMPT, stream=True, max_tokens=24, stop=[word])
    assert last.complete.matched_stop_str == word


def test_the_models_own_end_token_stops_unless_it_is_ignored(front: Front) -> None:
    tokenizer = front.cell.tokenizer
    assert tokenizer is not None
    ended = front.complete(tokenizer.encode("<|im_end|>"), max_tokens=1, logit_bias={2: 100.0})
    assert (ended.finish_reason, ended.matched_token_id, list(ended.output_ids)) == ("stop", 2, [])
    forced = {"max_tokens": 2, "logit_bias": {2: 100.0}}
    assert list(front.complete(PROMPT, ignore_eos=True, **forced).output_ids) == [2, 2]
    held_off = front.complete(PROMPT, min_tokens=2, **forced).output_ids
    assert len(held_off) == 2 and 2 not in held_off


def test_penalties_and_filters_reach_the_sampler(front: Front, native: list[int]) -> None:
    assert list(front.complete(PROMPT, seed=1, top_k=1, **HOT).output_ids) == native[:12]
    assert list(front.complete(PROMPT, seed=1, min_p=1.0, **HOT).output_ids) == native[:12]
    assert list(front.complete(PROMPT, seed=1, top_p=1e-6, **HOT).output_ids) == native[:12]
    for penalty in ("frequency_penalty", "presence_penalty", "repetition_penalty"):
        assert list(front.complete(PROMPT, max_tokens=24, **{penalty: 2.0}).output_ids) != native


def test_logprobs_of_made_tokens_and_of_the_prompt(front: Front) -> None:
    asked = {"max_tokens": 6, "logprobs": 2, "prompt_logprobs": 1}
    whole = front.complete(PROMPT, **asked)
    made = list(whole.output_ids)
    with Client(front.address) as client:
        expected = client.score([PROMPT + made]).logprobs[0]
    told = whole.output_logprobs
    assert list(told.token_ids) == made
    assert list(told.token_logprobs) == pytest.approx(expected[2:], abs=1e-4)
    for top, token, logprob in zip(told.top_logprobs, made, told.token_logprobs, strict=True):
        assert top.token_ids[0] == token  # greedy: the likeliest
        assert top.values[0] == logprob > top.values[1]
    prompt = whole.input_logprobs
    assert list(prompt.token_ids) == PROMPT
    assert not prompt.token_logprobs[0].HasField("value")
    assert [entry.value for entry in prompt.token_logprobs[1:]] == pytest.approx(expected[:2], abs=1e-4)
    assert [len(top.token_ids) for top in prompt.top_logprobs] == [0, 1, 1]
    first, *others = (response.chunk for response in list(front.generate(PROMPT, stream=True, **asked))[:-1])
    assert first.input_logprobs == prompt
    assert not any(chunk.HasField("input_logprobs") for chunk in others)
    streamed = [value for chunk in (first, *others) for value in chunk.output_logprobs.token_logprobs]
    assert streamed == pytest.approx(list(told.token_logprobs), abs=1e-5)


def test_prompt_logprobs_come_with_the_end_where_nothing_is_made(front: Front) -> None:
    ended = {"max_tokens": 4, "prompt_logprobs": 0, "logit_bias": {2: 100.0}}
    (response,) = front.generate(PROMPT, stream=True, **ended)
    assert len(response.complete.input_logprobs.token_logprobs) == len(PROMPT)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"presence_penalty": -3.0}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": LIMITS.max_context}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logit_bias": {1 << 20: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"stop": [""]}, "stop_strings"),
        ({"regex": "a*"}, "sampling_params.regex"),
        ({"truncate_prompt_tokens": 2}, "sampling_params.truncate_prompt_tokens"),
    ],
)
def test_bad_sampling_is_refused_by_name(front: Front, sampling: dict[str, Any], field: str) -> None:
    error = error_of(lambda: front.complete(PROMPT, **{"max_tokens": 4, **sampling}))
    assert isinstance(error, RequestInvalid)
    assert error.metadata["field"] == field


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput()), "prompt"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[2048])), "prompt"),
        (pb.GenerateRequest(text="x", data_parallel_rank=1), "data_parallel_rank"),
        (pb.GenerateRequest(text="x", kv_transfer_params_json="{}"), "kv_transfer_params_json"),
    ],
)
def test_bad_requests_are_refused_by_name(front: Front, request_: pb.GenerateRequest, field: str) -> None:
    error = error_of(lambda: list(front.stub.Generate(request_)))
    assert isinstance(error, RequestInvalid)
    assert error.metadata["field"] == field


def test_a_live_id_is_not_taken_twice(front: Front) -> None:
    first = front.generate(PROMPT, stream=True, request_id="twice", max_tokens=ENDLESS, ignore_eos=True)
    next(first)
    assert (
        error_of(lambda: list(front.generate(PROMPT, request_id="twice"))).metadata["field"] == "request_id"
    )
    next(first)  # and the first one goes on
    first.cancel()


@pytest.mark.parametrize("completions", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_abort_ends_a_request_within_a_second(front: Front, stream: bool, completions: int) -> None:
    endless = {"max_tokens": ENDLESS, "ignore_eos": True, "n": completions}
    call = front.generate(PROMPT, stream=stream, request_id="long", **endless)
    assert eventually(lambda: front.cell.engine.load.running == completions)
    with front.freeing():
        front.stub.Abort(pb.AbortRequest(request_ids=["of another", "long"]))
    assert isinstance(error_of(lambda: list(call)), RequestCancelled)
    front.stub.Abort(pb.AbortRequest(request_ids=["long"]))  # once more is nothing


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_leaves_frees_within_a_second(front: Front, stream: bool) -> None:
    call = front.generate(PROMPT, stream=stream, max_tokens=ENDLESS, ignore_eos=True, n=2)
    assert eventually(lambda: front.cell.engine.load.running == 2)
    with front.freeing():
        call.cancel()


def test_flush_drops_the_prefixes_that_are_kept(front: Front) -> None:
    def cached() -> int:
        found: int = front.complete([*range(100, 400)], max_tokens=2).cached_tokens
        return found

    flush = common.FlushCacheRequest(timeout_s=1.0)
    assert front.stub.FlushCache(flush).success
    assert cached() == 0
    assert 0 < cached() < 300
    *_, last = front.generate([*range(100, 400)], stream=True, max_tokens=2)
    assert last.complete.cached_tokens == cached()
    assert front.stub.FlushCache(flush).success
    assert cached() == 0


def test_a_full_queue_is_resource_exhausted_and_frees_what_was_taken(front: Front) -> None:
    with front.full():
        assert isinstance(error_of(lambda: front.complete(PROMPT, max_tokens=1)), QueueFull)
        assert status_of(lambda: front.complete(PROMPT)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    with front.full(room=2):
        held = front.cell.engine.load
        several = front.generate(PROMPT, max_tokens=1, n=3)
        assert isinstance(error_of(lambda: list(several)), QueueFull)
        assert eventually(lambda: front.cell.engine.load == held)


def test_drain_finishes_what_was_accepted(own_front: Front) -> None:
    front = own_front
    assert front.health(SERVICE_NAME) == health_pb2.HealthCheckResponse.SERVING
    assert front.stub.HealthCheck(pb.HealthCheckRequest()).healthy
    running = front.generate(PROMPT, stream=True, max_tokens=60, ignore_eos=True)
    next(running)
    draining = threading.Thread(target=front.node.drain, args=(30.0,))
    draining.start()
    assert eventually(lambda: front.cell.engine.draining)
    assert isinstance(error_of(lambda: front.complete(PROMPT, max_tokens=1)), Draining)
    assert status_of(lambda: front.complete(PROMPT)) is grpc.StatusCode.UNAVAILABLE
    answer = front.stub.HealthCheck(pb.HealthCheckRequest())
    assert (answer.healthy, answer.message) == (False, "draining")
    for name in (SERVICE_NAME, NATIVE_NAME):
        assert front.health(name) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert front.stub.GetServerInfo(pb.GetServerInfoRequest()).is_paused
    *_, last = running
    assert last.complete.completion_tokens == 60
    draining.join()


def test_model_and_server_info(front: Front) -> None:
    model = front.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.model_path, model.tokenizer_path) == (str(TINY), str(TINY))
    assert (model.served_model_name, model.model_type) == ("tiny", "qwen3_next")
    assert list(model.architectures) == ["Qwen3NextForCausalLM"]
    assert model.is_generation
    assert not model.supports_vision
    assert (model.vocab_size, model.max_context_length) == (2048, LIMITS.max_context)
    assert list(model.eos_token_ids) == [0, 2]
    assert (model.bos_token_id, model.pad_token_id) == (0, 3)
    assert json.loads(model.default_sampling_params_json) == {"temperature": 0.0}
    before = time.time()
    front.complete(PROMPT, max_tokens=1)
    server = front.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.server_type, server.is_paused, server.data_parallel_size) == ("braid", False, 1)
    assert (server.max_num_seqs, server.block_size) == (LIMITS.max_sequences, LIMITS.page_size)
    assert (server.model_dtype, server.kv_cache_dtype) == ("torch.float32", "float32")
    assert server.last_receive_timestamp >= before
    assert server.uptime_seconds > 0


def test_loads_count_what_runs_and_waits(front: Front) -> None:
    (load,) = front.stub.GetLoads(pb.GetLoadsRequest()).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.token_usage) == (0, 0, 0.0)
    assert load.max_running_requests == LIMITS.max_sequences
    with front.full():
        (load,) = front.stub.GetLoads(pb.GetLoadsRequest(dp_rank=0, include=["core"])).loads
        assert load.num_running_reqs == LIMITS.max_sequences
        assert load.num_total_reqs == load.num_running_reqs + load.num_waiting_reqs
        assert load.num_waiting_reqs == MAX_WAITING
        assert 0 < load.num_used_tokens <= load.max_total_num_tokens
        assert 0 < load.token_usage <= 1
        assert load.utilization == 1.0

        def rate() -> float:
            found: float = front.stub.GetLoads(pb.GetLoadsRequest()).loads[0].gen_throughput
            return found

        assert eventually(lambda: rate() > 0)
    assert list(front.stub.GetLoads(pb.GetLoadsRequest(dp_rank=1)).loads) == []


def test_the_tokenizer_comes_as_an_archive_that_works(front: Front, tmp_path: Path) -> None:
    *before, last = front.stub.GetTokenizer(common.GetTokenizerRequest())
    assert all(0 < len(chunk.data) <= CHUNK_BYTES and not chunk.sha256 for chunk in before)
    data = b"".join(chunk.data for chunk in (*before, last))
    assert last.sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(archive.namelist())
        assert not [name for name in archive.namelist() if name.endswith((".safetensors", ".py"))]
        archive.extractall(tmp_path)
    original, received = AutoTokenizer.from_pretrained(TINY), AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "def add(a, b): ünï"}]
    expected = original.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert received.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    assert received.encode(expected) == original.encode(expected)


def test_an_archive_depends_on_the_files_alone(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{}")
    first = TokenizerArchive.of(tmp_path)
    os.utime(tmp_path / "tokenizer.json", (1e9, 1e9))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert TokenizerArchive.of(tmp_path) == first
    (tmp_path / "tokenizer.json").unlink()
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ConfigInvalid, match="no tokenizer"):
        TokenizerArchive.of(tmp_path)


def test_methods_that_are_not_served_say_so_and_why(front: Front) -> None:
    requests = {
        "Embed": pb.EmbedRequest(),
        "StartProfile": common.StartProfileRequest(),
        "StopProfile": common.StopProfileRequest(),
        "SubscribeKvEvents": common.SubscribeKvEventsRequest(),
    }
    assert requests.keys() == UNSERVED.keys()
    for name, request in requests.items():
        method = getattr(front.stub, name)
        error = error_of(lambda: list(method(request)) if name == "SubscribeKvEvents" else method(request))  # noqa: B023
        assert isinstance(error, MechanismUnsupported)
        assert name in error.message and UNSERVED[name] in error.message


def test_probes_for_other_engines_leave_no_trace(front: Front) -> None:
    for service in ("sglang.grpc.scheduler.SglangScheduler", "trtllm.TrtllmService"):
        probe = front.channel.unary_unary(
            f"/{service}/HealthCheck",
            request_serializer=empty_pb2.Empty.SerializeToString,
            response_deserializer=empty_pb2.Empty.FromString,
        )
        assert status_of(lambda: probe(empty_pb2.Empty())) is grpc.StatusCode.UNIMPLEMENTED  # noqa: B023
    said = generate_latest(front.cell.metrics.registry).decode()
    assert "sglang" not in said and "HealthCheck" not in said
