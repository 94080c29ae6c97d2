"""`python -m braid_orchestrator.bench.bytes_service KIND`: attention whose tensors travel as bytes.

The kernels, the plan of each step and the memory of pages and states are those of the real service;
only a layer's inputs and output are carried by the call instead of lying in shared memory.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click
import grpc
import torch
from braid.v1 import attention_pb2, attention_pb2_grpc
from braid_wire.attention_core import AttentionCore, CheckedBatch, LayerRunner, PlannedBatch
from braid_wire.attention_host import AttentionHost
from braid_wire.attention_servicer import SERVICE_NAME, AttentionServicer
from braid_wire.errors import PlanMissing
from braid_wire.layers import Geometry, Kind, LayerPlan, LayerSpec
from braid_wire.metrics import ProcessMetrics
from braid_wire.process import Stop, die_with_parent, setup_logging, wait_for_stop
from braid_wire.rpc import Server

from braid_orchestrator.bench import tensor_bytes
from braid_orchestrator.launcher import MODULES


class KeptCore(AttentionCore):
    """A core that remembers the layers it has resolved and the batch it has planned last.

    Args:
        core: does the work.
    """

    def __init__(self, core: AttentionCore) -> None:
        self.kind = core.kind
        self.refusals = core.refusals
        self._core = core
        # By identity: a target's layer and a draft's may be equal.
        self._layers: dict[int, tuple[LayerSpec, Geometry, LayerRunner]] = {}
        self._planned: tuple[LayerPlan, PlannedBatch] | None = None

    def describe(self) -> attention_pb2.DescribeResponse:
        return self._core.describe()

    def supports(
        self, geometry: Geometry, activation_dtype: torch.dtype, state_dtype: torch.dtype
    ) -> str | None:
        return self._core.supports(geometry, activation_dtype, state_dtype)

    def runner(
        self,
        spec: LayerSpec,
        geometry: Geometry,
        params: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        page_size: int,
    ) -> LayerRunner:
        found = self._core.runner(spec, geometry, params, memory, page_size)
        self._layers[id(spec)] = spec, geometry, found
        return found

    def plan(
        self, plan: LayerPlan, batch: CheckedBatch, page_size: int, options: Mapping[str, str]
    ) -> PlannedBatch:
        planned = self._core.plan(plan, batch, page_size, options)
        self._planned = plan, planned
        return planned

    def run(self, layer_id: int, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One layer of the batch that was planned last.

        Args:
            layer_id: in the role of that batch.
            inputs: as its geometry names them, [T, …] each.

        Raises:
            PlanMissing: nothing was planned.
        """
        if self._planned is None:
            raise PlanMissing("no batch was planned")
        plan, batch = self._planned
        _, geometry, runner = self._layers[id(plan.layer(layer_id))]
        first = next(iter(inputs.values()))
        output = torch.empty((len(first), *geometry.output()), dtype=first.dtype)
        runner(inputs, batch, output)
        return output


class BytesServicer:
    """Answers `Attend` with the output itself."""

    def __init__(self, core: KeptCore) -> None:
        self._core = core
        self._lock = threading.Lock()

    def attend(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Run one layer on the tensors of the request."""
        received = time.monotonic_ns()
        inputs = {message.name: tensor_bytes.unpack(message) for message in request.inputs}
        with self._lock:
            started = time.monotonic_ns()
            output = self._core.run(request.layer_id, inputs)
            finished = time.monotonic_ns()
        return tensor_bytes.Response(
            output=tensor_bytes.pack("output", output),
            received_ns=received,
            started_ns=started,
            finished_ns=finished,
        )

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server."""
        method = grpc.unary_unary_rpc_method_handler(
            self.attend,
            request_deserializer=tensor_bytes.Request.FromString,
            response_serializer=tensor_bytes.Response.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(tensor_bytes.SERVICE, {tensor_bytes.METHOD: method})


@click.command()
@click.argument("kind", type=click.Choice([Kind.FULL.value, Kind.LINEAR.value]))
@click.option("--address", required=True, help="unix:PATH")
@click.option("--threads", type=click.IntRange(min=1), required=True)
@click.option("--parent", type=int, required=True)
def main(kind: str, address: str, threads: int, parent: int) -> None:
    """Serve until SIGTERM; prints one line of JSON once it does."""
    setup_logging(f"{kind}-bytes", "warning")
    die_with_parent(parent)
    # Inputs are read where gRPC has put them, which torch would like to be writable.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    core = KeptCore(import_module(f"{MODULES[kind]}.core").load("auto", threads, peers=True))
    server = Server([SERVICE_NAME])
    host = AttentionHost(core, ProcessMetrics(kind, "bench"))
    attention_pb2_grpc.add_AttentionServiceServicer_to_server(AttentionServicer(host), server.grpc)
    server.grpc.add_generic_rpc_handlers((BytesServicer(core).handler(),))
    server.listen(address)
    server.start()
    ready = {"service": kind, "address": address, "metrics_port": 0, "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    wait_for_stop(stop.wait)
    server.stop(1.0)


if __name__ == "__main__":
    main(prog_name="bytes-service")
