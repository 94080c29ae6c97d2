"""The gated delta rule in chunks, written so that training on a CPU is quick.

It computes what ``torch_chunk_gated_delta_rule`` of transformers computes from zero states. It
differs in how: small chunks, products of key heads made before they are repeated for the value
heads, and the triangular system inverted by repeated squaring instead of by a solver.
"""

from __future__ import annotations

import torch

CHUNK = 16


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length one."""
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)


def unit_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Inverse of ``1 + lower`` for strictly lower triangular matrices.

    The series 1 - L + L^2 - ... ends at the size of the matrix; it factors into (1 - L)(1 + L^2)(1 + L^4)...
    """
    power = -lower
    result = torch.eye(lower.shape[-1], dtype=lower.dtype) + power
    reach = 2
    while reach < lower.shape[-1]:
        power = power @ power
        result = result + result @ power
        reach *= 2
    return result


def in_chunks(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, time, ...] to [batch, heads, chunks, CHUNK, width] in float32."""
    batch, length = rows.shape[:2]
    return rows.float().reshape(batch, length // CHUNK, CHUNK, heads, -1).permute(0, 3, 1, 2, 4)


def for_value_heads(rows: torch.Tensor, times: int) -> torch.Tensor:
    """Each key head repeated for the value heads it serves."""
    batch, heads, *rest = rows.shape
    return rows.unsqueeze(2).expand(batch, heads, times, *rest).reshape(batch, heads * times, *rest)


def chunk_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Drop-in for the stock rule in training; lengths must be multiples of ``CHUNK``."""
    with torch.autocast("cpu", enabled=False):
        return _chunk_rule(query, key, value, g, beta).to(query.dtype), None


def _chunk_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    batch, length, key_heads, key_width = key.shape
    value_heads, value_width = value.shape[2:]
    times = value_heads // key_heads
    query = unit(in_chunks(query, key_heads)) * key_width**-0.5
    key = unit(in_chunks(key, key_heads))
    value, beta = in_chunks(value, value_heads), in_chunks(beta, value_heads)
    total = in_chunks(g, value_heads).squeeze(-1).cumsum(-1)

    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(above, float("-inf")).exp()
    turned = key.transpose(-1, -2)
    system = (for_value_heads(key @ turned, times) * beta * decay).tril(-1)
    inside = for_value_heads(query @ turned, times) * decay
    query, key = for_value_heads(query, times), for_value_heads(key, times)
    since_start = total.exp().unsqueeze(-1)
    solved = unit_inverse(system) @ torch.cat((value * beta, key * beta * since_start), -1)
    new_values, old_keys = solved.split((value_width, key_width), -1)
    reads = torch.cat((query * since_start, old_keys), -2)
    writes = (key * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
    whole = total[..., -1].exp()[..., None, None]

    state = torch.zeros(batch, value_heads, key_width, value_width)
    outputs = []
    for index in range(length // CHUNK):
        found = reads[:, :, index] @ state
        fresh = new_values[:, :, index] - found[:, :, CHUNK:]
        outputs.append(found[:, :, :CHUNK] + inside[:, :, index] @ fresh)
        state = state * whole[:, :, index] + writes[:, :, index] @ fresh
    return torch.stack(outputs, 2).reshape(batch, value_heads, length, value_width).transpose(1, 2)
