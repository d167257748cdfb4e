# SPDX-License-Identifier: Apache-2.0
"""torch.ops.attend.*: opcheck, torch.compile, torch.export, gradients, threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import attend  # noqa: E402
import attend.torch  # noqa: E402
from attend import errors  # noqa: E402

STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def varlen():
    return (normal(7, 4, 16), normal(7, 2, 16), normal(7, 2, 8), STARTS), dict(cu_seqlens_kv=STARTS, causal=True)


def varlen_everything():
    args, kwargs = varlen()
    return args, kwargs | dict(scale=0.3, window_left=2, softcap=3.0, sinks=normal(4), return_lse=True)


def varlen_paged():
    table = torch.tensor([[3, 0, 0], [1, 2, 4]], dtype=torch.int32)
    kwargs = dict(seq_lens=torch.tensor([3, 9], dtype=torch.int32), block_table=table, alibi_slopes=normal(4).abs())
    return (normal(7, 4, 16), normal(5, 4, 2, 16), normal(5, 4, 2, 8), STARTS), kwargs


def kvcache():
    return (normal(2, 3, 4, 16), normal(2, 9, 2, 16), normal(2, 9, 2, 8)), dict(
        k_new=normal(2, 3, 2, 16, seed=1),
        v_new=normal(2, 3, 2, 8, seed=1),
        causal=True,
        cache_seqlens=torch.tensor([2, 6], dtype=torch.int32),
        return_lse=True,
    )


def kvcache_read():
    args, _ = kvcache()
    return args, dict(cache_leftpad=torch.tensor([1, 4], dtype=torch.int32))


def merge():
    return (normal(7, 4, 8), normal(7, 4), normal(7, 4, 8, seed=1), normal(7, 4, seed=1)), {}


def masked():
    (q, k, v), _ = kvcache()
    return (q, k, v, normal(2, 1, 3, 9) > 0), dict(softcap=2.0)


CASES = {
    "varlen": ("flash_attn_varlen", varlen),
    "varlen with everything": ("flash_attn_varlen", varlen_everything),
    "varlen over pages": ("flash_attn_varlen", varlen_paged),
    "cache": ("flash_attn_with_kvcache", kvcache),
    "cache only read": ("flash_attn_with_kvcache", kvcache_read),
    "merge": ("merge_attn_states", merge),
    "masked": ("masked_attention", masked),
}


def direct(name, args, kwargs):
    """The same through the plain functions."""
    if name == "masked_attention":
        return attend.torch.masked_attention(*args, **kwargs)
    kwargs = dict(kwargs, return_lse=True) if name == "merge_attn_states" else dict(kwargs)
    result = getattr(attend.ops, name)(*args, **kwargs)
    return result if kwargs.get("return_lse") else (result, torch.empty(0))


def same(actual, expected):
    actual, expected = ((r,) if isinstance(r, torch.Tensor) else r for r in (actual, expected))
    assert len(actual) == len(expected)
    assert all(a.equal(e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("case", CASES)
def test_operator(case):
    name, make = CASES[case]
    op = getattr(torch.ops.attend, name)
    args, kwargs = make()
    torch.library.opcheck(op.default, args, kwargs)
    here, there = make(), make()
    same(op(*here[0], **here[1]), direct(name, *there))
    for mine, plain, before in zip(here[0], there[0], make()[0]):
        assert mine.equal(plain)
        assert mine.equal(before) == (case != "cache" or mine is here[0][0])  # both caches are written


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_compile(case, backend):
    torch._dynamo.reset()
    name, make = CASES[case]
    op = getattr(torch.ops.attend, name)

    def around(q, *args, **kwargs):
        result = op(q * 2.0, *args, **kwargs)
        return result + 1.0 if isinstance(result, torch.Tensor) else (result[0] + 1.0, result[1])

    compiled = torch.compile(around, backend=backend, fullgraph=True)
    here, there = make(), make()
    with torch.no_grad():
        same(compiled(*here[0], **here[1]), around(*there[0], **there[1]))
    assert all(mine.equal(plain) for mine, plain in zip(here[0], there[0]))


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_writing_a_cache(stored):
    """One step as a program would trace it: the new rows are written, then attended to."""
    torch._dynamo.reset()
    rows, slots = normal(2, 3, 2, 16), torch.tensor([17, 3, -1])
    scale = torch.ones(1) if stored != torch.float32 else None

    def caches():
        return [torch.zeros(2, 16, 2, 16).to(stored) for _ in range(2)]

    def step(k, v):
        torch.ops.attend.reshape_and_cache_flash(rows[0], rows[1], k, v, slots, k_scale=scale, v_scale=scale)
        return k.float().sum() + v.float().sum()

    plain, mine, opcheck = caches(), caches(), caches()
    attend.ops.reshape_and_cache_flash(*rows, *plain, slots, k_scale=scale, v_scale=scale)
    assert plain[0][1, 1].float().abs().sum() > 0
    with torch.no_grad():
        torch.compile(step, backend="aot_eager", fullgraph=True)(*mine)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(mine, plain))
    if stored == torch.float32:
        torch.library.opcheck(torch.ops.attend.reshape_and_cache_flash.default, (rows[0], rows[1], *opcheck, slots), {})


def test_compile_with_inductor():
    torch._dynamo.reset()
    args, kwargs = varlen()

    def around(q):
        return torch.ops.attend.flash_attn_varlen(q, *args[1:], **kwargs)[0]

    with torch.no_grad():
        assert torch.compile(around, fullgraph=True)(args[0]).equal(around(args[0]))


class Layer(torch.nn.Module):
    def forward(self, q, k, v, starts):
        out, lse = torch.ops.attend.flash_attn_varlen(
            q, k, v, starts, cu_seqlens_kv=starts, causal=True, return_lse=True
        )
        return out.flatten(1) * 2.0, lse


def test_export_with_dynamic_lengths():
    args, _ = varlen()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Layer(), args, dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}, None))
    assert "attend.flash_attn_varlen" in program.graph_module.code
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    longer = (normal(12, 4, 16), normal(12, 2, 16), normal(12, 2, 8), starts)
    same(program.module()(*longer), Layer()(*longer))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_refused(case):
    name, make = CASES[case]
    args, kwargs = make()
    op = getattr(torch.ops.attend, name)
    args[0].requires_grad_()
    with pytest.raises(errors.InvalidArgument, match=r"inference only.*requires_grad=True"):
        op(*args, **kwargs)
    with torch.no_grad():
        op(*args, **kwargs)


def test_bad_input_keeps_its_name():
    args, kwargs = varlen()
    with pytest.raises(errors.InvalidArgument, match=r"\[flash_attn_varlen\] argument 'window_left': expected .*got"):
        torch.ops.attend.flash_attn_varlen(*args, **kwargs, window_left=-7)


_COUNT = """
import os, sys, torch, attend.torch
torch.set_num_threads(int(sys.argv[1]))
if len(sys.argv) > 2:
    attend.set_num_threads(int(sys.argv[2]))
before = len(os.listdir("/proc/self/task"))
starts = torch.tensor([0, 64], dtype=torch.int32)
q = torch.randn(64, 4, 16)
torch.ops.attend.flash_attn_varlen(q, q, q, starts, cu_seqlens_kv=starts)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("numbers, started", [(("1",), 0), (("3",), 2), (("3", "2"), 1)])
def test_threads_of_torch(numbers, started):
    """A pool of n has n - 1 threads besides the caller's; a number set in attend goes before torch's."""
    done = subprocess.run([sys.executable, "-c", _COUNT, *numbers], capture_output=True, text=True, check=True)
    assert int(done.stdout) == started
