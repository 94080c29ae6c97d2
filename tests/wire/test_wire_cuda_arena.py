"""Device arenas against a driver without a GPU: handles, lifetimes, and the causes of refusals."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from braid.v1 import common_pb2
from braid_wire import cuda_arena
from braid_wire.arena import Allocator
from braid_wire.cuda_arena import GRANULARITY, CudaArena, CudaContext, Imports, map_cuda, pid_namespace
from braid_wire.errors import ArenaUnknown, PoolExhausted, ServiceFault, ViewInvalid
from braid_wire.views import ArenaMap, view_of
from cuda_fakes import OTHER_UUID, UUID, FakeDriver, World, as_host_tensor, failure


class Machine:
    """An owner and an importer: two processes' drivers over one device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.owner = CudaContext(FakeDriver(world), 0)
        self.importer = CudaContext(FakeDriver(world), 0)
        self.imports = Imports()

    def create(self, size: int = 4096, label: str = "kv") -> CudaArena:
        return CudaArena.create(7, size, label, self.owner, as_host_tensor)

    def described(self, arena: CudaArena) -> common_pb2.Arena:
        """What another process is told: the owner's pid is not ours."""
        found = arena.describe("")
        found.cuda.owner_pid = os.getppid()
        return found

    def map(self, described: common_pb2.Arena) -> CudaArena:
        return map_cuda(described, lambda: [self.importer], self.imports, as_host_tensor)


@pytest.fixture
def machine() -> Iterator[Machine]:
    found = Machine(World())
    yield found
    gc.collect()
    assert not found.world.live, "device memory is left behind"
    assert len(found.imports) == 0, "a mapping is left behind"


def test_both_processes_see_the_same_zeroed_memory(machine: Machine) -> None:
    ours = machine.create(4096)
    assert not ours.memory.any()
    (allocation,) = machine.world.live
    assert allocation.size == GRANULARITY and allocation.base % GRANULARITY == 0
    described = machine.described(ours)
    assert len(described.cuda_ipc_handle) == 64 and described.cuda.offset == 0
    assert (described.device, described.size_bytes) == ("cuda:0", 4096)
    theirs = machine.map(described)
    ours.memory[17] = 3
    theirs.memory[18] = 4
    assert theirs.memory[17] == 3 and ours.memory[18] == 4
    theirs.close()
    ours.close()


def test_an_arena_inside_an_allocation_is_found_by_its_offset(machine: Machine) -> None:
    whole = machine.create(8192)
    whole.memory.copy_(torch.arange(8192) % 251)
    described = machine.described(whole)
    described.cuda.offset, described.size_bytes = 4096, 100
    part = machine.map(described)
    assert torch.equal(part.memory, whole.memory[4096:4196])
    part.close()
    whole.close()


def test_views_name_tensors_of_a_device(machine: Machine) -> None:
    ours = machine.create(1 << 16)
    cut = Allocator(ours).empty((3, 5), torch.float32)
    cut.copy_(torch.arange(15).view(3, 5))
    theirs = ArenaMap([machine.map(machine.described(ours))])
    assert torch.equal(theirs.expect(view_of(cut, ours), "x", torch.float32, (3, 5)), cut)
    theirs.close()
    ours.close()


def test_one_handle_is_opened_once_and_closed_by_the_last_user(machine: Machine) -> None:
    ours = machine.create()
    described = machine.described(ours)
    first, second = machine.map(described), machine.map(described)
    (allocation,) = machine.world.live
    driver = machine.importer.driver
    assert isinstance(driver, FakeDriver)
    assert allocation.mapped_by[driver] == 1
    first.close()
    gc.collect()
    assert allocation.mapped_by[driver] == 1 and second.memory.numel() == 4096
    second.close()
    gc.collect()
    assert allocation.mapped_by[driver] == 0
    ours.close()


def test_memory_goes_with_its_last_tensor(machine: Machine) -> None:
    """A tensor outlives its arena; freeing before every importer has closed is an error of the fake."""
    ours = machine.create()
    theirs = machine.map(machine.described(ours))
    tensor = theirs.memory[:8].view(torch.int32)
    theirs.close()
    gc.collect()
    assert len(machine.imports) == 1
    tensor.fill_(5)
    del tensor
    gc.collect()
    assert len(machine.imports) == 0
    kept = ours.memory[:16]
    ours.close()
    with pytest.raises(ArenaUnknown, match="closed"):
        _ = ours.memory
    with pytest.raises(ArenaUnknown, match="closed"):
        ours.describe("")
    assert machine.world.live
    del kept


