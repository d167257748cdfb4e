# SPDX-License-Identifier: Apache-2.0
"""vllm_ops: the int8 functions of vLLM's forks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import ops
from .._tensors import Tensor, dtype_name, require_flag, require_tensor
from ..errors import InvalidArgument, InvalidType
from ._renames import renamed
from ._vllm_common import query_start_loc, refuse, unsupported

_PAGED_NAMES = {
    "out": "output",
    "q": "query",
    "q_scale": "query_scale",
    "block_table": "block_tables",
    "seq_lens": "context_lens",
    "query_start_loc": "cu_query_lens",
    "alibi_sqrt": "use_sqrt_alibi",
}


def scaled_int8_quant_for_attn(
    x: Tensor, mode: int, transpose_scale: bool = False, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises queries, keys or values to int8.

    Args:
        x: [T, H, D].
        mode: 2 = a scale for each (token, head), for queries and keys; 0 = for each (head, element), for values.
        transpose_scale: mode 2: scales are [H, T] instead of [T, H].
        scale: mode 0: float32 [H, D] to use; None = computed from x.

    Returns:
        (codes, scales); `scale` itself if it is given.

    Raises:
        InvalidArgument, InvalidType.
    """
    function = "scaled_int8_quant_for_attn"
    modes = {0: "per_channel", 2: "per_token_head"}
    if isinstance(mode, bool) or not isinstance(mode, int) or mode not in modes:
        refuse(InvalidArgument, function, "mode", "2 or 0", mode)
    require_flag(function, "transpose_scale", transpose_scale)
    with renamed(function, {"input": "x", "static_scale": "scale"}):
        return ops.scaled_int8_quant_for_attn(x, modes[mode], transpose_scale=transpose_scale, static_scale=scale)


def reshape_and_cache_flash_int8(
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "",
) -> None:
    """attend.ops.reshape_and_cache_flash_int8(). `kv_cache_dtype` has to be empty, a space or "int8".

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    _require_int8("reshape_and_cache_flash_int8", kv_cache_dtype)
    ops.reshape_and_cache_flash_int8(key, value, k_scale, key_cache, value_cache, key_scale_cache, slot_mapping)


def reshape_and_cache_flash_mix(
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "",
) -> None:
    """attend.ops.reshape_and_cache_flash_mix(). `kv_cache_dtype` has to be empty, a space or "int8".

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    _require_int8("reshape_and_cache_flash_mix", kv_cache_dtype)
    ops.reshape_and_cache_flash_mix(key, value, k_scale, key_cache, value_cache, key_scale_cache, slot_mapping)


def vllm_paged_attention_int8(
    output: Tensor,
    query: Tensor,
    query_scale: Tensor,
    key_cache: Tensor,
    key_scale_cache: Tensor,
    value_cache: Tensor,
    value_scale_cache: Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: Tensor,
    context_lens: Tensor,
    block_size: int,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    use_sqrt_alibi: bool = False,
    use_cuda_graph: bool = False,
    max_context_len: int | None = None,
    cu_query_lens: Tensor | None = None,
    max_query_len: int | None = None,
    save_key: Tensor | None = None,
    save_value: Tensor | None = None,
    save_key_scale: Tensor | None = None,
) -> None:
    """Decodes over a cache of level 1 into `output`, after saving the new rows, if they are given.

    Args:
        output: [T, Hq, D] of float32, float16 or bfloat16, written.
        query: int8 [T, Hq, D].
        query_scale: float32 [T, Hq].
        key_cache, value_cache: int8 [num_blocks, Hkv, block_size, D].
        key_scale_cache: float32 [num_blocks, Hkv, block_size].
        value_scale_cache: float32 [Hkv, D].
        num_kv_heads, block_size: those of key_cache.
        scale: multiplies q.k.
        block_tables: int32 [B, max_blocks].
        context_lens: int32 [B], keys per request, saved ones included.
        cu_query_lens: int32 [B + 1], prefix sum of the query lengths; None = one token a request.
        use_cuda_graph, max_context_len, max_query_len: not needed.
        save_key, save_value, save_key_scale: int8 [T, Hkv, D], int8 [T, Hkv, D], float32 [T, Hkv]; all or none.
        softcap, alibi_slopes, ... : as in attend.ops.flash_attn_varlen().

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "vllm_paged_attention_int8"
    require_tensor(function, "output", output)
    _require_cache_sizes(function, key_cache, num_kv_heads, block_size)
    starts = query_start_loc(function, "context_lens", context_lens) if cu_query_lens is None else cu_query_lens
    with renamed(function, {**_PAGED_NAMES, "v_scale": "value_scale_cache"}):
        ops.paged_attention_int8(
            query,
            query_scale,
            key_cache,
            key_scale_cache,
            value_cache,
            value_scale_cache,
            starts,
            context_lens,
            block_tables,
            save_key=save_key,
            save_value=save_value,
            save_key_scale=save_key_scale,
            scale=scale,
            causal=causal,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            alibi_sqrt=use_sqrt_alibi,
            out=output,
        )


def vllm_paged_attention_mix(
    output: Tensor,
    query: Tensor,
    query_scale: Tensor,
    key_cache: Tensor,
    key_scale_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: Tensor,
    context_lens: Tensor,
    block_size: int,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    use_sqrt_alibi: bool = False,
    use_cuda_graph: bool = False,
    max_context_len: int | None = None,
    cu_query_lens: Tensor | None = None,
    max_query_len: int | None = None,
    save_key: Tensor | None = None,
    save_value: Tensor | None = None,
    save_key_scale: Tensor | None = None,
) -> None:
    """Decodes over a cache of level 2: vllm_paged_attention_int8() with float16 or bfloat16 values.

    Args:
        value_cache: float16 or bfloat16 [num_blocks, Hkv, block_size, D].
        save_value: its type, [T, Hkv, D].
        output, query, ... : as there.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "vllm_paged_attention_mix"
    require_tensor(function, "output", output)
    _require_cache_sizes(function, key_cache, num_kv_heads, block_size)
    starts = query_start_loc(function, "context_lens", context_lens) if cu_query_lens is None else cu_query_lens
    with renamed(function, _PAGED_NAMES):
        ops.paged_attention_mix(
            query,
            query_scale,
            key_cache,
            key_scale_cache,
            value_cache,
            starts,
            context_lens,
            block_tables,
            save_key=save_key,
            save_value=save_value,
            save_key_scale=save_key_scale,
            scale=scale,
            causal=causal,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            alibi_sqrt=use_sqrt_alibi,
            out=output,
        )


