# SPDX-License-Identifier: Apache-2.0
"""Every public function of MLA, FlashMLA, sparse attention and the indexer with hostile arguments.

Whatever one argument is, a call either works or raises one of attend.errors: nothing else, and no crash.
"""

from __future__ import annotations

import numpy
import pytest
import torch
from mla_helpers import LatentBatch, e4m3, i32, normal

import attend
from attend import ops, oracle
from attend.compat import deep_gemm, flash_mla


def latents():
    return LatentBatch([1, 2], [9, 20], heads=2, dim=48)


def slots():
    return torch.tensor([0, 17, -1])


def mla_calls():
    batch = latents()
    cache, codes = torch.zeros(3, 16, 24), torch.zeros(3, 16, 656, dtype=torch.uint8)
    sizes = dict(num_heads=3, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=8)
    layer = attend.MlaWeights(normal((72, 24), 1), **sizes)
    decode = dict(batch.arguments(), scale=0.1, head_dim_v=32)
    table = dict(block_table=i32([[0, 1, 2]]), cu_seq_lens=i32([0, 20]))
    new_rows = dict(kv_c=normal((3, 16), 1), k_pe=normal((3, 8), 2), kv_cache=cache, slot_mapping=slots())
    return {
        "mla_decode": (ops.mla_decode, decode),
        "oracle.mla_decode": (oracle.mla_decode, decode),
        "concat_and_cache_mla": (ops.concat_and_cache_mla, new_rows),
        "concat_and_cache_mla_rope_fused": (
            ops.concat_and_cache_mla_rope_fused,
            dict(
                new_rows,
                positions=torch.tensor([0, 1, 2]),
                q_pe=normal((3, 2, 8), 3),
                cos_sin_cache=normal((9, 8), 4),
                is_neox=True,
            ),
        ),
        "gather_and_maybe_dequant_cache": (
            ops.gather_and_maybe_dequant_cache,
            dict(table, src_cache=cache, dst=torch.zeros(20, 24), seq_starts=i32([3])),
        ),
        "cp_gather_cache": (ops.cp_gather_cache, dict(table, src_cache=cache, dst=torch.zeros(20, 24))),
        "cp_gather_and_upconvert_fp8_kv_cache": (
            ops.cp_gather_and_upconvert_fp8_kv_cache,
            dict(
                src_cache=codes,
                dst=torch.zeros(20, 576, dtype=torch.bfloat16),
                block_table=table["block_table"],
                workspace_starts=i32([0]),
            ),
        ),
        "copy_blocks_mla": (ops.copy_blocks_mla, dict(caches=[cache], moves=[(0, 1)])),
        "MlaWeights": (attend.MlaWeights, dict(sizes, weight=normal((72, 24), 1), dtype="float32")),
        "up_project": (layer.up_project, dict(kv_c=normal((4, 24), 1))),
        "absorb_query": (layer.absorb_query, dict(q_nope=normal((4, 3, 16), 1))),
        "v_up_project": (layer.v_up_project, dict(latents=normal((4, 3, 24), 1), out=torch.zeros(4, 3, 8))),
        "copy_w_uk_t": (layer.copy_w_uk_t, dict(out=torch.zeros(3, 16, 24))),
        "copy_w_uv": (layer.copy_w_uv, dict(out=torch.zeros(3, 24, 8))),
        "oracle.mla_rows": (oracle.mla_rows, dict(kv_cache=codes)),
        "oracle.mla_up_project": (
            oracle.mla_up_project,
            dict(sizes, weight=normal((72, 24), 1), kv_c=normal((4, 24), 1), dtype="float32"),
        ),
        "oracle.mla_absorb_query": (
            oracle.mla_absorb_query,
            dict(sizes, weight=normal((72, 24), 1), q_nope=normal((4, 3, 16), 1)),
        ),
        "oracle.mla_v_up_project": (
            oracle.mla_v_up_project,
            dict(sizes, weight=normal((72, 24), 1), latents=normal((4, 3, 24), 1)),
        ),
    }


