"""Full attention by FlashInfer: paged prefill and decode, mla over latent pages, ragged prefill in chunks.

FlashInfer wants to know a step before its first layer runs, so everything is planned in `plan`. What it has
no kernels for (fp32, odd head sizes) goes to the Triton kernels, layer by layer.

Its log-sum-exps are to base 2: log2 of the sum of 2^(scale q·k log2 e). They are merged by FlashInfer's own
merge_state alone, which takes base 2, and never leave this module: what a plan promises of parts, in natural
logarithms, holds for the result.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braid_kernels.backend import (
    Capabilities,
    FullBackend,
    FullKernel,
    FullLayer,
    FullPlan,
    Planning,
    PrefixChunk,
    Ragged,
)
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.errors import BuildError, InputError, PlanError
from braid_kernels.geometry import FullGeometry, Gqa, Mla, signature
from braid_kernels.metadata import PagedMeta
from braid_kernels.planning import (
    DEFAULT_CHUNK_TOKENS,
    PREFIX_CHUNK_TOKENS,
    check_plan,
    expanded_bytes,
    extends,
    number_option,
    plan_chunks,
    summarise_plan,
)
from braid_kernels.reference.attention import expand_latent, first_key
from braid_kernels.reference.backend import check_pages

Ints = NDArray[np.int32]

WORKSPACE_BYTES = 256 << 20
"""Of split results; one for a device, because steps run one after the other on one stream."""

# Sizes that its kernels are made for on Hopper; others would be compiled while a step waits, or fail.
_GQA_DIMS = frozenset({64, 128, 256})
_MLA_DIMS = frozenset({(512, 64)})
_RAGGED_DIMS = frozenset({(192, 128), (128, 128), (64, 64), (256, 256)})
# From this many query heads a KV head on, decoding on tensor cores reads keys once for all of them.
_TENSOR_CORE_GROUP = 4


class Api(Protocol):
    """What is used of the package `flashinfer`; the names are its own."""

    BatchDecodeWithPagedKVCacheWrapper: Callable[..., Any]
    BatchPrefillWithPagedKVCacheWrapper: Callable[..., Any]
    BatchPrefillWithRaggedKVCacheWrapper: Callable[..., Any]
    merge_state: Callable[..., tuple[Tensor, Tensor]]
    mla: Any


def load_api() -> Any:
    """The package. Raises BuildError where it is not installed or cannot be imported here."""
    try:
        return importlib.import_module("flashinfer")
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(f"FlashInfer cannot be imported: {error}") from error


class Wrappers:
    """Wrappers by kind, taken by plans and given back when a plan is gone.

    A wrapper holds what it planned, so each part of a plan that is alive needs one of its own; making one
    allocates memory and pins some of the host's.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._spare: dict[tuple[str, torch.device], list[Any]] = {}
        self._workspaces: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, kind: str, device: torch.device) -> Any:
        """One of a kind: "decode", "decode_tc", "paged", "ragged" or "mla"."""
        with self._lock:
            spare = self._spare.setdefault((kind, device), [])
            if spare:
                return spare.pop()
            workspace = self._workspaces.get(device)
            if workspace is None:
                # FlashInfer's counters in it must begin at zero.
                workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
                self._workspaces[device] = workspace
        return self._made(kind, workspace)

    def give(self, kind: str, device: torch.device, wrapper: Any) -> None:
        """Give one back."""
        with self._lock:
            self._spare.setdefault((kind, device), []).append(wrapper)

    def _made(self, kind: str, workspace: Tensor) -> Any:
        api = self._api
        match kind:
            case "decode" | "decode_tc":
                return api.BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "NHD", use_tensor_cores=kind == "decode_tc"
                )
            case "paged":
                return api.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            case "ragged":
                return api.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
            case _:
                return api.mla.BatchMLAPagedAttentionWrapper(workspace)


