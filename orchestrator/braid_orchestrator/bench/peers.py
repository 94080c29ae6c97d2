"""What is measured: this model in transformers, and in cells of any placement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.devices import CPU
from braid_wire.layers import Mode, Role
from transformers import AutoModelForCausalLM

from braid_orchestrator.cell import Cell
from braid_orchestrator.memory import SequenceMemory, Span

# Steps of a size after which a cell knows whether two lanes are faster.
_LANE_TRIALS = 12


class Peer(ABC):
    """Runs B sequences of equal length side by side."""

    name: str
    begins_cold: bool = False
    """Whether a turn begins with memory that was mapped anew."""

    def warm_up(self, prompts: IntArray) -> None:
        """Run prompts [B, L] until another one takes as long as those that follow."""
        self.enter()
        self.prefill(prompts)

    def enter(self) -> None:
        """Called when its turn begins."""
        return

    @abstractmethod
    def prefill(self, prompts: IntArray) -> torch.Tensor:
        """Begin anew with prompts [B, L]; logits [B, V] after the last tokens."""

    @abstractmethod
    def decode(self, tokens: IntArray) -> torch.Tensor:
        """Feed one token to each sequence, [B]; logits [B, V] after them."""


class TransformersPeer(Peer):
    """transformers in this process, with its own cache.

    Args:
        directory: checkpoint.
        dtype: of its weights.
        device: where they lie.
    """

    name = "transformers"

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._device = device
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        self._model = model.eval().to(device)
        self._cache: object = None

    @torch.inference_mode()
    def prefill(self, prompts: IntArray) -> torch.Tensor:
        self.forget()  # before the new cache grows
        out = self._model(torch.from_numpy(prompts).to(self._device), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def decode(self, tokens: IntArray) -> torch.Tensor:
        ids = torch.from_numpy(tokens)[:, None].to(self._device)
        out = self._model(ids, past_key_values=self._cache, use_cache=True)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def forget(self) -> None:
        """Give its cache back."""
        self._cache = None


class CellPeer(Peer):
    """A cell, driven step by step.

    Args:
        name: in the report.
        cell: what runs.
        shares_services: whether other cells use its services too, so that each of its turns begins
            by configuring them.
    """

    def __init__(self, name: str, cell: Cell, shares_services: bool = False) -> None:
        self.name = name
        self.cell = cell
        self.begins_cold = shares_services
        self._memory = cell.walker.memory(Role.TARGET)
        self._sequences: list[SequenceMemory] = []

    def warm_up(self, prompts: IntArray) -> None:
        self.enter()
        begin = self.cell.walker.steps
        self.prefill(prompts)
        while self.cell.store.lanes > 1 and self.cell.walker.steps < begin + _LANE_TRIALS:
            self.prefill(prompts)

    def enter(self) -> None:
        if self.begins_cold:
            self.cell.dispatcher.connect()

    def prefill(self, prompts: IntArray) -> torch.Tensor:
        self._begin(len(prompts))
        logits = [torch.empty(0)] * len(prompts)
        per_step = max(self.cell.options.limits.max_tokens // prompts.shape[1], 1)
        for first in range(0, len(prompts), per_step):
            group = range(first, min(first + per_step, len(prompts)))
            found = self._feed([(self._sequences[i], prompts[i]) for i in group])
            for index, row in zip(group, found, strict=True):
                logits[index] = row
        return torch.stack(logits)

    def prefill_pieces(self, prompts: IntArray, piece: int) -> torch.Tensor:
        """Begin anew with sequences that hold as much as prompts [B, L] would, far cheaper.

        Each sequence is strung together from prompts of `piece` tokens that were computed apart: its
        pages hold the keys and values of all of them, its state is that of the last one. Steps that
        follow read as much as after one long prompt, but the model says something else.

        Args:
            prompts: [B, L].
            piece: tokens, whole pages; the last piece may be shorter.
        """
        self._begin(len(prompts))
        logits = []
        for index, prompt in enumerate(prompts):
            pages: list[int] = []
            part = self._sequences[index]
            for start in range(0, len(prompt), piece):
                if start:
                    # The pages stay with the whole; the state of a part is not needed any more.
                    pages, part.pages = [*pages, *part.pages], []
                    self._memory.release(part)
                    part = SequenceMemory(index)
                found = self._feed([(part, prompt[start : start + piece])])
            part.pages = [*pages, *part.pages]
            part.length = len(prompt)
            self._sequences[index] = part
            logits.append(found[0])
        return torch.stack(logits)

    def decode(self, tokens: IntArray) -> torch.Tensor:
        parts = [(s, tokens[i : i + 1]) for i, s in enumerate(self._sequences)]
        return self._run(parts, Mode.DECODE)

    def end(self) -> None:
        """Give all memory back."""
        self._begin(0)

    def memory_bytes(self) -> tuple[int, int]:
        """What the pools have handed out: bytes of pages, and of slots."""
        pages, slots = self._memory.pages, self._memory.slots
        return (
            pages.used * pages.unit_bytes if pages is not None else 0,
            slots.used * slots.unit_bytes if slots is not None else 0,
        )

    def _begin(self, count: int) -> None:
        for sequence in self._sequences:
            self._memory.release(sequence)
        self._sequences = [SequenceMemory(index) for index in range(count)]

    def _feed(self, parts: list[tuple[SequenceMemory, IntArray]]) -> torch.Tensor:
        """Prompts in chunks of the token budget; logits after the last token of each."""
        budget = self.cell.options.limits.max_tokens
        if len(parts) == 1 and len(parts[0][1]) > budget:
            sequence, prompt = parts[0]
            for start in range(0, len(prompt) - budget, budget):
                self._run([(sequence, prompt[start : start + budget])], Mode.EXTEND)
            parts = [(sequence, prompt[sequence.length :])]
        return self._run(parts, Mode.EXTEND)

    def _run(self, parts: list[tuple[SequenceMemory, IntArray]], mode: Mode) -> torch.Tensor:
        spans = [Span(sequence, tokens, mode) for sequence, tokens in parts]
        ends = np.cumsum([len(tokens) for _, tokens in parts]) - 1
        return self.cell.walker.run(spans, ends)
