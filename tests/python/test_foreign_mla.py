# SPDX-License-Identifier: Apache-2.0
"""Latent attention, dense and sparse, against flashinfer's references and torch's scaled_dot_product_attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign_helpers import flashinfer_template

import attend

LATENT, ROTATED, HEADS, BLOCK, SCALE = 512, 64, 4, 16, 0.07
LENGTHS = (32, 48, 16)


@pytest.fixture(scope="module")
def problem():
    """(q [T, H, E], cache of latents, block table): a token a request, its blocks shuffled, the last block unused."""
    rng = np.random.default_rng(11)
    counts = [n // BLOCK for n in LENGTHS]
    q = rng.standard_normal((len(LENGTHS), HEADS, LATENT + ROTATED)).astype(np.float32)
    cache = rng.standard_normal((sum(counts) + 1, BLOCK, LATENT + ROTATED)).astype(np.float32)
    cache[-1] = np.nan
    table = np.zeros((len(LENGTHS), max(counts)), np.int32)
    order = rng.permutation(sum(counts))
    for i, n in enumerate(counts):
        table[i, :n], order = order[:n], order[n:]
    return q, cache, table


def by_torch(q, latents, seen=None):
    """float64: one head of keys that are the whole rows, of values that are their first elements."""
    q, k = torch.from_numpy(q).double()[None, :, None], torch.from_numpy(latents).double()[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, k[..., :LATENT], seen, scale=SCALE, enable_gqa=True)
    return out[0, :, 0].numpy()


def split(x):
    x = torch.from_numpy(x)
    return x[..., :LATENT], x[..., LATENT:]


def attend_dense(problem, **options):
    q, cache, table = problem
    start, lengths = np.arange(len(LENGTHS) + 1, dtype=np.int32), np.array(LENGTHS, np.int32)
    return attend.ops.mla_decode(
        q, cache, table, start, lengths, scale=SCALE, head_dim_v=LATENT, return_lse=True, **options
    )


def test_mla_decode_against_flashinfer(problem):
    q, cache, table = problem
    out, lse = attend_dense(problem)
    pages = [table[i, : n // BLOCK] for i, n in enumerate(LENGTHS)]
    indptr = torch.tensor(np.concatenate([[0], np.cumsum([len(p) for p in pages])]))
    reference = flashinfer_template("attention")._mla_paged_decode_reference
    expected, expected_lse = reference(*split(q), *split(cache), indptr, torch.from_numpy(np.concatenate(pages)), SCALE)
    np.testing.assert_allclose(out, expected.float().numpy(), rtol=2**-8, atol=2**-9)
    np.testing.assert_allclose(lse, expected_lse.numpy() * np.log(2), rtol=1e-5, atol=1e-5)


def test_mla_decode_against_torch(problem):
    q, cache, table = problem
    out, _ = attend_dense(problem)
    for i, n in enumerate(LENGTHS):
        latents = cache[table[i, : n // BLOCK]].reshape(n, -1)
        np.testing.assert_allclose(out[i], by_torch(q[i], latents), rtol=1e-5, atol=1e-5)
        assert np.abs(out[i] - by_torch(q[i], latents[:-1])).max() > 1e-3, "a key less is no other result"


def test_sparse_mla_against_flashinfer_and_torch(problem):
    q, cache, _ = problem
    rng = np.random.default_rng(12)
    slots = (len(cache) - 1) * BLOCK
    indices = np.stack([rng.permutation(slots)[:24] for _ in LENGTHS]).astype(np.int32)
    indices[0, 5:] = -1
    indices[1, ::3] = -1
    out, lse = attend.ops.sparse_mla_attention(q, cache, indices, scale=SCALE, head_dim_v=LATENT, return_lse=True)
    reference = flashinfer_template("attention")._dsa_paged_reference
    expected, expected_lse = reference(*split(q), *split(cache), torch.from_numpy(indices), SCALE)
    np.testing.assert_allclose(out, expected.float().numpy(), rtol=2**-8, atol=2**-9)
    np.testing.assert_allclose(lse, expected_lse.numpy() * np.log(2), rtol=1e-5, atol=1e-5)
    rows = cache[:-1].reshape(slots, -1)
    for i in range(len(LENGTHS)):
        seen = torch.zeros(1, slots, dtype=torch.bool)
        seen[0, indices[i][indices[i] >= 0]] = True
        np.testing.assert_allclose(out[i], by_torch(q[i], rows, seen), rtol=1e-5, atol=1e-5)
