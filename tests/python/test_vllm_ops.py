# SPDX-License-Identifier: Apache-2.0
"""attend.compat.vllm_ops, called as vLLM and its forks call these functions, compared with torch."""

from __future__ import annotations

import inspect
import math

import ml_dtypes
import numpy
import pytest
import torch
from opsa_helpers import attention64, bits, block_table_of, normal, prefix_sum, slots_of, visible

import attend
from attend import ops
from attend.compat import vllm_ops

NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM = 6, 16, 2, 32
ONE = torch.tensor([1.0])


def rows(seed: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = numpy.random.default_rng(seed)
    return normal(rng, tokens, HEADS, DIM, dtype=dtype), normal(rng, tokens, HEADS, DIM, dtype=dtype)


SLOTS = torch.tensor([3, -1, 40, 95], dtype=torch.int64)  # one row less than there are, one skipped


@pytest.mark.parametrize(
    "name, dtype, stored",
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("half", torch.float16, torch.float16),
        ("fp8", torch.float8_e4m3fn, torch.uint8),
        ("fp8_e4m3", torch.float8_e4m3fn, torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2, torch.uint8),
    ],
)
def test_reshape_and_cache_flash(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    key, value = rows(1, dtype if name in ("half",) else torch.bfloat16)
    kv_cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM).to(stored)
    k_scale, v_scale = torch.tensor(0.25), torch.tensor(0.5)
    vllm_ops.reshape_and_cache_flash(key, value, kv_cache[0], kv_cache[1], SLOTS, name, k_scale, v_scale)
    expected = torch.zeros(2, NUM_BLOCKS * BLOCK_SIZE, HEADS, DIM).to(dtype)
    for plane, (x, scale) in enumerate(((key, k_scale), (value, v_scale))):
        coded = (x.float() / scale).to(dtype) if name.startswith("fp8") else x
        for row in (0, 2, 3):
            expected[plane, SLOTS[row]] = coded[row]
    assert (bits(kv_cache) == bits(expected.reshape(kv_cache.shape))).all()


def test_reshape_and_cache_flash_of_numpy() -> None:
    key = numpy.random.default_rng(2).standard_normal((4, HEADS, DIM)).astype(numpy.float32)
    cache = numpy.zeros((2, NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM), dtype=numpy.uint8)
    scale = numpy.array([0.5], dtype=numpy.float32)
    vllm_ops.reshape_and_cache_flash(key, key, cache[0], cache[1], SLOTS.numpy(), "fp8", scale, scale)
    assert (cache[0, 2, 8] == (key[2] * 2).astype(ml_dtypes.float8_e4m3fn).view(numpy.uint8)).all()


@pytest.mark.parametrize(
    "name, error, argument",
    [
        ("nvfp4", attend.Unsupported, "kv_cache_dtype"),
        ("fp8_ds_mla", attend.Unsupported, "kv_cache_dtype"),
        (torch.float16, attend.InvalidType, "kv_cache_dtype"),
        ("float16", attend.InvalidArgument, "key_cache"),
        ("fp8_e5m2", attend.InvalidArgument, "key_cache"),
    ],
)
def test_other_cache_types_are_refused_by_name(name: object, error: type, argument: str) -> None:
    key, value = rows(3)
    caches = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM, dtype=torch.bfloat16)
    with pytest.raises(error, match=f"reshape_and_cache_flash. argument '{argument}'"):
        vllm_ops.reshape_and_cache_flash(key, value, caches[0], caches[1], SLOTS, name, ONE, ONE)
    assert (caches == 0).all()


