# SPDX-License-Identifier: Apache-2.0
"""int8 caches and int8 attention, compared with float64 attention to what the codes stand for, and by equal bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import pytest
import torch
from opsa_helpers import attention64, bits, block_table_of, normal, prefix_sum, slots_of, visible

import attend
from attend import ops, oracle

BLOCK_SIZE, NUM_BLOCKS, HEADS, KV_HEADS, DIM = 16, 30, 4, 2, 32
QUERY_LENS, SEQ_LENS = [3, 1, 20, 0], [40, 17, 290, 5]
VALUES = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Problem:
    """A batch over a cache, of which everything that nobody may read is NaN, or codes with the scale NaN."""

    q: torch.Tensor
    q_scale: torch.Tensor
    keys: torch.Tensor
    key_scales: torch.Tensor
    values: torch.Tensor
    v_scale: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    table: torch.Tensor
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # codes of keys, their scales, values of each request

    def arguments(self) -> dict:
        return dict(
            q=self.q,
            q_scale=self.q_scale,
            k=self.keys,
            k_scale=self.key_scales,
            v=self.values,
            v_scale=self.v_scale,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            block_table=self.table,
        )

    def expected(self, causal: bool, left: int = -1, softcap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q.double() * self.q_scale.T[..., None]
        outs, lses = [], []
        for r, (codes, scales, values) in enumerate(self.rows):
            begin, end = self.query_start_loc[r], self.query_start_loc[r + 1]
            v = values.double() if self.v_scale is None else values.double() * self.v_scale
            out, lse = attention64(
                q[begin:end],
                codes.double() * scales[..., None],
                v,
                visible(int(end - begin), len(codes), causal, left),
                DIM**-0.5,
                softcap,
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


def make_problem(values: str, seed: int = 1, spread: float = 1.0) -> Problem:
    rng = numpy.random.default_rng(seed)
    dtype = VALUES[values]
    tokens = sum(QUERY_LENS)
    q, q_scale = ops.scaled_int8_quant_for_attn(spread * normal(rng, tokens, HEADS, DIM), transpose_scale=True)
    table = block_table_of(rng, SEQ_LENS, BLOCK_SIZE, NUM_BLOCKS)
    keys = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, DIM), 100, dtype=torch.int8)
    key_scales = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE), float("nan"))
    cache = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, DIM), 99 if values == "int8" else float("nan"), dtype=dtype)
    v_scale = torch.from_numpy(rng.uniform(0.01, 0.03, (KV_HEADS, DIM)).astype(numpy.float32))
    write = ops.reshape_and_cache_flash_int8 if values == "int8" else ops.reshape_and_cache_flash_mix
    rows = []
    for r, seq_len in enumerate(SEQ_LENS):
        codes, scales = ops.scaled_int8_quant_for_attn(normal(rng, seq_len, KV_HEADS, DIM))
        v = normal(rng, seq_len, KV_HEADS, DIM)
        if values == "int8":
            v = ops.scaled_int8_quant_for_attn(v, "per_channel", static_scale=v_scale)[0]
        v = v.to(dtype)
        slots = torch.tensor(slots_of(table, r, range(seq_len), BLOCK_SIZE))
        write(codes, v, scales, keys, cache, key_scales, slots)
        rows.append((codes, scales, v))
    return Problem(
        q,
        q_scale,
        keys,
        key_scales,
        cache,
        v_scale if values == "int8" else None,
        prefix_sum(QUERY_LENS),
        torch.tensor(SEQ_LENS, dtype=torch.int32),
        table,
        rows,
    )


@pytest.mark.parametrize("values", VALUES)
def test_attention_is_that_of_what_the_codes_stand_for(values: str) -> None:
    problem = make_problem(values)
    for options in (dict(causal=True), dict(causal=True, window_left=9), dict(causal=False, softcap=1.5)):
        out, lse = ops.flash_attn_varlen_int8(**problem.arguments(), **options, return_lse=True)
        expected, expected_lse = problem.expected(
            options["causal"], options.get("window_left", -1), options.get("softcap", 0.0)
        )
        # int8 weights are off by up to 1 / 254 of the largest of their piece; values reach 4.
        tolerance = 0.05 if values == "int8" else 1e-5
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", VALUES)
def test_attention_is_within_the_bounds_of_the_oracle(values: str) -> None:
    problem = make_problem(values, seed=2, spread=3.0)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for options in (
        dict(causal=True, alibi_slopes=slopes),
        dict(softcap=2.0, sinks=slopes, lse_includes_sink=True),
        dict(causal=True, window_left=20, scale=0.3, out_dtype="bfloat16"),
    ):
        out, lse = ops.flash_attn_varlen_int8(**problem.arguments(), **options, return_lse=True)
        reference = oracle.flash_attn_varlen_int8(**problem.arguments(), **options)
        assert 0 < reference.worst_ratio(out, lse) <= 1
        assert str(out.dtype) == f"torch.{options.get('out_dtype', 'float32')}"


SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
OPTIONS = [
    dict(causal=True, window_left=20, alibi_slopes=SLOPES, alibi_sqrt=True, scale=0.3),
    dict(window_left=30, window_right=2, softcap=2.0),
    dict(causal=True, sinks=8 * SLOPES, lse_includes_sink=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window", "sinks"])
@pytest.mark.parametrize("values", ["int8", "bfloat16"])
def test_every_option_of_a_decode_is_that_of_the_oracle(values: str, options: dict) -> None:
    problem = make_problem(values, seed=9)
    mean = normal(numpy.random.default_rng(10), len(SEQ_LENS), KV_HEADS, DIM)
    shared = dict(
        query_start_loc=problem.query_start_loc,
        seq_lens=problem.seq_lens,
        block_table=problem.table,
        k_mean=mean,
        **options,
    )
    varlen = dict(
        q=problem.q,
        q_scale=problem.q_scale,
        k=problem.keys,
        k_scale=problem.key_scales,
        v=problem.values,
        v_scale=problem.v_scale,
    )
    paged = dict(
        q=problem.q,
        q_scale=problem.q_scale.T,
        key_cache=problem.keys,
        key_scale_cache=problem.key_scales,
        value_cache=problem.values,
        **({"v_scale": problem.v_scale} if values == "int8" else {}),
    )
    name = "paged_attention_int8" if values == "int8" else "paged_attention_mix"
    for function, arguments in (("flash_attn_varlen_int8", varlen), (name, paged)):
        out = torch.full((sum(QUERY_LENS), HEADS, DIM), float("nan"))
        lse = torch.full(out.shape[:2], float("nan"))
        got = getattr(ops, function)(**arguments, **shared, out=out, lse=lse)
        assert got is out
        reference = getattr(oracle, function)(**arguments, **shared, out_dtype="float32")
        assert 0 < reference.worst_ratio(out, lse) <= 1
        for argument, value in (("isa", "mmx"), ("executor", 2)):
            what = f"{function}. argument '{argument}'"
            with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=what):
                getattr(ops, function)(**arguments, **shared, **{argument: value})


def test_the_mean_of_the_keys_counts() -> None:
    problem = make_problem("float16", seed=3)
    mean = normal(numpy.random.default_rng(4), len(SEQ_LENS), KV_HEADS, DIM)
    problem.rows = [
        (codes.double() * scales[..., None] + mean[r], torch.ones_like(scales), v)
        for r, (codes, scales, v) in enumerate(problem.rows)
    ]
    out, lse = ops.flash_attn_varlen_int8(**problem.arguments(), k_mean=mean, causal=True, return_lse=True)
    expected, expected_lse = problem.expected(True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    # The softmax does not see what all keys have in common, the LSE does.
    without = ops.flash_attn_varlen_int8(**problem.arguments(), causal=True, return_lse=True)[1]
    assert (without - lse).abs().max() > 0.1


@pytest.mark.parametrize("values", VALUES)
def test_decode_that_saves_has_the_bits_of_a_write_and_an_attention(values: str) -> None:
    rng = numpy.random.default_rng(5)
    problem = make_problem(values, seed=5)
    tokens = sum(QUERY_LENS)
    key, key_scale = ops.scaled_int8_quant_for_attn(normal(rng, tokens, KV_HEADS, DIM))
    value = torch.from_numpy(rng.integers(-127, 127, (tokens, KV_HEADS, DIM))).to(VALUES[values])
    slots = [
        slot
        for r, (n, length) in enumerate(zip(QUERY_LENS, SEQ_LENS))
        for slot in slots_of(problem.table, r, range(length - n, length), BLOCK_SIZE)
    ]
    split = [cache.clone() for cache in (problem.keys, problem.values, problem.key_scales)]
    fused = [cache.clone() for cache in split]
    write = ops.reshape_and_cache_flash_int8 if values == "int8" else ops.reshape_and_cache_flash_mix
    write(key, value, key_scale, split[0], split[1], split[2], torch.tensor(slots))
    expected, expected_lse = ops.flash_attn_varlen_int8(
        **{**problem.arguments(), "k": split[0], "v": split[1], "k_scale": split[2]},
        causal=True,
        return_lse=True,
        out_dtype="float16",
    )

    decode = ops.paged_attention_int8 if values == "int8" else ops.paged_attention_mix
    reference = oracle.paged_attention_int8 if values == "int8" else oracle.paged_attention_mix
    arguments = dict(
        q=problem.q,
        q_scale=problem.q_scale.T.contiguous(),
        key_cache=fused[0],
        value_cache=fused[1],
        key_scale_cache=fused[2],
        query_start_loc=problem.query_start_loc,
        seq_lens=problem.seq_lens,
        block_table=problem.table,
        save_key=key,
        save_value=value,
        save_key_scale=key_scale,
        causal=True,
        out_dtype="float16",
        **({"v_scale": problem.v_scale} if values == "int8" else {}),
    )
    bounded = reference(**arguments)
    assert all((bits(a) == bits(b)).all() for a, b in zip(fused, (problem.keys, problem.values, problem.key_scales)))
    out, lse = decode(**arguments, return_lse=True)
    assert all((bits(a) == bits(b)).all() for a, b in zip(fused, split))
    assert (bits(out) == bits(expected)).all() and (bits(lse) == bits(expected_lse)).all()
    assert 0 < bounded.worst_ratio(out, lse) <= 1


def test_rows_do_not_depend_on_their_batch() -> None:
    problem = make_problem("int8", seed=6)
    whole = ops.flash_attn_varlen_int8(**problem.arguments(), causal=True, executor=attend.ThreadPool(2))
    alone = ops.flash_attn_varlen_int8(
        problem.q[4:24],
        problem.q_scale[:, 4:24],
        problem.keys,
        problem.key_scales,
        problem.values,
        torch.tensor([0, 20], dtype=torch.int32),
        problem.seq_lens[2:3],
        problem.table[2:3],
        v_scale=problem.v_scale,
        causal=True,
    )
    assert (bits(whole[4:24]) == bits(alone)).all()


def test_a_nan_scale_reaches_what_depends_on_it_and_nothing_else() -> None:
    problem = make_problem("int8", seed=7)
    clean = ops.flash_attn_varlen_int8(**problem.arguments(), causal=True)
    slot = slots_of(problem.table, 2, range(275, 276), BLOCK_SIZE)[0]
    problem.key_scales[slot // BLOCK_SIZE, 1, slot % BLOCK_SIZE] = float("nan")
    out = ops.flash_attn_varlen_int8(**problem.arguments(), causal=True)
    hit = torch.zeros(sum(QUERY_LENS), HEADS, dtype=torch.bool)
    hit[4 + 5 : 24, 2:] = True  # positions 275 .. 289 of request 2, heads of KV head 1
    assert out[hit].isnan().all()
    assert (bits(out[~hit]) == bits(clean[~hit])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_of_a_scale_per_token_and_head(dtype: torch.dtype) -> None:
    rng = numpy.random.default_rng(8)
    key, value = normal(rng, 20, KV_HEADS, DIM, dtype=dtype), normal(rng, 20, KV_HEADS, DIM, dtype=dtype)
    caches = torch.full((2, 3, BLOCK_SIZE, KV_HEADS, DIM), 100, dtype=torch.int8)
    scales = torch.full((2, 3, BLOCK_SIZE, KV_HEADS), float("nan"))
    slots = torch.tensor([*range(32, 48), *range(4)])  # block 2, then a part of block 0
    ops.reshape_and_cache_int8_per_token_head(key, value, caches[0], caches[1], scales[0], scales[1], slots)
    for rows, cache, scale in ((key, caches[0], scales[0]), (value, caches[1], scales[1])):
        codes, expected = ops.scaled_int8_quant_for_attn(rows)
        assert (cache.reshape(-1, KV_HEADS, DIM)[slots] == codes).all()
        assert (scale.reshape(-1, KV_HEADS)[slots] == expected).all()
    assert (scales.isnan().sum() == 2 * 28 * KV_HEADS) and (caches[:, 1] == 100).all()
    q = normal(rng, 5, HEADS, DIM, dtype=dtype)
    table, start = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    out = ops.flash_attn_varlen(
        q,
        caches[0],
        caches[1],
        start,
        seq_lens=torch.tensor([20], dtype=torch.int32),
        block_table=table,
        causal=True,
        k_token_scale=scales[0],
        v_token_scale=scales[1],
    )
    real = (caches.double() * scales[..., None])[:, [2, 0]].reshape(2, -1, KV_HEADS, DIM)[:, :20]
    expected, _ = attention64(q, real[0], real[1], visible(5, 20, True))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_the_one_tensor_of_level_2(framework: str) -> None:
    shape = ops.int8_mixed_cache_shape(5, KV_HEADS, BLOCK_SIZE, DIM)
    assert shape == (3, 5, KV_HEADS, BLOCK_SIZE, DIM)
    cache = torch.zeros(shape, dtype=torch.int8) if framework == "torch" else numpy.zeros(shape, dtype=numpy.int8)
    keys, values = ops.int8_mixed_key_view(cache), ops.int8_mixed_value_view(cache, "bfloat16")
    assert tuple(keys.shape) == tuple(values.shape) == shape[1:]
    keys[...] = 1
    values[3] = 2.0
    size = KV_HEADS * BLOCK_SIZE * DIM
    flat = numpy.asarray(cache).reshape(-1)
    assert (flat[: 5 * size] == 1).all() and (flat[5 * size : 11 * size] == 0).all()
    assert (flat[11 * size : 13 * size].view(numpy.uint16) == 0x4000).all() and (flat[13 * size :] == 0).all()


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, 5, 2, 16, 32, dtype=torch.int8),
        torch.zeros(3, 5, 2, 16, 32, dtype=torch.uint8),
        torch.zeros(3, 5, 2, 16, 64, dtype=torch.int8)[..., ::2],
        torch.zeros(3, 5, 2, 16, dtype=torch.int8),
        [1],
        None,
    ],
)
def test_other_tensors_are_no_cache_of_level_2(cache: object) -> None:
    for view in (ops.int8_mixed_key_view, lambda c: ops.int8_mixed_value_view(c, "float16")):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            view(cache)
        assert error.value.argument == "cache"


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("q", dict(q=torch.ones(24, HEADS, DIM))),
        ("q_scale", dict(q_scale=torch.ones(24, HEADS))),
        ("k_scale", dict(k_scale=torch.ones(NUM_BLOCKS, BLOCK_SIZE, KV_HEADS))),
        ("v_scale", dict(v_scale=None)),
        ("v_scale", dict(v_scale=torch.full((KV_HEADS, DIM), -1.0))),
        ("v", dict(v=torch.ones(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, DIM))),
        ("k_mean", dict(k_mean=torch.ones(3, KV_HEADS, DIM))),
        ("block_table", dict(block_table=torch.full((4, 19), NUM_BLOCKS, dtype=torch.int32))),
        ("seq_lens", dict(block_table=torch.zeros(4, 18, dtype=torch.int32))),
        ("block_table", dict(block_table=None)),
        ("seq_lens", dict(seq_lens=torch.tensor([40, 17, -290, 5], dtype=torch.int32))),
        ("q", dict(query_start_loc=prefix_sum([3, 1, 21, 0]))),
        ("out_dtype", dict(out_dtype="int8")),
        ("out", dict(out=torch.ones(24, HEADS, DIM + 1))),
    ],
)
def test_bad_arguments_are_named(argument: str, changes: dict) -> None:
    problem = make_problem("int8")
    for function in (ops.flash_attn_varlen_int8, oracle.flash_attn_varlen_int8):
        if function is oracle.flash_attn_varlen_int8 and argument == "out":
            continue  # the reference has none
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            function(**{**problem.arguments(), **changes})
        assert error.value.argument == argument