def test_a_thread_without_a_context_gets_one(machine: Machine) -> None:
    """What gRPC's threads are."""
    ours = machine.create()
    described = machine.described(ours)
    found: list[CudaArena] = []
    threads = [
        threading.Thread(target=lambda: found.append(machine.map(described))),
        threading.Thread(target=lambda: found.pop().close()),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    gc.collect()
    assert len(machine.imports) == 0
    ours.close()


CAUSES = [
    ("no_peer_access", 217, "PEER_ACCESS_UNSUPPORTED", "cannot reach"),
    ("no_peer_access", 711, "TOO_MANY_PEERS", "cannot reach"),
    ("not_initialised", 3, "NOT_INITIALIZED", "not initialised"),
    ("not_initialised", 4, "DEINITIALIZED", "not initialised"),
    ("same_process", 201, "INVALID_CONTEXT", "own"),
    ("owner_gone", 400, "INVALID_HANDLE", "freed it or ended"),
    ("owner_gone", 205, "MAP_FAILED", "freed it or ended"),
]


@pytest.mark.parametrize(("cause", "status", "name", "text"), CAUSES)
def test_a_refusal_names_its_cause(machine: Machine, cause: str, status: int, name: str, text: str) -> None:
    ours = machine.create()
    described = machine.described(ours)
    machine.world.refusal = failure("cuIpcOpenMemHandle", status, name)
    with pytest.raises(ArenaUnknown, match=text) as caught:
        machine.map(described)
    assert caught.value.metadata["cause"] == cause
    assert name in caught.value.message and "kv" in caught.value.message
    machine.world.refusal = None
    machine.map(described).close()
    ours.close()


def test_another_pid_namespace_is_named(machine: Machine) -> None:
    ours = machine.create()
    described = machine.described(ours)
    described.cuda.owner_pid_namespace = pid_namespace() + 1
    machine.world.refusal = failure("cuIpcOpenMemHandle", 1, "INVALID_VALUE")
    with pytest.raises(ArenaUnknown, match="another PID namespace") as caught:
        machine.map(described)
    assert caught.value.metadata["cause"] == "pid_namespace"
    ours.close()


def test_other_refusals(machine: Machine) -> None:
    ours = machine.create()
    wrong = machine.described(ours)
    wrong.cuda.device_uuid = OTHER_UUID
    with pytest.raises(ArenaUnknown, match=OTHER_UUID.hex()) as caught:
        machine.map(wrong)
    assert caught.value.metadata["cause"] == "wrong_device"
    short = machine.described(ours)
    short.cuda_ipc_handle = b"x" * 63
    bare = machine.described(ours)
    bare.ClearField("cuda")
    for malformed in (short, bare):
        with pytest.raises(ArenaUnknown) as caught:
            machine.map(malformed)
        assert caught.value.metadata["cause"] == "malformed"

    def nobody() -> list[CudaContext]:
        raise ServiceFault("this machine has no CUDA driver: libcuda.so.1")

    with pytest.raises(ArenaUnknown, match="libcuda") as caught:
        map_cuda(machine.described(ours), nobody, machine.imports, as_host_tensor)
    assert caught.value.metadata["cause"] == "not_initialised"
    for offset, size in ((0, 0), (0, GRANULARITY + 1), (GRANULARITY, 1), (1 << 60, 1)):
        beyond = machine.described(ours)
        beyond.cuda.offset, beyond.size_bytes = offset, size
        with pytest.raises(ViewInvalid, match="allocation has"):
            machine.map(beyond)
    assert len(machine.imports) == 0
    ours.close()


def test_the_own_process_shares_plain_pointers(machine: Machine) -> None:
    """Embedded: the driver refuses a process its own handle, so none is opened."""
    ours = machine.create()
    described = ours.describe("")
    assert described.cuda.owner_pid == os.getpid()
    shared = machine.map(described)
    assert shared.memory.data_ptr() == ours.memory.data_ptr()
    assert len(machine.imports) == 0
    ours.close()
    gc.collect()
    assert machine.world.live  # the other tensor keeps it
    described.size_bytes += 1
    with pytest.raises(ViewInvalid):
        machine.map(described)
    shared.close()
    gc.collect()
    with pytest.raises(ArenaUnknown, match="freed it") as caught:
        machine.map(described)
    assert caught.value.metadata["cause"] == "same_process"


def test_the_right_device_is_chosen_by_its_name() -> None:
    """Indices differ between processes with other CUDA_VISIBLE_DEVICES."""
    machine = Machine(World([OTHER_UUID, UUID]))
    machine.owner = CudaContext(FakeDriver(machine.world), 1)
    ours = machine.create()
    seen = [CudaContext(FakeDriver(machine.world), index) for index in (0, 1)]
    theirs = map_cuda(machine.described(ours), lambda: seen, machine.imports, as_host_tensor)
    assert theirs.device == torch.device("cuda", 1)
    theirs.close()
    ours.close()


def test_impossible_sizes(machine: Machine) -> None:
    with pytest.raises(ViewInvalid):
        machine.create(0)
    with pytest.raises(PoolExhausted, match="bytes are free"):
        machine.create(2 << 30)
    with pytest.raises(ArenaUnknown, match="cuda:3"):
        CudaContext(machine.owner.driver, 3)


def test_a_machine_without_a_driver_says_so() -> None:
    """The real one, here: no package, or no libcuda, is one typed error and no crash."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ServiceFault, match=r"cuda-bindings|no CUDA driver"):
        cuda_arena.context_of(0)
