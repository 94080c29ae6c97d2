"""Three real processes give the logits and the text that transformers gives alone."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import Launched, launch
from braid_orchestrator.settings import Settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
TOLERANCE = 2e-4

# name → (query heads, key/value heads, head dim, GDN key heads, value heads, key dim, value dim, experts)
SHAPES = {
    "next-odd": ("next", 6, 3, 36, 3, 6, 32, 48, 4),
    "next-wide": ("next", 5, 1, 128, 1, 5, 128, 64, 0),
    "3.5-even": ("3.5", 4, 4, 64, 2, 8, 64, 128, 0),
    "3.5-odd": ("3.5", 7, 7, 40, 5, 5, 40, 32, 0),
}


@dataclass(frozen=True)
class Running:
    """A cell of three processes, a client of it, and the same model in transformers."""

    cell: Launched
    client: Client
    reference: PreTrainedModel

    def expected(self, ids: list[int]) -> torch.Tensor:
        """float32 [L, V]: one forward without a cache."""
        with torch.no_grad():
            logits: torch.Tensor = self.reference(torch.tensor([ids]), use_cache=False).logits[0]
        return logits


def build(shape: tuple[str, int, int, int, int, int, int, int, int], directory: Path) -> None:
    """A random checkpoint of one shape."""
    kind, q, kv, dim, hk, hv, dk, dv, experts = shape
    common = {
        "vocab_size": 151,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 4,
        "num_attention_heads": q,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "linear_num_key_heads": hk,
        "linear_num_value_heads": hv,
        "linear_key_head_dim": dk,
        "linear_value_head_dim": dv,
        "max_position_embeddings": 2048,
        "initializer_range": 0.06,
    }
    torch.manual_seed(q * 100 + hv)
    model: PreTrainedModel
    if kind == "next":
        mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        dense = {"num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}
        extra = {**mixture, "shared_expert_intermediate_size": 24} if experts else dense
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**common, **extra))
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common))
    # Trained models spread these; the initial values (all one) would hide a mix-up between heads.
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_bias", "A_log", "norm.weight")):
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(directory)


def run(directory: Path) -> Iterator[Running]:
    settings = Settings(directory, max_tokens=128, max_sequences=16, max_context=1024, threads=1)
    with launch(settings) as cell, cell.client() as client:
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        yield Running(cell, client, reference)


@pytest.fixture(scope="module", params=SHAPES)
def random_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp(request.param)
    build(SHAPES[request.param], directory)
    yield from run(directory)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    yield from run(TINY)


def compare(running: Running, lengths: tuple[int, ...], chunk: int, tail: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vocab = running.reference.config.vocab_size
    sequences = [random.integers(0, vocab, length).tolist() for length in lengths]
    scores = running.client.score(sequences, chunk=chunk, decode_tail=tail, want_logits=True)
    for ids, logits, logprobs in zip(sequences, scores.logits, scores.logprobs, strict=True):
        expected = running.expected(ids)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        chosen = expected[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), chosen, atol=TOLERANCE, rtol=0)


MANNERS = [(0, 0), (1, 0), (7, 0), (64, 0), (7, 5), (0, 100)]
IDS = [f"chunk {chunk or 'none'}, {tail} decoded" for chunk, tail in MANNERS]


@pytest.mark.parametrize(("chunk", "tail"), MANNERS, ids=IDS)
def test_logits_of_random_models(random_model: Running, chunk: int, tail: int) -> None:
    compare(random_model, (1, 2, 65, 130), chunk, tail, seed=chunk * 10 + tail)


@pytest.mark.parametrize(("chunk", "tail"), MANNERS, ids=IDS)
def test_logits_of_the_trained_model(tiny: Running, chunk: int, tail: int) -> None:
    compare(tiny, (1, 3, 64, 200), chunk, tail, seed=chunk * 10 + tail)


def test_greedy_text_is_identical(tiny: Running) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompts = ["def read(self, path):\n", "import os\n\nclass ", "for name in "]
    generations = [tiny.client.generate(prompt, max_tokens=48) for prompt in prompts]
    for prompt, generation in zip(prompts, generations, strict=True):
        text = "".join(chunk.text for chunk in generation)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = tiny.reference.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(out, skip_special_tokens=True)
        stop = tiny.reference.generation_config.eos_token_id
        kept = [token for token in out.tolist() if token not in (stop if isinstance(stop, list) else [stop])]
        assert list(generation.completion.token_ids) == kept


def test_recall_equals_transformers_and_is_high(tiny: Running) -> None:
    cases = [json.loads(line) for line in (TINY / "recall.jsonl").read_text().splitlines()]
    cases = [case for case in cases if case["pairs"] >= 4]
    assert len(cases) >= 50
    assert all(len(set(case["candidate_ids"])) >= 4 for case in cases)  # chance is 25 % or less
    scores = tiny.client.score([case["ids"] for case in cases], want_logits=True)
    ours = [int(logits[-1].argmax()) for logits in scores.logits]
    theirs = [int(tiny.expected(case["ids"])[-1].argmax()) for case in cases]
    assert ours == theirs
    right = sum(token == case["answer_id"] for token, case in zip(ours, cases, strict=True))
    assert right / len(cases) >= 0.9
