# SPDX-License-Identifier: Apache-2.0
"""Attention as other libraries compute it, over the requests of one ragged, paged batch.

Each reference takes a Batch and keyword options of attend.ops.flash_attn_varlen() that it knows, and gives the output
[T, Hq, D] in float64 and the LSE [T, Hq] with the natural logarithm, or None where the library has none.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import pathlib
import sys
import types

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch.nn.attention.flex_attention import flex_attention

import attend


class Batch:
    """Requests with a query each of several tokens, the last ones of their sequences; caches of shuffled blocks.

    Rows of the caches that belong to no request are NaN.
    """

    def __init__(self, query_lens=(1, 3, 5), seq_lens=(9, 24, 5), heads=(4, 2), head_size=64, block_size=8, seed=7):
        rng = np.random.default_rng(seed)
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.num_heads, self.num_kv_heads = heads
        self.query_start_loc = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        self.q = rng.standard_normal((sum(query_lens), heads[0], head_size)).astype(np.float32)
        self.k = [rng.standard_normal((n, heads[1], head_size)).astype(np.float32) for n in seq_lens]
        self.v = [rng.standard_normal((n, heads[1], head_size)).astype(np.float32) for n in seq_lens]
        needed = [-(-n // block_size) for n in seq_lens]
        blocks = rng.permutation(sum(needed) + 2)
        self.block_table = np.zeros((len(seq_lens), max(needed)), np.int32)
        shape = (len(blocks), block_size, heads[1], head_size)
        self.k_cache, self.v_cache = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        for i, (n, count) in enumerate(zip(seq_lens, needed)):
            self.block_table[i, :count], blocks = blocks[:count], blocks[count:]
            for j in range(n):
                place = self.block_table[i, j // block_size], j % block_size
                self.k_cache[place], self.v_cache[place] = self.k[i][j], self.v[i][j]
        self.scale = 1 / np.sqrt(head_size)

    def rows(self, i):
        return slice(self.query_start_loc[i], self.query_start_loc[i + 1])

    def requests(self):
        """(queries [Sq, Hq, D], keys, values) of each request."""
        for i in range(len(self.seq_lens)):
            yield self.q[self.rows(i)], self.k[i], self.v[i]


def by_attend(b, **options):
    """What is tested."""
    out, lse = attend.ops.flash_attn_varlen(
        b.q,
        b.k_cache,
        b.v_cache,
        b.query_start_loc,
        seq_lens=np.array(b.seq_lens, np.int32),
        block_table=b.block_table,
        causal=True,
        return_lse=True,
        **options,
    )
    return out.astype(np.float64), lse.astype(np.float64)


def heads_first(x):
    """[1, H, S, D] in float64 of [S, H, D]."""
    return torch.from_numpy(x).double().transpose(0, 1)[None]


def with_sink(q, k, v, sinks):
    """Keys and values with one more of zeros, whose logit is 0 until somebody adds the sink."""
    if sinks is None:
        return q, k, v
    extra = np.zeros((1, *k.shape[1:]), k.dtype)
    return q, np.concatenate([k, extra]), np.concatenate([v, extra])


def bias_of(sq, sk, window_left, alibi_slopes, heads):
    """[H, Sq, Sk] in float64: minus infinity outside of the mask."""
    position, key = torch.arange(sk - sq, sk)[:, None], torch.arange(sk)
    seen = key <= position
    if window_left >= 0:
        seen &= key >= position - window_left
    slopes = torch.zeros(heads) if alibi_slopes is None else torch.from_numpy(alibi_slopes)
    bias = -slopes.double()[:, None, None] * (position - key).abs()
    return bias.masked_fill(~seen, float("-inf"))


def by_torch_sdpa(b, window_left=-1, alibi_slopes=None, sinks=None):
    """torch's scaled_dot_product_attention in float64; masks, ALiBi and sinks as its mask."""
    outputs = []
    for q, k, v in b.requests():
        mask = bias_of(len(q), len(k), window_left, alibi_slopes, b.num_heads)
        if sinks is not None:
            extra = torch.from_numpy(sinks).double()[:, None, None].expand(-1, len(q), 1)
            mask = torch.cat([mask, extra], -1)
        q, k, v = (heads_first(x) for x in with_sink(q, k, v, sinks))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[None], scale=b.scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs).numpy(), None


def by_torch_flex(b, window_left=-1, alibi_slopes=None, sinks=None, softcap=0.0):
    """torch's flex_attention, not compiled, in float64; everything in its score_mod."""
    outputs, lses = [], []
    for q, k, v in b.requests():
        sk, shift = len(k), len(k) - len(q)
        slopes = torch.zeros(b.num_heads) if alibi_slopes is None else torch.from_numpy(alibi_slopes)
        sink = torch.zeros(b.num_heads) if sinks is None else torch.from_numpy(sinks)

        def score(x, batch, head, i, j, sk=sk, shift=shift, slopes=slopes, sink=sink):
            position = i + shift
            if softcap:
                x = softcap * torch.tanh(x / softcap)
            x = x - slopes[head] * (position - j).abs()
            seen = j <= position
            if window_left >= 0:
                seen = seen & (j >= position - window_left)
            x = torch.where(seen, x, float("-inf"))
            return torch.where(j == sk, sink[head].double(), x)

        q, k, v = (heads_first(x) for x in with_sink(q, k, v, sinks))
        out, lse = flex_attention(q, k, v, score, scale=b.scale, enable_gqa=True, return_lse=True)
        outputs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outputs).numpy(), torch.cat(lses).numpy()


