# SPDX-License-Identifier: Apache-2.0
"""The library's functions, one for one: attention, caches, quantisation, MLA, sparse and differential attention.

Tensors are read and written in place, whatever their strides. Results are new tensors of the framework of the
inputs unless `out` is given. Functions that run on several threads take `executor`, an attend.ThreadPool, and those
that choose kernels `isa` ("avx2", ...) and `arithmetic` ("automatic", "exact" or "fast").
"""

from .attention import flash_attn_varlen, flash_attn_with_kvcache, merge_attn_states
from .cache import copy_blocks, reshape_and_cache_flash, swap_blocks
from .differential import (
    differential_attention,
    differential_cache_shape,
    differential_combine,
    differential_lambda,
    differential_lambda_init,
    differential_reshape_and_cache,
    differential_stride_order,
)
from .flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata, mla_num_sm_parts
from .indexer import (
    cp_gather_indexer_k_quant_cache,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_paged_mqa_logits_metadata,
    indexer_k_quant_and_cache,
    indexer_short_rows,
    prepare_indexer,
)
from .int8 import (
    flash_attn_varlen_int8,
    int8_mixed_cache_shape,
    int8_mixed_key_view,
    int8_mixed_value_view,
    paged_attention_int8,
    paged_attention_mix,
    reshape_and_cache_flash_int8,
    reshape_and_cache_flash_mix,
    reshape_and_cache_int8_per_token_head,
)
from .mla import (
    RowFormat,
    concat_and_cache_mla,
    concat_and_cache_mla_rope_fused,
    copy_blocks_mla,
    cp_gather_and_upconvert_fp8_kv_cache,
    cp_gather_cache,
    gather_and_maybe_dequant_cache,
    mla_decode,
    row_formats,
)
from .mla_weights import MlaWeights
from .quant import channel_mean, scaled_int8_quant_for_attn
from .sparse import convert_req_index_to_global_index, filter_and_convert_dcp_index, sparse_mla_attention
from .top_k import top_k_per_row_decode, top_k_per_row_prefill

__all__ = [
    "MlaWeights",
    "RowFormat",
    "channel_mean",
    "concat_and_cache_mla",
    "concat_and_cache_mla_rope_fused",
    "convert_req_index_to_global_index",
    "copy_blocks",
    "copy_blocks_mla",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "differential_attention",
    "differential_cache_shape",
    "differential_combine",
    "differential_lambda",
    "differential_lambda_init",
    "differential_reshape_and_cache",
    "differential_stride_order",
    "filter_and_convert_dcp_index",
    "flash_attn_varlen",
    "flash_attn_varlen_int8",
    "flash_attn_with_kvcache",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "gather_and_maybe_dequant_cache",
    "get_mla_metadata",
    "get_paged_mqa_logits_metadata",
    "indexer_k_quant_and_cache",
    "indexer_short_rows",
    "int8_mixed_cache_shape",
    "int8_mixed_key_view",
    "int8_mixed_value_view",
    "merge_attn_states",
    "mla_decode",
    "mla_num_sm_parts",
    "paged_attention_int8",
    "paged_attention_mix",
    "prepare_indexer",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_int8",
    "reshape_and_cache_flash_mix",
    "reshape_and_cache_int8_per_token_head",
    "row_formats",
    "scaled_int8_quant_for_attn",
    "sparse_mla_attention",
    "swap_blocks",
    "top_k_per_row_decode",
    "top_k_per_row_prefill",
]
