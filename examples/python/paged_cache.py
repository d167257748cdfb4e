# SPDX-License-Identifier: Apache-2.0
"""A paged KV cache by hand: memory, blocks of a pool, slots of new tokens, a prompt in two chunks, then decoding.

python examples/python/paged_cache.py
"""

from __future__ import annotations

import torch

import attend
from attend.batch import CommonMetadata, make_slot_mapping
from attend.cache import KvCacheSpec, flash_attn_cache_shape, flash_attn_stride_order, new_cache

BLOCK, HEADS, KV_HEADS, HEAD_SIZE = 16, 8, 2, 64


class PagedCache:
    """Keys and values of all requests, in blocks that a request gets when it needs them."""

    def __init__(self, num_blocks: int, max_blocks_per_request: int) -> None:
        spec = KvCacheSpec(num_blocks, BLOCK, KV_HEADS, HEAD_SIZE, "float32")
        # Shape [2, blocks, tokens, heads, elements]; the order says that heads come before tokens in memory.
        self.keys, self.values = new_cache(
            flash_attn_cache_shape(spec), spec.stored_dtype, order=flash_attn_stride_order("hnd"), framework="torch"
        )
        self.free = list(range(num_blocks))
        self.width = max_blocks_per_request
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def batch(self, new_tokens: dict[str, int]) -> CommonMetadata:
        """Makes room for the new tokens and describes the step."""
        starts, table = [0], torch.full((len(new_tokens), self.width), -1, dtype=torch.int32)
        for row, (name, count) in enumerate(new_tokens.items()):
            blocks = self.blocks.setdefault(name, [])
            self.lengths[name] = self.lengths.get(name, 0) + count
            while len(blocks) * BLOCK < self.lengths[name]:
                blocks.append(self.free.pop())
            table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            starts.append(starts[-1] + count)
        return CommonMetadata(starts, [self.lengths[name] for name in new_tokens], block_table=table)

    def write(self, batch: CommonMetadata, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts the rows into their slots."""
        slots = make_slot_mapping(batch, BLOCK)
        self.keys[slots // BLOCK, slots % BLOCK] = key
        self.values[slots // BLOCK, slots % BLOCK] = value

    def attend(self, batch: CommonMetadata, query: torch.Tensor) -> torch.Tensor:
        return attend.ops.flash_attn_varlen(
            query,
            self.keys,
            self.values,
            torch.from_numpy(batch.query_start_loc.copy()),
            seq_lens=torch.from_numpy(batch.seq_lens.copy()),
            block_table=batch.block_table,
            causal=True,
        )

    def release(self, name: str) -> None:
        self.free += self.blocks.pop(name)
        del self.lengths[name]


def main() -> None:
    torch.manual_seed(0)
    cache = PagedCache(num_blocks=12, max_blocks_per_request=6)
    rows = {name: (torch.randn(60, HEADS, HEAD_SIZE), *torch.randn(2, 60, KV_HEADS, HEAD_SIZE)) for name in ("a", "b")}
    done = {"a": 0, "b": 0}
    outputs: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    # "a" computes its prompt in two chunks, the second beside all of b's; then both decode.
    for step in [{"a": 20}, {"a": 13, "b": 40}] + [{"a": 1, "b": 1}] * 10:
        batch = cache.batch(step)
        part = {name: slice(done[name], done[name] + count) for name, count in step.items()}
        query, key, value = (torch.cat([rows[name][i][part[name]] for name in step]) for i in range(3))
        cache.write(batch, key, value)
        out = cache.attend(batch, query)
        for name, piece in zip(step, out.split(list(step.values()))):
            outputs[name].append(piece)
            done[name] += step[name]
    print(f"blocks of a: {cache.blocks['a']}, of b: {cache.blocks['b']}, free: {len(cache.free)}")
    for name in ("a", "b"):
        query, key, value = (x[: done[name]].transpose(0, 1) for x in rows[name])
        whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        difference = (torch.cat(outputs[name]) - whole.transpose(0, 1)).abs().max().item()
        print(f"request {name}: {done[name]} tokens, largest difference from whole sequences: {difference:.1e}")
        cache.release(name)
    print(f"free at the end: {len(cache.free)}")


if __name__ == "__main__":
    main()
