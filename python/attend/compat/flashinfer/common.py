# SPDX-License-Identifier: Apache-2.0
"""What the wrappers share: arguments that only have one value here, paged caches, one call of the op."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import ops
from ..._tensors import require, require_flag, require_integer
from ...errors import Error, InvalidType
from .._flash import invalid, refuse_given, require_default, unsupported
from .._renames import renamed

Pages = Any  # a tensor of both, or a tuple (k, v)

#: Names that attend.ops gives to arguments of this library.
NAMES = {"scale": "sm_scale", "softcap": "logits_soft_cap", "query_start_loc": "qo_indptr"}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BACKENDS = ("auto", "fa2", "fa3")


def check_constants(function: str, kv_layout: str, use_cuda_graph: Any, backend: str, **buffers: Any) -> None:
    """Arguments of a wrapper's constructor."""
    check_layout(function, kv_layout)
    if use_cuda_graph is not False:
        raise unsupported(function, "use_cuda_graph", "False", use_cuda_graph)
    if not isinstance(backend, str) or backend not in _BACKENDS:
        raise unsupported(function, "backend", f"one of {', '.join(_BACKENDS)}", repr(backend))
    refuse_given(function, **buffers)


def check_layout(function: str, kv_layout: Any) -> None:
    """NHD or HND."""
    if not isinstance(kv_layout, str) or kv_layout not in ("NHD", "HND"):
        raise invalid(function, "kv_layout", "NHD or HND", repr(kv_layout))


def check_heads(function: str, **sizes: int) -> None:
    """Counts and sizes of at least 1."""
    for name, value in sizes.items():
        require_integer(function, name, value, 1)


def check_encoding(function: str, pos_encoding_mode: str, rope_scale: Any, rope_theta: Any) -> None:
    """Position encodings: there are none."""
    if not isinstance(pos_encoding_mode, str) or pos_encoding_mode != "NONE":
        raise unsupported(function, "pos_encoding_mode", "NONE", repr(pos_encoding_mode))
    refuse_given(function, rope_scale=rope_scale, rope_theta=rope_theta)


def refuse_set(function: str, **flags: Any) -> None:
    """Unsupported for each flag that is neither None nor False."""
    for name, value in flags.items():
        if value is not None and value is not False:
            raise unsupported(function, name, "None or False", type(value).__name__)


def torch_dtype(function: str, argument: str, dtype: Any) -> torch.dtype:
    """A type of torch, given as one or by name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        text = f"[{function}] argument '{argument}': expected a type of torch or its name, got {dtype!r}"
        raise InvalidType(text, function, argument)
    return found


def scale_of(function: str, argument: str, scale: Any) -> float:
    """A number, or a tensor with one; None is 1."""
    if scale is None:
        return 1.0
    if isinstance(scale, torch.Tensor) and scale.layout == torch.strided and scale.device.type == "cpu":
        if scale.numel() == 1 and not scale.is_complex():
            return float(scale.detach())
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise unsupported(function, argument, "one number", type(scale).__name__)
    return float(scale)


def soft_cap_of(function: str, logits_soft_cap: Any) -> float:
    """A number; None is 0, off."""
    return 0.0 if logits_soft_cap is None else scale_of(function, "logits_soft_cap", logits_soft_cap)


def int32(function: str, argument: str, tensor: Any) -> torch.Tensor:
    """A one-dimensional tensor of integers as int32 on the CPU."""
    require(function, argument, tensor, 1)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        raise invalid(function, argument, "an int32 tensor of torch", getattr(tensor, "dtype", type(tensor).__name__))
    narrow = tensor.to(torch.int32).contiguous()
    if tensor.dtype == torch.int64 and not torch.equal(narrow.to(torch.int64), tensor):
        raise invalid(function, argument, "numbers of 32 bits", int(tensor[narrow.to(torch.int64) != tensor][0]))
    return narrow


def check_indptr(function: str, argument: str, indptr: Any, total: int | None = None) -> torch.Tensor:
    """A prefix sum from 0 that never decreases, at most `total` at its end."""
    indptr = int32(function, argument, indptr)
    if indptr.numel() == 0 or indptr[0] != 0 or bool((indptr[1:] < indptr[:-1]).any()):
        raise invalid(function, argument, "a prefix sum that begins with 0", indptr.tolist()[:8])
    if total is not None and indptr[-1] > total:
        raise invalid(function, argument, f"a last entry of at most {total}", int(indptr[-1]))
    return indptr


def check_copy(function: str, argument: str, copy: Any, indptr: torch.Tensor) -> None:
    """A copy of `indptr` that the caller has on the host: None, or the same numbers."""
    if copy is not None and not torch.equal(int32(function, argument, copy), indptr):
        raise invalid(function, argument, "a copy of the tensor that it is named after", "other numbers")


def split_pages(function: str, paged_kv_cache: Pages, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [pages, page_size, heads, dim] views."""
    if isinstance(paged_kv_cache, (tuple, list)):
        if len(paged_kv_cache) != 2:
            raise invalid(function, "paged_kv_cache", "a tuple (k, v)", f"{len(paged_kv_cache)} entries")
        k, v = paged_kv_cache
        require(function, "paged_kv_cache", k, 4)
        require(function, "paged_kv_cache", v, 4)
    else:
        require(function, "paged_kv_cache", paged_kv_cache, 5)
        if paged_kv_cache.shape[1] != 2:
            raise invalid(function, "paged_kv_cache", "size 2 in dimension 1", tuple(paged_kv_cache.shape))
        k, v = paged_kv_cache[:, 0], paged_kv_cache[:, 1]
    return (k, v) if kv_layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


