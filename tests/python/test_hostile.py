# SPDX-License-Identifier: Apache-2.0
"""Every public function of attend.ops with hostile arguments: it raises one of attend.errors, or it returns.

Each function is found by looking, so that a new one is covered on its first day. A call starts from a plausible one,
made from the names of the parameters, so that many get past the first checks; then some arguments are replaced.
ATTEND_HOSTILE_EXAMPLES sets the number of calls a function.
"""

from __future__ import annotations

import faulthandler
import inspect
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import attend

EXAMPLES = int(os.environ.get("ATTEND_HOSTILE_EXAMPLES", "60"))
#: A call that takes longer than this hangs; the process then ends with every thread's stack.
SECONDS = 120

T, B, HQ, HKV, D, BLOCKS, BLOCK, MAX_BLOCKS = 3, 2, 2, 1, 16, 4, 16, 2


def functions():
    public = {n: getattr(attend.ops, n) for n in attend.ops.__all__}
    return {n: f for n, f in sorted(public.items()) if inspect.isfunction(f)}


FUNCTIONS = functions()


def f32(*shape):
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def i32(values):
    return np.array(values, np.int32)


#: What a parameter of that name usually is; functions that mean something else by it refuse it, which is tested too.
PLAUSIBLE = {
    "q": lambda: f32(T, HQ, D),
    "k": lambda: f32(T, HKV, D),
    "v": lambda: f32(T, HKV, D),
    "key": lambda: f32(T, HKV, D),
    "value": lambda: f32(T, HKV, D),
    "input": lambda: f32(T, HKV, D),
    "key_cache": lambda: f32(BLOCKS, BLOCK, HKV, D),
    "value_cache": lambda: f32(BLOCKS, BLOCK, HKV, D),
    "k_cache": lambda: f32(B, BLOCK, HKV, D),
    "v_cache": lambda: f32(B, BLOCK, HKV, D),
    "kv_cache": lambda: f32(BLOCKS, BLOCK, 576),
    "cache": lambda: f32(BLOCKS, BLOCK, HKV, D),
    "src_cache": lambda: f32(BLOCKS, BLOCK, 576),
    "src": lambda: f32(BLOCKS, BLOCK),
    "dst": lambda: f32(T, 576),
    "maps": lambda: f32(T, 2 * HQ, D),
    "kv": lambda: f32(BLOCKS, 1, 576),
    "kv_c": lambda: f32(T, 512),
    "k_pe": lambda: f32(T, 64),
    "q_pe": lambda: f32(T, HQ, 64),
    "cos_sin_cache": lambda: f32(8, 64),
    "logits": lambda: f32(T, 40),
    "weights": lambda: f32(T, HQ),
    "indices": lambda: np.zeros((T, 1, 8), np.int32),
    "token_indices": lambda: np.zeros((T, 8), np.int32),
    "req_id": lambda: i32([0, 0, 1]),
    "caches": lambda: [f32(BLOCKS, BLOCK)],
    "moves": lambda: np.array([[0, 1]], np.int64),
    "slot_mapping": lambda: np.array([0, 17, -1], np.int64),
    "positions": lambda: np.arange(T, dtype=np.int64),
    "query_start_loc": lambda: i32([0, 2, 3]),
    "cu_seqlens_kv": lambda: i32([0, 2, 3]),
    "cu_seq_lens": lambda: i32([0, 2, 3]),
    "workspace_starts": lambda: i32([0, 2]),
    "seq_lens": lambda: i32([2, 1]),
    "context_lens": lambda: i32([2, 1]),
    "cache_seqlens": lambda: i32([2, 1]),
    "block_table": lambda: i32([[0, 1], [2, 3]]),
    "row_starts": lambda: i32([0, 0, 0]),
    "row_ends": lambda: i32([3, 40, 0]),
    "ks": lambda: i32([0, 0, 0]),
    "ke": lambda: i32([1, 2, 3]),
    "prefix_out": lambda: f32(T, HQ, D),
    "suffix_out": lambda: f32(T, HQ, D),
    "prefix_lse": lambda: f32(T, HQ),
    "suffix_lse": lambda: f32(T, HQ),
    "scale": lambda: 0.25,
    "sm_scale": lambda: 0.25,
    "softmax_scale": lambda: 0.25,
    "block_size": lambda: BLOCK,
    "num_blocks": lambda: BLOCKS,
    "num_kv_heads": lambda: HKV,
    "head_size": lambda: D,
    "is_neox": lambda: True,
    "layer": lambda: 3,
}
#: Optional ones that a plausible call has, by function.
ALSO = {
    "flash_attn_varlen": ("cu_seqlens_kv",),
    "flash_attn_with_kvcache": ("cache_seqlens",),
    "differential_attention": ("cu_seqlens_kv",),
}

