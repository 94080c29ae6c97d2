"""The Triton kernels under Triton's interpreter, against the float64 reference.

Triton decides at its import whether kernels are interpreted, and other tests of this process may import
it for their own ends: the kernels run in a process of their own, which cases are sent to.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from braid_kernels import (
    FieldError,
    GatedDelta,
    KimiDelta,
    LayerError,
    Lightning,
    LinearBackend,
    LinearGeometry,
    LinearLayer,
    LinearMeta,
    Mamba1,
    Mamba2,
    UnsupportedError,
    linear_backend,
    signature,
)
from braid_kernels.testing import (
    LinearCase,
    Span,
    difference,
    int32,
    linear_case,
    linear_meta,
    same_bits,
    select_inputs,
    small_linear_geometries,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


if numbers(importlib.metadata.version("triton")) < (3, 7) and numbers(np.__version__) >= (2, 4):
    pytest.skip(
        "Triton 3.6's interpreter cannot loop over loaded bounds under numpy >= 2.4", allow_module_level=True
    )

# fp32 against float64. Promised is 1e-4; measured are at most 3e-6, in either form: rounding errors of a
# slowly decaying state add up, and chunks take differences of summed log decays.
FP32 = 2e-5
# q, k and v leave the convolution in bf16, and so do the chunks' states: errors of some bf16 steps
# (2^-8), which partly cancel in sums.
BF16 = 1e-2

MECHANISMS = ("gated_delta", "kimi_delta", "lightning", "mamba2", "mamba1", "short_conv")
GEOMETRIES = {name: g for name, g in small_linear_geometries().items() if g.mechanism in MECHANISMS}
ONE_EACH = ("gated_delta_odd", "kimi_delta_bounded", "lightning_silu", "mamba2")
# Without chunks: a convolution has none, and Mamba-1 runs token by token.
UNCHUNKED = ("mamba1_odd", "short_conv")
CHUNK = 64
# Blocks as wide as they go: the interpreter's time is per program. "narrow" has the blocks of a GPU.
WIDE = {"conv_tokens": 64, "recurrent_columns": 64, "state_columns": 64, "output_columns": 64}
FORMS: dict[str, dict[str, int]] = {
    "recurrent": {"short_span": 10**9, **WIDE},
    "chunk": {"short_span": 0, **WIDE},
    "auto": WIDE,
    "narrow": {},
}
# Prefill, an empty span, decode, verification, a shared state, and spans shorter than the convolution.
MIXED = (
    Span.final(CHUNK + 1, 0, 1),
    Span(0),
    Span.final(1, 2, 3),
    Span(3, 0, (4, 5, 6)),
    Span(1),
    Span.final(33, -1, 7),
    Span(1, 0, (8,)),
    Span(2),
)


def start_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # Fresh buffers are then NaN, as the outputs and the unused slots of the cases are.
    torch.use_deterministic_algorithms(True)


def run_here(message: bytes) -> bytes:
    case, tuning = pickle.loads(message)
    from braid_kernels.triton_kernels import TritonLinearBackend, Tuning

    return pickle.dumps(case.run(TritonLinearBackend(Tuning(**tuning))))


def refusal(message: bytes) -> str:
    """What one kernel call raises, as text; says so where it has written something before."""
    case, meta, inputs = pickle.loads(message)
    out = torch.full((meta.num_tokens, *signature(case.geometry).output), 7.0)
    before = case.state_pool.clone()
    layer = LinearLayer(case.geometry, case.params, case.state_pool, case.conv_pool)
    try:
        linear_backend("triton").layer(layer)(inputs, meta, out)
    except FieldError as error:
        untouched = same_bits(case.state_pool, before) and bool((out == 7.0).all())
        return f"{type(error).__name__}: {error}" if untouched else "something was written"
    return "nothing was raised"


def decode_in_graphs(message: bytes) -> bytes:
    """Decode steps of one layer with a recorder that replays by computing again from the same memory."""
    case, steps = pickle.loads(message)
    from braid_kernels.graphs import Compute, Recorder, Recording
    from braid_kernels.triton_kernels import TritonLinearBackend

    counts = {"recorded": 0, "replayed": 0}

    class Again(Recorder):
        def record(self, compute: Compute) -> Recording:
            counts["recorded"] += 1
            compute()  # as a graph's warm-up does: a step may be computed more than once

            def replay() -> None:
                counts["replayed"] += 1
                compute()

            compute()
            return Recording(replay, ())

    backend = TritonLinearBackend(recorder=Again())
    kernel = backend.layer(LinearLayer(case.geometry, case.params, case.state_pool, case.conv_pool))
    found = []
    inputs = {name: torch.empty_like(rows) for name, rows in case.inputs.items()}
    out = torch.empty(case.meta.num_tokens, *signature(case.geometry).output)
    for given, meta in steps:
        rows = meta.num_tokens
        views = {name: buffer[:rows] for name, buffer in inputs.items()}
        for name, view in views.items():
            view.copy_(given[name])
        out.fill_(float("nan"))
        kernel(views, backend.prepare(meta), out[:rows])
        found.append(out[:rows].clone())
    return pickle.dumps((found, case.state_pool, counts))


Run = Callable[..., LinearCase]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_interpreter) as pool:
        yield pool


@pytest.fixture(scope="module")
def run(interpreter: ProcessPoolExecutor) -> Run:
    """Run a case on the Triton kernels: run(case, form)."""

    def remotely(case: LinearCase, form: str = "auto") -> LinearCase:
        result: LinearCase = pickle.loads(
            interpreter.submit(run_here, pickle.dumps((case, FORMS[form]))).result()
        )
        return result

    return remotely


@pytest.fixture(scope="module")
def reference() -> LinearBackend:
    return linear_backend("reference")


def assert_close(actual: LinearCase, expected: LinearCase, tolerance: float = FP32) -> None:
    """Outputs, written slots, and the very bits of every slot that is not named in state_out."""
    assert not expected.out.isnan().any()
    assert difference(actual.out, expected.out) < tolerance
    assert difference(actual.state_pool, expected.state_pool) < tolerance
    named = set(expected.meta.state_out.tolist())
    for slot in set(range(len(expected.state_pool))) - named:
        assert same_bits(actual.state_pool[slot], expected.state_pool[slot])
    if actual.conv_pool is not None and expected.conv_pool is not None:
        assert same_bits(actual.conv_pool, expected.conv_pool)  # inputs are copied, not computed


@pytest.mark.parametrize("name", GEOMETRIES)
def test_mixed_batch_matches_the_reference(run: Run, reference: LinearBackend, name: str) -> None:
    """All kinds of spans at once, strided, over poisoned memory; long spans in chunks."""
    case = linear_case(GEOMETRIES[name], MIXED, slots=10, pad=3, gap=5, bias=True)
    assert_close(run(case), case.run(reference))


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=["fp32_state", "bf16_state"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_bf16_matches_the_reference(
    run: Run, reference: LinearBackend, name: str, state: torch.dtype
) -> None:
    spans = MIXED if state == torch.bfloat16 else MIXED[1:]
    case = linear_case(
        GEOMETRIES[name], spans, slots=10, dtype=torch.bfloat16, state_dtype=state, pad=1, gap=3
    )
    assert_close(run(case), case.run(reference), BF16)


@pytest.mark.parametrize("name", [*ONE_EACH, *UNCHUNKED])
def test_recurrent_lengths(run: Run, reference: LinearBackend, name: str) -> None:
    spans = [Span.final(n, slot - 1, slot + 2) for slot, n in enumerate((1, 19, 2))]
    case = linear_case(GEOMETRIES[name], [*spans, Span(0, 0)], slots=5, bias=True)
    assert_close(run(case, "recurrent"), case.run(reference))


@pytest.mark.parametrize("name", ONE_EACH)
def test_chunk_lengths(run: Run, reference: LinearBackend, name: str) -> None:
    """1, C - 1, C, C + 1 and an odd number of tokens, with and without a state before them."""
    lengths = (1, CHUNK - 1, CHUNK, CHUNK + 1, 0, 17)
    spans = [Span.final(n, i % 3 - 1, 2 + i) for i, n in enumerate(lengths)]
    case = linear_case(GEOMETRIES[name], spans, slots=9, bias=True)
    assert_close(run(case, "chunk"), case.run(reference))


@pytest.mark.parametrize("name", ONE_EACH)
def test_states_inside_a_chunk_are_honoured(run: Run, reference: LinearBackend, name: str) -> None:
    """Checkpoints before a chunk is full, at its very end, right after it, and at a span's first row."""
    outs = [-1] * 108
    for slot, row in enumerate((0, 40, 40 + CHUNK), start=1):
        outs[row] = slot
    case = linear_case(GEOMETRIES[name], [Span(108, 0, tuple(outs)), Span(3, -1, (5, -1, 6))], slots=8)
    actual = run(case, "chunk")
    assert not actual.state_pool[[1, 2, 3, 5, 6]].isnan().any()
    assert_close(actual, case.run(reference))


