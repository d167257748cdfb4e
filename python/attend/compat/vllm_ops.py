# SPDX-License-Identifier: Apache-2.0
"""vLLM's _custom_ops about caches, merging, quantisation and the indexer, and the int8 functions of its forks.

Argument orders, defaults and layouts are theirs. LSEs are natural logarithms, [H, T], unless a function is named
after base 2; plus infinity means "no keys", as minus infinity does. Caches of fp8 may be uint8: `kv_cache_dtype` says
which codes they are. Arguments that only help a GPU to choose its launch, the lengths of the longest request, are not
needed: the tensors say them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import ops
from .._tensors import Tensor, is_torch, require_tensor
from ..errors import InvalidArgument, InvalidType
from ._renames import renamed
from ._vllm_cache import convert_fp8, reshape_and_cache, swap_blocks_batch
from ._vllm_common import cache_as, refuse, transposed, unsupported
from ._vllm_cpu import cpu_attention_with_kv_cache, cpu_attn_get_scheduler_metadata, cpu_attn_reshape_and_cache
from ._vllm_int8 import (
    flash_attn_varlen_int8_func,
    reshape_and_cache_flash_int8,
    reshape_and_cache_flash_mix,
    scaled_int8_quant_for_attn,
    vllm_paged_attention_int8,
    vllm_paged_attention_mix,
)
from ._vllm_mla import (
    concat_and_cache_mla,
    concat_and_cache_mla_rope_fused,
    cp_gather_and_upconvert_fp8_kv_cache,
    cp_gather_cache,
    cp_gather_indexer_k_quant_cache,
    gather_and_maybe_dequant_cache,
    indexer_k_quant_and_cache,
    mla_decode_kvcache_cpu,
    top_k_per_row_decode,
    top_k_per_row_prefill,
)
from ._vllm_ragged import merge_attn_states_base2, pack_seq_triton, unpack_seq_triton

__all__ = [
    "concat_and_cache_mla",
    "concat_and_cache_mla_rope_fused",
    "convert_fp8",
    "copy_blocks",
    "copy_blocks_mla",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "cpu_attention_with_kv_cache",
    "cpu_attn_get_scheduler_metadata",
    "cpu_attn_reshape_and_cache",
    "flash_attn_varlen_int8_func",
    "gather_and_maybe_dequant_cache",
    "indexer_k_quant_and_cache",
    "merge_attn_states",
    "merge_attn_states_base2",
    "mla_decode_kvcache_cpu",
    "pack_seq_triton",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_int8",
    "reshape_and_cache_flash_mix",
    "scaled_int8_quant_for_attn",
    "swap_blocks",
    "swap_blocks_batch",
    "top_k_per_row_decode",
    "top_k_per_row_prefill",
    "unpack_seq_triton",
    "vllm_paged_attention_int8",
    "vllm_paged_attention_mix",
]


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Writes new rows into a paged cache.

    Args:
        key: [T', Hkv, D]; T' may exceed the length of slot_mapping.
        value: [T', Hkv, Dv].
        key_cache: [num_blocks, block_size, Hkv, D], views of caches with heads before tokens too.
        value_cache: likewise with Dv.
        slot_mapping: int64 [T]; negative = skip that row.
        kv_cache_dtype: "auto", the type of the rows or its name: rows are copied; "fp8", "fp8_e4m3", "fp8_e5m2": codes
            of x / scale, in a cache of that type or of uint8.
        k_scale, v_scale: float32 of 1 element or [Hkv], read for fp8 only.

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    key_cache = cache_as("reshape_and_cache_flash", "key_cache", key_cache, kv_cache_dtype)
    value_cache = cache_as("reshape_and_cache_flash", "value_cache", value_cache, kv_cache_dtype)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    """Merges two partial results into `output` by their LSE. A row that neither side has keys for is 0.

    Args:
        output: [T, H, D], written; may be one of the inputs.
        prefix_output, suffix_output: [T, H, D], type of output.
        prefix_lse, suffix_lse: float32 [H, T], natural logarithm.
        output_lse: float32 [H, T], written; None = not wanted.
        prefill_tokens_with_context: tokens from this one on take the suffix as it is; None = all have a prefix.
        output_scale: None; there is no fp8 output.

    Raises:
        InvalidArgument, InvalidType, Unsupported (output_scale): before anything is written.
    """
    function = "merge_attn_states"
    if output_scale is not None:
        unsupported(function, "output_scale", "None, as there is no fp8 output", "a tensor")
    require_tensor(function, "output", output)
    names = {"out": "output", "lse": "output_lse", "prefix_out": "prefix_output", "suffix_out": "suffix_output"}
    tokens = -1 if prefill_tokens_with_context is None else prefill_tokens_with_context
    with renamed(function, names):
        ops.merge_attn_states(
            prefix_output,
            transposed(function, "prefix_lse", prefix_lse),
            suffix_output,
            transposed(function, "suffix_lse", suffix_lse),
            prefill_tokens_with_context=tokens,
            out=output,
            lse=None if output_lse is None else transposed(function, "output_lse", output_lse),
        )


def swap_blocks(
    src: Tensor, dst: Tensor, block_size_in_bytes: int | Tensor, block_mapping: Tensor | None = None
) -> None:
    """Copies blocks from one cache to another, both on the CPU.

    Older releases have no third argument: swap_blocks(src, dst, block_mapping) works as well.

    Args:
        src: the cache that is read; its first dimension counts blocks.
        dst: the cache that is written.
        block_size_in_bytes: bytes of a block of src.
        block_mapping: int64 [n, 2], (block of src, block of dst).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "swap_blocks"
    with renamed(function, {"moves": "block_mapping"}):
        if block_mapping is None:
            ops.swap_blocks(src, dst, _mapping(function, block_size_in_bytes))
            return
        if isinstance(block_size_in_bytes, bool) or not isinstance(block_size_in_bytes, int):
            refuse(InvalidType, function, "block_size_in_bytes", "an integer", type(block_size_in_bytes).__name__)
        block_bytes = _block_bytes(function, src)
        if block_size_in_bytes != block_bytes:
            refuse(
                InvalidArgument,
                function,
                "block_size_in_bytes",
                f"{block_bytes}, the bytes of a block of src",
                block_size_in_bytes,
            )
        ops.swap_blocks(src, dst, _mapping(function, block_mapping))


