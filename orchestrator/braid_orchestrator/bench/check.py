"""What is measured must compute the same: otherwise nothing is reported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from braid_wire.errors import ServiceFault

# Of the range of the reference's logits: what two float32 or bfloat16 forwards of one model may differ by.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def expect_close(logits: Mapping[str, torch.Tensor], reference: str, dtype: torch.dtype) -> None:
    """Every peer's logits are the reference's, but for rounding in `dtype`.

    Args:
        logits: peer → [B, V].
        reference: the peer that is right.
        dtype: of the weights.

    Raises:
        ServiceFault: a peer's are not.
    """
    right = logits[reference]
    allowed = _TOLERANCE[dtype] * float(right.max() - right.min())
    for name, found in logits.items():
        error = float((found - right).abs().max()) if found.shape == right.shape else float("nan")
        if not error <= allowed:  # NaN is refused too
            raise ServiceFault(
                f"{name} differs from {reference} by {error:.2e} (allowed {allowed:.2e}); nothing is reported"
            )


def expect_same(found: Mapping[str, torch.Tensor], reference: str) -> None:
    """Every peer's tensor is the reference's, bit for bit.

    Raises:
        ServiceFault: a peer's is not.
    """
    right = found[reference]
    for name, tensor in found.items():
        if not torch.equal(tensor, right):
            raise ServiceFault(f"{name} differs from {reference} in its bits; nothing is reported")