def check_last_page_len(
    function: str, argument: str, last_page_len: torch.Tensor, counts: torch.Tensor, page_size: int
) -> None:
    """Of requests that have pages, from 1 to page_size."""
    bad = (counts > 0) & ((last_page_len < 1) | (last_page_len > page_size))
    if bool(bad.any()):
        request = int(bad.nonzero()[0])
        got = f"{int(last_page_len[request])} at index {request}"
        raise invalid(function, argument, f"lengths from 1 to {page_size}", got)


@dataclass
class PageTable:
    """Pages of a batch as the op takes them."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    page_size: int

    @staticmethod
    def make(function: str, indptr: Any, indices: Any, last_page_len: Any, page_size: int, names: Any) -> PageTable:
        """`names` are those of the three tensors."""
        require_integer(function, "page_size", page_size, 1)
        indices = int32(function, names[1], indices)
        indptr = check_indptr(function, names[0], indptr, indices.numel())
        last_page_len = int32(function, names[2], last_page_len)
        batch = indptr.numel() - 1
        if last_page_len.numel() != batch:
            raise invalid(function, names[2], f"{batch} entries", last_page_len.numel())
        counts = indptr[1:] - indptr[:-1]
        check_last_page_len(function, names[2], last_page_len, counts, page_size)
        widest = max(int(counts.max()) if batch else 0, 1)
        table = torch.zeros(batch, widest, dtype=torch.int32)
        table[torch.arange(widest)[None] < counts[:, None]] = indices[: int(indptr[-1])]
        seq_lens = torch.where(counts > 0, (counts - 1) * page_size + last_page_len, 0).to(torch.int32)
        return PageTable(table, seq_lens, page_size)


@dataclass
class Plan:
    """What plan() fixes for the runs that follow."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    window_left: int
    logits_soft_cap: float
    sm_scale: float | None
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    qo_indptr: torch.Tensor
    pages: PageTable | None = None
    kv_indptr: torch.Tensor | None = None
    head_dim_vo: int | None = None  # of values; None = as they come


def replanned(
    function: str,
    plan: Plan | None,
    *,
    pos_encoding_mode: str,
    rope_scale: Any,
    rope_theta: Any,
    logits_soft_cap: Any,
    use_fp16_qk_reduction: Any = False,
    **changed: Any,
) -> Plan:
    """`plan` with the values of a forward(), which replace those of plan() even where they are not given."""
    if plan is None:
        raise Error(f"[{function}]: call begin_forward() first")
    check_encoding(function, pos_encoding_mode, rope_scale, rope_theta)
    require_default(function, "use_fp16_qk_reduction", use_fp16_qk_reduction, False)
    require_flag(function, "causal", changed.get("causal", False))
    return replace(plan, logits_soft_cap=soft_cap_of(function, logits_soft_cap), **changed)


