# SPDX-License-Identifier: Apache-2.0
"""Packing padded batches as flash_attn.bert_padding does."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

from attend.compat import flash_attn_bert_padding as padding
from attend.errors import InvalidArgument

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
STATES = torch.randn(4, 5, 2, 3)


def test_packed_rows_are_those_of_transformers():
    for mask in (MASK, MASK.bool()):
        for ours, theirs in zip(padding.unpad_input(STATES, mask), _unpad_input(STATES, MASK)):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_padding_puts_rows_back():
    rows, indices, starts, longest, used = padding.unpad_input(STATES, MASK)
    assert starts.tolist() == [0, 3, 8, 9, 9] and longest == 5 and used.tolist() == [3, 5, 1, 0]
    assert starts.dtype == used.dtype == torch.int32
    back = padding.pad_input(rows, indices, 4, 5)
    assert torch.equal(back, STATES * MASK[:, :, None, None])
    assert torch.equal(back, _pad_input(rows, indices, 4, 5))


def test_unused_rows_are_kept_but_not_counted_as_used():
    unused = torch.zeros_like(MASK)
    unused[0, 1] = unused[3, 4] = 1
    rows, indices, starts, longest, used = padding.unpad_input(STATES, MASK, unused)
    assert starts.tolist() == [0, 4, 9, 10, 11] and longest == 5 and used.tolist() == [3, 5, 1, 0]
    assert indices.tolist()[0] == 1 and indices.tolist()[-1] == 19 and torch.equal(rows[-1], STATES[3, 4])


def test_rows_of_several_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    states = torch.randn(4, 6, 7)
    rows, indices, starts, longest = padding.unpad_input_for_concatenated_sequences(states, lengths)
    assert starts.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(rows, states.flatten(0, 1)[indices])


def test_rows_by_index():
    values = padding.index_first_axis(STATES.flatten(0, 1), torch.tensor([7, 3], dtype=torch.int32))
    assert torch.equal(values, STATES.flatten(0, 1)[[7, 3]])
    put = padding.index_put_first_axis(values, torch.tensor([1, 4]), 6)
    assert torch.equal(put[[1, 4]], values) and not put[[0, 2, 3, 5]].any()


@pytest.mark.parametrize(
    "argument, call",
    {
        "indices": lambda: padding.pad_input(torch.zeros(2, 3), torch.tensor([0, 20]), 4, 5),
        "indices ": lambda: padding.index_first_axis(torch.zeros(2, 3), torch.tensor([-1])),
        "indices  ": lambda: padding.index_put_first_axis(torch.zeros(2, 3), torch.tensor([1]), 3),
        "input": lambda: padding.index_first_axis(torch.zeros(2), torch.tensor([1])),
        "hidden_states": lambda: padding.unpad_input(torch.zeros(4, 6, 3), MASK),
        "unused_mask": lambda: padding.unpad_input(STATES, MASK, MASK[:2]),
        "attention_mask": lambda: padding.unpad_input(STATES, MASK.numpy()),
        "attention_mask_in_length": lambda: padding.unpad_input_for_concatenated_sequences(STATES, 4 * MASK),
    }.items(),
)
def test_errors_name_the_argument(argument, call):
    with pytest.raises(InvalidArgument) as error:
        call()
    assert error.value.argument == argument.strip()
