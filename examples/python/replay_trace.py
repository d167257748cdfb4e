# SPDX-License-Identifier: Apache-2.0
"""Replays a trace of requests through the attention layers of a model with continuous batching.

Each step takes one token of every running request and fills a budget of tokens with pieces of prompts. Queries, keys
and values are random; what is measured is the attention, with nothing of a model around it. Time is that of the steps:
a request comes into play when the sum of the step times has reached its arrival.

    python examples/python/replay_trace.py --figure replay.png
    python examples/python/replay_trace.py trace.csv --limit 100

A trace is a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens (Azure 2023), or num_prefill_tokens and
num_decode_tokens, whose requests all arrive at once.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from attend import backends
from attend.backends import AttentionConfig, BuilderConfig, ImplConfig
from attend.batch import CommonMetadata, make_slot_mapping
from attend.cache import KvCacheSpec

BLOCK = 16


@dataclass(eq=False)
class Request:
    arrival: float  # seconds
    prompt: int
    output: int
    computed: int = 0  # tokens in the cache
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that end up in the cache: the last output's key is never needed."""
        return self.prompt + self.output - 1

    @property
    def decodes(self) -> bool:
        return self.computed >= self.prompt


@dataclass
class Step:
    start: float  # seconds
    seconds: float
    decodes: int
    prompt_tokens: int
    requests: int


def synthetic_trace(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.015, count))
    prompts = np.clip(rng.lognormal(5.0, 0.8, count), 8, 1500).astype(int)
    outputs = rng.integers(10, 80, count)
    return [Request(float(a), int(p), int(o)) for a, p, o in zip(arrivals, prompts, outputs)]