@pytest.mark.parametrize(
    "geometry",
    [
        GatedDelta(1, 1, 128, 128, 4, 0.1),
        GatedDelta(2, 6, 24, 72, 2, 0.1, beta_scale=2.0),
        GatedDelta(1, 1, 256, 32, 4, 0.1),
        KimiDelta(1, 130, 5, 0.1, gate_lower_bound=-5.0),
        Lightning(1, 96, 0.1),
        Lightning(1, 1, 1.0),
        Mamba2(2, 64, 128, 1, 4),
        Mamba2(8, 5, 16, 4, 2),
    ],
    ids=str,
)
def test_head_dims_and_ratios(run: Run, reference: LinearBackend, geometry: LinearGeometry) -> None:
    spans = [Span.final(20, 0, 1), Span(1, 0, (2,)), Span(3, -1, (3, -1, 4))]
    case = linear_case(geometry, spans, slots=5)
    assert_close(run(case, "narrow"), case.run(reference))


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("name", ["gated_delta", "kimi_delta", "mamba2"])
def test_strong_decay_underflows_to_zero_and_not_to_nan(
    run: Run, reference: LinearBackend, name: str, form: str
) -> None:
    """Log decays near -4000 in some rows, moderate ones between them."""
    case = linear_case(GEOMETRIES[name], [Span.final(40, 0, 1)], slots=2)
    gate = "dt" if name == "mamba2" else "a"
    case.params["A_log"].fill_(5.0)
    case.inputs[gate].fill_(-5.0)
    case.inputs[gate][::3] = 30.0
    assert_close(run(case, form), case.run(reference), 1e-4)