def gqa_session(heads, kv_heads, attributes):
    """ONNX Runtime with a model of one GroupQueryAttention."""
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total", "attention_bias", "head_sink"]
    kinds = dict.fromkeys(names, TensorProto.FLOAT) | dict.fromkeys(["seqlens_k", "total"], TensorProto.INT32)
    used = [*names[:7], "", "", "", *names[7:]]
    outputs = ["out", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", used, outputs, domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads,
        **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, t, None) for n, t in kinds.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def by_onnxruntime(b, window_left=-1, softcap=0.0, sinks=None, alibi_slopes=None):
    """ONNX Runtime's GroupQueryAttention: past keys, then new ones."""
    attributes = {"scale": float(b.scale), "softcap": softcap, "local_window_size": window_left + 1 or -1}
    session = gqa_session(b.num_heads, b.num_kv_heads, attributes)
    outputs = []
    for q, k, v in b.requests():
        sq, sk = len(q), len(k)
        bias = bias_of(sq, sk, -1, alibi_slopes, b.num_heads).clamp(min=-1e4).float().numpy()
        past = [np.ascontiguousarray(x[: sk - sq].transpose(1, 0, 2)[None]) for x in (k, v)]
        feeds = {
            "query": q.reshape(1, sq, -1),
            "key": k[sk - sq :].reshape(1, sq, -1),
            "value": v[sk - sq :].reshape(1, sq, -1),
            "past_key": past[0],
            "past_value": past[1],
            "seqlens_k": np.array([[sk - 1]], np.int32),
            "total": np.array([sk], np.int32),
            "attention_bias": bias[None],
            # Without a sink its weight is nothing.
            "head_sink": np.full(b.num_heads, -1e30, np.float32) if sinks is None else sinks,
        }
        outputs.append(session.run(["out"], feeds)[0].reshape(sq, b.num_heads, -1))
    return np.concatenate(outputs).astype(np.float64), None


def by_jax(b, window_left=-1, softcap=0.0):
    """The reference beside JAX's ragged paged attention for TPUs, on the CPU."""
    import jax
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    pages = np.stack([b.k_cache, b.v_cache], 3)  # K and V of a head beside each other
    pages = pages.reshape(*b.k_cache.shape[:2], 2 * b.num_kv_heads, -1)
    with jax.default_matmul_precision("highest"):
        out = ref_ragged_paged_attention(
            b.q,
            pages,
            np.array(b.seq_lens, np.int32),
            b.block_table,
            b.query_start_loc,
            np.array([len(b.seq_lens)], np.int32),
            sm_scale=float(b.scale),
            sliding_window=window_left + 1 or None,
            soft_cap=softcap or None,
        )
    return np.asarray(out, np.float64), None


def flashinfer_template(name):
    """A module of flashinfer.trace.templates; the package itself wants CUDA, so its __init__ is left out."""
    if "flashinfer" not in sys.modules:
        folder = next(p for p in map(pathlib.Path, sys.path) if (p / "flashinfer" / "trace").is_dir())
        package = types.ModuleType("flashinfer")
        package.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None, is_package=True)
        package.__path__ = package.__spec__.submodule_search_locations = [str(folder / "flashinfer")]
        sys.modules["flashinfer"] = package
    return importlib.import_module(f"flashinfer.trace.templates.{name}")


def by_flashinfer(b, window_left=-1):
    """flashinfer's reference of paged attention as TensorRT-LLM does it."""
    reference = flashinfer_template("attention")._trtllm_paged_attention_reference
    cache = np.stack([b.k_cache, b.v_cache], 1)
    out = reference(
        torch.from_numpy(b.q),
        torch.from_numpy(cache),
        torch.from_numpy(b.block_table),
        torch.tensor(b.seq_lens),
        causal=True,
        kv_layout="NHD",
        bmm1_scale=float(b.scale),
        cum_seq_lens_q=torch.from_numpy(b.query_start_loc),
        window_left=window_left,
    )
    return out.double().numpy(), None


def by_flashinfer_pages(b):
    """flashinfer's reference of paged prefill: bfloat16 outputs, the LSE to base 2. Needs full pages."""
    reference = flashinfer_template("attention")._gqa_paged_prefill_reference
    size = b.k_cache.shape[1]
    assert all(n % size == 0 for n in b.seq_lens)
    pages = [b.block_table[i, : n // size] for i, n in enumerate(b.seq_lens)]
    out, lse = reference(
        torch.from_numpy(b.q),
        torch.from_numpy(b.k_cache),
        torch.from_numpy(b.v_cache),
        torch.from_numpy(b.query_start_loc),
        torch.tensor(np.concatenate([[0], np.cumsum([len(p) for p in pages])])),
        torch.from_numpy(np.concatenate(pages)),
        float(b.scale),
    )
    return out.double().numpy(), lse.double().numpy() * np.log(2)
