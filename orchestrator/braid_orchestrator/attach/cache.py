"""What a model with its attention elsewhere gives as `past_key_values`."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from braid_wire.errors import RequestInvalid, StepOrder
from braid_wire.layers import Role
from transformers.cache_utils import Cache

from braid_orchestrator.memory import RoleMemory, SequenceMemory
from braid_orchestrator.store import Store

_names = itertools.count(1)


class Sequences:
    """The memory of the sequences of one attached model; closed when it is detached.

    Args:
        store: the shared memory that they lie in.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.memory: RoleMemory = store.memory[Role.TARGET]
        self.open = True

    def new(self) -> SequenceMemory:
        """An empty sequence."""
        return SequenceMemory(next(_names))

    def fork(self, memory: SequenceMemory) -> SequenceMemory:
        """A sequence that begins with all that another one has; PoolExhausted where there is no page."""
        return self.memory.fork(memory, next(_names), self._copy_page)

    def release(self, rows: list[SequenceMemory]) -> None:
        """Free what these hold, and empty the list."""
        if self.open:
            for memory in rows:
                self.memory.release(memory)
        rows.clear()

    def _copy_page(self, source: int, target: int) -> None:
        self._store.copy_page(Role.TARGET, source, target)


class BraidCache(Cache):
    """Names the pages and states in the services' memory that belong to the rows of a batch.

    They are freed when the object is, or by `release()`. Copies by `copy.deepcopy` and the reordering
    of beams share what is full and copy what is not.

    Args:
        sequences: of the model that it is made for.
    """

    def __init__(self, sequences: Sequences) -> None:
        super().__init__(layers=[])
        self._sequences = sequences
        self._rows: list[SequenceMemory] = []
        self._seen: torch.Tensor | None = None
        self._released = False
        self._finalizer = weakref.finalize(self, sequences.release, self._rows)

    @property
    def seen(self) -> torch.Tensor | None:
        """bool [B, n]: of the columns so far, which were tokens and not padding; None before the first."""
        return self._seen

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """Names of the rows' sequences in the services."""
        return tuple(memory.sequence_id for memory in self._rows)

    def belongs_to(self, sequences: Sequences) -> bool:
        """Whether it was made for these."""
        return self._sequences is sequences

    def rows(self, count: int) -> Sequence[SequenceMemory]:
        """The memory of each row; they are made when it is first asked for.

        Raises:
            StepOrder: it was released, or its model is detached.
            RequestInvalid: it has another number of rows.
        """
        if self._released or not self._sequences.open:
            raise StepOrder(
                "past_key_values was released, or the model it belongs to was detached",
                field="past_key_values",
            )
        if self._seen is None and len(self._rows) != count:
            self._rows[:] = [self._sequences.new() for _ in range(count)]
        if len(self._rows) != count:
            raise RequestInvalid(
                f"past_key_values has {len(self._rows)} rows, the inputs {count}",
                field="past_key_values",
                value=len(self._rows),
            )
        return self._rows

    def extend(self, mask: torch.Tensor) -> None:
        """Columns bool [B, n] are committed."""
        self._seen = mask if self._seen is None else torch.cat([self._seen, mask], dim=1)

    def release(self) -> None:
        """Free all that it holds; it cannot be used again."""
        self._released = True
        self._sequences.release(self._rows)

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return 0 if self._seen is None else self._seen.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns with these, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was computed."""
        return self._seen is not None

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens."""
        return len(self._rows) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was computed."""
        return self._seen is not None

    @property
    def is_compileable(self) -> bool:
        """It is not: the services are called from Python."""
        return False

    @property
    def is_croppable(self) -> bool:
        """It is not: a recurrent state has no way back."""
        return False

    def reset(self) -> None:
        """Forget everything; it can be used for other inputs then."""
        self._sequences.release(self._rows)
        self._seen = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, side by side."""
        self._select(torch.arange(len(self._rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless nothing is to be removed: recurrent states have no way back.

        Raises:
            RequestInvalid: naming `crop`.
        """
        if tokens_to_remove != 0:
            raise RequestInvalid(
                f"crop({tokens_to_remove}) is not done: recurrent states have no way back; "
                "assisted generation does not run with attached attention",
                field="crop",
                value=tokens_to_remove,
            )

    def activate_past_recording(self) -> None:
        """Refused: only assisted generation wants it.

        Raises:
            RequestInvalid: naming `crop`.
        """
        raise RequestInvalid("assisted generation does not run with attached attention", field="crop")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: keys and values lie in the services' memory.

        Raises:
            StepOrder: always.
        """
        raise StepOrder("this cache belongs to a model whose attention is attached to services")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `update`."""
        self.update()

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `update`."""
        self.update()

    def get_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `update`."""
        self.update()

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `update`."""
        self.update()

    def __repr__(self) -> str:
        return f"BraidCache(sequences={list(self.sequence_ids)}, columns={self.get_seq_length()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> BraidCache:
        found = BraidCache(self._sequences)
        self._fork_into(found._rows, range(len(self._rows)))
        found._seen, found._released = self._seen, self._released
        return found

    def _select(self, indices: torch.Tensor) -> None:
        if not self._rows:
            return
        chosen = indices.tolist()
        kept: list[SequenceMemory] = []
        self._fork_into(kept, chosen)
        self._sequences.release(self._rows)
        self._rows.extend(kept)
        if self._seen is not None:
            self._seen = self._seen[torch.tensor(chosen)]

    def _fork_into(self, rows: list[SequenceMemory], chosen: Sequence[int]) -> None:
        """Append forks of the chosen rows, all or none."""
        forked: list[SequenceMemory] = []
        try:
            for row in chosen:
                forked.append(self._sequences.fork(self._rows[row]))
        except BaseException:
            self._sequences.release(forked)
            raise
        rows.extend(forked)
