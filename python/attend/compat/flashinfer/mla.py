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
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Any,
        kv_data_type: Any,
        use_profiler: bool = False,
    ) -> None:
        """Fixes the batch for the runs that follow.

        Args:
            qo_indptr: int32 [B + 1], prefix sum of the query lengths.
            kv_indptr: int32 [B + 1], where each request's pages begin in `kv_indices`.
            kv_indices: int32, pages.
            kv_len_arr: int32 [B], keys of each request.
            head_dim_ckv, head_dim_kpe: sizes of the latent, which is the value as well, and of the rotated part.
            page_size: 1, 4, 8 or a multiple of 16.
            causal: the last query of a request sees all of its keys.
            sm_scale: that of the model's heads before absorption.
            q_data_type, kv_data_type: types of torch or their names.
            use_profiler: must be False.
        """
        function = f"{type(self).__name__}.plan"
        require_flag(function, "causal", causal)
        require_default(function, "use_profiler", use_profiler, False)
        for name, value in (("num_heads", num_heads), ("head_dim_ckv", head_dim_ckv), ("page_size", page_size)):
            require_integer(function, name, value, 1)
        require_integer(function, "head_dim_kpe", head_dim_kpe, 0)
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
            *make_types(function, q_data_type, kv_data_type, None),
        )

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
        """Attention of queries that are absorbed already.

        Args:
            q_nope: [T, num_heads, head_dim_ckv]; q_pe: [T, num_heads, head_dim_kpe].
            ckv_cache: [pages, page_size, head_dim_ckv]; kpe_cache: [pages, page_size, head_dim_kpe]. Where they are the
                two parts of one tensor's rows they are read in place, otherwise the pages that are used are copied.
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
        require_flag(function, "return_lse", return_lse)
        require_flag(function, "return_lse_base_on_e", return_lse_base_on_e)
        _check_tensors(function, plan, q_nope, q_pe, ckv_cache, kpe_cache)
        if scale_of(function, "ckv_scale", ckv_scale) != scale_of(function, "kpe_scale", kpe_scale):
            raise unsupported(function, "kpe_scale", f"{ckv_scale}, as ckv_scale", kpe_scale)
        is_fp8 = plan.kv_dtype.itemsize == 1
        if not is_fp8 and scale_of(function, "ckv_scale", ckv_scale) != 1.0:
            raise unsupported(function, "ckv_scale", "None, as the cache is not fp8", ckv_scale)
        block_table, cache = plan.block_table, _adjacent(ckv_cache, kpe_cache)
        if cache is None:
            cache, block_table = _used_pages(function, ckv_cache, kpe_cache, block_table)
        query = _adjacent(q_nope, q_pe)
        if lse is None and return_lse:
            lse = torch.empty(q_nope.shape[:2])
        with renamed(function, _NAMES):
            out = ops.mla_decode(
                torch.cat((q_nope, q_pe), dim=-1) if query is None else query,
                cache,
                block_table,
                plan.qo_indptr,
                plan.kv_len,
                scale=plan.sm_scale,
                head_dim_v=plan.head_dim_ckv,
                kv_scale=torch.tensor([scale_of(function, "ckv_scale", ckv_scale)]) if is_fp8 else None,
                causal=plan.causal,
                sinks=sinks,
                lse_includes_sink=sinks is not None,
                out=out,
                lse=lse,
            )
        if lse is not None and not return_lse_base_on_e:
            lse /= math.log(2.0)
        return (out, lse) if return_lse else out


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
