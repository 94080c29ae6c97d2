"""`attach(model)`: a transformers model whose attention runs in two other processes."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import copy
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from braid_orchestrator.attach import Attachment, BraidCache, attach
from braid_orchestrator.store import Limits
from braid_wire.errors import BraidError, ConfigInvalid, RequestInvalid, StepOrder
from braid_wire.layers import Kind
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
LIMITS = Limits(max_tokens=48, max_sequences=12, max_context=128, page_size=8, pool_bytes=1 << 25)
CLOSE = 2e-4
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def padded(lengths: tuple[int, ...], vocabulary: int = 1000) -> dict[str, torch.Tensor]:
    """Random rows of these lengths, padded on the left."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(8, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model as transformers runs it."""
    return load()


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attachment]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BRAID_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        with attach(load(), LIMITS, threads=1) as found:
            yield found


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "attached" in request.fixturenames:
        found = request.getfixturevalue("attached")
        gc.collect()
        assert not any(found.used.values())


def same(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


@torch.no_grad()
def test_logits_are_those_of_the_model(attached: Attachment, reference: Any) -> None:
    batch = padded((20, 13, 1))  # 60 columns do not fit into a step of 48 tokens
    output = attached.model(**batch)
    assert isinstance(output.past_key_values, BraidCache)
    same(output.logits, reference(**batch).logits, batch["attention_mask"])
    assert attached.used["pages"] == 3 + 2 + 1
    embeds = reference.get_input_embeddings()(batch["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "use_cache": False}
    output = attached.model(**given, output_hidden_states=True)
    expected = reference(**given, output_hidden_states=True)
    assert output.past_key_values is None
    same(output.logits, expected.logits, batch["attention_mask"])
    for found, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        same(found, wanted, batch["attention_mask"])


@torch.no_grad()
def test_the_cache_goes_on_in_pieces_and_after_a_copy(attached: Attachment, reference: Any) -> None:
    batch = padded((31, 9))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = reference(**batch).logits
    cache, found = attached.new_cache(), []
    for begin, end in ((0, 13), (13, 29), (29, 30), (30, 31)):  # the first is padding alone for one row
        output = attached.model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        assert output.past_key_values is cache
        found.append(output.logits)
        if end == 29:
            branch = copy.deepcopy(cache)
    same(torch.cat(found, dim=1), expected, mask)
    again = attached.model(ids[:, 29:], attention_mask=mask, past_key_values=branch).logits
    same(again, expected[:, 29:])


@torch.no_grad()
def test_a_step_of_padding_alone(attached: Attachment, reference: Any) -> None:
    batch = padded((70,))
    batch["attention_mask"][:, :55] = 0  # the first 48 columns are a step
    same(attached.model(**batch).logits, reference(**batch).logits, batch["attention_mask"])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False, "max_new_tokens": 4},
    ],
    ids=["greedy", "sampled", "beams", "uncached"],
)
def test_generate_gives_the_same_tokens(attached: Attachment, reference: Any, how: dict[str, Any]) -> None:
    batch = padded((17, 8, 3))
    answers = []
    for model in (reference, attached.model):
        torch.manual_seed(3)
        answers.append(model.generate(**batch, **{**GREEDY, **how}))
    assert torch.equal(*answers)


def test_a_conversation_goes_on_from_its_cache(attached: Attachment, reference: Any) -> None:
    ids = padded((12,))["input_ids"]
    answers = []
    for model in (reference, attached.model):
        first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, padded((5,))["input_ids"]], dim=1)
        answers.append(model.generate(turn, past_key_values=first.past_key_values, **GREEDY))
    assert torch.equal(*answers)


class KillAfter(torch.nn.Module):
    """A hook that kills a service when a layer of the body is reached for the nth time."""

    def __init__(self, pid: int, calls: int) -> None:
        super().__init__()
        self.pid, self.calls = pid, calls

    def forward(self, *_: Any) -> None:
        self.calls -= 1
        if self.calls == 0:
            os.kill(self.pid, signal.SIGKILL)


def test_killed_services_cost_no_token(attached: Attachment, reference: Any) -> None:
    batch, before = padded((15, 6)), attached.replays
    hooks = [
        attached.model.model.layers[layer].register_forward_pre_hook(KillAfter(attached.pid(kind), 4))
        for layer, kind in ((2, Kind.FULL), (5, Kind.LINEAR))
    ]
    try:
        found = attached.model.generate(**batch, **GREEDY)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(found, reference.generate(**batch, **GREEDY))
    assert attached.replays > before