def sparse_calls():
    batch = LatentBatch([1, 1], [9, 20], heads=2, dim=48, block=64)
    cache = batch.cache[:, :, None].nan_to_num()
    schedule = ops.get_mla_metadata(batch.lengths, 2)
    sparse = dict(
        q=batch.q,
        kv_cache=cache[:, :, 0],
        indices=i32([[0, 5], [70, -1]]),
        scale=0.1,
        head_dim_v=32,
        topk_length=i32([2, 1]),
        sinks=torch.zeros(2),
    )
    dense = dict(
        q=batch.q[:, None],
        k_cache=cache,
        block_table=batch.block_table,
        cache_seqlens=batch.lengths,
        head_dim_v=32,
        tile_scheduler_metadata=schedule[0],
        num_splits=schedule[1],
        softmax_scale=0.1,
        causal=True,
    )
    named = dict(
        q=batch.q[:, None],
        k_cache=cache,
        block_table=None,
        cache_seqlens=None,
        head_dim_v=32,
        indices=i32([[[0, 5]], [[70, -1]]]),
        topk_length=i32([2, 1]),
        attn_sink=torch.zeros(2),
        extra_k_cache=cache,
        extra_topk_length=i32([1, 1]),
    )
    prefill = dict(
        q=normal((3, 2, 48), 1),
        kv=normal((9, 1, 48), 2),
        indices=i32([[[0, 3]]] * 3),
        sm_scale=0.1,
        d_v=32,
        attn_sink=torch.zeros(2),
        topk_length=i32([2, 1, 0]),
    )
    varlen = dict(
        cu_seqlens_qo=i32([0, 3]), cu_seqlens_kv=i32([0, 3]), max_seqlen_qo=3, max_seqlen_kv=3, softmax_scale=0.1
    )
    pages = dict(
        req_id=i32([0, 1]),
        block_table=i32([[0, 2], [1, 3]]),
        token_indices=i32([[0, 3], [5, -1]]),
        block_size=4,
        num_blocks=5,
    )
    extra = i32([[[1]], [[2]]])
    return {
        "sparse_mla_attention": (ops.sparse_mla_attention, sparse),
        "oracle.sparse_mla_attention": (oracle.sparse_mla_attention, sparse),
        "flash_mla_with_kvcache": (ops.flash_mla_with_kvcache, dense),
        "flash_mla_with_kvcache(indices)": (ops.flash_mla_with_kvcache, dict(named, extra_indices=extra)),
        "oracle.flash_mla_with_kvcache": (oracle.flash_mla_with_kvcache, dict(named, extra_indices=extra)),
        "compat.flash_mla_with_kvcache": (flash_mla.flash_mla_with_kvcache, dense),
        "compat.flash_mla_with_kvcache(new)": (
            flash_mla.flash_mla_with_kvcache,
            dict(named, tile_scheduler_metadata=flash_mla.FlashMLASchedMeta(), extra_indices_in_kvcache=extra),
        ),
        "flash_mla_sparse_fwd": (ops.flash_mla_sparse_fwd, prefill),
        "oracle.flash_mla_sparse_fwd": (oracle.flash_mla_sparse_fwd, prefill),
        "compat.flash_mla_sparse_fwd": (flash_mla.flash_mla_sparse_fwd, prefill),
        "compat.get_mla_metadata": (
            flash_mla.get_mla_metadata,
            dict(cache_seqlens=i32([3, 70]), num_q_tokens_per_head_k=4, num_heads_k=1, num_heads_q=2, topk=5),
        ),
        "get_mla_metadata": (ops.get_mla_metadata, dict(cache_seqlens=i32([3, 70]), num_sm_parts=3)),
        "mla_num_sm_parts": (
            ops.mla_num_sm_parts,
            dict(num_processors=8, num_heads_q=4, num_heads_k=2, num_q_tokens=1),
        ),
        "flash_attn_varlen_func": (
            flash_mla.flash_attn_varlen_func,
            dict(varlen, q=normal((3, 2, 16), 1), k=normal((3, 2, 16), 2), v=normal((3, 2, 16), 3)),
        ),
        "flash_attn_varlen_kvpacked_func": (
            flash_mla.flash_attn_varlen_kvpacked_func,
            dict(varlen, q=normal((3, 2, 16), 1), kv=normal((3, 2, 32), 2), head_dim_qk=16),
        ),
        "flash_attn_varlen_qkvpacked_func": (
            flash_mla.flash_attn_varlen_qkvpacked_func,
            dict(qkv=normal((3, 2, 48), 1), cu_seqlens=i32([0, 3]), max_seqlen=3, head_dim_qk=16),
        ),
        "convert_req_index_to_global_index": (
            ops.convert_req_index_to_global_index,
            dict(
                pages,
                prefill_workspace_request_ids=i32([0, -1]),
                prefill_workspace_starts=i32([0]),
                workspace_rows=9,
                block_stride_rows=6,
            ),
        ),
        "filter_and_convert_dcp_index": (
            ops.filter_and_convert_dcp_index,
            dict(pages, world_size=2, interleave=1, rank=1, compact_to_front=True),
        ),
        "oracle.global_index": (oracle.global_index, dict(token=3, blocks=i32([0, 2]), block_size=4, num_blocks=5)),
    }


