# SPDX-License-Identifier: Apache-2.0
"""attend.compat.vllm_ops: the functions of CPU_ATTN, called as vLLM 0.32 calls them, compared with torch."""

from __future__ import annotations

import inspect
import math

import numpy
import pytest
import torch
from opsa_helpers import attention64, bits, block_table_of, normal, prefix_sum, slots_of, visible

import attend
from attend.compat import vllm_ops

BLOCKS, BLOCK_SIZE, HEADS, Q_HEADS, DIM = 8, 32, 2, 4, 32
QUERY_LENS, SEQ_LENS = [1, 5, 7], [40, 33, 7]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def caches_of(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer's cache [num_blocks, Hkv, block_size, 2 * D], cut as vLLM cuts it."""
    return memory.view(BLOCKS, HEADS, 2 * BLOCK_SIZE, DIM).chunk(2, dim=2)


class Layer:
    """A written cache, its requests and their queries."""

    def __init__(self, dtype: torch.dtype, name: str = "auto", k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        rng = numpy.random.default_rng(1)
        stored = torch.uint8 if name.startswith("fp8") else dtype
        self.memory = torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM, dtype=stored)
        self.table = block_table_of(rng, SEQ_LENS, BLOCK_SIZE, BLOCKS)
        self.query = normal(rng, sum(QUERY_LENS), Q_HEADS, DIM, dtype=dtype)
        self.rows = [[normal(rng, n, HEADS, DIM, dtype=dtype) for _ in range(2)] for n in SEQ_LENS]
        for r, (key, value) in enumerate(self.rows):
            slots = torch.tensor(slots_of(self.table, r, range(len(key)), BLOCK_SIZE))
            later = slots.clone()
            later[0] = -1
            for written in (later, slots[:1]):  # with a row that is skipped, then with more rows than slots
                vllm_ops.cpu_attn_reshape_and_cache(
                    key,
                    value,
                    *caches_of(self.memory),
                    written,
                    "vec",
                    k_scale=k_scale,
                    v_scale=v_scale,
                    kv_cache_dtype=name,
                )
        self.arguments = dict(
            query=self.query,
            output=torch.full_like(self.query, math.nan),
            query_start_loc=prefix_sum(QUERY_LENS),
            seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
            scale=0.2,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0,
            scheduler_metadata=None,
            s_aux=None,
            k_scale=k_scale,
            v_scale=v_scale,
            kv_cache_dtype=name,
        )
        self.arguments.update(zip(("key_cache", "value_cache"), caches_of(self.memory)))

    def run(self, **changes: object) -> torch.Tensor:
        arguments = {**self.arguments, **changes}
        assert vllm_ops.cpu_attention_with_kv_cache(**arguments) is None
        return arguments["output"]

    def expected(self, causal: bool, window: int, rows: list, softcap: float = 0.0) -> torch.Tensor:
        reach = window - 1 if window > 0 else -1
        outs = [
            attention64(q, k, v, visible(len(q), len(k), causal, reach, reach), 0.2, softcap)[0]
            for q, (k, v) in zip(self.query.split(QUERY_LENS), rows)
        ]
        return torch.cat(outs)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [-1, 1, 6])
def test_attention_over_what_was_written(dtype: torch.dtype, causal: bool, window: int) -> None:
    layer = Layer(dtype)
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(SEQ_LENS),
        num_heads=Q_HEADS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        seq_lens=layer.arguments["seq_lens"],
        dtype=dtype,
        query_start_loc=layer.arguments["query_start_loc"],
        causal=causal,
        sliding_window_size=window,
        isa="amx",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    assert isinstance(metadata, torch.Tensor)
    out = layer.run(causal=causal, sliding_window=window, softcap=3.0, scheduler_metadata=metadata)
    expected = layer.expected(causal, window, layer.rows, 3.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=LIMITS[dtype])


