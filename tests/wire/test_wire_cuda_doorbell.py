"""Doorbells between streams, against a driver without a GPU whose streams are threads."""

from __future__ import annotations

import gc
import mmap
import threading
import time

import cuda_fakes
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid_wire.arena import Allocator, ArenaOwner
from braid_wire.cuda_arena import CudaContext
from braid_wire.cuda_doorbell import DeviceBell, Pages, handovers_of, sharing_of, stream_values_work
from braid_wire.cuda_driver import CAN_STREAM_VALUES, MPS_ENABLED
from braid_wire.doorbell import BELL_BYTES
from braid_wire.errors import ServiceLost, StepTimeout, ViewInvalid
from cuda_fakes import FakeDriver, FakeStream, HostStreams, World, reached, wait_until

VALUES, EVENTS = pb.DEVICE_HANDOVER_STREAM_VALUES, pb.DEVICE_HANDOVER_EVENTS


def context(**how: object) -> CudaContext:
    return CudaContext(FakeDriver(World(), **how), 0)  # type: ignore[arg-type]


def bells(owner: ArenaOwner, count: int) -> list[torch.Tensor]:
    room = Allocator(owner.create(1 << 16, "bells"))
    return [room.empty((BELL_BYTES,), torch.uint8) for _ in range(count)]


def test_what_works_is_found_by_real_calls() -> None:
    """A device that declares stream values and does not write them is found out."""
    assert stream_values_work(context())
    assert handovers_of(context()) == (VALUES, EVENTS)
    assert not stream_values_work(context(broken=True), limit_s=0.05)
    assert handovers_of(context(attributes={CAN_STREAM_VALUES: 0})) == (EVENTS,)


def test_a_stream_that_outlives_its_probe_may_reach_its_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that is too busy to run it in time; touching memory that is gone would kill us."""
    go = threading.Event()

    class Late(FakeStream):
        def _run(self) -> None:
            go.wait(60)
            super()._run()

    monkeypatch.setattr(cuda_fakes, "FakeStream", Late)
    where = context(broken=True)
    assert not stream_values_work(where, limit_s=0.01)
    gc.collect()
    late = [one for one in threading.enumerate() if one.name == Late.__name__]
    go.set()
    for thread in late:
        thread.join(60)
    assert late and not any(thread.is_alive() for thread in late)


@pytest.mark.parametrize(
    ("told", "sharing"),
    [
        ({MPS_ENABLED: 1}, pb.DEVICE_SHARING_MPS),
        ({MPS_ENABLED: 0}, pb.DEVICE_SHARING_TIME_SLICED),
        ({}, pb.DEVICE_SHARING_UNSPECIFIED),
    ],
)
def test_sharing_is_what_the_driver_says(
    told: dict[int, int], sharing: pb.DeviceSharing.ValueType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # proves nothing
    assert sharing_of(context(attributes=told)) == sharing


def test_a_page_is_registered_once_and_given_back_by_its_last_bell(owner: ArenaOwner) -> None:
    where = context()
    driver, pages = where.driver, Pages(where)
    assert isinstance(driver, FakeDriver)
    made = [DeviceBell(memory, pages) for memory in bells(owner, 2 * mmap.PAGESIZE // BELL_BYTES)]
    assert len(driver.registered) == 2
    assert all(bell.value == 0 and not bell.failed for bell in made)
    del made[:-1]
    gc.collect()
    assert len(driver.registered) == 1
    made.clear()
    gc.collect()
    assert not driver.registered


def test_memory_that_is_no_bell(owner: ArenaOwner) -> None:
    pages = Pages(context())
    memory = owner.create(4096, "bells").memory
    for wrong in (memory[:32], memory[8 : 8 + BELL_BYTES], memory[:512].view(torch.int64)):
        with pytest.raises(ViewInvalid):
            DeviceBell(wrong, pages)


def test_a_wait_ends_when_the_peer_writes_or_gives_up(owner: ArenaOwner) -> None:
    """GEQ as a cyclic difference: FAILED is above every value, and stays so for later waits."""
    where = context()
    driver, pages = where.driver, Pages(where)
    assert isinstance(driver, FakeDriver)
    where.make_current()
    memory, other = bells(owner, 2)
    bell, output = DeviceBell(memory, pages), DeviceBell(other, pages)
    ours, theirs = driver.create_stream(), driver.create_stream()
    driver.wait_value(ours, bell.address, 3)
    driver.write_value(ours, output.address, 3)
    for value in (1, 2):
        driver.write_value(theirs, bell.address, value)
    wait_until(lambda: driver.is_done(theirs))
    assert not driver.is_done(ours) and output.value == 0
    driver.write_value(theirs, bell.address, 3)
    wait_until(lambda: driver.is_done(ours))
    assert output.value == 3
    driver.wait_value(ours, bell.address, 1 << 50)
    time.sleep(0.01)
    assert not driver.is_done(ours)
    bell.fail()
    wait_until(lambda: driver.is_done(ours))
    assert bell.failed and bell.value == 0
    for value in (1, 1 << 50, (1 << 63) - 1):
        assert reached(bell.address, value)


def test_giving_up_outlasts_what_the_peer_had_enqueued(owner: ArenaOwner) -> None:
    """A late write of a peer puts the counter back below what is waited for: it is released again."""
    where = context()
    driver = where.driver
    assert isinstance(driver, FakeDriver)
    where.make_current()
    streams = HostStreams()
    (memory,) = bells(owner, 1)
    bell = DeviceBell(memory, Pages(where))
    stream = driver.create_stream()
    waits, looks = (5, 6, 7), 0
    for value in waits:
        driver.wait_value(stream, bell.address, value)

    def idle() -> bool:
        nonlocal looks
        looks += 1
        if looks % 100 == 1 and looks < 1000:
            memory.view(torch.int64)[0] = 1  # the peer, late
        return driver.is_done(stream)

    streams.idle = idle  # type: ignore[method-assign]
    streams.drain([bell])
    assert driver.is_done(stream)


def test_a_wait_for_the_device_has_a_limit_and_looks_at_the_peer() -> None:
    streams, looks = HostStreams(), 0
    with pytest.raises(StepTimeout):
        streams.until(lambda: False, lambda: None, 0.05)

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 6:
            raise ServiceLost("the peer is gone")

    with pytest.raises(ServiceLost):
        streams.until(lambda: False, look, 60)