def indexer_calls():
    q, k = e4m3(normal((2, 3, 128), 1)), e4m3(normal((9, 128), 2))
    cache = torch.zeros(3, 8, 132, dtype=torch.uint8)
    logits = dict(q=q, k=k, k_scale=torch.ones(9), weights=normal((2, 3), 3), ks=i32([0, 1]), ke=i32([9, 4]))
    paged = dict(
        q=q[:, None],
        kv_cache=cache,
        weights=normal((2, 3), 3),
        context_lens=i32([3, 9]),
        block_table=i32([[0, 1], [2, 1]]),
        max_model_len=12,
    )
    compat = dict(weights=normal((2, 3), 3), cu_seq_len_k_start=i32([0, 1]), cu_seq_len_k_end=i32([9, 4]))
    compat_paged = dict(
        {n: t for n, t in paged.items() if n != "max_model_len"}, max_context_len=12, schedule_meta=None
    )
    prepare = dict(
        q=normal((2, 3, 128), 1),
        k=normal((2, 128), 2),
        weights=normal((2, 3), 3),
        positions=torch.tensor([0, 3]),
        cos_sin_cache=normal((9, 64), 4),
        k_norm_weight=torch.ones(128),
        k_norm_bias=torch.zeros(128),
        k_norm_eps=1e-6,
    )
    return {
        "prepare_indexer": (ops.prepare_indexer, dict(prepare, q_scale_fmt="ue8m0", softmax_scale=0.1)),
        "oracle.prepare_indexer": (oracle.prepare_indexer, prepare),
        "indexer_short_rows": (
            ops.indexer_short_rows,
            dict(lengths=i32([1, 5]), out=torch.zeros(2, 3, dtype=torch.int32)),
        ),
        "indexer_k_quant_and_cache": (
            ops.indexer_k_quant_and_cache,
            dict(k=normal((3, 128), 1), kv_cache=cache, slot_mapping=slots(), scale_fmt="ue8m0"),
        ),
        "cp_gather_indexer_k_quant_cache": (
            ops.cp_gather_indexer_k_quant_cache,
            dict(
                kv_cache=cache,
                dst_k=e4m3(torch.zeros(9, 128)),
                dst_scale=torch.zeros(9),
                block_table=i32([[0, 1]]),
                cu_seq_lens=i32([0, 9]),
            ),
        ),
        "fp8_mqa_logits": (ops.fp8_mqa_logits, logits),
        "oracle.fp8_mqa_logits": (oracle.fp8_mqa_logits, logits),
        "fp8_paged_mqa_logits": (ops.fp8_paged_mqa_logits, paged),
        "oracle.fp8_paged_mqa_logits": (oracle.fp8_paged_mqa_logits, paged),
        "get_paged_mqa_logits_metadata": (
            ops.get_paged_mqa_logits_metadata,
            dict(context_lens=i32([3, 9]), block_size=8, num_sms=3),
        ),
        "top_k_per_row_prefill": (
            ops.top_k_per_row_prefill,
            dict(logits=normal((2, 9), 1), row_starts=i32([0, 2]), row_ends=i32([9, 4]), k=3),
        ),
        "top_k_per_row_decode": (
            ops.top_k_per_row_decode,
            dict(logits=normal((2, 9), 1), seq_lens=i32([9]), k=3, next_n=2),
        ),
        "oracle.indexer_codes": (oracle.indexer_codes, dict(rows=normal((2, 128), 1), scale_fmt="ue8m0")),
        "oracle.top_k": (oracle.top_k, dict(values=[1.0, 3.0, 2.0], k=2)),
        "oracle.may_be_top_k": (oracle.may_be_top_k, dict(logits=[1.0, 3.0], bounds=[0.0, 0.0], indices=[1])),
        "compat.fp8_mqa_logits": (deep_gemm.fp8_mqa_logits, dict(compat, q=q, kv=(k, torch.ones(9)), max_seqlen_k=0)),
        "compat.fp8_fp4_mqa_logits": (
            deep_gemm.fp8_fp4_mqa_logits,
            dict(compat, q=(q, None), kv=(k, torch.ones(9)), logits_dtype=torch.float32),
        ),
        "compat.fp8_paged_mqa_logits": (deep_gemm.fp8_paged_mqa_logits, dict(compat_paged, kv_cache=cache[:, :, None])),
        "compat.fp8_fp4_paged_mqa_logits": (
            deep_gemm.fp8_fp4_paged_mqa_logits,
            dict(compat_paged, q=(q[:, None], None)),
        ),
        "compat.get_paged_mqa_logits_metadata": (
            deep_gemm.get_paged_mqa_logits_metadata,
            dict(context_lens=i32([3, 9]), block_kv=8, num_sms=3),
        ),
    }