def copy_blocks(key_caches: Sequence[Tensor], value_caches: Sequence[Tensor], block_mapping: Tensor) -> None:
    """Copies blocks inside the caches of all layers.

    Args:
        key_caches, value_caches: a cache for each layer; the first dimension counts blocks.
        block_mapping: int64 [n, 2], (from, to), done in order.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "copy_blocks"
    for name, caches in (("key_caches", key_caches), ("value_caches", value_caches)):
        if not isinstance(caches, (list, tuple)):
            refuse(InvalidType, function, name, "a list of tensors", type(caches).__name__)
    if len(key_caches) != len(value_caches):
        refuse(InvalidArgument, function, "value_caches", f"{len(key_caches)}, one a layer", len(value_caches))
    with renamed(function, {"moves": "block_mapping", "caches": "key_caches"}):
        ops.copy_blocks([*key_caches, *value_caches], _mapping(function, block_mapping))


def copy_blocks_mla(kv_caches: Sequence[Tensor], block_mapping: Tensor) -> None:
    """Copies blocks inside the caches of all layers that have one cache.

    Args:
        kv_caches: a cache for each layer; the first dimension counts blocks.
        block_mapping: int64 [n, 2], (from, to), done in order.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "copy_blocks_mla"
    with renamed(function, {"moves": "block_mapping", "caches": "kv_caches"}):
        ops.copy_blocks(kv_caches, _mapping(function, block_mapping))


def _mapping(function: str, mapping: Any) -> Tensor:
    if not hasattr(mapping, "shape"):
        refuse(InvalidType, function, "block_mapping", "int64 [n, 2]", type(mapping).__name__)
    return mapping


def _block_bytes(function: str, cache: Tensor) -> int:
    if len(getattr(cache, "shape", ())) == 0:
        refuse(InvalidType, function, "src", "a tensor of blocks", type(cache).__name__)
    count = 1
    for size in cache.shape[1:]:
        count *= size
    return count * (cache.element_size() if is_torch(cache) else cache.dtype.itemsize)
