# SPDX-License-Identifier: Apache-2.0
"""Merging of partial results, and attention to shared prefixes level by level."""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import ops
from ..._tensors import require, require_flag, require_integer
from ...errors import InvalidType
from .._flash import invalid, refuse_given
from .._renames import renamed
from .common import Pages
from .prefill import BatchPrefillWithPagedKVCacheWrapper

_LN2 = math.log(2.0)


def _natural(function: str, argument: str, s: Any) -> torch.Tensor:
    require(function, argument, s, 2)
    if not isinstance(s, torch.Tensor) or s.dtype != torch.float32:
        raise invalid(function, argument, "a float32 tensor of torch", getattr(s, "dtype", type(s).__name__))
    return s * _LN2


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges two partial results v [n, H, D] over disjoint keys by their LSEs s [n, H] in base 2."""
    function = "merge_state"
    names = {"prefix_out": "v_a", "prefix_lse": "s_a", "suffix_out": "v_b", "suffix_lse": "s_b"}
    require(function, "v_b", v_b, 3)
    with renamed(function, names):
        out, lse = ops.merge_attn_states(
            v_a, _natural(function, "s_a", s_a), v_b, _natural(function, "s_b", s_b), return_lse=True
        )
    return out, lse / _LN2


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """merge_state() into v and s; with `mask`, bool [n], only the rows where it is true."""
    function = "merge_state_in_place"
    require(function, "v", v, 3)
    names = {"prefix_out": "v", "prefix_lse": "s", "suffix_out": "v_other", "suffix_lse": "s_other"}
    with renamed(function, names):
        out, lse = ops.merge_attn_states(
            v, _natural(function, "s", s), v_other, _natural(function, "s_other", s_other), return_lse=True
        )
    if mask is None:
        v.copy_(out)
        s.copy_(lse / _LN2)
        return
    require(function, "mask", mask, 1)
    if mask.dtype != torch.bool or mask.shape[0] != v.shape[0]:
        raise invalid(function, "mask", f"bool [{v.shape[0]}]", f"{mask.dtype} {tuple(mask.shape)}")
    v[mask] = out[mask]
    s[mask] = lse[mask] / _LN2


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges partial results v [n, states, H, D] with LSEs s [n, states, H] in base 2, in ascending order."""
    function = "merge_states"
    require(function, "v", v, 4)
    require(function, "s", s, 3)
    if tuple(s.shape) != tuple(v.shape[:3]) or v.shape[1] < 1:
        raise invalid(function, "s", f"{tuple(v.shape[:3])} with at least one state", tuple(s.shape))
    # In float32, so that 16-bit results are rounded once.
    out, lse = v[:, 0].to(torch.float32, copy=True), s[:, 0].clone()
    for state in range(1, v.shape[1]):
        merge_state_in_place(out, lse, v[:, state].float(), s[:, state])
    return out.to(v.dtype), lse


class MultiLevelCascadeAttentionWrapper:
    """Attention to prefixes that groups of requests share, level by level: the first levels are shared by most."""

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Any = None,
        paged_kv_indptr_buf_arr: Any = None,
        paged_kv_indices_buf_arr: Any = None,
        paged_kv_last_page_len_buf_arr: Any = None,
        backend: str = "auto",
    ) -> None:
        """`float_workspace_buffer` is not needed: attend has memory of its own."""
        function = type(self).__name__
        require_integer(function, "num_levels", num_levels, 1)
        refuse_given(
            function,
            qo_indptr_buf_arr=qo_indptr_buf_arr,
            paged_kv_indptr_buf_arr=paged_kv_indptr_buf_arr,
            paged_kv_indices_buf_arr=paged_kv_indices_buf_arr,
            paged_kv_last_page_len_buf_arr=paged_kv_last_page_len_buf_arr,
        )
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph, backend=backend)
            for _ in range(num_levels)
        ]

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Fixes the batch: one tensor a level in each list; qo_indptr of a level cuts the same tokens into its groups.

        `causal` is for the last level, which has the new keys. Windows must be -1: positions of one level know
        nothing of the others.
        """
        function = f"{type(self).__name__}.plan"
        require_flag(function, "causal", causal)
        if window_left != -1:
            raise invalid(function, "window_left", "-1", window_left)
        arrays = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for name, array in arrays.items():
            if not isinstance(array, (list, tuple)):
                text = f"[{function}] argument '{name}': expected a list of tensors, got {type(array).__name__}"
                raise InvalidType(text, function, name)
            if len(array) != len(self._levels):
                raise invalid(function, name, f"{len(self._levels)} levels", len(array))
        for level, (wrapper, tensors) in enumerate(zip(self._levels, zip(*arrays.values()))):
            wrapper.plan(
                *tensors,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and level == len(self._levels) - 1,
                pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
            )

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: Pages) -> torch.Tensor:
        """Attention of q [tokens, num_qo_heads, head_dim] to the keys of all levels."""
        results, lses = zip(*(level.run(q, paged_kv_cache, return_lse=True) for level in self._levels))
        return merge_states(torch.stack(results, 1), torch.stack(lses, 1))[0]

    forward = run

    def end_forward(self) -> None:
        """Does nothing: there is no state on a device to release."""
