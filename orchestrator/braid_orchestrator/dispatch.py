"""What a layer is to who sends it: its name, its tensors, and the way to its service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from braid.v1 import attention_pb2 as pb
from braid_wire.layers import Kind, Role

SIDES = (Kind.FULL, Kind.LINEAR)

Point = tuple[Role, int, Kind]
"""One side of one layer of one role."""

LAYER_TIMEOUT_S = 120.0
"""Longest time that a layer may take."""


class Dispatch(Enum):
    """How a layer reaches its service: a call for each, or messages on one stream."""

    RPC = "rpc"
    WALK = "walk"


@dataclass(frozen=True)
class Prepared:
    """One layer side, resolved for steps of a fixed number of rows on one lane."""

    point: Point
    index: int
    """Its place in the service's order."""
    row: int
    """In the table of layers."""
    ticket: pb.Ticket
    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor
