# SPDX-License-Identifier: Apache-2.0
"""Decoding: a few query tokens of each request against paged keys, or one query against dense ones."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch

from ..._tensors import require, require_integer
from ...errors import Error
from .._flash import refuse_given, require_default, unsupported
from .common import (
    Pages,
    PageTable,
    Plan,
    Run,
    attend,
    check_constants,
    check_encoding,
    check_layout,
    make_types,
    replanned,
    soft_cap_of,
    split_pages,
)

_PAGE_NAMES = ("indptr", "indices", "last_page_len")


class BatchDecodeWithPagedKVCacheWrapper:
    """Decodes of a batch over a paged cache: plan() once per batch, run() once per layer."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
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
            paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
        )
        self._kv_layout = kv_layout
        self._plan: Plan | None = None

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        is_causal: bool | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Fixes the batch for the runs that follow.

        Args:
            indptr: int32 [B + 1], where each request's pages begin in `indices`.
            indices: int32, pages.
            last_page_len: int32 [B], keys on the last page, from 1 to page_size.
            window_left: keys visible to the left of a query; -1 = all.
            logits_soft_cap: None or 0 = off.
            q_data_type, kv_data_type: types of torch or their names; `data_type` stands for both.
            sm_scale: None = 1 / sqrt(head_dim).
            q_len_per_req: query tokens of each request, the last ones of it; causal among them.
            is_causal: None, or what q_len_per_req says anyhow: whether it is above 1.
        """
        function = f"{type(self).__name__}.plan"
        check_encoding(function, pos_encoding_mode, rope_scale, rope_theta)
        refuse_given(function, block_tables=block_tables, seq_lens=seq_lens)
        require_default(function, "window_right", window_right, 0)
        require_default(function, "use_token_head_sf", use_token_head_sf, False)
        for name, value in (
            ("num_qo_heads", num_qo_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("q_len_per_req", q_len_per_req),
        ):
            require_integer(function, name, value, 1)
        if is_causal is not None:
            require_default(function, "is_causal", is_causal, q_len_per_req > 1)
        pages = PageTable.make(function, indptr, indices, last_page_len, page_size, _PAGE_NAMES)
        batch = pages.seq_lens.numel()
        q_dtype, kv_dtype = make_types(
            function, q_data_type if data_type is None else data_type, kv_data_type, o_data_type
        )
        self._plan = Plan(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            q_len_per_req > 1,
            window_left,
            soft_cap_of(function, logits_soft_cap),
            sm_scale,
            q_dtype,
            kv_dtype,
            torch.arange(batch + 1, dtype=torch.int32) * q_len_per_req,
            pages,
        )
        self._q_len = q_len_per_req

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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Attention of q [B * q_len_per_req, num_qo_heads, head_dim].

        Args:
            q_scale, k_scale: multiply sm_scale; v_scale multiplies the result.
            out, lse: tensors to write to; lse is float32 [tokens, heads].
            sinks: float32 [num_qo_heads].

        Returns:
            out, or (out, lse).
        """
        function = f"{type(self).__name__}.run"
        if self._plan is None:
            raise Error(f"[{function}]: call plan() first")
        if args:
            raise unsupported(function, "args", "no arguments of custom kernels", len(args))
        refuse_given(
            function, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor, kv_cache_sf=kv_cache_sf
        )
        if q_len_per_req is not None:
            require_default(function, "q_len_per_req", q_len_per_req, self._q_len)
        k, v = split_pages(function, paged_kv_cache, self._kv_layout)
        options = Run(function, q_scale, k_scale, v_scale, out, lse, return_lse, window_left, sinks)
        return attend(self._plan, q, k, v, options)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            pos_encoding_mode=pos_encoding_mode,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            logits_soft_cap=logits_soft_cap,
            window_left=window_left,
            sm_scale=sm_scale,
        )
        k, v = split_pages(function, paged_kv_cache, self._kv_layout)
        result = attend(plan, q, k, v, Run(function, q_scale, k_scale, v_scale, return_lse=return_lse))
        self._plan = plan
        return result

    forward_return_lse = partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Does nothing: there is no state on a device to release."""


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one query [Hq, D] to k and v [S, Hkv, D] (NHD) or [Hkv, S, D] (HND): out [Hq, D] [, lse [Hq]]."""
    function = "single_decode_with_kv_cache"
    check_layout(function, kv_layout)
    check_encoding(function, pos_encoding_mode, rope_scale, rope_theta)
    for name, tensor, rank in (("q", q, 2), ("k", k, 3), ("v", v, 3)):
        require(function, name, tensor, rank)
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    plan = Plan(
        q.shape[0],
        k.shape[1],
        q.shape[1],
        False,
        window_left,
        soft_cap_of(function, logits_soft_cap),
        sm_scale,
        q.dtype,
        k.dtype,
        torch.tensor([0, 1], dtype=torch.int32),
        kv_indptr=torch.tensor([0, k.shape[0]], dtype=torch.int32),
    )
    result = attend(plan, q[None], k, v, Run(function, q_scale, k_scale, v_scale, return_lse=return_lse))
    return (result[0][0], result[1][0]) if return_lse else result[0]
