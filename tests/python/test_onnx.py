# SPDX-License-Identifier: Apache-2.0
"""The vectors of ONNX's Attention operator that ship inside the onnx package, computed by attend.ops, those with
a boolean mask by attend.torch.masked_attention().

Where ONNX aligns causal masks and windows at the first key, attend gets only the keys up to the last query's
position, which is the same. Heads whose size is no multiple of 8 are padded with zeros.
"""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case.node import attention as vectors

import attend
from attend.torch import masked_attention

NAMES = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
#: More than the cases had when this was written; a release with fewer must be noticed.
AT_LEAST = 48


class Case:
    """One call of the operator with its inputs and outputs by name."""

    def __init__(self, node, inputs, outputs, name):
        self.name = name.removeprefix("test_attention_")
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        given, results = iter(inputs), iter(outputs)
        self.inputs = {n: next(given) for n, used in zip(NAMES, node.input) if used}
        self.outputs = {n: next(results) for n in node.output if n}

    def refusal(self):
        """Why attend has no such feature; None if it has."""
        if "attn_mask" in self.inputs and self.inputs["attn_mask"].dtype != bool:
            return "attn_mask: no bias given as a tensor"
        if "past_key" in self.inputs and self.inputs["K"].shape[2] != self.inputs["Q"].shape[2]:
            return "past_key with fewer new keys than queries: the last queries stand behind every key"
        if self.attributes.get("softmax_precision", 1) != 1:
            return "softmax_precision: sums are float32"
        return None


def collect():
    found = []

    def expect(node, inputs, outputs, name, **_):
        found.append(Case(node, inputs, outputs, name))

    original, vectors.expect = vectors.expect, expect
    try:
        for name, export in sorted(inspect.getmembers(vectors.Attention, inspect.isfunction)):
            if name.startswith("export"):
                np.random.seed(len(found))
                export()
    finally:
        vectors.expect = original
    return found


CASES = collect()
HAVE = [c for c in CASES if c.refusal() is None]


def padded(x):
    """x with its last dimension filled with zeros to a multiple of 8."""
    return np.concatenate([x, np.zeros((*x.shape[:-1], -x.shape[-1] % 8), x.dtype)], -1)


def rows_first(x, heads):
    """[B, S, H, D] of ONNX's [B, H, S, D] or [B, S, H * D]."""
    return x.transpose(0, 2, 1, 3) if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1)


def tensors(case):
    heads, kv_heads = case.attributes.get("q_num_heads", 0), case.attributes.get("kv_num_heads", 0)
    q = rows_first(case.inputs["Q"], heads)
    k, v = (rows_first(case.inputs[n], kv_heads) for n in "KV")
    return q, k, v


def parameters(case, head_size):
    a = case.attributes
    return {
        "scale": a.get("scale", 1 / np.sqrt(head_size)),
        "causal": bool(a.get("is_causal", 0)),
        "softcap": a.get("softcap", 0.0),
        "window_left": a.get("left_window_size", -1),
        "window_right": a.get("right_window_size", -1),
    }


def compute(case):
    """[B, S, H, Dv]."""
    q, k, v = tensors(case)
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    options = parameters(case, q.shape[-1])
    total = np.asarray(case.inputs.get("nonpad_kv_seqlen", np.full(batch, keys)))
    positions = total - queries if "nonpad_kv_seqlen" in case.inputs else np.zeros(batch, int)
    if options["causal"] or options["window_left"] >= 0 or options["window_right"] >= 0:
        total = np.minimum(total, positions + queries)
    q, k, v, dim = padded(q), padded(k), padded(v), v.shape[-1]
    lengths = [int(n) for n in total]
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    out = attend.ops.flash_attn_varlen(
        q.reshape(-1, *q.shape[2:]),
        np.concatenate([k[i, :n] for i, n in enumerate(lengths)]),
        np.concatenate([v[i, :n] for i, n in enumerate(lengths)]),
        np.arange(0, batch * queries + 1, queries, dtype=np.int32),
        cu_seqlens_kv=start,
        **options,
    )
    return out.reshape(*q.shape[:3], -1)[..., :dim]