def read_trace(path: str, limit: int | None) -> list[Request]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    if not rows:
        raise SystemExit(f"{path}: no requests")
    if "ContextTokens" in rows[0]:
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
        return [
            Request(t - min(times), int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
            for t, row in zip(times, rows)
        ]
    return [Request(0.0, int(row["num_prefill_tokens"]), max(1, int(row["num_decode_tokens"]))) for row in rows]


class Engine:
    """A scheduler, a pool of blocks and `layers` attention layers that share it."""

    def __init__(self, args: argparse.Namespace, longest: int) -> None:
        self.args = args
        self.backend = backends.require(AttentionConfig(head_size=args.head_size, dtype="float32"))
        spec = KvCacheSpec(args.blocks, BLOCK, args.kv_heads, args.head_size, "float32")
        self.caches = [self.backend.new_kv_cache(spec) for _ in range(args.layers)]
        self.builder = self.backend.make_builder(BuilderConfig(args.heads, spec))
        self.impl = self.backend.make_impl(ImplConfig(args.heads, args.kv_heads, args.head_size, dtype="float32"))
        self.table_width = -(-longest // BLOCK)
        self.free = list(range(args.blocks))
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        rng = np.random.default_rng(1)
        self.query = rng.standard_normal((args.budget, args.heads, args.head_size), np.float32)
        self.key, self.value = rng.standard_normal((2, args.budget, args.kv_heads, args.head_size), np.float32)

    def admit(self) -> None:
        """Lets requests in while there are blocks for all of their tokens, so that none has to be evicted."""
        while self.waiting and len(self.running) < self.args.max_requests:
            needed = -(-self.waiting[0].length // BLOCK)
            if needed > len(self.free):
                break
            request = self.waiting.popleft()
            request.blocks = [self.free.pop() for _ in range(needed)]
            self.running.append(request)

    def schedule(self) -> list[tuple[Request, int]]:
        """(request, tokens of this step), decodes first as the back end wants them."""
        decodes = [(r, 1) for r in self.running if r.decodes]
        budget, prompts = self.args.budget - len(decodes), []
        for request in self.running:
            count = 0 if request.decodes else min(request.prompt - request.computed, budget)
            if count > 0:
                prompts.append((request, count))
                budget -= count
        return decodes + prompts

    def step(self) -> Step:
        self.admit()
        scheduled = self.schedule()
        counts = [count for _, count in scheduled]
        table = np.zeros((len(scheduled), self.table_width), np.int32)
        for row, (request, _) in zip(table, scheduled):
            row[: len(request.blocks)] = request.blocks
        tokens = sum(counts)
        begin = time.perf_counter()
        batch = CommonMetadata(
            [0, *np.cumsum(counts).tolist()], [r.computed + n for r, n in scheduled], block_table=table
        )
        metadata = self.builder.build(batch.replace(slot_mapping=make_slot_mapping(batch, BLOCK)))
        for cache in self.caches:
            self.impl.forward(self.query[:tokens], cache, metadata, key=self.key[:tokens], value=self.value[:tokens])
        seconds = time.perf_counter() - begin
        decodes = sum(request.decodes for request, _ in scheduled)
        for request, count in scheduled:
            request.computed += count
            if request.computed == request.length:
                self.free += request.blocks
                self.running.remove(request)
        return Step(0.0, seconds, decodes, tokens - decodes, len(scheduled))


def replay(engine: Engine, requests: list[Request]) -> list[Step]:
    now, steps = 0.0, []
    coming = deque(sorted(requests, key=lambda r: r.arrival))
    while coming or engine.waiting or engine.running:
        if not engine.waiting and not engine.running:
            now = max(now, coming[0].arrival)  # nothing to do until then
        while coming and coming[0].arrival <= now:
            engine.waiting.append(coming.popleft())
        step = engine.step()
        step.start = now
        now += step.seconds
        steps.append(step)
    return steps


def draw(steps: list[Step], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start, seconds = np.array([[s.start, s.seconds] for s in steps]).T
    with_prompt = np.array([s.prompt_tokens > 0 for s in steps])
    figure, (batch, times) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for heights, colour, label in [
        ([s.requests for s in steps], "#9ecae1", "computing their prompt"),
        ([s.decodes for s in steps], "#2171b5", "decoding"),
    ]:
        batch.bar(start, heights, width=seconds, align="edge", color=colour, label=label)
    batch.set_ylabel("requests in the batch")
    for chosen, colour, label in [
        (with_prompt, "#d94801", "steps with tokens of prompts"),
        (~with_prompt, "#2171b5", "steps of decodes only"),
    ]:
        times.plot(start[chosen], 1e3 * seconds[chosen], ".", color=colour, label=label, markersize=4)
    times.set_yscale("log")
    times.yaxis.set_major_formatter("{x:g}")
    times.set_ylabel("step time (ms)")
    times.set_xlabel("time (s)")
    for axes in (batch, times):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, markerscale=2)
    figure.suptitle("Continuous batching: size and time of each step")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Replays a trace through attention layers.")
    parser.add_argument("trace", nargs="?", help="a CSV; without it a synthetic trace")
    parser.add_argument("--limit", type=int, help="only the first requests of the trace")
    parser.add_argument("--requests", type=int, default=60, help="of the synthetic trace")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=512, help="of 16 tokens, in each layer's cache")
    parser.add_argument("--budget", type=int, default=256, help="tokens of a step")
    parser.add_argument("--max-requests", type=int, default=64, help="in a step")
    parser.add_argument("--figure", help="file for the picture of the steps")
    args = parser.parse_args()
    if args.max_requests > args.budget:
        parser.error("--max-requests must not exceed --budget: each decode takes a token")
    return args


def main() -> None:
    args = parse()
    requests = read_trace(args.trace, args.limit) if args.trace else synthetic_trace(args.requests)
    longest = max(r.length for r in requests)
    if -(-longest // BLOCK) > args.blocks:
        raise SystemExit(f"a request of {longest} tokens does not fit {args.blocks} blocks")
    steps = replay(Engine(args, longest), requests)
    tokens = sum(s.decodes + s.prompt_tokens for s in steps)
    busy = sum(s.seconds for s in steps)
    decoded = sum(s.decodes for s in steps)
    print(f"{len(requests)} requests, {len(steps)} steps, {tokens} tokens ({decoded} decoded)")
    print(f"{tokens / busy:.0f} tokens/s through {args.layers} layers, {1e3 * busy / len(steps):.2f} ms a step")
    print(f"largest batch: {max(s.requests for s in steps)} requests")
    if args.figure:
        draw(steps, args.figure)
        print(f"figure: {args.figure}")


if __name__ == "__main__":
    main()
