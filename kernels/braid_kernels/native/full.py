"""Full-attention layers on the C++ kernel: append and attend in one C call per layer and step."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from braid_kernels.backend import (
    Capabilities,
    FullBackend,
    FullKernel,
    FullLayer,
    FullPlan,
    Planning,
    Ragged,
    check_plan,
    summarise_plan,
)
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.errors import LayerError
from braid_kernels.geometry import Gqa, Mla, signature
from braid_kernels.metadata import PagedMeta
from braid_kernels.native.library import DTYPE_CODES, check_descriptor, dtype_code, failure, library

MAX_LANES = 16


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
        check_inputs(inputs, rows, self._inputs)
        check_rows("out", out, rows, self._output)
        args: list[int | None] = []
        for name in self._names:
            tensor = inputs[name]
            args += (tensor.data_ptr(), tensor.stride(0), dtype_code(name, tensor))
        if len(self._names) == 3:
            args += (None, 0, 0)
        table = meta.page_table
        status = self._run(
            self._desc_address,
            *args,
            meta.cu_seqlens.data_ptr(),
            meta.context_lens.data_ptr(),
            table.data_ptr(),
            meta.num_sequences,
            table.shape[1],
            rows,
            out.data_ptr(),
            out.stride(0),
            dtype_code("out", out),
        )
        if status:
            raise failure(
                status,
                {"cu_seqlens": meta.cu_seqlens, "context_lens": meta.context_lens, "page_table": table},
            )


class CppFullBackend(FullBackend):
    """Paged gqa and mla, fp32 and bf16. Raises BuildError where the library cannot be built.

    Planning is optional: the kernel cuts its own work; a plan that is given must be this batch's.
    """

    name = "cpp"
    capabilities = Capabilities(
        planning=Planning.OPTIONAL,
        chunked_prefix=True,
        ragged=Ragged.FORCED_OFF,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=frozenset(DTYPE_CODES),
    )

    def __init__(self) -> None:
        library()

    def layer(self, layer: FullLayer) -> FullKernel:
        return CppFullKernel(layer)

    def plan(self, meta: PagedMeta, page_size: int, options: Mapping[str, str]) -> FullPlan:
        return summarise_plan(meta, page_size, options)
