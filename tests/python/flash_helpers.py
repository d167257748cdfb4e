# SPDX-License-Identifier: Apache-2.0
"""Attention written out in float64, one request at a time."""

from __future__ import annotations

import math

import torch


def attention(
    q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None, sinks=None, sink_in_lse=True
):
    """(out [Sq, H, Dv], lse [H, Sq]) of q [Sq, H, D], k and v [Sk, Hkv, *]; -inf for rows without keys."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    logits = q @ k.transpose(1, 2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])[None]
    if slopes is not None:
        logits = logits - slopes.double()[:, None, None] * (position - key).abs()
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        visible &= key <= position
    if window[0] >= 0:
        visible &= key >= position - window[0]
    if window[1] >= 0 and not causal:
        visible &= key <= position + window[1]
    logits = logits.masked_fill(~visible, -math.inf)
    total = logits
    if sinks is not None:
        total = torch.cat([logits, sinks.double()[:, None, None].expand(-1, q.shape[1], 1)], -1)
    lse = torch.logsumexp(total, -1)
    weights = torch.where(lse[..., None] == -math.inf, 0.0, torch.exp(logits - lse[..., None]))
    if not sink_in_lse:
        lse = torch.logsumexp(logits, -1)
    return (weights @ v).transpose(0, 1), lse


def batched(q, k, v, slopes=None, **options):
    """The same for [B, S, H, D]: (out, lse [B, H, S])."""
    results = [
        attention(q[b], k[b], v[b], slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b], **options)
        for b in range(q.shape[0])
    ]
    return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def paged(rows, table, num_blocks, block_size):
    """A cache [num_blocks, block_size, H, D] that holds rows [B, S, H, D] where the table says; NaN elsewhere."""
    cache = torch.full((num_blocks, block_size, *rows.shape[2:]), math.nan, dtype=rows.dtype)
    for b in range(rows.shape[0]):
        for s in range(rows.shape[1]):
            cache[table[b, s // block_size], s % block_size] = rows[b, s]
    return cache


def assert_close(got, expected, tolerance=2e-5):
    """Equal within the tolerance; infinities in the same places."""
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def error_of(exception, call):
    """The text of the exception that the call must raise."""
    try:
        call()
    except exception as e:
        return str(e)
    raise AssertionError(f"no {exception.__name__}")
