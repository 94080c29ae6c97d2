"""Plans of full attention: checked spans, and the chunks in which mla attends to a cached prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from braid_kernels.backend import FullPlan, Planning, PrefixChunk
from braid_kernels.errors import MetadataError, OptionError, PlanError
from braid_kernels.geometry import FullGeometry, Mla
from braid_kernels.metadata import PagedMeta

PREFIX_CHUNK_TOKENS = "prefix_chunk_tokens"
"""Option: positions, over all sequences, whose keys and values may lie expanded at a time (the budget of
the workspace). A chunk is budget // sequences long, in whole pages, one page at least."""

DEFAULT_CHUNK_TOKENS = 8192
"""Of backends that cut a long prefix even where nobody asks for it."""

# Below this a span is not worth an expansion of its own: short spans share their reads of W_uk and W_uv.
MIN_EXPANDED_ROWS = 16


def number_option(options: Mapping[str, str], name: str) -> int | None:
    """The option as a number from 1, or None where it is not given. Raises OptionError."""
    text = options.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise OptionError(f"options[{name}]", text, "must be a decimal number >= 1")
    return int(text)


def summarise_plan(
    meta: PagedMeta, page_size: int, options: Mapping[str, str], known: Iterable[str] = ()
) -> FullPlan:
    """The plan of a backend that needs none: checked spans, and the options that are not `known`.

    Raises MetadataError for spans that are not monotone, do not end at num_tokens, or outgrow the page
    table.
    """
    if page_size < 1:
        raise MetadataError("page_size", page_size, "must be >= 1")
    cu = meta.cu_seqlens.tolist()
    contexts = meta.context_lens.tolist()
    max_pages = meta.page_table.shape[1]
    if cu[0] != 0:
        raise MetadataError("cu_seqlens[0]", cu[0], "must be 0")
    if cu[-1] != meta.num_tokens:
        raise MetadataError("cu_seqlens[-1]", cu[-1], f"must equal num_tokens ({meta.num_tokens})")
    total = 0
    for b, context in enumerate(contexts):
        length = cu[b + 1] - cu[b]
        if length < 0:
            raise MetadataError(f"cu_seqlens[{b + 1}]", cu[b + 1], "must not be less than its predecessor")
        if context < 0:
            raise MetadataError(f"context_lens[{b}]", context, "must be >= 0")
        if length and context + length > max_pages * page_size:
            raise MetadataError(
                f"context_lens[{b}]",
                context,
                f"+ {length} new tokens outgrow {max_pages} pages of {page_size}",
            )
        total += context + length
    ignored = tuple(sorted(set(options) - set(known))) if options else ()
    return FullPlan(qo_indptr_last=cu[-1], kv_tokens=total, ignored_options=ignored)


