# SPDX-License-Identifier: Apache-2.0
"""Differential attention, compared with its definition written out in float64, and by equal bits."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from opsa_helpers import TORCH_TYPES, attention64, bits, block_table_of, normal, prefix_sum, slots_of, visible

import attend
from attend import ops, oracle

HEADS, KV_HEADS, DIM = 8, 4, 32
QUERY_LENS, SEQ_LENS = [5, 1, 9], [21, 37, 9]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pairs(heads: int, pairing: str) -> tuple[list[int], list[int]]:
    """The first and the second head of each pair."""
    half = heads // 2
    if pairing == "halves":
        return list(range(half)), list(range(half, heads))
    return list(range(0, heads, 2)), list(range(1, heads, 2))


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    variant: str,
    pairing: str,
    lambda_: float | torch.Tensor,
    norm: bool,
    weight: torch.Tensor | None,
    eps: float,
    out_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 result of one request, [T, pairs, W], and the LSE of each head, [T, H]."""
    first, second = pairs(q.shape[1], pairing)
    if variant == "v1":
        k1, k2 = (k[:, heads] for heads in pairs(k.shape[1], pairing))
        values = torch.cat([v[:, heads] for heads in pairs(v.shape[1], pairing)], -1)
    else:
        k1, k2, values = k, k, v
    one, lse_one = attention64(q[:, first], k1, values, mask)
    two, lse_two = attention64(q[:, second], k2, values, mask)
    out = one - (lambda_ if isinstance(lambda_, float) else torch.sigmoid(lambda_.double())[..., None]) * two
    if norm:
        out = out / torch.sqrt(out.square().mean(-1, keepdim=True) + eps)
        out = out if weight is None else out * weight.double()
    lse = torch.empty(q.shape[:2], dtype=torch.float64)
    lse[:, first], lse[:, second] = lse_one, lse_two
    return out * out_scale, lse


