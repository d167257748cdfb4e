// SPDX-License-Identifier: Apache-2.0
#include "serving/index_check.h"

#include <fmt/format.h>

#include <algorithm>

#include "attend/oracle/indexer_row.h"
#include "serving/sparse_layer.h"

namespace attend::serving {
namespace {

constexpr int kDim = indexer_cache::kDim;

oracle::IndexerLogits compute_logits(const SampledRow& row, const ModelPreset& model,
                                     const ValueGenerator& generator) {
  const auto heads = static_cast<std::size_t>(model.indexer->num_heads);
  oracle::IndexerRowProblem p;
  p.num_heads = model.indexer->num_heads;
  p.dtype = generator.dtype();
  p.position = row.position;
  p.q.resize(heads * kDim);
  RowKey key{query_content(row), row.position, row.layer, 0, ValueKind::index_query};
  for (float* q = p.q.data(); key.head < p.num_heads; ++key.head, q += kDim)
    generator.fill_f32(key, kDim, q);
  p.weights.resize(heads);
  generator.fill_f32({query_content(row), row.position, row.layer, 0, ValueKind::index_weight},
                     p.num_heads, p.weights.data());
  p.k_norm_weight.assign(kDim, 1.0F);
  p.k_norm_bias.assign(kDim, 0.0F);
  p.key = [&](std::int64_t j) {
    std::vector<float> k(kDim);
    generator.fill_f32({key_content(row, j), j, row.layer, 0, ValueKind::index_key}, kDim,
                       k.data());
    return k;
  };
  p.cos_sin = [](std::int64_t position) {
    std::vector<float> rope(64);
    fill_index_rope(position, rope.data());
    return rope;
  };
  return oracle::indexer_row(p);
}

}  // namespace

std::string check_chosen(const SampledRow& row, const ModelPreset& model,
                         const ValueGenerator& generator) {
  const std::int64_t keys = row.position + 1, topk = model.indexer->topk;
  oracle::IndexerLogits logits;
  if (keys > topk) {
    logits = compute_logits(row, model, generator);
  } else {  // every token is chosen
    logits.logits.assign(static_cast<std::size_t>(keys), 0.0);
    logits.bound = logits.logits;
  }
  if (oracle::may_be_top_k(logits.logits, logits.bound, row.chosen)) return "";
  return fmt::format("what was chosen are not the {} tokens with the highest logits of {}",
                     std::min(keys, topk), keys);
}

}  // namespace attend::serving
