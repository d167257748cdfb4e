# SPDX-License-Identifier: Apache-2.0
"""attend.compat.flash_attn_3 and vllm_flash_attn against attention written out in float64."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from flash_helpers import assert_close, attention, batched, error_of, paged

from attend.compat import flash_attn_3 as fa3
from attend.compat import vllm_flash_attn as vfa
from attend.errors import InvalidArgument, InvalidType, Unsupported


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(sq=7, sk=11):
    return randn(2, sq, 4, 32, seed=1), randn(2, sk, 2, 32, seed=2), randn(2, sk, 2, 32, seed=3)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


STARTS, KEYS = int32(0, 7, 12), int32(0, 11, 20)


def ragged():
    q, k, v = qkv()
    return tuple(torch.cat([t[0], t[1, :n]]) for t, n in ((q, 5), (k, 9), (v, 9)))


def expected_ragged(**options):
    q, k, v = qkv()
    parts = [attention(q[b, :sq], k[b, :sk], v[b, :sk], **options) for b, sq, sk in ((0, 7, 11), (1, 5, 9))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)


def descaled(scales, *tensors):
    """fp8 codes of tensors [B, S, H, D], and the numbers that they stand for with scales [B, Hkv]."""
    codes = [t.to(torch.float8_e4m3fn) for t in tensors]
    values = []
    for code in codes:
        group = code.shape[2] // scales.shape[1]
        values.append(code.float() * scales.repeat_interleave(group, 1)[:, None, :, None])
    return codes, values


def test_func_has_the_values_of_flash_attention_3():
    q, k, v = qkv(sq=9, sk=4)
    for options, written_out in (
        ({"causal": True}, {"causal": True}),
        ({"window_size": (2, 1), "softcap": 3.0}, {"window": (2, 1), "softcap": 3.0}),
        ({"softmax_scale": 0.4, "window_size": (None, 2)}, {"scale": 0.4, "window": (-1, 2)}),
    ):
        out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True, **options)
        expected, expected_lse = batched(q, k, v, **written_out)
        assert_close(out, expected)
        assert_close(lse, expected_lse)
    assert (fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[1][:, :, :5] == -math.inf).all()


def test_fp8_tensors_have_scales():
    scales = torch.tensor([[0.5, 2.0], [1.5, 0.25]])
    codes, values = descaled(scales, *qkv())
    out, lse = fa3.flash_attn_func(
        *codes, causal=True, q_descale=scales, k_descale=scales, v_descale=scales, return_attn_probs=True
    )
    expected, expected_lse = batched(*values, causal=True)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 7, 4, 32) and lse.shape == (2, 4, 7)
    assert_close(out, expected, 2e-2)
    assert_close(lse, expected_lse, 1e-4)


def test_varlen():
    for options, written_out in (({"causal": True}, {"causal": True}), ({"window_size": (3, 1)}, {"window": (3, 1)})):
        out, lse = fa3.flash_attn_varlen_func(*ragged(), STARTS, KEYS, 7, 11, return_attn_probs=True, **options)
        expected, expected_lse = expected_ragged(**written_out)
        assert_close(out, expected)
        assert_close(lse, expected_lse)


def test_varlen_of_fp8_tensors():
    scales = torch.tensor([[0.5, 2.0], [1.5, 0.25]])
    codes, values = descaled(scales, *qkv())
    flat = (torch.cat([t[0].float(), t[1, :n].float()]).to(t.dtype) for t, n in zip(codes, (5, 9, 9)))
    out = fa3.flash_attn_varlen_func(
        *flat, STARTS, KEYS, 7, 11, causal=True, q_descale=scales, k_descale=scales, v_descale=scales
    )
    for b, (begin, sq, sk) in enumerate(((0, 7, 11), (7, 5, 9))):
        expected, _ = attention(*(t[b, :n] for t, n in zip(values, (sq, sk, sk))), causal=True)
        assert_close(out[begin : begin + sq], expected, 2e-2)


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy()], ids=["torch", "numpy"])
@pytest.mark.parametrize("used_q, used_k", [(None, (4, 9)), ((3, 5), None), ((6, 2), (0, 7)), ((7, 0), (11, 3))])
@pytest.mark.parametrize("options, written_out", [
    ({}, {}), ({"causal": True}, {"causal": True}), ({"window_size": (3, 1)}, {"window": (3, 1)})
])  # fmt: skip
def test_varlen_of_used_lengths(used_q, used_k, options, written_out, convert):
    q, k, v = ragged()
    expected, expected_lse = torch.zeros(12, 4, 32).double(), torch.full((4, 12), -math.inf).double()
    for b, (first_q, all_q, first_k, all_k) in enumerate(((0, 7, 0, 11), (7, 5, 11, 9))):
        sq, sk = used_q[b] if used_q else all_q, used_k[b] if used_k else all_k
        rows = slice(first_q, first_q + sq)
        keys = slice(first_k, first_k + sk)
        out, lse = attention(q[rows], k[keys], v[keys], **written_out)
        expected[rows], expected_lse[:, rows] = out, lse
        k[first_k + sk : first_k + all_k] = math.nan  # nobody reads them
        q[first_q + sq : first_q + all_q] = math.nan
    used = {n: convert(int32(*x)) for n, x in (("seqused_q", used_q), ("seqused_k", used_k)) if x}
    out, lse = fa3.flash_attn_varlen_func(
        *map(convert, (q, k, v, STARTS, KEYS)), 7, 11, return_attn_probs=True, **used, **options
    )
    assert_close(torch.as_tensor(out), expected)
    assert_close(torch.as_tensor(lse), expected_lse)


def test_varlen_of_used_lengths_of_fp8_tensors():
    scales = torch.tensor([[0.5, 2.0], [1.5, 0.25], [3.0, 0.75]])
    codes, values = descaled(scales, *(randn(3, 9, heads, 32, seed=heads + n) for n, heads in enumerate((4, 2, 2))))
    descales = {"q_descale": scales, "k_descale": scales, "v_descale": scales}
    starts = int32(0, 9, 18, 27)
    call = lambda **options: fa3.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in codes), starts, starts, 9, 9, causal=True, **options
    )
    out = call(seqused_q=int32(7, 3, 9), seqused_k=int32(6, 8, 5), **descales).unflatten(0, (3, 9))
    for b, (sq, sk) in enumerate(((7, 6), (3, 8), (9, 5))):
        expected, _ = attention(*(t[b, :n] for t, n in zip(values, (sq, sk, sk))), causal=True)
        assert_close(out[b, :sq], expected, 2e-2)
    bad = lambda: call(seqused_k=int32(6, 8, 5), **{**descales, "v_descale": torch.ones(9, 2)})
    assert "argument 'v_descale': expected 3 rows" in error_of(InvalidArgument, bad)


@pytest.mark.parametrize("options, text", [
    ({"seqused_q": int32(7, 6)}, "'seqused_q': expected 0 to 5 at index 1, got 6"),
    ({"seqused_k": int32(-1, 6)}, "'seqused_k': expected 0 to 11 at index 0, got -1"),
    ({"seqused_k": int32(1, 2, 3)}, "'seqused_k': expected [2], one length for each request, got [3]"),
    ({"seqused_k": int32(1, 2).long()}, "'seqused_k': expected int32, got torch.int64"),
    ({"seqused_k": int32(1, 2).to("meta")}, "'seqused_k': expected a tensor on the CPU, got meta"),
    ({"seqused_k": int32(1, 2)[None]}, "'seqused_k': expected 1 dimensions"),
    ({"seqused_k": int32(1, 2), "cu_seqlens_q": int32(0, 13, 12)}, "'cu_seqlens_q': expected >= 13 at index 2, got 12"),
    ({"seqused_k": int32(1, 2), "cu_seqlens_q": int32()}, "'cu_seqlens_q': expected [B + 1], got [0]"),
    ({"seqused_k": int32(1, 2), "cu_seqlens_k": int32(0, 20)}, "'cu_seqlens_k': expected [3], as cu_seqlens_q, got"),
    ({"seqused_k": int32(1, 2), "cu_seqlens_k": int32(0, 11, 21)}, "'cu_seqlens_k': expected at most 20 keys"),
])  # fmt: skip
def test_bad_used_lengths_are_named(options, text):
    q, k, v = ragged()
    arguments = {"cu_seqlens_q": STARTS, "cu_seqlens_k": KEYS, "max_seqlen_q": 7, "max_seqlen_k": 11, **options}
    message = error_of(InvalidArgument, lambda: fa3.flash_attn_varlen_func(q, k, v, **arguments))
    assert message.startswith("[flash_attn_varlen_func]") and text in message


def test_kvcache_appends_dense_and_paged():
    q, new_k, new_v = qkv(sq=3, sk=3)
    table = int32(5, 2, 0, 7).reshape(2, 2)
    k, v = randn(2, 21, 2, 32, seed=4), randn(2, 21, 2, 32, seed=5)
    dense = torch.cat([k, torch.zeros(2, 11, 2, 32)], 1), torch.cat([v, torch.zeros(2, 11, 2, 32)], 1)
    pages = paged(k, table, 9, 16), paged(v, table, 9, 16)
    expected, expected_lse = batched(q, torch.cat([k, new_k], 1), torch.cat([v, new_v], 1), causal=True)
    for caches, page_table in ((dense, None), (pages, table)):
        out, lse = fa3.flash_attn_with_kvcache(
            q, *caches, new_k, new_v, cache_seqlens=21, page_table=page_table, causal=True, return_softmax_lse=True
        )
        assert_close(out, expected)
        assert_close(lse, expected_lse)
    assert torch.equal(pages[0][2, 5:8], new_k[0]) and torch.equal(dense[1][1, 21:24], new_v[1])


def test_kvcache_of_ragged_queries_over_fp8_pages():
    scales = torch.tensor([[0.5, 2.0], [1.5, 0.25]])
    q, k, v = qkv(sk=21)
    codes, values = descaled(scales, k, v)
    table = int32(5, 2, 0, 7).reshape(2, 2)
    pages = [paged(c.float(), table, 9, 16).to(torch.float8_e4m3fn) for c in codes]
    flat = torch.cat([q[0], q[1, :5]])
    out, lse = fa3.flash_attn_with_kvcache(
        flat,
        *pages,
        cache_seqlens=int32(21, 13),
        page_table=table,
        cu_seqlens_q=STARTS,
        max_seqlen_q=7,
        causal=True,
        k_descale=scales,
        v_descale=scales,
        return_softmax_lse=True,
    )
    assert lse.shape == (4, 12)
    for b, (begin, sq, sk) in enumerate(((0, 7, 21), (7, 5, 13))):
        expected, expected_lse = attention(q[b, :sq], values[0][b, :sk], values[1][b, :sk], causal=True)
        assert_close(out[begin : begin + sq], expected, 1e-4)
        assert_close(lse[:, begin : begin + sq], expected_lse, 1e-4)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_combine_merges_splits(batch):
    out = randn(3, *batch, 5, 4, 16, seed=1)
    lse = randn(3, *batch, 5, 4, seed=2)
    lse[:, ..., 0, 1] = -math.inf
    lse[1, ..., 2, 2] = -math.inf
    weights = torch.nan_to_num(torch.softmax(lse.double(), 0))
    merged, merged_lse = fa3.flash_attn_combine(out, lse)
    assert_close(merged, (weights[..., None] * out.double()).sum(0))
    assert_close(merged_lse, torch.logsumexp(lse.double(), 0))
    target = torch.empty(*batch, 5, 4, 16)
    assert fa3.flash_attn_combine(out, lse, out=target)[0] is target and torch.equal(target, merged)
    assert fa3.flash_attn_combine(out, lse, out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("splits", [1, 2])
def test_combine_reads_no_row_without_keys(splits):
    out, lse = torch.full((splits, 5, 4, 16), math.nan), torch.full((splits, 5, 4), -math.inf)
    out[0, 1:], lse[0, 1:] = randn(4, 4, 16, seed=1), randn(4, 4, seed=2)
    merged, merged_lse = fa3.flash_attn_combine(out, lse)
    assert (merged[0] == 0).all() and (merged_lse[0] == -math.inf).all()
    assert torch.equal(merged[1:], out[0, 1:]) and torch.equal(merged_lse[1:], lse[0, 1:])


def test_batches_are_equal():
    q, k, v = qkv()
    call = lambda: fa3.flash_attn_func(q, torch.cat([k, k]), torch.cat([v, v]))
    assert "[flash_attn_func] argument 'k': expected a batch of 2" in error_of(InvalidArgument, call)
    call = lambda: fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=2**40)
    assert "[flash_attn_with_kvcache] argument 'cache_seqlens'" in error_of(InvalidArgument, call)


def test_errors_speak_of_no_argument_that_the_function_lacks():
    q, pages, table = qkv(sq=3)[0], torch.zeros(9, 16, 2, 32), int32(0, 1)[:, None]
    text = error_of(InvalidArgument, lambda: fa3.flash_attn_with_kvcache(q, pages, pages, page_table=table))
    assert "'cache_seqlens': expected given with a page_table" in text and "block_table" not in text


def test_flash_attention_3_names_what_it_does_not_do():
    q, k, v = qkv()
    for name, call in {
        "qv": lambda: fa3.flash_attn_func(q, k, v, qv=q),
        "attention_chunk": lambda: fa3.flash_attn_func(q, k, v, attention_chunk=8),
        "rotary_seqlens": lambda: fa3.flash_attn_with_kvcache(q, k, v, rotary_seqlens=int32(1, 1)),
        "cu_seqlens_k_new": lambda: fa3.flash_attn_with_kvcache(q, k, v, cu_seqlens_k_new=int32(0, 1)),
        "k_descale": lambda: fa3.flash_attn_with_kvcache(q, k, v, k_descale=torch.ones(2, 2)),
        "cu_seqlens_q": lambda: fa3.flash_attn_with_kvcache(ragged()[0], k, v, cu_seqlens_q=STARTS),
    }.items():
        assert f"'{name}'" in error_of(Unsupported, call)
    chunks = lambda: fa3.get_scheduler_metadata(2, 1, 9, 4, 2, 32, int32(9, 9), attention_chunk=8)
    assert "'attention_chunk'" in error_of(Unsupported, chunks)
    assert "'q_descale'" in error_of(InvalidArgument, lambda: fa3.flash_attn_func(q, k, v, q_descale=torch.ones(2, 2)))
    bad = lambda: fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=int32(12, 1))
    assert "argument 'cache_seqlens'" in error_of(InvalidArgument, bad)
    assert "'lse_partial'" in error_of(InvalidArgument, lambda: fa3.flash_attn_combine(q[None], randn(1, 2, 7, 3)))
    assert "'headdim'" in error_of(InvalidType, lambda: fa3.get_scheduler_metadata(2, 1, 9, 4, 2, "32", int32(9, 9)))
    assert fa3.get_scheduler_metadata(2, 1, 9, 4, 2, 32, int32(9, 9)) is None


def vllm_call(**options):
    return vfa.flash_attn_varlen_func(*ragged(), 7, STARTS, 11, KEYS, return_softmax_lse=True, **options)


def test_vllm_varlen():
    slopes = randn(4, seed=9).abs()
    for options, written_out in (
        ({"causal": True}, {"causal": True}),
        ({"window_size": [3, 0], "causal": True}, {"window": (3, 0), "causal": True}),
        ({"alibi_slopes": slopes, "softcap": 2.0}, {"slopes": slopes, "softcap": 2.0}),
    ):
        out, lse = vllm_call(**options)
        expected, expected_lse = expected_ragged(**written_out)
        assert_close(out, expected)
        assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_sinks_are_in_the_lse(dtype):
    sinks = randn(4, seed=8).to(dtype)
    out, lse = vllm_call(s_aux=sinks, fa_version=3, causal=True)
    expected, expected_lse = expected_ragged(sinks=sinks.float(), causal=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


def test_vllm_rows_without_keys_follow_the_version():
    q, k, v = ragged()
    keys = int32(0, 0, 20)
    for version, empty in ((2, math.inf), (3, -math.inf)):
        out, lse = vfa.flash_attn_varlen_func(q, k, v, 7, STARTS, 20, keys, return_softmax_lse=True, fa_version=version)
        assert (out[:7] == 0).all() and (lse[:, :7] == empty).all() and torch.isfinite(lse[:, 7:]).all()


def test_vllm_paged_cache_into_out():
    q, k, v = qkv(sk=21)
    table = int32(5, 2, 0, 7).reshape(2, 2)
    out = torch.full((14, 4, 32), math.nan)
    got = vfa.flash_attn_varlen_func(
        q.reshape(14, 4, 32),
        paged(k, table, 9, 16),
        paged(v, table, 9, 16),
        7,
        int32(0, 7, 14),
        21,
        seqused_k=int32(21, 13),
        block_table=table,
        causal=True,
        out=out,
    )
    assert got is out
    for b, length in enumerate((21, 13)):
        expected, _ = attention(q[b], k[b, :length], v[b, :length], causal=True)
        assert_close(out[7 * b : 7 * b + 7], expected)


def test_vllm_rules_of_arguments():
    q, k, v = ragged()
    sinks = randn(4)
    for name, options in {
        "s_aux": {"s_aux": sinks},
        "num_splits": {"num_splits": 2},
        "alibi_slopes": {"alibi_slopes": sinks, "fa_version": 3},
        "fa_version": {"fa_version": 4},
        "dropout_p": {"dropout_p": 0.5},
        "q_v": {"q_v": q},
        "return_attn_probs": {"return_attn_probs": True},
        "cp_world_size": {"cp_world_size": 2},
        "cp_tot_seqused_k": {"cp_tot_seqused_k": int32(1, 1)},
    }.items():
        assert f"'{name}'" in error_of(Unsupported, lambda options=options: vllm_call(**options))
    both = lambda: vfa.flash_attn_varlen_func(q, k, v, 7, STARTS, 11, KEYS, int32(11, 9))
    assert "got both" in error_of(InvalidArgument, both)
    assert "got neither" in error_of(InvalidArgument, lambda: vfa.flash_attn_varlen_func(q, k, v, 7, STARTS, 11))
    assert vfa.is_fa_version_supported(3) and not vfa.is_fa_version_supported(4)
    assert "cuda" in vfa.fa_version_unsupported_reason(2, "cuda:0")
    assert vfa.get_scheduler_metadata(2, 1, 9, 4, 2, 32, int32(9, 9)) is None


def test_vllm_order_of_parameters_is_its_own():
    names = list(inspect.signature(vfa.flash_attn_varlen_func).parameters)
    assert names[:8] == ["q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "seqused_k"]
    assert names[-6:] == ["num_splits", "fa_version", "s_aux", "cp_world_size", "cp_rank", "cp_tot_seqused_k"]
    names = list(inspect.signature(fa3.flash_attn_func).parameters)
    assert names[:6] == ["q", "k", "v", "softmax_scale", "causal", "qv"]
