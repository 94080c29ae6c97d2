"""Every way to misuse a unary call is refused by its name, and the service lives on.

The `cell` fixture runs a correct step on both services when each test is over.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from braid.v1 import attention_pb2 as pb
from braid.v1 import common_pb2
from braid_wire import convert, errors
from braid_wire.arena import ArenaOwner
from braid_wire.layers import Kind, LayerPlan, LayerSpec, Role
from service_harness import GDN, GQA, PATIENCE_S, Cell, MakeCell, Sent, Work, changed, refused

FULL, LINEAR = Kind.FULL, Kind.LINEAR
BOTH = (FULL, LINEAR)
OWN = {FULL: 1, LINEAR: 0}
"""A target layer of each kind that the other kind has not."""

# Plan: (name, kinds, what is wrong, error).

PlanCase = tuple[str, tuple[Kind, ...], Callable[[Sent], None], type[errors.BraidError]]


def field(name: str, **values: object) -> Callable[[Sent], None]:
    """Changes parts of one view of the batch."""

    def change(sent: Sent) -> None:
        view = getattr(sent.message, name)
        for key, value in values.items():
            if isinstance(value, list):
                del getattr(view, key)[:]
                getattr(view, key).extend(value)
            else:
                setattr(view, key, value)

    return change


def message(**values: int) -> Callable[[Sent], None]:
    """Changes scalars of the batch."""

    def change(sent: Sent) -> None:
        for key, value in values.items():
            setattr(sent.message, key, value)

    return change


def content(name: str, value: object) -> Callable[[Sent], None]:
    """Changes what stands in an array. The batch: sequence 0 with 4 + 2 tokens, sequence 1 with 0 + 3,
    sequence 2 with 0 + 1."""
    return lambda sent: changed(sent, name, value)


def row(name: str, at: int, value: int) -> Callable[[Sent], None]:
    """Fills one row of an array."""

    def change(sent: Sent) -> None:
        sent.arrays[name][at].fill_(value)

    return change


def cut(sent: Sent, name: str, columns: int) -> None:
    """Keep the first columns of a [B, P] array."""
    rows, width = getattr(sent.message, name).shape
    field(name, shape=[rows, columns], strides=[width, 1])(sent)


def too_few_pages(sent: Sent) -> None:
    cut(sent, "page_table", 1)
    cut(sent, "page_generations", 1)


def read_slot(sent: Sent) -> int:
    return int(sent.arrays["state_in"][0])


BATCH, VIEW, STALE = errors.BatchInvalid, errors.ViewInvalid, errors.ReferenceStale
PLAN_CASES: list[PlanCase] = [
    ("role unset", BOTH, message(role=0), BATCH),
    ("role unknown", BOTH, message(role=9), BATCH),
    ("no tokens", BOTH, message(num_tokens=0), BATCH),
    ("no sequences", BOTH, message(num_sequences=0), BATCH),
    ("third lane", BOTH, message(lane=2), BATCH),
    ("epoch over", BOTH, message(epoch=0), errors.EpochStale),
    ("field missing", BOTH, lambda sent: sent.message.ClearField("cu_seqlens"), BATCH),
    ("pages missing", (FULL,), lambda sent: sent.message.ClearField("page_table"), BATCH),
    ("states missing", (LINEAR,), lambda sent: sent.message.ClearField("state_out"), BATCH),
    ("arena unknown", BOTH, field("cu_seqlens", arena_id=99), errors.ArenaUnknown),
    ("dtype unset", BOTH, field("cu_seqlens", dtype=0), VIEW),
    ("dtype unknown", BOTH, field("cu_seqlens", dtype=77), VIEW),
    ("dtype wrong", BOTH, field("cu_seqlens", dtype=common_pb2.DTYPE_INT64), VIEW),
    ("shape wrong", BOTH, field("cu_seqlens", shape=[3]), VIEW),
    ("dims wrong", BOTH, field("context_lens", shape=[3, 1]), VIEW),
    ("nine dims", BOTH, field("context_lens", shape=[1] * 9), VIEW),
    ("unaligned", BOTH, field("cu_seqlens", offset=2), VIEW),
    ("behind the end", BOTH, field("cu_seqlens", offset=(1 << 21) - 8), VIEW),
    ("far behind the end", BOTH, field("cu_seqlens", offset=(1 << 64) - 4), VIEW),
    ("long stride", BOTH, field("cu_seqlens", strides=[1 << 20]), VIEW),
    ("overflowing stride", BOTH, field("cu_seqlens", strides=[(1 << 64) - 1]), VIEW),
    ("stride 0, endless", (FULL,), field("page_table", shape=[3, 1 << 62], strides=[0, 0]), VIEW),
    ("strides too many", BOTH, field("cu_seqlens", strides=[1, 1]), VIEW),
    ("spans start late", BOTH, content("cu_seqlens", [1, 2, 5, 6]), BATCH),
    ("spans end early", BOTH, content("cu_seqlens", [0, 2, 5, 5]), BATCH),
    ("spans fall", BOTH, content("cu_seqlens", [0, 5, 2, 6]), BATCH),
    # Each difference of these is positive in 32-bit arithmetic.
    ("spans wrap", BOTH, content("cu_seqlens", [0, 1431655766, -1431655764, 6]), BATCH),
    ("context negative", BOTH, content("context_lens", [-1, 0, 0]), BATCH),
    ("context beyond the pages", (FULL,), content("context_lens", [2**31 - 1, 0, 0]), BATCH),
    ("mode unknown", BOTH, content("modes", [3, 0, 0]), BATCH),
    ("decode of two tokens", BOTH, content("modes", [1, 0, 0]), BATCH),
    ("sequence twice", BOTH, content("sequence_ids", [0, 1, 1]), BATCH),
    ("page −1", (FULL,), row("page_table", 0, -1), BATCH),
    ("page below −1", (FULL,), row("page_table", 0, -9), BATCH),
    ("page too high", (FULL,), row("page_table", 1, 24), BATCH),
    ("pages too few", (FULL,), too_few_pages, BATCH),
    ("page of two sequences", (FULL,), row("page_table", 1, 12), BATCH),
    ("page recycled", (FULL,), row("page_generations", 0, 0), STALE),
    ("generations of other width", (FULL,), lambda sent: cut(sent, "page_generations", 2), VIEW),
    ("state_in out of range", (LINEAR,), content("state_in", [24, -1, -1]), BATCH),
    ("state_in −2", (LINEAR,), content("state_in", [-2, -1, -1]), BATCH),
    ("state_in −1 with context", (LINEAR,), content("state_in", [-1, -1, -1]), BATCH),
    ("state_in without context", (LINEAR,), content("context_lens", [0, 0, 0]), BATCH),
    ("state_out out of range", (LINEAR,), content("state_out", [-1, 24, -1, -1, -1, -1]), BATCH),
    ("slot written twice", (LINEAR,), content("state_out", [-1, 5, -1, -1, 5, -1]), BATCH),
    ("state_in recycled", (LINEAR,), content("state_in_generations", [7, 0, 0]), STALE),
    ("state_out recycled", (LINEAR,), content("state_out_generations", [0, 7, 0, 0, 7, 7]), STALE),
]


def three_spans(cell: Cell) -> Sent:
    """Sequence 0 with 4 + 2 tokens, sequence 1 with 0 + 3, sequence 2 with 0 + 1."""
    old = cell.sequence(0)
    cell.step((old, 4))
    return cell.batch((old, 2), (cell.sequence(1), 3), (cell.sequence(2), 1))


@pytest.mark.parametrize("case", PLAN_CASES, ids=lambda case: case[0])
def test_plan_refuses(cell: Cell, case: PlanCase) -> None:
    _, kinds, spoil, error = case
    sent = three_spans(cell)
    spoil(sent)
    for kind in kinds:
        with refused(error):
            cell.services[kind].stub.Plan(pb.PlanRequest(batch=sent.message), timeout=PATIENCE_S)


def test_plan_refuses_a_slot_read_and_written(cell: Cell) -> None:
    sent = three_spans(cell)
    changed(sent, "state_out", [-1, read_slot(sent), -1, -1, 20, 21])
    with refused(BATCH) as found:
        cell.services[LINEAR].stub.Plan(pb.PlanRequest(batch=sent.message), timeout=PATIENCE_S)
    assert found[0].metadata["field"] == "state_out"


def test_recycled_memory_is_refused_from_the_moment_it_is_recycled(cell: Cell) -> None:
    sent = three_spans(cell)
    for kind in BOTH:
        cell.plan(kind, sent)
    cell.generations["page"][1] += 1
    cell.generations["slot"][read_slot(sent)] += 1
    for kind in BOTH:
        with refused(STALE):
            cell.services[kind].stub.Plan(pb.PlanRequest(batch=sent.message), timeout=PATIENCE_S)


def test_a_failed_plan_is_not_kept(cell: Cell) -> None:
    sent = three_spans(cell)
    changed(sent, "sequence_ids", [0, 1, 1])
    for kind in BOTH:
        with refused(BATCH):
            cell.services[kind].stub.Plan(pb.PlanRequest(batch=sent.message), timeout=PATIENCE_S)
        with refused(errors.PlanMissing):
            cell.attend(kind, sent, cell.all_work(kind, sent)[0])


# Attend.


@pytest.mark.parametrize("kind", BOTH)
def test_attend_refuses_other_layers(cell: Cell, kind: Kind) -> None:
    sent = cell.batch((cell.sequence(0), 3))
    cell.plan(kind, sent)
    other = LINEAR if kind is FULL else FULL
    for layer_id, error in (
        (77, errors.LayerUnknown),
        (OWN[other], errors.LayerMisrouted),
        (2, errors.LayerMisrouted),
    ):
        work = cell.work((Role.TARGET, OWN[kind], kind), 3)
        work.ticket.layer_id = layer_id
        with refused(error) as found:
            cell.attend(kind, sent, work)
        assert found[0].metadata["layer_id"] == str(layer_id)
        assert work.output.isnan().all()


def test_the_drafts_ids_are_not_the_targets(cell: Cell) -> None:
    """Layer 0 is linear in the target and full in the draft."""
    sent = cell.batch((cell.sequence(0), 3), role=Role.DRAFT)
    for kind in BOTH:
        cell.plan(kind, sent)
    cell.attend(FULL, sent, cell.work((Role.DRAFT, 0, FULL), 3))
    with refused(errors.LayerMisrouted):
        cell.attend(LINEAR, sent, cell.work((Role.TARGET, 0, LINEAR), 3))
    with refused(errors.LayerUnknown):
        cell.attend(LINEAR, sent, cell.work((Role.TARGET, 3, LINEAR), 3))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"step": 99}, errors.PlanMissing),
        ({"lane": 1}, errors.PlanMissing),
        ({"lane": 7}, errors.PlanMissing),
        ({"role": common_pb2.ROLE_DRAFT}, errors.PlanMissing),
        ({"role": 0}, errors.BatchInvalid),
        ({"epoch": 1}, errors.EpochStale),
        ({"epoch": 1 << 40}, errors.EpochStale),
    ],
    ids=str,
)
def test_attend_refuses_what_is_not_planned(
    cell: Cell, kind: Kind, values: dict[str, int], error: type[errors.BraidError]
) -> None:
    sent = cell.batch((cell.sequence(0), 3))
    cell.plan(kind, sent)
    work = cell.all_work(kind, sent)[0]
    request = cell.attend_request(sent, work)
    for name, value in values.items():
        setattr(request, name, value)
    with refused(error):
        cell.services[kind].stub.Attend(request, timeout=PATIENCE_S)
    cell.attend(kind, sent, work)
    cell.check(kind, sent, work)


@pytest.mark.parametrize("kind", BOTH)
def test_an_epoch_above_the_current_one_fences_older_plans(cell: Cell, kind: Kind) -> None:
    old = cell.batch((cell.sequence(0), 3))
    cell.plan(kind, old)
    cell.next_epoch()
    new = cell.batch((cell.sequence(1), 3), lane=1)
    cell.plan(kind, new)
    with refused(errors.EpochStale):
        cell.attend(kind, old, cell.all_work(kind, old)[0])
    with refused(errors.EpochStale):
        cell.plan(kind, old)
    # Not even under the new epoch's name is there a plan in the old one's lane.
    old.message.epoch = cell.epoch
    with refused(errors.PlanMissing):
        cell.attend(kind, old, cell.all_work(kind, old)[0])
    for work in cell.all_work(kind, new):
        cell.attend(kind, new, work)
        cell.check(kind, new, work)
    assert cell.services[kind].stub.Describe(pb.DescribeRequest()).epoch == cell.epoch


def test_a_plan_replaces_the_one_of_its_role_and_lane(cell: Cell) -> None:
    first, second = (cell.batch((cell.sequence(at), 3)) for at in (0, 1))
    cell.plan(LINEAR, first)
    cell.plan(LINEAR, second)
    with refused(errors.PlanMissing):
        cell.attend(LINEAR, first, cell.all_work(LINEAR, first)[0])
    cell.attend(LINEAR, second, cell.all_work(LINEAR, second)[0])


def output_over_input(work: Work) -> None:
    name = min(work.inputs)
    work.ticket.output.offset = work.ticket.inputs[name].offset + 4


def rows_on_each_other(work: Work) -> None:
    rows = work.output
    work.ticket.output.strides.extend([0, *rows.stride()[1:]])


def holes_in_rows(work: Work) -> None:
    name = next(iter(work.inputs))
    tensor = work.inputs[name]
    work.ticket.inputs[name].strides.extend([tensor.stride(0) * 2, *[2 * at for at in tensor.stride()[1:]]])


def drop_input(work: Work) -> None:
    del work.ticket.inputs[min(work.inputs)]


def add_input(work: Work) -> None:
    work.ticket.inputs["mystery"].CopyFrom(work.ticket.inputs[min(work.inputs)])


def spoil_view(which: str, **values: object) -> Callable[[Work], None]:
    def spoil(work: Work) -> None:
        view = work.ticket.output if which == "output" else work.ticket.inputs[min(work.inputs)]
        for name, value in values.items():
            setattr(view, name, value)

    return spoil


def reshape(which: str, extent: int) -> Callable[[Work], None]:
    def spoil(work: Work) -> None:
        view = work.ticket.output if which == "output" else work.ticket.inputs[min(work.inputs)]
        view.shape[0] = extent

    return spoil


TicketCase = tuple[str, Callable[[Work], None], type[errors.BraidError]]
TICKET_CASES: list[TicketCase] = [
    ("output over input", output_over_input, VIEW),
    ("output rows on each other", rows_on_each_other, VIEW),
    ("holes in input rows", holes_in_rows, VIEW),
    ("input missing", drop_input, VIEW),
    ("input unknown", add_input, VIEW),
    ("no output", lambda work: work.ticket.ClearField("output"), errors.ArenaUnknown),
    ("no inputs", lambda work: work.ticket.ClearField("inputs"), VIEW),
    *[
        (f"{which}: {name}", spoil, error)
        for which in ("input", "output")
        for name, spoil, error in [
            ("arena unknown", spoil_view(which, arena_id=1234), errors.ArenaUnknown),
            ("dtype wrong", spoil_view(which, dtype=common_pb2.DTYPE_BFLOAT16), VIEW),
            ("dtype unknown", spoil_view(which, dtype=42), VIEW),
            ("unaligned", spoil_view(which, offset=66), VIEW),
            ("behind the end", spoil_view(which, offset=(1 << 21) - 16), VIEW),
            ("a row too many", reshape(which, 4), VIEW),
            ("a row too few", reshape(which, 2), VIEW),
            ("endless", reshape(which, (1 << 64) - 1), VIEW),
        ]
    ],
]


@pytest.mark.parametrize("case", TICKET_CASES, ids=lambda case: case[0])
def test_attend_refuses_tickets(cell: Cell, case: TicketCase) -> None:
    _, spoil, error = case
    sent = cell.batch((cell.sequence(0), 3))
    for kind in BOTH:
        cell.plan(kind, sent)
        work = cell.all_work(kind, sent)[0]
        before = {name: tensor.clone() for name, tensor in work.inputs.items()}
        good = pb.Ticket()
        good.CopyFrom(work.ticket)
        spoil(work)
        with refused(error):
            cell.attend(kind, sent, work)
        assert work.output.isnan().all()
        assert all(torch.equal(work.inputs[name], tensor) for name, tensor in before.items())
        # The plan outlives a refused ticket.
        work.ticket.CopyFrom(good)
        cell.attend(kind, sent, work)
        cell.check(kind, sent, work)


# Configure.

ConfigureCase = tuple[str, Callable[[pb.ConfigureRequest], None], type[errors.BraidError], str]


def two_plans(request: pb.ConfigureRequest) -> None:
    request.plans.append(request.plans[0])


def other_digest(request: pb.ConfigureRequest) -> None:
    request.plans[0].digest = "0" * 64


def without(name: str) -> Callable[[pb.ConfigureRequest], None]:
    return lambda request: request.ClearField(name)  # type: ignore[arg-type]


def arena(**values: object) -> Callable[[pb.ConfigureRequest], None]:
    def spoil(request: pb.ConfigureRequest) -> None:
        for name, value in values.items():
            setattr(request.arenas[0], name, value)

    return spoil


def storage(spoil: Callable[[pb.LayerStorage], object]) -> Callable[[pb.ConfigureRequest], None]:
    def change(request: pb.ConfigureRequest) -> None:
        spoil(request.storage[0])

    return change


def memory_view(**values: object) -> Callable[[pb.ConfigureRequest], None]:
    def spoil(request: pb.ConfigureRequest) -> None:
        view = next(iter(request.storage[0].memory.values()))
        for name, value in values.items():
            setattr(view, name, value)

    return spoil


def fewer_slots(request: pb.ConfigureRequest) -> None:
    next(iter(request.storage[0].memory.values())).shape[0] -= 1


def pools(**values: int) -> Callable[[pb.ConfigureRequest], None]:
    def spoil(request: pb.ConfigureRequest) -> None:
        for name, value in values.items():
            setattr(request.pools[0], name, value)

    return spoil


def generation_of_floats(request: pb.ConfigureRequest) -> None:
    for view in (request.pools[0].page_generation, request.pools[0].slot_generation):
        view.dtype = common_pb2.DTYPE_FLOAT32


def drop(field_name: str) -> Callable[[pb.ConfigureRequest], None]:
    return lambda request: getattr(request, field_name).pop(0) and None


def mystery_param(item: pb.LayerStorage) -> None:
    item.params["mystery"].CopyFrom(next(iter(item.memory.values())))


def twice(field_name: str) -> Callable[[pb.ConfigureRequest], None]:
    return lambda request: getattr(request, field_name).append(getattr(request, field_name)[0])


DISPUTED, INVALID = errors.LayerPlanDisputed, errors.ConfigInvalid
CONFIGURE_CASES: list[ConfigureCase] = [
    ("epoch over", lambda request: setattr(request, "epoch", 1), errors.EpochStale, "epoch 1"),
    ("epoch 0", without("epoch"), errors.EpochStale, "epoch 0"),
    ("digest", other_digest, DISPUTED, "target plan has digest"),
    ("role twice", two_plans, INVALID, "target has two plans"),
    ("role unset", lambda request: request.plans[0].ClearField("role"), BATCH, "role is 0"),
    ("activation dtype unset", without("activation_dtype"), VIEW, "dtype number 0"),
    ("activations float16", lambda r: setattr(r, "activation_dtype", 3), DISPUTED, "float16"),
    ("activations int32", lambda r: setattr(r, "activation_dtype", 4), DISPUTED, "int32"),
    ("no arenas", without("arenas"), errors.ArenaUnknown, "arena"),
    ("arena twice", twice("arenas"), INVALID, "one twice"),
    ("arena without handle", arena(handover_socket=""), errors.ArenaUnknown, "cannot be fetched"),
    ("arena of nobody", arena(handover_socket="/nowhere/arenas"), errors.ArenaUnknown, "cannot be fetched"),
    ("arena path too long", arena(handover_socket="/x" * 200), errors.ArenaUnknown, "cannot be fetched"),
    ("arena of cuda", arena(device="cuda:0"), errors.ArenaUnknown, "cuda:0"),
    ("arena by cuda handle", arena(cuda_ipc_handle=b"x" * 64), errors.ArenaUnknown, "cuda_ipc_handle"),
    ("arena unknown to its owner", arena(arena_id=77), errors.ArenaUnknown, "has no arena 77"),
    ("arena larger than it is", arena(size_bytes=1 << 40), VIEW, "announced"),
    ("arena of no bytes", arena(size_bytes=0), VIEW, "announced"),
    ("no storage", without("storage"), DISPUTED, "have no storage"),
    ("storage of one layer missing", drop("storage"), DISPUTED, "have no storage"),
    ("storage twice", twice("storage"), INVALID, "two storages"),
    ("storage of an unknown layer", storage(lambda s: setattr(s, "layer_id", 55)), errors.LayerUnknown, "55"),
    (
        "storage of an MLP layer",
        storage(lambda s: setattr(s, "layer_id", 2)),
        errors.LayerMisrouted,
        "2",
    ),
    ("storage of no role", storage(lambda s: s.ClearField("role")), BATCH, "role is 0"),
    ("parameter unknown", storage(mystery_param), DISPUTED, "mystery"),
    ("memory missing", storage(lambda s: s.memory.clear()), DISPUTED, "missing"),
    ("memory too short", fewer_slots, VIEW, "must be"),
    ("memory of other dtype", memory_view(dtype=common_pb2.DTYPE_BFLOAT16), VIEW, "bfloat16"),
    ("memory behind the end", memory_view(offset=(1 << 21) - 64), VIEW, "ends at byte"),
    ("memory in no arena", memory_view(arena_id=0), errors.ArenaUnknown, "arena 0"),
    ("no pools", without("pools"), DISPUTED, "have no pool"),
    ("pools twice", twice("pools"), INVALID, "two pools"),
    ("page size 0", pools(page_size=0), INVALID, "page_size"),
    ("other page size", pools(page_size=8), VIEW, "must be"),
    ("generations of floats", generation_of_floats, VIEW, "int64"),
]


@pytest.mark.parametrize("case", CONFIGURE_CASES, ids=lambda case: case[0])
def test_a_refused_configure_changes_nothing(cell: Cell, case: ConfigureCase) -> None:
    name, spoil, error, told = case
    sent = cell.batch((cell.sequence(0), 3))
    kinds = (FULL,) if name == "other page size" else BOTH
    for kind in kinds:
        cell.plan(kind, sent)
        request = cell.configure_request(kind)
        spoil(request)
        with refused(error) as found:
            cell.services[kind].stub.Configure(request, timeout=PATIENCE_S)
        assert told in found[0].message
        # The old epoch, its plan and its memory are still there.
        assert cell.services[kind].stub.Describe(pb.DescribeRequest()).epoch == cell.epoch
        for work in cell.all_work(kind, sent):
            cell.attend(kind, sent, work)
            cell.check(kind, sent, work)


@pytest.mark.parametrize("kind", BOTH)
def test_an_unsupported_dtype_is_named_with_the_layers(cell: Cell, kind: Kind) -> None:
    """No backend takes float16, whatever mechanisms it has."""
    request = cell.configure_request(kind)
    request.activation_dtype = common_pb2.DTYPE_FLOAT16
    with refused(DISPUTED) as found:
        cell.services[kind].stub.Configure(request, timeout=PATIENCE_S)
    for role, plan in cell.plans.items():
        for spec in plan:
            named = f"{role.value} {spec.layer_id}" in found[0].message
            assert named == (spec in plan.side(kind)), found[0].message
    assert "float16" in found[0].message and kind.value in found[0].message


def test_layers_that_cannot_run_are_named_with_their_ids_and_no_others(cell: Cell) -> None:
    """Two reasons at once; what every backend refuses are convolutions wider than 16, and such scales."""
    wide, negative = replace(GDN, conv_width=17), replace(GDN, scale=-1.0)
    layers = ((4, wide), (5, GDN), (9, negative), (11, wide))
    plan = LayerPlan(Role.TARGET, tuple(LayerSpec(i, Kind.LINEAR, linear=g) for i, g in layers))
    request = cell.configure_request(LINEAR)
    request.plans[0].CopyFrom(convert.plan_to_pb(plan))
    with refused(DISPUTED) as found:
        cell.services[LINEAR].stub.Configure(request, timeout=PATIENCE_S)
    assert re.search(r"target 4, target 11: .*conv_width", found[0].message)
    assert re.search(r"target 9: .*scale", found[0].message)
    assert "target 5" not in found[0].message


def test_a_size_that_the_kernels_cannot_take_is_named(cell: Cell) -> None:
    request = cell.configure_request(FULL)
    plan = LayerPlan(Role.TARGET, (LayerSpec(6, Kind.FULL, full=type(GQA)(4, 2, 8, 8, scale=-1.0)),))
    request.plans[0].CopyFrom(convert.plan_to_pb(plan))
    with refused(DISPUTED) as found:
        cell.services[FULL].stub.Configure(request, timeout=PATIENCE_S)
    assert "target 6" in found[0].message and "scale" in found[0].message


def test_a_parameter_of_another_shape_is_refused(cell: Cell) -> None:
    request = cell.configure_request(LINEAR)
    request.storage[0].params["A_log"].shape[0] = 3
    with refused(VIEW) as found:
        cell.services[LINEAR].stub.Configure(request, timeout=PATIENCE_S)
    assert "A_log" in found[0].message
    request = cell.configure_request(LINEAR)
    del request.storage[0].params["dt_bias"]
    with refused(DISPUTED) as found:
        cell.services[LINEAR].stub.Configure(request, timeout=PATIENCE_S)
    assert "dt_bias" in found[0].message and "layer 0" in found[0].message


def test_an_optional_parameter_may_be_absent(cell: Cell) -> None:
    for key, params in cell.params.items():
        if key[2] is LINEAR:
            del params["conv_bias"]
    cell.configure()
    cell.step((cell.sequence(0), 3))


def test_a_new_configure_takes_new_memory_under_old_ids(cell: Cell, make_cell: MakeCell) -> None:
    """Arena ids begin at 1 in every orchestrator: an id alone is no identity."""
    cell.step((cell.sequence(0), 3))
    sent = cell.batch((cell.sequence(1), 3))
    for kind in BOTH:
        cell.plan(kind, sent)
    other = make_cell()
    other.configure()
    for kind in BOTH:
        with refused(errors.EpochStale):
            cell.attend(kind, sent, cell.all_work(kind, sent)[0])
    other.step((other.sequence(0), 3))
    cell.configure()
    cell.step((cell.sequence(2), 3))


def test_arenas_that_are_no_longer_named_are_closed(cell: Cell) -> None:
    for service in cell.services.values():
        pid = service.process.pid
        before = _mapped(pid)
        assert sum(before.values()) == len(cell.arenas)
        for _ in range(3):
            cell.configure()
        assert _mapped(pid) == before


def _mapped(pid: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:braid-" in line:
            name = line.split("memfd:")[1].split()[0]
            found[name] = found.get(name, 0) + 1
    return found


def test_a_dead_owner_is_no_fault_of_the_service(
    cell: Cell, tmp_path_factory: pytest.TempPathFactory
) -> None:
    owner = ArenaOwner(tmp_path_factory.mktemp("a") / "arenas")
    described = owner.describe(owner.create(4096, "gone"))
    owner.close()
    request = cell.configure_request(FULL)
    request.arenas.append(described)
    request.arenas[-1].arena_id = 40
    with refused(errors.ArenaUnknown):
        cell.services[FULL].stub.Configure(request, timeout=PATIENCE_S)


# Bytes.

METHODS = ("Configure", "Plan", "Attend")
GARBAGE = (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"GET / HTTP/1.1\r\n\r\n")


def same(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("kind", BOTH)
def test_garbage_as_a_message(cell: Cell, kind: Kind) -> None:
    for data in GARBAGE:
        for method in (*METHODS, "Describe"):
            call = cell.services[kind].channel.unary_unary(
                f"/braid.v1.AttentionService/{method}", request_serializer=same, response_deserializer=same
            )
            with refused(errors.RequestInvalid):
                call(data, timeout=PATIENCE_S)
        walk = cell.services[kind].channel.stream_stream(
            "/braid.v1.AttentionService/Walk", request_serializer=same, response_deserializer=same
        )
        with refused(errors.RequestInvalid):
            list(walk(iter([data]), timeout=PATIENCE_S))


@pytest.mark.parametrize("kind", BOTH)
def test_garbage_on_the_socket(cell: Cell, kind: Kind) -> None:
    path = str(cell.services[kind].ready["address"]).removeprefix("unix:")
    for data in GARBAGE:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            connection.sendall(data * 100)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)  # and goes without a word


def test_an_unknown_method(cell: Cell) -> None:
    call = cell.services[FULL].channel.unary_unary(
        "/braid.v1.AttentionService/Nothing", request_serializer=same, response_deserializer=same
    )
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_oversize_message(cell: Cell) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(str(cell.services[FULL].ready["address"]), options=options) as connection:
        call = connection.unary_unary(
            "/braid.v1.AttentionService/Plan", request_serializer=same, response_deserializer=same
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(256 * 1024 * 1024 + 1), timeout=PATIENCE_S)
    # The transport itself refuses it, before any message is there, so without ErrorInfo.
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(errors.from_rpc_error(caught.value, "full")) is errors.RequestInvalid
