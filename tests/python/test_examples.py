# SPDX-License-Identifier: Apache-2.0
"""Every example of examples/python runs and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"


def run(name, *arguments, status=0):
    # The package is found where this process has it, installed or in a build.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def numbers(pattern, text):
    return [tuple(float(x) for x in match) for match in re.findall(pattern, text)]


def test_drop_in():
    (f32, f32_torch), (bf16, bf16_torch) = numbers(r"attend (\S+), torch (\S+)", run("drop_in.py"))
    assert 0 < f32 < 5e-6 and 0 < bf16 < 0.02
    assert f32 < 3 * f32_torch and bf16 < 3 * bf16_torch


def test_paged_cache():
    out = run("paged_cache.py")
    found = numbers(r"request .: (\d+) tokens, .*: (\S+)", out)
    assert [tokens for tokens, _ in found] == [43, 50]
    assert all(0 < difference < 5e-6 for _, difference in found)
    assert "free at the end: 12" in out


def test_sparse_mla():
    found = numbers(r"top +(\d+) of .* ([0-9.]+)\n", run("sparse_mla.py"))
    errors = [error for _, error in found]
    assert [topk for topk, _ in found] == [16, 64, 300]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,100,5\n2023-11-16 18:17:03.9899600,300,1\n"
        "2023-11-16 18:17:04.2319600,17,9\n"
    )
    return path


def test_replay_of_a_trace(trace):
    out = run("replay_trace.py", trace, "--layers", 1)
    # Prompts, and every output but the last, whose key nobody needs.
    assert "3 requests" in out and "429 tokens (12 decoded)" in out
    assert "2 requests" in run("replay_trace.py", trace, "--layers", 1, "--limit", 2)
    assert "does not fit 2 blocks" in run("replay_trace.py", trace, "--blocks", 2, status=1)


def test_replay_of_lengths(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n" + "20,4\n" * 6)
    # With 8 blocks four requests are in at a time: each needs two.
    out = run("replay_trace.py", path, "--blocks", 8, "--layers", 1)
    assert "6 requests" in out and "138 tokens (18 decoded)" in out and "largest batch: 4 requests" in out


def test_replay_draws(tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "replay.png"
    out = run("replay_trace.py", "--requests", 10, "--layers", 1, "--figure", figure)
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10000
    assert float(re.search(r"(\d+) tokens/s", out)[1]) > 0
