# SPDX-License-Identifier: Apache-2.0
"""Prefill and append: ragged queries against paged keys."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch

from ..._tensors import require_flag
from ...errors import Error
from .._flash import invalid, refuse_given, require_default, unsupported
from .common import (
    Pages,
    PageTable,
    Plan,
    Run,
    attend,
    check_constants,
    check_encoding,
    check_heads,
    check_indptr,
    make_types,
    refuse_set,
    replanned,
    soft_cap_of,
    split_pages,
)

_PAGE_NAMES = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


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
        variant_owns_mask: bool = False,
        max_total_num_rows: int | None = None,
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
            max_total_num_rows=max_total_num_rows,
        )
        require_default(type(self).__name__, "variant_owns_mask", variant_owns_mask, False)
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
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
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
        refuse_given(function, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        refuse_given(function, prefix_len_ptr=prefix_len_ptr, max_item_len_ptr=max_item_len_ptr)
        refuse_given(function, token_pos_in_items_ptr=token_pos_in_items_ptr, seq_lens=seq_lens)
        refuse_given(function, seq_lens_q=seq_lens_q, block_tables=block_tables)
        require_default(function, "use_fp16_qk_reduction", use_fp16_qk_reduction, False)
        require_default(function, "token_pos_in_items_len", token_pos_in_items_len, 0)
        require_default(function, "use_token_head_sf", use_token_head_sf, False)
        check_heads(function, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk)
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
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attention of q [tokens, num_qo_heads, head_dim_qk]: out, or (out, lse [tokens, heads]).

        Args:
            out, lse: tensors to write to; lse is float32.
            lse_base: log2 or ln.
            lse_layout: NH, or HN for [heads, tokens].
            sinks: float32 [num_qo_heads].
        """
        function = f"{type(self).__name__}.run"
        if self._plan is None:
            raise Error(f"[{function}]: call plan() first")
        if args:
            raise unsupported(function, "args", "no arguments of custom kernels", len(args))
        refuse_given(
            function, kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor
        )
        refuse_set(function, use_fp16_softmax=use_fp16_softmax, uses_spcompress=uses_spcompress)
        k, v = split_pages(function, paged_kv_cache, self._kv_layout)
        options = Run(function, q_scale, k_scale, v_scale, out, lse, return_lse, window_left, sinks)
        options.lse_base, options.lse_layout = lse_base, lse_layout
        return attend(self._plan, q, k, v, options)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """run() after plan() with these values, defaults included, in place of its own; later runs keep them."""
        function = f"{type(self).__name__}.forward"
        plan = replanned(
            function,
            self._plan,
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            logits_soft_cap=logits_soft_cap,
            window_left=window_left,
            sm_scale=sm_scale,
        )
        k, v = split_pages(function, paged_kv_cache, self._kv_layout)
        options = Run(function, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)
        result = attend(plan, q, k, v, options)
        self._plan = plan
        return result

    forward_return_lse = partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Does nothing: there is no state on a device to release."""
