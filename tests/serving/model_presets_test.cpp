// SPDX-License-Identifier: Apache-2.0
#include "serving/model_presets.h"

#include <gmock/gmock.h>

#include <cmath>

#include "attend/core/error.h"

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

TEST(ModelPresets, EachIsFoundByItsNameAndIsWellFormed) {
  for (const ModelPreset& m : model_presets()) {
    SCOPED_TRACE(m.name);
    EXPECT_EQ(&find_model(m.name), &m);
    EXPECT_FALSE(m.description.empty());
    EXPECT_EQ(m.num_q_heads % m.num_kv_heads, 0);
    EXPECT_EQ(m.head_dim % 8, 0);
    EXPECT_GE(m.num_layers, 1);
    EXPECT_GE(m.window_period, 1);
    EXPECT_GE(m.windowed_layers_of_one, 1);
    EXPECT_LE(m.windowed_layers_of_one, m.window_period);
    EXPECT_TRUE(m.alibi || !m.alibi_sqrt);
  }
}

TEST(ModelPresets, TheListOfTheCommandLine) {
  for (const auto* name :
       {"llama-3.1-8b", "qwen3-32b", "gemma-2-9b", "gemma-3-27b", "gpt-oss-20b", "bloom-7b",
        "step-1", "bert-base", "whisper-large-v3", "deepseek-v2-lite", "deepseek-v3",
        "deepseek-v3.2", "phi-4-mini-flash", "diffllama"}) {
    EXPECT_NO_THROW(find_model(name));
  }
}

TEST(ModelPresets, CrossAttentionHasACacheOfItsOwn) {
  const ModelPreset& whisper = find_model("whisper-large-v3");
  EXPECT_TRUE(whisper.has_cross_attention());
  EXPECT_FALSE(whisper.is_encoder());
  EXPECT_EQ(whisper.encoder_tokens, 1500);
  EXPECT_EQ(whisper.num_caches(3), 6);
  EXPECT_EQ(find_model("llama-3.1-8b").num_caches(3), 3);
  EXPECT_EQ(find_model("bert-base").num_caches(3), 0);
}

TEST(ModelPresets, AnUnknownNameListsTheValidOnes) {
  try {
    find_model("llama");
    FAIL();
  } catch (const InvalidArgument& e) {
    for (const ModelPreset& m : model_presets()) {
      EXPECT_THAT(e.what(), HasSubstr(std::string(m.name)));
    }
    EXPECT_THAT(e.what(), HasSubstr("'llama'"));
  }
}

TEST(ModelPresets, WindowsAlternate) {
  const ModelPreset& gemma = find_model("gemma-2-9b");
  EXPECT_EQ(gemma.window_of(0), 4096);
  EXPECT_EQ(gemma.window_of(1), std::nullopt);
  EXPECT_EQ(gemma.window_of(2), 4096);
  EXPECT_EQ(find_model("llama-3.1-8b").window_of(0), std::nullopt);
}

TEST(ModelPresets, EverySixthLayerOfGemma3SeesEverything) {
  const ModelPreset& gemma = find_model("gemma-3-27b");
  for (int layer = 0; layer < gemma.num_layers; ++layer) {
    EXPECT_EQ(gemma.window_of(layer),
              (layer + 1) % 6 == 0 ? std::nullopt : std::optional<int>(1024));
  }
  EXPECT_NEAR(gemma.scale.value(), 1.0 / std::sqrt(168.0), 1e-8);
}

TEST(ModelPresets, DeepSeekHasLatentsAndTheScaleOfItsContextExtension) {
  const ModelPreset& lite = find_model("deepseek-v2-lite");
  const ModelPreset& v3 = find_model("deepseek-v3");
  for (const ModelPreset* m : {&lite, &v3}) {
    EXPECT_EQ(m->mla, (MlaDims{512, 128, 64, 128}));
    EXPECT_EQ(m->head_dim, 576);
    EXPECT_EQ(m->num_kv_heads, 1);
    EXPECT_EQ(m->query_dim(), 192);
    EXPECT_EQ(m->output_dim(), 128);
    EXPECT_EQ(m->dtype, DType::bf16);
  }
  EXPECT_EQ(lite.num_q_heads, 16);
  EXPECT_EQ(lite.num_layers, 27);
  EXPECT_EQ(v3.num_q_heads, 128);
  EXPECT_EQ(v3.num_layers, 61);
  const auto scale = [](double mscale) {
    const double factor = 0.1 * mscale * std::log(40.0) + 1.0;
    return factor * factor / std::sqrt(192.0);
  };
  EXPECT_NEAR(lite.scale.value(), scale(0.707), 1e-8);
  EXPECT_NEAR(v3.scale.value(), scale(1.0), 1e-8);
  EXPECT_EQ(find_model("llama-3.1-8b").query_dim(), 128);
  EXPECT_EQ(find_model("llama-3.1-8b").output_dim(), 128);
}

TEST(ModelPresets, PhiMiniFlashHasWindowsThenOneCacheForTheRest) {
  const ModelPreset& phi = find_model("phi-4-mini-flash");
  EXPECT_EQ(phi.num_q_heads, 40);
  EXPECT_EQ(phi.num_kv_heads, 20);
  EXPECT_EQ(phi.head_dim, 64);
  EXPECT_EQ(phi.num_rows(), 20);
  EXPECT_EQ(phi.row_dim(), 128);
  // 32 layers, of which the odd ones have attention: 8 with a window, the 17th with the cache that
  // those behind it attend to.
  ASSERT_EQ(phi.num_layers, 16);
  EXPECT_EQ(phi.num_caches(16), 9);
  for (int layer = 0; layer < 16; ++layer) {
    EXPECT_EQ(phi.model_layer(layer), 2 * layer + 1);
    EXPECT_EQ(phi.window_of(layer), layer < 8 ? std::optional<int>(512) : std::nullopt);
    EXPECT_EQ(phi.shares_cache(layer), phi.model_layer(layer) > 17);
    EXPECT_EQ(phi.model_layer(phi.cache_of(layer)), layer < 8 ? 2 * layer + 1 : 17);
  }
}

