# SPDX-License-Identifier: Apache-2.0
"""Sparse multi-head latent attention: each token attends to the few tokens that an index names.

The index here is made with the attention's own scores, so that it finds what matters; a model has a small network for
it.

    python examples/python/sparse_mla.py
"""

from __future__ import annotations

import torch

from attend import backends
from attend.backends import BuilderConfig, ImplConfig, MlaBuilderConfig, MlaDims, MlaLayerConfig, SparseBuilderConfig
from attend.batch import CommonMetadata, make_slot_mapping
from attend.cache import KvCacheSpec

DIMS = MlaDims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
HEADS, BLOCK, TOKENS = 4, 64, 300


def keys_and_values(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_b_proj: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all heads, [S, H, P + R] and [S, H, V] in float64."""
    both = (kv_c.double() @ kv_b_proj.double().T).view(len(kv_c), HEADS, -1)
    k_nope, value = both.split([DIMS.qk_nope_head_dim, DIMS.v_head_dim], dim=-1)
    return torch.cat([k_nope, k_pe.double()[:, None].expand(-1, HEADS, -1)], -1), value


def main() -> None:
    torch.manual_seed(0)
    kv_b_proj = torch.randn(HEADS * (DIMS.qk_nope_head_dim + DIMS.v_head_dim), DIMS.kv_lora_rank).bfloat16() / 22
    query = 3 * torch.randn(TOKENS, HEADS, DIMS.qk_nope_head_dim + DIMS.qk_rope_head_dim).bfloat16()
    kv_c = torch.randn(TOKENS, DIMS.kv_lora_rank).bfloat16()
    k_pe = torch.randn(TOKENS, DIMS.qk_rope_head_dim).bfloat16()

    key, value = keys_and_values(kv_c, k_pe, kv_b_proj)
    logits = torch.einsum("qhd,khd->hqk", query.double(), key) / key.shape[-1] ** 0.5
    logits.masked_fill_(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
    dense = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value)

    table = torch.randperm(8)[: -(-TOKENS // BLOCK)].to(torch.int32)[None]
    batch = CommonMetadata([0, TOKENS], [TOKENS], block_table=table)
    batch = batch.replace(slot_mapping=make_slot_mapping(batch, BLOCK))
    backend = backends.find("FLASHMLA_SPARSE")
    layer = backend.make_impl(ImplConfig(HEADS, 1, DIMS.cache_dim, mla=MlaLayerConfig(kv_b_proj, DIMS, HEADS)))
    spec = KvCacheSpec(8, BLOCK, 1, DIMS.cache_dim, "bfloat16")
    cache = backend.new_kv_cache(spec, framework="torch")
    for topk in (16, 64, TOKENS):
        builder = backend.make_builder(
            BuilderConfig(
                HEADS,
                spec,
                mla=MlaBuilderConfig(DIMS, max_model_len=512, max_num_seqs=1),
                sparse=SparseBuilderConfig(topk=topk, max_num_batched_tokens=TOKENS),
            )
        )
        chosen = logits.softmax(-1).sum(0).topk(topk, -1)
        indices = chosen.indices.to(torch.int32)  # those behind a token name nothing
        out = layer.forward(query, cache, builder.build(batch), kv_c=kv_c, k_pe=k_pe, topk_indices=indices)
        error = (out.double() - dense).norm() / dense.norm()
        print(f"top {topk:3} of up to {TOKENS} tokens: relative difference from dense attention {error.item():.4f}")


if __name__ == "__main__":
    main()