def flash_attn_varlen_int8_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sqrt_alibi: bool = False,
    out: Tensor | None = None,
    block_table: Tensor | None = None,
    output_dtype: Any = None,
) -> Tensor:
    """Prefill over a cache of int8 keys.

    Args:
        q: int8 [T, Hq, D].
        k: int8 [num_blocks, Hkv, block_size, D].
        v: int8, float16 or bfloat16 [num_blocks, Hkv, block_size, D].
        q_scale: float32 [Hq, T].
        k_scale: float32 [num_blocks, Hkv, block_size].
        v_scale: float32 [Hkv, D] of int8 values, else None.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], prefix sums of the query and key lengths.
        max_seqlen_q, max_seqlen_k: not needed.
        window_size: (left, right); -1 = all.
        out: [T, Hq, D] to write to; None = a new tensor.
        block_table: int32 [B, max_blocks], needed.
        output_dtype: torch's type or its name, of a new `out`, and that of one that is given; None = float32.
        softmax_scale, causal, ... : as in attend.ops.flash_attn_varlen().

    Returns:
        out.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "flash_attn_varlen_int8_func"
    if not isinstance(window_size, (list, tuple)) or len(window_size) != 2:
        refuse(InvalidArgument, function, "window_size", "(left, right)", window_size)
    dtype = None if output_dtype is None else str(output_dtype).rsplit(".", 1)[-1]
    if out is not None and dtype is not None and dtype_name(out) != dtype:
        refuse(InvalidArgument, function, "out", f"elements of output_dtype {dtype}", dtype_name(out))
    names = {
        "query_start_loc": "cu_seqlens_q",
        "seq_lens": "cu_seqlens_k",
        "scale": "softmax_scale",
        "window_left": "window_size",
        "window_right": "window_size",
        "alibi_sqrt": "sqrt_alibi",
        "out_dtype": "output_dtype",
    }
    with renamed(function, names):
        return ops.flash_attn_varlen_int8(
            q,
            q_scale,
            k,
            k_scale,
            v,
            cu_seqlens_q,
            _differences(function, "cu_seqlens_k", cu_seqlens_k),
            block_table,
            v_scale=v_scale,
            scale=softmax_scale,
            causal=causal,
            window_left=window_size[0],
            window_right=window_size[1],
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            alibi_sqrt=sqrt_alibi,
            out=out,
            out_dtype=dtype or "float32",
        )


def _require_int8(function: str, kv_cache_dtype: str) -> None:
    if not isinstance(kv_cache_dtype, str):
        refuse(InvalidType, function, "kv_cache_dtype", "a string", type(kv_cache_dtype).__name__)
    if kv_cache_dtype.strip() not in ("", "int8"):
        unsupported(function, "kv_cache_dtype", "an empty string or int8", kv_cache_dtype)


def _require_cache_sizes(function: str, key_cache: Tensor, num_kv_heads: int, block_size: int) -> None:
    shape = tuple(getattr(key_cache, "shape", ()))
    if len(shape) != 4:
        refuse(InvalidArgument, function, "key_cache", "[num_blocks, Hkv, block_size, D]", shape)
    for name, value, size in (("num_kv_heads", num_kv_heads, shape[1]), ("block_size", block_size, shape[2])):
        if not isinstance(value, int) or value != size:
            refuse(InvalidArgument, function, name, f"{size}, as key_cache has", value)


def _differences(function: str, argument: str, prefix_sum: Tensor) -> Tensor:
    """Lengths, of the type of their prefix sum."""
    shape = getattr(prefix_sum, "shape", ())
    if len(shape) != 1 or shape[0] == 0:
        refuse(InvalidArgument, function, argument, "int32 [B + 1]", tuple(shape))
    return prefix_sum[1:] - prefix_sum[:-1]
