# SPDX-License-Identifier: Apache-2.0
"""attend.batch: against the rules written out in Python, and what lives as long as what."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from backends_helpers import BLOCK, attention, paged_table, prefix_sum, slots_of

import attend
from attend import batch
from attend.batch import CommonMetadata


def random_batch(seed, **fields):
    rng = np.random.default_rng(seed)
    query_lens = rng.integers(0, 40, rng.integers(1, 7)).tolist()
    seq_lens = [q + int(rng.integers(0, 70)) * int(rng.integers(0, 2)) for q in query_lens]
    table, _ = paged_table(rng, seq_lens)
    return query_lens, seq_lens, CommonMetadata(prefix_sum(query_lens), seq_lens, block_table=table, **fields)


def test_sizes_follow_from_lengths():
    m = CommonMetadata([0, 3, 4, 9], [3, 17, 5])
    assert (m.num_reqs, m.num_tokens, m.max_query_len, m.max_seq_len) == (3, 9, 5, 17)
    assert m.block_table is None and m.slot_mapping is None and m.positions is None and m.causal
    assert m.key_start_loc().tolist() == [0, 3, 20, 25]


def test_bounds_may_be_loose_but_not_tight():
    m = CommonMetadata([0, 3], [7], max_query_len=64, max_seq_len=128)
    assert (m.max_query_len, m.max_seq_len) == (64, 128)
    with pytest.raises(attend.InvalidArgument, match="max_seq_len"):
        CommonMetadata([0, 3], [7], max_seq_len=6)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda x: np.array(x, np.int32),
        lambda x: np.array(x, np.int64),
        lambda x: np.repeat(x, 2)[::2],
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
    ],
)
def test_numbers_come_from_any_framework(make):
    m = CommonMetadata(
        make([0, 3, 4]),
        make([5, 17]),
        positions=make([2, 3, 4, 16]),
        is_prefilling=[True, False],
        logits_indices=make([2, 3]),
        slot_mapping=make([9, -1, 7, 0]),
    )
    assert m.query_start_loc.tolist() == [0, 3, 4] and m.query_start_loc.dtype == np.int32
    assert m.seq_lens.tolist() == [5, 17]
    assert m.positions.tolist() == [2, 3, 4, 16] and m.positions.dtype == np.int64
    assert m.is_prefilling.tolist() == [1, 0]
    assert m.logits_indices.tolist() == [2, 3]
    assert m.slot_mapping.tolist() == [9, -1, 7, 0]


def test_numbers_are_copied_and_read_only():
    lengths = np.array([5, 17], np.int32)
    m = CommonMetadata([0, 3, 4], lengths)
    lengths[:] = 0
    assert m.seq_lens.tolist() == [5, 17]
    with pytest.raises(ValueError, match="read-only"):
        m.seq_lens[0] = 1
    with pytest.raises(AttributeError):
        m.num_reqs = 7


@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"query_start_loc": [1, 3, 4]}, "query_start_loc"),
        ({"query_start_loc": [0, 5, 4]}, "query_start_loc"),
        ({"query_start_loc": [0, 4]}, "query_start_loc"),
        ({"query_start_loc": [0, 3, 2**40]}, "query_start_loc"),
        ({"seq_lens": [5, 0]}, "seq_lens"),
        ({"seq_lens": [[5, 17]]}, "seq_lens"),
        ({"seq_lens": 5}, "seq_lens"),
        ({"seq_lens": np.array([[5, 17]])}, "seq_lens"),
        ({"seq_lens": np.array([5.0, 17.0], np.float32)}, "seq_lens"),
        ({"seq_lens": np.array(["a", "b"])}, "seq_lens"),
        ({"block_table": np.zeros((1, 3), np.int32)}, "block_table"),
        ({"block_table": np.zeros((2, 3), np.int64)}, "block_table"),
        ({"block_table": [[0, 1], [2, 3]]}, "block_table"),
        ({"block_table": np.zeros((2, 6), np.int32)[:, ::2]}, "block_table"),
        ({"slot_mapping": [1, 2, 3]}, "slot_mapping"),
        ({"slot_mapping": [1, 2, 3, -2]}, "slot_mapping"),
        ({"positions": [0, 1, -5, 3]}, "positions"),
        ({"request_causal": [True]}, "request_causal"),
        ({"request_causal": [1, 0]}, "request_causal"),
        ({"encoder_seq_lens": [-1, 2]}, "encoder_seq_lens"),
        ({"causal": 1}, "causal"),
        ({"num_reqs": -1}, "num_reqs"),
        ({"num_tokens": 3}, "query_start_loc"),
        ({"num_reqs": 2**31}, "num_reqs"),
    ],
)
def test_what_is_wrong_is_named(changes, argument):
    fields = {"query_start_loc": [0, 3, 4], "seq_lens": [5, 17]} | changes
    with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
        CommonMetadata(**fields)
    assert error.value.argument == argument and f"'{argument}'" in str(error.value)


def test_width_of_the_block_table():
    m = CommonMetadata([0, 3], [33], block_table=np.zeros((1, 2), np.int32))
    m.validate(17)
    with pytest.raises(attend.InvalidArgument, match="block_table"):
        m.validate(16)


def test_replace():
    table = np.array([[0], [1]], np.int32)
    m = CommonMetadata([0, 3, 4], [5, 7], block_table=table, max_seq_len=99, positions=[2, 3, 4, 6])
    slots = batch.make_slot_mapping(m, 16)
    other = m.replace(slot_mapping=slots)
    assert other.slot_mapping.tolist() == [2, 3, 4, 22] and m.slot_mapping is None
    assert other.max_seq_len == 99 and other.block_table is table and other.positions.tolist() == [2, 3, 4, 6]
    assert m.replace(seq_lens=[8, 9]).max_seq_len == 9
    with pytest.raises(TypeError, match="no_such_field"):
        m.replace(no_such_field=1)


def test_unpadded():
    m = CommonMetadata(
        [0, 3, 4, 4],
        [5, 17, 0],
        num_reqs=2,
        slot_mapping=[1, 2, 3, 4, -1, -1],
        positions=[0, 1, 2, 16, 0],
        block_table=np.zeros((3, 2), np.int32),
    )
    u = m.unpadded()
    assert u.query_start_loc.tolist() == [0, 3, 4] and u.seq_lens.tolist() == [5, 17]
    assert u.slot_mapping.tolist() == [1, 2, 3, 4] and u.positions.tolist() == [0, 1, 2, 16]
    one = m.unpadded(3, 1)
    assert (one.num_reqs, one.num_tokens) == (1, 3) and one.block_table is m.block_table


@pytest.mark.parametrize("seed", range(20))
def test_slot_mapping(seed):
    query_lens, seq_lens, m = random_batch(seed)
    expected = slots_of(m.block_table, query_lens, seq_lens)
    np.testing.assert_array_equal(batch.make_slot_mapping(m, BLOCK), expected)
    padded = batch.make_slot_mapping(m, BLOCK, padded_tokens=m.num_tokens + 5)
    np.testing.assert_array_equal(padded, np.append(expected, [-1] * 5))


def test_slot_mapping_of_a_window():
    table = np.array([[4, 2]], np.int32)
    m = CommonMetadata([0, 20], [20], block_table=table)
    assert batch.make_slot_mapping(m, 16, sliding_window=3).tolist() == [-1] * 17 + [33, 34, 35]
    later = CommonMetadata([0, 2], [20], block_table=table)  # with computed tokens nothing is left out
    assert batch.make_slot_mapping(later, 16, sliding_window=1).tolist() == [34, 35]


def test_slot_mapping_has_the_framework_of_the_table():
    lengths = {"query_start_loc": [0, 3], "seq_lens": [3]}
    table = torch.tensor([[7]], dtype=torch.int32)
    of_torch = batch.make_slot_mapping(CommonMetadata(**lengths, block_table=table), 16)
    assert isinstance(of_torch, torch.Tensor) and of_torch.dtype == torch.int64
    assert of_torch.tolist() == [112, 113, 114]
    without = batch.make_slot_mapping(CommonMetadata(**lengths), 16)
    assert isinstance(without, np.ndarray) and without.tolist() == [-1] * 3


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"block_size": 0}, "block_size"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"padded_tokens": 1}, "padded_tokens"),
        ({"block_size": "a"}, "block_size"),
    ],
)
def test_slot_mapping_errors(options, argument):
    m = CommonMetadata([0, 3], [3], block_table=np.zeros((1, 1), np.int32))
    with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=f"'{argument}'"):
        batch.make_slot_mapping(m, **({"block_size": 16} | options))
    with pytest.raises(attend.InvalidType, match="'metadata'.*CommonMetadata.*got int"):
        batch.make_slot_mapping(3, 16)


@pytest.mark.parametrize("seed", range(40))
def test_split(seed):
    rng = np.random.default_rng(seed)
    query_lens = rng.integers(1, 5, 6)
    computed = rng.integers(0, 3, 6)
    prefilling = rng.integers(0, 2, 6).astype(bool)
    threshold = int(rng.integers(1, 4))
    m = CommonMetadata(prefix_sum(query_lens), query_lens + computed, is_prefilling=prefilling)
    for uniform in (False, True):
        for short_extends in (False, True):
            for fresh in (False, True):
                decodes = 0
                for r in range(6):
                    is_decode = query_lens[r] <= threshold
                    is_decode &= not uniform or query_lens[r] == query_lens[0]
                    is_decode &= short_extends or not prefilling[r]
                    is_decode &= not fresh or computed[r] > 0
                    if not is_decode:
                        break
                    decodes += 1
                split = batch.split_decodes_and_prefills(
                    m,
                    decode_threshold=threshold,
                    require_uniform=uniform,
                    treat_short_extends_as_decodes=short_extends,
                    fresh_prompts_are_prefills=fresh,
                )
                tokens = int(query_lens[:decodes].sum())
                assert split == (decodes, 6 - decodes, tokens, m.num_tokens - tokens), (uniform, short_extends, fresh)


def test_split_errors():
    m = CommonMetadata([0, 3], [3])
    with pytest.raises(attend.InvalidArgument, match="is_prefilling"):
        batch.split_decodes_and_prefills(m, treat_short_extends_as_decodes=False)
    with pytest.raises(attend.InvalidArgument, match="decode_threshold"):
        batch.split_decodes_and_prefills(m, decode_threshold=0)


@pytest.mark.parametrize("seed", range(30))
def test_reorder(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 12))
    prompt = rng.integers(1, 30, n)
    computed = rng.integers(0, 30, n) * rng.integers(0, 2, n)
    scheduled = rng.integers(1, 6, n)
    threshold = int(rng.integers(1, 4))

    def region(r):
        if computed[r] == 0:
            return 3
        if scheduled[r] <= threshold and computed[r] >= prompt[r]:
            return 0
        return 1 if scheduled[r] <= threshold else 2

    regions = [region(r) for r in range(n)]
    order = list(range(n))
    for a, b in batch.reorder_swaps(scheduled, computed, prompt, threshold):
        order[a], order[b] = order[b], order[a]
    assert [regions[r] for r in order] == sorted(regions)
    if regions == sorted(regions):
        assert order == list(range(n))


def test_reorder_errors():
    with pytest.raises(attend.InvalidArgument, match="num_prompt_tokens"):
        batch.reorder_swaps([1, 2], [1, 2], [1])
    with pytest.raises(attend.InvalidArgument, match="decode_threshold"):
        batch.reorder_swaps([1], [1], [1], 0)


def test_fast_prefill():
    table = np.array([[0], [1], [2]], np.int32)
    m = CommonMetadata(
        [0, 4, 5, 8],
        [9, 5, 3],
        block_table=table,
        positions=[5, 6, 7, 8, 4, 0, 1, 2],
        logits_indices=[2, 3, 4, 7],
        slot_mapping=list(range(8)),
    )
    kept = batch.make_kv_sharing_fast_prefill_metadata(m)
    assert kept.query_start_loc.tolist() == [0, 2, 3, 4] and kept.seq_lens.tolist() == [9, 5, 3]
    assert kept.positions.tolist() == [7, 8, 4, 2] and kept.logits_indices.tolist() == [0, 1, 2, 3]
    assert kept.slot_mapping is None and kept.block_table is table
    with pytest.raises(attend.InvalidArgument, match="logits_indices"):
        batch.make_kv_sharing_fast_prefill_metadata(m.replace(logits_indices=[0, 3]))


@pytest.mark.parametrize("make", [lambda table: table, torch.from_numpy])
def test_local_attention(make):
    """Attention over the virtual batch is that of keys since the last multiple of the chunk."""
    rng = np.random.default_rng(3)
    query_lens, seq_lens, chunk = [5, 40, 1], [30, 71, 64], 32
    table, num_blocks = paged_table(rng, seq_lens)
    m = CommonMetadata(prefix_sum(query_lens), seq_lens, block_table=make(table))
    local, request_of = batch.make_local_attention_virtual_batches(chunk, BLOCK, m)
    assert isinstance(local.block_table, type(make(table)))
    assert request_of.tolist() == [0, 1, 1, 1, 2]
    assert local.query_start_loc.tolist() == [0, 5, 6, 38, 45, 46]
    rows = [rng.standard_normal((n, 1, 32), np.float32) for n in seq_lens]
    cache = np.full((num_blocks, BLOCK, 1, 32), np.nan, np.float32)
    for r, n in enumerate(seq_lens):
        for p in range(n):
            cache[table[r, p // BLOCK], p % BLOCK] = rows[r][p]
    q = rng.standard_normal((sum(query_lens), 2, 32), np.float32)
    del m
    gc.collect()
    out = attend.ops.flash_attn_varlen(
        make(q),
        make(cache),
        make(cache),
        make(np.array(local.query_start_loc)),
        seq_lens=make(np.array(local.seq_lens)),
        block_table=local.block_table,
        causal=True,
    )
    expected, at = [], 0
    for r, (n_q, n) in enumerate(zip(query_lens, seq_lens)):
        for p in range(n - n_q, n):
            keys = rows[r][p // chunk * chunk : p + 1]
            expected.append(attention(q[at : at + 1], keys, keys))
            at += 1
    np.testing.assert_allclose(np.asarray(out), np.concatenate(expected), rtol=1e-5, atol=1e-6)


def test_local_attention_errors():
    m = CommonMetadata([0, 3], [3], block_table=np.zeros((1, 1), np.int32))
    for chunk, block, argument in [(24, 16, "chunk_size"), (0, 16, "chunk_size"), (16, 0, "block_size")]:
        with pytest.raises(attend.InvalidArgument, match=argument):
            batch.make_local_attention_virtual_batches(chunk, block, m)


def test_the_table_lives_as_long_as_the_batch():
    table = torch.zeros((2, 3), dtype=torch.int32)
    alive = weakref.ref(table)
    m = CommonMetadata([0, 3, 4], [5, 7], block_table=table)
    other = m.replace(positions=[0, 1, 2, 3])
    last = other.unpadded(3, 1)
    del table, m, other
    gc.collect()
    assert alive() is not None and last.block_table is alive()
    del last
    gc.collect()
    assert alive() is None


def test_arrays_outlive_the_batch():
    m = CommonMetadata(list(range(1001)), [5] * 1000)
    starts, keys = m.query_start_loc, m.key_start_loc()
    del m
    gc.collect()
    other = [np.full(1001, 77, np.int32) for _ in range(50)]  # would take freed memory
    assert starts.tolist() == list(range(1001)) and keys.tolist() == list(range(0, 5001, 5)) and len(other) == 50
