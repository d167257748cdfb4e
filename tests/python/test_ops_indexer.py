# SPDX-License-Identifier: Apache-2.0
"""attend.ops of the indexer: codes, cache, logits, the choice of tokens, and their references."""

from __future__ import annotations

import math

import ml_dtypes
import numpy
import pytest
import torch
from mla_helpers import assert_error, e4m3, generator, i32, normal, prefix_sum

import attend
from attend import ops, oracle


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)


def encoded(x: torch.Tensor, smallest: float, power_of_two: bool):
    """Codes [N, 128] and scales [N] of rows of finite numbers."""
    scales = x.float().abs().amax(-1).clamp(min=smallest) / 448
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    return e4m3(x.float() / scales[:, None]), scales


def logits_of(q, k, k_scale, weights):
    """[M, Nk] in float64."""
    products = torch.einsum("mhd,nd->mhn", q.double(), k.double()).clamp(min=0)
    return torch.einsum("mhn,mh->mn", products, weights.double()) * k_scale.double()


def problem(rows=5, heads=4, keys=40, seed=1):
    q = e4m3(normal((rows, heads, 128), seed))
    k, k_scale = encoded(normal((keys, 128), seed + 1), 1e-4, False)
    return q, k, k_scale, normal((rows, heads), seed + 2)


def assert_in_bounds(logits: torch.Tensor, reference: oracle.Bounded) -> None:
    expected = reference.value
    seen = numpy.isfinite(expected)
    got = logits.double().numpy()
    assert (got[~seen] == expected[~seen]).all()
    assert (numpy.abs(got[seen] - expected[seen]) <= reference.bound[seen]).all()
    assert (reference.bound[seen] < 1e-3 * numpy.abs(expected[seen]).max()).all()


def test_logits_against_torch():
    q, k, k_scale, weights = problem()
    ks, ke = i32([0, 3, 10, 40, 7]), i32([40, 9, 10, 40, 33])
    poisoned = k.clone().view(torch.uint8)
    logits = ops.fp8_mqa_logits(q, k, k_scale, weights, ks, ke)
    j = torch.arange(40)
    visible = (j >= ks[:, None]) & (j < ke[:, None])
    expected = logits_of(q, k, k_scale, weights).masked_fill(~visible, -math.inf)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-4)
    reference = oracle.fp8_mqa_logits(q, k, k_scale, weights, ks, ke)
    numpy.testing.assert_allclose(reference.value, expected.numpy(), rtol=1e-12, atol=1e-12)
    assert_in_bounds(logits, reference)
    # Without cleaning the places of other keys are not touched, nor are keys read that nobody sees.
    poisoned[~visible.any(0)] = 0x7F
    given = torch.full((5, 40), 77.0)
    ops.fp8_mqa_logits(
        q, poisoned.view(torch.float8_e4m3fn), k_scale, weights, ks, ke, clean_logits=False, logits=given
    )
    assert torch.equal(given[visible], logits[visible]) and (given[~visible] == 77).all()


def test_numpy_has_the_bits_of_torch():
    q, k, k_scale, weights = problem()
    ks, ke = i32([0, 3, 10, 40, 7]), i32([40, 9, 10, 40, 33])
    logits = ops.fp8_mqa_logits(q, k, k_scale, weights, ks, ke)
    codes = [t.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) for t in (q, k)]
    arrays = ops.fp8_mqa_logits(*codes, *(t.numpy() for t in (k_scale, weights, ks, ke)))
    assert isinstance(arrays, numpy.ndarray) and (arrays == logits.numpy()).all()
    chosen = ops.top_k_per_row_prefill(arrays, ks.numpy(), ke.numpy(), 4)
    assert (chosen == ops.top_k_per_row_prefill(logits, ks, ke, 4).numpy()).all()


