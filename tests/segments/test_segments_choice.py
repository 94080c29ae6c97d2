"""Which compiler is chosen, and what is said where one cannot be."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from braid_orchestrator.body import Body
from braid_orchestrator.body.base import RoleBody
from braid_orchestrator.segments import choice
from braid_orchestrator.segments.base import (
    BuffersOf,
    Cut,
    SegmentCompiler,
    SegmentedRole,
    SegmentsUnavailable,
)
from braid_orchestrator.segments.eager import EagerRole
from braid_orchestrator.store import Dtypes, Limits, Store
from braid_wire.arena import ArenaOwner
from braid_wire.errors import ConfigInvalid
from braid_wire.layers import Kind, Role
from checkpoints import QWEN
from drafts import save_with_mtp
from walks import load

CASE = dataclasses.replace(
    QWEN[2],
    sizes={**QWEN[2].sizes, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, and a draft of one."""
    return save_with_mtp(CASE, tmp_path_factory.mktemp("model"), ("full",))


@pytest.fixture(scope="module")
def body(model: Path) -> Body:
    return load(model)


class Refusing(SegmentCompiler):
    """A compiler that cannot run anything."""

    name = "refusing"

    def compile(self, cut: Cut, buffers: BuffersOf, max_tokens: int) -> SegmentedRole:
        raise SegmentsUnavailable("nothing is known here")


@pytest.fixture
def store(body: Body, model: Path, tmp_path: Path) -> Iterator[Store]:
    owner = ArenaOwner(tmp_path / "arenas.sock")
    params = load(model).take_params()
    limits = Limits(max_tokens=32, max_sequences=2, max_context=64, page_size=8, pool_bytes=1 << 24)
    made = Store(owner, body.plans, params, limits, Dtypes(), lanes=2)
    yield made
    made.close()
    owner.close()


def test_a_compiler_asked_for_by_name_runs_every_role_and_lane(body: Body, store: Store) -> None:
    found = choice.segmented("eager", body, store)
    assert found.keys() == {(role, lane) for role in (Role.TARGET, Role.DRAFT) for lane in (0, 1)}
    assert all(isinstance(one, EagerRole) for one in found.values())
    ids = torch.arange(32)
    for lane in (0, 1):
        found[Role.TARGET, lane].start(ids, ids)
        found[Role.TARGET, lane].run(0)
    spec = store.plans[Role.TARGET].layers[0]
    first, second = (store.buffers(spec, Kind.LINEAR, 32, lane) for lane in (0, 1))
    for name, rows in first.inputs.items():
        assert rows.any() and torch.equal(rows, second.inputs[name])


def test_off_runs_the_body_as_it_is(body: Body, store: Store) -> None:
    assert choice.segmented("off", body, store) == {}


def test_an_unknown_name_is_refused(body: Body, store: Store) -> None:
    with pytest.raises(ConfigInvalid, match="'fast'; it must be one of auto, native"):
        choice.segmented("fast", body, store)


def test_what_was_asked_for_by_name_is_not_replaced(body: Body, store: Store) -> None:
    with pytest.raises(SegmentsUnavailable, match="these lie on cpu"):
        choice.segmented("cudagraph", body, store)


def test_auto_passes_over_a_compiler_that_cannot_and_says_why(
    body: Body, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "_COMPILERS", {**choice._COMPILERS, "native": (__name__, "Refusing")})
    with caplog.at_level(logging.WARNING, choice.__name__):
        found = choice.segmented("auto", body, store)
    assert {type(one) for one in found.values()} == {EagerRole} and len(found) == 4
    assert [record.getMessage() for record in caplog.records if record.name == choice.__name__] == [
        f"the {role} body is not run by refusing: nothing is known here" for role in ("target", "draft")
    ]


def test_auto_leaves_a_body_that_cannot_be_traced_as_it_is(
    body: Body, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(role: RoleBody) -> Cut:
        raise SegmentsUnavailable("it looks at values")

    monkeypatch.setattr(choice, "trace", refuse)
    with caplog.at_level(logging.WARNING, choice.__name__):
        assert choice.segmented("auto", body, store) == {}
    assert "the target body runs as it is, without segments: it looks at values" in caplog.text
    with pytest.raises(SegmentsUnavailable, match="it looks at values"):
        choice.segmented("eager", body, store)
