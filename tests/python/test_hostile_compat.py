# SPDX-License-Identifier: Apache-2.0
"""The functions of attend's other modules with hostile arguments, as test_hostile.py does with attend.ops."""

from __future__ import annotations

import faulthandler
import functools
import importlib
import inspect
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import BLOCK, BLOCKS, HKV, HQ, PLAUSIBLE, SECONDS, B, D, Liar, T, Thrower, changed, f32, hostile, i32

import attend

EXAMPLES = int(os.environ.get("ATTEND_HOSTILE_EXAMPLES", "60")) // 2
NATIVE = ["backends", "batch", "cache", "compat", "oracle", "torch"]
COMPAT = ["deep_gemm", "flash_attn", "flash_attn_3", "flash_attn_bert_padding", "flash_mla", "flashinfer"]
COMPAT += ["vllm_flash_attn", "vllm_ops"]
#: Parameters that other libraries have, or mean otherwise.
ELSEWHERE = {
    "cu_seqlens_q": lambda: i32([0, 2, 3]),
    "cu_seqlens_k": lambda: i32([0, 2, 3]),
    "max_seqlen_q": lambda: 2,
    "max_seqlen_k": lambda: 2,
    "qo_indptr": lambda: i32([0, 2, 3]),
    "kv_indptr": lambda: i32([0, 1, 2]),
    "kv_indices": lambda: i32([3, 1]),
    "kv_last_page_len": lambda: i32([2, 1]),
    "append_indptr": lambda: i32([0, 2, 3]),
    "batch_indices": lambda: i32([0, 0, 1]),
    "append_key": lambda: f32(T, HKV, D),
    "append_value": lambda: f32(T, HKV, D),
    "paged_kv_cache": lambda: f32(BLOCKS, 2, BLOCK, HKV, D),
    "nnz": lambda: 3,
    "page_size": lambda: BLOCK,
    "v_a": lambda: f32(T, HQ, D),
    "v_b": lambda: f32(T, HQ, D),
    "v_other": lambda: f32(T, HQ, D),
    "out_partial": lambda: f32(2, T, HQ, D),
    "lse_partial": lambda: f32(2, T, HQ),
    "qkv": lambda: f32(B, T, 3, HQ, D),
    "softmax_scale": lambda: 0.25,
    "input": lambda: f32(T, HQ, D),
    "values": lambda: f32(2, HQ, D),
    "indices": lambda: i32([2, 0]),
    "first_axis_dim": lambda: 4,
    "hidden_states": lambda: f32(B, T, HQ, D),
    "attention_mask": lambda: i32([[1] * T] * B),
    "attention_mask_in_length": lambda: i32([[2] + [0] * (T - 1)] * B),
}
BATCHED = {
    "q": lambda: f32(B, T, HQ, D),
    "k": lambda: f32(B, BLOCK, HKV, D),
    "v": lambda: f32(B, BLOCK, HKV, D),
    "kv": lambda: f32(B, T, 2, HKV, D),
}
#: Parameters of the wrappers of flashinfer, before those of ELSEWHERE.
WRAPPED = {
    "kv_len_arr": lambda: i32([2, 1]),
    "indptr": lambda: i32([0, 1, 2]),
    "last_page_len": lambda: i32([2, 1]),
    "paged_kv_indptr": lambda: i32([0, 1, 2]),
    "paged_kv_indices": lambda: i32([3, 1]),
    "paged_kv_last_page_len": lambda: i32([2, 1]),
    "q_data_type": lambda: "float32",
    "kv_data_type": lambda: "float32",
    "num_qo_heads": lambda: HQ,
    "num_kv_heads": lambda: HKV,
    "num_heads": lambda: HQ,
    "head_dim_qk": lambda: D,
    "head_dim": lambda: D,
    "head_dim_ckv": lambda: D,
    "head_dim_kpe": lambda: D,
    "sm_scale": lambda: 0.25,
    "causal": lambda: True,
    "q_nope": lambda: f32(3, HQ, D),
    "q_pe": lambda: f32(3, HQ, D),
    "ckv_cache": lambda: f32(BLOCKS, BLOCK, D),
    "kpe_cache": lambda: f32(BLOCKS, BLOCK, D),
}
#: Parameters that a function of vLLM has, or means otherwise.
VLLM = {
    "reshape_and_cache": {
        "key_cache": lambda: f32(BLOCKS, HKV, D // 4, BLOCK, 4),
        "value_cache": lambda: f32(BLOCKS, HKV, D, BLOCK),
        "kv_cache_dtype": lambda: "auto",
        "k_scale": lambda: f32(1),
        "v_scale": lambda: f32(1),
    },
    "pack_seq_triton": {"x": lambda: f32(T, D), "lengths": lambda: i32([2, 1])},
    "unpack_seq_triton": {"packed_tensor": lambda: f32(B, 2, D), "lengths": lambda: i32([2, 1])},
    "merge_attn_states_base2": {
        "prefix_output": lambda: f32(T, HQ, D),
        "suffix_output": lambda: f32(T, HQ, D),
        "prefix_lse": lambda: f32(HQ, T),
        "suffix_lse": lambda: f32(HQ, T),
    },
    "cpu_attn_get_scheduler_metadata": {
        **{size: lambda: 2 for size in ("num_reqs", "num_heads", "num_kv_heads", "head_dim")},
        "isa": lambda: "vec",
    },
    "cpu_attn_reshape_and_cache": {
        "key_cache": lambda: f32(BLOCKS, HKV, BLOCK, D),
        "value_cache": lambda: f32(BLOCKS, HKV, BLOCK, D),
        "isa": lambda: "vec",
    },
    "cpu_attention_with_kv_cache": {
        "query": lambda: f32(T, HQ, D),
        "key_cache": lambda: f32(BLOCKS, HKV, BLOCK, D),
        "value_cache": lambda: f32(BLOCKS, HKV, BLOCK, D),
        "output": lambda: f32(T, HQ, D),
        "causal": lambda: True,
        "alibi_slopes": lambda: None,
        "sliding_window": lambda: 4,
        "softcap": lambda: 0.0,
        "scheduler_metadata": lambda: None,
        "s_aux": lambda: None,
    },
    "convert_fp8": {"output": lambda: np.zeros((T, HQ, D), np.uint8), "input": lambda: f32(T, HQ, D)},
}
#: What the wrappers of flashinfer need although a default stands for it.
NEEDED = {
    "BatchMLAPagedAttentionWrapper.plan": ["qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr", "num_heads",
                                           "head_dim_ckv", "head_dim_kpe", "page_size", "causal", "sm_scale"],
    "BatchMLAPagedAttentionWrapper.run": ["q_nope", "q_pe", "ckv_cache", "kpe_cache"],
}  # fmt: skip


def functions():
    found = {}
    for module in COMPAT:
        m = importlib.import_module(f"attend.compat.{module}")
        found.update({f"{module}.{n}": getattr(m, n) for n in m.__all__ if inspect.isfunction(getattr(m, n))})
    for module in NATIVE:
        m = importlib.import_module(f"attend.{module}")
        found.update({f"{module}.{n}": getattr(m, n) for n in m.__all__ if inspect.isfunction(getattr(m, n))})
    return found | wrappers()


def wrappers():
    """Methods of flashinfer's wrappers: plan() of any, run() and forward() of those that have a plan."""
    flashinfer = importlib.import_module("attend.compat.flashinfer")
    found = {}
    for name in (n for n in flashinfer.__all__ if n.startswith("Batch")):
        make = getattr(flashinfer, name)
        found[f"flashinfer.{name}.plan"] = make(torch.empty(0)).plan
        for method in ("run", "forward"):
            if hasattr(make, method):
                found[f"flashinfer.{name}.{method}"] = method_of_planned(make, method)
    return found


def method_of_planned(make, method):
    """`method` of a new wrapper for each call, as forward() changes the plan."""
    owner = f"{make.__name__}.plan"

    @functools.wraps(getattr(make, method))
    def call_planned(*args, **kwargs):
        wrapper = make(torch.empty(0))
        wrapper.plan(**{n: to_torch((WRAPPED.get(n) or ELSEWHERE[n])()) for n in plan_parameters(make.plan, owner)})
        return getattr(wrapper, method)(*args, **kwargs)

    signature = inspect.signature(getattr(make, method))
    call_planned.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return call_planned


def plan_parameters(plan, owner):
    parameters = list(inspect.signature(plan).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    return [*required, *NEEDED.get(owner, []), "q_data_type", "kv_data_type"]


FUNCTIONS = functions()


def named_parameters(name):
    """All but *args and **kwargs."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    return {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def plausible(name):
    """Arguments of a plausible call; a wrong guess is refused, which is tested as well."""
    function = name.split(".")[-1]
    special = BATCHED if name.startswith("flash_attn") and "varlen" not in name else {}
    special = WRAPPED if name.startswith("flashinfer.Batch") else special
    special = VLLM.get(function, {}) if name.startswith("vllm_ops") else special
    arguments = {}
    for p in named_parameters(name).values():
        if p.default is inspect.Parameter.empty:
            make = special.get(p.name) or ELSEWHERE.get(p.name) or PLAUSIBLE.get(p.name) or (lambda: f32(T, HQ))
            arguments[p.name] = make()
    if name == "flash_attn_3.flash_attn_varlen_func":
        arguments |= {"seqused_q": i32([2, 0]), "seqused_k": i32([1, 1])}
    for needed in NEEDED.get(name.removeprefix("flashinfer."), []):
        arguments[needed] = (WRAPPED.get(needed) or ELSEWHERE[needed])()
    if name.endswith("plan") and name.startswith("flashinfer."):
        arguments["q_data_type"] = arguments["kv_data_type"] = "float32"
    if name.startswith("flashinfer.Batch") and "q" in arguments:
        arguments["q"] = f32(2 if "Decode" in name else 3, HQ, D)
        arguments.update({n: f32(2, HKV, D) for n in ("k", "v") if n in arguments})
    if function == "flash_attn_with_kvcache":
        arguments["q"] = f32(B, T, HQ, D)
    return arguments


def to_torch(value):
    """Other libraries' functions get their tensors, where numpy's array can be one."""
    try:
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
    except (TypeError, ValueError):
        return value


def call(name, arguments):
    """True if it returned, False if it raised one of attend.errors; fails on anything else."""
    if name.split(".")[0] not in NATIVE or name.startswith("torch."):
        arguments = {n: to_torch(v) for n, v in arguments.items()}
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        FUNCTIONS[name](**arguments)
        return True
    except attend.errors.Error as error:
        assert str(error).startswith("["), f"{error} names no function"
        return False
    except Exception as error:
        if str(error) in ("no repr", "no index", "no float"):  # of the argument's own
            return False
        shapes = {n: (v.shape, v.dtype) if hasattr(v, "shape") else repr(type(v)) for n, v in arguments.items()}
        raise AssertionError(f"{name}: {error!r} is none of attend.errors, with {shapes}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """Functions that write files may find a name acceptable."""
    monkeypatch.chdir(tmp_path)


@st.composite
def calls(draw, name):
    arguments = plausible(name)
    parameters = named_parameters(name)
    for target in draw(st.lists(st.sampled_from(list(parameters)), max_size=3, unique=True)) if parameters else ():
        if target.startswith("return_") or isinstance(parameters[target].default, bool):
            arguments[target] = draw(st.booleans())  # as Python does, whatever has a truth value would do
            continue
        before = arguments.get(target)
        arguments[target] = draw(changed(before) if draw(st.booleans()) and before is not None else hostile)
    return arguments


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hostile_arguments(name):
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(calls(name))
    def check(arguments):
        call(name, arguments)

    check()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_in_turn(name):
    values = [np.array([None], object), object(), Liar(), Thrower(), torch.ones(2, requires_grad=True), 1j, [[]]]
    for parameter, p in named_parameters(name).items():
        for value in () if parameter.startswith("return_") or isinstance(p.default, bool) else values:
            call(name, {**plausible(name), parameter: value})


def test_plausible_calls_of_attention_succeed():
    for name in (*wrappers(),
                 "flash_attn.flash_attn_func", "flash_attn.flash_attn_varlen_func", "flash_attn_3.flash_attn_func",
                 "flash_attn_3.flash_attn_combine", "flashinfer.get_seq_lens", "flash_attn_bert_padding.unpad_input",
                 "flash_attn_bert_padding.index_put_first_axis", "oracle.flash_attn_varlen",
                 *(f"vllm_ops.{function}" for function in VLLM)):  # fmt: skip
        arguments = plausible(name)
        if name == "oracle.flash_attn_varlen":
            arguments["cu_seqlens_kv"] = i32([0, 2, 3])
        assert call(name, arguments), name
