"""Full-attention layers on the C++ kernel: append and attend in one C call per layer and step."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
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
from braid_kernels.errors import LayerError, OptionError, PlanError
from braid_kernels.geometry import FullGeometry, Gqa, Mla, signature
from braid_kernels.metadata import PagedMeta
from braid_kernels.native.library import (
    DTYPE_CODES,
    check_descriptor,
    failure,
    library,
    num_threads,
)
from braid_kernels.native.tensors import Calls, rows_of
from braid_kernels.planning import (
    PREFIX_CHUNK_TOKENS,
    check_plan,
    expanded_width,
    extends,
    longest_chunk,
    number_option,
    plan_chunks,
    summarise_plan,
)

MAX_LANES = 16

MLA_PREFILL = "mla_prefill"
"""Option: how mla prompts attend. "cheaper" (the default): as costs fewer multiplications, span by span."""

PATHS = {"cheaper": 0, "expand": 1, "absorb": 2}  # enum Path in cpp/attention.cpp


@dataclass(frozen=True, eq=False)
class CppPlan:
    """What the library reads of a plan; all contiguous."""

    starts: Tensor  # int32 [chunks, B]
    lengths: Tensor  # int32 [chunks, B]
    paths: Tensor  # uint8 [B]

    @staticmethod
    def of(meta: PagedMeta, chunks: tuple[PrefixChunk, ...], prefill: str) -> CppPlan:
        """Prompts attend as `prefill` says, everything else absorbed."""
        shape = (len(chunks), meta.num_sequences)
        paths = [PATHS[prefill] if extend else PATHS["absorb"] for extend in extends(meta)]
        return CppPlan(
            torch.tensor([chunk.starts for chunk in chunks], dtype=torch.int32).view(shape),
            torch.tensor([chunk.lengths for chunk in chunks], dtype=torch.int32).view(shape),
            torch.tensor(paths, dtype=torch.uint8),
        )


class FullDesc(ctypes.Structure):
    """struct FullDesc in cpp/attention.cpp, field by field."""

    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("mla", "q_heads", "kv_heads", "dk", "dv")],
        *[(n, ctypes.c_int32) for n in ("nope", "rope", "v_head_dim")],
        *[(n, ctypes.c_int32) for n in ("window", "page_size", "cache_dtype", "weight_dtype")],
        *[(n, ctypes.c_float) for n in ("scale", "spare_f")],
        *[(n, ctypes.c_int64) for n in ("num_pages", "k_page_stride", "v_page_stride", "uk_row", "uv_row")],
        *[(n, ctypes.c_void_p) for n in ("k", "v", "w_uk", "w_uv")],
    ]


class CppFullKernel(FullKernel):
    """One full layer: a descriptor with every pointer resolved, and the tensors that it points into."""

    def __init__(self, layer: FullLayer) -> None:
        lib = library()
        check_descriptor(ctypes.sizeof(FullDesc), lib.braid_full_desc_size(), "FullDesc")
        self._run = lib.braid_full
        self._layer = layer
        sig = signature(layer.geometry)
        self._inputs = dict(sig.inputs)
        self._names = tuple(sig.inputs)
        self._output = sig.output
        self._keep: list[Tensor] = []
        self._calls = Calls()
        self._desc = self._describe(layer)
        self._desc_address = ctypes.addressof(self._desc)

    def _describe(self, layer: FullLayer) -> FullDesc:
        d = FullDesc()
        g = layer.geometry
        k = layer.caches["k" if isinstance(g, Gqa) else "latent"]
        v = layer.caches["v"] if isinstance(g, Gqa) else k
        for name, cache in layer.caches.items():
            if not cache.is_cpu:
                raise LayerError(f"caches[{name}]", cache.device, "must be on the CPU")
        d.scale, d.page_size, d.num_pages = g.scale, layer.page_size, layer.num_pages
        d.cache_dtype = DTYPE_CODES[k.dtype]
        d.k, d.k_page_stride, d.v, d.v_page_stride = k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)
        match g:
            case Gqa():
                d.q_heads, d.kv_heads, d.dk, d.dv = g.num_q_heads, g.num_kv_heads, g.head_dim, g.v_head_dim
                d.window = g.sliding_window
            case Mla():
                self._describe_mla(d, g, layer)
        return d

    def _describe_mla(self, d: FullDesc, g: Mla, layer: FullLayer) -> None:
        d.mla, d.q_heads, d.kv_heads, d.dk, d.dv = 1, g.num_heads, 1, g.latent_dim, g.kv_lora_rank
        d.nope, d.rope, d.v_head_dim = g.qk_nope_head_dim, g.qk_rope_head_dim, g.v_head_dim
        w_uk, w_uv = self._weight(layer.params["w_uk"]), self._weight(layer.params["w_uv"])
        if w_uk.dtype != w_uv.dtype:
            raise LayerError("params[w_uv]", w_uv.dtype, f"must have the dtype of w_uk ({w_uk.dtype})")
        d.weight_dtype, d.w_uk, d.w_uv = DTYPE_CODES[w_uk.dtype], w_uk.data_ptr(), w_uv.data_ptr()
        d.uk_row, d.uv_row = w_uk.shape[2], w_uv.shape[2]

    def _weight(self, weight: Tensor) -> Tensor:
        """[H, n, columns] with whole vectors per row: the tensor itself where it is so already."""
        weight = weight.detach()
        if weight.dtype not in DTYPE_CODES or not weight.is_cpu:
            weight = weight.to("cpu", torch.float32)
        if weight.shape[2] % MAX_LANES or not weight.is_contiguous():
            columns = -weight.shape[2] % MAX_LANES
            weight = torch.nn.functional.pad(weight, (0, columns)).contiguous()
        self._keep.append(weight)
        return weight

    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        rows = meta.num_tokens
        check_plan(plan, meta, Planning.OPTIONAL)
        tensors = (out, meta.cu_seqlens, meta.context_lens, meta.page_table, *map(inputs.get, self._names))
        args = self._calls.find(rows, *tensors)
        if args is None or len(inputs) != len(self._names):
            args = self._calls.keep(self._arguments(inputs, meta, out), rows, *tensors)
        status = self._run(*args, *_plan_arguments(plan, meta))
        if status:
            raise failure(
                status,
                {
                    "cu_seqlens": meta.cu_seqlens,
                    "context_lens": meta.context_lens,
                    "page_table": meta.page_table,
                },
            )

    def _arguments(self, inputs: Mapping[str, Tensor], meta: PagedMeta, out: Tensor) -> list[int | None]:
        """The call but for its plan, as the library takes it."""
        rows, table = meta.num_tokens, meta.page_table
        check_inputs(inputs, rows, self._inputs)
        check_rows("out", out, rows, self._output)
        args: list[int | None] = [self._desc_address]
        for name in self._names:
            args += rows_of(name, inputs[name])
        if len(self._names) == 3:
            args += (None, 0, 0)
        args += (meta.cu_seqlens.data_ptr(), meta.context_lens.data_ptr(), table.data_ptr())
        return [*args, meta.num_sequences, table.shape[1], rows, *rows_of("out", out)]


def _plan_arguments(plan: FullPlan | None, meta: PagedMeta) -> tuple[int | None, int | None, int, int | None]:
    """The plan as the library takes it. Raises PlanError for one that is not of this backend and batch."""
    if plan is None or plan.payload is None:
        return None, None, 0, None
    payload = plan.payload
    if not isinstance(payload, CppPlan):
        raise PlanError("plan.payload", type(payload).__name__, "was made by another backend")
    if payload.paths.shape[0] != meta.num_sequences:
        raise PlanError("plan", payload.paths.shape[0], f"is not for {meta.num_sequences} sequences")
    chunks = payload.starts.shape[0]
    return payload.starts.data_ptr(), payload.lengths.data_ptr(), chunks, payload.paths.data_ptr()


class CppFullBackend(FullBackend):
    """Paged gqa and mla, fp32 and bf16. Raises BuildError where the library cannot be built.

    Planning is optional: the kernel cuts its own work; a plan that is given must be this batch's, and is
    followed. Options: prefix_chunk_tokens, mla_prefill ("cheaper", "expand" or "absorb").
    """

    name = "cpp"
    capabilities = Capabilities(
        planning=Planning.OPTIONAL,
        chunked_prefix=True,
        ragged=Ragged.SUPPORTED,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=frozenset(DTYPE_CODES),
    )

    def __init__(self) -> None:
        library()

    def layer(self, layer: FullLayer) -> FullKernel:
        self.capabilities.check(layer.geometry.mechanism)
        return CppFullKernel(layer)

    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        plan = summarise_plan(meta, page_size, options, {PREFIX_CHUNK_TOKENS, MLA_PREFILL})
        budget = number_option(options, PREFIX_CHUNK_TOKENS)
        prefill = options.get(MLA_PREFILL, "cheaper")
        if prefill not in PATHS:
            raise OptionError(f"options[{MLA_PREFILL}]", prefill, f"must be one of {sorted(PATHS)}")
        plan = plan_chunks(plan, meta, page_size, budget, layers)
        if plan.payload is None and MLA_PREFILL not in options:
            return plan
        # Each thread expands one chunk of one head of one sequence at a time.
        size = num_threads() * longest_chunk(plan.prefix_chunks) * expanded_width(layers) * 4
        payload = CppPlan.of(meta, plan.prefix_chunks, prefill)
        return replace(plan, workspace_bytes=size, payload=payload)
