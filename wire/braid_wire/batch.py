"""Batch metadata: the fields of a packed step, the axis of each, and the rules they obey.

A batch is packed: B sequences lie one behind the other in T rows, without padding. `FIELDS` says
for every field along which axis it is cut when a step is split into lanes; a field that is not in
the table cannot carry a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from braid_wire.errors import BatchInvalid, FieldUndeclared, ReferenceStale
from braid_wire.layers import Mode, Role

IntArray = npt.NDArray[np.signedinteger | np.unsignedinteger]

NO_SLOT = -1
NO_PAGE = -1
MODE_CODES: Mapping[Mode, int] = {Mode.EXTEND: 0, Mode.DECODE: 1, Mode.VERIFY: 2}


class Axis(Enum):
    """How a field is cut when a batch is split."""

    TOKEN = "token"
    """Axis 0 is the token axis."""
    TOKEN_DIM1 = "token, dim 1"
    """Axis 1 is the token axis."""
    SEQUENCE = "sequence"
    """Axis 0 is the sequence axis."""
    RECOMPUTED = "recomputed"
    """Follows from the other fields of each half."""
    COPIED = "copied"
    """The same in both halves."""


FIELDS: Mapping[str, Axis] = {
    "role": Axis.COPIED,
    "epoch": Axis.COPIED,
    "step": Axis.COPIED,
    "lane": Axis.RECOMPUTED,
    "num_tokens": Axis.RECOMPUTED,
    "num_sequences": Axis.RECOMPUTED,
    "cu_seqlens": Axis.RECOMPUTED,
    "input_ids": Axis.TOKEN,
    "positions": Axis.TOKEN,
    "mrope_positions": Axis.TOKEN_DIM1,
    "state_out": Axis.TOKEN,
    "state_out_generations": Axis.TOKEN,
    "context_lens": Axis.SEQUENCE,
    "modes": Axis.SEQUENCE,
    "sequence_ids": Axis.SEQUENCE,
    "page_table": Axis.SEQUENCE,
    "page_generations": Axis.SEQUENCE,
    "state_in": Axis.SEQUENCE,
    "state_in_generations": Axis.SEQUENCE,
}
"""Field → axis. `state_out` lies on the token axis (and not on the sequence axis) because a state
can be kept after any token: the last one of a span, every drafted one, or a checkpoint's."""

SHARED_DTYPES: Mapping[str, torch.dtype] = {
    "cu_seqlens": torch.int32,
    "context_lens": torch.int32,
    "modes": torch.uint8,
    "sequence_ids": torch.int64,
    "page_table": torch.int32,
    "page_generations": torch.int64,
    "state_in": torch.int32,
    "state_in_generations": torch.int64,
    "state_out": torch.int32,
    "state_out_generations": torch.int64,
}
"""The arrays that go to the services, and their dtypes."""

PAGE_FIELDS = ("page_table", "page_generations")
STATE_FIELDS = ("state_in", "state_in_generations", "state_out", "state_out_generations")