@pytest.mark.parametrize("level", [30.0, 0.0])
def test_the_strongest_bounded_decay(run: Run, reference: LinearBackend, level: float) -> None:
    """-5 (and -2.5) at every token: e^(-G) alone would overflow after 18 of them."""
    case = linear_case(GEOMETRIES["kimi_delta_bounded"], [Span.final(CHUNK + 7, 0, 1)], slots=2)
    case.params["dt_bias"].zero_()
    case.inputs["a"].fill_(level)
    assert_close(run(case, "chunk"), case.run(reference), 1e-4)


def test_weak_decay_keeps_its_relative_accuracy(run: Run, reference: LinearBackend) -> None:
    """softplus of a very negative gate is e^x, not 0: the state must forget slowly, not never."""
    case = linear_case(GEOMETRIES["gated_delta"], [Span.final(CHUNK, 0, 1)], slots=2)
    case.params["A_log"].fill_(10.0)
    case.params["dt_bias"].zero_()
    case.inputs["a"].fill_(-14.0)
    expected = case.run(reference)
    assert_close(run(case, "chunk"), expected)
    assert_close(run(case, "recurrent"), expected)


def test_similar_keys_do_not_spoil_the_triangular_solve(run: Run, reference: LinearBackend) -> None:
    """Equal keys, beta near 1 and no decay: powers of A that have to cancel would reach 10^18."""
    geometry = dataclasses.replace(GEOMETRIES["gated_delta_odd"], beta_scale=1.0)
    case = linear_case(geometry, [Span.final(CHUNK, 0, 1)], slots=2)
    case.params["A_log"].fill_(-20.0)
    case.inputs["mixed_qkv"][:, :66] = case.inputs["mixed_qkv"][0, :66]
    case.inputs["b"].fill_(8.0)
    assert_close(run(case, "chunk"), case.run(reference), 1e-4)


