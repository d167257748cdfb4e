# SPDX-License-Identifier: Apache-2.0
"""One argument after the other becomes something hostile: every function of caches, int8, differential attention, their
oracle and their vLLM names then works, or raises one of attend's errors, which names a function and an argument."""

from __future__ import annotations

import inspect
import re
from typing import Any, Callable

import numpy
import pytest
import torch

import attend
from attend import ops, oracle
from attend.compat import vllm_ops

I8, I32 = torch.int8, torch.int32


def ragged() -> dict[str, Any]:
    kv = torch.ones(3, 2, 32)
    return dict(
        q=torch.ones(1, 4, 32),
        k=kv,
        v=kv,
        query_start_loc=torch.tensor([0, 1], dtype=I32),
        cu_seqlens_kv=torch.tensor([0, 3], dtype=I32),
    )


def batch() -> dict[str, Any]:
    return dict(
        query_start_loc=torch.tensor([0, 1], dtype=I32),
        seq_lens=torch.tensor([3], dtype=I32),
        block_table=torch.zeros(1, 1, dtype=I32),
    )


def cache(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(4, 16, 2, 32, dtype=dtype)


def heads_first(dtype: torch.dtype = I8) -> torch.Tensor:
    return torch.zeros(4, 2, 16, 32, dtype=dtype)


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(1, 2, 32).to(dtype)


def new_rows(**changes: Any) -> dict[str, Any]:
    return dict(
        key=rows(), value=rows(), key_cache=cache(), value_cache=cache(), slot_mapping=torch.tensor([3]), **changes
    )


def new_codes(value: torch.dtype = I8) -> dict[str, Any]:
    return dict(
        key=rows(I8),
        value=rows(value),
        k_scale=torch.ones(1, 2),
        key_cache=heads_first(),
        value_cache=heads_first(value),
        key_scale_cache=torch.ones(4, 2, 16),
        slot_mapping=torch.tensor([3]),
    )


def codes() -> dict[str, Any]:
    return dict(
        q=torch.zeros(1, 4, 32, dtype=I8),
        q_scale=torch.ones(4, 1),
        k=heads_first(),
        k_scale=torch.ones(4, 2, 16),
        v=heads_first(),
        v_scale=torch.ones(2, 32),
    )


def decode(value: torch.dtype = I8) -> dict[str, Any]:
    scale = {"v_scale": torch.ones(2, 32)} if value == I8 else {}
    return dict(
        q=torch.zeros(1, 4, 32, dtype=I8),
        q_scale=torch.ones(1, 4),
        key_cache=heads_first(),
        key_scale_cache=torch.ones(4, 2, 16),
        value_cache=heads_first(value),
        **scale,
        **batch(),
    )


def their_decode() -> dict[str, Any]:
    ours = decode()
    return dict(
        output=torch.ones(1, 4, 32),
        query=ours["q"],
        query_scale=ours["q_scale"],
        key_cache=ours["key_cache"],
        key_scale_cache=ours["key_scale_cache"],
        value_cache=ours["value_cache"],
        value_scale_cache=ours["v_scale"],
        num_kv_heads=2,
        scale=0.2,
        block_tables=ours["block_table"],
        context_lens=ours["seq_lens"],
        block_size=16,
    )


def their_prefill() -> dict[str, Any]:
    return dict(
        **codes(),
        cu_seqlens_q=torch.tensor([0, 1], dtype=I32),
        cu_seqlens_k=torch.tensor([0, 3], dtype=I32),
        block_table=torch.zeros(1, 1, dtype=I32),
    )


def states() -> dict[str, Any]:
    out, lse = torch.ones(1, 4, 32), torch.ones(1, 4)
    return dict(prefix_out=out, prefix_lse=lse, suffix_out=out, suffix_lse=lse)


def their_states() -> dict[str, Any]:
    out, lse = torch.ones(1, 4, 32), torch.ones(4, 1)
    return dict(output=out.clone(), prefix_output=out, prefix_lse=lse, suffix_output=out, suffix_lse=lse)


def lambdas() -> dict[str, Any]:
    return dict.fromkeys(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"), torch.ones(4)) | {"lambda_init": 0.1}


def mapping() -> torch.Tensor:
    return torch.tensor([[0, 1]])


FUNCTIONS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    (ops.reshape_and_cache_flash, new_rows),
    (ops.swap_blocks, lambda: dict(src=cache(), dst=cache(), moves=[(0, 1)])),
    (ops.copy_blocks, lambda: dict(caches=[cache()], moves=[(0, 1)])),
    (ops.scaled_int8_quant_for_attn, lambda: dict(input=rows())),
    (ops.channel_mean, lambda: dict(input=rows(), start_loc=torch.tensor([0, 1], dtype=I32))),
    (ops.reshape_and_cache_flash_int8, new_codes),
    (ops.reshape_and_cache_flash_mix, lambda: new_codes(torch.float16)),
    (
        ops.reshape_and_cache_int8_per_token_head,
        lambda: (
            new_rows(key_scale_cache=torch.ones(4, 16, 2), value_scale_cache=torch.ones(4, 16, 2))
            | dict(key_cache=cache(I8), value_cache=cache(I8))
        ),
    ),
    (ops.flash_attn_varlen_int8, lambda: codes() | batch()),
    (ops.paged_attention_int8, decode),
    (ops.paged_attention_mix, lambda: decode(torch.float16)),
    (ops.int8_mixed_cache_shape, lambda: dict(num_blocks=3, num_kv_heads=2, block_size=16, head_size=8)),
    (ops.int8_mixed_key_view, lambda: dict(cache=torch.zeros(3, 2, 2, 16, 8, dtype=I8))),
    (ops.int8_mixed_value_view, lambda: dict(cache=torch.zeros(3, 2, 2, 16, 8, dtype=I8), dtype="float16")),
    (ops.differential_attention, ragged),
    (ops.differential_combine, lambda: dict(maps=torch.ones(1, 4, 32))),
    (ops.differential_lambda, lambdas),
    (ops.differential_lambda_init, lambda: dict(layer=1)),
    (
        ops.differential_reshape_and_cache,
        lambda: dict(key=rows(), value=rows(), kv_cache=torch.ones(2, 2, 1, 16, 1, 32), slot_mapping=torch.tensor([3])),
    ),
    (ops.differential_cache_shape, lambda: dict(num_blocks=3, block_size=16, num_kv_heads=2, head_size=8)),
    (ops.differential_stride_order, dict),
    (oracle.flash_attn_varlen, ragged),
    (oracle.flash_attn_with_kvcache, lambda: dict(q=torch.ones(1, 1, 4, 32), k_cache=cache(), v_cache=cache())),
    (
        oracle.appended_keys,
        lambda: dict(
            q=torch.ones(1, 1, 4, 32),
            k_cache=cache(),
            v_cache=cache(),
            k_new=rows()[None],
            v_new=rows()[None],
            cache_seqlens=torch.tensor([3], dtype=I32),
        ),
    ),
    (oracle.merge_attn_states, states),
    (oracle.flash_attn_varlen_int8, lambda: codes() | batch()),
    (oracle.paged_attention_int8, decode),
    (oracle.paged_attention_mix, lambda: decode(torch.float16)),
    (oracle.differential_attention, ragged),
    (oracle.differential_combine, lambda: dict(maps=torch.ones(1, 4, 32))),
    (oracle.differential_lambda, lambdas),
    (oracle.fp8_value, lambda: dict(codes=numpy.zeros(2, numpy.uint8), dtype="float8_e5m2")),
    (oracle.fp8_code, lambda: dict(x=rows(), scale=1.0, dtype="float8_e5m2")),
    (oracle.int8_code, lambda: dict(x=rows(), scale=1.0)),
    (oracle.int8_scale, lambda: dict(x=rows())),
    (oracle.fp8_ds_mla_encode, lambda: dict(latent=numpy.zeros((1, 512)), rope=numpy.zeros((1, 64), numpy.uint16))),
    (oracle.fp8_ds_mla_decode, lambda: dict(rows=numpy.zeros((1, 656), numpy.uint8))),
    (
        vllm_ops.reshape_and_cache_flash,
        lambda: new_rows(kv_cache_dtype="auto", k_scale=torch.ones(1), v_scale=torch.ones(1)),
    ),
    (vllm_ops.merge_attn_states, their_states),
    (vllm_ops.swap_blocks, lambda: dict(src=cache(), dst=cache(), block_size_in_bytes=4096, block_mapping=mapping())),
    (vllm_ops.copy_blocks, lambda: dict(key_caches=[cache()], value_caches=[cache()], block_mapping=mapping())),
    (vllm_ops.copy_blocks_mla, lambda: dict(kv_caches=[cache()], block_mapping=mapping())),
    (vllm_ops.scaled_int8_quant_for_attn, lambda: dict(x=rows(), mode=2)),
    (vllm_ops.reshape_and_cache_flash_int8, new_codes),
    (vllm_ops.reshape_and_cache_flash_mix, lambda: new_codes(torch.float16)),
    (vllm_ops.vllm_paged_attention_int8, their_decode),
    (vllm_ops.flash_attn_varlen_int8_func, their_prefill),
]

HOSTILE: list[Any] = [
    None,
    3,
    -1,
    2**70,
    2.5,
    float("nan"),
    "x",
    [],
    {},
    object(),
    (1, 2),
    [None],
    True,
    torch.zeros(0),
    torch.zeros(2, 2),
    torch.tensor(1),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros((1,) * 7),
    numpy.zeros((2, 2)),
    numpy.array([None]),
    torch.zeros(2, 2, device="meta"),
    torch.ones(1, 4, 32, requires_grad=True),
    torch.zeros(2, 3, 4, 5, 6, dtype=I8),
    torch.zeros(2, 4, 3, 10, dtype=torch.float16)[..., ::2],
    torch.full((1, 1), 2**31 - 1, dtype=I32),
    torch.tensor([[-1, 2**62]]),
    torch.zeros(3, 0, 5),
]
TEXT = r"\[[\w.:]+\] argument '\w[\w.]*': expected .*, got "


@pytest.mark.parametrize("function, good", FUNCTIONS, ids=[f"{f.__module__}.{f.__name__}" for f, _ in FUNCTIONS])
def test_hostile_values(function: Callable[..., Any], good: Callable[[], dict[str, Any]]) -> None:
    function(**good())
    refused = 0
    for parameter in inspect.signature(function).parameters:
        for value in HOSTILE:
            try:
                function(**{**good(), parameter: value})
            except (attend.InvalidArgument, attend.InvalidType, attend.Unsupported) as error:
                refused += 1
                assert re.match(TEXT, str(error), re.DOTALL), str(error)
    assert refused > 0
