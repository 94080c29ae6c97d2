"""What the orchestrator counts beside its layers: steps, pools, requests, the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from braid_wire.errors import BraidError
from braid_wire.layers import Role
from braid_wire.metrics import LATENCY_BUCKETS, MODES, TOKEN_BUCKETS, ProcessMetrics, TallyMetric
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, UnknownMetricFamily
from prometheus_client.registry import Collector

from braid_orchestrator.memory import RoleMemory
from braid_orchestrator.pool import Pool
from braid_orchestrator.recent import RecentErrors

if TYPE_CHECKING:
    from braid_orchestrator.scheduler import Scheduler

# Requests live longer than layers: from a millisecond to a minute and a half.
REQUEST_BUCKETS = (*(b for b in LATENCY_BUCKETS if b >= 1e-3), 10.0, 30.0, 90.0)
SLOWDOWN_BUCKETS = (1.1, 1.25, 1.5, 2, 3, 5, 8, 12, 20, 50, 100)


class CellMetrics(ProcessMetrics):
    """The orchestrator's registry."""

    def __init__(self, version: str) -> None:
        super().__init__("orchestrator", version)
        self.errors = RecentErrors()
        registry = self.registry
        seconds = Histogram(
            "braid_step_seconds", "Time of a step.", ["mode"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self._step_seconds = {mode: seconds.labels(mode) for mode in MODES}
        self._step_tokens = Histogram(
            "braid_step_tokens", "Tokens of a step.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.replays = Counter(
            "braid_replays", "Steps run again after a service was lost.", registry=registry
        )
        self.time_to_first = _requests("braid_request_first_token_seconds", "Arrival to first token.", self)
        self.inter_token = TallyMetric(
            "braid_request_inter_token_seconds", "Between two tokens.", REQUEST_BUCKETS, registry
        )
        self.request_seconds = _requests("braid_request_seconds", "Arrival to end.", self)
        self.queue_seconds = _requests("braid_request_queue_seconds", "Arrival to first step.", self)
        self.slowdown = Histogram(
            "braid_request_slowdown_ratio",
            "Arrival to end, over the time of the steps that it took part in.",
            buckets=SLOWDOWN_BUCKETS,
            registry=registry,
        )
        self.running = Gauge("braid_requests_running", "Requests that run.", registry=registry)
        self.waiting = Gauge("braid_requests_waiting", "Requests that wait.", registry=registry)
        self.waiting_limit = Gauge(
            "braid_requests_waiting_limit", "Requests that may wait.", registry=registry
        )
        self.running_limit = Gauge(
            "braid_requests_running_limit", "Sequences that one step takes.", registry=registry
        )
        self.finished = Counter(
            "braid_requests_finished", "Requests that ended, by how.", ["outcome"], registry=registry
        )
        self.prompt_tokens = Counter("braid_prompt_tokens", "Prompt tokens fed.", registry=registry)
        self.generated_tokens = Counter("braid_generated_tokens", "Tokens made.", registry=registry)
        drafted = Counter(
            "braid_draft_tokens", "Drafted tokens that were verified.", ["outcome"], registry=registry
        )
        self.accepted_tokens, self.rejected_tokens = drafted.labels("accepted"), drafted.labels("rejected")

    def refused(self, error: BraidError) -> None:
        """Count a request that an error ended, and remember the error."""
        super().refused(error)
        self.errors.note(error)

    def step(self, mode: str, tokens: int, seconds: float) -> None:
        """Count one step."""
        if not self.recording:
            return
        self._step_seconds[mode].observe(seconds)
        self._step_tokens.observe(tokens)

    def watch_pools(self, memory: Mapping[Role, RoleMemory]) -> None:
        """Publish used and total pages and slots of every role, read at every scrape."""
        for name in ("pages", "slots"):
            used = Gauge(
                f"braid_{name}_used",
                f"{name.title()} that a sequence holds.",
                ["role"],
                registry=self.registry,
            )
            cached = Gauge(
                f"braid_prefix_cache_{name}_bytes",
                f"Bytes of {name} that only the prefix cache keeps.",
                ["role"],
                registry=self.registry,
            )
            totals: dict[str, int] = {}
            for role, parts in memory.items():
                pool: Pool | None = parts.pages if name == "pages" else parts.slots
                if pool is not None:
                    used.labels(role.value).set_function(_reader(pool))
                    cached.labels(role.value).set_function(_cached_bytes(pool))
                    totals[role.value] = pool.total
            self.registry.register(_PoolTotals(name, totals))

        self.registry.register(_VersionCounts(memory))

    def watch_scheduler(self, scheduler: Scheduler) -> None:
        """Publish preemptions and what the prefix cache did, read at every scrape."""
        self.registry.register(_SchedulerCounts(scheduler))


class _PoolTotals(Collector):
    """How many units the pools have. Without a type: conventions keep `_total` for counters."""

    def __init__(self, name: str, totals: Mapping[str, int]) -> None:
        self._name = name
        self._totals = totals

    def collect(self) -> Iterator[UnknownMetricFamily]:
        family = UnknownMetricFamily(
            f"braid_{self._name}_total", f"{self._name.title()} in all.", labels=["role"]
        )
        for role, total in self._totals.items():
            family.add_metric([role], total)
        yield family


class _SchedulerCounts(Collector):
    """Counts that the scheduler and its cache keep by themselves."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts = {"braid_preemptions": ("Requests that gave way to older ones.", self._scheduler.preemptions)}
        if self._scheduler.cache is not None:
            stats = self._scheduler.cache.stats
            counts |= {
                "braid_prefix_hits": ("Requests that began behind a cached prefix.", stats.hits),
                "braid_prefix_misses": ("Requests that found nothing cached.", stats.misses),
                "braid_prefix_hit_tokens": ("Tokens that were not computed again.", stats.hit_tokens),
                "braid_prefix_evicted_pages": ("Pages dropped to make room.", stats.evicted_pages),
                "braid_prefix_evicted_states": ("States dropped to make room.", stats.evicted_states),
            }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(name, text, value=value)


class _VersionCounts(Collector):
    """Versions of states, which the memory of each role counts by itself."""

    def __init__(self, memory: Mapping[Role, RoleMemory]) -> None:
        self._memory = memory

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "braid_state_versions",
            "Versions of recurrent states that steps wrote, by what became of them.",
            labels=("role", "outcome"),
        )
        for role, memory in self._memory.items():
            if memory.slots is not None:
                for outcome, count in asdict(memory.versions).items():
                    family.add_metric((role.value, outcome), count)
        yield family


def _requests(name: str, text: str, metrics: ProcessMetrics) -> Histogram:
    return Histogram(name, text, buckets=REQUEST_BUCKETS, registry=metrics.registry)


def _reader(pool: Pool) -> Callable[[], float]:
    return lambda: pool.used


def _cached_bytes(pool: Pool) -> Callable[[], float]:
    return lambda: pool.cached * pool.unit_bytes
