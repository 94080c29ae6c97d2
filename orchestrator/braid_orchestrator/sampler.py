"""Choosing tokens from logits, for many requests at once.

What is chosen for a request depends on its own row of logits, on what it has made and on its seed:
not on the other rows, and not on what was drawn before. So a request that is computed again, or that
runs in other company, makes the same tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from braid_wire.batch import IntArray
from braid_wire.errors import ServiceFault

from braid_orchestrator.sampling import Sampling

TOKEN_STREAM = 0
"""The stream of uniforms that tokens are drawn with."""

_WIDTHS = (1024, 16384)
"""Likeliest tokens that filters look at before they look at all. They nearly always cut inside these,
and sorting a vocabulary of 150,000 takes twenty times as long as finding its first 1024."""
_BINS, _DEPTH = 8192, 40.0
"""Bins of tokens by the negative log of their weight, and the log that the last one begins before."""
_COLDEST = 1e-30
"""Temperatures below it choose the same tokens, and would overflow float32."""
_BLOCK = 4
"""Rows that are worked on at a time: more of them do not stay in a processor's cache."""

Alternatives = tuple[tuple[int, float], ...]
"""Token id and natural-log probability of each, the likeliest first."""

_Amounts = tuple[IntArray, np.ndarray]
"""Token ids, and a number for each."""
_NO_IDS: IntArray = np.empty(0, dtype=np.int64)
_NOTHING: _Amounts = (_NO_IDS, np.empty(0, dtype=np.float32))


@dataclass(frozen=True)
class Choice:
    """A token that was chosen.

    Args:
        token_id: which.
        logprob: its natural-log probability in the model's own distribution; None: not asked for.
        top: as many of the likeliest tokens at its place as were asked for.
    """

    token_id: int
    logprob: float | None = None
    top: Alternatives = ()


