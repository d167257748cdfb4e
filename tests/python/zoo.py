# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of Transformers, one or two for each feature of attention."""

from __future__ import annotations

import functools

import torch
import transformers as hf

VOCABULARY = 99
#: Prompt lengths of a batch; two are longer than the windows.
LENGTHS = (5, 17, 31)

_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_GQA = _DECODER | dict(head_dim=16)
_MIXED = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
_MLA = _DECODER | dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    q_lora_rank=32,
    n_routed_experts=8,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    moe_intermediate_size=16,
    n_shared_experts=1,
)

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GQA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_GQA, **_MIXED, attn_logit_softcapping=5.0, query_pre_attn_scalar=16)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GQA, **_MIXED, query_pre_attn_scalar=16)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_GQA, **_MIXED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**_MLA)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_MLA)),
    "deepseek_v32": lambda: hf.DeepseekV32ForCausalLM(
        hf.DeepseekV32Config(**_MLA, index_topk=4, index_head_dim=32, index_n_heads=4)
    ),
    "diffllama": lambda: hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**_GQA)),
}

_SEQ2SEQ = dict(
    vocab_size=VOCABULARY,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)

OTHERS = {
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **_GQA, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=8, no_rope_layers=[1, 0]
        )
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ, max_position_embeddings=128)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**_SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=64)
    ),
}


@functools.cache
def model(name: str) -> torch.nn.Module:
    """In float32, in eval mode, with weights N(0, 0.2), so that attention is far from uniform."""
    torch.manual_seed(0)
    made = (DECODERS | OTHERS)[name]().eval().requires_grad_(False)
    for key, parameter in made.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.normal_(parameter)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def prompts(side: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch of LENGTHS with the padding on one side."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(LENGTHS)
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), longest), generator=generator)
    position = torch.arange(longest)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = position >= longest - lengths if side == "left" else position < lengths
    return torch.where(mask, ids, 0), mask.long()
