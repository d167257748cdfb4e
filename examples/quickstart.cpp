// SPDX-License-Identifier: Apache-2.0
#include <attend/attend.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  using namespace attend;
  // One request, 4 query tokens, 4 query heads on 2 kv heads; its 20 keys lie in blocks 5 and 2.
  const std::vector<std::int32_t> query_start_loc{0, 4}, seq_lens{20}, block_table{5, 2};
  std::vector<float> q(4 * 4 * 64, 0.5F), out(q.size()), cache(2 * 8 * 16 * 2 * 64, 1.0F);
  const TensorView kv(cache.data(), DType::f32, {2, 8, 16, 2, 64});  // K and V: 8 blocks of 16
  for (int j = 0; j < 20; ++j)  // all keys are equal, value j is j: the result is the mean of j
    std::fill_n(kv.select(0, 1).select(0, block_table[j / 16]).select(0, j % 16).as<float>(),
                2 * 64, static_cast<float>(j));
  FlashAttnVarlenArgs args;
  args.q = {q.data(), DType::f32, {4, 4, 64}};
  args.k = kv.select(0, 0);
  args.v = kv.select(0, 1);
  args.out = {out.data(), DType::f32, {4, 4, 64}};
  args.query_start_loc = {query_start_loc.data(), DType::i32, {2}};
  args.seq_lens = {seq_lens.data(), DType::i32, {1}};
  args.block_table = {block_table.data(), DType::i32, {1, 2}};
  args.params.causal = true;
  flash_attn_varlen(args);
  for (int i = 0; i < 4; ++i) std::printf("token %d: %g\n", i, static_cast<double>(out[i * 256]));
}
