# SPDX-License-Identifier: Apache-2.0
"""Features of attention against libraries that others wrote, at least two a feature: see docs/verification.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign_helpers import (
    Batch,
    by_attend,
    by_flashinfer,
    by_flashinfer_pages,
    by_jax,
    by_onnxruntime,
    by_torch_flex,
    by_torch_sdpa,
    flashinfer_template,
)

import attend

SDPA, FLEX, ORT, JAX, FLASHINFER = by_torch_sdpa, by_torch_flex, by_onnxruntime, by_jax, by_flashinfer
SINKS = np.array([0.5, -1.0, 2.0, 3.0], np.float32)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
#: float32 references add sums in another order; those of torch are float64.
TOLERANCE = {SDPA: 2e-6, FLEX: 2e-6, ORT: 2e-5, JAX: 2e-5, FLASHINFER: 2e-5}

FEATURES = {
    "gqa": ({}, [SDPA, FLEX, ORT, JAX, FLASHINFER]),
    "window": ({"window_left": 3}, [SDPA, FLEX, ORT, JAX, FLASHINFER]),
    "softcap": ({"softcap": 0.75}, [FLEX, ORT, JAX]),
    "sinks": ({"sinks": SINKS}, [SDPA, FLEX, ORT]),
    "alibi": ({"alibi_slopes": SLOPES}, [SDPA, FLEX, ORT]),
    "window_softcap": ({"window_left": 3, "softcap": 0.75}, [FLEX, ORT, JAX]),
    "window_sinks": ({"window_left": 3, "sinks": SINKS}, [SDPA, FLEX, ORT]),
}
CASES = [(n, r) for n, (_, references) in FEATURES.items() for r in references]


@pytest.fixture(scope="module")
def batch():
    return Batch()


@pytest.mark.parametrize(("feature", "reference"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_feature(batch, feature, reference):
    options, _ = FEATURES[feature]
    out, lse = by_attend(batch, **options)
    expected, expected_lse = reference(batch, **options)
    eps = TOLERANCE[reference]
    np.testing.assert_allclose(out, expected, rtol=eps, atol=eps)
    if expected_lse is not None and "sinks" not in options:
        np.testing.assert_allclose(lse, expected_lse, rtol=eps, atol=eps)


@pytest.mark.parametrize("feature", [n for n in FEATURES if n != "gqa"])
def test_feature_matters(batch, feature):
    """Without the feature, or with the window one token off, no reference would agree."""
    options, _ = FEATURES[feature]
    out, _ = by_attend(batch, **options)
    for name, value in options.items():
        others = {n: v for n, v in options.items() if n != name}
        if name == "window_left":
            others[name] = value + 1
        assert np.abs(out - by_attend(batch, **others)[0]).max() > 1e-3, name


def test_lse_with_sinks(batch):
    """flex_attention counts the sink as a key, so its LSE is the one with the sink."""
    _, lse = by_attend(batch, sinks=SINKS, lse_includes_sink=True)
    np.testing.assert_allclose(lse, by_torch_flex(batch, sinks=SINKS)[1], rtol=2e-6, atol=2e-6)
    _, without = by_attend(batch, sinks=SINKS)
    np.testing.assert_allclose(without, by_torch_flex(batch)[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("block_size", [8, 16])
def test_paged_prefill_and_lse_of_flashinfer(block_size):
    b = Batch(query_lens=(1, 4, 16), seq_lens=(16, 32, 16), block_size=block_size)
    (out, lse), (expected, expected_lse) = by_attend(b), by_flashinfer_pages(b)
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=2**-9)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_types(dtype):
    """Inputs of 16 bits, the same numbers for torch in float64: what differs is the rounding of the result."""
    b = Batch()
    for name in ("q", "k_cache", "v_cache"):
        setattr(b, name, torch.from_numpy(getattr(b, name)).to(dtype))
    options = {"seq_lens": torch.tensor(b.seq_lens, dtype=torch.int32), "block_table": torch.from_numpy(b.block_table)}
    start = torch.from_numpy(b.query_start_loc)
    out = attend.ops.flash_attn_varlen(b.q, b.k_cache, b.v_cache, start, causal=True, **options)
    b.q = b.q.float().numpy()
    b.k, b.v = ([torch.from_numpy(x).to(dtype).float().numpy() for x in rows] for rows in (b.k, b.v))
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(out.double().numpy(), by_torch_sdpa(b)[0], rtol=2 * eps, atol=2 * eps)


def halves(b):
    """attend's results over the first keys and over the rest, [T, H, D] and [T, H]: decodes, so that no mask is cut."""
    results = []
    for take in (lambda x: x[: len(x) // 3], lambda x: x[len(x) // 3 :]):
        k, v = [take(x) for x in b.k], [take(x) for x in b.v]
        start = np.concatenate([[0], np.cumsum([len(x) for x in k])]).astype(np.int32)
        results += attend.ops.flash_attn_varlen(
            b.q, np.concatenate(k), np.concatenate(v), b.query_start_loc, cu_seqlens_kv=start, return_lse=True
        )
    return results


def test_merge_against_flashinfer():
    b = Batch(query_lens=(1, 1, 1), seq_lens=(9, 24, 50))
    parts = halves(b)
    out, lse = attend.ops.merge_attn_states(*parts, return_lse=True)
    first, first_lse, rest, rest_lse = (torch.from_numpy(x) for x in parts)
    reference = flashinfer_template("cascade")._merge_state_reference
    ln2 = float(np.log(2))
    expected, expected_lse = reference(first, first_lse / ln2, rest, rest_lse / ln2)
    np.testing.assert_allclose(out, expected.numpy(), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse.numpy() * ln2, rtol=2e-6, atol=2e-6)


def test_merge_against_torch():
    """Merged parts are attention over all keys."""
    b = Batch(query_lens=(1, 1, 1), seq_lens=(9, 24, 50))
    out, lse = attend.ops.merge_attn_states(*halves(b), return_lse=True)
    expected, expected_lse = by_torch_flex(b)
    np.testing.assert_allclose(out, expected, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(out, by_torch_sdpa(b)[0], rtol=3e-6, atol=3e-6)