TEST(ModelPresets, AShortRunOfPhiMiniFlashHasEveryKindOfLayer) {
  const auto layers_of = [](int n) {
    const ModelPreset m = with_layers(find_model("phi-4-mini-flash"), n);
    std::string kinds;
    for (int layer = 0; layer < n; ++layer) {
      kinds += std::to_string(m.model_layer(layer));
      kinds += m.window_of(layer) ? "w " : m.shares_cache(layer) ? "s " : "f ";
    }
    return kinds;
  };
  EXPECT_EQ(layers_of(1), "17f ");
  EXPECT_EQ(layers_of(2), "1w 17f ");
  EXPECT_EQ(layers_of(3), "1w 17f 19s ");
  EXPECT_EQ(layers_of(4), "1w 3w 17f 19s ");
  EXPECT_EQ(layers_of(7), "1w 3w 5w 17f 19s 21s 23s ");
  EXPECT_EQ(layers_of(16), "1w 3w 5w 7w 9w 11w 13w 15w 17f 19s 21s 23s 25s 27s 29s 31s ");
  for (const int n : {-1, 0, 17}) {
    try {
      with_layers(find_model("phi-4-mini-flash"), n);
      FAIL() << n;
    } catch (const InvalidArgument& e) {
      EXPECT_THAT(e.what(), HasSubstr("from 1 to 16, the layers of phi-4-mini-flash"));
    }
  }
}

TEST(ModelPresets, OthersHaveAnyNumberOfLayersAndACacheEach) {
  for (const auto* name : {"diffllama", "llama-3.1-8b"}) {
    const ModelPreset m = with_layers(find_model(name), 100);
    EXPECT_EQ(m.num_caches(100), 100);
    EXPECT_EQ(m.cache_of(99), 99);
    EXPECT_FALSE(m.shares_cache(99));
  }
  const ModelPreset& diffllama = find_model("diffllama");
  EXPECT_EQ(diffllama.model_layer(5), 5);
  EXPECT_EQ(diffllama.window_of(0), std::nullopt);
}

TEST(ModelPresets, PairsAreOfNeighboursOrOfHalves) {
  const ModelPreset& phi = find_model("phi-4-mini-flash");
  const ModelPreset& diffllama = find_model("diffllama");
  EXPECT_EQ(phi.head_of(3, 0, 40), 6);
  EXPECT_EQ(phi.head_of(3, 1, 40), 7);
  EXPECT_EQ(diffllama.head_of(3, 0, 32), 3);
  EXPECT_EQ(diffllama.head_of(3, 1, 32), 19);
}

TEST(ModelPresets, OtherQueryHeadsAreAMultipleOfTheKvHeads) {
  const ModelPreset& v3 = find_model("deepseek-v3");
  const ModelPreset& llama = find_model("llama-3.1-8b");
  EXPECT_EQ(with_query_heads(v3, 1).num_q_heads, 1);
  EXPECT_EQ(with_query_heads(v3, 1024).num_q_heads, 1024);
  EXPECT_EQ(with_query_heads(llama, 8).num_q_heads, 8);
  EXPECT_EQ(with_query_heads(llama, 40).num_q_heads, 40);
  EXPECT_EQ(with_query_heads(llama, 40).num_kv_heads, 8);
  const auto message = [](const ModelPreset& m, int heads) -> std::string {
    try {
      with_query_heads(m, heads);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_THAT(message(v3, 0), HasSubstr("heads': expected from 1 to 1024, got 0"));
  EXPECT_THAT(message(v3, 1025), HasSubstr("from 1 to 1024, got 1025"));
  for (const int heads : {-8, 4, 12}) {
    EXPECT_THAT(message(llama, heads),
                HasSubstr("from 1 to 1024, a multiple of the 8 kv heads of llama-3.1-8b"));
  }
}

TEST(SinkLogits, RunFromMinusTwoToFour) {
  const auto logits = sink_logits(6);
  ASSERT_EQ(logits.size(), 6U);
  for (int h = 0; h < 6; ++h) EXPECT_FLOAT_EQ(logits[static_cast<std::size_t>(h)], h - 2.0F);
  EXPECT_THROW(sink_logits(0), InvalidArgument);
}

TEST(AlibiSlopes, PowerOfTwo) {
  const auto slopes = alibi_slopes(8);
  ASSERT_EQ(slopes.size(), 8U);
  for (int h = 0; h < 8; ++h) EXPECT_FLOAT_EQ(slopes[h], std::exp2(-(h + 1.0F)));
}

TEST(AlibiSlopes, OtherNumbersInterleaveTheNextFinerSequence) {
  const auto slopes = alibi_slopes(12);
  ASSERT_EQ(slopes.size(), 12U);
  for (int h = 0; h < 8; ++h) EXPECT_FLOAT_EQ(slopes[h], std::exp2(-(h + 1.0F)));
  for (int h = 0; h < 4; ++h) EXPECT_FLOAT_EQ(slopes[8 + h], std::exp2(-0.5F * (2 * h + 1)));
  EXPECT_THROW(alibi_slopes(0), InvalidArgument);
}

}  // namespace
}  // namespace attend::serving
