# SPDX-License-Identifier: Apache-2.0
"""attend.compat.vllm_ops: pack_seq_triton, unpack_seq_triton and the merge with LSEs of base 2, compared with torch."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from opsa_helpers import normal

import attend
from attend.compat import vllm_ops

LENGTHS = torch.tensor([2, 0, 3], dtype=torch.int32)


@pytest.mark.parametrize("shape", [(8,), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_padded_and_come_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(numpy.random.default_rng(1), 6, *shape, dtype=dtype)  # a row more than the lengths say
    packed = vllm_ops.pack_seq_triton(x, LENGTHS)
    assert packed.dtype == dtype
    expected = torch.nn.utils.rnn.pad_sequence(x[:5].split(LENGTHS.tolist()), batch_first=True, padding_value=-math.inf)
    assert packed.shape == expected.shape and (packed == expected).all()
    assert (vllm_ops.unpack_seq_triton(packed, LENGTHS, block_t=32, block_d=32) == x[:5]).all()
    assert (vllm_ops.pack_seq_triton(x, LENGTHS.long(), 7, 64, 64)[1] == 7).all()


def test_bytes_and_numpy_are_padded() -> None:
    x = numpy.arange(20, dtype=numpy.uint8).reshape(5, 4)
    packed = vllm_ops.pack_seq_triton(x, LENGTHS.numpy(), pad_value=255)
    assert (packed[0, :2] == x[:2]).all() and (packed[2] == x[2:]).all()
    assert (packed[0, 2:] == 255).all() and (packed[1] == 255).all()
    assert (vllm_ops.unpack_seq_triton(packed, LENGTHS.numpy()) == x).all()


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("x", dict(x=torch.ones(5))),
        ("x", dict(x=torch.ones(5, 4).double())),
        ("x", dict(x=[[1.0]])),
        ("lengths", dict(lengths=torch.tensor([2, 4]))),
        ("lengths", dict(lengths=torch.tensor([-1, 2]))),
        ("lengths", dict(lengths=torch.tensor([2**62, 2**62, 2**62, 2**62]))),  # their sum as int64 is 0
        ("lengths", dict(lengths=torch.tensor([], dtype=torch.int32))),
        ("lengths", dict(lengths=torch.ones(2))),
        ("lengths", dict(lengths=[2, 3])),
        ("pad_value", dict(pad_value="0")),
        ("pad_value", dict(pad_value=10**400)),
        ("pad_value", dict(x=torch.ones(5, 4, dtype=torch.uint8))),
        ("pad_value", dict(x=torch.ones(5, 4, dtype=torch.uint8), pad_value=256)),
    ],
)
def test_bad_arguments_of_packing(argument: str, changes: dict) -> None:
    with pytest.raises(attend.Error, match=rf"^\[pack_seq_triton\] argument '{argument}': expected"):
        vllm_ops.pack_seq_triton(**{**dict(x=torch.ones(5, 4), lengths=LENGTHS), **changes})


@pytest.mark.parametrize(
    "argument, packed, lengths",
    [
        ("packed_tensor", torch.ones(3, 4), LENGTHS),
        ("packed_tensor", None, LENGTHS),
        ("lengths", torch.ones(2, 3, 4), LENGTHS),
        ("lengths", torch.ones(3, 2, 4), LENGTHS),
        ("lengths", torch.ones(1, 3, 4), torch.tensor([-1])),
    ],
)
def test_bad_arguments_of_unpacking(argument: str, packed: object, lengths: torch.Tensor) -> None:
    with pytest.raises(attend.Error, match=rf"^\[unpack_seq_triton\] argument '{argument}': expected"):
        vllm_ops.unpack_seq_triton(packed, lengths)


def test_merge_of_base_2() -> None:
    rng = numpy.random.default_rng(2)
    tokens, heads, dim = 5, 2, 16
    outs = [normal(rng, tokens, heads, dim) for _ in range(2)]
    lses = [normal(rng, heads, tokens) * 3 for _ in range(2)]
    lses[0][0, 1] = math.inf
    lses[0][1, 2] = lses[1][1, 2] = -math.inf
    a, b = (torch.where(torch.isfinite(x), x.double(), -math.inf) for x in lses)
    total = torch.logaddexp2(a, b)
    share = torch.where(torch.isneginf(a), 0.0, torch.exp2(a - total)).T[..., None]
    expected = share * outs[0].double() + (1 - share) * outs[1].double()
    expected[2, 1] = 0
    output = torch.full_like(outs[0], math.nan)
    merged, lse = vllm_ops.merge_attn_states_base2(outs[0], lses[0], outs[1], lses[1], output, True)
    assert merged is output and lse.shape == (heads, tokens)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), total, rtol=0, atol=3e-6)
    alone = vllm_ops.merge_attn_states_base2(outs[0], lses[0], outs[1], lses[1])
    assert (alone == output).all()
    arrays = [x.numpy() for pair in zip(outs, lses) for x in pair]
    assert (vllm_ops.merge_attn_states_base2(*arrays) == output.numpy()).all()


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("prefix_output", dict(prefix_output=None)),
        ("prefix_output", dict(prefix_output=torch.ones(7, 2, 4))),
        ("prefix_lse", dict(prefix_lse=torch.ones(7, 2))),
        ("suffix_lse", dict(suffix_lse=torch.ones(2, 7).double())),
        ("suffix_lse", dict(suffix_lse=[1.0])),
        ("output", dict(output=torch.ones(7, 2, 8).double())),
        ("output", dict(output=torch.ones(7, 1, 8).expand(7, 2, 8))),
        ("return_lse", dict(return_lse=1)),
    ],
)
def test_bad_arguments_of_merges_of_base_2(argument: str, changes: dict) -> None:
    good = dict(prefix_output=torch.ones(7, 2, 8), prefix_lse=torch.ones(2, 7))
    good |= dict(suffix_output=torch.ones(7, 2, 8), suffix_lse=torch.ones(2, 7))
    with pytest.raises(attend.Error, match=rf"^\[merge_attn_states_base2\] argument '{argument}': expected"):
        vllm_ops.merge_attn_states_base2(**{**good, **changes})
