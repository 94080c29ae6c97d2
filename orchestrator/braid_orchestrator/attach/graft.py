"""Puts adapters in the place of a model's own attention, on one instance, and takes them out again.

The model's modules, their names and their parameters stay as they are: only what `forward` of an
attention module does is another thing, so `state_dict`, hooks and `parameters` see no difference.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from braid_wire.errors import RequestInvalid, StepOrder
from braid_wire.layers import Kind
from torch import nn

from braid_orchestrator.body.base import Attend, DispatchPoint
from braid_orchestrator.body.family import Family, Parts
from braid_orchestrator.body.loading import adapt_layers
from braid_orchestrator.layer_plan import ModelPlans
from braid_orchestrator.store import LayerParams

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Packing:
    """Which places of a padded batch are tokens.

    Args:
        mask: bool [B, S].
    """

    mask: torch.Tensor

    @property
    def full(self) -> bool:
        """Whether all are."""
        return bool(self.mask.all())

    def pack(self, value: Any) -> Any:
        """Tensors [B or 1, S, …] become [1, T, …], row after row without padding; also inside tuples.

        Anything else stays as it is.
        """
        if isinstance(value, tuple):
            return tuple(self.pack(item) for item in value)
        rows, columns = self.mask.shape
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] != columns:
            return value
        if value.shape[0] not in (1, rows):
            return value
        spread = value.expand(rows, *value.shape[1:])
        if self.full:
            return spread.reshape(1, rows * columns, *value.shape[2:])
        return spread[self.mask][None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T, …] → [B, S, …], zero where there is padding."""
        if self.full:
            return packed.reshape(*self.mask.shape, *packed.shape[2:])
        found = packed.new_zeros(*self.mask.shape, *packed.shape[2:])
        found[self.mask] = packed[0]
        return found


class Graft:
    """The adapters of one model.

    Args:
        model: a causal language model of transformers.
        plans: of its configuration.
        family: how its attention is taken out.

    Raises:
        ConfigInvalid: its layers are not the plan's.
    """

    def __init__(self, model: Any, plans: ModelPlans, family: Family) -> None:
        self._point = DispatchPoint()
        self._packing: Packing | None = None
        self._restore: list[Callable[[], None]] = []
        # Adapting replaces modules of the layers: of these copies, which share everything below.
        self.parts: Parts = family.parts(_twin(model, 2))
        originals = self.parts.layers
        twins = {layer_id: _twin(layer, 2) for layer_id, layer in originals.items()}
        self.params: LayerParams = adapt_layers(twins, plans.target, family.adapt, self._point)
        self._slots = [
            slot for layer_id, layer in originals.items() for slot in _replaced(layer, twins[layer_id])
        ]

    @property
    def point(self) -> DispatchPoint:
        """What the adapters call."""
        return self._point

    def insert(self) -> None:
        """Let the adapters run instead of the model's own attention."""
        used = Counter(id(slot.original) for slot in self._slots)
        for slot in self._slots:
            forward = self._forward(slot.adapter)
            if used[id(slot.original)] == 1:
                self._restore.append(override(slot.original, "forward", forward))
            else:
                # One module of several layers cannot tell which of them it runs in.
                self._restore.append(_replace(slot, _Stand(forward)))

    def remove(self) -> None:
        """Let the model's own attention run again."""
        while self._restore:
            self._restore.pop()()

    def run(self, packing: Packing, attend: Attend, call: Callable[[], Any]) -> Any:
        """Call the model's backbone on a padded batch, with its layers led to `attend`."""
        self._packing = packing
        try:
            with self._point.leads_to(_without_gradients(attend)):
                return call()
        finally:
            self._packing = None

    def _forward(self, adapter: nn.Module) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            packing = self._packing
            if packing is None:
                raise StepOrder("an attached layer was called by itself; call the model")
            found = adapter(
                *(packing.pack(value) for value in args),
                **{name: packing.pack(value) for name, value in kwargs.items()},
            )
            if isinstance(found, tuple):
                return packing.unpack(found[0]), *found[1:]
            return packing.unpack(found)

        return forward


class _Layer(torch.autograd.Function):
    """A layer in a service, as autograd sees it: there is no way back through it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """`run(*inputs)`, as memory of one's own: the next layer writes over what services give."""
        return run(*inputs).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refused.

        Raises:
            RequestInvalid: always.
        """
        raise RequestInvalid(
            "backward: attention in services has no gradients; detach the model to train it", field="backward"
        )


def _without_gradients(attend: Attend) -> Attend:
    """The same layers; where a gradient is asked for, an error instead of a wrong one."""

    def run(layer_id: int, inputs: Mapping[str, torch.Tensor], side: Kind | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs.values()):
            return attend(layer_id, inputs, side)
        names = list(inputs)
        found: torch.Tensor = _Layer.apply(
            lambda *tensors: attend(layer_id, dict(zip(names, tensors, strict=True)), side), *inputs.values()
        )
        return found

    return run


@dataclass(frozen=True)
class _Slot:
    """A module, where it hangs, and what runs instead."""

    parent: nn.Module
    name: str
    original: nn.Module
    adapter: nn.Module


class _Stand(nn.Module):
    """Runs a function in the place of a module."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        return self._forward(*args, **kwargs)


def override(module: Any, name: str, value: Callable[..., Any]) -> Callable[[], None]:
    """Set an attribute of this instance alone; the function found restores what was there."""
    missing = object()
    before = vars(module).get(name, missing)
    vars(module)[name] = value

    def restore() -> None:
        if before is missing:
            del vars(module)[name]
        else:
            vars(module)[name] = before

    return restore


def _replace(slot: _Slot, stand: nn.Module) -> Callable[[], None]:
    setattr(slot.parent, slot.name, stand)
    return lambda: setattr(slot.parent, slot.name, slot.original)


def _twin(module: Any, depth: int) -> Any:
    """A module like this one, whose submodules down to a depth are twins too; the others are shared."""
    found = copy.copy(module)
    children: dict[str, Any] = dict(module._modules)
    if depth > 1 and not isinstance(module, nn.ModuleList):
        children = {
            name: child if child is None else _twin(child, depth - 1) for name, child in children.items()
        }
    vars(found)["_modules"] = children
    return found


def _replaced(original: nn.Module, twin: nn.Module, depth: int = 2) -> Iterator[_Slot]:
    """Where a twin has another kind of module than the original."""
    for name, found in twin._modules.items():
        before = original._modules[name]
        if found is None or before is None:
            continue
        if type(found) is not type(before):
            yield _Slot(original, name, before, found)
        elif depth > 1 and found is not before:
            yield from _replaced(before, found, depth - 1)
