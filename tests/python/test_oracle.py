# SPDX-License-Identifier: Apache-2.0
"""attend.oracle: compared with float64 torch and with ml_dtypes; it checks arguments, and writes to none."""

from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numpy
import pytest
import torch
from opsa_helpers import TORCH_TYPES, attention64, bits, block_table_of, normal, prefix_sum, slots_of, visible

import attend
from attend import ops, oracle

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 32, 16
QUERY_LENS, SEQ_LENS = [4, 1, 6], [11, 30, 4]  # the last request has rows without a key


def ragged(dtype: torch.dtype) -> dict:
    rng = numpy.random.default_rng(1)
    tokens, keys = sum(QUERY_LENS), sum(SEQ_LENS)
    return dict(
        q=normal(rng, tokens, HEADS, DIM, dtype=dtype),
        k=normal(rng, keys, KV_HEADS, DIM, dtype=dtype),
        v=normal(rng, keys, KV_HEADS, DIM_V, dtype=dtype),
        query_start_loc=prefix_sum(QUERY_LENS),
        cu_seqlens_kv=prefix_sum(SEQ_LENS),
    )


def expected_of(problem: dict, causal: bool, left: int, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    requests = zip(
        torch.split(problem["q"], QUERY_LENS), torch.split(problem["k"], SEQ_LENS), torch.split(problem["v"], SEQ_LENS)
    )
    results = [attention64(q, k, v, visible(len(q), len(k), causal, left), None, softcap) for q, k, v in requests]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


@pytest.mark.parametrize("causal, left, softcap", [(False, -1, 0.0), (True, -1, 0.0), (True, 5, 0.0), (True, -1, 2.0)])
@pytest.mark.parametrize("dtype", TORCH_TYPES.values(), ids=TORCH_TYPES)
def test_attention_is_float64(dtype: torch.dtype, causal: bool, left: int, softcap: float) -> None:
    problem = ragged(dtype)
    options = dict(causal=causal, window_left=left, softcap=softcap)
    result = oracle.flash_attn_varlen(**problem, **options)
    out, lse = expected_of(problem, causal, left, softcap)
    assert result.out.dtype == result.out_bound.dtype == numpy.float64
    assert result.out.shape == result.out_bound.shape == tuple(out.shape)
    # The library has the scale and the cap as float32.
    numpy.testing.assert_allclose(result.out, out, rtol=0, atol=2e-7)
    numpy.testing.assert_allclose(result.lse, lse, rtol=0, atol=1e-6)
    assert not causal or numpy.isneginf(result.lse[5:7]).all()
    got = ops.flash_attn_varlen(**problem, **options, return_lse=True)
    assert 0 < result.worst_ratio(*got) <= 1
    other = ops.flash_attn_varlen(**problem, causal=not causal, return_lse=True)
    assert result.worst_ratio(*other) > 1


def test_bounds_are_for_the_type_of_the_output() -> None:
    rng = numpy.random.default_rng(2)
    k = normal(rng, 1, 16, KV_HEADS, DIM).to(torch.float8_e4m3fn)
    where = dict(
        query_start_loc=prefix_sum([2]),
        seq_lens=torch.tensor([9], dtype=torch.int32),
        block_table=torch.tensor([[0]], dtype=torch.int32),
        causal=True,
    )
    q = normal(rng, 2, HEADS, DIM).to(torch.float8_e4m3fn)
    narrow, wide = (oracle.flash_attn_varlen(q, k, k, **where, out_dtype=dtype) for dtype in (None, "float32"))
    assert (narrow.out == wide.out).all() and (narrow.out_bound > 2 * wide.out_bound).mean() > 0.9
    out = ops.flash_attn_varlen(q, k, k, **where)
    assert out.dtype == torch.bfloat16 and narrow.worst_ratio(out) <= 1 < wide.worst_ratio(out)


@pytest.mark.parametrize("paged", [False, True])
def test_appending_reads_the_caches_as_they_were(paged: bool) -> None:
    rng = numpy.random.default_rng(3)
    batch, new, before = 3, 2, [5, 0, 17]
    q = normal(rng, batch, new, HEADS, DIM)
    k_new, v_new = normal(rng, batch, new, KV_HEADS, DIM), normal(rng, batch, new, KV_HEADS, DIM_V)
    shape = (6, 16) if paged else (batch, 32)
    k_cache, v_cache = (torch.full((*shape, KV_HEADS, dim), float("nan")) for dim in (DIM, DIM_V))
    table = block_table_of(rng, [n + new for n in before], 16, 6) if paged else None
    k_rows, v_rows = normal(rng, batch, 32, KV_HEADS, DIM), normal(rng, batch, 32, KV_HEADS, DIM_V)
    for b, n in enumerate(before):
        places = slots_of(table, b, range(n), 16) if paged else [b * 32 + i for i in range(n)]
        k_cache.view(-1, KV_HEADS, DIM)[places] = k_rows[b, :n]
        v_cache.view(-1, KV_HEADS, DIM_V)[places] = v_rows[b, :n]
    kept = bits(k_cache), bits(v_cache)
    angle = torch.arange(32)[:, None] / 10.0 ** torch.arange(8)
    options = dict(
        k_new=k_new,
        v_new=v_new,
        cache_seqlens=torch.tensor(before, dtype=torch.int32),
        block_table=table,
        rotary_cos=torch.cos(angle),
        rotary_sin=torch.sin(angle),
        rotary_interleaved=False,
    )
    result = oracle.flash_attn_with_kvcache(q, k_cache, v_cache, **options, causal=True)
    keys = oracle.appended_keys(q, k_cache, v_cache, **options)
    assert (bits(k_cache) == kept[0]).all() and (bits(v_cache) == kept[1]).all()

    def rotated(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cos, sin = (f(angle[position]).double()[:, None] for f in (torch.cos, torch.sin))
        a, b, rest = x[..., :8].double(), x[..., 8:16].double(), x[..., 16:].double()
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)

    for b, n in enumerate(before):
        position = torch.arange(n, n + new)
        wanted = rotated(k_new[b], position)
        numpy.testing.assert_allclose(keys.value[b], wanted, rtol=0, atol=1e-6)
        assert (keys.bound[b] < 5e-6).all()
        out, lse = attention64(
            rotated(q[b], position),
            torch.cat([k_rows[b, :n].double(), wanted]),
            torch.cat([v_rows[b, :n], v_new[b]]),
            visible(new, n + new, True),
        )
        numpy.testing.assert_allclose(result.out[b], out, rtol=0, atol=1e-6)
        numpy.testing.assert_allclose(result.lse[b], lse.T, rtol=0, atol=1e-6)
    plain = {name: value for name, value in options.items() if not name.startswith("rotary")}
    copied = oracle.appended_keys(q, k_cache, v_cache, **plain)
    assert (copied.bound == 0).all() and (copied.value == k_new.double().numpy()).all()
    got = ops.flash_attn_with_kvcache(q, k_cache, v_cache, **options, causal=True, return_lse=True)
    assert 0 < result.worst_ratio(*got) <= 1


SLOPES = torch.tensor([0.1, 0.4, 0.2, 0.3])
OPTIONS = [
    dict(causal=True, window_left=6, alibi_slopes=SLOPES, alibi_sqrt=True, scale=0.4),
    dict(window_left=9, window_right=2, softcap=1.5, alibi_slopes=SLOPES),
    dict(causal=True, sinks=10 * SLOPES, lse_includes_sink=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window", "sinks"])
def test_every_option_is_that_of_the_function(options: dict) -> None:
    rng = numpy.random.default_rng(7)
    problem = ragged(torch.float32)
    got = ops.flash_attn_varlen(**problem, **options, return_lse=True)
    assert 0 < oracle.flash_attn_varlen(**problem, **options).worst_ratio(*got) <= 1
    q, k, v = normal(rng, 3, 4, HEADS, DIM), normal(rng, 5, 32, KV_HEADS, DIM), normal(rng, 5, 32, KV_HEADS, DIM_V)
    i32 = torch.int32
    where = dict(
        cache_seqlens=torch.tensor([30, 17, 9], dtype=i32),
        cache_batch_idx=torch.tensor([4, 0, 2], dtype=i32),
        cache_leftpad=torch.tensor([3, 0, 5], dtype=i32),
    )
    got = ops.flash_attn_with_kvcache(q, k, v, **where, **options, return_lse=True)
    assert 0 < oracle.flash_attn_with_kvcache(q, k, v, **where, **options).worst_ratio(*got) <= 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_scales_of_codes_are_those_of_the_function(dtype: torch.dtype) -> None:
    rng = numpy.random.default_rng(8)
    codes = [torch.from_numpy(rng.integers(-40, 40, (4, 16, KV_HEADS, DIM))).float().to(dtype) for _ in "kv"]
    scales = [torch.from_numpy(rng.uniform(0.01, 0.1, (4, 16, KV_HEADS)).astype(numpy.float32)) for _ in "kv"]
    options = dict(k_token_scale=scales[0], v_token_scale=scales[1])
    q = normal(rng, 5, HEADS, DIM)
    if dtype != torch.int8:
        q = q.to(dtype)
        options |= {
            name: torch.from_numpy(rng.uniform(0.5, 2, (2, KV_HEADS)).astype(numpy.float32))
            for name in ("q_descale", "k_descale", "v_descale")
        }
    where = dict(
        query_start_loc=prefix_sum([2, 3]),
        seq_lens=torch.tensor([20, 11], dtype=torch.int32),
        block_table=torch.tensor([[3, 0], [1, -1]], dtype=torch.int32),
        causal=True,
    )
    out = torch.empty(5, HEADS, DIM)
    _, lse = ops.flash_attn_varlen(q, *codes, **where, **options, out=out, return_lse=True)
    assert 0 < oracle.flash_attn_varlen(q, *codes, **where, **options, out_dtype="float32").worst_ratio(out, lse) <= 1


def test_merging() -> None:
    rng = numpy.random.default_rng(4)
    outs = [normal(rng, 6, 2, 8) for _ in range(2)]
    lses = [normal(rng, 6, 2) for _ in range(2)]
    lses[0][1], lses[1][2], lses[0][3], lses[1][3] = math.inf, -math.inf, -math.inf, math.nan
    outs[0][1] = outs[1][2] = math.nan
    result = oracle.merge_attn_states(outs[0], lses[0], outs[1], lses[1], prefill_tokens_with_context=5)
    a, b = (torch.where(torch.isfinite(x), x.double(), -math.inf) for x in lses)
    a[5] = -math.inf
    total = torch.logaddexp(a, b)
    shares = [torch.where(torch.isneginf(x), 0.0, torch.exp(x - total)) for x in (a, b)]
    expected = sum(torch.where(s[..., None] == 0, 0.0, s[..., None] * o.double()) for s, o in zip(shares, outs))
    numpy.testing.assert_allclose(result.out, expected, rtol=0, atol=1e-12)
    numpy.testing.assert_allclose(result.lse, total, rtol=0, atol=1e-12)
    got = ops.merge_attn_states(outs[0], lses[0], outs[1], lses[1], prefill_tokens_with_context=5, return_lse=True)
    assert 0 < result.worst_ratio(*got) <= 1


HOSTILE = [
    ("block_table", dict(block_table=torch.full((1, 1), 2**31 - 1, dtype=torch.int32))),
    ("block_table", dict(block_table=torch.full((1, 1), -5, dtype=torch.int32))),
    ("seq_lens", dict(seq_lens=torch.tensor([2**31 - 1], dtype=torch.int32))),
    ("seq_lens", dict(seq_lens=torch.tensor([-1], dtype=torch.int32))),
    ("query_start_loc", dict(query_start_loc=torch.tensor([0, -7], dtype=torch.int32))),
    ("v", dict(v=torch.ones(2, 16, 1, 8))),
    ("alibi_slopes", dict(alibi_slopes=torch.ones(3))),
    ("q", dict(q=None)),
]


@pytest.mark.parametrize("argument, changes", HOSTILE)
def test_hostile_arguments_are_refused(argument: str, changes: dict) -> None:
    good = dict(
        q=torch.ones(2, 2, 8),
        k=torch.ones(2, 16, 2, 8),
        v=torch.ones(2, 16, 2, 8),
        query_start_loc=prefix_sum([2]),
        seq_lens=torch.tensor([9], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
    )
    assert abs(oracle.flash_attn_varlen(**good).out - 1).max() < 1e-12
    with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
        oracle.flash_attn_varlen(**{**good, **changes})
    assert error.value.argument == argument
    cache = dict(
        q=good["q"][None],
        k_cache=good["k"],
        v_cache=good["v"],
        cache_seqlens=good["seq_lens"],
        block_table=good["block_table"],
    )
    names = {"seq_lens": "cache_seqlens", "v": "v_cache"}
    changes = {names.get(name, name): value for name, value in changes.items() if name != "query_start_loc"}
    if changes:
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            oracle.flash_attn_with_kvcache(**{**cache, **changes})
        assert error.value.argument == names.get(argument, argument)


def test_numpy_arguments() -> None:
    problem = {name: tensor.numpy() for name, tensor in ragged(torch.float32).items()}
    assert (oracle.flash_attn_varlen(**problem).out == oracle.flash_attn_varlen(**ragged(torch.float32)).out).all()
    problem["q"], problem["k"], problem["v"] = (problem[x].astype(ml_dtypes.bfloat16) for x in "qkv")
    assert (oracle.flash_attn_varlen(**problem).out == oracle.flash_attn_varlen(**ragged(torch.bfloat16)).out).all()


def test_ratios() -> None:
    result = oracle.Result(
        numpy.array([1.0, numpy.nan, 0.0]), numpy.array([0.5, 0.0, 0.0]), numpy.array([-numpy.inf]), numpy.array([0.0])
    )
    good, lse = numpy.array([1.25, numpy.nan, 0.0]), numpy.array([-numpy.inf])
    assert result.worst_ratio(good, lse) == 0.5 and result.worst_ratio(good) == 0.5
    assert result.worst_ratio(torch.tensor([0.0, math.nan, 0.0]), torch.tensor([-math.inf])) == 2.0
    for bad in ([1.0, 0.0, 0.0], [1.0, numpy.nan, 1e-30], [numpy.nan, numpy.nan, 0.0], [numpy.inf, numpy.nan, 0.0]):
        assert result.worst_ratio(numpy.array(bad)) == math.inf
    assert result.worst_ratio(good, numpy.array([numpy.inf])) == math.inf
    with pytest.raises(ValueError):
        result.worst_ratio(good[:2])
    with pytest.raises(ValueError):
        oracle.Result(result.out, result.out_bound, None, None).worst_ratio(good, lse)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_is_that_of_ml_dtypes(name: str) -> None:
    dtype = numpy.dtype(getattr(ml_dtypes, name))
    codes = numpy.arange(256, dtype=numpy.uint8)
    numpy.testing.assert_array_equal(
        oracle.fp8_value(codes.reshape(16, 16), name).reshape(-1), codes.view(dtype).astype(numpy.float64)
    )
    rng = numpy.random.default_rng(5)
    x = (rng.standard_normal((64, 9)) * 10.0 ** rng.integers(-6, 4, (64, 9))).astype(numpy.float32)
    values = numpy.sort(codes[:120].view(dtype).astype(numpy.float32))
    x = numpy.concatenate([x.reshape(-1), values, (values[1:] + values[:-1]) / 2])  # and the middles
    largest = float(ml_dtypes.finfo(dtype).max)
    for scale in (1.0, 0.37):
        quotient = numpy.clip(x / numpy.float32(scale), -largest, largest)
        assert (oracle.fp8_code(x, scale, name) == quotient.astype(dtype).view(numpy.uint8)).all()
    ends = oracle.fp8_code(numpy.array([math.nan, math.inf]), 1.0, name)
    assert ends.tolist() == [0x7F, 0x7E if "e4" in name else 0x7B]
    assert oracle.fp8_code(torch.tensor(1.0), 1.0, name).shape == ()


def test_int8_codes() -> None:
    x = numpy.array([[0.5, 1.5, -2.5, 126.6, 200.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert oracle.int8_code(x, 1.0).tolist() == [[0, 2, -2, 127, 127], [0] * 5]
    assert oracle.int8_scale(x).tolist() == [numpy.float32(200 / 127), numpy.float32(1e-6)]
    assert numpy.isnan(oracle.int8_scale(numpy.array([1.0, math.inf])))
    assert oracle.int8_code(x, numpy.array([[2.0], [math.nan]])).tolist() == [[0, 1, -1, 63, 100], [0] * 5]


def test_rows_of_an_mla_cache() -> None:
    rng = numpy.random.default_rng(6)
    latent = 5 * rng.standard_normal((3, 512))
    latent[1, :128] = 0
    rope = rng.standard_normal((3, 64)).astype(ml_dtypes.bfloat16)
    rows = oracle.fp8_ds_mla_encode(latent, rope.view(numpy.uint16))
    assert rows.shape == (3, 656) and rows.dtype == numpy.uint8
    tiles = latent.reshape(3, 4, 128)
    scale = numpy.maximum((numpy.abs(tiles).max(-1) / 448).astype(numpy.float32), numpy.finfo(numpy.float32).tiny)
    assert (rows[:, 512:528].copy().view(numpy.float32) == scale).all()
    codes = (tiles / scale[..., None]).astype(numpy.float32).astype(ml_dtypes.float8_e4m3fn)
    assert (rows[:, :512] == codes.view(numpy.uint8).reshape(3, 512)).all()
    back = oracle.fp8_ds_mla_decode(rows)
    wanted = (codes.astype(numpy.float32) * scale[..., None]).astype(ml_dtypes.bfloat16).astype(numpy.float64)
    assert (back[:, :512] == wanted.reshape(3, 512)).all() and (back[:, 512:] == rope.astype(numpy.float64)).all()


@pytest.mark.parametrize(
    "argument, call",
    [
        ("dtype", lambda: oracle.fp8_value(numpy.zeros(1, numpy.uint8), "int8")),
        ("codes", lambda: oracle.fp8_value(numpy.zeros(1), "float8_e5m2")),
        ("scale", lambda: oracle.fp8_code(numpy.zeros(2), numpy.ones(3), "float8_e5m2")),
        ("scale", lambda: oracle.fp8_code(numpy.zeros(2), 0.0, "float8_e5m2")),
        ("scale", lambda: oracle.int8_code(numpy.zeros(2), -1.0)),
        ("x", lambda: oracle.int8_code(numpy.array([math.nan]), 1.0)),
        ("x", lambda: oracle.int8_scale(numpy.zeros((2, 0)))),
        ("latent", lambda: oracle.fp8_ds_mla_encode(numpy.zeros((1, 511)), numpy.zeros((1, 64), numpy.uint16))),
        ("rope", lambda: oracle.fp8_ds_mla_encode(numpy.zeros((1, 512)), numpy.zeros((2, 64), numpy.uint16))),
        ("rows", lambda: oracle.fp8_ds_mla_decode(numpy.zeros((1, 655), numpy.uint8))),
    ],
)
def test_bad_arguments_of_codes_are_named(argument: str, call: object) -> None:
    with pytest.raises(attend.InvalidArgument) as error:
        call()
    assert error.value.argument == argument


def test_importing_attend_imports_neither_the_oracle_nor_numpy() -> None:
    script = "import sys, attend; print([m for m in ('numpy', 'torch', 'attend.oracle') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.strip() == b"[]"