def make_types(function: str, q_data_type: Any, kv_data_type: Any, o_data_type: Any) -> tuple[Any, Any]:
    """Types of queries and of the cache; results have that of the queries."""
    q_dtype = torch_dtype(function, "q_data_type", q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else torch_dtype(function, "kv_data_type", kv_data_type)
    if q_dtype not in (torch.float32, torch.float16, torch.bfloat16, *_FP8):
        raise unsupported(function, "q_data_type", "float32, float16, bfloat16 or fp8", q_dtype)
    if kv_dtype != q_dtype and kv_dtype not in _FP8:
        raise unsupported(function, "kv_data_type", f"{q_dtype}, as q_data_type, or fp8", kv_dtype)
    if o_data_type is not None and torch_dtype(function, "o_data_type", o_data_type) != q_dtype:
        raise unsupported(function, "o_data_type", f"None or {q_dtype}", o_data_type)
    return q_dtype, kv_dtype


@dataclass
class Run:
    """Arguments of run() besides the tensors that are attended to."""

    function: str
    q_scale: Any = None
    k_scale: Any = None
    v_scale: Any = None
    out: Any = None
    lse: Any = None
    return_lse: bool = False
    window_left: int | None = None
    sinks: Any = None
    lse_base: str = "log2"
    lse_layout: str = "NH"


def _lse_memory(run: Run, tokens: int, heads: int) -> tuple[Any, Any]:
    """The LSE to give back, and [tokens, heads] of it to write to; None where none is wanted."""
    for name, value, known in (
        ("lse_base", run.lse_base, ("log2", "ln")),
        ("lse_layout", run.lse_layout, ("NH", "HN")),
    ):
        if not isinstance(value, str) or value not in known:
            raise invalid(run.function, name, " or ".join(known), repr(value))
    if run.lse is None and not run.return_lse:
        return None, None
    if run.lse_layout == "NH":
        lse = torch.empty(tokens, heads) if run.lse is None else run.lse
        return lse, lse
    lse = torch.empty(heads, tokens) if run.lse is None else run.lse
    require(run.function, "lse", lse, 2)
    if not isinstance(lse, torch.Tensor) or tuple(lse.shape) != (heads, tokens):
        raise invalid(run.function, "lse", f"a torch tensor [{heads}, {tokens}]", tuple(lse.shape))
    return lse, lse.T


def attend(plan: Plan, q: Any, k: torch.Tensor, v: torch.Tensor, run: Run) -> Any:
    """One call of the op: out, or (out, lse)."""
    function = run.function
    paged = plan.pages is not None
    k_name, v_name = ("paged_kv_cache", "paged_kv_cache") if paged else ("k", "v")
    require_flag(function, "return_lse", run.return_lse)
    require(function, "q", q, 3)
    if tuple(q.shape[1:]) != (plan.num_qo_heads, plan.head_dim):
        raise invalid(function, "q", f"[tokens, {plan.num_qo_heads}, {plan.head_dim}], as planned", tuple(q.shape))
    for name, tensor, planned in (("q", q, plan.q_dtype), (k_name, k, plan.kv_dtype)):
        if tensor.dtype != planned:
            raise invalid(function, name, f"{planned}, as planned", tensor.dtype)
    if k.shape[-2] != plan.num_kv_heads:
        raise invalid(function, k_name, f"{plan.num_kv_heads} heads, as planned", k.shape[-2])
    if plan.head_dim_vo is not None and v.shape[-1] != plan.head_dim_vo:
        raise invalid(function, "head_dim_vo", f"the size of the values, {v.shape[-1]}", plan.head_dim_vo)
    scale = 1.0 / math.sqrt(plan.head_dim) if plan.sm_scale is None else scale_of(function, "sm_scale", plan.sm_scale)
    scale *= scale_of(function, "q_scale", run.q_scale) * scale_of(function, "k_scale", run.k_scale)
    v_scale = scale_of(function, "v_scale", run.v_scale)
    given_back, lse = _lse_memory(run, *q.shape[:2])
    if paged:
        if k.shape[1] != plan.pages.page_size:
            raise invalid(function, "paged_kv_cache", f"pages of {plan.pages.page_size}, as planned", tuple(k.shape))
        keys = {"seq_lens": plan.pages.seq_lens, "block_table": plan.pages.block_table}
    else:
        keys = {"cu_seqlens_kv": plan.kv_indptr}
    with renamed(function, {**NAMES, "k": k_name, "v": v_name, "block_table": "paged_kv_indices"}):
        out = ops.flash_attn_varlen(
            q,
            k,
            v,
            plan.qo_indptr,
            scale=scale,
            causal=plan.causal,
            window_left=plan.window_left if run.window_left is None else run.window_left,
            softcap=plan.logits_soft_cap,
            sinks=run.sinks,
            lse_includes_sink=run.sinks is not None,
            out=run.out,
            lse=lse,
            **keys,
        )
    if v_scale != 1.0:
        out *= v_scale
    if lse is not None and run.lse_base == "log2":
        lse /= math.log(2.0)
    return (out, given_back) if run.return_lse else out
