# SPDX-License-Identifier: Apache-2.0
"""vllm_ops: what vLLM's back end CPU_ATTN calls. Caches are [num_blocks, Hkv, block_size, D], views included.

vLLM packs the elements of a block for the `isa`; here they lie as their shape says, so a cache belongs to one of the
two libraries: both its writer and its reader are of this module.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from .._tensors import Tensor, dtype_name, empty, require_choice, require_flag, require_integer, require_tensor
from ..errors import InvalidArgument, InvalidType
from ._renames import renamed
from ._vllm_common import FP8, cache_as, float32_of, refuse, require_dense, require_number, unsupported

_ISAS = ("amx", "vec", "vec16", "neon", "rvv", "vxe", "vsx")


def cpu_attn_get_scheduler_metadata(
    num_reqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    seq_lens: Tensor,
    dtype: Any,
    query_start_loc: Tensor,
    causal: bool,
    sliding_window_size: int,
    isa: str,
    enable_kv_split: bool,
    dynamic_causal: Tensor | None = None,
    kv_cache_dtype: str = "auto",
) -> Tensor:
    """What cpu_attention_with_kv_cache() takes as `scheduler_metadata`: nothing, as it plans for itself.

    Args:
        num_reqs, num_heads, num_kv_heads, head_dim: sizes of the batch.
        seq_lens: int32 [B], keys of each request.
        dtype, query_start_loc, causal, sliding_window_size, enable_kv_split, kv_cache_dtype: not needed.
        isa: "amx", "vec", "vec16", "neon", "rvv", "vxe" or "vsx"; it changes nothing.
        dynamic_causal: None; all requests of a batch are causal or none is.

    Returns:
        uint8 [0].

    Raises:
        InvalidArgument, InvalidType, Unsupported (dynamic_causal).
    """
    function = "cpu_attn_get_scheduler_metadata"
    sizes = {"num_reqs": num_reqs, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        require_integer(function, name, size, 0)
    require_dense(function, "seq_lens", seq_lens, 1)
    require_choice(function, "isa", isa, _ISAS)
    _require_static(function, dynamic_causal)
    return empty(seq_lens, (0,), "uint8")


def cpu_attn_reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    isa: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """Writes new rows into a paged cache with heads before tokens.

    Args:
        key: [T', Hkv, D]; T' may exceed the length of slot_mapping.
        value: [T', Hkv, D].
        key_cache, value_cache: [num_blocks, Hkv, block_size, D], with any strides but that of the last dimension.
        slot_mapping: int64 [T]; negative = skip that row.
        isa: as in cpu_attn_get_scheduler_metadata().
        k_scale, v_scale: > 0, read for fp8 only.
        kv_cache_dtype: as in reshape_and_cache_flash().

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written; also for a slot behind
            the cache.
    """
    function = "cpu_attn_reshape_and_cache"
    require_choice(function, "isa", isa, _ISAS)
    keys, values = _rows(function, key_cache, value_cache, kv_cache_dtype)
    scales = {}
    if kv_cache_dtype in FP8:
        scales["k_scale"] = float32_of(keys, (1,), require_number(function, "k_scale", k_scale))
        scales["v_scale"] = float32_of(keys, (1,), require_number(function, "v_scale", v_scale))
    with renamed(function, {}):
        ops.reshape_and_cache_flash(key, value, keys, values, slot_mapping, **scales)


def cpu_attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    sliding_window: int,
    block_table: Tensor,
    softcap: float,
    scheduler_metadata: Tensor | None,
    s_aux: Tensor | None,
    dynamic_causal: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """Attends to a paged cache that cpu_attn_reshape_and_cache() wrote, into `output`.

    Args:
        query: [T, Hq, D] of float32, float16 or bfloat16.
        key_cache, value_cache: as there.
        output: [T, Hq, D], written.
        query_start_loc: int32 [B + 1], prefix sum of the query lengths.
        seq_lens: int32 [B], keys of each request.
        scale: multiplies q.k.
        causal: a key is visible up to the query's position, which is counted from the end of the keys.
        alibi_slopes: float32 [Hq] or None.
        sliding_window: keys that a query sees with its own, on either side unless causal; -1 = all.
        block_table: int32 [B, max_blocks].
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        scheduler_metadata: not needed.
        s_aux: sinks, float32 or bfloat16 [Hq], or None.
        dynamic_causal: None, as in cpu_attn_get_scheduler_metadata().
        k_scale, v_scale, kv_cache_dtype: as in cpu_attn_reshape_and_cache().

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype, dynamic_causal): before anything is written.
    """
    function = "cpu_attention_with_kv_cache"
    require_tensor(function, "output", output)
    require_dense(function, "query", query, 3)
    require_dense(function, "seq_lens", seq_lens, 1)
    require_flag(function, "causal", causal)
    _require_static(function, dynamic_causal)
    require_integer(function, "sliding_window", sliding_window, -1)
    if sliding_window == 0:
        refuse(InvalidArgument, function, "sliding_window", "-1 or a number of keys > 0", 0)
    keys, values = _rows(function, key_cache, value_cache, kv_cache_dtype)
    descales = {}
    if kv_cache_dtype in FP8:
        shape = (seq_lens.shape[0], keys.shape[2])
        descales["k_descale"] = float32_of(keys, shape, require_number(function, "k_scale", k_scale))
        descales["v_descale"] = float32_of(keys, shape, require_number(function, "v_scale", v_scale))
    reach = sliding_window if sliding_window == -1 else sliding_window - 1
    names = {"q": "query", "k": "key_cache", "v": "value_cache", "out": "output", "sinks": "s_aux"}
    names.update(window_left="sliding_window", window_right="sliding_window")
    names.update(k_descale="k_scale", v_descale="v_scale")
    with renamed(function, names):
        ops.flash_attn_varlen(
            query,
            keys,
            values,
            query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            scale=scale,
            causal=causal,
            window_left=reach,
            window_right=-1 if causal else reach,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=None if s_aux is None else _sinks(function, s_aux),
            out=output,
            **descales,
        )


def _rows(function: str, key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str) -> tuple[Tensor, Tensor]:
    """The caches as [num_blocks, block_size, Hkv, D]."""
    views = []
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        require_dense(function, name, cache, 4)
        views.append(cache_as(function, name, cache, kv_cache_dtype).swapaxes(1, 2))
    return views[0], views[1]


def _sinks(function: str, sinks: Tensor) -> Tensor:
    """As float32; vLLM gives those of bfloat16 as they are."""
    require_dense(function, "s_aux", sinks, 1)
    if dtype_name(sinks) == "float32":
        return sinks
    if dtype_name(sinks) != "bfloat16":
        refuse(InvalidType, function, "s_aux", "float32 or bfloat16 [Hq]", sinks.dtype)
    result = empty(sinks, sinks.shape, "float32")
    result[...] = sinks
    return result


def _require_static(function: str, dynamic_causal: Any) -> None:
    if dynamic_causal is not None:
        unsupported(function, "dynamic_causal", "None, as a batch is causal or not", type(dynamic_causal).__name__)
