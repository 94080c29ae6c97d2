"""The Triton backend of full attention: paged gqa and mla on an NVIDIA GPU, or under the interpreter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from braid_kernels.backend import (
    Capabilities,
    FullBackend,
    FullKernel,
    FullLayer,
    FullPlan,
    Planning,
    Ragged,
)
from braid_kernels.checks import check_inputs, check_rows
from braid_kernels.errors import InputError, LayerError
from braid_kernels.geometry import FullGeometry, Gqa, Mla, signature
from braid_kernels.metadata import PagedMeta
from braid_kernels.planning import check_plan, summarise_plan
from braid_kernels.triton_kernels.gates import INTERPRETED
from braid_kernels.triton_kernels.launch import Launch
from braid_kernels.triton_kernels.paged import append_kernel, merge_parts_kernel, paged_attention_kernel
from braid_kernels.triton_kernels.paged_plan import PagedPlan, PagedPlanCache, Tiles
from braid_kernels.triton_kernels.tuning import FullTuning, power_of_two

DTYPES = frozenset({torch.float32, torch.bfloat16})


@dataclass(frozen=True)
class Shape:
    """A mechanism as the attention kernel sees it.

    rope: columns of a key behind the first `width` that meet a query of their own. latent: values are the
    first `value` columns of the keys.
    """

    heads: int
    kv_heads: int
    width: int
    rope: int
    value: int
    latent: bool
    scale: float
    window: int

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @classmethod
    def of(cls, geometry: FullGeometry) -> Shape:
        match geometry:
            case Gqa() as g:
                return cls(
                    g.num_q_heads,
                    g.num_kv_heads,
                    g.head_dim,
                    0,
                    g.v_head_dim,
                    False,
                    g.scale,
                    g.sliding_window,
                )
            case Mla() as g:
                r = g.kv_lora_rank
                return cls(g.num_heads, 1, r, g.qk_rope_head_dim, r, True, g.scale, 0)


class TritonFullKernel(FullKernel):
    """One full layer."""

    def __init__(self, layer: FullLayer, tuning: FullTuning, plans: PagedPlanCache) -> None:
        self._layer = layer
        self._shape = Shape.of(layer.geometry)
        self._signature = signature(layer.geometry)
        self._tuning = tuning
        self._plans = plans
        caches = layer.caches
        self._keys = caches["latent"] if self._shape.latent else caches["k"]
        self._values = self._keys if self._shape.latent else caches["v"]
        self._device = self._keys.device
        self._params = {name: p.detach().to(self._device) for name, p in layer.params.items()}

    def __call__(
        self, inputs: Mapping[str, Tensor], meta: PagedMeta, plan: FullPlan | None, out: Tensor
    ) -> None:
        check_plan(plan, meta, Planning.OPTIONAL)
        if not (INTERPRETED or out.is_cuda):
            raise InputError("out", out.device, "must be on a CUDA device")
        with torch.cuda.device_of(out):
            for launch in self.launches(inputs, meta, out):
                launch.run()

    def launches(self, inputs: Mapping[str, Tensor], meta: PagedMeta, out: Tensor) -> Iterator[Launch]:
        """The step's launches in order; between them, torch projects mla's queries and outputs.

        Raises InputError or MetadataError before the first.
        """
        check_inputs(inputs, meta.num_tokens, self._signature.inputs)
        check_rows("out", out, meta.num_tokens, self._signature.output)
        for name, tensor in (*inputs.items(), ("out", out)):
            if tensor.dtype not in DTYPES:
                raise InputError(name, tensor.dtype, "must be float32 or bfloat16")
            if tensor.device != self._device:
                raise InputError(name, tensor.device, f"must be on {self._device}, where the caches are")
        plan = self._plans.get(meta, self._layer.page_size, self._device)
        plan.check_pages(self._layer.page_size, self._layer.num_pages, self._shape.window)
        return self._latent(inputs, plan, out) if self._shape.latent else self._grouped(inputs, plan, out)

    def _grouped(self, inputs: Mapping[str, Tensor], plan: PagedPlan, out: Tensor) -> Iterator[Launch]:
        if plan.num_tokens == 0:
            return
        yield self._append(inputs["k"], self._keys, 0, plan)
        yield self._append(inputs["v"], self._values, 0, plan)
        yield from self._attend(inputs["q"], inputs["q"], plan, out)

    def _latent(self, inputs: Mapping[str, Tensor], plan: PagedPlan, out: Tensor) -> Iterator[Launch]:
        if plan.num_tokens == 0:
            return
        yield self._append(inputs["c_kv"], self._keys, 0, plan)
        if self._shape.rope:
            yield self._append(inputs["k_pe"], self._keys, self._shape.value, plan)
        q_nope = inputs["q_nope"]
        dtype = torch.promote_types(q_nope.dtype, torch.bfloat16)
        w_uk, w_uv = self._params["w_uk"].to(dtype), self._params["w_uv"].to(dtype)
        # [H, T, dn] by [H, dn, r]: heads outermost, as the product wants them; the kernel takes strides.
        absorbed = torch.bmm(q_nope.transpose(0, 1).to(dtype), w_uk).transpose(0, 1)
        latent = torch.empty(
            (self._shape.heads, plan.num_tokens, self._shape.value), dtype=dtype, device=self._device
        )
        rope = inputs["q_pe"] if self._shape.rope else absorbed
        yield from self._attend(absorbed, rope, plan, latent.transpose(0, 1))
        out.copy_(torch.bmm(latent, w_uv).transpose(0, 1))

    def _append(self, rows: Tensor, cache: Tensor, column: int, plan: PagedPlan) -> Launch:
        width = rows[0].numel()
        block = min(self._tuning.append_columns, power_of_two(width))
        position = cache[0, 0].numel()
        return Launch(
            append_kernel,
            (plan.num_tokens, -(-width // block)),
            {
                "rows": rows,
                # A column's address is its own tensor: all kernels see is pointers.
                "cache": cache.flatten(2)[:, :, column:] if column else cache,
                "row_page": plan.row_page,
                "row_offset": plan.row_offset,
                "rows_row": rows.stride(0),
                "cache_page": cache.stride(0),
                "cache_position": position,
            },
            {"WIDTH": width, "BLOCK": block},
            warps=1 if block <= 256 else 4,
        )

    def _attend(self, q: Tensor, rope: Tensor, plan: PagedPlan, out: Tensor) -> Iterator[Launch]:
        if len(plan.short):
            yield from self._tiles(q, rope, plan, plan.short, 1, out)
        if len(plan.long):
            yield from self._tiles(q, rope, plan, plan.long, plan.long_rows, out)

    def _tiles(
        self, q: Tensor, rope: Tensor, plan: PagedPlan, tiles: Tiles, rows: int, out: Tensor
    ) -> Iterator[Launch]:
        shape, tuning = self._shape, self._tuning
        half = self._keys.dtype == torch.bfloat16 and q.dtype == torch.bfloat16
        block_d = power_of_two(shape.width)
        heads = min(tuning.rows(block_d, half) // rows, power_of_two(shape.group, least=1))
        heads = max(heads, -(-tuning.least_rows // rows))
        columns = shape.kv_heads * -(-shape.group // heads)
        parts = self._parts(tiles, columns)
        target, lse = out, out  # lse is not written where there is one part
        if parts > 1:
            full = (parts, plan.num_tokens, shape.heads)
            target = torch.empty((*full, shape.value), dtype=torch.float32, device=self._device)
            lse = torch.empty(full, dtype=torch.float32, device=self._device)
        strides = target.stride() if parts > 1 else (0, *target.stride())
        yield Launch(
            paged_attention_kernel,
            (len(tiles), columns, parts),
            {
                "q": q,
                "q_rope": rope,
                "k": self._keys,
                "v": self._values,
                "out": target,
                "lse": lse,
                "tile_span": tiles.span,
                "tile_row": tiles.row,
                "cu_seqlens": plan.cu_seqlens,
                "context_lens": plan.context_lens,
                "page_table": plan.page_table,
                "q_row": q.stride(0),
                "q_head": q.stride(1),
                "rope_row": rope.stride(0),
                "rope_head": rope.stride(1),
                "k_page": self._keys.stride(0),
                "v_page": self._values.stride(0),
                "out_part": strides[0],
                "out_row": strides[1],
                "out_head": strides[2],
                "lse_part": lse.stride(0) if parts > 1 else 0,
                "table_row": plan.page_table.stride(0),
                "scale": float(shape.scale),
            },
            {
                "HEADS": shape.heads,
                "GROUP": shape.group,
                "KV_HEADS": shape.kv_heads,
                "D": shape.width,
                "DR": shape.rope,
                "DV": shape.value,
                "LATENT": shape.latent,
                "PAGE": self._layer.page_size,
                "WINDOW": shape.window,
                "PARTS": parts,
                "BLOCK_R": rows,
                "BLOCK_H": heads,
                "BLOCK_N": tuning.keys(block_d, half),
                "BLOCK_D": block_d,
                "BLOCK_DR": power_of_two(max(shape.rope, 1)),
                "BLOCK_DV": block_d if shape.latent else power_of_two(shape.value),
                **self._products(half),
            },
            warps=tuning.warps(rows * heads, block_d),
            stages=tuning.depth(half),
            unspecialised=frozenset({"table_row"}),
        )
        if parts > 1:
            yield self._merge(target, lse, tiles, out, parts)

    def _products(self, half: bool) -> dict[str, Any]:
        # Products of fp32 operands take three tf32 products each, which is as exact as fp32.
        return {"DOT": tl.bfloat16 if half else tl.float32, "PRECISION": "tf32x3"}

    def _merge(self, target: Tensor, lse: Tensor, tiles: Tiles, out: Tensor, parts: int) -> Launch:
        shape = self._shape
        return Launch(
            merge_parts_kernel,
            (int(tiles.rows.shape[0]), shape.heads),
            {
                "parts": target,
                "lse": lse,
                "out": out,
                "rows": tiles.rows,
                "part_stride": target.stride(0),
                "part_row": target.stride(1),
                "part_head": target.stride(2),
                "lse_part": lse.stride(0),
                "out_row": out.stride(0),
                "out_head": out.stride(1),
            },
            {
                "HEADS": shape.heads,
                "DV": shape.value,
                "PARTS": parts,
                "BLOCK_DV": power_of_two(shape.value),
            },
            warps=1 if shape.value <= 128 else 4,
        )

    def _parts(self, tiles: Tiles, columns: int) -> int:
        """Into how many the keys are cut: as many as fill the device, none of them short."""
        tuning = self._tuning
        wanted = -(-tuning.programs // (len(tiles) * columns))
        # Powers of two, so that few kernels are compiled.
        most = min(wanted, tiles.longest // tuning.part_keys, tuning.most_parts)
        return 1 << (max(most, 1).bit_length() - 1)


class TritonFullBackend(FullBackend):
    """Paged gqa and mla (absorbed), fp32 and bf16, on a CUDA device. Has no option.

    Planning is optional: what a step needs is laid out for the first layer that runs, and kept for the
    others; a plan that is made before saves that layer the time.
    """

    name = "triton"
    capabilities = Capabilities(
        planning=Planning.OPTIONAL,
        chunked_prefix=False,
        ragged=Ragged.SUPPORTED,
        graphs=False,
        mechanisms=frozenset({"gqa", "mla"}),
        dtypes=DTYPES,
        devices=frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"}),
    )

    def __init__(self, tuning: FullTuning | None = None) -> None:
        self._tuning = tuning or FullTuning()
        self._plans = PagedPlanCache(self._tuning.long_rows)
        self._places: dict[FullGeometry, torch.device] = {}
        """Geometry → where layers of it lie."""

    def layer(self, layer: FullLayer) -> TritonFullKernel:
        """Resolve one layer. Raises UnsupportedError, or LayerError where the caches are not on a GPU."""
        self.capabilities.check(layer.geometry.mechanism)
        name, cache = next(iter(layer.caches.items()))
        if not (INTERPRETED or cache.device.type == "cuda"):
            raise LayerError(f"caches[{name}]", cache.device, "must be on a CUDA device")
        self._places[layer.geometry] = cache.device
        return TritonFullKernel(layer, self._tuning, self._plans)

    def plan(
        self,
        meta: PagedMeta,
        page_size: int,
        options: Mapping[str, str],
        layers: Collection[FullGeometry],
    ) -> FullPlan:
        plan = summarise_plan(meta, page_size, options)
        devices = {self._places[geometry] for geometry in layers if geometry in self._places}
        plans = [self._plans.get(meta, page_size, device) for device in devices]
        return replace(plan, payload=tuple(plans) or None)