def test_merge_attn_states() -> None:
    rng = numpy.random.default_rng(4)
    tokens, with_context = 7, 5
    outs = [normal(rng, tokens, HEADS, DIM) for _ in range(2)]
    lses = [normal(rng, HEADS, tokens) for _ in range(2)]
    lses[0][0, 1] = math.inf  # as FlashAttention 2 marks a row without keys
    outs[0][1, 0] = math.nan
    lses[0][1, 2] = lses[1][1, 2] = -math.inf
    lses[0][:, with_context:] = math.nan
    outs[0][with_context:] = math.nan
    output, output_lse = torch.full_like(outs[0], math.nan), torch.full((HEADS, tokens), math.nan)
    assert vllm_ops.merge_attn_states(output, outs[0], lses[0], outs[1], lses[1], output_lse, with_context) is None
    a, b = (torch.where(torch.isfinite(x), x.double(), -math.inf) for x in lses)
    total = torch.logaddexp(a, b)
    share = torch.where(torch.isneginf(a), 0.0, torch.exp(a - total)).T[..., None]
    expected = torch.where(share == 0, 0.0, share * outs[0].double()) + (1 - share) * outs[1].double()
    expected[2, 1] = 0
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(output_lse.double(), total, rtol=0, atol=1e-6)
    assert (output[with_context:] == outs[1][with_context:]).all()
    alone = torch.empty_like(output)
    vllm_ops.merge_attn_states(alone, outs[0], lses[0], outs[1], lses[1], prefill_tokens_with_context=with_context)
    assert (alone == output).all()
    vllm_ops.merge_attn_states(outs[1], outs[0], lses[0], outs[1], lses[1], lses[1], with_context)  # in place
    assert (outs[1] == output).all() and (lses[1] == output_lse).all()


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("output", dict(output=None)),
        ("output", dict(output=torch.empty(7, 2, 8).to(torch.int8))),
        ("prefix_output", dict(prefix_output=torch.empty(7, 2, 4))),
        ("prefix_lse", dict(prefix_lse=torch.empty(7, 2))),
        ("prefix_lse", dict(prefix_lse=torch.empty(14))),
        ("suffix_lse", dict(suffix_lse=[1.0])),
        ("output_lse", dict(output_lse=torch.empty(7, 2))),
        ("output_lse", dict(output_lse=torch.empty(2, 7).double())),
        ("prefill_tokens_with_context", dict(prefill_tokens_with_context=8)),
        ("output_scale", dict(output_scale=ONE)),
    ],
)
def test_bad_arguments_of_merges_have_the_names_of_the_caller(argument: str, changes: dict) -> None:
    good = dict(
        output=torch.empty(7, 2, 8),
        prefix_output=torch.ones(7, 2, 8),
        prefix_lse=torch.ones(2, 7),
        suffix_output=torch.ones(7, 2, 8),
        suffix_lse=torch.ones(2, 7),
        output_lse=torch.empty(2, 7),
    )
    with pytest.raises(
        (attend.InvalidArgument, attend.InvalidType, attend.Unsupported),
        match=rf"^\[merge_attn_states\] argument '{argument}': expected",
    ):
        vllm_ops.merge_attn_states(**{**good, **changes})


def test_blocks_move() -> None:
    rng = numpy.random.default_rng(5)
    layers = [torch.from_numpy(rng.integers(0, 100, (2, NUM_BLOCKS, 4, 2, 8))).to(torch.bfloat16) for _ in range(2)]
    expected = [layer.clone() for layer in layers]
    mapping = torch.tensor([[0, 5], [3, 1]])
    for layer in expected:
        layer[:, 5], layer[:, 1] = layer[:, 0], layer[:, 3]
    vllm_ops.copy_blocks([layer[0] for layer in layers], [layer[1] for layer in layers], mapping)
    assert all((a == b).all() for a, b in zip(layers, expected))
    vllm_ops.copy_blocks([], [], mapping)

    swap = torch.zeros(2, NUM_BLOCKS, 4, 2, 8, dtype=torch.bfloat16)
    vllm_ops.swap_blocks(layers[0][0], swap[0], 4 * 2 * 8 * 2, mapping)
    vllm_ops.swap_blocks(layers[0][1], swap[1], mapping)  # as older releases do
    assert (swap[:, 5] == layers[0][:, 0]).all() and (swap[:, 1] == layers[0][:, 3]).all()
    assert (swap[:, [0, 2, 3, 4]] == 0).all()

    latents = [torch.from_numpy(rng.integers(0, 100, (NUM_BLOCKS, 4, 24))).float() for _ in range(2)]
    expected = [cache.clone() for cache in latents]
    for cache in expected:
        cache[5], cache[1] = cache[0], cache[3]
    vllm_ops.copy_blocks_mla(latents, mapping)
    assert all((a == b).all() for a, b in zip(latents, expected))


