"""Fields of messages that are newer than this cell: refused, because whoever sets one counts on it."""

from __future__ import annotations

from braid_wire.errors import RequestInvalid
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet


def refuse_newer(message: Message, path: str = "") -> None:
    """Check a message and all in it.

    Args:
        message: as it came.
        path: of its fields, for the error.

    Raises:
        RequestInvalid: a field is set that is not known here; it names its number.
    """
    newer = UnknownFieldSet(message)
    if len(newer):
        number = newer[0].field_number
        raise RequestInvalid(
            f"{message.DESCRIPTOR.name} has field number {number}; it must not be set: it is not known here",
            field=f"{path}{number}",
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inside in value if field.is_repeated else (value,):
            refuse_newer(inside, f"{path}{field.name}.")
