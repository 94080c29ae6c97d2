"""A traced body against the body itself, on a few tokens, before it is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from braid_wire.layers import Kind

from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.segments.base import (
    RESULT,
    Cut,
    SegmentsUnavailable,
    called_side,
    input_name,
    output_name,
)
from braid_orchestrator.segments.eager import EagerCompiler
from braid_orchestrator.store import Buffers

# One token is a case of its own in code that looks at sizes; the other number was no example of the trace.
_COUNTS = (1, 3)
_SIDES = (Kind.FULL, Kind.LINEAR)
# Of the largest value: a trace runs the same operators, so any true difference is far larger.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check(role: RoleBody, cut: Cut) -> None:
    """Run both on the same tokens, with noise for what layers answer, and compare what layers are given.

    Raises:
        SegmentsUnavailable: they differ; the first value that does is named.
    """
    for tokens in _COUNTS:
        probe = _Probe(role, tokens)
        wanted, found = probe.walked(), probe.run(cut)
        for name, value in wanted.items():
            if not _close(found[name], value):
                raise SegmentsUnavailable(f"the trace computes another {name} for {tokens} token(s)")


class _Probe:
    """Some tokens of one role, and what each of its layers answers."""

    def __init__(self, role: RoleBody, tokens: int) -> None:
        self._role = role
        self._tokens = tokens
        self._specs = {spec.layer_id: spec for spec in role.plan}
        self._random = torch.Generator().manual_seed(tokens)
        shape = (3, tokens) if role.mrope else (tokens,)
        self._ids = torch.arange(tokens, device=role.device)
        self._positions = torch.randint(0, 50, shape, generator=self._random).to(role.device)
        self._hidden = self._noise(role.hidden_size) if role.draft else None
        self._answers = {
            output_name(spec.layer_id, side): self._noise(*spec.geometry(side).output())
            for side in _SIDES
            for spec in role.plan.side(side)
        }

    @torch.inference_mode()
    def walked(self) -> dict[str, torch.Tensor]:
        """Inputs of all calls, and the result, of the body as it is."""
        found: dict[str, torch.Tensor] = {}

        def attend(
            layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None
        ) -> torch.Tensor:
            kind = called_side(self._specs[layer_id], side)
            found.update((input_name(layer_id, kind, name), value.clone()) for name, value in inputs.items())
            return self._answers[output_name(layer_id, kind)]

        found[RESULT] = self._role.packed(attend, self._ids, self._positions, self._hidden)
        return found

    def run(self, cut: Cut) -> dict[str, torch.Tensor]:
        """The same of its segments."""
        found: dict[str, torch.Tensor] = {}
        buffers: dict[tuple[int, Kind], Buffers] = {}
        for side in _SIDES:
            for spec in self._role.plan.side(side):
                geometry = spec.geometry(side)
                inputs = {name: self._noise(*shape) for name, shape in geometry.inputs().items()}
                found.update((input_name(spec.layer_id, side, name), value) for name, value in inputs.items())
                output = self._answers[output_name(spec.layer_id, side)]
                buffers[spec.layer_id, side] = Buffers(inputs, output)
        body = EagerCompiler().compile(cut, lambda layer_id, side: buffers[layer_id, side], self._tokens)
        body.start(self._ids, self._positions, self._hidden)
        for segment in body.segments:
            body.run(segment.index)
        found[RESULT] = body.result()
        return found

    def _noise(self, *shape: int) -> torch.Tensor:
        values = torch.randn(self._tokens, *shape, generator=self._random)
        return values.to(self._role.device, self._role.dtype)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    bound = _TOLERANCE[wanted.dtype] * float(wanted.float().abs().max())
    return bool(((found.float() - wanted.float()).abs() <= bound).all())
