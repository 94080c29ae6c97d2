"""Cells of real processes: their whole life, and what they survive."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from braid_orchestrator.client import Completion
from braid_orchestrator.scrape import layer_times
from braid_wire.errors import BraidError, Draining, ServiceLost
from braid_wire.runtime_dir import sweep
from cli_harness import Place, Served, alive, eventually, named_memory, signal_another_thread

PROMPT = [5, 17, 101, 3, 44, 200, 9]
# What is killed behind the fifteenth token that is told must not have made the last one by then: a cell
# makes a thousand in a second, and who reads them may wait for a core.
COUNT = 400
KILL_AT = 15


def generate(cell: Served, at: int = -1, then: Callable[[], object] = lambda: None) -> Completion:
    """A greedy completion; behind its token `at` something happens."""
    generation = cell.client.generate(PROMPT, COUNT)
    for count, _ in enumerate(generation, start=1):
        if count == at:
            then()
    return generation.completion


def finish_under_sigterm(cell: Served) -> None:
    """A request that runs when SIGTERM comes is finished, new ones are refused, and the exit code is 0."""
    found: list[Completion] = []
    started = threading.Event()
    worker = threading.Thread(target=lambda: found.append(generate(cell, 2, started.set)))
    worker.start()
    assert started.wait(30)
    signal_another_thread(cell.process.pid, signal.SIGTERM)

    def refused() -> bool:
        try:
            cell.client.complete(PROMPT, 1)
        except (Draining, ServiceLost):
            return True
        return False

    assert eventually(refused)
    worker.join(60)
    assert found[0].completion_tokens == COUNT
    assert cell.process.wait(60) == 0


def test_life_of_a_cell(serve: Callable[..., Served], other_place: Place) -> None:
    place = other_place
    cell = serve("--grpc", "127.0.0.1:0", at=place)
    pids = cell.pids()
    assert pids.keys() == {"full", "linear", "orchestrator"}
    (grpc,) = cell.info.grpc
    arguments = ("generate", "unused", "5 17 101", "--ids", "-n", 8)
    over_unix = place.braid(*arguments, "--connect", cell.info.address)
    over_tcp = place.braid(*arguments, "--connect", grpc)
    assert over_unix.code == 0 and len(over_unix.out.split()) == 8
    assert over_tcp == over_unix
    said = json.loads(place.braid("status", "--json").out)  # finds the only cell by itself
    assert (said["state"], said["replays"], said["dispatch"]) == ("serving", 0, "walk")
    assert [layer["service"] for layer in said["layers"]] == ["linear", "linear", "linear", "full"]
    assert all(layer["dispatches"] == {"extend": 2, "decode": 14} for layer in said["layers"])
    assert not [name for pid in pids.values() for name in named_memory(pid) if "pytest" not in name]
    finish_under_sigterm(cell)
    assert not any(alive(pid) for pid in pids.values())
    assert place.cells() == []
    assert list(place.temporary.iterdir()) == []


def test_metrics_of_three_processes_agree(cell: Served) -> None:
    generate(cell)
    layers = layer_times(cell.info.metrics)

    def agree() -> bool:
        layers[:] = layer_times(cell.info.metrics)
        return len({tuple(layer.dispatches.items()) for layer in layers}) == 1

    assert eventually(agree), layers  # a service counts a step behind its last answer
    assert [layer.layer_id for layer in layers] == [0, 1, 2, 3]
    assert [layer.side for layer in layers] == ["linear", "linear", "linear", "full"]
    assert all(layer.compute_s > 0 and layer.hop_s > 0 for layer in layers)


@pytest.mark.parametrize("victim", ["full", "linear"])
def test_killed_service_loses_nothing(cell: Served, victim: str) -> None:
    undisturbed = generate(cell)
    before, pids = cell.client.status(), cell.pids()
    assert generate(cell, KILL_AT, lambda: os.kill(pids[victim], signal.SIGKILL)) == undisturbed
    after = cell.client.status()
    assert after.replays > before.replays
    assert after.epoch > before.epoch
    assert after.state == "serving"
    assert [service.ready for service in after.services] == [True, True]
    now = cell.pids()
    assert {name for name in pids if now[name] != pids[name]} == {victim}
    frames = [cell.page_frame()]

    def told() -> bool:
        """Frames are made once a second; a service that is slow to answer is not ready in one."""
        frames.append(cell.page_frame())
        page = frames[-1]
        if (page["state"], page["replays"], page["epoch"]) != ("serving", after.replays, after.epoch):
            return False
        pids = {service["name"]: service["pid"] for service in page["services"]}
        assert pids == {name: now[name] for name in ("full", "linear")}
        return {service["state"] for service in page["services"]} == {"ready"}

    assert eventually(told), frames[-1]
    error = frames[-1]["errors"][0]
    assert error["reason"] == "SERVICE_LOST" and victim in error["message"]


def test_killed_between_requests(cell: Served) -> None:
    undisturbed = generate(cell)
    for pid in [cell.pids()["full"], cell.pids()["linear"]]:
        os.kill(pid, signal.SIGKILL)
    assert generate(cell) == undisturbed


def test_killed_orchestrator_comes_back_at_its_addresses(cell: Served) -> None:
    undisturbed = generate(cell)
    orchestrator = cell.pids()["orchestrator"]
    with pytest.raises(ServiceLost):
        generate(cell, KILL_AT, lambda: os.kill(orchestrator, signal.SIGKILL))

    def serves() -> bool:
        try:
            return cell.client.status().state == "serving"
        except ServiceLost:
            return False

    assert eventually(serves, 60)
    assert generate(cell) == undisturbed
    assert layer_times(cell.info.metrics)  # the ports are those of before
    assert cell.page_frame()["state"] == "serving"


def test_cancelled_stream_frees_pages_and_slots(cell: Served) -> None:
    generation = cell.client.generate(PROMPT, 2000)
    stream = iter(generation)
    next(stream)
    assert {pool.name: pool.used > 0 for pool in cell.client.status().pools} == {"pages": True, "slots": True}
    generation.cancel()
    assert eventually(lambda: not any(pool.used for pool in cell.client.status().pools))
    assert cell.client.status().running == 0


def test_drained_cell_refuses_and_a_second_signal_ends_it(serve: Callable[..., Served], place: Place) -> None:
    cell = serve()
    at = ("--connect", cell.info.address)
    # Four hold each other up: they must outlast three commands on a machine with other work.
    streams = [iter(cell.client.generate(PROMPT, 4000)) for _ in range(4)]
    for stream in streams:
        next(stream)
    drained = place.braid("drain", "--timeout", 0.2, "--json", *at)
    assert (drained.code, json.loads(drained.out)) == (1, {"remaining": 4})
    assert json.loads(place.braid("status", "--json", *at).out)["state"] == "draining"
    place.braid("generate", "m", "1", "--ids", *at).refused("DRAINING")
    cell.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert cell.process.poll() is None  # the streams still run
    cell.process.send_signal(signal.SIGINT)
    assert cell.process.wait(60) == 0
    for stream in streams:
        with pytest.raises(BraidError):
            list(stream)
    assert not Path(cell.info.directory).exists()


def test_killed_supervisor_takes_all_with_it(serve: Callable[..., Served], place: Place) -> None:
    cell = serve()
    pids = cell.pids()
    stream = iter(cell.client.generate(PROMPT, 4000))
    next(stream)
    cell.process.kill()
    cell.process.wait(30)  # its last thread may outlive the one whose end ends the others
    assert eventually(lambda: not any(alive(pid) for pid in pids.values()))
    assert list(place.temporary.iterdir()) == []
    directory = Path(cell.info.directory)
    assert directory.exists()
    sweep(place.runtime)  # as the next cell does
    assert not directory.exists()


def test_one_process_at_a_time(place: Place, model: Path, tmp_path: Path) -> None:
    shared = tmp_path
    ports = ("--metrics-port", 0, "--log-level", "error")
    at = {name: f"unix:{shared}/{name}.sock" for name in ("full", "linear", "orchestrator")}
    processes = [
        place.start("serve", "--only", "full", "--address", at["full"], *ports),
        place.start("serve", "--only", "linear", "--address", at["linear"], *ports),
    ]
    links = ("--full", at["full"], "--linear", at["linear"], "--runtime-dir", shared)
    processes.append(
        place.start("serve", model, "--only", "orchestrator", "--address", at["orchestrator"], *links, *ports)
    )
    try:
        for process in processes:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["pid"] == process.pid
        done = place.braid("generate", model, "1 2 3", "--ids", "-n", 4, "--connect", at["orchestrator"])
        assert done.code == 0 and len(done.out.split()) == 4
        for process in reversed(processes):
            signal_another_thread(process.pid, signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_unknown_models_are_refused_in_one_line(place: Place, tmp_path: Path) -> None:
    place.braid("serve", tmp_path / "none").refused("CONFIG_INVALID", "none")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    place.braid("serve", tmp_path).refused("CONFIG_INVALID", "no_such_model")


def test_checkpoint_without_weights_stops_the_start(place: Place, model: Path, tmp_path: Path) -> None:
    cells = place.cells()
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    done = place.braid("serve", tmp_path, "--metrics-port", 0, "--log-level", "error")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error CONFIG_INVALID: ")
    assert set(place.cells()) <= set(cells)


def test_taken_port_stops_the_start(place: Place, model: Path) -> None:
    # The ports are the orchestrator's, full's and linear's in a row: the second one is taken.
    with second_of_a_pair() as taken:
        port = taken.getsockname()[1]
        done = place.braid("serve", model, "--placement", "embedded", "--metrics-port", port - 1, "--no-page")
    done.refused("REQUEST_INVALID", str(port))


def second_of_a_pair() -> socket.socket:
    """Takes a port behind one that is free."""
    while True:
        second, first = socket.socket(), socket.socket()
        second.bind(("127.0.0.1", 0))
        second.listen()
        with first:
            try:
                first.bind(("127.0.0.1", second.getsockname()[1] - 1))
            except OSError:
                second.close()  # somebody has it, or it is nobody's to have
                continue
        return second