def ragged(rng: numpy.random.Generator, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, keys = sum(QUERY_LENS), sum(SEQ_LENS)
    return (
        normal(rng, tokens, HEADS, DIM, dtype=dtype),
        normal(rng, keys, KV_HEADS, DIM, dtype=dtype),
        normal(rng, keys, KV_HEADS, DIM, dtype=dtype),
    )


def by_request(rows: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    return torch.split(rows, lengths)


@pytest.mark.parametrize("dtype", TORCH_TYPES.values(), ids=TORCH_TYPES)
@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_variant_1_is_the_definition(pairing: str, dtype: torch.dtype) -> None:
    rng = numpy.random.default_rng(1)
    q, k, v = ragged(rng, dtype)
    weight = normal(rng, 2 * DIM)
    out, lse = ops.differential_attention(
        q,
        k,
        v,
        prefix_sum(QUERY_LENS),
        cu_seqlens_kv=prefix_sum(SEQ_LENS),
        pairing=pairing,
        lambda_=0.37,
        norm_weight=weight,
        norm_eps=1e-3,
        out_scale=0.8,
        causal=True,
        window_left=12,
        return_lse=True,
    )
    expected = [
        definition(a, b, c, visible(len(a), len(b), True, 12), "v1", pairing, 0.37, True, weight, 1e-3, 0.8)
        for a, b, c in zip(by_request(q, QUERY_LENS), by_request(k, SEQ_LENS), by_request(v, SEQ_LENS))
    ]
    assert out.dtype == dtype and out.shape == q.shape
    # Head 2 p has the first half of pair p, head 2 p + 1 the second.
    torch.testing.assert_close(
        out.double().reshape(len(q), HEADS // 2, 2 * DIM),
        torch.cat([e[0] for e in expected]),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )
    torch.testing.assert_close(lse.double(), torch.cat([e[1] for e in expected]), rtol=1e-6, atol=1e-5)


def test_variant_2_is_the_definition() -> None:
    rng = numpy.random.default_rng(2)
    q, k, v = ragged(rng, torch.float32)
    token_lambda = normal(rng, len(q), HEADS // 2)
    out = ops.differential_attention(
        q,
        k,
        v,
        prefix_sum(QUERY_LENS),
        cu_seqlens_kv=prefix_sum(SEQ_LENS),
        variant="v2",
        token_lambda=token_lambda,
        norm=False,
        out_scale=1.5,
        causal=True,
    )
    expected = torch.cat(
        [
            definition(a, b, c, visible(len(a), len(b), True), "v2", "interleaved", t, False, None, 0.0, 1.5)[0]
            for a, b, c, t in zip(
                by_request(q, QUERY_LENS),
                by_request(k, SEQ_LENS),
                by_request(v, SEQ_LENS),
                by_request(token_lambda, QUERY_LENS),
            )
        ]
    )
    assert out.shape == (len(q), HEADS // 2, DIM)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_type", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_paged_cache_has_the_bits_of_ragged_keys(cache_type: torch.dtype) -> None:
    rng = numpy.random.default_rng(3)
    q, k, v = ragged(rng, torch.bfloat16)
    shape = ops.differential_cache_shape(8, 16, KV_HEADS, DIM)
    assert shape == (2, 2, 8, 16, KV_HEADS // 2, DIM)
    cache = torch.full(shape, float("nan")).to(cache_type)
    table = block_table_of(rng, SEQ_LENS, 16, 8)
    slots = [slot for r, n in enumerate(SEQ_LENS) for slot in slots_of(table, r, range(n), 16)]
    one = torch.tensor([1.0])
    ops.differential_reshape_and_cache(k, v, cache, torch.tensor(slots), pairing="halves", k_scale=one, v_scale=one)
    options = dict(pairing="halves", lambda_=0.4, causal=True)
    out = ops.differential_attention(
        q,
        cache[:, 0],
        cache[:, 1],
        prefix_sum(QUERY_LENS),
        seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
        block_table=table,
        **options,
    )
    if cache_type != torch.bfloat16:
        k, v = k.to(cache_type), v.to(cache_type)
    expected = ops.differential_attention(
        q, k, v, prefix_sum(QUERY_LENS), cu_seqlens_kv=prefix_sum(SEQ_LENS), **options
    )
    assert (bits(out) == bits(expected)).all() and not out.isnan().any()


def test_maps_end_as_the_whole_does() -> None:
    rng = numpy.random.default_rng(4)
    q, k, v = ragged(rng, torch.float32)
    where = dict(query_start_loc=prefix_sum(QUERY_LENS), cu_seqlens_kv=prefix_sum(SEQ_LENS), causal=True)
    end = dict(lambda_=0.3, norm_weight=normal(rng, 2 * DIM), out_scale=0.7)
    maps, lse = ops.differential_attention(q, k, v, **where, return_maps=True, return_lse=True)
    assert maps.shape == (len(q), HEADS, 2 * DIM)
    whole, whole_lse = ops.differential_attention(q, k, v, **where, **end, return_lse=True)
    assert (bits(ops.differential_combine(maps, **end)) == bits(whole)).all() and (lse == whole_lse).all()
    given = torch.empty_like(maps)
    assert ops.differential_attention(q, k, v, **where, maps=given) is given and (given == maps).all()
    v2 = ops.differential_attention(q, k, v, **where, variant="v2", norm=False, return_maps=True)
    token_lambda = normal(rng, len(q), HEADS // 2)
    end = dict(variant="v2", token_lambda=token_lambda, norm=False)
    assert (
        bits(ops.differential_combine(v2, **end)) == bits(ops.differential_attention(q, k, v, **where, **end))
    ).all()


def test_results_are_within_the_bounds_of_the_oracle() -> None:
    rng = numpy.random.default_rng(5)
    for dtype in TORCH_TYPES.values():
        q, k, v = ragged(rng, dtype)
        where = dict(query_start_loc=prefix_sum(QUERY_LENS), cu_seqlens_kv=prefix_sum(SEQ_LENS), causal=True)
        options = dict(lambda_=0.5, softcap=3.0, sinks=normal(rng, HEADS), out_scale=0.9)
        out, lse = ops.differential_attention(q, k, v, **where, **options, return_lse=True)
        assert 0 < oracle.differential_attention(q, k, v, **where, **options).worst_ratio(out, lse) <= 1
        maps = ops.differential_attention(q, k, v, **where, return_maps=True)
        assert 0 < oracle.differential_attention(q, k, v, **where, return_maps=True).worst_ratio(maps) <= 1
        combined = ops.differential_combine(maps, lambda_=0.5)
        assert 0 < oracle.differential_combine(maps, lambda_=0.5).worst_ratio(combined) <= 1


def test_every_option_is_that_of_the_oracle() -> None:
    rng = numpy.random.default_rng(7)
    fp8 = torch.float8_e4m3fn
    where = dict(query_start_loc=prefix_sum(QUERY_LENS), cu_seqlens_kv=prefix_sum(SEQ_LENS), pairing="halves")
    slopes = normal(rng, HEADS).abs()
    descales = {
        name: torch.from_numpy(rng.uniform(0.5, 2, (3, KV_HEADS)).astype(numpy.float32))
        for name in ("q_descale", "k_descale", "v_descale")
    }
    weight = normal(rng, 2 * DIM)
    for options in (
        dict(causal=True, alibi_slopes=slopes, scale=0.3, norm_eps=0.1, norm_weight=weight),
        dict(window_left=9, window_right=2, alibi_slopes=slopes, alibi_sqrt=True, norm=False),
        dict(causal=True, sinks=slopes, lse_includes_sink=True),
        dict(causal=True, **descales),
    ):
        q, k, v = ragged(rng, torch.float32)
        if "q_descale" in options:
            q, k, v = q.to(fp8), k.to(fp8), v.to(fp8)
        out, lse = torch.full(q.shape, math.nan), torch.full(q.shape[:2], math.nan)
        assert ops.differential_attention(q, k, v, **where, **options, lambda_=0.5, out=out, lse=lse) is out
        reference = oracle.differential_attention(q, k, v, **where, **options, lambda_=0.5, out_dtype="float32")
        assert 0 < reference.worst_ratio(out, lse) <= 1
    maps = normal(rng, 6, HEADS, 64)
    end = dict(pairing="halves", lambda_=0.5, norm_eps=0.1, norm_weight=normal(rng, 64), out_scale=0.3)
    combined = ops.differential_combine(maps, **end)
    assert 0 < oracle.differential_combine(maps, **end).worst_ratio(combined) <= 1
    v2 = dict(variant="v2", token_lambda=normal(rng, sum(QUERY_LENS), HEADS // 2), norm=False)
    q, k, v = ragged(rng, torch.float32)
    del where["pairing"]
    for result, reference in (
        (ops.differential_attention(q, k, v, **where, **v2), oracle.differential_attention(q, k, v, **where, **v2)),
        (ops.differential_combine(q, **v2), oracle.differential_combine(q, **v2)),
    ):
        assert 0 < reference.worst_ratio(result) <= 1
    first, second = maps[:, : HEADS // 2].double(), maps[:, HEADS // 2 :].double()
    expected = first - 0.5 * second
    expected = expected / torch.sqrt(expected.square().mean(-1, keepdim=True) + 0.1) * end["norm_weight"].double() * 0.3
    torch.testing.assert_close(combined.double().reshape(6, HEADS // 2, 64), expected, rtol=1e-5, atol=1e-6)


def test_lambda() -> None:
    rng = numpy.random.default_rng(6)
    vectors = [0.3 * normal(rng, 2 * DIM)[::2] for _ in range(4)]
    exact = (
        math.exp(vectors[0].double() @ vectors[1].double()) - math.exp(vectors[2].double() @ vectors[3].double()) + 0.25
    )
    got, reference = ops.differential_lambda(*vectors, 0.25), oracle.differential_lambda(*vectors, 0.25)
    assert got == pytest.approx(exact, rel=1e-5) and float(reference.value) == pytest.approx(exact, rel=1e-12)
    assert abs(got - float(reference.value)) <= float(reference.bound) < 1e-4
    rounded = ops.differential_lambda(*vectors, 0.25, round_to="bfloat16")
    first, second = (torch.exp(vectors[i] @ vectors[i + 1]).bfloat16() for i in (0, 2))
    assert rounded == float((first - second) + 0.25) != got
    reference = oracle.differential_lambda(*vectors, 0.25, round_to="bfloat16")
    assert abs(rounded - float(reference.value)) <= float(reference.bound)
    assert abs(got - float(reference.value)) < 0.1 and float(reference.bound) > 1e-3
    assert ops.differential_lambda_init(3) == pytest.approx(0.8 - 0.6 * math.exp(-0.9), rel=1e-15)


def test_stride_orders() -> None:
    shape = ops.differential_cache_shape(3, 16, 4, 8, num_layers=5)
    assert shape == (5, 2, 2, 3, 16, 2, 8)
    assert ops.differential_stride_order() == (0, 1, 2, 3, 4, 5)
    assert ops.differential_stride_order("hnd") == (0, 1, 2, 4, 3, 5)
    assert ops.differential_stride_order("HND", include_layers=True)[:2] == (3, 5)


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("variant", dict(variant="v3")),
        ("pairing", dict(pairing="odd")),
        ("pairing", dict(variant="v2", pairing="halves", norm=False, token_lambda=torch.zeros(15, 4))),
        ("token_lambda", dict(token_lambda=torch.zeros(15, 4))),
        ("token_lambda", dict(variant="v2", norm=False)),
        ("norm", dict(variant="v2", token_lambda=torch.zeros(15, 4))),
        ("norm_weight", dict(norm=False, norm_weight=torch.ones(64))),
        ("norm_weight", dict(norm_weight=torch.ones(32))),
        ("norm_eps", dict(norm_eps=0.0)),
        ("lambda", dict(lambda_=float("nan"))),
        ("lambda", dict(lambda_="0.5")),
        ("out_scale", dict(out_scale=float("inf"))),
        ("q", dict(q=torch.ones(15, 7, 32))),
        ("v", dict(v=torch.ones(67, 4, 40))),
        ("cu_seqlens_kv", dict(cu_seqlens_kv=torch.tensor([0, 21, 58, 68], dtype=torch.int32))),
    ],
)
def test_bad_arguments_are_named(argument: str, changes: dict) -> None:
    good = dict(
        q=torch.ones(15, 8, 32),
        k=torch.ones(67, 4, 32),
        v=torch.ones(67, 4, 32),
        query_start_loc=prefix_sum(QUERY_LENS),
        cu_seqlens_kv=prefix_sum(SEQ_LENS),
    )
    for function in (ops.differential_attention, oracle.differential_attention):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            function(**{**good, **changes})
        assert error.value.argument == argument and error.value.function == "differential_attention"
    if argument != "v" and argument != "cu_seqlens_kv":
        return
    assert ops.differential_attention(**good).shape == (15, 8, 32)


def test_other_bad_arguments() -> None:
    with pytest.raises(attend.Unsupported, match="arithmetic"):
        ops.differential_attention(
            torch.ones(1, 2, 16),
            torch.ones(1, 2, 16),
            torch.ones(1, 2, 16),
            prefix_sum([1]),
            cu_seqlens_kv=prefix_sum([1]),
            arithmetic="fast",
        )
    one, start, slot = torch.ones(1, 2, 16), prefix_sum([1]), torch.tensor([0])
    for argument, call in (
        ("isa", lambda: ops.differential_attention(one, one, one, start, cu_seqlens_kv=start, isa="mmx")),
        ("executor", lambda: ops.differential_attention(one, one, one, start, cu_seqlens_kv=start, executor=2)),
        ("isa", lambda: ops.differential_combine(one, isa="mmx")),
        ("executor", lambda: ops.differential_combine(one, executor=2)),
        (
            "executor",
            lambda: ops.differential_reshape_and_cache(one, one, torch.ones(2, 2, 1, 16, 1, 16), slot, executor=2),
        ),
        ("maps", lambda: ops.differential_combine(torch.ones(2, 3, 16))),
        ("num_kv_heads", lambda: ops.differential_cache_shape(4, 16, 3, 8)),
        ("block_size", lambda: ops.differential_cache_shape(4, 8, 4, 8)),
        ("layer", lambda: ops.differential_lambda_init(-1)),
        ("layer", lambda: ops.differential_lambda_init(None)),
        ("lambda_init", lambda: ops.differential_lambda(*[torch.ones(4)] * 4, None)),
        ("block_size", lambda: ops.differential_cache_shape(4, None, 4, 8)),
        ("layout", lambda: ops.differential_stride_order("DNH")),
        ("lambda_k2", lambda: ops.differential_lambda(*[torch.ones(4)] * 3, torch.ones(5), 0.1)),
        ("lambda_q1", lambda: ops.differential_lambda(*[torch.full((4,), 10.0)] * 4, 0.1)),
        ("round_to", lambda: ops.differential_lambda(*[torch.ones(4)] * 4, 0.1, round_to="int8")),
        (
            "key",
            lambda: ops.differential_reshape_and_cache(
                torch.ones(1, 3, 8), torch.ones(1, 3, 8), torch.ones(2, 2, 1, 16, 1, 8), torch.tensor([0])
            ),
        ),
        (
            "kv_cache",
            lambda: ops.differential_reshape_and_cache(
                torch.ones(1, 4, 8), torch.ones(1, 4, 8), torch.ones(2, 2, 1, 16, 1, 8), torch.tensor([0])
            ),
        ),
        (
            "slot_mapping",
            lambda: ops.differential_reshape_and_cache(
                torch.ones(1, 4, 8), torch.ones(1, 4, 8), torch.ones(2, 2, 1, 16, 2, 8), torch.tensor([16])
            ),
        ),
    ):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            call()
        assert error.value.argument == argument