@dataclass(frozen=True, eq=False)
class Spans:
    """The spans of a step that have rows, on the host."""

    index: Ints  # [n], of the batch's sequences
    begin: Ints  # [n]
    length: Ints  # [n]
    context: Ints  # [n]
    table: Ints  # [n, P]
    extend: NDArray[np.bool_]  # [n]

    @staticmethod
    def of(meta: PagedMeta) -> Spans:
        cu = meta.cu_seqlens.cpu().numpy()
        index = np.flatnonzero(np.diff(cu)).astype(np.int32)
        return Spans(
            index,
            cu[index],
            np.diff(cu)[index],
            meta.context_lens.cpu().numpy()[index],
            meta.page_table.cpu().numpy()[index],
            np.array(extends(meta), dtype=bool)[index],
        )

    def chosen(self, where: NDArray[np.bool_]) -> Spans:
        """Some of them."""
        parts = (self.index, self.begin, self.length, self.context, self.table, self.extend)
        return Spans(*(part[where] for part in parts))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the batch that belong to them, in order."""
        found = [np.arange(b, b + n) for b, n in zip(self.begin.tolist(), self.length.tolist(), strict=True)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    @property
    def indptr(self) -> Tensor:
        """int32 [n + 1]: where the rows of each begin, if theirs alone are packed."""
        return _indptr(self.length)


@dataclass(frozen=True, eq=False)
class Paging:
    """The pages of some spans as FlashInfer takes them, int32 on the host."""

    indptr: Tensor  # [n + 1]
    indices: Tensor  # [indptr[-1]]
    last_page_len: Tensor  # [n]
    lengths: Tensor  # [n], positions

    @staticmethod
    def of(spans: Spans, page_size: int, window: int) -> Paging:
        """Pages that are wholly before a span's window are left out: their entries may name anything.

        What is left ends where the span ends, which is what causality and the window count from.
        """
        skipped = [first_key(context, window) // page_size for context in spans.context.tolist()]
        total = spans.context + spans.length
        last = -(-total // page_size)
        pages = [spans.table[i, first:end] for i, (first, end) in enumerate(zip(skipped, last, strict=True))]
        counts = np.array([len(part) for part in pages], dtype=np.int32)
        lengths = total - np.array(skipped, dtype=np.int32) * page_size
        indices = np.concatenate(pages) if pages else np.zeros(0, np.int32)
        return Paging(
            _indptr(counts),
            torch.from_numpy(indices.astype(np.int32)),
            torch.from_numpy(((total - 1) % page_size + 1).astype(np.int32)),
            torch.from_numpy(lengths.astype(np.int32)),
        )


@dataclass(frozen=True, eq=False)
class GqaPart:
    """A planned run of paged attention over all rows."""

    wrapper: Any


@dataclass(frozen=True, eq=False)
class MlaPart:
    """Rows that attend over latents, in the order in which they are packed. rows: None: all of the batch."""

    rows: Tensor | None
    wrapper: Any


@dataclass(frozen=True, eq=False)
class Chunk:
    """A run over part of the prefixes.

    rows: of those packed in its part, the ones that take part; None: all. page, offset: where its latents
    lie, int64 [positions].
    """

    wrapper: Any
    rows: Tensor | None
    page: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class ExpandedPart(MlaPart):
    """Rows that attend over expanded keys and values: the new ones by `wrapper`, then chunk by chunk."""

    chunks: tuple[Chunk, ...]


@dataclass(eq=False)
class Payload:
    """What the layers of one step find planned. Wrappers go back to their store with this object."""

    meta: PagedMeta
    page_size: int
    row_page: dict[torch.device, Tensor] = field(default_factory=dict)  # int64 [T]
    row_offset: dict[torch.device, Tensor] = field(default_factory=dict)
    gqa: dict[Key, GqaPart] = field(default_factory=dict)
    mla: dict[Key, tuple[MlaPart, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """Layers that share a plan."""

    geometry: FullGeometry
    dtype: torch.dtype
    device: torch.device


def runs(geometry: FullGeometry, dtype: torch.dtype) -> bool:
    """Whether FlashInfer has kernels for layers of this geometry."""
    if dtype != torch.bfloat16:
        return False
    match geometry:
        case Gqa() as g:
            return g.head_dim == g.v_head_dim and g.head_dim in _GQA_DIMS
        case Mla() as g:
            return (g.kv_lora_rank, g.qk_rope_head_dim) in _MLA_DIMS


def expands(geometry: Mla) -> bool:
    """Whether prompts may attend to expanded keys and values."""
    return (geometry.qk_nope_head_dim + geometry.qk_rope_head_dim, geometry.v_head_dim) in _RAGGED_DIMS


class Planner:
    """Plans the layers of one step that share a key.

    Args:
        wrappers: to take from.
        payload: gets what was planned; wrappers go back when it is gone.
        spans: of the step.
    """

    def __init__(self, wrappers: Wrappers, payload: Payload, spans: Spans) -> None:
        self._wrappers = wrappers
        self._payload = payload
        self._spans = spans

    def gqa(self, key: Key, g: Gqa) -> None:
        """Paged attention of all rows: by the decode kernels where every span is one row."""
        spans = self._spans
        paging = Paging.of(spans, self._payload.page_size, g.sliding_window)
        common: dict[str, Any] = {
            "window_left": g.sliding_window - 1 if g.sliding_window else -1,
            "sm_scale": g.scale,
            "q_data_type": key.dtype,
            "kv_data_type": key.dtype,
        }
        pages = (paging.indptr, paging.indices, paging.last_page_len)
        if (spans.length == 1).all():
            group = g.num_q_heads // g.num_kv_heads
            wrapper = self._take("decode_tc" if group >= _TENSOR_CORE_GROUP else "decode", key)
            wrapper.plan(*pages, g.num_q_heads, g.num_kv_heads, g.head_dim, self._payload.page_size, **common)
        else:
            wrapper = self._take("paged", key)
            wrapper.plan(
                spans.indptr,
                *pages,
                g.num_q_heads,
                g.num_kv_heads,
                g.head_dim,
                self._payload.page_size,
                causal=True,
                **common,
            )
        self._payload.gqa[key] = GqaPart(wrapper)

    def mla(self, key: Key, g: Mla, chunks: Sequence[PrefixChunk]) -> None:
        """Prompts over expanded keys and values, chunk by chunk; all other rows over the latents."""
        spans = self._spans
        parts: list[MlaPart] = []
        expanded = spans.extend if expands(g) else np.zeros(len(spans), dtype=bool)
        if expanded.any():
            parts.append(self._expanded(key, g, spans.chosen(expanded), chunks, bool(expanded.all())))
        if not expanded.all():
            parts.append(self._absorbed(key, g, spans.chosen(~expanded), not expanded.any()))
        self._payload.mla[key] = tuple(parts)

    def _absorbed(self, key: Key, g: Mla, spans: Spans, everything: bool) -> MlaPart:
        paging = Paging.of(spans, self._payload.page_size, 0)
        wrapper = self._take("mla", key)
        wrapper.plan(
            spans.indptr,
            paging.indptr,
            paging.indices,
            paging.lengths,
            g.num_heads,
            g.kv_lora_rank,
            g.qk_rope_head_dim,
            self._payload.page_size,
            True,
            g.scale,
            key.dtype,
            key.dtype,
        )
        return MlaPart(None if everything else _to(spans.rows, key.device), wrapper)

    def _expanded(
        self, key: Key, g: Mla, spans: Spans, chunks: Sequence[PrefixChunk], everything: bool
    ) -> ExpandedPart:
        """The new tokens among themselves, causally, then each chunk of the prefixes, not causally."""
        own = self._ragged(key, g, spans.indptr, spans.indptr, causal=True)
        begins = spans.indptr.numpy()
        planned = []
        for chunk in chunks:
            lengths = np.array(chunk.lengths, dtype=np.int32)[spans.index]
            taking = lengths > 0
            if not taking.any():
                continue
            some = spans.chosen(taking)
            # Rows without a key in the chunk stay away from it: nothing is merged into them.
            packed = [
                np.arange(begin, begin + length)
                for begin, length in zip(begins[:-1][taking].tolist(), some.length.tolist(), strict=True)
            ]
            rows = None if taking.all() else _to(np.concatenate(packed), key.device)
            wrapper = self._ragged(key, g, some.indptr, _indptr(lengths[taking]), causal=False)
            starts = np.array(chunk.starts, dtype=np.int64)[spans.index][taking]
            places = _places(some, starts, lengths[taking], self._payload.page_size)
            planned.append(Chunk(wrapper, rows, *(_to(part, key.device) for part in places)))
        return ExpandedPart(None if everything else _to(spans.rows, key.device), own, tuple(planned))

    def _ragged(self, key: Key, g: Mla, qo_indptr: Tensor, kv_indptr: Tensor, causal: bool) -> Any:
        wrapper = self._take("ragged", key)
        wrapper.plan(
            qo_indptr,
            kv_indptr,
            g.num_heads,
            g.num_heads,
            g.qk_nope_head_dim + g.qk_rope_head_dim,
            g.v_head_dim,
            causal=causal,
            sm_scale=g.scale,
            q_data_type=key.dtype,
            kv_data_type=key.dtype,
        )
        return wrapper

    def _take(self, kind: str, key: Key) -> Any:
        wrapper = self._wrappers.take(kind, key.device)
        weakref.finalize(self._payload, self._wrappers.give, kind, key.device, wrapper)
        return wrapper


class FlashInferKernel(FullKernel):
    """One full layer."""

    def __init__(self, layer: FullLayer, key: Key, api: Api) -> None:
        self._layer = layer
        self._key = key
        self._merge = api.merge_state
        self._signature = signature(layer.geometry)
        self._params = {name: p.detach().to(key.device, key.dtype) for name, p in layer.params.items()}

    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        check_plan(plan, meta, Planning.REQUIRED)
        check_inputs(inputs, meta.num_tokens, self._signature.inputs)
        check_rows("out", out, meta.num_tokens, self._signature.output)
        for name, tensor in (*inputs.items(), ("out", out)):
            if tensor.dtype != self._key.dtype or tensor.device != self._key.device:
                found = f"{tensor.dtype} on {tensor.device}"
                raise InputError(name, found, f"must be {self._key.dtype} on {self._key.device}")
        payload = plan.payload if plan is not None else None
        if not isinstance(payload, Payload):
            raise PlanError("plan.payload", payload, "was made by another backend")
        if payload.meta is not meta or payload.page_size != self._layer.page_size:
            raise PlanError("plan", plan, "was made for another batch")
        if self._key not in payload.gqa and self._key not in payload.mla:
            raise PlanError("plan", plan, "was made without this layer's geometry")
        if meta.num_tokens == 0:
            return
        match self._layer.geometry:
            case Gqa():
                self._gqa(inputs, payload, out)
            case Mla() as g:
                self._mla(g, inputs, payload, out)

    def _append(self, cache: Tensor, rows: Tensor, payload: Payload) -> None:
        device = self._key.device
        cache[payload.row_page[device], payload.row_offset[device]] = rows.to(cache.dtype)

    def _gqa(self, x: Mapping[str, Tensor], payload: Payload, out: Tensor) -> None:
        caches = self._layer.caches
        for name in ("k", "v"):
            self._append(caches[name], x[name], payload)
        wrapper = payload.gqa[self._key].wrapper
        if out.is_contiguous():
            wrapper.run(x["q"].contiguous(), (caches["k"], caches["v"]), out=out)
        else:
            out.copy_(wrapper.run(x["q"].contiguous(), (caches["k"], caches["v"])))

    def _mla(self, g: Mla, x: Mapping[str, Tensor], payload: Payload, out: Tensor) -> None:
        self._append(self._layer.caches["latent"], torch.cat([x["c_kv"], x["k_pe"]], dim=-1), payload)
        for part in payload.mla[self._key]:
            rows = x if part.rows is None else {name: tensor[part.rows] for name, tensor in x.items()}
            if isinstance(part, ExpandedPart):
                result = self._over_expanded(rows, part)
            else:
                result = self._over_latents(g, rows, part)
            if part.rows is None:
                out.copy_(result)
            else:
                out[part.rows] = result

    def _over_latents(self, g: Mla, x: Mapping[str, Tensor], part: MlaPart) -> Tensor:
        latent, r = self._layer.caches["latent"], g.kv_lora_rank
        absorbed = torch.bmm(x["q_nope"].transpose(0, 1), self._params["w_uk"]).transpose(0, 1).contiguous()
        found: Tensor = part.wrapper.run(absorbed, x["q_pe"].contiguous(), latent[..., :r], latent[..., r:])
        return torch.bmm(found.transpose(0, 1), self._params["w_uv"]).transpose(0, 1)

    def _over_expanded(self, x: Mapping[str, Tensor], part: ExpandedPart) -> Tensor:
        w_uk, w_uv = self._params["w_uk"], self._params["w_uv"]
        q = torch.cat([x["q_nope"], x["q_pe"]], dim=-1)
        new = torch.cat([x["c_kv"], x["k_pe"]], dim=-1)
        keys, values = expand_latent(new, w_uk, w_uv)
        if not part.chunks:
            found: Tensor = part.wrapper.run(q, keys.contiguous(), values.contiguous())
            return found
        out, lse = part.wrapper.run(q, keys.contiguous(), values.contiguous(), return_lse=True)
        cache = self._layer.caches["latent"]
        for chunk in part.chunks:
            rows = chunk.rows
            keys, values = expand_latent(cache[chunk.page, chunk.offset], w_uk, w_uv)
            some = q if rows is None else q[rows]
            more = chunk.wrapper.run(some, keys.contiguous(), values.contiguous(), return_lse=True)
            if rows is None:
                out, lse = self._merge(out, lse, *more)
            else:
                out[rows], lse[rows] = self._merge(out[rows], lse[rows], *more)
        result: Tensor = out
        return result


class FlashInferFullBackend(FullBackend):
    """Paged gqa and mla, on an NVIDIA GPU. Option: prefix_chunk_tokens (8192 where it is not given).

    bf16 layers of the usual head sizes run on FlashInfer, all others on the Triton kernels.

    Args:
        api: the package flashinfer, or what stands in for it.
        others: runs the layers that it has no kernels for; None: the Triton backend.

    Raises BuildError where FlashInfer or Triton is not installed.
    """

    name = "flashinfer"
    capabilities = Capabilities(
        planning=Planning.REQUIRED,
        chunked_prefix=True,
        ragged=Ragged.SUPPORTED,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        devices=frozenset({"cuda"}),
    )

    def __init__(self, api: Api | None = None, others: FullBackend | None = None) -> None:
        self._api: Api = load_api() if api is None else api
        self._others = _triton() if others is None else others
        self._wrappers = Wrappers(self._api)
        self._keys: dict[FullGeometry, dict[Key, None]] = {}
        """Of the layers that were resolved, by geometry."""
        self._limits: dict[Key, int] = {}
        """Pages of the smallest cache."""

    def layer(self, layer: FullLayer) -> FullKernel:
        self.capabilities.check(layer.geometry.mechanism)
        cache = next(iter(layer.caches.values()))
        if not runs(layer.geometry, cache.dtype):
            return _WithoutPlan(self._others.layer(layer))
        key = Key(layer.geometry, cache.dtype, cache.device)
        self._keys.setdefault(layer.geometry, {})[key] = None
        self._limits[key] = min(layer.num_pages, self._limits.get(key, layer.num_pages))
        return FlashInferKernel(layer, key, self._api)

    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        plan = summarise_plan(meta, page_size, options, {PREFIX_CHUNK_TOKENS})
        budget = number_option(options, PREFIX_CHUNK_TOKENS) or DEFAULT_CHUNK_TOKENS
        keys = [key for geometry in layers for key in self._keys.get(geometry, {})]
        expanding = [k.geometry for k in keys if isinstance(k.geometry, Mla) and expands(k.geometry)]
        plan = plan_chunks(plan, meta, page_size, budget, expanding)
        payload, spans = Payload(meta, page_size), Spans.of(meta)
        planner = Planner(self._wrappers, payload, spans)
        for key in keys:
            self._check(meta, page_size, key)
            if not len(spans):
                payload.gqa[key] = GqaPart(None)
                continue
            _place_rows(payload, spans, key.device)
            match key.geometry:
                case Gqa() as g:
                    planner.gqa(key, g)
                case Mla() as g:
                    planner.mla(key, g, plan.prefix_chunks)
        size = expanded_bytes(plan.prefix_chunks, expanding, torch.bfloat16.itemsize)
        return replace(plan, workspace_bytes=size, payload=payload)

    def _check(self, meta: PagedMeta, page_size: int, key: Key) -> None:
        """Every page that will be followed exists: FlashInfer would read whatever lies there."""
        window = key.geometry.sliding_window if isinstance(key.geometry, Gqa) else 0
        check_pages(meta, meta.cu_seqlens.tolist(), page_size, self._limits[key], window)


class _WithoutPlan(FullKernel):
    """A layer of another backend, to which this one's plans mean nothing."""

    def __init__(self, kernel: FullKernel) -> None:
        self._kernel = kernel

    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        check_plan(plan, meta, Planning.OPTIONAL)
        self._kernel(inputs, meta, None, out)


def _triton() -> FullBackend:
    from braid_kernels.registry import full_backend

    return full_backend("triton")


def _indptr(lengths: Ints) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))


def _to(values: NDArray[Any], device: torch.device) -> Tensor:
    """int64 on the device, in the order of the current stream."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _places(
    spans: Spans, starts: NDArray[np.int64], lengths: Ints, page_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Page and offset of positions starts[i] .. starts[i] + lengths[i] of each span, one behind the other."""
    span = np.repeat(np.arange(len(spans)), lengths)
    within = np.arange(len(span)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = starts[span] + within
    return spans.table[span, position // page_size].astype(np.int64), position % page_size


def _place_rows(payload: Payload, spans: Spans, device: torch.device) -> None:
    """Where the new rows of the step go, once for a device."""
    if device not in payload.row_page:
        starts = spans.context.astype(np.int64)
        page, offset = _places(spans, starts, spans.length, payload.page_size)
        payload.row_page[device], payload.row_offset[device] = _to(page, device), _to(offset, device)