def indexer_cache(lengths, block=8, seed=3):
    """Keys of requests in an indexer's cache: (cache, table, codes and scales of each request)."""
    widest = max(-(-n // block) for n in lengths)
    count = len(lengths) * widest + 2
    blocks = torch.randperm(count, generator=generator(seed))[: len(lengths) * widest].view(len(lengths), widest)
    cache = torch.full((count, block, 132), 0x7F, dtype=torch.uint8)
    keys = []
    for r, n in enumerate(lengths):
        k = normal((n, 128), seed + r)
        slots = torch.tensor([int(blocks[r, j // block]) * block + j % block for j in range(n)], dtype=torch.int64)
        ops.indexer_k_quant_and_cache(k, cache, slots)
        keys.append(encoded(k, 1e-4, False))
    return cache, blocks.to(torch.int32), keys


@pytest.mark.parametrize("next_n", [1, 3])
@pytest.mark.parametrize("per_token", [False, True])
def test_paged_logits(next_n, per_token):
    lengths = [19, 2, 24]
    cache, table, keys = indexer_cache(lengths)
    q = e4m3(normal((3, next_n, 4, 128), 1))
    weights = normal((3 * next_n, 4), 2)
    context_lens = i32([[max(0, n - 2 * i) for i in range(next_n)] for n in lengths]) if per_token else i32(lengths)
    schedule = ops.get_paged_mqa_logits_metadata(context_lens, 8, 5)
    logits = ops.fp8_paged_mqa_logits(q, cache, weights, context_lens, table, 30, schedule_metadata=schedule)
    for r, (k, k_scale) in enumerate(keys):
        for n in range(next_n):
            seen = int(context_lens[r, n]) if per_token else max(0, lengths[r] - next_n + n + 1)
            row = logits[r * next_n + n]
            expected = logits_of(
                q[r, n : n + 1], k[:seen], k_scale[:seen], weights[r * next_n + n : r * next_n + n + 1]
            )
            torch.testing.assert_close(row[:seen].double(), expected[0], rtol=1e-5, atol=1e-4)
            assert torch.isneginf(row[seen:]).all()
            same = ops.fp8_mqa_logits(
                q[r, n : n + 1], k, k_scale, weights[r * next_n + n : r * next_n + n + 1], i32([0]), i32([seen])
            )
            assert torch.equal(row[:seen], same[0, :seen])
    assert_in_bounds(logits, oracle.fp8_paged_mqa_logits(q, cache, weights, context_lens, table, 30))
    given = torch.full((3 * next_n, 30), 77.0)
    ops.fp8_paged_mqa_logits(q, cache[:, :, None], weights, context_lens, table, clean_logits=False, logits=given)
    assert torch.equal(given.masked_fill(given == 77, -math.inf), logits) and (given == 77).any()


def test_schedule_of_paged_logits():
    lengths = [100, 0, 17, 260]
    schedule = ops.get_paged_mqa_logits_metadata(i32(lengths), 8, 5).tolist()
    segments = [(r, s) for r, n in enumerate(lengths) for s in range(-(-n // 32))]  # 4 blocks of 8
    size, more = divmod(len(segments), 5)
    at, starts = 0, []
    for part in range(5):
        starts.append(at)
        at += size + (part < more)
    assert [tuple(row) for row in schedule[:5]] == [segments[s] for s in starts]
    lists = ops.get_paged_mqa_logits_metadata(i32([[90, 100], [0, 0], [1, 17], [2, 260]]), 8, 5)
    assert lists.tolist() == schedule
    other = ops.get_paged_mqa_logits_metadata(i32([50, 0, 17, 260]), 8, 5)
    q = e4m3(normal((4, 1, 2, 128), 1))
    cache = torch.zeros(40, 8, 132, dtype=torch.uint8)
    table = torch.arange(4 * 40, dtype=torch.int32).view(4, 40) % 40
    call = lambda s: ops.fp8_paged_mqa_logits(q, cache, torch.ones(4, 2), i32(lengths), table, 300, schedule_metadata=s)
    call(i32(schedule))
    assert_error(lambda: call(other), attend.InvalidArgument, "fp8_paged_mqa_logits", "schedule_metadata")


@pytest.mark.parametrize("scale_fmt", ["unrounded", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cache_of_keys(dtype, scale_fmt):
    k = (normal((10, 128), 1) * torch.logspace(-6, 3, 10)[:, None]).to(dtype)
    slots = torch.tensor([3, 17, 0, -1, 9, 23, 8, 11, 2, 20])
    cache = torch.full((3, 8, 132), 5, dtype=torch.uint8)
    ops.indexer_k_quant_and_cache(k, cache, slots, scale_fmt=scale_fmt)
    codes, scales = encoded(k, 1e-4, scale_fmt == "ue8m0")
    reference_codes, reference_scales = oracle.indexer_codes(k.float(), scale_fmt=scale_fmt)
    assert (reference_codes == bits(codes).numpy()).all() and (reference_scales == scales.numpy()).all()
    flat = cache.view(3, 8 * 132)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, 8)
            assert torch.equal(flat[block, offset * 128 : offset * 128 + 128], bits(codes[t]))
            at = 8 * 128 + offset * 4
            assert torch.equal(flat[block, at : at + 4], bits(scales[t : t + 1]))
    assert (flat[0, 128:256] == 5).all()  # slot 1
    dst_k, dst_scale = e4m3(torch.zeros(9, 128)), torch.full((9,), -1.0)
    ops.cp_gather_indexer_k_quant_cache(cache, dst_k, dst_scale, i32([[2, 0], [1, 0]]), prefix_sum([5, 2]))
    assert torch.equal(bits(dst_k[4]), bits(codes[9])) and dst_scale[4] == scales[9]  # block 2, offset 4
    assert torch.equal(bits(dst_k[5]), bits(codes[6])) and dst_scale[5] == scales[6]  # block 1, offset 0
    assert (dst_scale[7:] == -1).all()


@pytest.mark.parametrize(
    "options",
    [dict(), dict(is_neox=False), dict(hadamard=True, q_scale_fmt="unrounded"), dict(softmax_scale=0.5)],
    ids=lambda o: "-".join(o) or "plain",
)
def test_prepare(options):
    tokens, heads = 6, 3
    q, k, weights = normal((tokens, heads, 128), 1), normal((tokens, 128), 2), normal((tokens, heads), 3)
    norm_weight, norm_bias = 1 + 0.1 * normal((128,), 4), normal((128,), 5)
    positions = torch.tensor([0, 5, 9, 1, 30, 2])
    angles = torch.outer(torch.arange(32.0), 10000 ** (-torch.arange(32.0) / 32))
    table = torch.cat([angles.cos(), angles.sin()], -1)
    codes, weights_out, keys = ops.prepare_indexer(q, k, weights, positions, table, norm_weight, norm_bias, **options)

    def rotated(x):
        cos, sin = (t.view(tokens, *[1] * (x.dim() - 2), 32) for t in table[positions].double().chunk(2, -1))
        a, b = (x[..., :32], x[..., 32:64]) if options.get("is_neox", True) else (x[..., :64:2], x[..., 1:64:2])
        c, d = a * cos - b * sin, b * cos + a * sin
        turned = torch.cat([c, d], -1) if options.get("is_neox", True) else torch.stack([c, d], -1).flatten(-2)
        return torch.cat([turned, x[..., 64:]], -1)

    def transformed(x):
        if not options.get("hadamard"):
            return x
        h = torch.ones(1, 1).double()
        while len(h) < 128:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
        return x @ h * 128**-0.5

    normed = torch.nn.functional.layer_norm(k.double(), (128,), norm_weight.double(), norm_bias.double(), 1e-6)
    expected_k, expected_q = transformed(rotated(normed)), transformed(rotated(q.double()))
    torch.testing.assert_close(keys.double(), expected_k, rtol=1e-5, atol=1e-5)
    chosen = {name: options[name] for name in ("is_neox", "hadamard") if name in options}
    reference = oracle.prepare_indexer(q, k, weights, positions, table, norm_weight, norm_bias, **chosen)
    assert (numpy.abs(keys.double().numpy() - reference.k.value) <= reference.k.bound).all()
    numpy.testing.assert_allclose(reference.q.value, expected_q.numpy(), rtol=1e-5, atol=1e-5)
    fmt = options.get("q_scale_fmt", "ue8m0")
    want_codes, scales = encoded(expected_q.view(-1, 128), 1e-10, fmt == "ue8m0")
    close = (codes.double().view(-1, 128) * scales[:, None] - expected_q.view(-1, 128)).abs()
    assert (close <= 0.07 * expected_q.view(-1, 128).abs() + scales[:, None] * 2**-9).all()
    if not options.get("hadamard"):
        exact = oracle.indexer_codes(
            torch.from_numpy(reference.q.value).view(-1, 128).float(), scale_fmt=fmt, queries=True
        )
        assert (bits(codes).view(-1, 128).numpy() == exact[0]).all()
        assert (bits(codes).view(-1, 128) == bits(want_codes)).float().mean() > 0.98
    factor = options.get("softmax_scale", 128**-0.5) * heads**-0.5
    torch.testing.assert_close(weights_out, weights * scales.view(tokens, heads) * factor, rtol=1e-5, atol=1e-9)


# The choice.


def test_top_k_prefill():
    logits = normal((4, 50), 1)
    starts, ends = i32([0, 10, 20, 7]), i32([50, 45, 24, 7])
    logits[0, 13] = math.nan
    for row, (a, b) in enumerate(zip(starts.tolist(), ends.tolist())):
        logits[row, :a] = logits[row, b:] = 1e9  # not of the row
    out = ops.top_k_per_row_prefill(logits, starts, ends, 8)
    for row, (a, b) in enumerate(zip(starts.tolist(), ends.tolist())):
        values = logits[row, a:b].nan_to_num(-math.inf)
        best = sorted(torch.topk(values, min(8, b - a)).indices.tolist())
        expected = best + [-1] * (8 - len(best))
        assert out[row].tolist() == expected == oracle.top_k(logits[row, a:b], 8)
    bounds = [0.0] * 35
    chosen, row = out[1].tolist(), logits[1, 10:45]
    assert oracle.may_be_top_k(row, bounds, chosen)
    worse = int(row.argmin())
    wrong = sorted([*chosen[1:], worse])
    assert not oracle.may_be_top_k(row, bounds, wrong) and oracle.may_be_top_k(row, [9.0] * 35, wrong)
    assert not oracle.may_be_top_k(row, bounds, chosen[::-1]) and not oracle.may_be_top_k(row, bounds, [99] * 8)


def test_top_k_ties_and_decode():
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 3.0, 9.0], [0.0, -0.0, 0.0, 5.0, 5.0, 5.0, 9.0]])
    assert ops.top_k_per_row_decode(logits, i32([6]), 2, next_n=2).tolist() == [[1, 2], [3, 4]]
    memory = torch.full((2, 4), 5, dtype=torch.int32)
    out = ops.top_k_per_row_decode(logits, i32([3, 0]), out=memory[:, :3])
    assert out.tolist() == [[0, 1, 2], [-1, -1, -1]] and (memory[:, 3] == 5).all()


def test_short_rows():
    out = torch.full((4, 3), 9, dtype=torch.int32)
    assert ops.indexer_short_rows(i32([2, 4, -1, 3]), out) == 1
    assert out.tolist() == [[0, 1, -1], [9, 9, 9], [-1, -1, -1], [0, 1, 2]]


def test_the_whole_way():
    """Keys into the cache, logits, choice, rows: the rows of the highest logits are those that attention reads."""
    lengths = [21, 13]
    cache, table, keys = indexer_cache(lengths)
    q, weights = e4m3(normal((2, 1, 4, 128), 8)), normal((2, 4), 9).abs()
    logits = ops.fp8_paged_mqa_logits(q, cache, weights, i32(lengths), table, 24)
    tokens = ops.top_k_per_row_decode(logits, i32(lengths), 5)
    rows = ops.convert_req_index_to_global_index(i32([0, 1]), table, tokens, block_size=8, num_blocks=len(cache))
    for r, (k, k_scale) in enumerate(keys):
        expected = logits_of(q[r], k, k_scale, weights[r : r + 1])[0]
        best = sorted(torch.topk(expected, 5).indices.tolist())
        assert tokens[r].tolist() == best
        assert rows[r].tolist() == [int(table[r, t // 8]) * 8 + t % 8 for t in best]


def test_errors():
    q, k, k_scale, weights = problem()
    ks, ke = i32([0] * 5), i32([40] * 5)
    invalid = attend.InvalidArgument

    def logits(**changes):
        arguments = dict(q=q, k=k, k_scale=k_scale, weights=weights, ks=ks, ke=ke)
        return lambda: ops.fp8_mqa_logits(**{**arguments, **changes})

    assert_error(logits(ke=i32([41] * 5)), invalid, "fp8_mqa_logits", "ke")
    assert_error(logits(q=q.float()), invalid, "fp8_mqa_logits", "q")
    assert_error(logits(isa="z80"), invalid, "fp8_mqa_logits", "isa")
    assert_error(lambda: ops.top_k_per_row_prefill(weights, ks, ke), attend.InvalidType, "top_k_per_row_prefill", "k")
    assert_error(lambda: ops.top_k_per_row_prefill(weights, ks, ks, 0), invalid, "top_k_per_row_prefill", "k")
    assert_error(
        lambda: ops.top_k_per_row_prefill(weights, ks, ks, 2, out=torch.zeros(5, 3, dtype=torch.int32)),
        invalid,
        "top_k_per_row_prefill",
        "k",
    )
    assert_error(
        lambda: ops.top_k_per_row_decode(weights, i32([9] * 5), 2), invalid, "top_k_per_row_decode", "seq_lens"
    )
    cache = torch.zeros(3, 8, 132, dtype=torch.uint8)
    assert_error(
        lambda: ops.indexer_k_quant_and_cache(k.float(), cache, torch.zeros(40).long(), scale_fmt="e8"),
        invalid,
        "indexer_k_quant_and_cache",
        "scale_fmt",
    )
    assert_error(
        lambda: ops.get_paged_mqa_logits_metadata(i32([4]), 0, 3),
        invalid,
        "get_paged_mqa_logits_metadata",
        "block_size",
    )
    assert_error(
        lambda: ops.get_paged_mqa_logits_metadata(i32([4]), None, 3),
        invalid,
        "get_paged_mqa_logits_metadata",
        "block_size",
    )
    assert_error(lambda: oracle.indexer_codes(k.float()[:, :64]), invalid, "oracle.indexer_codes", "rows")
    assert_error(lambda: oracle.top_k([1.0], 0), invalid, "oracle.top_k", "k")
