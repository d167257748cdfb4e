"""Random data of a problem as files, and the float64 reference.

Queries, keys and values are written once as bf16; a library that computes in float16, float32, int8 or fp8
converts them at set-up. The reference takes the bf16 values, so an error counts all that a library does to
them, quantisation included.
"""
import dataclasses
import json

import numpy as np


def widen(bits):
    """bf16 bits as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _normal_table():
    """65536 equally likely values of a standard normal distribution, as bf16 bits."""
    x = np.sort(np.random.default_rng(1).standard_normal(1 << 22)).reshape(1 << 16, -1).mean(1)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Data:
    """The files of one problem; made by the runner, read by every side."""

    def __init__(self, problem, folder):
        p = self.problem = problem
        self.folder = folder
        self.shapes = {"q": (p.batch, p.query_len, p.num_q_heads, p.head_dim),
                       "k": (p.batch, p.seq_len, p.num_kv_heads, p.head_dim)}
        self.shapes["v"] = self.shapes["k"]

    def path(self, name):
        return self.folder / f"{self.problem.shape_name}_{name}.bf16"

    def bits(self, name):
        """bf16 bits [batch, tokens, heads, head_dim]."""
        return np.memmap(self.path(name), np.uint16, "r", shape=self.shapes[name])

    def make(self):
        """Writes what is missing, and the description that our side reads."""
        table = None
        for seed, (name, shape) in enumerate(self.shapes.items()):
            path, count = self.path(name), int(np.prod(shape))
            if path.exists() and path.stat().st_size == 2 * count:
                continue
            table = _normal_table() if table is None else table
            rng = np.random.default_rng([seed, *shape])
            with open(path, "wb") as file:
                for begin in range(0, count, 1 << 24):
                    part = min(1 << 24, count - begin)
                    table[rng.integers(0, 1 << 16, part, np.uint16)].tofile(file)
        p = self.problem
        text = dataclasses.asdict(p) | {"kv_dtype": p.kv}
        text |= {f"{name}_file": str(self.path(name)) for name in self.shapes}
        self.description = self.folder / f"{p.name}.json"
        self.description.write_text(json.dumps(text))

    def sampled_rows(self, count=16):
        """(request, token, head); the first and the last token always."""
        p, rng = self.problem, np.random.default_rng(7)
        rows = [(int(rng.integers(p.batch)), int(rng.integers(p.query_len)),
                 int(rng.integers(p.num_q_heads))) for _ in range(count)]
        rows[0] = (0, 0, 0)
        rows[1] = (p.batch - 1, p.query_len - 1, p.num_q_heads - 1)
        return rows

    def reference(self):
        """float64 [rows, head_dim]."""
        p = self.problem
        q, k, v = (self.bits(name) for name in "qkv")
        out = []
        for request, token, head in self.sampled_rows():
            seen = p.seq_len - p.query_len + token + 1
            keys = widen(k[request, :seen, head // p.group]).astype(np.float64)
            values = widen(v[request, :seen, head // p.group]).astype(np.float64)
            logits = keys @ widen(q[request, token, head]).astype(np.float64) / p.head_dim ** 0.5
            weights = np.exp(logits - logits.max())
            out.append(weights @ values / weights.sum())
        return np.array(out)

    def error(self, output_file, reference):
        """Relative error of a dumped output: of each sampled row, then the RMS of the rows."""
        out = np.memmap(output_file, np.float32, "r", shape=self.shapes["q"])
        got = np.array([out[row] for row in self.sampled_rows()], np.float64)
        rows = np.sum((got - reference) ** 2, 1) / np.sum(reference ** 2, 1)
        return float(np.sqrt(np.mean(rows)))