def compute_masked(case):
    """The same under a boolean mask, which the other ways to hide keys are made part of."""
    q, k, v = tensors(case)
    options, mask = parameters(case, q.shape[-1]), case.inputs["attn_mask"]
    nonpad = case.inputs.get("nonpad_kv_seqlen")
    total = np.full(len(q), k.shape[1]) if nonpad is None else nonpad
    shift = np.zeros(len(q), int) if nonpad is None else nonpad - q.shape[1]
    position = shift[:, None, None, None] + np.arange(q.shape[1])[:, None]
    key = np.arange(k.shape[1])
    seen = mask & (key < total[:, None, None, None])
    if options.pop("causal"):
        seen = seen & (key <= position)
    for name, distance in (("window_left", position - key), ("window_right", key - position)):
        size = options.pop(name)
        if size >= 0:
            seen = seen & (distance <= size)
    seen = np.broadcast_to(seen, (len(q), q.shape[2], q.shape[1], k.shape[1]))
    arguments = [torch.from_numpy(np.ascontiguousarray(x)) for x in (q, k, padded(v), seen)]
    return masked_attention(*arguments, **options).numpy()[..., : v.shape[-1]]


def compute_with_past(case):
    """The same, and the caches: past and new rows of a cache that has room behind them."""
    q, k, v = tensors(case)
    past = [rows_first(case.inputs[n], 0) for n in ("past_key", "past_value")]
    length, batch = past[0].shape[1], q.shape[0]
    total = length + k.shape[1]
    caches = []
    for x in past:
        cache = np.full((batch, total + 3, *x.shape[2:]), np.nan, x.dtype)
        cache[:, :length] = x
        caches.append(cache)
    out = attend.ops.flash_attn_with_kvcache(
        q, *caches, k_new=k, v_new=v, cache_seqlens=np.full(batch, length, np.int32), **parameters(case, q.shape[-1])
    )
    return out, *(c[:, :total] for c in caches)


@pytest.mark.parametrize("case", HAVE, ids=lambda c: c.name)
def test_vector(case):
    expected = case.outputs["Y"]
    if "past_key" in case.inputs:
        out, *present = compute_with_past(case)
        for cache, name in zip(present, ("present_key", "present_value")):
            assert np.array_equal(cache.transpose(0, 2, 1, 3), case.outputs[name])
    elif "attn_mask" in case.inputs:
        out = compute_masked(case)
    else:
        out = compute(case)
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 1, 3)
    # The operator rounds between its steps as its type does: eps of the type, a few times over.
    eps = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}[expected.dtype.name]
    assert out.dtype == expected.dtype
    np.testing.assert_allclose(
        out.reshape(expected.shape).astype(np.float64), expected.astype(np.float64), rtol=eps, atol=eps
    )


def test_nearly_all_cases_are_computed_and_the_rest_is_told():
    rest = [c for c in CASES if c.refusal() is not None]
    print(f"\n{len(HAVE)} cases of ONNX's Attention computed, {len(rest)} not:")
    for case in rest:
        print(f"  {case.name}: {case.refusal()}")
    assert len(HAVE) >= AT_LEAST
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize("left_out", ["softcap", "scale", "is_causal", "left_window_size"])
def test_each_feature_matters(left_out):
    """Without the attribute the result is another one, so the comparison above would see it."""
    for case in HAVE:
        if (
            left_out in case.attributes
            and "default" not in case.name
            and not {"past_key", "attn_mask"} & set(case.inputs)
        ):
            q, _, _ = tensors(case)
            if q.shape[1] == 1:
                continue
            before = compute(case)
            changed = Case.__new__(Case)
            changed.inputs, changed.attributes = case.inputs, dict(case.attributes)
            del changed.attributes[left_out]
            after = compute(changed)
            assert np.abs(before.astype(np.float64) - after.astype(np.float64)).max() > 1e-4, case.name
