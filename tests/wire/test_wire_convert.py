"""Layer plans survive the wire, and what breaks a rule is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from braid.v1 import common_pb2
from braid_wire import convert
from braid_wire.errors import BatchInvalid, ConfigInvalid, LayerMisrouted, LayerPlanDisputed, LayerUnknown
from braid_wire.layers import (
    GEOMETRIES,
    FullGeometry,
    GatedDelta,
    Geometry,
    Gqa,
    KimiDelta,
    Kind,
    LayerPlan,
    LayerSpec,
    Lightning,
    LinearGeometry,
    Mamba1,
    Mamba2,
    Mla,
    Role,
    ShortConv,
    digest,
)

SAMPLES: list[Geometry] = [
    Gqa(16, 2, 128, 64, scale=128**-0.5, sliding_window=4096),
    Gqa(4, 4, 8, 8, scale=0.1),
    Mla(32, 128, 64, 128, 512, scale=192**-0.5),
    Mla(32, 128, 0, 128, 512, scale=1 / 3),
    GatedDelta(16, 32, 128, 128, 4, scale=128**-0.5, beta_scale=2.0),
    KimiDelta(32, 128, 4, scale=128**-0.5, gate_lower_bound=-5.0),
    Lightning(32, 96, scale=1.0, activation="silu"),
    Mamba2(64, 64, 128, 8, 4, dt_min=0.001, dt_max=math.inf),
    Mamba2(64, 64, 128, 8, 4, dt_max=0.1),
    Mamba1(8192, 16, 256, 4, norm_eps=1e-5),
    ShortConv(2048, 3),
]


def spec_of(geometry: Geometry, layer_id: int) -> LayerSpec:
    if isinstance(geometry, FullGeometry):
        return LayerSpec(layer_id, Kind.FULL, full=geometry)
    if isinstance(geometry, LinearGeometry):
        return LayerSpec(layer_id, Kind.LINEAR, linear=geometry)
    raise TypeError(geometry)


def through(plan: LayerPlan) -> LayerPlan:
    message = convert.plan_to_pb(plan).SerializeToString()
    return convert.plan_from_pb(common_pb2.LayerPlan.FromString(message))


@pytest.mark.parametrize("geometry", SAMPLES, ids=lambda geometry: geometry.mechanism)
def test_every_geometry_survives(geometry: Geometry) -> None:
    plan = LayerPlan(Role.TARGET, (spec_of(geometry, 7),))
    assert through(plan) == plan
    assert digest(through(plan)) == digest(plan)


def test_every_mechanism_is_sampled() -> None:
    assert {geometry.mechanism for geometry in SAMPLES} == set(GEOMETRIES)


def test_a_whole_plan_survives() -> None:
    layers = [spec_of(geometry, at) for at, geometry in enumerate(SAMPLES)]
    layers += [
        LayerSpec(50, Kind.NONE),
        LayerSpec(51, Kind.PARALLEL, full=Gqa(4, 4, 8, 8, scale=1.0), linear=Mamba2(4, 8, 8, 1, 4)),
    ]
    plan = LayerPlan(Role.DRAFT, tuple(layers))
    assert through(plan) == plan
    assert through(LayerPlan(Role.TARGET, ())) == LayerPlan(Role.TARGET, ())


def test_the_digest_sees_every_change() -> None:
    base = LayerPlan(Role.TARGET, (spec_of(SAMPLES[0], 0), spec_of(SAMPLES[4], 1)))
    first, second = base.layers
    others = [
        (second, first),
        (first,),
        (first, replace(second, layer_id=2)),
        (replace(first, full=Gqa(16, 2, 128, 64, scale=math.nextafter(128**-0.5, 1))), second),
        (first, LayerSpec(1, Kind.NONE)),
    ]
    assert len({digest(base), *(digest(layers) for layers in others)}) == 1 + len(others)


def test_a_tampered_plan_is_disputed() -> None:
    message = convert.plan_to_pb(LayerPlan(Role.TARGET, (spec_of(SAMPLES[0], 3),)))
    message.layers[0].gqa.num_q_heads = 32
    with pytest.raises(LayerPlanDisputed, match=r"\[3\]"):
        convert.plan_from_pb(message)


def test_bad_messages() -> None:
    good = convert.plan_to_pb(LayerPlan(Role.TARGET, (spec_of(SAMPLES[0], 0),)))

    def spoiled(**values: object) -> common_pb2.LayerPlan:
        message = common_pb2.LayerPlan()
        message.CopyFrom(good)
        for name, value in values.items():
            setattr(message.layers[0], name, value)
        return message

    for message in (spoiled(kind=0), spoiled(kind=9), spoiled(kind=convert.KINDS[Kind.LINEAR])):
        with pytest.raises(ConfigInvalid):
            convert.plan_from_pb(message)
    zero = spoiled()
    zero.layers[0].gqa.head_dim = 0
    ragged = spoiled()
    ragged.layers[0].gqa.num_kv_heads = 3
    not_a_number = spoiled()
    not_a_number.layers[0].gqa.scale = math.nan
    twice = spoiled()
    twice.layers.append(twice.layers[0])
    for message in (zero, ragged, not_a_number, twice):
        with pytest.raises(ConfigInvalid):
            convert.plan_from_pb(message)
    with pytest.raises(BatchInvalid):
        convert.plan_from_pb(common_pb2.LayerPlan(role=0))


def test_layers_of_a_plan() -> None:
    plan = LayerPlan(Role.TARGET, (spec_of(SAMPLES[0], 0), spec_of(SAMPLES[4], 1), LayerSpec(2, Kind.NONE)))
    assert [spec.layer_id for spec in plan.side(Kind.FULL)] == [0]
    assert [spec.layer_id for spec in plan.side(Kind.LINEAR)] == [1]
    with pytest.raises(LayerUnknown):
        plan.layer(3)
    for layer_id, side in ((0, Kind.LINEAR), (1, Kind.FULL), (2, Kind.FULL), (2, Kind.LINEAR)):
        with pytest.raises(LayerMisrouted):
            plan.layer(layer_id).geometry(side)
