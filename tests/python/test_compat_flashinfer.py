# SPDX-License-Identifier: Apache-2.0
"""attend.compat.flashinfer against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from flash_helpers import assert_close, attention, error_of

from attend.compat import flashinfer as fi
from attend.errors import Error, InvalidArgument, InvalidType, Unsupported

PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 32
LENGTHS = (9, 4, 0, 1)  # keys of the requests: a partly filled last page, a full one, none, one key
WORKSPACE = torch.empty(0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


class Cache:
    """Keys and values of requests on shuffled pages; NaN where nothing is."""

    def __init__(self, lengths=LENGTHS, layout="NHD"):
        self.k = [randn(n, KV_HEADS, DIM, seed=10 + i) for i, n in enumerate(lengths)]
        self.v = [randn(n, KV_HEADS, DIM, seed=20 + i) for i, n in enumerate(lengths)]
        counts = [(n + PAGE - 1) // PAGE for n in lengths]
        self.indptr = int32(*torch.tensor([0, *counts]).cumsum(0).tolist())
        total = sum(counts)
        self.indices = torch.randperm(total + 3, generator=torch.Generator().manual_seed(1))[:total].int()
        self.last = int32(*[n - PAGE * (c - 1) if c else 0 for n, c in zip(lengths, counts)])
        self.pages = torch.full((total + 3, 2, PAGE, KV_HEADS, DIM), math.nan)
        for r, n in enumerate(lengths):
            for i in range(n):
                page = self.indices[self.indptr[r] + i // PAGE]
                self.pages[page, 0, i % PAGE], self.pages[page, 1, i % PAGE] = self.k[r][i], self.v[r][i]
        if layout == "HND":
            self.pages = self.pages.transpose(2, 3).contiguous()

    def table(self):
        return self.indptr, self.indices, self.last


def expected(queries, cache, **options):
    """(out, lse in base 2) of the queries of each request."""
    out, lse = zip(*(attention(q, k, v, **options) for q, k, v in zip(queries, cache.k, cache.v)))
    return torch.cat(out), torch.cat(lse, 1).T / math.log(2)


DECODES = {
    "plain": ({}, {}),
    "window": ({"window_left": 2}, {"window": (2, -1)}),
    "softcap": ({"logits_soft_cap": 2.0}, {"softcap": 2.0}),
    "scale": ({"sm_scale": 0.3}, {"scale": 0.3}),
}


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", DECODES)
def test_decode(name, layout):
    options, written_out = DECODES[name]
    cache = Cache(layout=layout)
    queries = [randn(1, HEADS, DIM, seed=i) for i in range(4)]
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.plan(*cache.table(), HEADS, KV_HEADS, DIM, PAGE, q_data_type="float32", **options)
    out, lse = wrapper.run(torch.cat(queries), cache.pages, return_lse=True)
    want, want_lse = expected(queries, cache, **written_out)
    assert_close(out, want)
    assert_close(lse, want_lse)
    assert (out[2] == 0).all() and (lse[2] == -math.inf).all(), "the request without keys"
    pair = cache.pages[:, 0].contiguous(), cache.pages[:, 1].contiguous()
    assert torch.equal(wrapper.run(torch.cat(queries), pair), out)


def test_decode_of_several_tokens_scales_sinks_and_given_results():
    cache = Cache((9, 4, 3, 7))
    queries = [randn(3, HEADS, DIM, seed=i) for i in range(4)]
    sinks = randn(HEADS, seed=8)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*cache.table(), HEADS, KV_HEADS, DIM, PAGE, data_type=torch.float32, q_len_per_req=3)
    out, lse = torch.full((12, HEADS, DIM), math.nan), torch.full((12, HEADS), math.nan)
    got = wrapper.run(
        torch.cat(queries),
        cache.pages,
        q_scale=0.5,
        k_scale=torch.tensor(2.0),
        v_scale=3.0,
        out=out,
        lse=lse,
        sinks=sinks,
    )
    want, want_lse = expected(queries, cache, causal=True, sinks=sinks)
    assert got is out
    assert_close(out, 3 * want, 1e-4)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
def test_paged_prefill(causal, layout):
    cache = Cache((9, 4, 6, 3), layout)
    lengths = (4, 4, 0, 5)  # the last has more queries than keys
    queries = [randn(n, HEADS, DIM, seed=i) for i, n in enumerate(lengths)]
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, layout)
    wrapper.plan(
        int32(0, 4, 8, 8, 13),
        *cache.table(),
        HEADS,
        KV_HEADS,
        DIM,
        PAGE,
        causal=causal,
        window_left=3,
        q_data_type=torch.float32,
    )
    out, lse = wrapper.run(torch.cat(queries), cache.pages, return_lse=True)
    want, want_lse = expected(queries, cache, causal=causal, window=(3, -1))
    assert_close(out, want)
    assert_close(lse, want_lse)
    free = wrapper.run(torch.cat(queries), cache.pages, window_left=-1)
    assert_close(free, expected(queries, cache, causal=causal)[0])


def test_fp8_pages():
    cache = Cache((9, 5))
    pages = cache.pages.to(torch.float8_e4m3fn)
    cache.k, cache.v = ([t.to(torch.float8_e4m3fn).float() for t in rows] for rows in (cache.k, cache.v))
    queries = [randn(2, HEADS, DIM, seed=i) for i in range(2)]
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(
        int32(0, 2, 4),
        *cache.table(),
        HEADS,
        KV_HEADS,
        DIM,
        PAGE,
        causal=True,
        q_data_type="float32",
        kv_data_type="float8_e4m3fn",
    )
    out = wrapper.run(torch.cat(queries), pages, k_scale=0.5, v_scale=2.0)
    assert_close(out, 2 * expected(queries, cache, causal=True, scale=0.5 / math.sqrt(DIM))[0], 1e-4)


def test_ragged_and_single_prefill():
    cache = Cache((9, 5))
    queries = [randn(n, HEADS, DIM, seed=i) for i, n in enumerate((3, 5))]
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(int32(0, 3, 8), int32(0, 9, 14), HEADS, KV_HEADS, DIM, causal=True, q_data_type="float32")
    out, lse = wrapper.run(torch.cat(queries), torch.cat(cache.k), torch.cat(cache.v), return_lse=True)
    want, want_lse = expected(queries, cache, causal=True)
    assert_close(out, want)
    assert_close(lse, want_lse)
    single, single_lse = fi.single_prefill_with_kv_cache(
        queries[1],
        cache.k[1].transpose(0, 1),
        cache.v[1].transpose(0, 1),
        causal=True,
        kv_layout="HND",
        return_lse=True,
    )
    assert torch.equal(single, out[3:]) and torch.equal(single_lse, lse[3:])
    last, last_lse = fi.single_decode_with_kv_cache(queries[1][-1], cache.k[1], cache.v[1], return_lse=True)
    assert torch.equal(last, out[-1]) and torch.equal(last_lse, lse[-1])
    assert_close(
        fi.single_decode_with_kv_cache(queries[1][-1], cache.k[1], cache.v[1], window_left=1, v_scale=2.0),
        2 * attention(queries[1][-1:], cache.k[1], cache.v[1], window=(1, -1))[0][0],
    )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append(layout):
    cache, target = Cache(layout=layout), Cache(layout=layout)
    target.pages.fill_(math.nan)
    appended = int32(0, 3, 7, 7, 8)  # the last 3, 4, 0 and 1 tokens
    lengths = fi.get_seq_lens(cache.indptr, cache.last, PAGE)
    assert lengths.tolist() == list(LENGTHS)
    requests, positions = fi.get_batch_indices_positions(appended, lengths, 8)
    assert requests.tolist() == [0, 0, 0, 1, 1, 1, 1, 3] and positions.tolist() == [6, 7, 8, 0, 1, 2, 3, 0]
    rows = [torch.cat([r[len(r) - n :] for r, n in zip(t, (3, 4, 0, 1))]) for t in (cache.k, cache.v)]
    fi.append_paged_kv_cache(*rows, requests, positions, target.pages, cache.indices, cache.indptr, cache.last, layout)
    pages, got = (p.transpose(2, 3) if layout == "HND" else p for p in (cache.pages, target.pages))
    written = torch.zeros(pages.shape[0], PAGE, dtype=torch.bool)
    for r, p in zip(requests.tolist(), positions.tolist()):
        written[cache.indices[cache.indptr[r] + p // PAGE], p % PAGE] = True
    assert torch.equal(got.movedim(1, 2)[written], pages.movedim(1, 2)[written])
    assert torch.isnan(got.movedim(1, 2)[~written]).all(), "nothing else is written"


def states(n=5, count=3):
    v, s = randn(n, count, HEADS, 16, seed=1), 3 * randn(n, count, HEADS, seed=2)
    s[0, 1, 2] = s[1, :, 1] = -math.inf
    weights = torch.nan_to_num(torch.softmax(s.double() * math.log(2), 1))
    want = (weights[..., None] * v.double()).sum(1)
    return v, s, want, torch.logsumexp(s.double() * math.log(2), 1) / math.log(2)


def test_merge_states_in_base_2():
    v, s, want, want_lse = states()
    out, lse = fi.merge_states(v, s)
    assert_close(out, want)
    assert_close(lse, want_lse)
    v, s, want, want_lse = states(count=2)
    out, lse = fi.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert_close(out, want)
    assert_close(lse, want_lse)
    mask = torch.tensor([True, False, True, True, False])
    a, b = v[:, 0].clone(), s[:, 0].clone()
    fi.merge_state_in_place(a, b, v[:, 1], s[:, 1], mask)
    assert torch.equal(a[mask], out[mask]) and torch.equal(b[mask], lse[mask])
    assert torch.equal(a[~mask], v[:, 0][~mask]) and torch.equal(b[~mask], s[:, 0][~mask])


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_cascade_is_attention_to_all_keys_at_once(levels):
    """Two requests with their own keys behind one prefix of all, or behind two levels of it."""
    shared = Cache((8, 4))  # of both requests; of both again
    own = Cache((7, 3))
    own.indices += shared.pages.shape[0]
    pages = torch.cat([shared.pages, own.pages])
    queries = [randn(2, HEADS, DIM, seed=i) for i in range(2)]
    per_level = [
        (int32(0, 4), int32(0, 2), shared.indices[:2], int32(4)),
        (int32(0, 4), int32(0, 1), shared.indices[2:3], int32(4)),
        (int32(0, 2, 4), own.indptr, own.indices, own.last),
    ][3 - levels :]
    wrapper = fi.MultiLevelCascadeAttentionWrapper(levels, WORKSPACE)
    wrapper.plan(*map(list, zip(*per_level)), HEADS, KV_HEADS, DIM, PAGE, causal=True, q_data_type="float32")
    prefix = {1: [], 2: [1], 3: [0, 1]}[levels]
    flat = Cache((0, 0))
    for rows, shared_rows, own_rows in ((flat.k, shared.k, own.k), (flat.v, shared.v, own.v)):
        rows[:] = [torch.cat([*(shared_rows[i] for i in prefix), own_rows[r]]) for r in range(2)]
    assert_close(wrapper.run(torch.cat(queries), pages), expected(queries, flat, causal=True)[0])


def test_what_is_not_supported_or_wrong_is_named():
    cache = Cache()
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    q = randn(4, HEADS, DIM)
    assert "plan() first" in error_of(Error, lambda: wrapper.run(q, cache.pages))
    sizes = (HEADS, KV_HEADS, DIM, PAGE)
    for name, options in {
        "pos_encoding_mode": {"pos_encoding_mode": "ROPE_LLAMA"},
        "rope_theta": {"rope_theta": 1e4},
        "o_data_type": {"o_data_type": "bfloat16"},
        "window_right": {"window_right": 3},
        "block_tables": {"block_tables": int32(0)},
    }.items():
        assert f"'{name}'" in error_of(Unsupported, lambda o=options: wrapper.plan(*cache.table(), *sizes, **o))
    for name, table in {
        "indptr": (cache.indptr.flip(0), cache.indices, cache.last),
        "last_page_len": (cache.indptr, cache.indices, cache.last + 4),
        "indices": (cache.indptr, cache.indices.float(), cache.last),
    }.items():
        assert f"'{name}'" in error_of(InvalidArgument, lambda t=table: wrapper.plan(*t, *sizes))
    assert "'indptr'" in error_of(InvalidArgument, lambda: wrapper.plan(int32(0, 9), int32(1), int32(1), *sizes))
    assert "'head_dim'" in error_of(InvalidType, lambda: wrapper.plan(*cache.table(), 4, 2, "32", PAGE))
    wrapper.plan(*cache.table(), *sizes, q_data_type="float32")
    assert "'q'" in error_of(InvalidArgument, lambda: wrapper.run(q.half(), cache.pages))
    assert "'q'" in error_of(InvalidArgument, lambda: wrapper.run(q[:, :2], cache.pages))
    assert "'paged_kv_cache'" in error_of(InvalidArgument, lambda: wrapper.run(q, cache.pages[:, :, :2]))
    assert "'v_scale'" in error_of(Unsupported, lambda: wrapper.run(q, cache.pages, v_scale=torch.ones(2)))
    assert "'q_len_per_req'" in error_of(Unsupported, lambda: wrapper.run(q, cache.pages, q_len_per_req=2))
    wrapper.plan(cache.indptr, cache.indices + 100, cache.last, *sizes, q_data_type="float32")
    assert "'paged_kv_indices'" in error_of(InvalidArgument, lambda: wrapper.run(q, cache.pages))
    make = fi.BatchPrefillWithPagedKVCacheWrapper
    assert "'use_cuda_graph'" in error_of(Unsupported, lambda: make(WORKSPACE, "NHD", True))
    assert "'kv_layout'" in error_of(InvalidArgument, lambda: make(WORKSPACE, "BHND"))
    mask = torch.ones(4, dtype=torch.bool)
    call = lambda: fi.single_prefill_with_kv_cache(q, cache.k[0], cache.v[0], custom_mask=mask)
    assert "'custom_mask'" in error_of(Unsupported, call)
    v, s, _, _ = states()
    assert "'s_a'" in error_of(InvalidArgument, lambda: fi.merge_state(v[:, 0], s[:, 0].double(), v[:, 1], s[:, 1]))
    assert "'s'" in error_of(InvalidArgument, lambda: fi.merge_states(v, s[:, :2]))
    rows = randn(1, KV_HEADS, DIM)
    append = lambda r, p: fi.append_paged_kv_cache(
        rows, rows, int32(r), int32(p), cache.pages, cache.indices, cache.indptr, cache.last
    )
    assert "'positions'" in error_of(InvalidArgument, lambda: append(0, 9))
    assert "'batch_indices'" in error_of(InvalidArgument, lambda: append(4, 0))
    cascade = fi.MultiLevelCascadeAttentionWrapper(2, WORKSPACE)
    tables = ([int32(0, 4)], [cache.indptr], [cache.indices], [cache.last])
    assert "'qo_indptr_arr'" in error_of(InvalidArgument, lambda: cascade.plan(*tables, *sizes))


def test_pages_are_never_taken_for_others():
    cache = Cache((9, 4))
    rows = randn(1, KV_HEADS, DIM)
    append = lambda last, indices: fi.append_paged_kv_cache(
        rows, rows, int32(0), int32(5), cache.pages, indices, cache.indptr, last
    )
    before = cache.pages.clone()
    assert "'kv_last_page_len'" in error_of(InvalidArgument, lambda: append(int32(9, 4), cache.indices))
    assert "'kv_last_page_len'" in error_of(InvalidArgument, lambda: append(int32(1, 0), cache.indices))
    assert "'kv_indices'" in error_of(InvalidArgument, lambda: append(cache.last, cache.indices.long() + 2**32))
    assert torch.equal(cache.pages.nan_to_num(), before.nan_to_num())


def test_size_of_values_is_that_of_the_plan():
    k = randn(3, KV_HEADS, DIM)
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(int32(0, 3), int32(0, 3), HEADS, KV_HEADS, DIM, head_dim_vo=8, q_data_type="float32")
    assert "'head_dim_vo'" in error_of(InvalidArgument, lambda: wrapper.run(randn(3, HEADS, DIM), k, k))
    assert wrapper.run(randn(3, HEADS, DIM), k, k[..., :8].contiguous()).shape == (3, HEADS, 8)


def test_many_16_bit_states_are_rounded_once():
    v, s, _, _ = states(count=12)
    v = v.bfloat16()
    weights = torch.nan_to_num(torch.softmax(s.double() * math.log(2), 1))
    want = (weights[..., None] * v.double()).sum(1)
    out, _ = fi.merge_states(v, s)
    assert ((out.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5).all(), "half a unit in the last place"


def test_flags_and_rows_are_named():
    k, q = randn(3, KV_HEADS, DIM), randn(3, HEADS, DIM)
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    plan = (int32(0, 3), int32(0, 3), HEADS, KV_HEADS, DIM)
    assert "'causal'" in error_of(InvalidType, lambda: wrapper.plan(*plan, causal="no", q_data_type="float32"))
    wrapper.plan(*plan, q_data_type="float32")
    assert "'return_lse'" in error_of(InvalidType, lambda: wrapper.run(q, k, k, return_lse="x"))
    assert "argument 'k'" in error_of(InvalidArgument, lambda: wrapper.run(q, k[:, :1], k))
    assert "argument 'v'" in error_of(InvalidArgument, lambda: wrapper.run(q, k, k[:2]))


def test_single_prefill_speaks_of_its_own_arguments():
    q, k = torch.randn(3, 4, 16), torch.randn(5, 2, 16)
    cases = {
        "q": lambda: fi.single_prefill_with_kv_cache(q[:, :3], k, k),
        "scale_q": lambda: fi.single_prefill_with_kv_cache(q, k, k, scale_q="x"),
        "o_dtype": lambda: fi.single_prefill_with_kv_cache(q, k, k, o_dtype=torch.float16),
        "k": lambda: fi.single_prefill_with_kv_cache(q, k.half(), k.half()),
        "custom_mask": lambda: fi.single_prefill_with_kv_cache(q, k, k, custom_mask=torch.ones(3, 5) > 0),
    }
    for argument, call in cases.items():
        with pytest.raises(Error) as error:
            call()
        assert str(error.value).startswith(f"[single_prefill_with_kv_cache] argument '{argument}'"), error.value


def test_types_that_no_run_could_take_are_refused_by_the_plan():
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(0))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    for argument, types in {
        "q_data_type": {"q_data_type": torch.int8},
        "kv_data_type": {"q_data_type": torch.float32, "kv_data_type": torch.float16},
    }.items():
        with pytest.raises(Unsupported, match=f"argument '{argument}'"):
            wrapper.plan(starts, starts, 4, 2, 16, **types)
