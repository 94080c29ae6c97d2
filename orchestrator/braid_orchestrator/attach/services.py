"""Two attention services that belong to one attached model, and the way to them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib import metadata
from typing import Any

from braid_wire.arena import ArenaOwner
from braid_wire.errors import StepOrder
from braid_wire.layers import Kind, Role
from braid_wire.process import thread_count
from braid_wire.runtime_dir import RuntimeDirectory

from braid_orchestrator.body.base import Body, Target
from braid_orchestrator.dispatch import Dispatch
from braid_orchestrator.dispatcher import Dispatcher
from braid_orchestrator.launcher import START_TIMEOUT_S, Endpoints, service_address, service_programs
from braid_orchestrator.link import RemoteLink
from braid_orchestrator.metrics import CellMetrics
from braid_orchestrator.store import Dtypes, LayerParams, Limits, Store
from braid_orchestrator.supervisor import Supervisor
from braid_orchestrator.walker import Walker

_HANDOVER = "arenas.sock"


class Services:
    """A full-attention and a linear-attention service, supervised, on memory of this process.

    Args:
        target: the model, taken apart.
        params: static parameters of its layers.
        limits: sizes.
        threads: of each service; 0: as many as a cell's would have.

    Raises:
        ServiceLost: a service did not come up.
        LayerPlanDisputed: a service does not accept its layers.
        ConfigInvalid: `pool_bytes` is too small.
    """

    def __init__(self, target: Target, params: LayerParams, limits: Limits, threads: int) -> None:
        self._closing = ExitStack()
        try:
            self._open(target, params, limits, threads)
        except BaseException:
            self._closing.close()
            raise

    def _open(self, target: Target, params: LayerParams, limits: Limits, threads: int) -> None:
        closing = self._closing
        runtime = RuntimeDirectory.create()
        closing.callback(runtime.close)
        programs = service_programs(Endpoints(), runtime.path, thread_count(threads), "warning")
        self._supervisor = Supervisor(programs)
        self._supervisor.start()
        closing.callback(self._end)
        owner = ArenaOwner(runtime.path / _HANDOVER)
        closing.callback(owner.close)
        model: Any = target.model
        self.store = Store(owner, {Role.TARGET: target.plan}, params, limits, Dtypes(model.dtype))
        closing.callback(self.store.close)
        self._supervisor.wait_ready(START_TIMEOUT_S)
        links = {kind: RemoteLink(kind, service_address(runtime.path, kind.value)) for kind in _KINDS}
        self.metrics = CellMetrics(metadata.version("braid-attention"))
        dispatcher = Dispatcher(self.store, links, Dispatch.WALK, self.metrics, f"attach-{os.getpid()}")
        closing.callback(dispatcher.close)
        dispatcher.connect()
        self.walker = Walker(Body(target, None, {}), dispatcher, self.metrics)

    def pid(self, kind: Kind) -> int:
        """The process of one service.

        Raises:
            StepOrder: it is not running at this moment.
        """
        ready = self._supervisor.ready(kind.value)
        if ready is None:
            raise StepOrder(f"the {kind.value} service is being started")
        return ready.pid

    def close(self) -> None:
        """End both processes and give all memory back; more than once does nothing."""
        self._closing.close()

    def _end(self) -> None:
        self._supervisor.kill()
        self._supervisor.settle()


_KINDS = (Kind.FULL, Kind.LINEAR)
