"""Load on a serving cell: requests that arrive as they like, or so many at once.

In an open loop requests arrive by a clock, whatever the cell does, and every time is counted from the
moment at which the request was to be sent: a stall counts for all that should have come in it. In a
closed loop so many are always under way.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from braid_wire import rpc
from braid_wire.errors import BraidError, RequestInvalid, ServiceFault
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc

from braid_orchestrator.bench.options import Row
from braid_orchestrator.bench.workload import Conversation
from braid_orchestrator.client import AsyncClient

PERCENTILES = (50, 90, 95, 99)
_MS = 1e3


@dataclass(frozen=True)
class Load:
    """How requests come.

    Args:
        rate: conversations that begin in a second; None: closed loop.
        concurrency: conversations under way at most; None: no bound (open loop alone).
        burstiness: shape of the gamma distribution of the gaps; 1: a Poisson process, less: bursts.
        cancel_share: part of the requests that are given up after their first token.
        slo_ttft_ms, slo_itl_ms: what a good request keeps, if given: time to its first token, and the mean
            between tokens.
        seed: of arrivals and cancels.

    Raises:
        RequestInvalid: neither rate nor concurrency is given, or a value is out of its range.
    """

    rate: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0
    cancel_share: float = 0.0
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is None and self.concurrency is None:
            raise RequestInvalid("give a rate (open loop) or a concurrency (closed loop)", field="rate")
        for name, value in (("rate", self.rate), ("burstiness", self.burstiness)):
            if value is not None and not 0 < value < float("inf"):
                raise RequestInvalid(f"{name} is {value}; it must be above 0", field=name, value=value)
        if not 0 <= self.cancel_share <= 1:
            raise RequestInvalid(
                f"cancel_share is {self.cancel_share}; it must be in [0, 1]",
                field="cancel_share",
                value=self.cancel_share,
            )

    def arrivals(self, count: int) -> list[float]:
        """Seconds from the start at which each conversation is to begin; all 0 in a closed loop."""
        if self.rate is None:
            return [0.0] * count
        random = np.random.default_rng(self.seed)
        gaps = random.gamma(self.burstiness, 1 / (self.rate * self.burstiness), count)
        found: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return found

    def cancels(self, count: int) -> list[bool]:
        """Which conversations' requests are given up."""
        found: list[bool] = (np.random.default_rng((self.seed, 1)).random(count) < self.cancel_share).tolist()
        return found


