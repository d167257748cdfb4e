# SPDX-License-Identifier: Apache-2.0
"""Latent attention and the indexer against references of others: flashinfer's trace templates, in plain torch."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from mla_helpers import e4m3, generator, i32, normal, prefix_sum

from attend import ops
from attend.compat import deep_gemm, flash_mla

H, L, R = 4, 64, 16
SCALE = 0.12


@pytest.fixture(scope="module")
def flashinfer():
    """The modules of the templates, without flashinfer's own start, which wants a GPU's libraries."""
    spec = importlib.util.find_spec("flashinfer")
    assert spec is not None, "python/requirements_alone.txt installs flashinfer"
    root = Path(spec.submodule_search_locations[0])
    before = dict(sys.modules)
    for name in ("flashinfer", "flashinfer.trace", "flashinfer.trace.templates"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    names = types.SimpleNamespace(
        attention=importlib.import_module("flashinfer.trace.templates.attention"),
        scores=importlib.import_module("flashinfer.trace.templates.attn_scores"),
    )
    for name in [n for n in sys.modules if n.startswith("flashinfer") and n not in before]:
        del sys.modules[name]
    return names


class Pages:
    """Requests of whole pages, as the templates have them: keys of a request are all tokens of its pages."""

    def __init__(self, query_lens, page_counts, page_size):
        self.page_counts, self.page_size = page_counts, page_size
        tokens, pages = sum(query_lens), sum(page_counts) + 2
        self.q = normal((tokens, H, L + R), 1, torch.bfloat16)
        self.cache = normal((pages, page_size, L + R), 2, torch.bfloat16)
        self.indices = torch.randperm(pages, generator=generator(3))[: sum(page_counts)].to(torch.int32)
        self.indptr, self.starts = prefix_sum(page_counts), prefix_sum(query_lens)
        self.table = torch.zeros(len(page_counts), max(page_counts), dtype=torch.int32)
        for r, count in enumerate(page_counts):
            self.table[r, :count] = self.indices[self.indptr[r] : self.indptr[r + 1]]
        self.lengths = i32([n * page_size for n in page_counts])

    def parts(self):
        q, cache = self.q.contiguous(), self.cache
        return q[..., :L], q[..., L:], cache[..., :L], cache[..., L:]


def assert_same(out, lse, reference):
    """The templates give bfloat16 and a logarithm to base 2."""
    torch.testing.assert_close(out.float(), reference[0].float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, reference[1] * math.log(2.0), rtol=1e-4, atol=1e-4)
    assert reference[0].float().abs().max() > 0.5


@pytest.mark.parametrize("page_size", [1, 16])
def test_decode(flashinfer, page_size):
    p = Pages([1, 1, 1], [5, 0, 17], page_size)
    reference = flashinfer.attention.mla_paged_decode_trace.reference(*p.parts(), p.indptr, p.indices, SCALE)
    out, lse = ops.mla_decode(p.q, p.cache, p.table, p.starts, p.lengths, scale=SCALE, head_dim_v=L, return_lse=True)
    assert_same(out, lse, reference)


def test_prefill(flashinfer):
    p = Pages([3, 2, 40], [1, 3, 2], 16)
    reference = flashinfer.attention.mla_paged_prefill_trace.reference(*p.parts(), p.starts, p.indptr, p.indices, SCALE)
    out, lse = ops.mla_decode(
        p.q, p.cache, p.table, p.starts, p.lengths, scale=SCALE, head_dim_v=L, causal=True, return_lse=True
    )
    assert_same(out, lse, reference)


def test_flash_mla_decode(flashinfer):
    p = Pages([1, 1, 1], [2, 0, 3], 64)
    reference = flashinfer.attention.mla_paged_decode_trace.reference(*p.parts(), p.indptr, p.indices, SCALE)
    out, lse = flash_mla.flash_mla_with_kvcache(
        p.q[:, None], p.cache[:, :, None], p.table, p.lengths, L, *flash_mla.get_mla_metadata(), softmax_scale=SCALE
    )
    assert torch.isposinf(lse[1]).all()
    assert_same(out[:, 0], torch.where(torch.isposinf(lse), -math.inf, lse)[:, :, 0], reference)


@pytest.mark.parametrize("page_size", [1, 64])
def test_sparse(flashinfer, page_size):
    p = Pages([1] * 5, [1] * 5, page_size)
    rows = p.cache.shape[0] * page_size
    indices = torch.randint(0, rows, (5, 24), generator=generator(4), dtype=torch.int32)
    indices[0, ::3] = -1
    indices[3] = -1
    reference = flashinfer.attention.dsa_paged_trace.reference(*p.parts(), indices, SCALE)
    out, lse = ops.sparse_mla_attention(p.q, p.cache, indices, scale=SCALE, head_dim_v=L, return_lse=True)
    assert_same(out, lse, reference)
    out, _, lse = flash_mla.flash_mla_sparse_fwd(p.q, p.cache.view(-1, 1, L + R), indices[:, None], SCALE, L)
    assert_same(out, torch.where(torch.isposinf(lse), -math.inf, lse), reference)


@pytest.mark.parametrize("next_n", [1, 2])
def test_paged_logits(flashinfer, next_n):
    lengths = [9, 40, 33]
    cache = torch.zeros(12, 8, 132, dtype=torch.uint8)
    ops.indexer_k_quant_and_cache(normal((96, 128), 1), cache, torch.arange(96))
    table = torch.stack([torch.randperm(12, generator=generator(5 + r))[:5] for r in range(3)]).to(torch.int32)
    q, weights = e4m3(normal((3, next_n, 8, 128), 2)), normal((3 * next_n, 8), 3)
    fused = cache[:, :, None]
    reference = flashinfer.scores.fp8_paged_mqa_logits_trace.reference(q, fused, weights, table, i32(lengths), 45)
    logits = deep_gemm.fp8_paged_mqa_logits(q, fused, weights, i32(lengths), table, None, 45, True)
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-3)
    assert torch.isfinite(reference).sum() > 60