TYPES = [
    np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_, np.complex64, np.dtype("U1"),
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4,
]  # fmt: skip
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 64, 576])


@st.composite
def arrays(draw):
    """numpy arrays of every rank, type and kind of strides."""
    shape = draw(st.lists(sizes, max_size=5).filter(lambda s: np.prod(s, dtype=float) < 1e5))
    fill = draw(st.sampled_from([0, 1, -1, 5, 1000, 2**30, -(2**31), "range"]))
    with np.errstate(all="ignore"):
        count = int(np.prod(shape))
        base = np.arange(count, dtype=np.int64) if fill == "range" else np.full(count, fill, np.int64)
        x = base.astype(draw(st.sampled_from(TYPES))).reshape(shape)
    kind = draw(st.sampled_from(["plain", "plain", "transposed", "reversed", "broadcast", "strided", "odd", "locked"]))
    if kind == "transposed":
        x = x.T
    elif kind == "reversed" and x.ndim:
        x = x[::-1]
    elif kind == "broadcast":
        x = np.broadcast_to(x, (2, *x.shape))
    elif kind == "strided" and x.ndim:
        x = np.repeat(x, 2, -1)[..., ::2]
    elif kind == "odd" and x.dtype.itemsize > 1 and x.dtype.kind != "U":
        memory = np.zeros(x.nbytes + 1, np.uint8)
        x = np.ndarray(x.shape, x.dtype, memory, offset=1)
    elif kind == "locked":
        x.flags.writeable = False
    return x


@st.composite
def torch_tensors(draw):
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 16]), max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn, torch.complex64]))
    kind = draw(st.sampled_from(["plain", "grad", "meta", "sparse", "expanded", "conj", "quantised"]))
    if kind == "grad":
        return torch.ones(shape, requires_grad=True)
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "sparse":
        return torch.zeros(shape or [1]).to_sparse()
    if kind == "expanded":
        return torch.zeros(1, dtype=dtype).expand(*shape, 1)
    if kind == "conj":
        return torch.zeros(shape, dtype=torch.complex64).conj().imag
    if kind == "quantised":
        return torch.quantize_per_tensor(torch.zeros(shape or [1]), 1.0, 0, torch.qint8)
    return torch.zeros(shape, dtype=dtype)


class Liar:
    """Has the attributes of a tensor and none of its contents."""

    shape, dtype, ndim, strides, device = (T, HQ, D), "float32", 3, (1, 1, 1), "cpu"

    def __dlpack__(self, **_):
        return None

    def __dlpack_device__(self):
        return (1, 0)


class Thrower:
    """Raises whatever one does with it."""

    def __index__(self):
        raise RuntimeError("no index")

    def __float__(self):
        raise RuntimeError("no float")

    def __repr__(self):
        raise RuntimeError("no repr")


scalars = st.sampled_from([
    None, True, False, 0, 1, -1, 7, 2**31, -(2**31) - 1, 2**63, -(2**63), 0.0, -0.5, float("nan"), float("inf"), 1e308,
    1e-320, "", "avx2", "fast", "bf16", "nonsense", "\0", "x" * 1000, b"bytes", 1j, (), [], [None], {}, object,
    range(3),
])  # fmt: skip
objects = st.sampled_from([
    lambda: np.array([None, 1], object), lambda: np.array(["a"], object), lambda: np.zeros(3, "M8[s]"),
    lambda: np.zeros(2, [("a", "f4")]), lambda: np.zeros((1,) * 12, np.float32), lambda: bytearray(8), Liar, Thrower,
    lambda: np.ma.masked_array([1.0], [True]), lambda: memoryview(b"1234"), lambda: [np.zeros(3)],
    lambda: attend.ThreadPool(2), lambda: np.float32(2), lambda: np.int64(2), lambda: [torch.zeros(3)],
    lambda: np.zeros((3, 2), ">f4"),
]).map(lambda make: make())  # fmt: skip
hostile = st.one_of(arrays(), arrays(), torch_tensors(), scalars, objects)