def test_a_gradient_is_refused_and_a_loss_is_not(attached: Attachment, reference: Any) -> None:
    ids = padded((10,))["input_ids"]
    loss = attached.model(ids, labels=ids).loss
    same(loss.detach(), reference(ids, labels=ids).loss.detach())
    with pytest.raises(RequestInvalid) as caught:
        loss.backward()
    assert caught.value.metadata["field"] == "backward"
    attached.model.zero_grad()


HOLES = torch.tensor([[1, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("output_attentions", {"output_attentions": True}),
        ("attention_mask", {"attention_mask": torch.zeros(1, 1, 5, 5)}),
        ("attention_mask", {"attention_mask": HOLES}),
        ("attention_mask", {"attention_mask": HOLES[:, :3]}),
        ("attention_mask", {"attention_mask": torch.tensor([[0, 1, 1, 1, 2]])}),
        ("position_ids", {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}),
        ("cu_seq_lens_q", {"cu_seq_lens_q": torch.tensor([0, 2, 5])}),
        ("past_key_values", {"past_key_values": DynamicCache()}),
        ("max_context", {"input_ids": torch.ones(1, 129, dtype=torch.int64)}),
        ("max_sequences", {"input_ids": torch.ones(13, 2, dtype=torch.int64)}),
    ],
)
def test_what_is_not_done_is_refused_by_name(attached: Attachment, field: str, asked: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        attached.model(**{"input_ids": torch.ones(1, 5, dtype=torch.int64), **asked})
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("cache_implementation", {"cache_implementation": "static"}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_ways_to_generate_that_are_refused(attached: Attachment, field: str, asked: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        attached.model.generate(padded((4,))["input_ids"], **GREEDY, **asked)
    assert caught.value.metadata["field"] == field


def test_caches_and_modes_that_are_refused(attached: Attachment) -> None:
    model, batch = attached.model, padded((6, 3))
    cache = model(**batch).past_key_values
    for field, call in (
        ("past_key_values", lambda: model(batch["input_ids"][:1], past_key_values=cache)),
        ("attention_mask", lambda: model(batch["input_ids"][:, :1], past_key_values=cache)),
        (
            "attention_mask",
            lambda: model(
                batch["input_ids"][:, :1],
                past_key_values=cache,
                attention_mask=torch.ones(2, 7, dtype=torch.int64),
            ),
        ),
        ("crop", lambda: cache.crop(-1)),
    ):
        with pytest.raises(RequestInvalid) as caught:
            call()
        assert caught.value.metadata["field"] == field
    cache.release()
    with pytest.raises(StepOrder):
        model(**batch, past_key_values=cache)
    model.train()
    with pytest.raises(RequestInvalid, match="training"):
        model(**batch)
    model.eval()
    with pytest.raises(StepOrder):
        attach(model)
    with pytest.raises(ConfigInvalid):
        attach(model.model)


def _bamba() -> Any:
    return BambaForCausalLM(
        BambaConfig(
            vocab_size=131, hidden_size=60, intermediate_size=70, num_hidden_layers=3, attn_layer_indices=[1],
            num_attention_heads=6, num_key_value_heads=2, mamba_n_heads=6, mamba_n_groups=3, mamba_d_state=19,
            mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=16, initializer_range=0.05,
        )
    )  # fmt: skip


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=131, hidden_size=60, intermediate_size=70, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=22, initializer_range=0.1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [_bamba, _llama], ids=["bamba", "llama"])
def test_other_families_and_the_way_back(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
    torch.manual_seed(0)
    model, batch = make().eval(), padded((19, 7), 131)
    modules = {name: (type(found), set(vars(found))) for name, found in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = {**GREEDY, "min_new_tokens": 12}
    with torch.no_grad():
        expected = model(**batch).logits
    tokens, beams = model.generate(**batch, **how), model.generate(**batch, **how, num_beams=2)
    with attach(model, LIMITS, threads=1) as attachment:
        assert set(model.state_dict()) == set(state)
        with torch.no_grad():
            kept = model(**batch)
        same(kept.logits, expected, batch["attention_mask"])
        assert torch.equal(model.generate(**batch, **how), tokens)
        assert torch.equal(model.generate(**batch, **how, num_beams=2), beams)
    assert not attachment.attached
    assert {name: (type(found), set(vars(found))) for name, found in model.named_modules()} == modules
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(BraidError):
        model(**batch, past_key_values=kept.past_key_values)
