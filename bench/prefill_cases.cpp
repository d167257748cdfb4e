// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "bench/attention_problem.h"

namespace attend::bench {
namespace {

AttentionShape prefill(int tokens, Heads heads = {}) {
  AttentionShape shape;
  shape.requests = requests(1, tokens, tokens);
  shape.heads = heads;
  return shape;
}

AttentionShape prefill_of(DType dtype) {
  AttentionShape shape = prefill(4096);
  shape.dtype = shape.kv_dtype = dtype;
  return shape;
}

AttentionShape prompts(int count, int tokens) {
  AttentionShape shape;
  shape.requests = requests(count, tokens, tokens);
  return shape;
}

AttentionShape windowed(int tokens, int keys_seen) {
  AttentionShape shape = prefill(tokens);
  shape.window_left = keys_seen - 1;
  return shape;
}

struct Prefill {
  std::string name, description;
  AttentionShape shape;
};

std::vector<Prefill> all_prefills() {
  return {
      {"prefill_bf16_gqa4_d128_4k", "causal prefill of 4096 tokens, 32 query and 8 kv heads, bf16",
       prefill_of(DType::bf16)},
      {"prefill_f16_gqa4_d128_4k", "the same in float16", prefill_of(DType::f16)},
      {"prefill_f32_gqa4_d128_4k", "the same in float32", prefill_of(DType::f32)},
      {"prefill_bf16_gqa4_d64_4k", "the same with head size 64, bf16", prefill(4096, {32, 8, 64})},
      {"prefill_bf16_gqa4_d256_4k", "head size 256, 16 query and 4 kv heads",
       prefill(4096, {16, 4, 256})},
      {"prefill_bf16_window1k_8k",
       "8192 tokens that see 1024 keys each, 32 query and 8 kv heads, head size 128",
       windowed(8192, 1024)},
      {"prefill_bf16_gqa5_d128_2k", "2048 tokens, 40 query and 8 kv heads",
       prefill(2048, {40, 8, 128})},
      {"prefill_bf16_gqa7_d128_2k", "2048 tokens, 28 query and 4 kv heads",
       prefill(2048, {28, 4, 128})},
      {"prefill_bf16_gqa12_d128_2k", "2048 tokens, 48 query and 4 kv heads",
       prefill(2048, {48, 4, 128})},
      {"mla_prefill_192_128_4k",
       "causal prefill of 4096 tokens in MLA, 16 heads, head sizes 192 and 128, bf16",
       prefill(4096, {16, 16, 192, 128})},
      {"short_batch_256x128", "causal prefill of 256 prompts of 128 tokens, bf16",
       prompts(256, 128)},
      {"short_batch_64x128", "of 64 prompts", prompts(64, 128)},
  };
}

}  // namespace

std::vector<Case> prefill_cases() {
  std::vector<Prefill> all = all_prefills();
  std::vector<Case> cases;
  for (Prefill& p : all) {
    cases.push_back(attention_case(p.name, p.description, Bound::compute, p.shape));
    if (size_of(p.shape.dtype) != 2) continue;
    p.shape.arithmetic = Arithmetic::exact;
    cases.push_back(attention_case(p.name + "_exact", p.name + " in exact arithmetic",
                                   Bound::compute, std::move(p.shape)));
  }
  return cases;
}

}  // namespace attend::bench
