"""What stands behind the figures of a benchmark: turns, agreement, sequences strung together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from braid_orchestrator.bench import stats, tensor_bytes
from braid_orchestrator.bench.cells import Services
from braid_orchestrator.bench.check import expect_close, expect_same
from braid_orchestrator.bench.load import busy_cores
from braid_orchestrator.bench.options import BenchOptions
from braid_orchestrator.bench.peers import CellPeer, Peer
from braid_orchestrator.bench.runs import measure_decode, measure_prefill
from braid_orchestrator.cell import CellOptions
from braid_orchestrator.store import Limits
from braid_wire.batch import IntArray
from braid_wire.errors import ServiceFault
from cli_harness import Place, alive, eventually

OPTIONS = BenchOptions(steps=3, repeats=2)


class Made(Peer):
    """Logits that depend on the tokens alone; from some call of decode on, wrong by `error`."""

    def __init__(self, name: str, seconds: float = 0.0, error: float = 0.0, wrong_from: int = 0) -> None:
        self.name = name
        self.turns = 0
        self.fed: list[IntArray] = []
        self._seconds, self._error, self._wrong_from = seconds, error, wrong_from

    def enter(self) -> None:
        self.turns += 1

    def prefill(self, prompts: IntArray) -> torch.Tensor:
        time.sleep(self._seconds)
        self.fed.append(prompts)
        return torch.from_numpy(np.cos(prompts.sum(1, keepdims=True) + np.arange(11.0)))

    def decode(self, tokens: IntArray) -> torch.Tensor:
        logits = self.prefill(tokens[:, None])
        if len(self.fed) > self._wrong_from:
            logits[-1, 3] += self._error
        return logits


def test_peers_take_turns_on_the_same_tokens() -> None:
    peers = Made("transformers", 0.002), Made("braid", 0.001)
    measured = measure_decode(peers, OPTIONS, batch=2, context=5, vocab_size=50)
    first, second = (peer.fed for peer in peers)
    assert len(first) == 1 + 3 * 4  # a prompt; three turns of an untimed step and three timed ones
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert first[0].shape == (2, 5) and {len(tokens) for tokens in first[1:]} == {2}
    assert [len(seconds) for seconds in measured.seconds.values()] == [2, 2]
    assert [peer.turns for peer in peers] == [4, 4]
    assert all(value >= 0.002 for value in measured.seconds["transformers"])
    measured = measure_prefill(peers, OPTIONS, batch=2, context=5, vocab_size=50)
    assert [len(seconds) for seconds in measured.seconds.values()] == [2, 2]
    assert all(value >= 0.002 / 5 for value in measured.seconds["transformers"])


@pytest.mark.parametrize("error", [0.1, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("wrong_from", [4, 12])
def test_a_wrong_peer_is_refused_in_whatever_turn(error: float, wrong_from: int) -> None:
    peers = Made("transformers"), Made("braid"), Made("embedded", error=error, wrong_from=wrong_from)
    with pytest.raises(ServiceFault, match=r"embedded differs from transformers by .*; nothing is reported"):
        measure_decode(peers, OPTIONS, batch=2, context=5, vocab_size=50)


def test_agreement_is_relative_to_the_range_of_the_reference() -> None:
    right = torch.linspace(-500, 500, 40).reshape(2, 20)
    near = right + 0.9
    expect_close({"transformers": right, "braid": near}, "transformers", torch.float32)
    with pytest.raises(ServiceFault, match=r"braid differs from transformers by 1\.10e\+00"):
        expect_close({"transformers": right, "braid": right + 1.1}, "transformers", torch.float32)
    expect_close({"transformers": right, "braid": right + 40}, "transformers", torch.bfloat16)
    with pytest.raises(ServiceFault, match="differs"):
        expect_close({"transformers": right, "braid": right[:1]}, "transformers", torch.float32)
    expect_same({"one": right, "other": right.clone()}, "one")
    with pytest.raises(ServiceFault, match="other differs from one in its bits"):
        expect_same({"one": right, "other": right.nextafter(near)}, "one")


def test_statistics() -> None:
    assert stats.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == 2.0
    assert stats.spread([1.0, 2.0, 4.0]) == 1.5
    assert stats.quantile([1e-6, 2e-6, 3e-6], 0.5) == 2.0
    assert stats.quantile([], 0.5) is None
    orders = [stats.in_turn(["a", "b", "c"], repeat) for repeat in range(3)]
    assert [order[0] for order in orders] == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 2, 5), (1,), (0, 4)])
def test_tensors_travel_as_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(np.prod(shape, dtype=int)).reshape(shape).to(dtype)
    data = tensor_bytes.pack("x", tensor).SerializeToString()
    message = tensor_bytes.Tensor.FromString(data)
    assert message.name == "x"
    found = tensor_bytes.unpack(message)
    assert found.dtype is dtype and torch.equal(found, tensor)
    target = torch.full(shape, 7, dtype=dtype)
    tensor_bytes.copy_into(message, target)
    assert torch.equal(target, tensor)


def test_every_core_is_busy_and_then_no_more() -> None:
    with busy_cores() as count:
        mine = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
        spinning = [int(word) for word in mine.split()][-count:]
        assert count == len(os.sched_getaffinity(0))
        cores = [os.sched_getaffinity(pid) for pid in spinning]
        assert sorted(map(min, cores)) == sorted(os.sched_getaffinity(0)) and set(map(len, cores)) == {1}
        before = [cpu_ticks(pid) for pid in spinning]
        assert eventually(
            lambda: all(cpu_ticks(pid) > ticks for pid, ticks in zip(spinning, before, strict=True))
        )
    assert not any(alive(pid) for pid in spinning)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.fixture(scope="module")
def peer(model: Path, place: Place) -> Iterator[CellPeer]:
    """A cell in this process, with room for two long sequences."""
    limits = Limits(max_tokens=64, max_sequences=2, max_context=256, page_size=8)
    patch = pytest.MonkeyPatch()
    patch.setenv("BRAID_RUNTIME_DIR", str(place.runtime))
    with (
        Services(1) as services,
        services.embedded(model, CellOptions(limits=limits, segments="off")) as cell,
    ):
        yield CellPeer("embedded", cell)
    patch.undo()


def prompts(batch: int, length: int) -> IntArray:
    return np.random.default_rng(3).integers(0, 256, (batch, length))


def test_one_piece_is_a_prompt(peer: CellPeer) -> None:
    given = prompts(2, 40)
    whole = peer.prefill(given)
    step = peer.decode(given[:, 0])
    held = peer.memory_bytes()
    assert torch.equal(peer.prefill_pieces(given, 64), whole)
    assert torch.equal(peer.decode(given[:, 0]), step)
    assert peer.memory_bytes() == held


def test_pieces_hold_as_much_as_a_prompt(peer: CellPeer) -> None:
    given = prompts(2, 150)
    peer.prefill(given)
    held = peer.memory_bytes()
    strung = peer.prefill_pieces(given, 32)
    assert peer.memory_bytes() == held
    # The last piece begins anew at 128, and says what a prompt of its own says.
    after = [peer.decode(given[:, at]) for at in range(20)]
    assert torch.isfinite(torch.stack(after)).all()
    torch.testing.assert_close(peer.prefill(given[:, 128:]), strung)
    # But what follows reads the pages of the other pieces.
    assert (peer.decode(given[:, 0]) - after[0]).abs().max() > 0.01
    peer.end()
    assert peer.memory_bytes() == (0, 0)


def test_services_end_with_their_block(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(place.runtime))
    with Services(1) as services:
        path = services.directory
        assert path.is_dir()
    assert not path.exists()
    with pytest.raises(ServiceFault, match="outside their block"):
        services.start(("doorbells",))
