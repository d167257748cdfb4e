// SPDX-License-Identifier: Apache-2.0
#include "bench/attention_problem.h"

namespace attend::bench {
namespace {

/// One token for each of `batch` requests that share `shared` keys and have `own` of their own.
AttentionShape shared_prefix(int batch, int shared, int own, int kv_heads) {
  AttentionShape shape;
  shape.requests = requests(batch, 1, shared + own);
  shape.heads.kv = kv_heads;
  shape.layout = Layout::hnd;
  shape.block_size = 128;
  shape.shared_keys = shared;
  return shape;
}

AttentionShape flat(AttentionShape shape) {
  shape.flat = true;
  return shape;
}

}  // namespace

std::vector<Case> cascade_cases() {
  constexpr auto kFlat = "the same, each request for itself";
  const AttentionShape all_heads = shared_prefix(64, 8192, 128, 32),
                       gqa8 = shared_prefix(64, 8192, 128, 4),
                       few_keys = shared_prefix(8, 128, 896, 4);
  return {
      attention_case("cascade_decode_prefix8k_b64",
                     "one token for each of 64 requests that share 8192 keys and have 128 of their "
                     "own, 32 heads, blocks of 128",
                     Bound::compute, all_heads),
      attention_case("cascade_decode_prefix8k_b64_flat", kFlat, Bound::memory, flat(all_heads)),
      attention_case("cascade_decode_prefix8k_b64_gqa8",
                     "32 query and 4 kv heads: arithmetic binds either way", Bound::compute, gqa8),
      attention_case("cascade_decode_prefix8k_b64_gqa8_flat", kFlat, Bound::compute, flat(gqa8)),
      attention_case(
          "cascade_decode_prefix128_b8",
          "8 requests of 1024 keys that share 128, 32 query and 4 kv heads: too few keys to gain",
          Bound::memory, few_keys),
      attention_case("cascade_decode_prefix128_b8_flat", kFlat, Bound::memory, flat(few_keys)),
  };
}

}  // namespace attend::bench
