"""What the draft guesses is what its layers give over the whole sequence, whatever was rejected before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ling_naive
import numpy as np
import pytest
import torch
from braid_orchestrator import speculative as speculative_module
from braid_orchestrator.pace import Pace
from braid_orchestrator.request import Failed, Request, Token
from braid_orchestrator.sampling import Sampling
from braid_orchestrator.speculative import Progress, Speculator
from braid_orchestrator.store import Limits
from braid_wire.layers import Role
from checkpoints import QWEN, Case
from drafts import Head, load_head, save_with_mtp
from harness import load_reference, sequences
from spec_cells import cell, held, poison

HEADS = [
    (QWEN[0], ("full",)),
    (QWEN[2], ("linear",)),
    (QWEN[0], ("linear", "full")),
]
GUESSES = 3


@torch.no_grad()
def chained(target: Any, head: Head, tokens: Sequence[int], count: int) -> list[torch.Tensor]:
    """float32 [V] of each guess in turn: stock layers without a cache, over all tokens and guesses so far."""
    ids = torch.tensor([tokens])
    hidden = target.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    following, found = list(tokens[1:]), []
    for _ in range(count):
        embedded = target.model.embed_tokens(torch.tensor([following]))
        fused = head.fc(torch.cat([head.norm_embedding(embedded), head.norm_hidden(hidden)], dim=-1))
        places = torch.arange(len(following))[None]
        out = head.layers.model(inputs_embeds=fused, position_ids=places, use_cache=False).last_hidden_state
        found.append(target.lm_head(out)[0, -1].float())
        following.append(int(found[-1].argmax()))
        hidden = torch.cat([hidden, out[:, -1:]], dim=1)
    return found


def seen_guesses(
    model: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[tuple[list[int], list[int]]]:
    """Tokens and the guesses behind them, of a cell that serves a few requests to their ends."""
    seen: list[tuple[list[int], list[int]]] = []
    follow = Speculator.follow

    def recorded(self: Speculator, progress: Sequence[Progress]) -> None:
        follow(self, progress)
        for one in progress:
            if one.request.guesses:
                seen.append((list(one.request.tokens), [guess.token_id for guess in one.request.guesses]))

    monkeypatch.setattr(Speculator, "follow", recorded)
    with cell(model, speculative=GUESSES, **options) as running:
        poison(running)
        # Chunks of a prompt, a single token, and prompts that begin while others decode.
        prompts = sequences(running.plans.vocab_size, [19, 1, 40, 9], seed=5)
        requests = [
            Request(f"r{index}", prompt, max_tokens=12, chunk=7) for index, prompt in enumerate(prompts)
        ]
        for request in requests:
            running.engine.submit(request)
        for request in requests:
            assert not any(isinstance(event, Failed) for event in request.stream())
        assert not any(held(running.walker.memory(Role.DRAFT)))
    return seen


def expect_chained(model: Path, kinds: tuple[str, ...], seen: Sequence[tuple[list[int], list[int]]]) -> None:
    """Guesses are what stock layers give over all tokens before them."""
    target, head = load_reference(model), load_head(model, kinds)
    for tokens, guesses in seen:
        for token, logits in zip(guesses, chained(target, head, tokens, len(guesses)), strict=True):
            # The likeliest token, but for rounding.
            assert float(logits.max() - logits[token]) < 1e-4
            if token != int(logits.argmax()):
                break


@pytest.mark.parametrize(("case", "kinds"), HEADS, ids=lambda value: str(value))
def test_guesses_are_those_of_the_whole_sequence(
    case: Case, kinds: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_with_mtp(case, tmp_path, kinds)
    seen = seen_guesses(model, monkeypatch)
    assert len(seen) >= 4 * 6
    assert {len(guesses) for _, guesses in seen} == {1, 2, 3}
    expect_chained(model, kinds, seen)


@pytest.mark.parametrize("kinds", [("full",), ("linear",)], ids=str)
@pytest.mark.parametrize("most_pending", [256, 5])
def test_a_draft_that_paused_has_missed_nothing(
    kinds: tuple[str, ...], most_pending: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states that waited, more than one step of the draft holds, lead to the same guesses."""
    model = save_with_mtp(QWEN[2], tmp_path, kinds)
    numbers = itertools.cycle([0, 0, 0, 0, 3, 0, 1, 2])
    monkeypatch.setattr(Pace, "guesses", lambda self, requests: next(numbers))
    monkeypatch.setattr(speculative_module, "_MOST_PENDING", most_pending)
    seen = seen_guesses(model, monkeypatch, limits=Limits(16, 20, 160, 8, 1 << 28))
    assert len(seen) >= 12
    assert {len(guesses) for _, guesses in seen} == {1, 2, 3}
    expect_chained(model, kinds, seen)


def ling(directory: Path) -> Path:
    return ling_naive.save(directory, num_nextn_predict_layers=1, mtp_layer_types=["linear_attention"])


@pytest.mark.parametrize("save", [lambda path: save_with_mtp(QWEN[3], path), ling], ids=["mrope", "ling"])
def test_a_wrong_guess_is_followed_by_the_targets_own_token(
    save: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = save(tmp_path)

    def made(speculative: int) -> list[list[int]]:
        with cell(model, speculative=speculative) as running:
            poison(running)
            requests = [
                Request(f"r{index}", prompt, Sampling(temperature, seed=index, top_k=40), max_tokens=40)
                for index, prompt in enumerate(sequences(running.plans.vocab_size, [20, 33, 7], seed=1))
                for temperature in [0.0 if index == 0 else 0.8]
            ]
            for request in requests:
                running.engine.submit(request)
            found = [[e.token_id for e in r.stream() if isinstance(e, Token)] for r in requests]
            metrics = running.metrics
            counts = metrics.accepted_tokens._value.get(), metrics.rejected_tokens._value.get()
            assert all(counts) if speculative else not any(counts)
            return found

    alone = made(0)
    assert [len(tokens) for tokens in alone] == [40, 40, 40]
    assert made(4) == alone
    assert np.unique(alone).size > 10
