# SPDX-License-Identifier: Apache-2.0
"""The attention and mask functions that attend registers with Transformers."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import types

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import zoo  # noqa: E402
from test_torch_masked import positions, reference  # noqa: E402
from transformers import masking_utils  # noqa: E402

from attend import errors  # noqa: E402
from attend.integrations import transformers as attend_transformers  # noqa: E402

CAUSAL = types.SimpleNamespace(is_causal=True)
BOTH = types.SimpleNamespace(is_causal=False)


@pytest.fixture(scope="module", autouse=True)
def registered():
    attend_transformers.register()


def states(rows: int, keys: int, batch: int = 1):
    """query, key, value in the layout of Transformers."""
    g = torch.Generator().manual_seed(rows + keys)
    return tuple(torch.randn(batch, *size, generator=g) for size in ((4, rows, 16), (2, keys, 16), (2, keys, 8)))


def attention(module, qkv, mask=None, **kwargs):
    out, weights = attend_transformers.attention(module, *qkv, mask, **kwargs)
    assert weights is None
    return out


def expected(qkv, mask, **kwargs):
    return reference(*(t.transpose(1, 2) for t in qkv), mask, **kwargs)


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rows, keys", [(9, 9), (4, 9), (1, 9)])
@pytest.mark.parametrize("module", [CAUSAL, BOTH])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_without_mask(rows, keys, module, window):
    qkv = states(rows, keys, batch=2)
    at = positions(rows, keys)
    visible = (at <= 0) if module.is_causal else (at == at)
    if window is not None:
        visible = visible & (at.abs() < window)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(3))
    result = attention(module, qkv, sliding_window=window, softcap=2.0, scaling=0.4, s_aux=sinks)
    close(result, expected(qkv, visible[None, None], softcap=2.0, scale=0.4, sinks=sinks))


def test_argument_overrides_the_module():
    qkv = states(9, 9)
    assert attention(CAUSAL, qkv, is_causal=False).equal(attention(BOTH, qkv))
    assert attention(BOTH, qkv, is_causal=True).equal(attention(CAUSAL, qkv))
    assert not attention(BOTH, qkv).equal(attention(CAUSAL, qkv))


def packing():
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    return (owner[:, None] == owner) & (positions(9, 9) <= 0)


@pytest.mark.parametrize("window", [None, 2])
def test_packed_sequences(window):
    qkv = states(9, 9)
    at = positions(9, 9)
    mask = (packing() & (at > -(window or 99)))[None, None]
    by_positions = attention(
        CAUSAL, qkv, sliding_window=window, position_ids=torch.tensor([[0, 1, 2, 0, 1, 7, 8, 9, 10]])
    )
    close(by_positions, expected(qkv, mask))
    starts = torch.tensor([0, 3, 5, 9])
    by_lengths = attention(
        CAUSAL, qkv, sliding_window=window, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=4, max_length_k=4
    )
    assert by_lengths.equal(by_positions)
    one = attention(CAUSAL, qkv, sliding_window=window, position_ids=torch.arange(5, 14)[None])
    assert one.equal(attention(CAUSAL, qkv, sliding_window=window))


def test_packed_queries_over_longer_keys():
    query, key, value = states(5, 9)
    result = attention(
        CAUSAL, (query, key, value), cu_seq_lens_q=torch.tensor([0, 1, 5]), cu_seq_lens_k=torch.tensor([0, 4, 9])
    )
    mask = torch.zeros(5, 9, dtype=torch.bool)
    mask[0, :4] = True
    mask[1:, 4:] = positions(4, 5) <= 0
    close(result, expected((query, key, value), mask[None, None]))


@pytest.mark.parametrize("implementation", ["attend", "attend_dense"])
def test_packed_prompts_of_a_model(implementation):
    """Two prompts in one row have the logits of each alone."""
    ids, _ = zoo.prompts("left")
    first, second = ids[2:, :12], ids[2:, 12:]
    model = zoo.model("mistral")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = torch.cat([model(first).logits, model(second).logits], 1)
        model.set_attn_implementation(implementation)
        position_ids = torch.cat([torch.arange(12), torch.arange(19)])[None]
        packed = model(ids[2:], position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("as_float", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_masks_of_the_caller(as_float, heads):
    """They decide alone: neither causality nor a window is added."""
    qkv = states(9, 9, batch=2)
    mask = torch.rand(2, heads, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if as_float else mask
    close(attention(CAUSAL, qkv, given, sliding_window=2), expected(qkv, mask))


@pytest.mark.parametrize("implementation", ["attend", "attend_dense"])
def test_own_mask_through_a_model(implementation):
    ids, _ = zoo.prompts("left")
    ids = ids[2:]
    g = torch.Generator().manual_seed(5)
    mask = (torch.rand(1, 1, 31, 31, generator=g) < 0.5) | torch.eye(31, dtype=torch.bool)
    model = zoo.model("llama")
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = model(ids, attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)).logits
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted, atol=1e-5, rtol=1e-4)


def test_masks_that_padding_does_not_describe():
    """Image blocks, chunks and prefixes: the boolean mask is made, and is that of "sdpa"."""
    embeddings = torch.zeros(2, 9, 8)
    tokens = torch.ones(2, 9, dtype=torch.long)
    tokens[1, :2] = 0
    config = zoo.model("llama").config
    before = config._attn_implementation

    def both(function, **kwargs):
        results = []
        for name in ("attend", "eager"):
            config._attn_implementation = name
            results.append(function(config, embeddings, tokens, None, **kwargs))
        return results

    try:
        config.attention_chunk_size = config.sliding_window = 4
        prefix = {"or_mask_function": lambda b, h, q, k: k < 4}
        blocks = {"block_sequence_ids": torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1]]).expand(2, -1)}
        for function, kwargs in (
            (masking_utils.create_causal_mask, prefix),
            (masking_utils.create_causal_mask, blocks),
            (masking_utils.create_sliding_window_causal_mask, blocks),
            (masking_utils.create_chunked_causal_mask, {}),
        ):
            mine, eager = both(function, **kwargs)
            assert mine.dtype == torch.bool and mine.shape == (2, 1, 9, 9) and mine.equal(eager == 0)
        assert both(masking_utils.create_causal_mask)[0].equal(tokens.bool())
    finally:
        config._attn_implementation = before
        del config.attention_chunk_size, config.sliding_window


@pytest.mark.parametrize("masks", [attend_transformers.padding_mask, attend_transformers.dense_mask])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("offset, rows", [(0, 5), (5, 3), (8, 1)])
def test_static_cache(masks, padded, offset, rows):
    """Keys behind those written are not seen, whether there is a mask or not."""
    query, key, value = states(rows, 12, batch=2)
    key[:, :, offset + rows :], value[:, :, offset + rows :] = torch.nan, torch.nan
    tokens = torch.ones(2, offset + rows, dtype=torch.bool)
    if padded:
        tokens[1, :2] = False
    mask = masks(2, rows, 12, q_offset=torch.tensor(offset), attention_mask=tokens if padded else None)
    row = torch.arange(offset, offset + rows)
    visible = (torch.arange(offset + rows) <= row[:, None]) & tokens[:, None, None, :]
    written = (query, key[:, :, : offset + rows], value[:, :, : offset + rows])
    close(attention(CAUSAL, (query, key, value), mask), expected(written, visible))


UNSUPPORTED = {
    "dropout": dict(dropout=0.1),
    "output_attentions": dict(output_attentions=True),
    "position_bias": dict(position_bias=torch.zeros(1, 4, 9, 9)),
    "block_table": dict(block_table=torch.zeros(1, 1, dtype=torch.int32)),
    "something_new": dict(something_new=3),
    "attention_mask": dict(attention_mask=torch.full((1, 1, 9, 9), -0.5)),
}


@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_what_is_not_supported_is_named(argument):
    kwargs = dict(UNSUPPORTED[argument])
    with pytest.raises(errors.Unsupported, match=rf"argument '{argument}': expected .*, got "):
        attention(CAUSAL, states(9, 9), kwargs.pop("attention_mask", None), **kwargs)


def test_two_descriptions_of_one_batch():
    starts = torch.tensor([0, 9])
    with pytest.raises(errors.InvalidArgument, match="argument 'cu_seq_lens_q'"):
        attention(CAUSAL, states(9, 9), torch.ones(1, 9), cu_seq_lens_q=starts, cu_seq_lens_k=starts)


def test_training_is_refused():
    model = zoo.DECODERS["llama"]()
    model.set_attn_implementation("attend")
    with pytest.raises(errors.InvalidArgument, match="inference only"):
        model(torch.tensor([[3, 4, 5]]))


def test_output_attentions_of_a_model_is_refused():
    model = zoo.model("bart")
    model.set_attn_implementation("attend")
    with pytest.raises(errors.Unsupported, match="output_attentions"), torch.no_grad():
        model(torch.tensor([[3, 4, 5]]), output_attentions=True)


def test_registering_twice_changes_nothing():
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    attend_transformers.register()
    assert ContinuousBatchingManager.switch_to_cb_friendly_attn is switch


def test_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(hf, "__version__", "5.2.0")
    with pytest.raises(errors.Unsupported, match=r"expected transformers >= 5\.23, got 5\.2\.0"):
        attend_transformers.register()


@pytest.mark.parametrize("name, padded", [("llama", False), ("gemma2", True), ("deepseek_v32", True)])
def test_compiled_model(name, padded):
    torch._dynamo.reset()
    ids, mask = zoo.prompts("left")
    model = zoo.model(name)
    model.set_attn_implementation("attend")
    kwargs = dict(attention_mask=mask if padded else None, use_cache=False)
    with torch.no_grad():
        plain = model(ids, **kwargs).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, **kwargs).logits
    torch.testing.assert_close(compiled[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-4)


def test_exported_model():
    ids, mask = zoo.prompts("left")
    model = zoo.model("mistral")
    model.set_attn_implementation("attend")
    kwargs = dict(attention_mask=mask, use_cache=False)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), kwargs)
        assert "attend.masked_attention" in program.graph_module.code
        assert program.module()(ids, **kwargs).logits.equal(model(ids, **kwargs).logits)


def test_example():
    path = pathlib.Path(__file__).parents[2] / "examples" / "python" / "transformers_generate.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("tokens agree") == 2, done.stdout
