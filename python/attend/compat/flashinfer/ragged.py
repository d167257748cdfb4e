# SPDX-License-Identifier: Apache-2.0
"""Prefill of ragged queries against ragged keys, and of one request."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch

from ..._tensors import require, require_flag
from ...errors import Error
from .._flash import invalid, refuse_given, require_default, unsupported
from .._renames import renamed
from .common import (
    Plan,
    Run,
    attend,
    check_constants,
    check_copy,
    check_encoding,
    check_heads,
    check_indptr,
    check_layout,
    make_types,
    replanned,
    scale_of,
    soft_cap_of,
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
}


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
        variant_owns_mask: bool = False,
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
        require_default(type(self).__name__, "variant_owns_mask", variant_owns_mask, False)
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
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
        qo_indptr_cpu: torch.Tensor | None = None,
        kv_indptr_cpu: torch.Tensor | None = None,
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Fixes the batch for the runs that follow.

        Args:
            qo_indptr, kv_indptr: int32 [B + 1], prefix sums of the lengths.
            qo_indptr_cpu, kv_indptr_cpu: None, or copies of them.
            causal, sm_scale, window_left, ...: as in the paged wrapper's plan().
        """
        function = f"{type(self).__name__}.plan"
        check_encoding(function, pos_encoding_mode, rope_scale, rope_theta)
        refuse_given(function, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        refuse_given(function, prefix_len_ptr=prefix_len_ptr, max_item_len_ptr=max_item_len_ptr)
        refuse_given(function, token_pos_in_items_ptr=token_pos_in_items_ptr, seq_lens=seq_lens)
        refuse_given(function, seq_lens_q=seq_lens_q, v_indptr=v_indptr, o_indptr=o_indptr)
        require_default(function, "use_fp16_qk_reduction", use_fp16_qk_reduction, False)
        require_default(function, "token_pos_in_items_len", token_pos_in_items_len, 0)
        require_default(function, "use_token_head_sf", use_token_head_sf, False)
        check_heads(function, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk)
        q_dtype, kv_dtype = make_types(function, q_data_type, kv_data_type, o_data_type)
        require_flag(function, "causal", causal)
        starts = check_indptr(function, "qo_indptr", qo_indptr)
        keys = check_indptr(function, "kv_indptr", kv_indptr)
        if keys.numel() != starts.numel():
            raise invalid(function, "kv_indptr", f"{starts.numel()} entries", keys.numel())
        check_copy(function, "qo_indptr_cpu", qo_indptr_cpu, starts)
        check_copy(function, "kv_indptr_cpu", kv_indptr_cpu, keys)
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
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
        """Attention of q [tokens, Hq, D] to k [keys, Hkv, D] and v [keys, Hkv, Dv]: out, or (out, lse [tokens, Hq]).

        Args:
            o_scale: None or 1.
            out, lse, lse_base, lse_layout, sinks: as in the paged wrapper's run().
        """
        function = f"{type(self).__name__}.run"
        if self._plan is None:
            raise Error(f"[{function}]: call plan() first")
        if args:
            raise unsupported(function, "args", "no arguments of custom kernels", len(args))
        refuse_given(function, kv_cache_sf=kv_cache_sf)
        if scale_of(function, "o_scale", o_scale) != 1.0:
            raise unsupported(function, "o_scale", "None or 1", o_scale)
        require(function, "k", k, 3)
        require(function, "v", v, 3)
        options = Run(function, q_scale, k_scale, v_scale, out, lse, return_lse, None, sinks, lse_base, lse_layout)
        return attend(self._plan, q, k, v, options)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        require(function, "k", k, 3)
        require(function, "v", v, 3)
        result = attend(plan, q, k, v, Run(function, return_lse=return_lse))
        self._plan = plan
        return result

    forward_return_lse = partialmethod(forward, return_lse=True)

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
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Any:
    """Attention of q [Sq, Hq, D] to k and v [Sk, Hkv, D] (NHD) or [Hkv, Sk, D] (HND): out, or (out, lse [Sq, Hq]).

    `scale_k` and `k_scale` both multiply the keys, `scale_v` and `v_scale` the values, as in FlashInfer.
    """
    function = "single_prefill_with_kv_cache"
    refuse_given(function, kv_cache_sf=kv_cache_sf)
    of_k = scale_of(function, "scale_k", scale_k) * scale_of(function, "k_scale", k_scale)
    of_v = scale_of(function, "scale_v", scale_v) * scale_of(function, "v_scale", v_scale)
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
        return wrapper.run(q, k, v, q_scale=scale_q, k_scale=of_k, v_scale=of_v, return_lse=return_lse)
