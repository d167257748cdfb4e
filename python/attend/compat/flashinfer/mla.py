# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's wrapper of absorbed latent attention over a paged cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from ..._tensors import require, require_flag, require_integer
from ...errors import Error
from .._flash import invalid, refuse_given, require_default, unsupported
from .._renames import renamed
from .common import check_constants, check_indptr, int32, make_types, scale_of

#: Names that attend.ops gives to arguments of run().
_NAMES = {
    "q": "q_nope",
    "kv_cache": "ckv_cache",
    "block_table": "kv_indices",
    "query_start_loc": "qo_indptr",
    "seq_lens": "kv_len_arr",
    "scale": "sm_scale",
}


@dataclass
class _Plan:
    qo_indptr: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    num_heads: int
    head_dim_ckv: int
    head_dim_kpe: int
    page_size: int
    causal: bool
    sm_scale: float
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    lse_mode: str
    use_sinks: bool


#: Words that plan() can serve.
_WORDS = {
    "query_layout": (None, "split", "packed"),
    "kv_cache_layout": (None, "split", "packed"),
    "lse_mode": ("none", "base2", "basee"),
    "output_scale": ("none",),
    "scale_mode": ("default", "kv-per-tensor"),
}


def _check_words(function: str, **words: Any) -> None:
    for name, value in words.items():
        if not (value is None or isinstance(value, str)) or value not in _WORDS[name]:
            raise unsupported(function, name, " or ".join(map(str, _WORDS[name])), type(value).__name__)


def _check_flags(function: str, **flags: Any) -> None:
    for name, value in flags.items():
        require_flag(function, name, value)


def _check_sizes(function: str, sm_scale: Any, head_dim_kpe: Any, **counts: Any) -> None:
    if sm_scale is None:
        raise invalid(function, "sm_scale", "a number", sm_scale)
    for name, value in counts.items():
        require_integer(function, name, value, 1)
    require_integer(function, "head_dim_kpe", head_dim_kpe, 0)


def _types(function: str, q_data_type: Any, kv_data_type: Any, output_dtype: Any) -> tuple[Any, Any]:
    with renamed(function, {"o_data_type": "output_dtype"}):
        types = make_types(function, q_data_type, kv_data_type, output_dtype)
    if types[0].itemsize == 1:
        raise unsupported(function, "q_data_type", "float32, float16 or bfloat16", types[0])
    return types


def _halves(function: str, argument: str, given: Any, plan: _Plan, **others: Any) -> tuple[Any, Any]:
    """`given` as its latent and its rotated part: a pair, or one tensor of both; None = `others`."""
    if given is None:
        return tuple(others.values())
    for name, other in others.items():
        if other is not None:
            raise invalid(function, name, f"None beside {argument}", type(other).__name__)
    if isinstance(given, (tuple, list)):
        if len(given) != 2:
            raise invalid(function, argument, "a pair of tensors", f"{len(given)} entries")
        return tuple(given)
    require(function, argument, given, 3)
    width = plan.head_dim_ckv + plan.head_dim_kpe
    if not isinstance(given, torch.Tensor) or given.shape[-1] != width:
        raise invalid(function, argument, f"a tensor of torch with rows of {width}", tuple(given.shape))
    return given[..., : plan.head_dim_ckv], given[..., plan.head_dim_ckv :]


def _block_table(function: str, indptr: torch.Tensor, indices: torch.Tensor, lengths: torch.Tensor, size: int) -> Any:
    """[B, most pages of a request]; pages that no length reaches are 0."""
    counts = indptr[1:] - indptr[:-1]
    if bool((lengths < 0).any()):
        raise invalid(function, "kv_len_arr", "lengths of at least 0", int(lengths.min()))
    short = lengths > counts * size
    if bool(short.any()):
        request = int(short.nonzero()[0])
        expected = f"at most {int(counts[request]) * size} at index {request} ({int(counts[request])} pages of {size})"
        raise invalid(function, "kv_len_arr", expected, int(lengths[request]))
    widest = max(int(counts.max()) if counts.numel() else 0, 1)
    table = torch.zeros(counts.numel(), widest, dtype=torch.int32)
    table[torch.arange(widest)[None] < counts[:, None]] = indices[: int(indptr[-1])]
    return torch.where(torch.arange(widest)[None] * size < lengths[:, None], table, 0)


