// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "attend/ops/indexer_cache.h"
#include "attend/ops/indexer_logits.h"
#include "support/host_tensor.h"

namespace attend::testing {

using Ints = std::vector<std::int32_t>;

inline ConstTensorView int_view(const Ints& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

/// Rows of queries, and keys that they may see.
struct IndexerBatch {
  IndexerBatch(Rng& rng, int num_rows, int num_heads, int num_keys)
      : rows(num_rows),
        heads(num_heads),
        keys(num_keys),
        q(DType::fp8_e4m3, {rows, heads, 128}),
        k(DType::fp8_e4m3, {keys, 128}),
        k_scale(DType::f32, {keys}),
        weights(DType::f32, {rows, heads}),
        starts(static_cast<std::size_t>(rows)),
        ends(static_cast<std::size_t>(rows), static_cast<std::int32_t>(keys)) {
    rng.fill_normal(q.as<fp8_e4m3>(), 2.0F);
    rng.fill_normal(k.as<fp8_e4m3>(), 2.0F);
    k_scale.fill_uniform(rng, 0.01F, 2.0F);
    weights.fill_normal(rng);
  }
  Fp8MqaLogitsArgs args(const TensorView& logits) const {
    return {.q = q,
            .k = k,
            .k_scale = k_scale,
            .weights = weights,
            .ks = int_view(starts),
            .ke = int_view(ends),
            .logits = logits};
  }
  /// All logits, [rows, keys].
  std::vector<float> logits(IsaLevel isa, Executor* executor = nullptr) const {
    std::vector<float> out(static_cast<std::size_t>(rows * keys));
    fp8_mqa_logits(args({out.data(), DType::f32, {rows, keys}}), executor, isa);
    return out;
  }

  std::int64_t rows, heads, keys;
  HostTensor q, k, k_scale, weights;
  Ints starts, ends;
};

inline bool same_bits(const float* a, const float* b, std::int64_t n) {
  return std::memcmp(a, b, static_cast<std::size_t>(n) * sizeof(float)) == 0;
}

}  // namespace attend::testing
