// SPDX-License-Identifier: Apache-2.0
#include "serving/model_presets.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "attend/core/error.h"

namespace attend::serving {
namespace {

constexpr MlaDims kDeepSeekDims{
    .kv_lora_rank = 512, .qk_nope_head_dim = 128, .qk_rope_head_dim = 64, .v_head_dim = 128};

constexpr std::array kPresets = {
    ModelPreset{.name = "llama-3.1-8b",
                .description = "Llama 3.1 8B: grouped queries, 4 query heads per kv head",
                .num_q_heads = 32,
                .num_kv_heads = 8,
                .head_dim = 128,
                .num_layers = 32},
    ModelPreset{.name = "qwen3-32b",
                .description = "Qwen3 32B: grouped queries, 8 query heads per kv head",
                .num_q_heads = 64,
                .num_kv_heads = 8,
                .head_dim = 128,
                .num_layers = 64},
    ModelPreset{.name = "gemma-2-9b",
                .description = "Gemma 2 9B: head size 256, logits capped at 50, a window of 4096 "
                               "keys in even layers",
                .num_q_heads = 16,
                .num_kv_heads = 8,
                .head_dim = 256,
                .num_layers = 42,
                .scale = 0.0625F,
                .softcap = 50.0F,
                .sliding_window = 4096,
                .window_period = 2},
    ModelPreset{.name = "gemma-3-27b",
                .description = "Gemma 3 27B: a window of 1024 keys in 5 of 6 layers, logits not "
                               "capped",
                .num_q_heads = 32,
                .num_kv_heads = 16,
                .head_dim = 128,
                .num_layers = 62,
                .scale = 0.0771516750F,  // 1 / sqrt(168)
                .sliding_window = 1024,
                .window_period = 6,
                .windowed_layers_of_one = 5},
    ModelPreset{.name = "gpt-oss-20b",
                .description =
                    "gpt-oss 20B: head size 64, attention sinks, a window of 128 keys in "
                    "even layers",
                .num_q_heads = 64,
                .num_kv_heads = 8,
                .head_dim = 64,
                .num_layers = 24,
                .sliding_window = 128,
                .window_period = 2,
                .sinks = true},
    ModelPreset{.name = "bloom-7b",
                .description = "BLOOM 7B: one kv head per query head, ALiBi position bias",
                .num_q_heads = 32,
                .num_kv_heads = 32,
                .head_dim = 128,
                .num_layers = 30,
                .alibi = true},
    ModelPreset{.name = "step-1",
                .description = "Step-1 3B: 12 query heads per kv head, ALiBi by the square root of "
                               "the distance",
                .num_q_heads = 48,
                .num_kv_heads = 4,
                .head_dim = 64,
                .num_layers = 32,
                .alibi = true,
                .alibi_sqrt = true},
    ModelPreset{.name = "bert-base",
                .description =
                    "BERT base: encoder, every token sees the whole prompt; no cache, no "
                    "generated tokens",
                .num_q_heads = 12,
                .num_kv_heads = 12,
                .head_dim = 64,
                .num_layers = 12,
                .attn_type = AttentionType::encoder_only},
    ModelPreset{.name = "whisper-large-v3",
                .description =
                    "Whisper large v3: an encoder over 1500 tokens a request, whose output "
                    "the decoder attends to",
                .num_q_heads = 20,
                .num_kv_heads = 20,
                .head_dim = 64,
                .num_layers = 32,
                .dtype = DType::f16,
                .encoder_tokens = 1500},
    ModelPreset{.name = "deepseek-v2-lite",
                .description =
                    "DeepSeek-V2 Lite: latent attention, 16 query heads over rows of 576 "
                    "numbers",
                .num_q_heads = 16,
                .num_kv_heads = 1,
                .head_dim = kDeepSeekDims.cache_dim(),
                .num_layers = 27,
                .scale = 0.1147213868F,  // (1 + 0.0707 ln 40)^2 / sqrt(192), docs/replay.md
                .mla = kDeepSeekDims},
    ModelPreset{.name = "deepseek-v3",
                .description = "DeepSeek-V3 and R1: latent attention, 128 query heads",
                .num_q_heads = 128,
                .num_kv_heads = 1,
                .head_dim = kDeepSeekDims.cache_dim(),
                .num_layers = 61,
                .scale = 0.1352337789F,  // (1 + 0.1 ln 40)^2 / sqrt(192)
                .mla = kDeepSeekDims},
    ModelPreset{.name = "deepseek-v3.2",
                .description = "DeepSeek-V3.2: latent attention of 128 query heads to 2048 tokens "
                               "that an indexer of 64 heads chooses",
                .num_q_heads = 128,
                .num_kv_heads = 1,
                .head_dim = kDeepSeekDims.cache_dim(),
                .num_layers = 61,
                .scale = 0.1352337789F,  // as DeepSeek-V3
                .mla = kDeepSeekDims,
                .indexer = IndexerPreset{.num_heads = 64, .topk = 2048}},
    ModelPreset{.name = "phi-4-mini-flash",
                .description =
                    "Phi-4-mini-flash: differential attention in every other layer, a window of "
                    "512 keys in the first half, one cache for all layers of the second",
                .num_q_heads = 40,
                .num_kv_heads = 20,
                .head_dim = 64,
                .num_layers = 16,
                .sliding_window = 512,
                .window_period = 16,
                .windowed_layers_of_one = 8,
                .differential = DifferentialPreset{.pairing = HeadPairing::interleaved,
                                                   .norm_weight = true,
                                                   .layers_per_attention = 2},
                .caching_layers = 9},
    ModelPreset{.name = "diffllama",
                .description = "DiffLlama: differential attention, the heads of a pair in "
                               "different halves, norm without weight",
                .num_q_heads = 32,
                .num_kv_heads = 32,
                .head_dim = 64,
                .num_layers = 16,
                .differential = DifferentialPreset{.pairing = HeadPairing::halves}},
};

}  // namespace

std::span<const ModelPreset> model_presets() noexcept { return kPresets; }

const ModelPreset& find_model(std::string_view name) {
  std::string valid;
  for (const ModelPreset& m : kPresets) {
    if (m.name == name) return m;
    valid += valid.empty() ? "" : ", ";
    valid += m.name;
  }
  throw InvalidArgument("replay", "model", "one of " + valid, "'" + std::string(name) + "'");
}

ModelPreset with_query_heads(ModelPreset model, int num_q_heads) {
  if (num_q_heads < 1 || num_q_heads > kMaxQueryHeads || num_q_heads % model.num_kv_heads != 0) {
    const std::string step =
        model.num_kv_heads == 1
            ? ""
            : fmt::format(", a multiple of the {} kv heads of {}", model.num_kv_heads, model.name);
    throw InvalidArgument("replay", "heads", fmt::format("from 1 to {}{}", kMaxQueryHeads, step),
                          std::to_string(num_q_heads));
  }
  model.num_q_heads = num_q_heads;
  return model;
}

ModelPreset with_index_topk(ModelPreset model, int topk) {
  const auto fail = [&](std::string expected) {
    throw InvalidArgument("replay", "index-topk", expected, std::to_string(topk));
  };
  if (!model.indexer) fail(fmt::format("unset: {} has no indexer", model.name));
  if (topk < 1 || topk > (1 << 20)) fail("from 1 to 1048576");
  model.indexer->topk = topk;
  return model;
}

ModelPreset with_layers(ModelPreset model, int num_layers) {
  if (!model.shares_caches()) return model;
  if (num_layers < 1 || num_layers > model.num_layers) {
    throw InvalidArgument(
        "replay", "layers",
        fmt::format("from 1 to {}, the layers of {} with attention", model.num_layers, model.name),
        std::to_string(num_layers));
  }
  const int caching = model.num_self_caches(num_layers);
  if (model.differential) model.differential->skipped_layers += model.caching_layers - caching;
  model.caching_layers = caching;
  model.window_period = model.num_layers = num_layers;
  model.windowed_layers_of_one = std::min(model.windowed_layers_of_one, caching - 1);
  return model;
}

std::vector<float> alibi_slopes(int num_heads) {
  if (num_heads < 1) {
    throw InvalidArgument("alibi_slopes", "num_heads", ">= 1", std::to_string(num_heads));
  }
  const int base = static_cast<int>(std::bit_floor(static_cast<unsigned>(num_heads)));
  std::vector<float> slopes;
  for (int h = 0; h < num_heads; ++h) {
    const double exponent = h < base ? -8.0 * (h + 1) / base : -4.0 * (2 * (h - base) + 1) / base;
    slopes.push_back(static_cast<float>(std::exp2(exponent)));
  }
  return slopes;
}

std::vector<float> sink_logits(int num_heads) {
  if (num_heads < 1) {
    throw InvalidArgument("sink_logits", "num_heads", ">= 1", std::to_string(num_heads));
  }
  std::vector<float> logits;
  for (int h = 0; h < num_heads; ++h) {
    logits.push_back(-2.0F + 6.0F * static_cast<float>(h) / static_cast<float>(num_heads));
  }
  return logits;
}

}  // namespace attend::serving
