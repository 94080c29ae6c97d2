"""Checks what a service says it planned against the batch that it was asked to plan.

A service that planned another batch, or part of this one, is refused before any layer runs.
"""

from __future__ import annotations

import numpy as np
from braid.v1 import attention_pb2 as pb
from braid_wire.batch import MODE_CODES, Batch
from braid_wire.errors import PlanMismatch
from braid_wire.layers import Kind, Mode


def check_summary(summary: pb.PlanSummary, batch: Batch, side: Kind, service: str) -> None:
    """The plan covers every query row, every key, and every prefix that it cuts into chunks.

    Args:
        summary: what the service answered.
        batch: what it was asked to plan.
        side: `Kind.FULL` or `Kind.LINEAR`; only full attention has keys and prefixes.
        service: its name, for messages.

    Raises:
        PlanMismatch: naming the sequence, where one is covered wrongly.
    """
    if summary.qo_indptr_last != batch.num_tokens:
        raise PlanMismatch(
            f"the {service} service planned {summary.qo_indptr_last} query rows "
            f"for {batch.num_tokens} tokens",
            planned=summary.qo_indptr_last,
            tokens=batch.num_tokens,
        )
    if side is not Kind.FULL:
        return
    keys = int(batch.context_lens.sum(dtype=np.int64)) + batch.num_tokens
    if summary.kv_tokens != keys:
        raise PlanMismatch(
            f"the {service} service planned {summary.kv_tokens} keys; contexts and spans have {keys}",
            planned=summary.kv_tokens,
            keys=keys,
        )
    if summary.prefix_chunks:
        _check_chunks(summary, batch, service)


def _check_chunks(summary: pb.PlanSummary, batch: Batch, service: str) -> None:
    """Chunks cover the context of each EXTEND span once and in order; of other spans, or not at all."""
    covered = np.zeros(batch.num_sequences, dtype=np.int64)
    for at, chunk in enumerate(summary.prefix_chunks):
        entries = (len(chunk.starts), len(chunk.lengths))
        if entries != (batch.num_sequences, batch.num_sequences):
            raise PlanMismatch(
                f"prefix chunk {at} of the {service} service has {entries[0]} starts and "
                f"{entries[1]} lengths for {batch.num_sequences} sequences",
                chunk=at,
            )
        starts, lengths = (np.array(part, dtype=np.int64) for part in (chunk.starts, chunk.lengths))
        wrong = (lengths > 0) & (starts != covered)
        if wrong.any():
            b = int(np.argmax(wrong))
            what = f"prefix chunk {at} of the {service} service begins at {starts[b]}, not at {covered[b]}"
            raise _mismatch(batch, b, what)
        covered += lengths
    needed = (batch.modes == MODE_CODES[Mode.EXTEND]) & (np.diff(batch.cu_seqlens) > 0)
    wrong = (covered != batch.context_lens) & (needed | (covered > 0))
    if wrong.any():
        b = int(np.argmax(wrong))
        what = f"cover {covered[b]} positions of its context of {batch.context_lens[b]}"
        raise _mismatch(batch, b, f"the prefix chunks of the {service} service {what}")


def _mismatch(batch: Batch, b: int, what: str) -> PlanMismatch:
    name = int(batch.sequence_ids[b])
    return PlanMismatch(f"sequence {name}: {what}", sequence=name)
