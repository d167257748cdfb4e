# SPDX-License-Identifier: Apache-2.0
"""int8 caches, and attention that multiplies int8 queries and keys as integers.

Level 1 has int8 values with given scales a (head, element), level 2 values of 16 bits. A code c stands for c * scale.
"""

from __future__ import annotations

from .. import _native
from .._tensors import OUT_TYPES, Tensor, dtype_name, empty, is_torch, require, require_choice, require_flag, view_as
from ..errors import InvalidArgument, InvalidType


def reshape_and_cache_flash_int8(
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Copies T new rows of codes into a cache of level 1, each key's scale beside it.

    Args:
        key: int8 [T', Hkv, D], T' >= T.
        value: int8 [T', Hkv, Dv].
        k_scale: float32 [T', Hkv], any strides.
        key_cache: int8 [num_blocks, Hkv, block_size, D].
        value_cache: int8 [num_blocks, Hkv, block_size, Dv].
        key_scale_cache: float32 [num_blocks, Hkv, block_size].
        slot_mapping: int64 [T], block * block_size + offset of each row; negative = skip that row.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.reshape_and_cache_flash_int8(
        key=key,
        value=value,
        k_scale=k_scale,
        key_cache=key_cache,
        value_cache=value_cache,
        key_scale_cache=key_scale_cache,
        slot_mapping=slot_mapping,
        executor=executor,
    )


def reshape_and_cache_flash_mix(
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Copies T new rows into a cache of level 2.

    Args:
        value: float16 or bfloat16 [T', Hkv, Dv].
        value_cache: type of value, [num_blocks, Hkv, block_size, Dv].
        key, k_scale, ... : as in reshape_and_cache_flash_int8().

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.reshape_and_cache_flash_mix(
        key=key,
        value=value,
        k_scale=k_scale,
        key_cache=key_cache,
        value_cache=value_cache,
        key_scale_cache=key_scale_cache,
        slot_mapping=slot_mapping,
        executor=executor,
    )


def reshape_and_cache_int8_per_token_head(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale_cache: Tensor,
    value_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Quantises T new rows while it writes them, with a scale a (token, KV head): max(amax / 127, 1e-6).

    flash_attn_varlen() reads such a cache: the scale caches are its `k_token_scale` and `v_token_scale`. A row with an
    infinity or NaN gets the scale NaN and codes 0.

    Args:
        key: [T', Hkv, D] of float32, float16 or bfloat16, T' >= T.
        value: [T', Hkv, Dv], type of key.
        key_cache: int8 [num_blocks, block_size, Hkv, D].
        value_cache: int8 [num_blocks, block_size, Hkv, Dv].
        key_scale_cache, value_scale_cache: float32 [num_blocks, block_size, Hkv].
        slot_mapping: int64 [T], block * block_size + offset of each row; negative = skip that row.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.reshape_and_cache_int8_per_token_head(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        key_scale_cache=key_scale_cache,
        value_scale_cache=value_scale_cache,
        slot_mapping=slot_mapping,
        executor=executor,
    )


def flash_attn_varlen_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "float32",
    lse: Tensor | None = None,
    return_lse: bool = False,
    isa: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ragged int8 queries over a paged cache of int8 keys.

    Args:
        q: int8 [T, Hq, D].
        q_scale: float32 [Hq, T].
        k: int8 [num_blocks, Hkv, block_size, D], block_size 1, 4, 8 or a multiple of 16.
        k_scale: float32 [num_blocks, Hkv, block_size].
        v: [num_blocks, Hkv, block_size, Dv]: int8 (level 1), float16 or bfloat16 (level 2).
        query_start_loc: int32 [B + 1], prefix sum of the query lengths.
        seq_lens: int32 [B], keys per request.
        block_table: int32 [B, max_blocks].
        v_scale: float32 [Hkv, Dv], > 0, of int8 values; None for others.
        k_mean: float32 [B, Hkv, D], what was subtracted from the keys before they were quantised; None = nothing.
        out: float32, float16 or bfloat16 [T, Hq, Dv] to write to; None = a new tensor of `out_dtype`.
        out_dtype: "float32", "float16" or "bfloat16"; not read if `out` is given.
        lse: float32 [T, Hq] to write to.
        return_lse: give (out, lse), natural logarithm.
        scale, causal, ... : as in flash_attn_varlen().

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("flash_attn_varlen_int8", "q", q, 3)
    require_flag("flash_attn_varlen_int8", "return_lse", return_lse)
    require("flash_attn_varlen_int8", "v", v, 4)
    if out is None:
        out = _new_out("flash_attn_varlen_int8", q, v, out_dtype)
    if lse is None and return_lse:
        lse = empty(q, q.shape[:2], "float32")
    _native.flash_attn_varlen_int8(
        q=q,
        q_scale=q_scale,
        k=k,
        k_scale=k_scale,
        v=v,
        v_scale=v_scale,
        k_mean=k_mean,
        out=out,
        lse=lse,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
        isa=isa,
        executor=executor,
    )
    return (out, lse) if return_lse else out


def paged_attention_int8(
    q: Tensor,
    q_scale: Tensor,
    key_cache: Tensor,
    key_scale_cache: Tensor,
    value_cache: Tensor,
    v_scale: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    k_mean: Tensor | None = None,
    save_key: Tensor | None = None,
    save_value: Tensor | None = None,
    save_key_scale: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "float32",
    lse: Tensor | None = None,
    return_lse: bool = False,
    isa: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decodes over a cache of level 1, after saving the new rows, if they are given.

    The same bits as reshape_and_cache_flash_int8() and then flash_attn_varlen_int8().

    Args:
        q: int8 [T, Hq, D].
        q_scale: float32 [T, Hq].
        key_cache: int8 [num_blocks, Hkv, block_size, D]; written with `save_key`.
        key_scale_cache: float32 [num_blocks, Hkv, block_size]; likewise.
        value_cache: int8 [num_blocks, Hkv, block_size, Dv]; likewise.
        v_scale: float32 [Hkv, Dv], > 0.
        query_start_loc: int32 [B + 1], prefix sum of the query lengths.
        seq_lens: int32 [B], keys per request, saved ones included.
        block_table: int32 [B, max_blocks].
        k_mean: as in flash_attn_varlen_int8().
        save_key, save_value, save_key_scale: int8 [T, Hkv, D], int8 [T, Hkv, Dv], float32 [T, Hkv], written first: row
            i of request r to position seq_len - query_len + i. All three or none.
        out, out_dtype, lse, return_lse: as in flash_attn_varlen_int8().
        scale, causal, ... : as in flash_attn_varlen().

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("paged_attention_int8", "q", q, 3)
    require_flag("paged_attention_int8", "return_lse", return_lse)
    require("paged_attention_int8", "value_cache", value_cache, 4)
    if out is None:
        out = _new_out("paged_attention_int8", q, value_cache, out_dtype)
    if lse is None and return_lse:
        lse = empty(q, q.shape[:2], "float32")
    _native.paged_attention_int8(
        q=q,
        q_scale=q_scale,
        key_cache=key_cache,
        key_scale_cache=key_scale_cache,
        value_cache=value_cache,
        v_scale=v_scale,
        k_mean=k_mean,
        out=out,
        lse=lse,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        save_key=save_key,
        save_value=save_value,
        save_key_scale=save_key_scale,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
        isa=isa,
        executor=executor,
    )
    return (out, lse) if return_lse else out


def paged_attention_mix(
    q: Tensor,
    q_scale: Tensor,
    key_cache: Tensor,
    key_scale_cache: Tensor,
    value_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    k_mean: Tensor | None = None,
    save_key: Tensor | None = None,
    save_value: Tensor | None = None,
    save_key_scale: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out: Tensor | None = None,
    out_dtype: str | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    isa: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decodes over a cache of level 2: paged_attention_int8() with values of 16 bits.

    Args:
        value_cache: float16 or bfloat16 [num_blocks, Hkv, block_size, Dv]; written with `save_value`.
        save_value: its type, [T, Hkv, Dv].
        out_dtype: type of a new `out`; None = that of the values.
        q, q_scale, ... : as in paged_attention_int8().

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("paged_attention_mix", "q", q, 3)
    require_flag("paged_attention_mix", "return_lse", return_lse)
    require("paged_attention_mix", "value_cache", value_cache, 4)
    if out is None and out_dtype is None:
        out = empty(value_cache, (*q.shape[:2], value_cache.shape[3]))
    elif out is None:
        out = _new_out("paged_attention_mix", q, value_cache, out_dtype)
    if lse is None and return_lse:
        lse = empty(q, q.shape[:2], "float32")
    _native.paged_attention_mix(
        q=q,
        q_scale=q_scale,
        key_cache=key_cache,
        key_scale_cache=key_scale_cache,
        value_cache=value_cache,
        k_mean=k_mean,
        out=out,
        lse=lse,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        save_key=save_key,
        save_value=save_value,
        save_key_scale=save_key_scale,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
        isa=isa,
        executor=executor,
    )
    return (out, lse) if return_lse else out


def int8_mixed_cache_shape(num_blocks: int, num_kv_heads: int, block_size: int, head_size: int) -> tuple[int, ...]:
    """[3, num_blocks, num_kv_heads, block_size, head_size], the one int8 tensor that a cache of level 2 is.

    Raises:
        InvalidArgument: sizes out of range.
    """
    return _native.int8_mixed_cache_shape(
        num_blocks=num_blocks, num_kv_heads=num_kv_heads, block_size=block_size, head_size=head_size
    )


def int8_mixed_key_view(cache: Tensor) -> Tensor:
    """The keys in the one tensor that a cache of level 2 is.

    Args:
        cache: int8 [3, num_blocks, Hkv, block_size, D], contiguous, of torch or numpy.

    Returns:
        A view: int8 [num_blocks, Hkv, block_size, D].

    Raises:
        InvalidArgument, InvalidType.
    """
    _require_mixed("int8_mixed_key_view", cache)
    return cache[0]


def int8_mixed_value_view(cache: Tensor, dtype: str) -> Tensor:
    """The values in the one tensor that a cache of level 2 is: planes 1 and 2 together, read as numbers of 16 bits.

    Values of block b do not lie at index b of the planes. Move blocks through both views:
    copy_blocks([keys, values], moves).

    Args:
        cache: int8 [3, num_blocks, Hkv, block_size, D], contiguous, of torch or numpy.
        dtype: "float16" or "bfloat16".

    Returns:
        A view: [num_blocks, Hkv, block_size, D] of that type.

    Raises:
        InvalidArgument, InvalidType.
    """
    _require_mixed("int8_mixed_value_view", cache)
    require_choice("int8_mixed_value_view", "dtype", dtype, ("float16", "bfloat16"))
    shape = tuple(cache.shape[1:])
    return view_as(cache[1:].reshape(-1), dtype).reshape(shape)


def _require_mixed(function: str, cache: Tensor) -> None:
    require(function, "cache", cache, 5)
    if is_torch(cache):
        contiguous = cache.is_contiguous()
    elif hasattr(cache, "flags"):
        contiguous = cache.flags.c_contiguous
    else:
        raise InvalidType(
            f"[{function}] argument 'cache': expected a tensor of torch or numpy, got {type(cache).__name__}",
            function,
            "cache",
        )
    if dtype_name(cache) != "int8" or cache.shape[0] != 3 or not contiguous:
        got = f"{dtype_name(cache)} {list(cache.shape)}{'' if contiguous else ', not contiguous'}"
        raise InvalidArgument(
            f"[{function}] argument 'cache': expected int8 [3, num_blocks, Hkv, block_size, D], contiguous, got {got}",
            function,
            "cache",
        )


def _new_out(function: str, q: Tensor, v: Tensor, dtype: str) -> Tensor:
    """An output [T, Hq, Dv] of that type."""
    require_choice(function, "out_dtype", dtype, OUT_TYPES)
    return empty(q, (*q.shape[:2], v.shape[3]), dtype)