@dataclass
class Outcome:
    """One request; times are seconds from the start of the load."""

    conversation: int
    turn: int
    intended: float
    """When it was to be sent."""
    sent: float
    first: float | None = None
    """Its first token."""
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Seconds between neighbouring tokens; tokens that came together share the time."""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """Reason, for one that failed; "CANCELLED" where the load gave it up."""

    @property
    def seconds(self) -> float:
        """From when it was to be sent to its end."""
        return self.ended - self.intended

    @property
    def ttft(self) -> float:
        """From when it was to be sent to its first token; inf where none came."""
        return float("inf") if self.first is None else self.first - self.intended


async def run(address: str, conversations: Sequence[Conversation], load: Load) -> list[Outcome]:
    """Put a load on a cell, and give what became of each request, by conversation and turn.

    A conversation's turns follow each other: each begins when the one before has ended.
    """
    arrivals = load.arrivals(len(conversations))
    cancels = load.cancels(len(conversations))
    places = asyncio.Semaphore(load.concurrency or len(conversations))
    async with AsyncClient(address) as client:
        await client.status()  # a cell that is not there is one error, and connecting is not measured
        began = time.monotonic()

        async def hold(index: int) -> list[Outcome]:
            await asyncio.sleep(max(began + arrivals[index] - time.monotonic(), 0))
            async with places:
                intended = arrivals[index] if load.rate is not None else time.monotonic() - began
                return await _converse(client, index, conversations[index], began, intended, cancels[index])

        found = await asyncio.gather(*(hold(index) for index in range(len(conversations))))
    return [outcome for part in found for outcome in part]


async def _converse(
    client: AsyncClient, index: int, turns: Conversation, began: float, intended: float, cancel: bool
) -> list[Outcome]:
    found: list[Outcome] = []
    so_far: Any = None
    for number, turn in enumerate(turns):
        so_far = turn.prompt if so_far is None else so_far + turn.prompt
        outcome = Outcome(index, number, intended, time.monotonic() - began)
        text = await _ask(client, so_far, turn.max_tokens, outcome, began, cancel)
        found.append(outcome)
        if outcome.error:
            break
        so_far += text if isinstance(so_far, str) else tuple(outcome.token_ids)
        intended = outcome.ended
    return found


async def _ask(
    client: AsyncClient,
    prompt: str | tuple[int, ...],
    most: int,
    outcome: Outcome,
    began: float,
    cancel: bool,
) -> str:
    """One request into `outcome`; its text."""
    text = ""
    try:
        async with client.generate(prompt, most, ignore_eos=True) as generation:
            last = 0.0
            async for chunk in generation:
                now = time.monotonic() - began
                if outcome.first is None:
                    outcome.first = now
                else:
                    outcome.gaps += [(now - last) / len(chunk.token_ids)] * len(chunk.token_ids)
                last = now
                outcome.token_ids += chunk.token_ids
                text += chunk.text
                if cancel:
                    outcome.error = "CANCELLED"
                    break
            else:
                done = generation.completion
                outcome.prompt_tokens, outcome.cached_tokens = done.prompt_tokens, done.cached_tokens
    except BraidError as error:
        outcome.error = error.reason
    outcome.ended = time.monotonic() - began
    return text


def report(name: str, outcomes: Sequence[Outcome], load: Load, alone: Sequence[Outcome] = ()) -> Row:
    """A row of figures.

    Args:
        name: of the row.
        outcomes: of one run.
        load: that it ran under.
        alone: the same requests one at a time; then speed-up and fairness are reported, too.

    Raises:
        ServiceFault: a request made other tokens than alone.
    """
    good = [one for one in outcomes if not one.error]
    took = max((one.ended for one in outcomes), default=0.0)
    tokens = sum(len(one.token_ids) for one in outcomes)
    errors = Counter(one.error for one in outcomes if one.error not in ("", "CANCELLED"))
    row: Row = {
        "load": name,
        "rate": load.rate,
        "concurrency": load.concurrency,
        "requests": len(outcomes),
        "completed": len(good),
        "cancelled": sum(one.error == "CANCELLED" for one in outcomes),
        "errors": dict(errors),
        "seconds": round(took, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / took, 1) if took else None,
        "requests_per_s": round(len(good) / took, 2) if took else None,
        "cached_share": _share(sum(o.cached_tokens for o in good), sum(o.prompt_tokens for o in good)),
        **_percentiles("ttft_ms", [one.ttft for one in good]),
        **_percentiles("itl_ms", [gap for one in good for gap in one.gaps]),
        **_percentiles("e2e_ms", [one.seconds for one in good]),
        **_percentiles("send_delay_ms", [one.sent - one.intended for one in good]),
    }
    if load.slo_ttft_ms is not None or load.slo_itl_ms is not None:
        kept = sum(_keeps(one, load) for one in good)
        row["goodput_per_s"] = round(kept / took, 2) if took else None
        row["goodput_share"] = _share(kept, len(outcomes))
    if alone:
        row.update(_against(good, tokens / took, alone))
    return row


def _keeps(one: Outcome, load: Load) -> bool:
    """Whether a request kept what it was promised."""
    mean = float(np.mean(one.gaps)) if one.gaps else 0.0
    in_time = load.slo_ttft_ms is None or one.ttft * _MS <= load.slo_ttft_ms
    return in_time and (load.slo_itl_ms is None or mean * _MS <= load.slo_itl_ms)


def _against(good: Sequence[Outcome], tokens_per_s: float, alone: Sequence[Outcome]) -> Row:
    """Speed-up over one at a time, and how evenly the waiting is shared."""
    quiet = {(one.conversation, one.turn): one for one in alone if not one.error}
    pairs = [(one, quiet[key]) for one in good if (key := (one.conversation, one.turn)) in quiet]
    for one, other in pairs:
        if one.token_ids != other.token_ids:
            raise ServiceFault(
                f"request {one.conversation}.{one.turn} made other tokens under load than alone; "
                "nothing is reported"
            )
    slowdowns = [one.seconds / other.seconds for one, other in pairs]
    rate = sum(len(one.token_ids) for one in alone) / max(one.ended for one in alone)
    return {
        "same_as_alone": len(pairs),
        "speedup": round(tokens_per_s / rate, 2),
        "fairness": jain(slowdowns),
        "slowdown_p50": round(float(np.median(slowdowns)), 2) if slowdowns else None,
        "slowdown_max": round(max(slowdowns), 2) if slowdowns else None,
    }


def jain(values: Sequence[float]) -> float | None:
    """Jain's index (Jain, Chiu, Hawe 1984): (Σx)² / (n Σx²): 1 where all are equal, 1/n where one has all."""
    if not values:
        return None
    found = np.asarray(values, dtype=np.float64)
    return round(float(found.sum() ** 2 / (len(found) * (found**2).sum())), 4)


def queueing(before: Mapping[float, float], after: Mapping[float, float]) -> Row:
    """Percentiles of the time from arrival to the first step, out of the cell's own histogram.

    Args:
        before, after: upper bound of a bucket, seconds → requests at or below it. Each percentile is the
            upper bound of the bucket that it lies in.
    """
    bounds = sorted(after)
    counts = [after[bound] - before.get(bound, 0) for bound in bounds]
    if not counts or not counts[-1]:
        return {}
    found = {}
    for percent in PERCENTILES:
        bound = next(b for b, n in zip(bounds, counts, strict=True) if n >= counts[-1] * percent / 100)
        found[f"queue_ms_p{percent}_at_most"] = round(bound * _MS, 3) if bound < float("inf") else None
    return found


def details(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every request, as JSON; times in seconds, and how many tokens instead of which."""
    return [
        {**{k: v for k, v in asdict(one).items() if k != "token_ids"}, "tokens": len(one.token_ids)}
        for one in outcomes
    ]


def flush(address: str) -> None:
    """Let the cell forget all prefixes, so that two runs of the same requests begin alike.

    Raises:
        ServiceFault: it did not.
    """
    with rpc.channel(address) as channel:
        answer = vllm_engine_pb2_grpc.VllmEngineStub(channel).FlushCache(common_pb2.FlushCacheRequest())
    if not answer.success:
        raise ServiceFault(f"the prefix cache was not flushed: {answer.message}")


async def settle(address: str, timeout_s: float = 10.0) -> dict[str, int]:
    """What is left when nothing runs any more: requests, and units that somebody holds, by pool.

    Raises:
        ServiceFault: something still runs after the time.
    """
    deadline = time.monotonic() + timeout_s
    async with AsyncClient(address) as client:
        while (status := await client.status()).running or status.waiting:
            if time.monotonic() > deadline:
                raise ServiceFault(f"{status.running} requests still run {timeout_s:.0f} s after the load")
            await asyncio.sleep(0.02)
        return {pool.name: pool.used for pool in status.pools}


def _percentiles(name: str, seconds: Sequence[float]) -> Row:
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * _MS, PERCENTILES)
    return {f"{name}_p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, values, strict=True)}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
