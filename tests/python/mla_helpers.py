# SPDX-License-Identifier: Apache-2.0
"""Batches of latents and references in torch for the tests of MLA, FlashMLA and sparse attention."""

from __future__ import annotations

import math

import numpy
import torch

BLOCK = 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def i32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def prefix_sum(lengths) -> torch.Tensor:
    return i32([0, *numpy.cumsum(lengths).tolist()])


class LatentBatch:
    """Requests whose latents lie in the pages of a cache, between NaN."""

    def __init__(self, query_lens, seq_lens, heads, dim, dtype=torch.float32, block=BLOCK, seed=1):
        self.query_lens, self.seq_lens, self.heads, self.dim, self.block = query_lens, seq_lens, heads, dim, block
        self.q = normal((sum(query_lens), heads, dim), seed, dtype)
        self.rows = [normal((n, dim), seed + 1 + r, dtype) for r, n in enumerate(seq_lens)]
        widest = max(-(-n // block) for n in seq_lens) + 1
        num_blocks = len(seq_lens) * widest + 1
        order = torch.randperm(num_blocks, generator=generator(seed + 99)).tolist()
        self.block_table = i32([[order.pop() for _ in range(widest)] for _ in seq_lens])
        self.cache = torch.full((num_blocks, block, dim), math.nan).to(dtype)
        self.slots = []
        for r, rows in enumerate(self.rows):
            slots = [int(self.block_table[r, j // block]) * block + j % block for j in range(len(rows))]
            self.slots.append(slots)
            self.cache.view(-1, dim)[slots] = rows
        self.query_start_loc = prefix_sum(query_lens)
        self.lengths = i32(seq_lens)

    def arguments(self) -> dict:
        return dict(
            q=self.q,
            kv_cache=self.cache,
            block_table=self.block_table,
            query_start_loc=self.query_start_loc,
            seq_lens=self.lengths,
        )


def attend_rows(q, rows, value_dim, scale, *, visible=None, softcap=0.0, bias=None, sinks=None):
    """One query token [H, D] against its rows [N, D], in float64: (out [H, value_dim], lse [H], max_logits [H])."""
    logits = (q.double() @ rows.double().T) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(logits, -1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double())
    weights = torch.where(torch.isinf(total)[:, None], 0.0, torch.exp(logits - total[:, None]))
    if logits.shape[1] == 0:
        return torch.zeros(q.shape[0], value_dim).double(), lse, torch.full_like(lse, -math.inf)
    return weights @ rows.double()[:, :value_dim], lse, logits.max(-1).values


def attend_batch(
    batch,
    value_dim,
    scale,
    *,
    rows=None,
    causal=False,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    slopes=None,
    sinks=None,
):
    """attend_rows() of every token of a batch; `rows` replaces its latents."""
    outs, lses, token = [], [], 0
    for r, (query_len, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens)):
        keys = (batch.rows if rows is None else rows)[r]
        for i in range(query_len):
            position, j = i + seq_len - query_len, torch.arange(seq_len)
            visible = torch.ones(seq_len, dtype=torch.bool)
            if causal:
                visible &= j <= position
            if window_left >= 0:
                visible &= j >= position - window_left
            if window_right >= 0:
                visible &= j <= position + window_right
            bias = None if slopes is None else -slopes.double()[:, None] * (j - position).abs()[None]
            out, lse, _ = attend_rows(
                batch.q[token], keys, value_dim, scale, visible=visible[None], softcap=softcap, bias=bias, sinks=sinks
            )
            outs.append(out)
            lses.append(lse)
            token += 1
    return torch.stack(outs), torch.stack(lses)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Codes of finite numbers, saturating."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn)


def ds_mla_rows(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rows of fp8_ds_mla, uint8 [N, 656]: 512 codes, 4 scales, 64 bfloat16."""
    tiles = latent.float().view(-1, 4, 128)
    scales = (tiles.abs().amax(-1) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    codes = e4m3(tiles / scales[..., None]).view(torch.uint8).view(-1, 512)
    return torch.cat([codes, scales.view(torch.uint8), rope.view(torch.uint8)], -1)


def ds_mla_numbers(rows: torch.Tensor) -> torch.Tensor:
    """What they mean, bfloat16 [N, 576]."""
    codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().view(-1, 4, 128)
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    latent = (codes * scales[..., None]).to(torch.bfloat16).view(-1, 512)
    return torch.cat([latent, rows[:, 528:].contiguous().view(torch.bfloat16)], -1)


def ds_v4_blocks(latent: torch.Tensor, rope: torch.Tensor, block: int) -> torch.Tensor:
    """Blocks of fp8_ds_v4, uint8 [N / block, block, 584]: data of all tokens, then their exponents."""
    tiles = latent.float().view(-1, 7, 64)
    exponents = torch.ceil(torch.log2(tiles.abs().amax(-1).clamp(min=1e-4) / 448))
    codes = e4m3(tiles / torch.exp2(exponents)[..., None]).view(torch.uint8).view(-1, 448)
    data = torch.cat([codes, rope.view(torch.uint8)], -1).view(-1, block * 576)
    scales = torch.zeros(len(latent), 8, dtype=torch.uint8)
    scales[:, :7] = (exponents + 127).to(torch.uint8)
    return torch.cat([data, scales.view(-1, block * 8)], -1).view(-1, block, 584)


def ds_v4_numbers(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """What such tokens mean, bfloat16 [N, 512]."""
    tiles = latent.float().view(-1, 7, 64)
    factor = torch.exp2(torch.ceil(torch.log2(tiles.abs().amax(-1).clamp(min=1e-4) / 448)))[..., None]
    return torch.cat([(e4m3(tiles / factor).float() * factor).to(torch.bfloat16).view(-1, 448), rope], -1)


def assert_error(call, error, function: str, argument: str) -> None:
    """`call` raises `error`, and the text names function and argument."""
    try:
        call()
    except error as e:
        assert e.function == function and e.argument == argument, str(e)
        assert f"[{function}] argument '{argument}'" in str(e) and "expected" in str(e) and "got" in str(e), str(e)
        return
    raise AssertionError(f"{function}: no {error.__name__} for {argument}")
