"""Roles of random small models run in both ways, with layers that a fixed random map stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from braid_orchestrator.body import Body, LoadRequest, load_body
from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.layer_plan import build_plans, load_config
from braid_orchestrator.segments.base import Cut, SegmentedRole, called_side
from braid_orchestrator.segments.cut import cut
from braid_orchestrator.segments.trace import trace
from braid_orchestrator.store import Buffers
from braid_wire.layers import Geometry, Kind, LayerSpec

MAX_TOKENS = 40
COUNTS = (1, 2, 7, 33)

Rows = Mapping[str, torch.Tensor]


def load(model: Path, dtype: torch.dtype = torch.float32) -> Body:
    """The body of a checkpoint."""
    return load_body(LoadRequest(model, build_plans(load_config(model)), dtype))


def cut_of(role: RoleBody) -> Cut:
    """A role traced and cut."""
    return cut(trace(role))


def layer(spec: LayerSpec, side: Kind, inputs: Rows) -> torch.Tensor:
    """What stands for a layer: each token's inputs by a matrix that only this layer has, within ±1."""
    geometry = spec.geometry(side)
    flat = torch.cat([inputs[name].flatten(1).float() for name in geometry.inputs()], dim=1)
    random = torch.Generator().manual_seed(2 * spec.layer_id + (side is Kind.FULL))
    weight = torch.randn(flat.shape[1], math.prod(geometry.output()), generator=random)
    found = torch.tanh(flat @ weight.to(flat.device) / math.sqrt(flat.shape[1]))
    return found.view(-1, *geometry.output()).to(next(iter(inputs.values())).dtype)


class PoisonedBuffers:
    """Buffers of a role's layers, shared by layers of one geometry as a cell's are, full of NaN."""

    def __init__(self, role: RoleBody, rows: int = MAX_TOKENS) -> None:
        self._specs = {spec.layer_id: spec for spec in role.plan}
        self._rows, self._dtype = rows, role.dtype
        self.made: dict[Geometry, Buffers] = {}

    def __call__(self, layer_id: int, side: Kind) -> Buffers:
        geometry = self._specs[layer_id].geometry(side)
        if geometry not in self.made:
            inputs = {name: self._nan(shape) for name, shape in geometry.inputs().items()}
            self.made[geometry] = Buffers(inputs, self._nan(geometry.output()))
        return self.made[geometry]

    def poison(self) -> None:
        """NaN everywhere again."""
        for tensor in self.tensors():
            tensor.fill_(math.nan)

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [t for one in self.made.values() for t in (*one.inputs.values(), one.output)]

    def written_from(self, row: int) -> bool:
        """Whether anything was written into rows from this one on."""
        return any(bool((~tensor[row:].isnan()).any()) for tensor in self.tensors())

    def _nan(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full((self._rows, *shape), math.nan, dtype=self._dtype)


@dataclass(frozen=True)
class Step:
    """The inputs of one step of a role."""

    ids: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor | None

    @classmethod
    def random(cls, role: RoleBody, tokens: int, seed: int = 0) -> Step:
        """Tokens of several sequences: positions in no order, three different rows for mrope."""
        random = torch.Generator().manual_seed(seed)
        shape = (3, tokens) if role.mrope else (tokens,)
        hidden = torch.randn(tokens, role.hidden_size, generator=random).to(role.dtype)
        return cls(
            torch.randint(0, 90, (tokens,), generator=random),
            torch.randint(0, 300, shape, generator=random),
            hidden if role.draft else None,
        )


@torch.inference_mode()
def as_it_is(role: RoleBody, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, hidden] and logits [T, V] of the body's modules."""
    specs = {spec.layer_id: spec for spec in role.plan}

    def attend(layer_id: int, inputs: Rows, side: Kind | None = None) -> torch.Tensor:
        spec = specs[layer_id]
        return layer(spec, called_side(spec, side), inputs)

    hidden = role.packed(attend, step.ids, step.positions, step.hidden)
    return hidden, role.head(hidden).float()


def in_segments(
    role: RoleBody,
    body: SegmentedRole,
    buffers: Callable[[int, Kind], Buffers],
    step: Step,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of its segments."""
    specs = {spec.layer_id: spec for spec in role.plan}
    tokens = len(step.ids)
    body.start(step.ids, step.positions, step.hidden)
    for segment in body.segments:
        body.run(segment.index)
        for call in segment.calls:
            found = buffers(call.layer_id, call.side)
            inputs = {name: found.inputs[name][:tokens] for name in call.inputs}
            found.output[:tokens] = layer(specs[call.layer_id], call.side, inputs)
    return body.result(), body.logits(torch.arange(tokens))
