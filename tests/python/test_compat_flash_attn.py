# SPDX-License-Identifier: Apache-2.0
"""attend.compat.flash_attn against attention written out in float64."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from flash_helpers import assert_close, batched, error_of, paged

from attend.compat import flash_attn as fa
from attend.errors import InvalidArgument, InvalidType, Unsupported


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(sq=7, sk=11, heads=4, kv_heads=2, dim=32):
    return randn(2, sq, heads, dim, seed=1), randn(2, sk, kv_heads, dim, seed=2), randn(2, sk, kv_heads, dim, seed=3)


def plus_infinity(lse):
    return torch.where(lse == -math.inf, math.inf, lse)


OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (3, 2)}, {"window": (3, 2)}),
    "left window": ({"window_size": (3, -1)}, {"window": (3, -1)}),
    "causal window": ({"causal": True, "window_size": (3, 0)}, {"causal": True, "window": (3, 0)}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "scale": ({"softmax_scale": 0.7}, {"scale": 0.7}),
    "alibi": ({"alibi_slopes": randn(4, seed=9).abs()}, {"slopes": randn(4, seed=9).abs()}),
    "alibi of requests": ({"alibi_slopes": randn(2, 4, seed=9).abs()}, {"slopes": randn(2, 4, seed=9).abs()}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_func(name):
    options, written_out = OPTIONS[name]
    q, k, v = qkv()
    out, lse, mask = fa.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    expected, expected_lse = batched(q, k, v, **written_out)
    assert mask is None
    assert_close(out, expected)
    assert_close(lse, plus_infinity(expected_lse))
    assert torch.equal(fa.flash_attn_func(q, k, v, **options), out)


def test_rows_without_keys_are_zero_with_an_lse_of_plus_infinity():
    q, k, v = qkv(sq=9, sk=4)
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected, expected_lse = batched(q, k, v, causal=True)
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == math.inf).all() and torch.isfinite(lse[:, :, 5:]).all()
    assert_close(out, expected)
    assert_close(lse, plus_infinity(expected_lse))


def test_views_of_transposed_tensors_have_the_bits_of_contiguous_ones():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv())
    assert not q.is_contiguous()
    assert torch.equal(fa.flash_attn_func(q, k, v), fa.flash_attn_func(*(t.contiguous() for t in (q, k, v))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(dtype):
    q, k, v = (t.to(dtype) for t in qkv())
    out = fa.flash_attn_func(q, k, v, causal=True)
    assert out.dtype == dtype
    assert_close(out, batched(q, k, v, causal=True)[0], 1e-2)


def test_packed_forms_have_the_bits_of_the_plain_one():
    packed = randn(2, 6, 3, 4, 32)
    expected = fa.flash_attn_func(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], causal=True)
    assert torch.equal(fa.flash_attn_qkvpacked_func(packed, causal=True), expected)
    assert torch.equal(fa.flash_attn_kvpacked_func(packed[:, :, 0], packed[:, :, 1:], causal=True), expected)
    flat, starts = packed.reshape(12, 3, 4, 32), torch.tensor([0, 6, 12], dtype=torch.int32)
    expected = expected.reshape(12, 4, 32)
    assert torch.equal(fa.flash_attn_varlen_qkvpacked_func(flat, starts, 6, causal=True), expected)
    varlen = fa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], starts, starts, 6, 6, causal=True)
    assert torch.equal(varlen, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name):
    options, written_out = OPTIONS[name]
    q, k, v = qkv()
    # The second request has the first five queries and nine keys.
    flat_q, flat_k, flat_v = (torch.cat([t[0], t[1, :n]]) for t, n in ((q, 5), (k, 9), (v, 9)))
    starts_q = torch.tensor([0, 7, 12], dtype=torch.int32)
    starts_k = torch.tensor([0, 11, 20], dtype=torch.int32)
    out, lse, mask = fa.flash_attn_varlen_func(
        flat_q, flat_k, flat_v, starts_q, starts_k, 7, 11, return_attn_probs=True, **options
    )
    assert mask is None and lse.shape == (4, 12) and lse.is_contiguous()
    slopes = written_out.get("slopes")
    for b, (sq, sk) in enumerate(((7, 11), (5, 9))):
        mine = {**written_out, "slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1]}
        expected, expected_lse = batched(q[b : b + 1, :sq], k[b : b + 1, :sk], v[b : b + 1, :sk], **mine)
        begin = int(starts_q[b])
        assert_close(out[begin : begin + sq], expected[0])
        assert_close(lse[:, begin : begin + sq], plus_infinity(expected_lse[0]))


def test_varlen_over_a_paged_cache():
    q, k, v = qkv(sk=21)
    table = torch.tensor([[5, 2], [0, 7]], dtype=torch.int32)
    starts = torch.tensor([0, 7, 14], dtype=torch.int32)
    keys = torch.tensor([0, 21, 42], dtype=torch.int32)
    got = fa.flash_attn_varlen_func(
        q.reshape(14, 4, 32),
        paged(k, table, 9, 16),
        paged(v, table, 9, 16),
        starts,
        keys,
        7,
        21,
        causal=True,
        block_table=table,
    )
    assert_close(got.reshape(q.shape), batched(q, k, v, causal=True)[0])


def test_kvcache_appends_and_attends():
    q, new_k, new_v = qkv(sq=3, sk=3)
    k_cache, v_cache = randn(5, 20, 2, 32, seed=4), randn(5, 20, 2, 32, seed=5)
    lengths, rows = torch.tensor([4, 12], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    before = k_cache.clone()
    out, lse = fa.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        new_k,
        new_v,
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        causal=True,
        return_softmax_lse=True,
    )
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist())):
        assert torch.equal(k_cache[row, length : length + 3], new_k[b])
        assert torch.equal(v_cache[row, length : length + 3], new_v[b])
        keys = slice(0, length + 3)
        expected, expected_lse = batched(
            q[b : b + 1], k_cache[row : row + 1, keys], v_cache[row : row + 1, keys], causal=True
        )
        assert_close(out[b], expected[0])
        assert_close(lse[b], expected_lse[0])
        before[row, length : length + 3] = new_k[b]
    assert torch.equal(k_cache, before), "nothing else is written"


def test_kvcache_of_pages_left_padding_and_one_length_for_all():
    q, k, v = qkv(sq=1, sk=21)
    table = torch.tensor([[5, 2], [0, 7]], dtype=torch.int32)
    pages = paged(k, table, 9, 16), paged(v, table, 9, 16)
    lengths = torch.tensor([21, 13], dtype=torch.int32)
    out = fa.flash_attn_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table, num_splits=3)
    for b, length in enumerate((21, 13)):
        assert_close(out[b], batched(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length])[0][0])
    assert_close(fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=17), batched(q, k[:, :17], v[:, :17])[0])
    padding = torch.tensor([2, 5], dtype=torch.int32)
    k[0, :2], k[1, :5] = math.nan, math.nan
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=17, cache_leftpad=padding)
    for b, first in enumerate((2, 5)):
        assert_close(out[b], batched(q[b : b + 1], k[b : b + 1, first:17], v[b : b + 1, first:17])[0][0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_kvcache_rotates(interleaved):
    q, new_k, new_v = qkv(sq=2, sk=2)
    k_cache, v_cache = torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 2, 32)
    angles = torch.arange(16)[:, None] * 10.0 ** (-torch.arange(16) / 8)[None]
    cos, sin = angles.cos(), angles.sin()
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, cos, sin, 5, causal=True, rotary_interleaved=interleaved
    )

    def rotated(x):
        c, s = cos[5:7, None], sin[5:7, None]
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :16], x[..., 16:])
        first, second = a * c - b * s, a * s + b * c
        return torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)

    assert_close(k_cache[:, 5:7], rotated(new_k).double())
    assert_close(out, batched(rotated(q), k_cache[:, :7], v_cache[:, :7], causal=True)[0])


def test_numpy_arrays_work_too():
    q, k, v = (t.numpy() for t in qkv())
    out = fa.flash_attn_func(q, k, v)
    assert isinstance(out, np.ndarray)
    assert_close(torch.from_numpy(out), batched(*qkv())[0])


def test_what_is_not_supported_or_wrong_is_named():
    q, k, v = qkv()
    starts = torch.tensor([0, 7], dtype=torch.int32)
    assert "'dropout_p'" in error_of(Unsupported, lambda: fa.flash_attn_func(q, k, v, 0.1))
    assert "'window_size'" in error_of(InvalidType, lambda: fa.flash_attn_func(q, k, v, window_size=3))
    assert "'window_size'" in error_of(InvalidArgument, lambda: fa.flash_attn_func(q, k, v, window_size=(-2, 0)))
    assert "'softmax_scale'" in error_of(InvalidArgument, lambda: fa.flash_attn_func(q, k, v, softmax_scale=-1.0))
    assert "[flash_attn_func] argument 'k'" in error_of(InvalidArgument, lambda: fa.flash_attn_func(q, k.half(), v))
    assert "'v'" in error_of(InvalidType, lambda: fa.flash_attn_func(q, k, None))
    assert "'qkv'" in error_of(InvalidArgument, lambda: fa.flash_attn_qkvpacked_func(randn(1, 2, 2, 4, 32)))
    flat = (q[0], k[0, :7], v[0, :7], starts)
    for name, call in {
        "cu_seqlens_q": lambda: fa.flash_attn_varlen_func(*flat[:3], starts.long(), starts, 7, 7),
        "cu_seqlens_k": lambda: fa.flash_attn_varlen_func(*flat, starts[:1], 7, 7),
    }.items():
        assert f"[flash_attn_varlen_func] argument '{name}'" in error_of(InvalidArgument, call)
    assert "'max_seqlen_q'" in error_of(InvalidType, lambda: fa.flash_attn_varlen_func(*flat, starts, "7", 7))
    too_long = torch.tensor([30, 1], dtype=torch.int32)
    call = lambda: fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=too_long)
    assert "[flash_attn_with_kvcache] argument 'cache_seqlens'" in error_of(InvalidArgument, call)
    call = lambda: fa.flash_attn_with_kvcache(q, k, v, k=k, cache_seqlens=1)
    assert "argument 'v'" in error_of(InvalidArgument, call)


def test_batches_are_equal():
    q, k, v = qkv()
    more = lambda t: torch.cat([t, t])
    for name, call in {
        "k": lambda: fa.flash_attn_func(q, more(k), more(v)),
        "v": lambda: fa.flash_attn_func(q, k, more(v)),
    }.items():
        assert f"[flash_attn_func] argument '{name}': expected a batch of 2" in error_of(InvalidArgument, call)


@pytest.mark.parametrize("length", [-1, 2**40])
def test_one_length_for_all_is_checked(length):
    q, k, v = qkv()
    call = lambda: fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=length)
    assert "[flash_attn_with_kvcache] argument 'cache_seqlens'" in error_of(InvalidArgument, call)


def test_gradients_are_refused_while_they_are_recorded():
    q, k, v = qkv()
    q.requires_grad_(True)
    assert "'q'" in error_of(InvalidArgument, lambda: fa.flash_attn_func(q, k, v))
    with torch.no_grad():
        fa.flash_attn_func(q, k, v)


def test_parameters_have_the_names_and_the_order_of_flash_attn():
    names = list(inspect.signature(fa.flash_attn_varlen_func).parameters)
    assert names[:7] == ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert names[7:10] == ["dropout_p", "softmax_scale", "causal"]
    names = list(inspect.signature(fa.flash_attn_with_kvcache).parameters)
    assert names[3:11] == [
        "k",
        "v",
        "rotary_cos",
        "rotary_sin",
        "cache_seqlens",
        "cache_batch_idx",
        "cache_leftpad",
        "block_table",
    ]
