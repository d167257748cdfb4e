# SPDX-License-Identifier: Apache-2.0
"""float64 references of the functions in attend.ops, which share no code with them.

Each takes the arguments of its namesake and gives a Result: numpy float64 arrays with, for each element, how far a
correct function of the library may be from it. Arguments are only read, and checked as the function itself does. These
are plain loops: use small problems.
"""

from .attention import (
    appended_keys,
    flash_attn_varlen,
    flash_attn_varlen_int8,
    flash_attn_with_kvcache,
    merge_attn_states,
    paged_attention_int8,
    paged_attention_mix,
)
from .differential import differential_attention, differential_combine, differential_lambda
from .indexer import (
    PreparedIndexer,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    indexer_codes,
    may_be_top_k,
    prepare_indexer,
    top_k,
)
from .mla import mla_absorb_query, mla_decode, mla_rows, mla_up_project, mla_v_up_project
from .quant import fp8_code, fp8_ds_mla_decode, fp8_ds_mla_encode, fp8_value, int8_code, int8_scale
from .result import Bounded, Result
from .sparse import SparseResult, flash_mla_sparse_fwd, flash_mla_with_kvcache, global_index, sparse_mla_attention

__all__ = [
    "Bounded",
    "PreparedIndexer",
    "Result",
    "SparseResult",
    "appended_keys",
    "differential_attention",
    "differential_combine",
    "differential_lambda",
    "flash_attn_varlen",
    "flash_attn_varlen_int8",
    "flash_attn_with_kvcache",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fp8_code",
    "fp8_ds_mla_decode",
    "fp8_ds_mla_encode",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "fp8_value",
    "global_index",
    "indexer_codes",
    "int8_code",
    "int8_scale",
    "may_be_top_k",
    "merge_attn_states",
    "mla_absorb_query",
    "mla_decode",
    "mla_rows",
    "mla_up_project",
    "mla_v_up_project",
    "paged_attention_int8",
    "paged_attention_mix",
    "prepare_indexer",
    "sparse_mla_attention",
    "top_k",
]
