# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Transformers: attend against Transformers' own eager attention."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import zoo  # noqa: E402

from attend.integrations import transformers as attend_transformers  # noqa: E402

BOTH = ("attend", "attend_dense")
DECODERS = tuple(zoo.DECODERS)
#: Transformers' own paged cache holds neither latent rows nor an indexer's keys.
PAGED = tuple(name for name in DECODERS if not name.startswith("deepseek"))


@pytest.fixture(scope="module", autouse=True)
def registered():
    attend_transformers.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the problems are tiny
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def use(name: str, implementation: str):
    model = zoo.model(name)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def logits(name: str, implementation: str, ids, mask, **kwargs):
    return use(name, implementation)(ids, attention_mask=mask, **kwargs).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("name", (*DECODERS, "llama4"))  # llama4 attends within chunks
def test_prefill(name, implementation, side):
    ids, mask = zoo.prompts(side)
    tokens = mask.bool()
    expected = logits(name, "eager", ids, mask)[tokens]
    close(logits(name, implementation, ids, mask)[tokens], expected)


def in_pieces(model, ids, mask, pieces: tuple[int, ...]):
    """Logits of the pieces of a prompt, each over the cache of those before it."""
    cache = hf.DynamicCache(config=model.config)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    results, at = [], 0
    for length in pieces:
        piece = slice(at, at + length)
        results.append(
            model(
                ids[:, piece],
                attention_mask=mask[:, : at + length],
                position_ids=position_ids[:, piece],
                cache=cache,
                use_cache=True,
            ).logits
        )
        at += length
    assert at == ids.shape[1]
    return torch.cat(results, 1)


@pytest.mark.parametrize("pieces", [(13, 11, 7), (26, 1, 1, 1, 1, 1)], ids=["chunks", "steps"])
@pytest.mark.parametrize("implementation, side", [("attend", "left"), ("attend", "right"), ("attend_dense", "left")])
@pytest.mark.parametrize("name", DECODERS)
def test_prompt_in_pieces(name, implementation, side, pieces):
    ids, mask = zoo.prompts(side)
    tokens = mask.bool()
    if name == "deepseek_v32":  # scores of its indexer tie, and which keys win depends on how many there are
        expected = in_pieces(use(name, "eager"), ids, mask, pieces)[tokens]
    else:
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)
        expected = logits(name, "eager", ids, mask, position_ids=position_ids)[tokens]
    close(in_pieces(use(name, implementation), ids, mask, pieces)[tokens], expected)


def greedy(name: str, implementation: str, ids, mask, **kwargs) -> list[list[int]]:
    model = use(name, implementation)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name, implementation", [(name, "attend") for name in DECODERS] + [("gemma2", "attend_dense")])
def test_greedy_tokens(name, implementation):
    ids, mask = zoo.prompts("left")
    assert greedy(name, implementation, ids, mask) == greedy(name, "eager", ids, mask)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_greedy_tokens_from_a_static_cache(name, implementation, padded):
    ids, mask = zoo.prompts("left")
    if not padded:
        ids, mask = ids[2:], mask[2:]
    static = greedy(name, implementation, ids, mask, cache_implementation="static", disable_compile=True)
    assert static == greedy(name, "eager", ids, mask)


@pytest.mark.parametrize(
    "name, implementation",
    [(name, "attend") for name in PAGED] + [("llama", "paged|attend"), ("gemma2", "attend_dense")],
)
def test_continuous_batching(name, implementation):
    ids, mask = zoo.prompts("left")
    lists = [row[kept.bool()].tolist() for row, kept in zip(ids, mask)]
    lists.append(lists[2][:24] + lists[1][:3])  # shares a prefix of cache pages with another
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    model = use(name, "eager")
    expected = [
        model.generate(torch.tensor([p]), generation_config=hf.GenerationConfig(**options))[0, len(p) :].tolist()
        for p in lists
    ]
    model.set_attn_implementation(implementation)
    results = model.generate_batch(
        lists,
        generation_config=hf.GenerationConfig(**options, eos_token_id=-1),
        warmup=False,
        progress_bar=False,
        continuous_batching_config=hf.ContinuousBatchingConfig(num_blocks=32, page_size=8, max_batch_tokens=24),
    )
    assert model.config._attn_implementation == implementation.removeprefix("paged|")
    assert sorted(r.generated_tokens for r in results.values()) == sorted(expected)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder(implementation, side):
    ids, mask = zoo.prompts(side)
    tokens = mask.bool()
    close(logits("modernbert", implementation, ids, mask)[tokens], logits("modernbert", "eager", ids, mask)[tokens])
    close(logits("modernbert", implementation, ids, None), logits("modernbert", "eager", ids, None))


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_and_decoder(implementation, side):
    ids, mask = zoo.prompts(side)
    decoder_ids = ids.flip(1)[:, :9].clamp_min(3)
    kwargs = dict(decoder_input_ids=decoder_ids)
    close(logits("bart", implementation, ids, mask, **kwargs), logits("bart", "eager", ids, mask, **kwargs))
    options = dict(num_beams=1, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = use("bart", "eager").generate(ids, attention_mask=mask, **options)
    assert use("bart", implementation).generate(ids, attention_mask=mask, **options).equal(expected)


@pytest.mark.parametrize("implementation", BOTH)
def test_speech_to_text(implementation):
    generator = torch.Generator().manual_seed(2)
    kwargs = dict(
        input_features=torch.randn(2, 8, 40, generator=generator),
        decoder_input_ids=torch.randint(3, zoo.VOCABULARY, (2, 11), generator=generator),
    )
    expected = use("whisper", "eager")(**kwargs).logits
    close(use("whisper", implementation)(**kwargs).logits, expected)


MUTATIONS = {
    "window one too wide": ("mistral", lambda kw: kw | dict(sliding_window=kw["sliding_window"] + 1)),
    "window one too narrow": (
        "gemma3",
        lambda kw: kw | dict(sliding_window=kw["sliding_window"] and kw["sliding_window"] - 1),
    ),
    "no window": ("gpt_oss", lambda kw: kw | dict(sliding_window=None)),
    "no softcap": ("gemma2", lambda kw: kw | dict(softcap=None)),
    "no sinks": ("gpt_oss", lambda kw: kw | dict(s_aux=None)),
    "no scale": ("deepseek_v2", lambda kw: kw | dict(scaling=2.0 * kw["scaling"])),
    "no indices": ("deepseek_v32", lambda kw: kw | dict(indices=None)),
    "not causal": ("llama", lambda kw: kw | dict(is_causal=False)),
    "encoder's window one too wide": (
        "modernbert",
        lambda kw: kw | dict(sliding_window=kw["sliding_window"] and kw["sliding_window"] + 1),
    ),
    "causal encoder": ("modernbert", lambda kw: kw | dict(is_causal=True)),
    "no padding": ("qwen3", lambda kw: kw | dict(attention_mask=None)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_lost_feature_is_seen(mutation):
    name, change = MUTATIONS[mutation]

    def mutant(module, query, key, value, attention_mask, **kwargs):
        return attend_transformers.attention(
            module, query, key, value, **change(dict(attention_mask=attention_mask) | kwargs)
        )

    hf.AttentionInterface.register("mutant", mutant)
    hf.AttentionMaskInterface.register("mutant", attend_transformers.padding_mask)
    ids, mask = zoo.prompts("left")
    tokens = mask.bool()
    expected = logits(name, "eager", ids, mask)[tokens]
    with pytest.raises(AssertionError, match="not close"):
        close(logits(name, "mutant", ids, mask)[tokens], expected)