@pytest.mark.parametrize("name", ["gated_delta", "kimi_delta", "lightning", "mamba2"])
def test_a_state_carried_from_step_to_step_loses_nothing(
    run: Run, reference: LinearBackend, name: str
) -> None:
    """Chunks, a verification, one token, and spans shorter than the convolution, one after the other."""
    total = 60
    whole = linear_case(GEOMETRIES[name], [Span.final(total, 0, 1)], slots=8)
    expected = whole.run(reference)
    case, slot, outs, begin = whole, 0, [], 0
    for i, end in enumerate([21, 22, 24, 41, total]):
        span = Span.final(end - begin, slot, 2 + i)
        case = dataclasses.replace(
            case, inputs=select_inputs(whole.inputs, begin, end), meta=linear_meta([span])
        )
        case = run(case)
        outs.append(case.out)
        slot, begin = 2 + i, end
    assert difference(torch.cat(outs), expected.out) < FP32
    assert difference(case.state_pool[slot], expected.state_pool[1]) < FP32
    if case.conv_pool is not None and expected.conv_pool is not None:
        assert same_bits(case.conv_pool[slot], expected.conv_pool[1])


@pytest.mark.parametrize("name", ONE_EACH)
def test_verify_writes_the_state_of_every_prefix(run: Run, name: str) -> None:
    """Speculation: version i is bitwise the state after the first i + 1 tokens alone."""
    length = 5
    case = linear_case(GEOMETRIES[name], [Span(length, 0, tuple(range(1, 1 + length)))], slots=8)
    verify = run(case)
    for n in (1, 2, length):
        prefix = run(
            dataclasses.replace(
                case, inputs=select_inputs(case.inputs, 0, n), meta=linear_meta([Span.final(n, 0, 7)])
            )
        )
        assert same_bits(prefix.state_pool[7], verify.state_pool[n])
        assert same_bits(prefix.out, verify.out[:n].contiguous())
        if prefix.conv_pool is not None and verify.conv_pool is not None:
            assert same_bits(prefix.conv_pool[7], verify.conv_pool[n])


@pytest.mark.parametrize("name", ["gated_delta", "kimi_delta"])
def test_a_sequence_alone_equals_the_same_in_a_crowd(run: Run, name: str) -> None:
    crowd = linear_case(GEOMETRIES[name], MIXED[2:], slots=10, pad=1)
    together = run(crowd)
    row = 0
    for span in MIXED[2:]:
        end = row + span.length
        if span.length > 1:
            alone = run(
                dataclasses.replace(
                    crowd, inputs=select_inputs(crowd.inputs, row, end), meta=linear_meta([span])
                )
            )
            assert same_bits(alone.out, together.out[row:end])
            for slot in span.state_out:
                if slot >= 0:
                    assert same_bits(alone.state_pool[slot], together.state_pool[slot])
        row = end


@pytest.mark.parametrize("length", [3, 20], ids=["recurrent", "chunk"])
def test_nan_input_stays_in_its_sequence(run: Run, length: int) -> None:
    case = linear_case(
        GEOMETRIES["gated_delta"], [Span.final(length, 0, 1), Span.final(length, 0, 2)], slots=3
    )
    clean = run(case)
    case.inputs["mixed_qkv"][0] = float("nan")
    dirty = run(case)
    assert dirty.out[:length].isnan().all()
    assert same_bits(dirty.out[length:].contiguous(), clean.out[length:].contiguous())
    assert same_bits(dirty.state_pool[2], clean.state_pool[2])


def test_an_empty_step_is_fine(run: Run) -> None:
    for spans in ([], [Span(0), Span(0, 0)]):
        assert run(linear_case(GEOMETRIES["mamba2"], spans, slots=2)).out.shape[0] == 0