@dataclass(frozen=True)
class Batch:
    """A packed step: B sequences, T tokens.

    Arrays are numpy; a field that the model does not need (pages without full layers, states
    without linear ones, mrope positions) is None.
    """

    role: Role
    epoch: int
    step: int
    lane: int
    input_ids: IntArray  # int64 [T]
    positions: IntArray  # int64 [T]
    cu_seqlens: IntArray  # int32 [B+1]
    context_lens: IntArray  # int32 [B]
    modes: IntArray  # uint8 [B]
    sequence_ids: IntArray  # int64 [B]
    mrope_positions: IntArray | None = None  # int64 [3, T]
    page_table: IntArray | None = None  # int32 [B, P]
    page_generations: IntArray | None = None  # int64 [B, P]
    state_in: IntArray | None = None  # int32 [B]
    state_in_generations: IntArray | None = None  # int64 [B]
    state_out: IntArray | None = None  # int32 [T]
    state_out_generations: IntArray | None = None  # int64 [T]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.context_lens)

    @property
    def mode(self) -> str:
        """The mode of all spans ("extend", "decode", "verify"), or "mixed"."""
        return mode_label(self.modes)

    def shared(self) -> dict[str, IntArray]:
        """The arrays that go to the services."""
        found = {name: getattr(self, name) for name in SHARED_DTYPES}
        return {name: array for name, array in found.items() if array is not None}

    def split(self, sequences: int) -> tuple[Batch, Batch]:
        """Two batches: the first `sequences` sequences (lane 0), and the rest (lane 1).

        Raises:
            BatchInvalid: one half would be empty.
        """
        if not 0 < sequences < self.num_sequences:
            raise BatchInvalid(
                f"cannot split {self.num_sequences} sequences at {sequences}",
                field="sequences",
                value=sequences,
            )
        cut = {Axis.TOKEN: int(self.cu_seqlens[sequences]), Axis.SEQUENCE: sequences}
        halves: tuple[dict[str, object], dict[str, object]] = ({}, {})
        for item in fields(self):
            value = getattr(self, item.name)
            for half, part in zip(halves, cut_field(item.name, value, cut), strict=True):
                half[item.name] = part
        halves[0].update(lane=0, cu_seqlens=self.cu_seqlens[: sequences + 1])
        halves[1].update(lane=1, cu_seqlens=self.cu_seqlens[sequences:] - self.cu_seqlens[sequences])
        return Batch(**halves[0]), Batch(**halves[1])  # type: ignore[arg-type]


_LABELS = {code: mode.value for mode, code in MODE_CODES.items()}


def mode_label(modes: IntArray) -> str:
    """The one mode of all spans ("extend", "decode", "verify"), or "mixed"."""
    found = set(modes.tolist())
    return _LABELS[found.pop()] if len(found) == 1 else "mixed"


def cut_field(name: str, value: object, cut: Mapping[Axis, int]) -> tuple[object, object]:
    """Both halves of one field, cut as `FIELDS` declares.

    Raises:
        FieldUndeclared: the field has a value and no declared axis.
        BatchInvalid: the field is too short on its axis.
    """
    if value is None:
        return None, None
    axis = FIELDS.get(name)
    if axis is None:
        raise FieldUndeclared(f"batch field {name!r} has a value but no declared axis", field=name)
    if axis in (Axis.COPIED, Axis.RECOMPUTED):
        return value, value
    if not isinstance(value, np.ndarray):
        raise BatchInvalid(f"batch field {name!r} is {type(value).__name__}; it must be an array", field=name)
    dim = 1 if axis is Axis.TOKEN_DIM1 else 0
    at = cut[Axis.SEQUENCE if axis is Axis.SEQUENCE else Axis.TOKEN]
    if value.ndim <= dim or value.shape[dim] <= at:
        raise BatchInvalid(
            f"batch field {name!r} of shape {list(value.shape)} cannot be cut at {at} on axis {dim}",
            field=name,
        )
    first, second = np.split(value, [at], axis=dim)
    return first, second


@dataclass(frozen=True)
class Pools:
    """What the references of a batch are checked against; a part that a service lacks is None."""

    page_size: int
    page_generation: IntArray | None  # int64 [num_pages]
    slot_generation: IntArray | None  # int64 [num_slots]


def check(arrays: Mapping[str, IntArray], num_tokens: int, pools: Pools) -> None:
    """Check a batch's shared arrays against each other and against the pools.

    Raises:
        BatchInvalid: a rule of the contract is broken; the message names the field.
        ReferenceStale: a page or slot was recycled since it was named.
    """
    # In 64 bits: sums and differences of hostile 32-bit lengths must not wrap into plausible ones.
    wide = {name: arrays[name].astype(np.int64) for name in ("cu_seqlens", "context_lens")}
    arrays = {**arrays, **wide}
    _check_spans(arrays, num_tokens)
    if pools.page_generation is not None:
        _check_pages(arrays, pools.page_size, pools.page_generation)
    if pools.slot_generation is not None:
        _check_states(arrays, num_tokens, pools.slot_generation)