def _adjacent(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """Both as one tensor if each row of `second` lies right behind that of `first`; None otherwise."""
    behind = first.data_ptr() + first.shape[-1] * first.element_size()
    together = (*first.shape[:-1], first.shape[-1] + second.shape[-1])
    if first.stride() != second.stride() or second.data_ptr() != behind or first.stride(-1) != 1:
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    return first.as_strided(together, first.stride())


def _used_pages(
    function: str, ckv_cache: torch.Tensor, kpe_cache: torch.Tensor, block_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that the table names as one cache, copied, and the table with their places in it."""
    pages, places = torch.unique(block_table, return_inverse=True)
    if pages.numel() and (int(pages[0]) < 0 or int(pages[-1]) >= ckv_cache.shape[0]):
        expected = f"page ids in [0, {ckv_cache.shape[0]})"
        raise invalid(function, "kv_indices", expected, f"{int(pages[0])} to {int(pages[-1])}")
    picked = pages.long()
    bits = torch.uint8 if ckv_cache.element_size() == 1 else ckv_cache.dtype
    halves = [cache.view(bits).index_select(0, picked) for cache in (ckv_cache, kpe_cache)]
    return torch.cat(halves, dim=-1).view(ckv_cache.dtype), places.to(torch.int32)


class BatchMLAPagedAttentionWrapper:
    """Absorbed latent attention of a batch over paged latents: plan() once per batch, run() once per layer."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """`float_workspace_buffer` is not needed: attend has memory of its own."""
        buffers = {
            "qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr
        }  # fmt: skip
        check_constants(type(self).__name__, "NHD", use_cuda_graph, backend, **buffers)
        self._plan: _Plan | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        num_heads: int | None = None,
        head_dim_ckv: int | None = None,
        head_dim_kpe: int | None = None,
        page_size: int | None = None,
        causal: bool | None = None,
        sm_scale: float | None = None,
        q_data_type: Any = None,
        kv_data_type: Any = None,
        use_profiler: bool = False,
        *,
        metadata: Any = None,
        cum_seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        max_q_len: int | None = None,
        query_layout: str | None = None,
        kv_cache_layout: str | None = None,
        lse_mode: str = "none",
        output_dtype: Any = None,
        output_scale: str = "none",
        scale_mode: str = "default",
        skip_softmax: bool = False,
        enable_pdl: bool | None = None,
        use_sinks: bool = False,
    ) -> None:
        """Fixes the batch for the runs that follow.

        Args:
            qo_indptr: int32 [B + 1], prefix sum of the query lengths.
            kv_indptr: int32 [B + 1], where each request's pages begin in `kv_indices`, which is int32.
            kv_len_arr: int32 [B], keys of each request.
            head_dim_ckv, head_dim_kpe: sizes of the latent, which is the value as well, and of the rotated part.
            page_size: 1, 4, 8 or a multiple of 16.
            causal: the last query of a request sees all of its keys.
            sm_scale: that of the model's heads before absorption.
            q_data_type, kv_data_type: types of torch or their names.
            use_profiler, skip_softmax: must be False; enable_pdl changes nothing.
            metadata, cum_seq_lens_q, block_tables, seq_lens, max_q_len: other forms of the batch; must be None.
            query_layout, kv_cache_layout: None, split or packed; run() takes both, whatever is announced.
            lse_mode: base2 or basee: the base that run() is asked for; none = either.
            output_dtype, output_scale, scale_mode: that of the queries, none; default or kv-per-tensor.
            use_sinks: run() must get sinks.
        """
        function = f"{type(self).__name__}.plan"
        refuse_given(function, metadata=metadata, cum_seq_lens_q=cum_seq_lens_q, block_tables=block_tables)
        refuse_given(function, seq_lens=seq_lens, max_q_len=max_q_len)
        _check_flags(function, causal=causal, use_sinks=use_sinks)
        require_default(function, "use_profiler", use_profiler, False)
        require_default(function, "skip_softmax", skip_softmax, False)
        _check_words(function, query_layout=query_layout, kv_cache_layout=kv_cache_layout, lse_mode=lse_mode)
        _check_words(function, output_scale=output_scale, scale_mode=scale_mode)
        _check_sizes(
            function, sm_scale, head_dim_kpe, num_heads=num_heads, head_dim_ckv=head_dim_ckv, page_size=page_size
        )
        kv_indices = int32(function, "kv_indices", kv_indices)
        kv_indptr = check_indptr(function, "kv_indptr", kv_indptr, kv_indices.numel())
        qo_indptr = check_indptr(function, "qo_indptr", qo_indptr)
        kv_len = int32(function, "kv_len_arr", kv_len_arr)
        batch = kv_indptr.numel() - 1
        for name, count in (("qo_indptr", qo_indptr.numel() - 1), ("kv_len_arr", kv_len.numel())):
            if count != batch:
                raise invalid(function, name, f"{batch} requests, as in kv_indptr", count)
        self._plan = _Plan(
            qo_indptr,
            kv_len,
            _block_table(function, kv_indptr, kv_indices, kv_len, page_size),
            num_heads,
            head_dim_ckv,
            head_dim_kpe,
            page_size,
            causal,
            scale_of(function, "sm_scale", sm_scale),
            *_types(function, q_data_type, kv_data_type, output_dtype),
            lse_mode,
            use_sinks,
        )

    def run(
        self,
        q_nope: torch.Tensor | None = None,
        q_pe: torch.Tensor | None = None,
        ckv_cache: torch.Tensor | None = None,
        kpe_cache: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        query: Any = None,
        kv_cache: Any = None,
        ckv_scale: float | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: float | None = None,
        sinks: torch.Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        bmm1_scale: Any = None,
        bmm2_scale: Any = None,
    ) -> Any:
        """Attention of queries that are absorbed already.

        Args:
            q_nope: [T, num_heads, head_dim_ckv]; q_pe: [T, num_heads, head_dim_kpe].
            ckv_cache: [pages, page_size, head_dim_ckv]; kpe_cache: [pages, page_size, head_dim_kpe]. Where they are the
                two parts of one tensor's rows they are read in place, otherwise the pages that are used are copied.
            query, kv_cache: in place of the former: (q_nope, q_pe) and (ckv_cache, kpe_cache), or one tensor of both.
            out: [T, num_heads, head_dim_ckv] to write to.
            lse: float32 [T, num_heads] to write to.
            return_lse: give (out, lse): logarithms to base 2, or natural ones with `return_lse_base_on_e`.
            ckv_scale, kpe_scale: of fp8 caches, equal to each other; None = 1.
            sinks: float32 [num_heads].

        Returns:
            out, or (out, lse).
        """
        function = f"{type(self).__name__}.run"
        plan = self._plan
        if plan is None:
            raise Error(f"[{function}]: call plan() first")
        refuse_given(function, profiler_buffer=profiler_buffer, kv_len=kv_len, page_table=page_table)
        refuse_given(function, o_scale=o_scale, ckv_scale_arr=ckv_scale_arr)
        refuse_given(function, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        refuse_given(function, bmm1_scale=bmm1_scale, bmm2_scale=bmm2_scale)
        _check_flags(function, return_lse=return_lse, return_lse_base_on_e=return_lse_base_on_e)
        _check_announced(function, plan, sinks, return_lse or lse is not None, return_lse_base_on_e)
        q_nope, q_pe = _halves(function, "query", query, plan, q_nope=q_nope, q_pe=q_pe)
        ckv_cache, kpe_cache = _halves(function, "kv_cache", kv_cache, plan, ckv_cache=ckv_cache, kpe_cache=kpe_cache)
        _check_tensors(function, plan, q_nope, q_pe, ckv_cache, kpe_cache)
        kv_scale = _cache_scale(function, plan, ckv_scale, kpe_scale)
        block_table, cache = plan.block_table, _adjacent(ckv_cache, kpe_cache)
        if cache is None:
            cache, block_table = _used_pages(function, ckv_cache, kpe_cache, block_table)
        rows = _adjacent(q_nope, q_pe)
        if lse is None and return_lse:
            lse = torch.empty(q_nope.shape[:2])
        with renamed(function, _NAMES):
            out = ops.mla_decode(
                torch.cat((q_nope, q_pe), dim=-1) if rows is None else rows,
                cache,
                block_table,
                plan.qo_indptr,
                plan.kv_len,
                scale=plan.sm_scale,
                head_dim_v=plan.head_dim_ckv,
                kv_scale=kv_scale,
                causal=plan.causal,
                sinks=sinks,
                lse_includes_sink=sinks is not None,
                out=out,
                lse=lse,
            )
        if lse is not None and not return_lse_base_on_e:
            lse /= math.log(2.0)
        return (out, lse) if return_lse else out


def _cache_scale(function: str, plan: _Plan, ckv_scale: Any, kpe_scale: Any) -> torch.Tensor | None:
    """The one scale of both parts of an fp8 cache; None for other caches."""
    scale = scale_of(function, "ckv_scale", ckv_scale)
    if scale != scale_of(function, "kpe_scale", kpe_scale):
        raise unsupported(function, "kpe_scale", f"{ckv_scale}, as ckv_scale", kpe_scale)
    if plan.kv_dtype.itemsize == 1:
        return torch.tensor([scale])
    if scale != 1.0:
        raise unsupported(function, "ckv_scale", "None, as the cache is not fp8", ckv_scale)
    return None


def _check_announced(function: str, plan: _Plan, sinks: Any, wants_lse: bool, base_on_e: bool) -> None:
    """What plan() was told about the runs."""
    if plan.use_sinks and sinks is None:
        raise invalid(function, "sinks", "a tensor, as planned", None)
    if wants_lse and plan.lse_mode != "none" and base_on_e != (plan.lse_mode == "basee"):
        raise invalid(function, "return_lse_base_on_e", f"{not base_on_e}, as planned ({plan.lse_mode})", base_on_e)


def _check_tensors(
    function: str,
    plan: _Plan,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
) -> None:
    """Shapes and types as planned; results of the native checks would speak of tensors that were put together."""
    tokens = int(plan.qo_indptr[-1])
    pages = ckv_cache.shape[0] if getattr(ckv_cache, "ndim", 0) else 0
    for name, tensor, shape, dtype in (
        ("q_nope", q_nope, (tokens, plan.num_heads, plan.head_dim_ckv), plan.q_dtype),
        ("q_pe", q_pe, (tokens, plan.num_heads, plan.head_dim_kpe), plan.q_dtype),
        ("ckv_cache", ckv_cache, (pages, plan.page_size, plan.head_dim_ckv), plan.kv_dtype),
        ("kpe_cache", kpe_cache, (pages, plan.page_size, plan.head_dim_kpe), plan.kv_dtype),
    ):
        require(function, name, tensor, 3)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise invalid(function, name, "a dense torch.Tensor on the CPU", type(tensor).__name__)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise invalid(function, name, f"{list(shape)} {dtype}, as planned", f"{list(tensor.shape)} {tensor.dtype}")