def test_bad_moves_have_the_names_of_the_caller() -> None:
    caches = torch.zeros(2, 4, 2, 2, 8)
    good = torch.tensor([[0, 1]])
    for argument, call in (
        ("block_mapping", lambda: vllm_ops.swap_blocks(caches[0], caches[1], 128, torch.tensor([[0, 4]]))),
        ("block_mapping", lambda: vllm_ops.swap_blocks(caches[0], caches[1], 128, {0: 1})),
        ("block_mapping", lambda: vllm_ops.swap_blocks(caches[0], caches[1], 128)),
        ("block_size_in_bytes", lambda: vllm_ops.swap_blocks(caches[0], caches[1], 64, good)),
        ("block_size_in_bytes", lambda: vllm_ops.swap_blocks(caches[0], caches[1], 128.0, good)),
        ("dst", lambda: vllm_ops.swap_blocks(caches[0], caches[0], 128, good)),
        ("src", lambda: vllm_ops.swap_blocks(None, caches[0], 128, good)),
        ("value_caches", lambda: vllm_ops.copy_blocks([caches[0]], [], good)),
        ("key_caches", lambda: vllm_ops.copy_blocks(caches[0], [caches[1]], good)),
        ("block_mapping", lambda: vllm_ops.copy_blocks([caches[0]], [caches[1]], torch.tensor([[-1, 0]]))),
        ("kv_caches", lambda: vllm_ops.copy_blocks_mla(caches[0], good)),
    ):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            call()
        assert error.value.argument == argument and f"'{argument}'" in str(error.value)


QUERY_LENS, SEQ_LENS, Q_HEADS = [1, 3, 1], [20, 35, 16], 4