def _check_spans(arrays: Mapping[str, IntArray], num_tokens: int) -> None:
    cu_seqlens, context = arrays["cu_seqlens"], arrays["context_lens"]
    sequences = len(context)
    if sequences < 1 or num_tokens < 1:
        raise BatchInvalid(f"the batch has {sequences} sequences and {num_tokens} tokens; it needs some")
    lengths = np.diff(cu_seqlens)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or (lengths < 0).any():
        raise BatchInvalid(
            f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}; it must rise from 0 to {num_tokens}",
            field="cu_seqlens",
        )
    if (context < 0).any():
        raise BatchInvalid(
            f"context_lens has {int(context.min())}; it must not be negative", field="context_lens"
        )
    modes = arrays["modes"]
    if (modes > max(MODE_CODES.values())).any():
        raise BatchInvalid(f"modes has {int(modes.max())}; it is unknown", field="modes")
    wrong = (modes == MODE_CODES[Mode.DECODE]) & (lengths != 1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise BatchInvalid(
            f"sequence {at} is DECODE with {lengths[at]} tokens; it must have 1", field="modes"
        )
    if len(np.unique(arrays["sequence_ids"])) != sequences:
        raise BatchInvalid("sequence_ids names a sequence twice", field="sequence_ids")


def _check_pages(arrays: Mapping[str, IntArray], page_size: int, generation: IntArray) -> None:
    table, named = _needs(arrays, "page_table"), _needs(arrays, "page_generations")
    need = -(-(arrays["context_lens"] + np.diff(arrays["cu_seqlens"])) // page_size)
    # [B, P]: the entries that the kernel will follow.
    used = np.arange(table.shape[1]) < need[:, None]
    if (
        table.shape[1] < need.max(initial=0)
        or (table[used] < 0).any()
        or (table[used] >= len(generation)).any()
    ):
        raise BatchInvalid(
            f"page_table does not give every sequence its pages "
            f"(0 … {len(generation) - 1}, {page_size} positions each)",
            field="page_table",
        )
    if (generation[table[used]] != named[used]).any():
        raise ReferenceStale("page_table names a page that was recycled", field="page_table")
    written = _written_pages(arrays, table, page_size)
    if len(np.unique(written)) != len(written):
        raise BatchInvalid("two sequences would write the same page", field="page_table")


def _written_pages(arrays: Mapping[str, IntArray], table: IntArray, page_size: int) -> IntArray:
    """The pages that the spans write, once for each sequence that writes them."""
    context, lengths = arrays["context_lens"], np.diff(arrays["cu_seqlens"])
    column = np.arange(table.shape[1])
    first, last = context // page_size, (context + lengths - 1) // page_size
    mask = (column >= first[:, None]) & (column <= last[:, None]) & (lengths > 0)[:, None]
    return table[mask]


def _check_states(arrays: Mapping[str, IntArray], num_tokens: int, generation: IntArray) -> None:
    state_in, state_out = _needs(arrays, "state_in"), _needs(arrays, "state_out")
    if len(state_out) != num_tokens:
        raise BatchInvalid(
            f"state_out has {len(state_out)} entries for {num_tokens} tokens", field="state_out"
        )
    for name, slots in (("state_in", state_in), ("state_out", state_out)):
        if (slots < NO_SLOT).any() or (slots >= len(generation)).any():
            raise BatchInvalid(f"{name} names a slot outside −1 … {len(generation) - 1}", field=name)
        taken = slots >= 0
        if (generation[slots[taken]] != _needs(arrays, f"{name}_generations")[taken]).any():
            raise ReferenceStale(f"{name} names a slot that was recycled", field=name)
    if ((state_in == NO_SLOT) != (arrays["context_lens"] == 0)).any():
        raise BatchInvalid("state_in must be −1 exactly where context_lens is 0", field="state_in")
    written = state_out[state_out >= 0]
    if len(np.unique(written)) != len(written):
        raise BatchInvalid("state_out names a slot twice", field="state_out")
    if np.isin(written, state_in).any():
        raise BatchInvalid("state_out names a slot that is read in the same step", field="state_out")


def _needs(arrays: Mapping[str, IntArray], name: str) -> IntArray:
    if name not in arrays:
        raise BatchInvalid(f"{name} is missing", field=name)
    return arrays[name]
