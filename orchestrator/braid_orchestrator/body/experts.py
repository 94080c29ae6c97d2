"""Mixtures of experts: what routing chose, computed by one operator that a trace of a body can hold.

Which experts a step needs depends on its values, so a graph with symbolic sizes cannot say it in
operators of torch. The operator is registered as an experts implementation of transformers, which gives
it a layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

IMPLEMENTATION = "braid"
"""Its name among transformers' experts implementations."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda rows: torch.square(F.relu(rows)),
}
_CLASSES: dict[type, str] = {nn.SiLU: "silu", **{type(ACT2FN[name]): name for name in _ACTIVATIONS}}

_VARIANTS = ("has_bias", "is_transposed", "has_post_expert_norm")

_library = torch.library.Library("braid_experts", "DEF")
_library.define(
    "run(Tensor hidden, Tensor index, Tensor scores, Tensor up, Tensor down, str activation, bool gated)"
    " -> Tensor"
)


def run_experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    scores: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """Each token through the experts that were chosen for it, weighed and added.

    Args:
        hidden: [T, H].
        index: int64 [T, k], the experts of each token.
        scores: [T, k], their weights.
        up: [E, 2·I, H], gate first; [E, I, H] where there is no gate.
        down: [E, H, I].
        activation: "silu", "gelu" or "relu2".
        gated: whether the activated first half of `up`'s output multiplies the second.

    Returns:
        [T, H] in the dtype of `hidden`.
    """
    chosen, function = index.shape[1], _ACTIVATIONS[activation]
    experts, order = index.reshape(-1).sort(stable=True)
    groups = list(_groups(experts))
    rows = hidden[order // chosen]
    inner = _grouped(rows, up, groups)
    if gated:
        gate, inner = inner.chunk(2, dim=-1)
        inner = function(gate) * inner
    else:
        inner = function(inner)
    out = _grouped(inner, down, groups)
    weighed = out * scores.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(weighed)
    back[order] = weighed
    return back.view(*index.shape, -1).sum(dim=1).to(hidden.dtype)


def _groups(experts: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert in a sorted list of experts, with the first of its rows and the one after its last."""
    first = 0
    for expert, rows in groupby(experts.tolist()):
        last = first + sum(1 for _ in rows)
        yield expert, first, last
        first = last


def _grouped(
    rows: torch.Tensor, weights: torch.Tensor, groups: Sequence[tuple[int, int, int]]
) -> torch.Tensor:
    """Each expert's rows [S, in] by its matrix of weights [E, out, in] → [S, out]."""
    out = rows.new_empty(len(rows), weights.shape[1])
    for expert, first, last in groups:
        torch.mm(rows[first:last], weights[expert].t(), out=out[first:last])
    return out


def _experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What transformers calls instead of an experts module's own code."""
    activation = _CLASSES.get(type(module.act_fn), "silu" if module.act_fn is F.silu else "")
    # What transformers' decorator notes of a module; of its versions each notes more.
    plain = not any(vars(module).get(name, False) for name in _VARIANTS)
    if not activation or not plain or hidden.device.type != "cpu":
        # On an accelerator, to learn the experts would be to wait for it.
        found: torch.Tensor = grouped_mm_experts_forward(module, hidden, index, scores)
        return found
    up = module.gate_up_proj if module.has_gate else module.up_proj
    result: torch.Tensor = torch.ops.braid_experts.run(
        hidden, index, scores, up, module.down_proj, activation, module.has_gate
    )
    return result


def _shape(hidden: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(hidden)


_library.impl("run", run_experts, "CompositeExplicitAutograd")
_library._register_fake("run", _shape)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
