"""How a step is split between the recurrent and the chunk kernels."""

from __future__ import annotations

import gc
import importlib.util
import weakref

import numpy as np
import pytest
import torch
from braid_kernels import LinearMeta, MetadataError, UnsupportedError
from braid_kernels.testing import Span, int32, linear_meta

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

CPU = torch.device("cpu")


def test_spans_are_split_by_length_and_chunks_end_where_states_are_asked_for() -> None:
    from braid_kernels.triton_kernels import plan_step

    outs = [-1] * 150
    outs[0], outs[69], outs[149] = 3, 4, 5
    spans = [
        Span.final(1, 0, 1),
        Span(0),
        Span(150, 0, tuple(outs)),
        Span.final(17, -1, 2),
        Span.final(16, -1, 6),
    ]
    plan = plan_step(linear_meta(spans), CPU, chunk=64, short_span=16)
    assert plan.recurrent.tolist() == [0, 4]
    assert plan.chunked.tolist() == [2, 3]
    assert plan.chunk_row.tolist() == [1, 2, 66, 71, 135, 151]
    assert plan.chunk_len.tolist() == [1, 64, 5, 64, 16, 17]
    assert plan.span_chunks.tolist() == [0, 5, 6]
    assert plan.token_span.tolist() == [0] + [2] * 150 + [3] * 17 + [4] * 16
    assert plan.num_chunks == 6


def test_a_verification_runs_token_by_token_however_long() -> None:
    from braid_kernels.triton_kernels import plan_step

    plan = plan_step(linear_meta([Span(40, 0, tuple(range(1, 41)))]), CPU, chunk=64, short_span=16)
    assert (plan.recurrent.tolist(), plan.chunked.tolist(), plan.num_chunks) == ([0], [], 0)


def test_a_plan_lives_as_long_as_its_metadata_and_serves_every_layer() -> None:
    from braid_kernels.triton_kernels import TritonLinearBackend

    backend = TritonLinearBackend()
    meta = linear_meta([Span.final(3, 0, 1)])
    plan = backend.plan(meta, CPU)
    assert backend.plan(meta, CPU) is plan
    assert backend.plan(linear_meta([Span.final(3, 0, 1)]), CPU) is not plan
    alive = weakref.ref(plan)
    del meta, plan
    gc.collect()
    assert alive() is None


def test_planning_from_values_on_the_host_reads_no_tensor() -> None:
    from braid_kernels.triton_kernels import HostSpans, plan_step

    spans = [Span.final(70, 0, 1), Span(1, 2, (3,))]
    known = linear_meta(spans)
    host = HostSpans.of(known)
    # Tensors without values: reading one would raise.
    meta = LinearMeta(
        *(torch.empty_like(x, device="meta") for x in (known.cu_seqlens, known.state_in, known.state_out))
    )
    plan = plan_step(meta, CPU, chunk=64, short_span=16, host=host)
    assert plan.chunk_len.tolist() == [64, 6]
    assert plan.recurrent.tolist() == [1]
    assert plan.state_in.tolist() == [0, 2]  # uploaded, for the metadata lies elsewhere
    with pytest.raises(MetadataError, match="host"):
        plan_step(meta, CPU, 64, 16, HostSpans(host.cu_seqlens, host.state_in[:1], host.state_out))


def test_slots_are_checked_against_the_pool_of_each_layer() -> None:
    from braid_kernels.triton_kernels import plan_step

    plan = plan_step(linear_meta([Span.final(2, 0, 7)]), CPU, chunk=64, short_span=16)
    plan.check_pool(8)
    with pytest.raises(MetadataError, match=r"state_out\[1\]"):
        plan.check_pool(7)


def test_spans_that_cannot_be_are_refused_while_planning() -> None:
    from braid_kernels.triton_kernels import plan_step

    meta = LinearMeta(int32([0, 2, 1, 3]), int32([0, 0, 0]), int32([-1, -1, -1]))
    with pytest.raises(MetadataError, match=r"cu_seqlens\[2\]"):
        plan_step(meta, CPU, chunk=64, short_span=16)


def test_many_tokens_are_planned_in_little_time() -> None:
    """A plan is made once per step on the host, so it must not walk the tokens in Python."""
    import time

    from braid_kernels.triton_kernels import plan_step

    spans = [Span.final(1, -1, b) for b in range(256)] + [Span.final(16384, -1, 256)]
    meta = linear_meta(spans)
    begin = time.thread_time()  # of this thread on its core: others' work is not counted
    plan = plan_step(meta, CPU, chunk=64, short_span=16)
    assert time.thread_time() - begin < 0.1  # measured 0.2 ms
    assert plan.num_chunks == 256
    assert np.array_equal(plan.recurrent.numpy(), np.arange(256))


def test_a_chunk_that_the_kernels_do_not_have_is_refused() -> None:
    from braid_kernels.triton_kernels import Tuning

    with pytest.raises(UnsupportedError, match="chunk"):
        Tuning(chunk=48)