def test_rows_of_a_cache_lie_as_its_shape_says() -> None:
    layer = Layer(torch.float32)
    keys, values = caches_of(layer.memory)
    for r, (key, value) in enumerate(layer.rows):
        for position, slot in enumerate(slots_of(layer.table, r, range(len(key)), BLOCK_SIZE)):
            block, offset = divmod(slot, BLOCK_SIZE)
            assert (keys[block, :, offset] == key[position]).all()
            assert (values[block, :, offset] == value[position]).all()


@pytest.mark.parametrize("name, dtype", [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_caches_have_a_scale_of_keys_and_one_of_values(name: str, dtype: torch.dtype) -> None:
    k_scale, v_scale = 0.25, 2.0
    layer = Layer(torch.bfloat16, name, k_scale, v_scale)
    coded = [[(x.float() / s).to(dtype).float() * s for x, s in zip(pair, (k_scale, v_scale))] for pair in layer.rows]
    torch.testing.assert_close(layer.run().double(), layer.expected(True, -1, coded), rtol=0, atol=2e-2)


def test_sinks_and_slopes() -> None:
    layer = Layer(torch.float32)
    sinks = torch.tensor([0.5, -1.0, 2.0, 3.0])
    out = layer.run(s_aux=sinks)
    share = []
    for q, (k, v) in zip(layer.query.split(QUERY_LENS), layer.rows):
        plain, lse = attention64(q, k, v, visible(len(q), len(k), True), 0.2)
        share.append(plain * torch.sigmoid(lse - sinks)[..., None])
    torch.testing.assert_close(out.double(), torch.cat(share), rtol=0, atol=2e-6)
    again = layer.run(s_aux=sinks.bfloat16(), output=torch.empty_like(out))
    assert (bits(again) == bits(out)).all()  # these sinks are bfloat16 numbers
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    sloped = layer.run(alibi_slopes=slopes, output=torch.empty_like(out)).double()
    torch.testing.assert_close(sloped[:, 3], layer.expected(True, -1, layer.rows)[:, 3], rtol=0, atol=2e-6)
    q, (k, v) = layer.query[:1], layer.rows[0]
    bias = -slopes[:, None] * torch.arange(39, -1, -1)
    logits = torch.einsum("hd,shd->hs", q[0].double(), k.double().repeat_interleave(2, 1)) * 0.2 + bias
    first = torch.einsum("hs,shd->hd", logits.softmax(-1), v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(sloped[0], first, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("query", dict(query=torch.ones(13, 4))),
        ("key_cache", dict(key_cache=torch.zeros(BLOCKS, BLOCK_SIZE, DIM))),
        ("key_cache", dict(kv_cache_dtype="fp8")),
        ("value_cache", dict(value_cache=torch.zeros(BLOCKS, HEADS, 16, DIM))),
        ("output", dict(output=None)),
        ("output", dict(output=torch.ones(13, 4, 8))),
        ("seq_lens", dict(seq_lens=torch.tensor([40, 33, 2**31 - 1], dtype=torch.int32))),
        ("block_table", dict(block_table=torch.full((3, 2), BLOCKS, dtype=torch.int32))),
        ("query", dict(query_start_loc=torch.tensor([0, 1, 6, 99], dtype=torch.int32))),  # they are 13
        ("query_start_loc", dict(query_start_loc=torch.tensor([0, 7, 6, 13], dtype=torch.int32))),
        ("causal", dict(causal=None)),
        ("sliding_window", dict(sliding_window=0)),
        ("sliding_window", dict(sliding_window=(3, 0))),
        ("s_aux", dict(s_aux=torch.ones(4).double())),
        ("s_aux", dict(s_aux=torch.ones(3))),
        ("dynamic_causal", dict(dynamic_causal=torch.ones(3, dtype=torch.bool))),
        ("kv_cache_dtype", dict(kv_cache_dtype="int8")),
    ],
)
def test_bad_arguments_of_attention_write_nothing(argument: str, changes: dict) -> None:
    layer = Layer(torch.float32)
    with pytest.raises(attend.Error, match=rf"^\[cpu_attention_with_kv_cache\] argument '{argument}': expected"):
        layer.run(**changes)
    assert layer.arguments["output"].isnan().all()


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("key", dict(key=torch.ones(2, HEADS, DIM).double())),
        ("value", dict(value=torch.ones(2, 3, DIM))),
        ("key_cache", dict(key_cache=None)),
        ("value_cache", dict(value_cache=torch.zeros(BLOCKS, HEADS, 16, DIM))),
        ("slot_mapping", dict(slot_mapping=torch.tensor([BLOCKS * BLOCK_SIZE]))),
        ("isa", dict(isa="sse")),
        ("isa", dict(isa=None)),
        ("k_scale", dict(kv_cache_dtype="fp8", k_scale=0.0)),
        ("v_scale", dict(kv_cache_dtype="fp8", v_scale=torch.ones(1))),
    ],
)
def test_bad_arguments_of_writing_write_nothing(argument: str, changes: dict) -> None:
    stored = torch.uint8 if "kv_cache_dtype" in changes else torch.float32
    keys, values = caches_of(torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM, dtype=stored))
    good = dict(key=torch.ones(2, HEADS, DIM), value=torch.ones(2, HEADS, DIM), key_cache=keys, value_cache=values)
    good |= dict(slot_mapping=torch.tensor([0, 1]), isa="vec")
    with pytest.raises(attend.Error, match=rf"^\[cpu_attn_reshape_and_cache\] argument '{argument}': expected"):
        vllm_ops.cpu_attn_reshape_and_cache(**{**good, **changes})
    assert (keys == 0).all() and (values == 0).all()