HOSTILE = {
    "None": lambda v: None,
    "word": lambda v: "x",
    "object": lambda v: object(),
    "negative": lambda v: -3,
    "huge": lambda v: 2**40,
    "nan": lambda v: float("nan"),
    "list": lambda v: [1, "a"],
    "scalar": lambda v: torch.tensor(1.0),
    "empty": lambda v: torch.empty(0),
    "rank 7": lambda v: torch.zeros(1, 1, 1, 1, 1, 1, 1),
    "int64": lambda v: torch.full(v.shape, 2**40) if isinstance(v, torch.Tensor) else 2**70,
    "large": lambda v: torch.full(v.shape, 2**31 - 1, dtype=torch.int32) if isinstance(v, torch.Tensor) else 1.5,
    "numpy": lambda v: numpy.zeros((2, 3)),
    "objects": lambda v: numpy.array([object()]),
    "gradient": lambda v: torch.ones(2, 3, requires_grad=True) * 2,
    "complex": lambda v: torch.zeros(2, 3, dtype=torch.complex64),
    "meta": lambda v: torch.empty(v.shape if isinstance(v, torch.Tensor) else (2, 3), device="meta"),
    "sparse": lambda v: torch.eye(3).to_sparse(),
    "shorter": lambda v: v[:-1] if isinstance(v, (torch.Tensor, list, tuple)) else 0,
    "strided": lambda v: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else True,
    "expanded": lambda v: v[:1].expand_as(v) if isinstance(v, torch.Tensor) and v.dim() else b"x",
    "first only": lambda v: v[0] if isinstance(v, (torch.Tensor, list, tuple)) else {},
}
CALLS = {**mla_calls(), **sparse_calls(), **indexer_calls()}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", CALLS)
def test_hostile_arguments(name):
    function, valid = CALLS[name]
    function(**copied(valid))
    refused = 0
    for argument in valid:
        for kind, hostile in HOSTILE.items():
            arguments = copied(valid)
            arguments[argument] = hostile(arguments[argument])
            try:
                function(**arguments)
            except attend.Error:
                refused += 1
            except Exception as e:
                raise AssertionError(f"{name}: {argument} = {kind} raises {type(e).__name__}: {e}") from e
    assert refused >= len(HOSTILE) // 2


def copied(arguments):
    """Arguments of their own: calls write to some of them, and fill schedules."""
    fresh = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.clone()
        elif isinstance(value, flash_mla.FlashMLASchedMeta):
            value = flash_mla.FlashMLASchedMeta()
        elif isinstance(value, list):
            value = [v.clone() if isinstance(v, torch.Tensor) else v for v in value]
        fresh[name] = value
    return fresh


def test_unknown_arguments_are_refused():
    for function, valid in CALLS.values():
        with pytest.raises(TypeError):
            function(**copied(valid), no_such_argument=1)
