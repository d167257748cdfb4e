# SPDX-License-Identifier: Apache-2.0
"""The attention functions as operators of torch, torch.ops.attend.*, which torch.compile and torch.export trace.

They have fake kernels and no gradients: a tensor that requires grad is refused while grad mode is on. Threads are
torch's, unless attend.set_num_threads() has set a number. Results that were not asked for have no elements.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from .. import ops
from .masked import masked_attention

_PARAMS = (
    "float? scale=None, bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None"
)


_library = torch.library.Library("attend", "DEF")


def _define(name: str, schema: str, kernel: Callable, fake: Callable) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"attend::{name}", fake, lib=_library)


def _lse(q: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
    return torch.empty(shape if wanted else (0,), dtype=torch.float32, device=q.device)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    *,
    cu_seqlens_kv: Tensor | None = None,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    **params: Any,
):
    lse = _lse(q, q.shape[:2], return_lse)
    out = ops.flash_attn_varlen(
        q,
        k,
        v,
        query_start_loc,
        cu_seqlens_kv=cu_seqlens_kv,
        seq_lens=seq_lens,
        block_table=block_table,
        lse=lse if return_lse else None,
        **params,
    )
    return out, lse


def _varlen_fake(q: Tensor, k: Tensor, v: Tensor, query_start_loc: Tensor, *, return_lse: bool = False, **params: Any):
    return q.new_empty((*q.shape[:2], v.shape[-1])), _lse(q, q.shape[:2], return_lse)


def _kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_lse: bool = False, **params: Any):
    lse = _lse(q, (q.shape[0], q.shape[2], q.shape[1]), return_lse)
    out = ops.flash_attn_with_kvcache(q, k_cache, v_cache, lse=lse if return_lse else None, **params)
    return out, lse


def _kvcache_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_lse: bool = False, **params: Any):
    lse = _lse(q, (q.shape[0], q.shape[2], q.shape[1]), return_lse)
    return q.new_empty((*q.shape[:3], v_cache.shape[3])), lse


def _merge(prefix_out: Tensor, prefix_lse: Tensor, suffix_out: Tensor, suffix_lse: Tensor):
    return ops.merge_attn_states(prefix_out, prefix_lse, suffix_out, suffix_lse, return_lse=True)


def _merge_fake(prefix_out: Tensor, prefix_lse: Tensor, suffix_out: Tensor, suffix_lse: Tensor):
    return suffix_out.new_empty(suffix_out.shape), suffix_lse.new_empty(suffix_lse.shape)


def _write_cache_fake(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *args: Any, **params: Any):
    return None


def _masked_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **params: Any):
    return q.new_empty((*q.shape[:3], v.shape[3]))


_define(
    "flash_attn_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor query_start_loc, *, Tensor? cu_seqlens_kv=None, Tensor? seq_lens=None, "
    f"Tensor? block_table=None, {_PARAMS}, bool return_lse=False) -> (Tensor, Tensor)",
    _varlen,
    _varlen_fake,
)
_define(
    "flash_attn_with_kvcache",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor? k_new=None, Tensor? v_new=None, "
    "Tensor? cache_seqlens=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, Tensor? block_table=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool rotary_interleaved=True, "
    f"{_PARAMS}, bool return_lse=False) -> (Tensor, Tensor)",
    _kvcache,
    _kvcache_fake,
)
_define(
    "merge_attn_states",
    "(Tensor prefix_out, Tensor prefix_lse, Tensor suffix_out, Tensor suffix_lse) -> (Tensor, Tensor)",
    _merge,
    _merge_fake,
)
_define(
    "reshape_and_cache_flash",
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, *, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    ops.reshape_and_cache_flash,
    _write_cache_fake,
)
_define(
    "masked_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, Tensor? indices=None, bool causal=False, "
    "int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    masked_attention,
    _masked_fake,
)
