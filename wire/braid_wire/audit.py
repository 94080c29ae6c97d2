"""Audits: now and then one layer of one step is computed again by the float64 reference, and compared.

A sample is copied around the kernel's call; the reference runs on a thread of its own at low priority,
so that what a step pays is a copy every so many seconds. Layers take turns.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from prometheus_client import Counter, Gauge

from braid_wire.layers import Geometry, Role
from braid_wire.metrics import ProcessMetrics

log = logging.getLogger(__name__)

OUTPUT = "output"
MOST_TOKENS = 64
"""Rows of the largest step that is audited; the reference walks them one by one."""
MOST_BYTES = 64 << 20
"""Pages or slots of the largest step that is audited: they are copied while the layer waits."""

_NICE = 19
_TINY = 1e-6

Tensors = Mapping[str, torch.Tensor]
Point = tuple[Role, int]


@dataclass(frozen=True)
class Sample:
    """One layer of one step, with copies of everything that it reads.

    Args:
        written: called right behind the kernel: copies of the memory that the layer writes.
        recompute: what the reference makes of the copies: `OUTPUT`, and the names of `written`.
    """

    written: Callable[[], Tensors]
    recompute: Callable[[], Tensors]


Sampler = Callable[[Tensors, object], Sample | None]
"""(inputs, payload of the planned batch) → a sample; None where the step is too large to be copied."""


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A private copy in this machine's memory, where the reference runs."""
    return tensor.to("cpu", copy=True)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest magnitude expected.

    What is NaN in both (memory that nobody has written) is equal; NaN in one of them is infinitely wrong.
    """
    found, expected = found.double(), expected.double()
    known = ~(found.isnan() & expected.isnan())
    if not known.any():
        return 0.0
    found, expected = found[known], expected[known]
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(_TINY)).item()
    return math.inf if math.isnan(error) else error


class Auditor:
    """Chooses samples and compares them; used by one thread at a time, as kernels are.

    Args:
        metrics: of the process; gets `braid_audit_error` and `braid_audits_total`.
        period_s: shortest time between two samples, seconds.
    """

    def __init__(self, metrics: ProcessMetrics, period_s: float) -> None:
        labels = ["role", "layer_id", "kind", "mechanism"]
        self._error = Gauge(
            "braid_audit_error",
            "Of the last audit: largest difference from the float64 reference, over the largest value.",
            labels,
            registry=metrics.registry,
        )
        self._count = Counter("braid_audits", "Audits done.", labels, registry=metrics.registry)
        self._period = period_s
        self._due = time.monotonic() + period_s
        self._audited: dict[Role, set[int]] = {role: set() for role in Role}
        self._jobs: queue.Queue[_Job] = queue.Queue(maxsize=1)
        threading.Thread(target=self._work, name="audit", daemon=True).start()

    def begin(
        self, point: Point, layers: Collection[int], sampler: Sampler, inputs: Tensors, payload: object
    ) -> Sample | None:
        """A sample of a layer that is about to run; None where it is not its turn.

        Args:
            point: the layer.
            layers: ids of all layers of its role here; each has its turn before one has another.
            sampler: of the layer.
            inputs: name → [T, …].
            payload: of the planned batch.
        """
        if time.monotonic() < self._due or self._jobs.full():
            return None
        role, layer_id = point
        done = self._audited[role]
        if done.issuperset(layers):
            done.clear()
        if layer_id in done:
            return None
        return sampler(inputs, payload)

    def end(self, point: Point, geometry: Geometry, sample: Sample, output: torch.Tensor) -> None:
        """Take the results of a layer that has run, and leave them to the thread."""
        role, layer_id = point
        self._due = time.monotonic() + self._period
        self._audited[role].add(layer_id)
        labels = (role.value, str(layer_id), geometry.kind.value, geometry.mechanism)
        self._jobs.put(_Job(labels, sample.recompute, {OUTPUT: copied(output), **sample.written()}))

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            self._audit(self._jobs.get())

    def _audit(self, job: _Job) -> None:
        try:
            expected = job.recompute()
            error = max(relative_error(job.found[name], tensor) for name, tensor in expected.items())
        except Exception:  # a sample that cannot be computed must not end the audits
            log.exception("the audit of %s layer %s (%s, %s) failed", *job.labels)
            return
        self._error.labels(*job.labels).set(error)
        self._count.labels(*job.labels).inc()


@dataclass(frozen=True)
class _Job:
    """A sample, and what the kernel made of it."""

    labels: tuple[str, str, str, str]
    recompute: Callable[[], Tensors]
    found: Tensors