def test_bad_arguments_of_metadata() -> None:
    lengths = torch.tensor([3], dtype=torch.int32)
    good = (1, 4, 2, 32, lengths, torch.float32, prefix_sum([1]), True, -1, "vec", False)
    for place, value, argument in ((0, None, "num_reqs"), (4, [3], "seq_lens"), (9, "x", "isa")):
        with pytest.raises(attend.Error, match=rf"^\[cpu_attn_get_scheduler_metadata\] argument '{argument}'"):
            vllm_ops.cpu_attn_get_scheduler_metadata(*good[:place], value, *good[place + 1 :])
    with pytest.raises(attend.Unsupported, match="dynamic_causal"):
        vllm_ops.cpu_attn_get_scheduler_metadata(*good, lengths)


@pytest.mark.parametrize(
    "name, parameters",
    [
        (
            "cpu_attn_get_scheduler_metadata",
            "num_reqs num_heads num_kv_heads head_dim seq_lens dtype query_start_loc causal sliding_window_size isa "
            "enable_kv_split dynamic_causal=None kv_cache_dtype=auto",
        ),
        (
            "cpu_attn_reshape_and_cache",
            "key value key_cache value_cache slot_mapping isa k_scale=1.0 v_scale=1.0 kv_cache_dtype=auto",
        ),
        (
            "cpu_attention_with_kv_cache",
            "query key_cache value_cache output query_start_loc seq_lens scale causal alibi_slopes sliding_window "
            "block_table softcap scheduler_metadata s_aux dynamic_causal=None k_scale=1.0 v_scale=1.0 "
            "kv_cache_dtype=auto",
        ),
        ("reshape_and_cache", "key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale"),
        ("swap_blocks_batch", "src_ptrs dst_ptrs sizes is_src_access_order_any=False"),
        ("pack_seq_triton", "x lengths pad_value=-inf block_t=64 block_d=64"),
        ("unpack_seq_triton", "packed_tensor lengths block_t=64 block_d=64"),
    ],
)
def test_parameters_are_those_of_vllm_032(name: str, parameters: str) -> None:
    signature = inspect.signature(getattr(vllm_ops, name))
    got = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in signature.parameters.values()]
    assert got == parameters.split()