@pytest.mark.parametrize(
    ("field", "cu", "state_in", "state_out"),
    [
        ("cu_seqlens", [0, 3, 2], [0, 0], [-1, -1]),
        ("cu_seqlens", [0, 1, 1], [0, 0], [-1, -1]),
        ("cu_seqlens", [1, 1, 2], [0, 0], [-1, -1]),
        ("state_in", [0, 1, 2], [0, 4], [-1, -1]),
        ("state_in", [0, 1, 2], [-2, 0], [-1, -1]),
        ("state_out", [0, 1, 2], [0, 0], [-1, 4]),
        ("state_out", [0, 1, 2], [0, 0], [-5, 1]),
        ("state_out", [0, 1, 2], [0, 0], [1, 1]),
        ("state_out", [0, 1, 2], [0, 1], [2, 0]),
    ],
)
def test_bad_metadata_is_refused_before_anything_is_written(
    interpreter: ProcessPoolExecutor, field: str, cu: list[int], state_in: list[int], state_out: list[int]
) -> None:
    case = linear_case(GEOMETRIES["lightning"], [Span(1, 0), Span(1, 1)], slots=4)
    meta = LinearMeta(int32(cu), int32(state_in), int32(state_out))
    said = interpreter.submit(refusal, pickle.dumps((case, meta, case.inputs))).result()
    assert said.startswith(f"MetadataError: {field}")


def test_the_backend_refuses_what_it_cannot_run() -> None:
    """In this process the kernels are compiled ones: without a GPU, layers are refused by name."""
    backend = linear_backend("triton")
    case = linear_case(GEOMETRIES["lightning"], [Span(1, 0)], slots=2)
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        with pytest.raises(LayerError, match="CUDA"):
            backend.layer(LinearLayer(case.geometry, case.params, case.state_pool))
    from braid_kernels.triton_kernels.backend import recipe

    with pytest.raises(UnsupportedError, match="Mamba1"):  # it is no instance of the common recurrence
        recipe(Mamba1(4, 4, 2, 4))


def test_decode_steps_are_recorded_once_and_replayed_on_other_slots(
    interpreter: ProcessPoolExecutor, reference: LinearBackend
) -> None:
    """Slots alternate from step to step, as versions do; a prompt and a verification run as they are."""
    geometry = GEOMETRIES["gated_delta"]
    case = linear_case(geometry, [Span.final(1, 0, 2), Span.final(1, 1, 3), Span(1)], slots=6)
    steps, rng = [], torch.Generator().manual_seed(1)
    here, there = [0, 1], [2, 3]
    for number in range(9):
        spans = [Span.final(1, here[0], there[0]), Span.final(1, here[1], there[1])]
        if number == 4:
            spans = [Span(3, here[0], (-1, -1, there[0]))]
        meta = linear_meta(spans)
        inputs = {
            name: torch.randn(meta.num_tokens, *rows.shape[1:], generator=rng)
            for name, rows in case.inputs.items()
        }
        steps.append((inputs, meta))
        if number != 4:
            here, there = there, here
        else:
            here[0], there[0] = there[0], here[0]
    message = pickle.dumps((case, steps))
    found, pool, counts = pickle.loads(interpreter.submit(decode_in_graphs, message).result())
    layer = reference.layer(LinearLayer(geometry, case.params, case.state_pool, case.conv_pool))
    for (inputs, meta), ours in zip(steps, found, strict=True):
        out = torch.empty_like(ours)
        layer(inputs, meta, out)
        assert difference(ours, out) < FP32
    assert difference(pool, case.state_pool) < FP32
    # Two sets of metadata, for two lanes; every other decode step is a replay.
    assert counts == {"recorded": 2, "replayed": 6}


def test_a_dtype_that_no_kernel_reads_is_refused(interpreter: ProcessPoolExecutor) -> None:
    case = linear_case(GEOMETRIES["lightning"], [Span(1, 0)], slots=2)
    inputs = {name: tensor.double() for name, tensor in case.inputs.items()}
    said = interpreter.submit(refusal, pickle.dumps((case, case.meta, inputs))).result()
    assert said.startswith("InputError: q") and "float32 or bfloat16" in said
