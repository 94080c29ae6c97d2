"""Stands in for FlashInfer on a CPU: the same classes and argument names, the arithmetic written out naively.

It computes from what was planned and from nothing else, refuses what FlashInfer refuses, gives base-2
log-sum-exps as FlashInfer does, and notes every call. Argument names are checked against those of a
released version, in flashinfer_signatures.json.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = {
    "required": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "optional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "keyword_required": inspect.Parameter.KEYWORD_ONLY,
    "varargs": inspect.Parameter.VAR_POSITIONAL,
    "keywords": inspect.Parameter.VAR_KEYWORD,
}
RELEASED: dict[str, Any] = json.loads((Path(__file__).parent / "flashinfer_signatures.json").read_text())


def signature(parameters: list[list[str]]) -> inspect.Signature:
    """The signature that the release has."""
    found = []
    for name, kind in parameters:
        required = kind in ("required", "keyword_required", "varargs", "keywords")
        default = inspect.Parameter.empty if required else None
        found.append(inspect.Parameter(name, KINDS[kind], default=default))
    return inspect.Signature(found)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    """q [L, H, D] over k [n, H, D], v [n, H, Dv]; the last row is at the last key. lse to base 2."""
    rows, keys = q.shape[0], k.shape[0]
    scores = scale * torch.einsum("lhd,nhd->hln", q.double(), k.double())
    position = keys - rows + torch.arange(rows)[:, None]
    key = torch.arange(keys)[None]
    if causal:
        scores = scores.masked_fill(key > position, -math.inf)
    if window >= 0:
        scores = scores.masked_fill(key < position - window, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return torch.einsum("hln,nhd->lhd", weights, v.double()), (lse / math.log(2)).T


class Wrapper(ABC):
    """What all wrappers share: arguments bound by the released names, calls noted."""

    name = ""

    def __init__(self, api: FakeFlashInfer, *args: Any, **kwargs: Any) -> None:
        self.api = api
        self.made = self._bind("__init__", args, kwargs)
        workspace = self.made["float_workspace_buffer"]
        if workspace.dtype != torch.uint8 or workspace.numel() < 128 << 20:
            raise ValueError("the workspace must be uint8, of at least 128 MiB")
        self.planned: dict[str, Any] = {}
        api.made.append(self)

    def _bind(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = signature(RELEASED[self.name][method]).bind(self, *args, **kwargs)
        return dict(bound.arguments)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.planned = self._bind("plan", args, kwargs)
        for name, value in self.planned.items():
            if isinstance(value, Tensor) and value.dtype != torch.int32:
                raise ValueError(f"{name} must be int32")
            if isinstance(value, Tensor) and value.device.type != "cpu":
                raise ValueError(f"{name} would be copied from the device, which waits for it")
        self.api.plans.append((self.name, self.planned))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.planned:
            raise ValueError("run before plan")
        given = self._bind("run", args, kwargs)
        out, lse = self._run(given)
        self.api.runs.append(self.name)
        q = given.get("q", given.get("q_nope"))
        out = out.to(q.dtype)
        if given.get("out") is not None:
            out = given["out"].copy_(out)
        return (out, lse.float()) if given.get("return_lse") else out

    @abstractmethod
    def _run(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Output and lse to base 2, from the planned arguments and those given."""

    def _types(self, q: Tensor, kv: Tensor) -> None:
        if (q.dtype, kv.dtype) != (self.planned["q_data_type"], self.planned["kv_data_type"]):
            raise ValueError("dtypes are not the planned ones")

    def _pages(self, cache: Tensor, i: int, indptr: str, indices: str, length: int) -> Tensor:
        p = self.planned
        begin, end = p[indptr][i : i + 2].tolist()
        pages = p[indices][begin:end].long()
        if (pages < 0).any() or len(pages) != -(-length // p["page_size"]):
            raise ValueError("pages do not fit the length")
        return cache[pages].flatten(0, 1)[:length]


class Paged(Wrapper):
    """Shared by prefill and decode over paged keys and values."""

    def _paged(
        self, q: Tensor, cache: Any, names: tuple[str, str, str], causal: bool, rows: list[int]
    ) -> Any:
        p = self.planned
        k, v = cache
        self._types(q, k)
        if not q.is_contiguous() or k.shape[1] != p["page_size"]:
            raise ValueError("q must be contiguous, and pages as long as planned")
        group = p["num_qo_heads"] // p["num_kv_heads"]
        outs, lses = [], []
        for i, (begin, end) in enumerate(itertools.pairwise(rows)):
            count = int(p[names[0]][i + 1] - p[names[0]][i])
            length = (count - 1) * p["page_size"] + int(p[names[2]][i])
            keys, values = (
                self._pages(x, i, names[0], names[1], length).repeat_interleave(group, dim=1) for x in (k, v)
            )
            window = p.get("window_left", -1)
            out, lse = attend(q[begin:end], keys, values, p["sm_scale"], causal, window)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


class Prefill(Paged):
    name = "BatchPrefillWithPagedKVCacheWrapper"

    def _run(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        names = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        rows = self.planned["qo_indptr"].tolist()
        found: tuple[Tensor, Tensor] = self._paged(
            given["q"], given["paged_kv_cache"], names, bool(self.planned.get("causal")), rows
        )
        return found


class Decode(Paged):
    name = "BatchDecodeWithPagedKVCacheWrapper"

    def _run(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        names = ("indptr", "indices", "last_page_len")
        rows = list(range(len(self.planned["last_page_len"]) + 1))
        if len(given["q"]) != rows[-1]:
            raise ValueError("one row for each sequence")
        found: tuple[Tensor, Tensor] = self._paged(given["q"], given["paged_kv_cache"], names, True, rows)
        return found


class Ragged(Wrapper):
    name = "BatchPrefillWithRaggedKVCacheWrapper"

    def _run(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        p, q, k, v = self.planned, given["q"], given["k"], given["v"]
        self._types(q, k)
        if q.shape[2] != p["head_dim_qk"] or v.shape[2] != p["head_dim_vo"] or not k.is_contiguous():
            raise ValueError("head sizes are not the planned ones")
        qo, kv = p["qo_indptr"].tolist(), p["kv_indptr"].tolist()
        if (qo[-1], kv[-1]) != (len(q), len(k)):
            raise ValueError("rows are not the planned ones")
        parts = []
        for a, b, c, d in zip(qo, qo[1:], kv, kv[1:], strict=False):
            if c == d:
                raise ValueError("a sequence without keys: what comes out is not promised")
            parts.append(attend(q[a:b], k[c:d], v[c:d], p["sm_scale"], bool(p.get("causal")), -1))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


class Mla(Wrapper):
    name = "mla.BatchMLAPagedAttentionWrapper"

    def _run(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        p = self.planned
        self._types(given["q_nope"], given["ckv_cache"])
        if (given["ckv_cache"].shape[-1], given["kpe_cache"].shape[-1]) != (
            p["head_dim_ckv"],
            p["head_dim_kpe"],
        ):
            raise ValueError("head sizes are not the planned ones")
        q = torch.cat([given["q_nope"], given["q_pe"]], dim=-1)
        rows, parts = p["qo_indptr"].tolist(), []
        if rows[-1] != len(q):
            raise ValueError("rows are not the planned ones")
        for i, (begin, end) in enumerate(itertools.pairwise(rows)):
            length = int(p["kv_len_arr"][i])
            c_kv, k_pe = (
                self._pages(given[name], i, "kv_indptr", "kv_indices", length)
                for name in ("ckv_cache", "kpe_cache")
            )
            keys = torch.cat([c_kv, k_pe], dim=-1)[:, None].expand(-1, p["num_heads"], -1)
            values = c_kv[:, None].expand(-1, p["num_heads"], -1)
            parts.append(attend(q[begin:end], keys, values, p["sm_scale"], p["causal"], -1))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


class FakeFlashInfer:
    """The package, as far as it is used."""

    def __init__(self) -> None:
        self.made: list[Wrapper] = []
        self.plans: list[tuple[str, dict[str, Any]]] = []
        self.runs: list[str] = []
        self.mla = self

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> Wrapper:
        return Prefill(self, *args, **kwargs)

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> Wrapper:
        return Decode(self, *args, **kwargs)

    def BatchPrefillWithRaggedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> Wrapper:
        return Ragged(self, *args, **kwargs)

    def BatchMLAPagedAttentionWrapper(self, *args: Any, **kwargs: Any) -> Wrapper:
        return Mla(self, *args, **kwargs)

    def merge_state(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = signature(RELEASED["merge_state"]).bind(*args, **kwargs).arguments
        a, b = given["s_a"].double(), given["s_b"].double()
        top = torch.maximum(a, b)
        wa, wb = torch.exp2(a - top), torch.exp2(b - top)
        total = wa + wb
        out = (given["v_a"].double() * wa[..., None] + given["v_b"].double() * wb[..., None]) / total[
            ..., None
        ]
        self.runs.append("merge_state")
        return out.to(given["v_a"].dtype), (top + torch.log2(total)).float()
