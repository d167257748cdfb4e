# SPDX-License-Identifier: Apache-2.0
"""Prefill and append: ragged queries against paged or ragged keys."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch

from ..._tensors import require, require_flag, require_integer
from ...errors import Error
from .._flash import invalid, refuse_given, unsupported
from .._renames import renamed
from .common import (
    Pages,
    PageTable,
    Plan,
    Run,
    attend,
    check_constants,
    check_encoding,
    check_indptr,
    check_layout,
    make_types,
    soft_cap_of,
    split_pages,
)

#: Arguments of the wrapper in the words of single_prefill_with_kv_cache.
_SINGLE_NAMES = {
    "qo_indptr": "q",
    "num_qo_heads": "q",
    "head_dim_qk": "q",
    "q_data_type": "q",
    "kv_indptr": "k",
    "num_kv_heads": "k",
    "kv_data_type": "k",
    "head_dim_vo": "v",
    "o_data_type": "o_dtype",
    "q_scale": "scale_q",
    "k_scale": "scale_k",
    "v_scale": "scale_v",
}
_PAGE_NAMES = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


def _check_heads(function: str, **sizes: int) -> None:
    for name, value in sizes.items():
        require_integer(function, name, value, 1)


class BatchPrefillWithPagedKVCacheWrapper:
    """Queries of a batch over a paged cache: plan() once per batch, run() once per layer."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        """`float_workspace_buffer` is not needed: attend has memory of its own."""
        check_constants(
            type(self).__name__,
            kv_layout,
            use_cuda_graph,
            backend,
            qo_indptr_buf=qo_indptr_buf,
            paged_kv_indptr_buf=paged_kv_indptr_buf,
            paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
        )
        self._kv_layout = kv_layout
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Fixes the batch for the runs that follow.

        Args:
            qo_indptr: int32 [B + 1], prefix sum of the query lengths.
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: as in the decode wrapper's plan().
            causal: a query sees keys up to its position, counted from the end of the keys.
            sm_scale, window_left, logits_soft_cap, q_data_type, ...: as in the decode wrapper's plan().
        """
        function = f"{type(self).__name__}.plan"
        check_encoding(function, pos_encoding_mode, rope_scale, rope_theta)
        refuse_given(
            function,
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
            seq_lens=seq_lens,
            seq_lens_q=seq_lens_q,
            block_tables=block_tables,
        )
        if use_fp16_qk_reduction or token_pos_in_items_len:
            name = "use_fp16_qk_reduction" if use_fp16_qk_reduction else "token_pos_in_items_len"
            raise unsupported(function, name, "its default", "another value")
        _check_heads(function, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk)
        require_flag(function, "causal", causal)
        starts = check_indptr(function, "qo_indptr", qo_indptr)
        pages = PageTable.make(
            function, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, _PAGE_NAMES
        )
        if starts.numel() != pages.seq_lens.numel() + 1:
            raise invalid(function, "qo_indptr", f"{pages.seq_lens.numel() + 1} entries", starts.numel())
        q_dtype, kv_dtype = make_types(function, q_data_type, kv_data_type, o_data_type)
        self._plan = Plan(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            causal,
            window_left,
            soft_cap_of(function, logits_soft_cap),
            sm_scale,
            q_dtype,
            kv_dtype,
            starts,
            pages,
            head_dim_vo=head_dim_vo,
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
        """Attention of q [tokens, num_qo_heads, head_dim_qk]: out, or (out, lse [tokens, heads])."""
        function = f"{type(self).__name__}.run"
        if self._plan is None:
            raise Error(f"[{function}]: call plan() first")
        if args:
            raise unsupported(function, "args", "no arguments of custom kernels", len(args))
        k, v = split_pages(function, paged_kv_cache, self._kv_layout)
        options = Run(function, q_scale, k_scale, v_scale, out, lse, return_lse, window_left, sinks)
        return attend(self._plan, q, k, v, options)

    run_return_lse = partialmethod(run, return_lse=True)
    forward = run
    forward_return_lse = run_return_lse

    def end_forward(self) -> None:
        """Does nothing: there is no state on a device to release."""


class BatchPrefillWithRaggedKVCacheWrapper:
    """Queries of a batch over ragged keys: plan() once per batch, run() once per layer."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        """`float_workspace_buffer` is not needed: attend has memory of its own."""
        check_constants(
            type(self).__name__,
            kv_layout,
            use_cuda_graph,
            backend,
            qo_indptr_buf=qo_indptr_buf,
            kv_indptr_buf=kv_indptr_buf,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
        )
        if kv_layout != "NHD":
            raise unsupported(type(self).__name__, "kv_layout", "NHD: ragged keys have no pages", kv_layout)
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Fixes the batch: qo_indptr and kv_indptr are int32 [B + 1], prefix sums of the lengths."""
        function = f"{type(self).__name__}.plan"
        check_encoding(function, pos_encoding_mode, rope_scale, rope_theta)
        refuse_given(function, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        if use_fp16_qk_reduction:
            raise unsupported(function, "use_fp16_qk_reduction", "False", "True")
        _check_heads(function, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk)
        q_dtype, kv_dtype = make_types(function, q_data_type, kv_data_type, o_data_type)
        require_flag(function, "causal", causal)
        starts = check_indptr(function, "qo_indptr", qo_indptr)
        keys = check_indptr(function, "kv_indptr", kv_indptr)
        if keys.numel() != starts.numel():
            raise invalid(function, "kv_indptr", f"{starts.numel()} entries", keys.numel())
        self._plan = Plan(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            causal,
            window_left,
            soft_cap_of(function, logits_soft_cap),
            sm_scale,
            q_dtype,
            kv_dtype,
            starts,
            kv_indptr=keys,
            head_dim_vo=head_dim_vo,
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
        """Attention of q [tokens, Hq, D] to k [keys, Hkv, D] and v [keys, Hkv, Dv]: out, or (out, lse)."""
        function = f"{type(self).__name__}.run"
        if self._plan is None:
            raise Error(f"[{function}]: call plan() first")
        if args:
            raise unsupported(function, "args", "no arguments of custom kernels", len(args))
        require(function, "k", k, 3)
        require(function, "v", v, 3)
        return attend(self._plan, q, k, v, Run(function, q_scale, k_scale, v_scale, out, lse, return_lse, None, sinks))

    run_return_lse = partialmethod(run, return_lse=True)
    forward = run
    forward_return_lse = run_return_lse

    def end_forward(self) -> None:
        """Does nothing: there is no state on a device to release."""


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: float | None = None,
    scale_k: float | None = None,
    scale_v: float | None = None,
    o_dtype: Any = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention of q [Sq, Hq, D] to k and v [Sk, Hkv, D] (NHD) or [Hkv, Sk, D] (HND): out, or (out, lse [Sq, Hq])."""
    function = "single_prefill_with_kv_cache"
    check_layout(function, kv_layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(function, name, tensor, 3)
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    with renamed(function, _SINGLE_NAMES):
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(0), backend=backend)
        wrapper.plan(
            torch.tensor([0, q.shape[0]], dtype=torch.int32),
            torch.tensor([0, k.shape[0]], dtype=torch.int32),
            q.shape[1],
            k.shape[1],
            q.shape[2],
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
            o_data_type=o_dtype,
        )
        return wrapper.run(q, k, v, q_scale=scale_q, k_scale=scale_k, v_scale=scale_v, return_lse=return_lse)
