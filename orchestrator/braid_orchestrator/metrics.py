"""What the orchestrator counts beside its layers: steps, pools, requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from braid_wire.layers import Role
from braid_wire.metrics import LATENCY_BUCKETS, MODES, TOKEN_BUCKETS, ProcessMetrics
from prometheus_client import Counter, Gauge, Histogram

from braid_orchestrator.memory import Pool, RoleMemory

# Requests live longer than layers: from a millisecond to a minute and a half.
REQUEST_BUCKETS = (*(b for b in LATENCY_BUCKETS if b >= 1e-3), 10.0, 30.0, 90.0)


class CellMetrics(ProcessMetrics):
    """The orchestrator's registry."""

    def __init__(self, version: str) -> None:
        super().__init__("orchestrator", version)
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
        self.inter_token = _requests("braid_request_inter_token_seconds", "Between two tokens.", self)
        self.request_seconds = _requests("braid_request_seconds", "Arrival to end.", self)
        self.queue_seconds = _requests("braid_request_queue_seconds", "Arrival to first step.", self)
        self.running = Gauge("braid_requests_running", "Requests that run.", registry=registry)
        self.waiting = Gauge("braid_requests_waiting", "Requests that wait.", registry=registry)
        self.finished = Counter(
            "braid_requests_finished", "Requests that ended, by how.", ["outcome"], registry=registry
        )
        self.prompt_tokens = Counter("braid_prompt_tokens", "Prompt tokens fed.", registry=registry)
        self.generated_tokens = Counter("braid_generated_tokens", "Tokens made.", registry=registry)

    def step(self, mode: str, tokens: int, seconds: float) -> None:
        """Count one step."""
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
            total = Gauge(f"braid_{name}_total", f"{name.title()} in all.", ["role"], registry=self.registry)
            for role, parts in memory.items():
                pool: Pool | None = parts.pages if name == "pages" else parts.slots
                if pool is not None:
                    used.labels(role.value).set_function(_reader(pool))
                    total.labels(role.value).set(pool.total)


def _requests(name: str, text: str, metrics: ProcessMetrics) -> Histogram:
    return Histogram(name, text, buckets=REQUEST_BUCKETS, registry=metrics.registry)


def _reader(pool: Pool) -> Callable[[], float]:
    return lambda: pool.used