class Sampler:
    """How one request chooses; it keeps nothing that changes.

    Args:
        sampling: what the caller wants.
        prompt: int64 [L], token ids; they count as repeated.
        stops: tokens that are masked until `min_tokens` are made.
    """

    def __init__(self, sampling: Sampling, prompt: IntArray | None = None, stops: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self._seed = (secrets.randbits(64) if sampling.seed is None else sampling.seed) % 2**64
        self._stops = np.array(sorted(stops), dtype=np.int64)
        self._biased = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._biases = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._repeats = sampling.repetition_penalty != 1
        self._counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._prompt = np.unique(prompt) if self._repeats and prompt is not None else _NO_IDS

    @property
    def unrepeatable(self) -> bool:
        """Whether tokens are random, and nobody can ask for the same ones again."""
        return not self.sampling.greedy and self.sampling.seed is None

    def uniform(self, position: int, stream: int = TOKEN_STREAM) -> float:
        """A random number in [0, 1), fixed by the seed and the arguments.

        Args:
            position: tokens made before the one that it is for.
            stream: tells apart numbers that are drawn for the same token.
        """
        raw = np.random.Philox(key=self._seed, counter=[position, stream, 0, 0]).random_raw()
        # 52 bits, so that its product with a sum in float64 is always below that sum.
        return float(int(raw) >> 12) * 2.0**-52

    def distribution(self, logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """float64 [V]: the probability of each token to be the next.

        Args:
            logits: [V].
            tokens: made so far, without the prompt.

        Raises:
            ServiceFault: the logits leave no token to choose.
        """
        edited = _edited([Turn(self, tokens)], logits[None])
        highest, likeliest = edited.max(-1)
        if not math.isfinite(float(highest)):
            raise _no_choice()
        found = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
        if self.sampling.greedy:
            found[likeliest] = 1.0
            return found
        (support,) = _supports([self.sampling], edited, highest)
        weights = support.weights[0].double()
        found[support.ids[0]] = weights / weights.sum()
        return found

    def choose(self, logits: torch.Tensor, tokens: Sequence[int]) -> Choice:
        """The next token; arguments and errors are those of `distribution`."""
        (found,) = choose([Turn(self, tokens)], logits[None])
        if isinstance(found, ServiceFault):
            raise found
        return found

    def edits(self, made: int) -> bool:
        """Whether logits are changed before the token behind `made` others is chosen."""
        return len(self._biased) > 0 or self._repeats or self._counts or self._masks(made)

    def bias(self, tokens: Sequence[int]) -> _Amounts:
        """What is added first."""
        return self._biased, self._biases

    def repetition(self, tokens: Sequence[int]) -> _Amounts:
        """Whose logits are divided or multiplied next, and by what."""
        if not self._repeats:
            return _NOTHING
        ids = np.concatenate([self._prompt, np.array(tokens, dtype=np.int64)])
        return ids, np.full(len(ids), self.sampling.repetition_penalty, dtype=np.float32)

    def penalty(self, tokens: Sequence[int]) -> _Amounts:
        """What is added last: less for what was made, and −inf for stop tokens that come too early."""
        ids, amounts = _NOTHING
        if self._counts and tokens:
            ids, counts = np.unique(np.array(tokens, dtype=np.int64), return_counts=True)
            amounts = -(self.sampling.frequency_penalty * counts + self.sampling.presence_penalty)
        if not self._masks(len(tokens)):
            return ids, amounts
        return np.concatenate([ids, self._stops]), np.append(amounts, np.full(len(self._stops), -np.inf))

    def _masks(self, made: int) -> bool:
        return made < self.sampling.min_tokens and len(self._stops) > 0


@dataclass(frozen=True)
class Distribution:
    """What a token is drawn from.

    Args:
        ids: int64 [K], ascending: the tokens that it can be, and perhaps some that it cannot.
        chances: float64 [K], the probability of each.
    """

    ids: torch.Tensor
    chances: torch.Tensor

    def probability(self, token_id: int) -> float:
        """Of one token."""
        place = int(torch.searchsorted(self.ids, token_id))
        known = place < len(self.ids) and int(self.ids[place]) == token_id
        return float(self.chances[place]) if known else 0.0

    def draw(self, uniform: float) -> int:
        """The token that a random number in [0, 1) stands for."""
        mass = self.chances.cumsum(-1)
        return int(self.ids[torch.searchsorted(mass, mass[-1] * uniform, right=True)])

    def beyond(self, other: Distribution) -> Distribution:
        """The part of it that lies above another one; itself where it is the same."""
        places = torch.searchsorted(other.ids, self.ids).clamp(max=len(other.ids) - 1)
        theirs = torch.where(other.ids[places] == self.ids, other.chances[places], 0)
        rest = (self.chances - theirs).clamp(min=0)
        mass = rest.sum()
        return Distribution(self.ids, rest / mass) if mass > 0 else self


@dataclass(frozen=True)
class Turn:
    """A request that is to choose: how, and behind which tokens that it made."""

    sampler: Sampler
    tokens: Sequence[int]


def choose(turns: Sequence[Turn], logits: torch.Tensor) -> list[Choice | ServiceFault]:
    """The next token of each request; a fault where its logits leave none.

    Args:
        turns: n requests.
        logits: [n, V], the model's own, of each.
    """
    if not turns:
        return []
    edited = _edited(turns, logits)
    highest, likeliest = edited.max(-1)
    good = highest.isfinite().tolist()
    tokens: list[int] = likeliest.tolist()
    drawing = [row for row, turn in enumerate(turns) if good[row] and not turn.sampler.sampling.greedy]
    for first in range(0, len(drawing), _BLOCK):
        block = drawing[first : first + _BLOCK]
        drawn = _drawn([turns[row] for row in block], _rows(edited, block), _rows(highest, block))
        for row, token in zip(block, drawn, strict=True):
            tokens[row] = token
    choices = told([turn.sampler.sampling for turn in turns], logits, tokens)
    return [choice if right else _no_choice() for choice, right in zip(choices, good, strict=True)]


def distributions(turns: Sequence[Turn], logits: torch.Tensor) -> list[Distribution | ServiceFault]:
    """What the next token of each request is drawn from; a fault where its logits leave none.

    Args:
        turns: n requests, none of them greedy.
        logits: [n, V], the model's own, of each.
    """
    found: list[Distribution | ServiceFault] = [_no_choice() for _ in turns]
    if not turns:
        return found
    edited = _edited(turns, logits)
    highest = edited.max(-1).values
    good = [row for row, finite in enumerate(highest.isfinite().tolist()) if finite]
    for first in range(0, len(good), _BLOCK):
        block = good[first : first + _BLOCK]
        samplings = [turns[row].sampler.sampling for row in block]
        for support in _supports(samplings, _rows(edited, block), _rows(highest, block)):
            ids, weights = support.ids, support.weights.double()
            chances = weights / weights.sum(-1, keepdim=True)
            for place, *parts in zip(support.rows, ids, chances, strict=True):
                found[block[place]] = Distribution(*parts)
    return found


def logprobs(logits: torch.Tensor, ids: torch.Tensor, most: int = 0) -> list[tuple[float, Alternatives]]:
    """The natural-log probability of a token behind each row, and the likeliest ones there.

    Args:
        logits: [n, V].
        ids: int64 [n].
        most: how many of the likeliest.
    """
    found: list[tuple[float, Alternatives]] = []
    most = min(most, logits.shape[-1])
    for rows, wanted in zip(logits.split(_BLOCK), ids.split(_BLOCK), strict=True):
        table = rows.float().log_softmax(-1)
        own = table.gather(1, wanted[:, None])[:, 0].tolist()
        values, tokens = (part.tolist() for part in table.topk(most))
        tops = (tuple(zip(*pair, strict=True)) for pair in zip(tokens, values, strict=True))
        found.extend(zip(own, tops, strict=True))
    return found


def told(samplings: Sequence[Sampling], logits: torch.Tensor, tokens: Sequence[int]) -> list[Choice]:
    """The tokens as choices, with their log-probabilities where they are wanted.

    Args:
        samplings: of n requests.
        logits: [n, V], the model's own, of each.
        tokens: one for each.
    """
    choices = [Choice(token) for token in tokens]
    telling = {row: wanted.logprobs for row, wanted in enumerate(samplings) if wanted.logprobs is not None}
    if not telling:
        return choices
    ids = torch.tensor([tokens[row] for row in telling], device=logits.device)
    found = logprobs(_rows(logits, list(telling)), ids, max(telling.values()))
    for (row, most), (logprob, top) in zip(telling.items(), found, strict=True):
        choices[row] = Choice(tokens[row], logprob, top[:most])
    return choices


def _edited(turns: Sequence[Turn], logits: torch.Tensor) -> torch.Tensor:
    """float32 [n, V] after biases, penalties and masks; not a copy where there are none."""
    if not any(turn.sampler.edits(len(turn.tokens)) for turn in turns):
        return logits.float()
    edited = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _add(edited, [turn.sampler.bias(turn.tokens) for turn in turns])
    index, factors = _flat(edited, [turn.sampler.repetition(turn.tokens) for turn in turns])
    values = edited.view(-1)[index]
    edited.view(-1)[index] = torch.where(values > 0, values / factors, values * factors)
    _add(edited, [turn.sampler.penalty(turn.tokens) for turn in turns])
    return edited


def _add(logits: torch.Tensor, amounts: Sequence[_Amounts]) -> None:
    logits.view(-1).index_add_(0, *_flat(logits, amounts))


def _flat(logits: torch.Tensor, amounts: Sequence[_Amounts]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [k] places in the flattened logits [n, V], and float32 [k]; one entry for each row.

    Ids beyond the vocabulary are left out: a model's own end tokens may lie there.
    """
    width = logits.shape[-1]
    places, values = [], []
    for row, (ids, found) in enumerate(amounts):
        within = ids < width
        places.append(ids[within] + row * width)
        values.append(found[within].astype(np.float32))
    return (
        torch.from_numpy(np.concatenate(places)).to(logits.device),
        torch.from_numpy(np.concatenate(values)).to(logits.device),
    )


@dataclass(frozen=True)
class _Support:
    """What some requests draw from.

    Args:
        rows: which requests, m of them.
        weights: [m, K], at most 1 each, 0 for what was dropped; not normalised.
        ids: int64 [m, K], ascending: whose weights they are.
    """

    rows: list[int]
    weights: torch.Tensor
    ids: torch.Tensor


def _drawn(turns: Sequence[Turn], logits: torch.Tensor, highest: torch.Tensor) -> list[int]:
    """A token for each request; arguments are those of `_supports`."""
    tokens = [0] * len(turns)
    uniforms = torch.tensor([turn.sampler.uniform(len(turn.tokens)) for turn in turns], dtype=torch.float64)
    for support in _supports([turn.sampler.sampling for turn in turns], logits, highest):
        mass = support.weights.cumsum(-1, dtype=torch.float64)
        aims = mass[:, -1:] * uniforms[support.rows].to(mass.device)[:, None]
        places = torch.searchsorted(mass, aims, right=True)
        for row, token in zip(support.rows, support.ids.gather(1, places)[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


def _supports(
    samplings: Sequence[Sampling], logits: torch.Tensor, highest: torch.Tensor
) -> Iterator[_Support]:
    """What is left of each distribution behind temperature, top-k, top-p and min-p.

    Args:
        samplings: of n requests, none of them greedy.
        logits: float32 [n, V], edited.
        highest: [n], the largest of each row; finite.
    """
    vocab_size = logits.shape[-1]
    free = [row for row, wanted in enumerate(samplings) if not _filters(wanted, vocab_size)]
    if free:
        temperatures = _column([samplings[row].temperature for row in free], logits)
        weights = _weights(_rows(logits, free), _rows(highest, free), temperatures)
        yield _Support(free, weights, _all_ids(weights))
    left = [row for row in range(len(samplings)) if row not in free]
    for number, width in enumerate((*(width for width in _WIDTHS if width < vocab_size), vocab_size)):
        if number:
            # Where the likeliest tokens were not enough, the mass is looked at before more are sorted.
            massed = [row for row in left if not 0 < samplings[row].top_k < vocab_size]
            left = [row for row in left if row not in massed]
            if massed:
                yield _massed(samplings, logits, highest, massed)
        tried = [row for row in left if samplings[row].top_k < width or width == vocab_size]
        if not tried:
            continue
        support = _filtered(samplings, logits, highest, tried, width)
        left = [row for row in left if row not in support.rows]
        if support.rows:
            yield support


def _filtered(
    samplings: Sequence[Sampling], logits: torch.Tensor, highest: torch.Tensor, rows: list[int], width: int
) -> _Support:
    """What filters leave of some rows, looked for among the `width` likeliest tokens.

    Rows whose filters do not certainly cut inside these are not part of it.
    """
    wanted = [samplings[row] for row in rows]
    logits, highest = _rows(logits, rows), _rows(highest, rows)
    temperatures = _column([one.temperature for one in wanted], logits)
    values, ids = _likeliest(logits, width)
    weights = _weights(values.double(), highest, temperatures)
    top_k = _column([one.top_k or logits.shape[-1] for one in wanted], logits)
    top_p = _column([one.top_p for one in wanted], logits)
    min_p = _column([one.min_p for one in wanted], logits)
    keep = (torch.arange(width, device=logits.device) < top_k) & values.isfinite()
    keep &= weights >= min_p  # the likeliest token's weight is 1
    if any(one.top_p < 1 for one in wanted):
        ranked = torch.where(torch.arange(width, device=logits.device) < top_k, weights, 0)
        total = ranked.sum(-1, keepdim=True)
        if any(one.top_k == 0 for one in wanted):
            everything = _weights(logits, highest, temperatures).sum(-1, keepdim=True, dtype=torch.float64)
            total = torch.where(top_k < logits.shape[-1], total, everything)
        before = ranked.cumsum(-1) - ranked
        keep &= (before < top_p * total) | (top_p == 1)
    kept = torch.where(keep, weights, 0)
    # By id, as everywhere: what a number draws must not depend on how many tokens were looked at.
    if width == logits.shape[-1]:
        return _Support(rows, torch.zeros_like(kept).scatter_(-1, ids, kept), _all_ids(kept))
    ids, order = ids.sort(-1)
    support = _Support(rows, kept.gather(-1, order), ids)
    # A token outside that is as likely as the last one kept might have come before it.
    last = values.gather(-1, keep.sum(-1, keepdim=True) - 1)[:, 0]
    certain = [place for place, inside in enumerate((last > values[:, -1]).tolist()) if inside]
    return _Support([rows[place] for place in certain], _rows(support.weights, certain), _rows(ids, certain))


def _massed(
    samplings: Sequence[Sampling], logits: torch.Tensor, highest: torch.Tensor, rows: list[int]
) -> _Support:
    """What top-p and min-p leave of some rows without top-k, the whole vocabulary looked at, by id."""
    wanted = [samplings[row] for row in rows]
    logits = _rows(logits, rows)
    temperatures = _column([one.temperature for one in wanted], logits)
    weights = _weights(logits.double(), _rows(highest, rows), temperatures)
    keep = logits.isfinite() & (weights >= _column([one.min_p for one in wanted], logits))
    for place, one in enumerate(wanted):
        if one.top_p < 1:
            keep[place] &= _nucleus(logits[place], weights[place], one.top_p)
    return _Support(rows, torch.where(keep, weights, 0), _all_ids(weights))


def _nucleus(values: torch.Tensor, weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """bool [V]: the tokens before which less than `top_p` of the mass lies, the likeliest first.

    Tokens are put into bins by their weights; bins have no order inside, but one among them. Only in the
    bin in which the mass is reached are tokens sorted, equal ones by id.

    Args:
        values: [V], what they are ordered by.
        weights: float64 [V], at most 1; never less for a larger value.
        top_p: in (0, 1).
    """
    bins = (weights.log().neg() * (_BINS / _DEPTH)).clamp(max=_BINS - 1).long()
    mass = torch.bincount(bins, weights, _BINS)
    aim = top_p * mass.sum()
    before = mass.cumsum(0) - mass
    edge = int(((before < aim) & (mass > 0)).nonzero()[-1])
    keep = bins < edge
    inside = (bins == edge).nonzero()[:, 0]
    inside = inside[values[inside].sort(stable=True, descending=True).indices]
    reached = weights[inside]
    keep[inside[before[edge] + reached.cumsum(0) - reached < aim]] = True
    return keep


def _all_ids(weights: torch.Tensor) -> torch.Tensor:
    """int64 [m, V]: the ids of weights of the whole vocabulary."""
    return torch.arange(weights.shape[-1], device=weights.device).expand(weights.shape)


def _likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids [n, width] of the likeliest tokens; of equal ones, the lower id comes first."""
    if width >= logits.shape[-1]:
        values, ids = logits.sort(stable=True, dim=-1, descending=True)
        return values, ids
    ids = logits.topk(width).indices.sort(-1).values
    values, order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True)
    return values, ids.gather(-1, order)


def _weights(values: torch.Tensor, highest: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Probability of each value over that of the highest, after temperature; dtype of the values."""
    return ((values - highest[:, None]) / temperatures.to(values.dtype).clamp(min=_COLDEST)).exp()


def _filters(wanted: Sampling, vocab_size: int) -> bool:
    return 0 < wanted.top_k < vocab_size or wanted.top_p < 1 or wanted.min_p > 0


def _rows(tensor: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Some rows, in ascending order; not a copy where it is all of them."""
    return tensor if len(index) == len(tensor) else tensor[list(index)]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """float64 [n, 1] on the device of another tensor."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _no_choice() -> ServiceFault:
    return ServiceFault("the logits leave no token to choose: some are no numbers, or all are masked")
