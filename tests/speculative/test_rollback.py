"""After a step that verifies, whatever it kept, each mechanism goes on as if the rest had never been fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ling_naive
import mamba_checkpoints
import numpy as np
import pytest
import torch
from braid_orchestrator.body.base import Output
from braid_orchestrator.cell import Cell
from braid_orchestrator.memory import SequenceMemory, Span
from braid_wire.errors import ServiceFault
from braid_wire.layers import Mode, Role
from checkpoints import DENSE, HYBRID, LATENT, QWEN, Case
from harness import sequences
from spec_cells import cell, held, poison

DRAFTED = 4
PROMPT = 11
AFTER = 5
"""Tokens that are decoded behind the step: more than any convolution looks back at."""
CLOSE = 1e-4


def case(family: str, name: str) -> Case:
    return next(one for one in (*DENSE, *QWEN, *HYBRID, *LATENT) if (one.family, one.name) == (family, name))


Save = Callable[[Path], Path]

MODELS: dict[str, tuple[Save, set[str]]] = {
    "qwen3_next": (QWEN[0].save, {"gated_delta", "gqa"}),
    "qwen3_5, short conv": (QWEN[1].save, {"gated_delta", "gqa"}),
    "kimi_linear": (case("kimi_linear", "interleaved").save, {"kimi_delta", "mla"}),
    "minimax": (case("minimax", "alternating").save, {"lightning", "gqa"}),
    "ling": (ling_naive.save, {"lightning", "mla"}),
    "bamba": (lambda path: mamba_checkpoints.save("bamba", path), {"mamba2", "gqa"}),
    "falcon_h1": (lambda path: mamba_checkpoints.save("falcon_h1", path), {"mamba2", "gqa"}),
    "jamba": (lambda path: mamba_checkpoints.save("jamba", path), {"mamba1", "gqa"}),
    "lfm2": (lambda path: mamba_checkpoints.save("lfm2", path), {"short_conv", "gqa"}),
    "deepseek_v3": (case("deepseek_v3", "ranked").save, {"mla"}),
    "mistral, window": (case("mistral", "window").save, {"gqa"}),
}


def feed(running: Cell, spans: Sequence[Span], kept: Sequence[int] | None = None) -> list[torch.Tensor]:
    """One step; float32 [n, V] of each span."""
    lengths = [len(span.tokens) for span in spans]
    keep = None if kept is None else lambda output: kept
    output = running.walker.target(spans, np.arange(sum(lengths)), keep)
    return list(output.logits.split(lengths))


def one_by_one(running: Cell, tokens: np.ndarray) -> torch.Tensor:
    """float32 [L, V]: the prompt in one step, then every token in a step of its own."""
    memory = SequenceMemory(1)
    found = feed(running, [Span(memory, tokens[:PROMPT], Mode.EXTEND)])
    for token in tokens[PROMPT:]:
        found += feed(running, [Span(memory, np.array([token]), Mode.DECODE)])
    running.walker.memory(Role.TARGET).release(memory)
    return torch.cat(found)


def states(running: Cell, memory: SequenceMemory) -> dict[str, torch.Tensor]:
    """What the linear layers keep of a sequence: recurrent states and convolutions, layer by layer."""
    slots = running.walker.memory(Role.TARGET).slots
    if slots is None:
        return {}
    return {
        f"{layer_id} {name}": tensor[memory.slot].clone()
        for (role, layer_id), group in running.store._caches.items()
        for name, tensor in group.items()
        if role is Role.TARGET and name in ("state", "conv")
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_state_behind_every_kept_token_is_the_one_of_that_prefix(name: str, tmp_path: Path) -> None:
    """What the same step leaves behind when it is fed no more than what is kept, states and convolutions."""
    save, mechanisms = MODELS[name]
    with cell(save(tmp_path)) as running:
        poison(running)
        role = running.walker.memory(Role.TARGET)
        (tokens,) = sequences(running.plans.vocab_size, [PROMPT + 1 + DRAFTED], seed=4)

        def left(fed: int, kept: int) -> dict[str, torch.Tensor]:
            memory = SequenceMemory(1)
            feed(running, [Span(memory, tokens[:PROMPT], Mode.EXTEND)])
            feed(running, [Span(memory, tokens[PROMPT : PROMPT + fed], Mode.VERIFY)], [kept])
            found = states(running, memory)
            role.release(memory)
            return found

        for kept in range(1, DRAFTED + 2):
            rolled_back, exact = left(DRAFTED + 1, kept), left(kept, kept)
            assert rolled_back.keys() == exact.keys()
            for key, tensor in exact.items():
                assert bool(tensor.isfinite().all()), key
                # One row of a product may round otherwise in other company, by the body's library.
                torch.testing.assert_close(rolled_back[key], tensor, atol=1e-5, rtol=1e-5, msg=key)
        linear = mechanisms - {"gqa", "mla"}
        assert bool(exact) == bool(linear)
        if linear & {"gated_delta", "kimi_delta", "mamba1", "mamba2", "short_conv"}:
            assert any(key.endswith("conv") for key in exact)


@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_tokens_kept(name: str, tmp_path: Path) -> None:
    save, mechanisms = MODELS[name]
    with cell(save(tmp_path)) as running:
        names = {part for spec in running.plans.target for part in spec.mechanism.split("+")}
        assert names - {"-"} == mechanisms
        poison(running)
        vocab = running.plans.vocab_size
        drafted = sequences(vocab, [PROMPT + 1 + DRAFTED] * (DRAFTED + 1), seed=1)
        after = sequences(vocab, [AFTER] * (DRAFTED + 1), seed=2)
        decoded, prompted = sequences(vocab, [PROMPT + 1 + AFTER, PROMPT + AFTER], seed=3)
        # Sequence n keeps n of its drafted tokens; two more do without drafts, one of them a prompt.
        truths = [
            np.concatenate([tokens[: PROMPT + 1 + kept], more])
            for kept, (tokens, more) in enumerate(zip(drafted, after, strict=True))
        ]
        truths += [decoded, prompted]
        expected = [one_by_one(running, truth) for truth in truths]

        memories = [SequenceMemory(10 + index) for index in range(len(truths))]
        *verifying, decoding, fresh = memories
        feed(
            running,
            [
                Span(memory, tokens[:PROMPT], Mode.EXTEND)
                for memory, tokens in zip([*verifying, decoding], [*drafted, decoded], strict=True)
            ],
        )
        spans = [
            Span(memory, tokens[PROMPT:], Mode.VERIFY)
            for memory, tokens in zip(verifying, drafted, strict=True)
        ]
        spans.insert(2, Span(decoding, decoded[PROMPT : PROMPT + 1], Mode.DECODE))
        spans.append(Span(fresh, prompted[:PROMPT], Mode.EXTEND))
        counts = [1, 2, 1, 3, 4, 5, PROMPT]
        found = feed(running, spans, counts)
        order = [*verifying[:2], decoding, *verifying[2:], fresh]
        for memory, logits, kept in zip(order, found, counts, strict=True):
            truth = expected[memories.index(memory)]
            begin = 0 if memory is fresh else PROMPT
            torch.testing.assert_close(logits[:kept], truth[begin : begin + kept], atol=CLOSE, rtol=0)
        assert [memory.length for memory in memories] == [len(truth) - AFTER for truth in truths]
        for step in range(AFTER):
            nexts = [
                Span(memory, truth[memory.length : memory.length + 1], Mode.DECODE)
                for memory, truth in zip(memories, truths, strict=True)
            ]
            for logits, truth in zip(feed(running, nexts), expected, strict=True):
                row = len(truth) - AFTER + step
                torch.testing.assert_close(logits[0], truth[row], atol=CLOSE, rtol=0)
        role = running.walker.memory(Role.TARGET)
        for memory in memories:
            role.release(memory)
        assert not any(held(role))


@pytest.mark.parametrize("name", ["qwen3_next", "ling"])
def test_a_step_that_fails_while_it_verifies_leaves_what_was(name: str, tmp_path: Path) -> None:
    save, _ = MODELS[name]
    with cell(save(tmp_path)) as running:
        poison(running)
        (tokens,) = sequences(running.plans.vocab_size, [PROMPT + 1 + DRAFTED])
        expected = one_by_one(running, tokens)
        memory = SequenceMemory(5)
        feed(running, [Span(memory, tokens[:PROMPT], Mode.EXTEND)])

        def fail(output: Output) -> list[int]:
            raise ServiceFault("no choice")

        span = Span(memory, tokens[PROMPT:], Mode.VERIFY)
        with pytest.raises(ServiceFault):
            running.walker.target([span], np.arange(1), fail)
        assert memory.length == PROMPT
        again = feed(running, [span], [3])[0]
        torch.testing.assert_close(again, expected[PROMPT:], atol=CLOSE, rtol=0)
        (last,) = feed(running, [Span(memory, tokens[PROMPT + 3 : PROMPT + 4], Mode.DECODE)])
        torch.testing.assert_close(last[0], expected[PROMPT + 3], atol=CLOSE, rtol=0)