@pytest.mark.parametrize("level", [1, 2])
def test_a_layer_of_int8_attention_as_the_fork_runs_it(level: int) -> None:
    """Prefill writes all keys and attends; then a decode step saves its rows in the attention. Level 2: one tensor."""
    rng = numpy.random.default_rng(6)
    dtype = torch.float16
    table = block_table_of(rng, [n + 1 for n in SEQ_LENS], BLOCK_SIZE, 12)
    if level == 1:
        kv_cache = torch.full((2, 12, HEADS, BLOCK_SIZE, DIM), 111, dtype=torch.int8)
        key_cache, value_cache = kv_cache[0], kv_cache[1]
        value_scale = torch.from_numpy(rng.uniform(0.02, 0.03, (HEADS, DIM)).astype(numpy.float32))
    else:
        kv_cache = torch.full((3, 12, HEADS, BLOCK_SIZE, DIM), 0x7F, dtype=torch.int8)
        key_cache, value_scale = kv_cache[0], None
        value_cache = kv_cache[1:].view(dtype).reshape(12, HEADS, BLOCK_SIZE, DIM)
    key_scale_cache = torch.full((12, HEADS, BLOCK_SIZE), math.nan)

    def coded_values(value: torch.Tensor) -> torch.Tensor:
        return (
            vllm_ops.scaled_int8_quant_for_attn(value, 0, transpose_scale=False, scale=value_scale)[0]
            if (level == 1)
            else value
        )

    write = vllm_ops.reshape_and_cache_flash_int8 if level == 1 else vllm_ops.reshape_and_cache_flash_mix
    real = []
    for r, n in enumerate(SEQ_LENS):
        key, value = normal(rng, n, HEADS, DIM, dtype=dtype), normal(rng, n, HEADS, DIM, dtype=dtype)
        i8_key, key_scale = vllm_ops.scaled_int8_quant_for_attn(key, 2, transpose_scale=False)
        slots = torch.tensor(slots_of(table, r, range(n), BLOCK_SIZE))
        write(
            key=i8_key,
            value=coded_values(value),
            k_scale=key_scale,
            key_cache=key_cache,
            value_cache=value_cache,
            key_scale_cache=key_scale_cache,
            slot_mapping=slots,
            kv_cache_dtype=" ",
        )
        real.append([key, value])

    def compare(out: torch.Tensor, q: torch.Tensor, lengths: list[int]) -> None:
        expected = torch.cat(
            [
                attention64(x, k, v, visible(len(x), len(k), True, 30), 0.2)[0]
                for x, (k, v) in zip(torch.split(q, lengths), real)
            ]
        )
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() < 0.1 and (out.double() - expected).abs().mean() < 0.02

    q = normal(rng, sum(QUERY_LENS), Q_HEADS, DIM, dtype=dtype)
    i8_q, q_scale = vllm_ops.scaled_int8_quant_for_attn(q, 2, transpose_scale=True)
    output = torch.full(q.shape, math.nan, dtype=dtype)
    arguments = dict(
        q=i8_q,
        k=key_cache,
        v=value_cache,
        q_scale=q_scale,
        k_scale=key_scale_cache,
        v_scale=value_scale,
        cu_seqlens_q=prefix_sum(QUERY_LENS),
        cu_seqlens_k=prefix_sum(SEQ_LENS),
        max_seqlen_q=3,
        max_seqlen_k=35,
        softmax_scale=0.2,
        causal=True,
        window_size=(30, 0),
        alibi_slopes=None,
        softcap=0.0,
        sqrt_alibi=False,
        block_table=table,
    )
    assert vllm_ops.flash_attn_varlen_int8_func(**arguments, out=output, output_dtype=dtype) is output
    compare(output, q, QUERY_LENS)
    assert (bits(vllm_ops.flash_attn_varlen_int8_func(**arguments, output_dtype=dtype)) == bits(output)).all()

    q, key, value = (normal(rng, 3, heads, DIM, dtype=dtype) for heads in (Q_HEADS, HEADS, HEADS))
    i8_q, q_scale = vllm_ops.scaled_int8_quant_for_attn(q, 2)
    i8_key, key_scale = vllm_ops.scaled_int8_quant_for_attn(key, 2)
    decode = vllm_ops.vllm_paged_attention_int8 if level == 1 else vllm_ops.vllm_paged_attention_mix
    output = torch.full(q.shape, math.nan, dtype=dtype)
    arguments = dict(
        output=output,
        query=i8_q,
        query_scale=q_scale,
        key_cache=key_cache,
        key_scale_cache=key_scale_cache,
        value_cache=value_cache,
        num_kv_heads=HEADS,
        scale=0.2,
        block_tables=table,
        context_lens=torch.tensor([n + 1 for n in SEQ_LENS], dtype=torch.int32),
        block_size=BLOCK_SIZE,
        softcap=0.0,
        alibi_slopes=None,
        causal=True,
        window_left=30,
        window_right=0,
        use_sqrt_alibi=False,
        use_cuda_graph=False,
        max_context_len=36,
        cu_query_lens=prefix_sum([1, 1, 1]),
        max_query_len=1,
        save_key=i8_key,
        save_value=coded_values(value),
        save_key_scale=key_scale,
    )
    if level == 1:
        arguments["value_scale_cache"] = value_scale
    assert decode(**arguments) is None
    for r in range(3):
        real[r] = [torch.cat([old, new[r : r + 1]]) for old, new in zip(real[r], (key, value))]
    compare(output, q, [1, 1, 1])
    again = torch.empty_like(output)
    saved = dict.fromkeys(("save_key", "save_value", "save_key_scale"))
    decode(**{**arguments, **saved, "output": again, "cu_query_lens": None})
    assert (bits(again) == bits(output)).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True, window_left=9, alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), sqrt_alibi=True),
        dict(causal=False, window_left=9, window_right=1, softcap=1.5, alibi_slopes=torch.tensor([0.4, 0.3, 0.2, 0.1])),
    ],
)
def test_options_of_int8_attention_go_where_they_belong(options: dict) -> None:
    rng = numpy.random.default_rng(7)
    table = block_table_of(rng, SEQ_LENS, BLOCK_SIZE, 8)
    shape = (8, HEADS, BLOCK_SIZE, DIM)
    keys, values = (torch.from_numpy(rng.integers(-127, 127, shape, dtype=numpy.int8)) for _ in "kv")
    key_scales, value_scale = normal(rng, *shape[:3]).abs() / 99, torch.full((HEADS, DIM), 0.01)
    wide = values.half() / 50
    q, q_scale = ops.scaled_int8_quant_for_attn(normal(rng, sum(QUERY_LENS), Q_HEADS, DIM))
    starts, seq_lens = prefix_sum(QUERY_LENS), torch.tensor(SEQ_LENS, dtype=torch.int32)
    ours = {"alibi_sqrt" if name == "sqrt_alibi" else name: value for name, value in options.items()}
    expected = ops.flash_attn_varlen_int8(
        q, q_scale.T, keys, key_scales, values, starts, seq_lens, table, v_scale=value_scale, scale=0.2, **ours
    )
    expected_mix = ops.flash_attn_varlen_int8(
        q, q_scale.T, keys, key_scales, wide, starts, seq_lens, table, scale=0.2, **ours
    )

    theirs = {"use_sqrt_alibi" if name == "sqrt_alibi" else name: value for name, value in options.items()}
    out = torch.full(expected.shape, math.nan)
    vllm_ops.vllm_paged_attention_int8(
        out,
        q,
        q_scale,
        keys,
        key_scales,
        values,
        value_scale,
        HEADS,
        0.2,
        table,
        seq_lens,
        BLOCK_SIZE,
        cu_query_lens=starts,
        **theirs,
    )
    assert (bits(out) == bits(expected)).all()
    vllm_ops.vllm_paged_attention_mix(
        out, q, q_scale, keys, key_scales, wide, HEADS, 0.2, table, seq_lens, BLOCK_SIZE, cu_query_lens=starts, **theirs
    )
    assert (bits(out) == bits(expected_mix)).all()
    window = options["window_left"], options.get("window_right", -1)
    theirs = {name: value for name, value in options.items() if not name.startswith("window")}
    out = vllm_ops.flash_attn_varlen_int8_func(
        q,
        keys,
        values,
        q_scale.T,
        key_scales,
        value_scale,
        starts,
        prefix_sum(SEQ_LENS),
        3,
        35,
        softmax_scale=0.2,
        window_size=window,
        block_table=table,
        **theirs,
    )
    assert (bits(out) == bits(expected)).all()