def chunk_prefixes(meta: PagedMeta, page_size: int, budget: int) -> tuple[PrefixChunk, ...]:
    """Chunks over the prefixes of the spans that continue a prompt; the spans must have been checked.

    All chunks are budget // sequences long, rounded down to whole pages (one page at least), but for
    each sequence's last; sequences counts those that continue a prompt and have a prefix.
    """
    cu = meta.cu_seqlens.tolist()
    prefixes = [
        context if extend and cu[b + 1] > cu[b] else 0
        for b, (context, extend) in enumerate(zip(meta.context_lens.tolist(), extends(meta), strict=True))
    ]
    sequences = sum(prefix > 0 for prefix in prefixes)
    if not sequences:
        return ()
    step = max(budget // sequences // page_size, 1) * page_size
    chunks = []
    for start in range(0, max(prefixes), step):
        lengths = tuple(min(max(prefix - start, 0), step) for prefix in prefixes)
        chunks.append(PrefixChunk(tuple(start if length else 0 for length in lengths), lengths))
    return tuple(chunks)


def plan_chunks(
    plan: FullPlan, meta: PagedMeta, page_size: int, budget: int | None, layers: Collection[FullGeometry]
) -> FullPlan:
    """`plan` with the chunks that `budget` asks for, which are its payload too.

    Without a budget or an mla layer nothing is planned.
    """
    if budget is None or not any(isinstance(layer, Mla) for layer in layers):
        return plan
    chunks = chunk_prefixes(meta, page_size, budget)
    return replace(plan, prefix_chunks=chunks, payload=chunks)


def longest_chunk(chunks: Iterable[PrefixChunk]) -> int:
    """Positions of one sequence in one chunk, at most."""
    return max((length for chunk in chunks for length in chunk.lengths), default=0)


def expanded_width(layers: Collection[FullGeometry]) -> int:
    """Elements of one expanded key and value of one head, in the widest mla layer."""
    return max(
        (g.qk_nope_head_dim + g.qk_rope_head_dim + g.v_head_dim for g in layers if isinstance(g, Mla)),
        default=0,
    )


def expanded_bytes(chunks: Iterable[PrefixChunk], layers: Collection[FullGeometry], itemsize: int) -> int:
    """What the keys and values of all heads take while one chunk of one sequence is expanded."""
    heads = max((g.num_heads for g in layers if isinstance(g, Mla)), default=0)
    return longest_chunk(chunks) * heads * expanded_width(layers) * itemsize


def extends(meta: PagedMeta) -> list[bool]:
    """For each sequence, whether its span continues a prompt."""
    return [True] * meta.num_sequences if meta.extend is None else meta.extend.tolist()


def expands(g: Mla, rows: int, context: int) -> bool:
    """Whether expanded keys and values take fewer multiplications than absorbed queries.

    Per head, over P = rows x context + rows (rows + 1) / 2 pairs: absorbed, P (2r + dr) and the
    projections of the rows, r (dn + dv) each; expanded, P (dn + dr + dv) and the same projections of
    every position. cpp/attention.cpp decides alike.
    """
    if rows < MIN_EXPANDED_ROWS:
        return False
    pairs = rows * (context + (rows + 1) / 2)
    project = g.kv_lora_rank * (g.qk_nope_head_dim + g.v_head_dim)
    absorbed = pairs * (g.latent_dim + g.kv_lora_rank) + rows * project
    expanded = pairs * (g.qk_nope_head_dim + g.qk_rope_head_dim + g.v_head_dim) + (context + rows) * project
    return expanded < absorbed


def check_plan(plan: FullPlan | None, meta: PagedMeta, planning: Planning) -> None:
    """Raise PlanError where a required plan is missing or a plan is not this batch's."""
    if plan is None:
        if planning is Planning.REQUIRED:
            raise PlanError("plan", None, "this backend requires a plan")
        return
    if plan.qo_indptr_last != meta.num_tokens:
        rule = f"must equal num_tokens ({meta.num_tokens})"
        raise PlanError("plan.qo_indptr_last", plan.qo_indptr_last, rule)


def check_chunks(chunks: Iterable[PrefixChunk], meta: PagedMeta) -> None:
    """Raise PlanError unless the chunks cover every prompt's prefix once and in order.

    Other sequences may be covered likewise, or not at all.
    """
    cu, contexts = meta.cu_seqlens.tolist(), meta.context_lens.tolist()
    covered = [0] * len(contexts)
    for i, chunk in enumerate(chunks):
        if len(chunk.starts) != len(contexts) or len(chunk.lengths) != len(contexts):
            raise PlanError(f"plan.prefix_chunks[{i}]", chunk, f"must have {len(contexts)} entries")
        for b, (start, length) in enumerate(zip(chunk.starts, chunk.lengths, strict=True)):
            if length < 0 or (length and start != covered[b]):
                rule = f"sequence {b} must go on at {covered[b]}"
                raise PlanError(f"plan.prefix_chunks[{i}]", (start, length), rule)
            covered[b] += length
    for b, extend in enumerate(extends(meta)):
        required = extend and cu[b + 1] > cu[b]
        if covered[b] != contexts[b] and (required or covered[b]):
            rule = f"must cover the {contexts[b]} positions of sequence {b}"
            raise PlanError("plan.prefix_chunks", covered[b], rule)
