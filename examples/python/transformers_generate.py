# SPDX-License-Identifier: Apache-2.0
"""Generates with a tiny random model of Transformers, with its own attention and with attend's.

Needs torch and transformers; loads nothing from the network. Exits with 1 if the tokens differ.
"""

from __future__ import annotations

import sys

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig, MistralForCausalLM

from attend.integrations import transformers as attend_transformers


def tiny_model() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def report(what: str, agree: bool) -> bool:
    print(f"{what}: tokens {'agree' if agree else 'DIFFER'}")
    return agree


def main() -> int:
    attend_transformers.register()
    model = tiny_model()

    # Three prompts of 5, 9 and 14 tokens, padded on the left.
    ids = torch.randint(3, 99, (3, 14))
    mask = torch.arange(14) >= 14 - torch.tensor([[5], [9], [14]])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens = {}
    for implementation in ("eager", "attend"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(ids, attention_mask=mask.long(), generation_config=config)[:, 14:]
        print(f"{implementation:>6}: {tokens[implementation][0].tolist()}")
    padded = report("generate", tokens["attend"].equal(tokens["eager"]))

    # The same prompts without padding, over a paged cache.
    prompts = [row[kept].tolist() for row, kept in zip(ids, mask)]
    config.eos_token_id = -1
    results = model.generate_batch(
        prompts,
        generation_config=config,
        warmup=False,
        progress_bar=False,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, page_size=16),
    )
    generated = sorted(result.generated_tokens for result in results.values())
    paged = report("generate_batch", generated == sorted(tokens["eager"].tolist()))
    return 0 if padded and paged else 1


if __name__ == "__main__":
    sys.exit(main())