@st.composite
def changed(draw, x):
    """A plausible array with one thing wrong."""
    if not isinstance(x, np.ndarray):
        return draw(hostile)
    how = draw(st.sampled_from(["torch", "type", "longer", "shorter", "rank", "values", "locked", "object", "empty"]))
    if how == "torch":
        return torch.from_numpy(x.copy())
    if how == "type":
        with np.errstate(all="ignore"):
            return x.astype(draw(st.sampled_from(TYPES)))
    if how == "longer":
        return np.concatenate([x, x], draw(st.integers(0, x.ndim - 1)))
    if how == "shorter":
        return np.take(x, range(x.shape[-1] - 1), -1)
    if how == "rank":
        return x[None] if draw(st.booleans()) else x[0]
    if how == "values":
        y = x.copy()
        value = np.array(draw(st.sampled_from([-1, -2, 3, 100, 2**30, -(2**31)])))
        with np.errstate(all="ignore"):
            y.flat[draw(st.integers(0, y.size - 1))] = value.astype(y.dtype)  # numbers that bytes lack wrap around
        return y
    if how == "locked":
        y = x.copy()
        y.flags.writeable = False
        return y
    return x.astype(object) if how == "object" else x[:0]


def is_flag(parameter):
    """Flags that only Python looks at take whatever has a truth value, as Python does."""
    return parameter.startswith("return_")


def plausible(name):
    """A plausible call's arguments."""
    arguments = {}
    for p in inspect.signature(FUNCTIONS[name]).parameters.values():
        if p.default is inspect.Parameter.empty or p.name in ALSO.get(name, ()):
            arguments[p.name] = PLAUSIBLE[p.name]() if p.name in PLAUSIBLE else f32(T, HQ)
    if name == "flash_attn_with_kvcache":
        arguments["q"] = f32(B, T, HQ, D)
    return arguments


@st.composite
def calls(draw, name):
    arguments = plausible(name)
    names = list(inspect.signature(FUNCTIONS[name]).parameters)
    if not names:
        return arguments
    for target in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        if is_flag(target):
            arguments[target] = draw(st.sampled_from([None, False, True, 0, 1, "yes"]))
            continue
        before = arguments.get(target)
        arguments[target] = draw(changed(before) if draw(st.booleans()) and before is not None else hostile)
    return arguments


def call(name, arguments):
    """True if it returned, False if it raised one of attend.errors; fails on anything else."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        FUNCTIONS[name](**arguments)
        return True
    except attend.errors.Error as error:
        if isinstance(error, (attend.errors.InvalidArgument, attend.errors.InvalidType)):
            assert error.function and error.argument, f"{error} names no function or argument"
            assert error.argument in str(error) and error.function in str(error)
        return False
    except Exception as error:
        shapes = {n: (v.shape, v.dtype) if hasattr(v, "shape") else repr(type(v)) for n, v in arguments.items()}
        raise AssertionError(f"{name}: {error!r} is none of attend.errors, with {shapes}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hostile_arguments(name):
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(calls(name))
    @example(plausible(name))
    def check(arguments):
        call(name, arguments)

    check()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_in_turn(name):
    """Each parameter once with each kind of value that no tensor, number, flag or string is."""
    values = [np.array([None], object), object(), Liar(), Thrower(), torch.ones(2, requires_grad=True), 1j, [[]]]
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        for value in () if is_flag(parameter) else values:
            call(name, {**plausible(name), parameter: value})


def test_plausible_calls_of_attention_succeed():
    """Else everything above would only test the first check of each function."""
    for name in ("flash_attn_varlen", "flash_attn_with_kvcache", "merge_attn_states"):
        assert call(name, plausible(name)), name


@pytest.mark.parametrize("name", ["flash_attn_varlen", "flash_attn_with_kvcache", "merge_attn_states"])
def test_outputs_that_may_not_be_written(name):
    arguments = plausible(name)
    out = np.zeros((B, T, HQ, D) if name == "flash_attn_with_kvcache" else (T, HQ, D), np.float32)
    assert call(name, {**arguments, "out": out})
    out.flags.writeable = False
    with pytest.raises(attend.errors.InvalidArgument, match=f"\\[{name}\\].*out"):
        FUNCTIONS[name](**arguments, out=out)


def test_gradients_are_refused_and_no_grad_is_not():
    arguments = {n: torch.from_numpy(x) for n, x in plausible("flash_attn_varlen").items()}
    arguments["v"].requires_grad_()
    with pytest.raises(attend.errors.InvalidArgument, match=r"\[flash_attn_varlen\].*'v'.*grad"):
        attend.ops.flash_attn_varlen(**arguments)
    with torch.no_grad():
        assert attend.ops.flash_attn_varlen(**arguments).shape == (T, HQ, D)


def test_frameworks_are_not_mixed():
    arguments = plausible("flash_attn_varlen")
    arguments["k"] = torch.from_numpy(arguments["k"])
    with pytest.raises(attend.errors.InvalidArgument, match=r"\[flash_attn_varlen\].*'k'.*numpy.*torch"):
        attend.ops.flash_attn_varlen(**arguments)
