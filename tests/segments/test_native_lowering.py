"""Every operator that is lowered, alone and in random company, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functions import COUNTS, Function, Weights, exact, left_to_torch, role_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

T = torch.Tensor
WIDTH = 48


def rotated(x: T, w: Weights, interleaved: bool, part: int) -> T:
    """Rotary over some of each head's dims, by angles that depend on the row."""
    heads = x.view(1, -1, 4, 12)
    rotary, rest = heads[..., :part], heads[..., part:]
    angles = (x.sum(-1, keepdim=True) * w("frequencies", part // 2))[None]
    if interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
        turned = torch.stack([-rotary[..., 1::2], rotary[..., ::2]], dim=-1).flatten(-2)
    else:
        angles = torch.cat([angles, angles], dim=-1)
        first, second = rotary.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    return torch.cat([rotary * cos + turned * sin, rest], dim=-1).view(-1, WIDTH)


def complex_rotary(x: T, w: Weights) -> T:
    """Rotary by complex numbers."""
    angles = (x.sum(-1, keepdim=True) * w("frequencies", 6))[:, None]
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.view(-1, 4, 6, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(1)


def rms(x: T, weight: T, eps: float = 1e-5) -> T:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def routed(x: T, w: Weights) -> T:
    """Scores of groups, the best group's elements, and their weights."""
    scores = x[:, :12].sigmoid()
    groups = scores.view(-1, 3, 4).topk(2, dim=-1)[0].sum(-1)
    best = groups.topk(1, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 3, 4).reshape(-1, 12)
    kept = scores.masked_fill(~mask.bool(), 0.0)
    chosen = kept.topk(3, dim=-1)[1]
    found = scores.gather(1, chosen)
    return found / (found.sum(-1, keepdim=True) + 1e-20)


def rewritten(x: T, w: Weights) -> T:
    """Ranges, every third element and one of several rows, written over."""
    planes = torch.stack([x, 2 * x, 3 * x]).clone()
    first = planes[0].clone()
    first[:, 1:20:3] = planes[1][:, 1:20:3]
    first[:, 30:40] = planes[2][:, :10]
    planes[0] = first
    return planes[0] + planes[2]


def linear(x: T, w: Weights, columns: int, name: str = "m") -> T:
    return F.linear(x, w(name, columns, x.shape[-1]))


def mlp(x: T, w: Weights) -> T:
    """As most models have it."""
    normed = rms(x, w("n", WIDTH))
    gated = F.silu(linear(normed, w, 70, "g")) * linear(normed, w, 70, "u")
    return x + F.linear(gated, w("d", WIDTH, 70))


def shared_work(x: T, w: Weights) -> T:
    """A costly expression in a product, an output and a sum."""
    y = x.sin().exp()
    return torch.cat([linear(y, w, 9), y * 2, y.sum(-1, keepdim=True)], -1)


NATIVE: dict[str, Function] = {
    "neg": lambda x, w: -x,
    "abs_sqrt": lambda x, w: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x, w: (x.abs() + 0.1).rsqrt(),
    "exp_log": lambda x, w: x.exp().add(1).log(),
    "sigmoid": lambda x, w: x.sigmoid() * x,
    "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x),
    "gelu_tanh": lambda x, w: F.gelu(x, approximate="tanh"),
    "tanh": lambda x, w: 30 * torch.tanh(x / 30),
    "cos_sin": lambda x, w: x.cos() + (3 * x).sin(),
    "squared_relu": lambda x, w: F.relu(x).square(),
    "reciprocal": lambda x, w: 1 / (x.abs() + 1),
    "softplus": lambda x, w: F.softplus(x),
    "powers": lambda x, w: x**2 + x**3 + x.abs() ** 0.5 + (x.abs() + 1) ** -0.5 + (x.abs() + 0.5) ** 1.7,
    "arithmetic": lambda x, w: (x + w("a", WIDTH)) * 2 - x / w("b", WIDTH).abs().add(1) + (1 - x) * 0.5,
    "alpha": lambda x, w: torch.add(x, w("a", WIDTH), alpha=3).sub(x, alpha=0.25),
    "minima": lambda x, w: torch.minimum(x, w("a", WIDTH)) + torch.maximum(x, -x),
    "clamps": lambda x, w: x.clamp(-0.5, 0.7) + x.clamp(min=-1) + x.clamp(max=1) + F.hardtanh(x),
    "where": lambda x, w: torch.where(x > 0.1, x, -2 * x) + torch.where(x <= w("a", WIDTH), 1.0, x),
    "comparisons": lambda x, w: (x < 0.5).to(x.dtype) + (x >= 0).to(x.dtype) * 2 + (x != 0).to(x.dtype),
    "rms_norm": lambda x, w: rms(x, w("n", WIDTH)),
    "rms_norm_1_plus": lambda x, w: (1 + w("n", WIDTH)) * rms(x, w("o", 1)),
    "gated_norm": lambda x, w: rms(x.view(-1, 4, 12), w("n", 12)).flatten(1) * F.silu(x),
    "grouped_norm": lambda x, w: (rms(x.view(-1, 4, 12), w("o", 1)).flatten(1) * w("n", WIDTH)),
    "layer_norm": lambda x, w: F.layer_norm(x, (WIDTH,), w("n", WIDTH), w("b", WIDTH), 1e-5),
    "layer_norm_of_heads": lambda x, w: F.layer_norm(x.view(-1, 4, 12), (12,), w("n", 12)).flatten(1),
    "layer_norm_alone": lambda x, w: F.layer_norm(x, (WIDTH,)),
    "centred": lambda x, w: (x - x.mean(-1, keepdim=True)) * w("n", WIDTH),
    "softmax": lambda x, w: x.softmax(-1),
    "softmax_of_heads": lambda x, w: x.view(-1, 4, 12).softmax(1).flatten(1),
    "sums": lambda x, w: x.view(-1, 4, 12).sum(1) + x.view(-1, 4, 12).amax((1,)) + x[:, :1].sum(-1, True),
    "sum_of_two_dims": lambda x, w: x.view(-1, 4, 3, 4).sum((1, 3)),
    "largest": lambda x, w: x.view(-1, 4, 12).max(dim=-1)[0],
    "norm_of_a_norm": lambda x, w: rms(rms(x, w("n", WIDTH)) + x, w("o", WIDTH)),
    "rotary": lambda x, w: rotated(x, w, False, 12),
    "partial_rotary": lambda x, w: rotated(x, w, False, 8),
    "interleaved_rotary": lambda x, w: rotated(x, w, True, 12),
    "partial_interleaved_rotary": lambda x, w: rotated(x, w, True, 4),
    "rotary_of_a_norm": lambda x, w: rotated(rms(x.view(-1, 4, 12), w("n", 12)).view(-1, WIDTH), w, False, 8),
    "complex_rotary": complex_rotary,
    "views": lambda x, w: x.view(-1, 2, 6, 4).permute(0, 2, 1, 3).transpose(1, 3).reshape(-1, 48),
    "merged_view": lambda x, w: x.view(-1, 6, 8)[:, :, 1:5].reshape(-1, 24).view(-1, 4, 6)[:, 1:].flatten(1),
    "steps": lambda x, w: x[:, ::3] + x[:, 1::3] * x[:, -16:],
    "selects": lambda x, w: x.view(-1, 4, 12)[:, -1] + x.view(-1, 4, 12)[:, 0] * x.unbind(-1)[3][:, None],
    "splits": lambda x, w: torch.cat([one * (i + 1) for i, one in enumerate(x.split([10, 30, 8], -1))], -1),
    "chunks": lambda x, w: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid(),
    "joined_sums": lambda x, w: rms(torch.cat([x, 2 * x], -1), w("n", 2 * WIDTH)),
    "rewritten": rewritten,
    "linear": lambda x, w: linear(x, w, 20),
    "linear_bias": lambda x, w: F.linear(x, w("m", 20, WIDTH), w("c", 20)),
    "linear_of_a_sum": lambda x, w: linear(x + 1, w, 20) * 2,
    "linear_of_heads": lambda x, w: F.linear(x.view(-1, 4, 12), w("m", 5, 12)).flatten(1),
    "linear_of_a_slice": lambda x, w: F.linear(x[:, 5:17], w("m", 5, 12)),
    "linear_of_columns": lambda x, w: F.linear(x[:, ::4], w("m", 5, 12)),
    "residual": lambda x, w: x + linear(x, w, WIDTH),
    "residual_of_a_sum": lambda x, w: F.linear(x, w("m", WIDTH, WIDTH), w("c", WIDTH)) + x.sin() * 2,
    "twice_itself": lambda x, w: (lambda y: y + y)(linear(x, w, 20)),
    "product_and_norm": lambda x, w: (lambda y: y + rms(y, w("n", 20)))(linear(x, w, 20)),
    "gated_unit": lambda x, w: F.silu(linear(x, w, 20, "g")) * linear(x, w, 20, "u"),
    "gated_unit_other_order": lambda x, w: linear(x, w, 20, "u") * F.silu(linear(x, w, 20, "g")),
    "gated_unit_of_one": lambda x, w: (lambda y: F.silu(y[:, :20]) * y[:, 20:])(linear(x, w, 40)),
    "gated_unit_reversed": lambda x, w: (lambda y: F.silu(y[:, 20:]) * y[:, :20])(linear(x, w, 40)),
    "gated_unit_of_parts": lambda x, w: (lambda y: F.silu(y[:, :9]) * y[:, 30:39])(linear(x, w, 40)),
    "gate_used_twice": lambda x, w: (lambda y: F.silu(y) * linear(x, w, 20, "u") + y)(linear(x, w, 20)),
    "gate_with_bias": lambda x, w: F.silu(linear(x, w, 20) + w("c", 20)) * linear(x, w, 20, "u"),
    "gate_of_another_input": lambda x, w: F.silu(linear(x, w, 20, "g")) * linear(x + 1, w, 20, "u"),
    "gate_by_gelu": lambda x, w: F.gelu(linear(x, w, 20, "g")) * linear(x, w, 20, "u"),
    "mlp": mlp,
    "shared_work": shared_work,
    "routing": routed,
}  # fmt: skip


def rows_of(tokens: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> T:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def agree(function: Function, width: int = WIDTH) -> set[str]:
    """Compare with float64 for several numbers of rows, and each row with itself alone."""
    role = role_of(function, width)
    for tokens in COUNTS:
        rows = rows_of(tokens, width)
        found, wanted = run(role, rows), exact(function, rows)
        error, span = (found.double() - wanted).abs().max(), wanted.abs().max()
        assert found.shape == wanted.shape and error <= 3e-6 * max(1.0, float(span)), f"{tokens}: {error:.1e}"
    if role.batch_invariant:
        for row in (0, 5, COUNTS[-1] - 1):
            assert torch.equal(run(role, rows[row : row + 1])[0], found[row])
    return left_to_torch(role)


@pytest.mark.parametrize("name", NATIVE)
def test_an_operator_is_lowered(name: str) -> None:
    assert agree(NATIVE[name]) == set()


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x, w: x.cumsum(-1) + x.exp(), "aten.cumsum.default"),
        (lambda x, w: x.exp().sort(-1)[0] * 2, "aten.sort.default"),
        (lambda x, w: F.linear(x.roll(3, 1), w("m", 5, WIDTH)).roll(1, 1), "aten.roll.default"),
        (lambda x, w: x - x.mean(0), "aten.mean.dim"),
        (lambda x, w: x.flip(0), "aten.flip.default"),
        (lambda x, w: (x.double().exp() * w("a", WIDTH)).float(), "aten._to_copy.default"),
        (lambda x, w: x.gather(1, x.argsort(-1)[:, :5]), "aten.sort.default"),
        (lambda x, w: torch.einsum("thi,hio->tho", x.view(-1, 4, 12), w("m", 4, 12, 5)), "aten.bmm.default"),
        (lambda x, w: x[torch.arange(x.shape[0] - 1, -1, -1)], "aten.index.Tensor"),
        (lambda x, w: x.view(-1, 4, 12).cumsum(1).exp().view(-1, 2, 24).cumsum(1), "aten.cumsum.default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_not_lowered_runs_in_torch(function: Function, operator: str) -> None:
    def flat(x: T, w: Weights) -> T:
        return function(x, w).flatten(1)

    assert operator in agree(flat)


def test_a_whole_graph_that_is_not_lowered_runs_in_torch() -> None:
    assert agree(lambda x, w: x.double().cumsum(-1).sort(-1)[0].float()) >= {"aten.cumsum.default"}


class Prefixed(Weights):
    """Weights of one place."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __call__(self, name: str, *shape: int) -> T:
        return self._weights(self._prefix + name, *shape)


Step = Callable[[T, Weights], T]
HEADS: dict[str, Step] = {
    "norm": lambda h, w: rms(h, w("n", 8)),
    "turn": lambda h, w: torch.cat([-h[..., 4:], h[..., :4]], -1) * w("s", 8) + h * w("c", 8),
    "interleave": lambda h, w: torch.stack([h[..., ::2], -h[..., 1::2]], -1).flatten(-2),
    "swap": lambda h, w: h.transpose(1, 2).reshape(-1, 6, 8),
    "mean": lambda h, w: h - h.mean(1, keepdim=True),
    "softmax": lambda h, w: h.softmax(-1) + h,
    "sum": lambda h, w: h + h.sum(-1, keepdim=True) * 0.1,
    "silu": lambda h, w: F.silu(h) + h.view(-1, 48).sigmoid().view(-1, 6, 8),
    "mix": lambda h, w: h + F.linear(h.flatten(1), w("m", 48, 48)).view(-1, 6, 8),
    "each": lambda h, w: F.linear(h, w("e", 8, 8)),
    "halves": lambda h, w: torch.cat([h[:, 3:], h[:, :3] * 2], 1),
    "strided": lambda h, w: torch.cat([h[:, ::2], h[:, 1::2]], 1) * h[..., :1],
    "select": lambda h, w: h * h[:, 2:3] + h[:, :, 5].unsqueeze(-1),
    "most": lambda h, w: torch.maximum(h, h.amax(-1, keepdim=True) - 0.3),
    "expand": lambda h, w: h + h[:, :1].expand(-1, 6, 8).reshape(-1, 48).view(-1, 6, 8),
}


@settings(deadline=None, max_examples=15, derandomize=True)
@given(names=st.lists(st.sampled_from(list(HEADS)), min_size=1, max_size=7), seed=st.integers(0, 9))
def test_operators_in_random_company(names: list[str], seed: int) -> None:
    """Each takes the last value, and all values are results: expressions and memory are shared."""

    def function(x: T, w: Weights) -> T:
        values = [x.view(-1, 6, 8) * (1 + seed)]
        for index, name in enumerate(names):
            found = HEADS[name](values[-1], Prefixed(w, f"{index}{name}"))
            values.append(torch.tanh(found))
        return torch.cat([value.flatten(1) for value in values], -1)

    assert agree(function) == set()


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "gated_norm", "mlp", "partial_rotary", "residual", "layer_norm", "routing", "softmax"],
)
def test_bfloat16_is_no_worse_than_torch(name: str) -> None:
    function = NATIVE[name]
    role = role_of(function, WIDTH, torch.bfloat16)
    assert left_to_torch(role) == set()
    rows = rows_of(33, dtype=torch.bfloat16)
    wanted = exact(function, rows)
    found, stock = run(role, rows), function(rows, Weights(torch.bfloat16, torch.bfloat16))
    assert found.dtype is stock.dtype is torch.bfloat16
    error, others = ((one.double() - wanted).abs().mean() for one in (found, stock))
    assert float(error) <= 1.02 * float(others), f"{error:.2e}, torch {others:.2e}"
    assert torch.equal(run(role, rows[7:8])[0], found[7])
