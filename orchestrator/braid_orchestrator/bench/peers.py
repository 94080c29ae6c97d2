"""What is measured: this model in transformers, in a cell of three processes, in a cell in one."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.layers import Kind, Mode, Role
from braid_wire.runtime_dir import RuntimeDirectory
from transformers import AutoModelForCausalLM

from braid_orchestrator.cell import Cell, CellOptions
from braid_orchestrator.link import Link, RemoteLink
from braid_orchestrator.memory import SequenceMemory, Span
from braid_orchestrator.supervisor import Program, Ready, Supervisor

_START_S = 120.0


class Peer(ABC):
    """Runs B sequences of equal length side by side."""

    name: str

    @abstractmethod
    def prefill(self, prompts: IntArray) -> torch.Tensor:
        """Begin anew with prompts [B, L]; logits [B, V] after the last tokens."""

    @abstractmethod
    def decode(self, tokens: IntArray) -> torch.Tensor:
        """Feed one token to each sequence, [B]; logits [B, V] after them."""


class TransformersPeer(Peer):
    """transformers in this process, with its own cache."""

    name = "transformers"

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True
        ).eval()
        self._cache: object = None

    @torch.inference_mode()
    def prefill(self, prompts: IntArray) -> torch.Tensor:
        out = self._model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def decode(self, tokens: IntArray) -> torch.Tensor:
        ids = torch.from_numpy(tokens)[:, None]
        out = self._model(ids, past_key_values=self._cache, use_cache=True)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits


class CellPeer(Peer):
    """A cell, driven step by step."""

    def __init__(self, name: str, cell: Cell) -> None:
        self.name = name
        self._cell = cell
        self._sequences: list[SequenceMemory] = []

    def prefill(self, prompts: IntArray) -> torch.Tensor:
        memory = self._cell.walker.memory(Role.TARGET)
        for sequence in self._sequences:
            memory.release(sequence)
        self._sequences = [SequenceMemory(index) for index in range(len(prompts))]
        logits = [torch.empty(0)] * len(prompts)
        per_step = max(self._cell.options.limits.max_tokens // prompts.shape[1], 1)
        for first in range(0, len(prompts), per_step):
            group = range(first, min(first + per_step, len(prompts)))
            found = self._feed([(self._sequences[i], prompts[i]) for i in group])
            for index, row in zip(group, found, strict=True):
                logits[index] = row
        return torch.stack(logits)

    def _feed(self, parts: list[tuple[SequenceMemory, IntArray]]) -> torch.Tensor:
        """Prompts in chunks of the token budget; logits after the last token of each."""
        budget = self._cell.options.limits.max_tokens
        if len(parts) == 1 and len(parts[0][1]) > budget:
            sequence, prompt = parts[0]
            for start in range(0, len(prompt) - budget, budget):
                self._run([(sequence, prompt[start : start + budget])], Mode.EXTEND)
            parts = [(sequence, prompt[sequence.length :])]
        return self._run(parts, Mode.EXTEND)

    def decode(self, tokens: IntArray) -> torch.Tensor:
        parts = [(s, tokens[i : i + 1]) for i, s in enumerate(self._sequences)]
        return self._run(parts, Mode.DECODE)

    def _run(self, parts: list[tuple[SequenceMemory, IntArray]], mode: Mode) -> torch.Tensor:
        spans = [Span(sequence, tokens, mode) for sequence, tokens in parts]
        ends = np.cumsum([len(tokens) for _, tokens in parts]) - 1
        return self._cell.walker.run(spans, ends)


@contextmanager
def cell_peer(directory: Path, options: CellOptions, threads: int) -> Iterator[tuple[CellPeer, Cell]]:
    """A cell whose services are processes of their own."""
    runtime = RuntimeDirectory.create()
    names = {Kind.FULL: "braid_full_attn", Kind.LINEAR: "braid_linear_attn"}
    addresses = {kind: f"unix:{runtime.path}/{kind.value}.sock" for kind in names}
    programs = [_program(kind.value, names[kind], addresses[kind], threads) for kind in names]
    supervisor = Supervisor(programs)
    supervisor.start()
    try:
        supervisor.wait_ready(_START_S)
        links: dict[Kind, Link] = {kind: RemoteLink(kind, addresses[kind]) for kind in names}
        cell = Cell(directory, links, runtime.path / "arenas.sock", options)
        try:
            yield CellPeer("braid", cell), cell
        finally:
            cell.close()
    finally:
        supervisor.stop()
        supervisor.join(30)
        runtime.close()


def _program(name: str, module: str, address: str, threads: int) -> Program:
    command = [sys.executable, "-m", module, "--address", address, "--metrics-port", "0"]
    command += ["--threads", str(threads), "--log-level", "warning", "--parent", str(os.getpid())]

    def line(last: Ready | None) -> list[str]:
        return command

    return Program(name, line, {**os.environ, "OMP_NUM_THREADS": str(threads)})