def test_bad_arguments_of_int8_attention_have_the_names_of_the_caller() -> None:
    cache = torch.zeros(4, 2, 16, 32, dtype=torch.int8)
    decode = dict(
        output=torch.empty(1, 4, 32),
        query=torch.zeros(1, 4, 32, dtype=torch.int8),
        query_scale=torch.ones(1, 4),
        key_cache=cache,
        key_scale_cache=torch.ones(4, 2, 16),
        value_cache=cache.clone(),
        value_scale_cache=torch.ones(2, 32),
        num_kv_heads=2,
        scale=0.2,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        context_lens=torch.tensor([3], dtype=torch.int32),
        block_size=16,
    )
    vllm_ops.vllm_paged_attention_int8(**decode)
    for argument, value in (
        ("num_kv_heads", 4),
        ("block_size", 32),
        ("key_cache", cache[0]),
        ("scale", -1.0),
        ("query", torch.zeros(1, 4, 32)),
        ("query_scale", torch.ones(4, 2)),
        ("context_lens", 3),
        ("context_lens", torch.tensor([17], dtype=torch.int32)),
        ("value_scale_cache", None),
        ("block_tables", torch.full((1, 1), 4, dtype=torch.int32)),
        ("output", None),
        ("use_sqrt_alibi", 1),
        ("save_key", cache[:1, 0]),
    ):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            vllm_ops.vllm_paged_attention_int8(**{**decode, argument: value})
        assert error.value.argument == argument and error.value.function == "vllm_paged_attention_int8"
    prefill = dict(
        q=decode["query"],
        k=cache,
        v=decode["value_cache"],
        q_scale=torch.ones(4, 1),
        k_scale=torch.ones(4, 2, 16),
        v_scale=torch.ones(2, 32),
        cu_seqlens_q=prefix_sum([1]),
        cu_seqlens_k=prefix_sum([3]),
        block_table=decode["block_tables"],
    )
    assert vllm_ops.flash_attn_varlen_int8_func(**prefill).dtype == torch.float32
    for argument, value in (
        ("window_size", 3),
        ("cu_seqlens_k", prefix_sum([17])),
        ("softmax_scale", 0.0),
        ("cu_seqlens_k", torch.tensor(3)),
        ("block_table", None),
        ("output_dtype", torch.int8),
        ("cu_seqlens_q", torch.tensor([0, 1])),
        ("sqrt_alibi", 1),
    ):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            vllm_ops.flash_attn_varlen_int8_func(**{**prefill, argument: value})
        assert error.value.argument == argument and error.value.function == "flash_attn_varlen_int8_func"
    with pytest.raises(attend.InvalidArgument) as error:
        vllm_ops.flash_attn_varlen_int8_func(**prefill, out=torch.empty(1, 4, 32), output_dtype=torch.float16)
    assert error.value.argument == "out"
    for mode in (1, True, "2"):
        with pytest.raises(attend.InvalidArgument, match="'mode'"):
            vllm_ops.scaled_int8_quant_for_attn(torch.ones(1, 2, 8), mode)
    with pytest.raises(attend.InvalidArgument, match="'scale'"):
        vllm_ops.scaled_int8_quant_for_attn(torch.ones(1, 2, 8), 2, scale=torch.ones(2, 8))
    with pytest.raises(attend.InvalidArgument, match="'x'"):
        vllm_ops.scaled_int8_quant_for_attn(torch.ones(2, 8), 2)
    with pytest.raises(attend.Unsupported, match="'kv_cache_dtype'"):
        vllm_ops.reshape_and_cache_flash_int8(*[torch.ones(1)] * 7, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("reshape_and_cache_flash", "key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale"),
        (
            "merge_attn_states",
            "output prefix_output prefix_lse suffix_output suffix_lse output_lse=None "
            "prefill_tokens_with_context=None output_scale=None",
        ),
        ("copy_blocks", "key_caches value_caches block_mapping"),
        ("swap_blocks", "src dst block_size_in_bytes block_mapping=None"),
    ],
)
def test_signatures(name: str, parameters: str) -> None:
    signature = inspect.signature(getattr(vllm_ops, name))
    got = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in signature.parameters.values()]
    assert got == parameters.split()


MODULES = tuple(
    f"attend.compat.{name}"
    for name in ("vllm_ops", "_vllm_cache", "_vllm_cpu", "_vllm_int8", "_vllm_mla", "_vllm_ragged")
)


def test_everything_public_is_listed() -> None:
    public = {
        name
        for name, value in vars(vllm_ops).items()
        if inspect.isfunction(value) and value.__module__ in MODULES and name[0] != "_"
    }
    assert sorted(public) == vllm_ops.__all__ == sorted(vllm_ops.__all__)
    assert sorted(ops.__all__) == ops.__all__ and all(callable(getattr(ops, name)) for name in ops.__all__)
