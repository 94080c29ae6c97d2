"""Mailboxes: messages in shared memory, for a peer that waits at a doorbell instead of at a stream.

A message on a gRPC stream wakes four threads on its way, which costs more than a layer. So once two
processes share memory, the messages that come with every step go through a pair of mailboxes, one
for each direction. A mailbox holds one letter: a few messages that belong together. The writer puts
the next one only after the reader has answered the last.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch

from braid_wire.doorbell import BELL_BYTES, Doorbell
from braid_wire.errors import ViewInvalid

_NUMBER = struct.Struct("<q")
_MOST_MESSAGES = 16


class Mailbox:
    """One direction, in the hands of its writer or of its reader.

    Args:
        memory: uint8 [n] of an arena, 64-byte aligned, n well above 64; kept alive by this object.

    Raises:
        ViewInvalid: the memory is no mailbox.
        ServiceFault: this process has no doorbells.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        if memory.dtype is not torch.uint8 or memory.dim() != 1 or len(memory) <= BELL_BYTES + _NUMBER.size:
            raise ViewInvalid(f"a mailbox is uint8 [n], not {memory.dtype} {list(memory.shape)}")
        if not memory.is_contiguous() or memory.device.type != "cpu":
            raise ViewInvalid("a mailbox is contiguous and lies in host memory")
        self._bell = Doorbell(memory[:BELL_BYTES])
        self._room = memory.numpy().data[BELL_BYTES:]
        self._letters = 0

    def fits(self, messages: Sequence[bytes]) -> bool:
        """Whether messages fit into one letter."""
        needed = _NUMBER.size * (len(messages) + 1) + sum(map(len, messages))
        return len(messages) <= _MOST_MESSAGES and needed <= len(self._room)

    def put(self, messages: Sequence[bytes]) -> None:
        """Give the reader a letter; the last one has been answered.

        Raises:
            ViewInvalid: the messages do not fit.
        """
        if not self.fits(messages):
            raise ViewInvalid(f"{len(messages)} messages do not fit into {len(self._room)} bytes")
        _NUMBER.pack_into(self._room, 0, len(messages))
        at = _NUMBER.size
        for message in messages:
            _NUMBER.pack_into(self._room, at, len(message))
            at += _NUMBER.size
            self._room[at : at + len(message)] = message
            at += len(message)
        self._letters += 1
        self._bell.ring(self._letters)

    def announce(self) -> None:
        """Let the reader wake up: a letter comes soon."""
        self._bell.announce(self._letters + 1)

    def take(
        self, check: Callable[[], None], timeout_s: float, *, expected: bool = False
    ) -> list[bytes] | None:
        """Wait for the next letter, and copy its messages; None where the writer has given up.

        Args:
            check: called every 20 ms meanwhile; raises where the writer is gone.
            timeout_s: longest wait.
            expected: whether it is a few microseconds away.

        Raises:
            StepTimeout: none came in time.
            ViewInvalid: it does not lie wholly inside the mailbox.
        """
        if not self._bell.wait(self._letters + 1, check, timeout_s, expected=expected):
            return None
        self._letters += 1
        count, at, found = self._number(0), _NUMBER.size, []
        if not 0 <= count <= _MOST_MESSAGES:
            raise ViewInvalid(f"a letter has {count} messages; it may have {_MOST_MESSAGES}")
        for _ in range(count):
            length = self._number(at)
            at += _NUMBER.size
            if not 0 <= length <= len(self._room) - at:
                raise ViewInvalid(f"a message of {length} bytes begins at byte {at} of {len(self._room)}")
            found.append(bytes(self._room[at : at + length]))
            at += length
        return found

    def give_up(self) -> None:
        """Release the reader, now and later."""
        self._bell.fail()

    def _number(self, at: int) -> int:
        if at + _NUMBER.size > len(self._room):
            raise ViewInvalid(f"a letter ends at byte {at} of {len(self._room)}")
        return int(_NUMBER.unpack_from(self._room, at)[0])
