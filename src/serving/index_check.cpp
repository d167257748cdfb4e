// SPDX-License-Identifier: Apache-2.0
#include "serving/index_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "attend/core/float_types.h"
#include "attend/oracle/indexer.h"
#include "attend/oracle/quantize.h"
#include "serving/sparse_layer.h"

namespace attend::serving {
namespace {

constexpr std::int64_t kDim = indexer_cache::kDim;
constexpr auto kSize = static_cast<std::size_t>(kDim);

/// Queries and the key of one token as they are before they become codes.
class Prepared {
 public:
  Prepared(const SampledRow& row, const ModelPreset& model, const ValueGenerator& generator)
      : row_(row), generator_(generator), heads_(model.indexer->num_heads) {}

  oracle::PreparedIndexer queries(std::vector<float>& weights) const {
    std::vector<float> q(kSize * static_cast<std::size_t>(heads_)), k(kSize);
    RowKey key{query_content(row_), row_.position, row_.layer, 0, ValueKind::index_query};
    for (key.head = 0; key.head < heads_; ++key.head)
      generator_.fill_f32(key, static_cast<int>(kDim),
                          q.data() + static_cast<std::size_t>(key.head) * kSize);
    weights.resize(static_cast<std::size_t>(heads_));
    generator_.fill_f32(
        {query_content(row_), row_.position, row_.layer, 0, ValueKind::index_weight}, heads_,
        weights.data());
    return prepare(q, k, heads_, row_.position);
  }
  oracle::PreparedIndexer key(std::int64_t position) const {
    std::vector<float> q(kSize), k(kSize);
    generator_.fill_f32({key_content(row_, position), position, row_.layer, 0, ValueKind::index_key},
                        static_cast<int>(kDim), k.data());
    return prepare(q, k, 1, position);
  }

 private:
  oracle::PreparedIndexer prepare(const std::vector<float>& q, const std::vector<float>& k,
                                  int heads, std::int64_t position) const {
    const auto stored = [&](const std::vector<float>& values) {
      std::vector<std::byte> bytes(values.size() * size_of(generator_.dtype()));
      for (std::size_t i = 0; i < values.size(); ++i) store(values[i], bytes, i);
      return bytes;
    };
    const std::vector<std::byte> queries = stored(q), key = stored(k);
    std::array<float, 64> rope{};
    fill_index_rope(position, rope.data());
    const std::vector<float> ones(kSize, 1.0F), zeros(kSize, 0.0F);
    const std::int64_t zero = 0;
    std::vector<std::byte> codes(static_cast<std::size_t>(heads) * kSize);
    PrepareIndexerArgs a;
    a.q = {queries.data(), generator_.dtype(), {1, heads, kDim}};
    a.k = {key.data(), generator_.dtype(), {1, kDim}};
    a.positions = {&zero, DType::i64, {1}};
    a.cos_sin_cache = {rope.data(), DType::f32, {1, 64}};
    a.k_norm_weight = {ones.data(), DType::f32, {kDim}};
    a.k_norm_bias = {zeros.data(), DType::f32, {kDim}};
    a.q_codes = {codes.data(), DType::fp8_e4m3, {1, heads, kDim}};
    return oracle::prepare_indexer(a);
  }
  void store(float value, std::vector<std::byte>& bytes, std::size_t i) const {
    switch (generator_.dtype()) {
      case DType::f32:
        reinterpret_cast<float*>(bytes.data())[i] = value;
        break;
      case DType::f16:
        reinterpret_cast<f16*>(bytes.data())[i] = to_f16(value);
        break;
      default:
        reinterpret_cast<bf16*>(bytes.data())[i] = to_bf16(value);
    }
  }

  const SampledRow& row_;
  const ValueGenerator& generator_;
  int heads_;
};

/// A key as the cache gives it back, with the error that its preparation may make in each element.
struct IndexKey {
  std::array<std::uint8_t, kSize> codes{};
  float scale = 0.0F;
  std::vector<double> doubts = std::vector<double>(kSize, 0.0);
};

IndexKey encode(const oracle::PreparedIndexer& prepared) {
  IndexKey key;
  key.scale = oracle::indexer_key(prepared.k, true, key.codes);
  const bool exact =
      std::ranges::all_of(prepared.k_bound, [](double bound) { return bound == 0.0; });
  if (exact) return key;
  const auto value = [](std::uint8_t code, float scale) {
    return oracle::fp8_value(DType::fp8_e4m3, code) * static_cast<double>(scale);
  };
  for (const double sign : {-1.0, 1.0}) {
    std::vector<double> moved = prepared.k;
    for (std::size_t d = 0; d < kSize; ++d) moved[d] += sign * prepared.k_bound[d];
    std::array<std::uint8_t, kSize> codes{};
    const float scale = oracle::indexer_key(moved, true, codes);
    for (std::size_t d = 0; d < kSize; ++d)
      key.doubts[d] = std::max(
          key.doubts[d], std::abs(value(codes[d], scale) - value(key.codes[d], key.scale)));
  }
  return key;
}

/// Queries of all heads, as codes, and what their products count.
struct IndexQuery {
  std::vector<std::uint8_t> codes;
  std::vector<float> weights;
};

IndexQuery encode_query(const Prepared& tokens, int heads) {
  IndexQuery query;
  const oracle::PreparedIndexer prepared = tokens.queries(query.weights);
  query.codes.resize(prepared.q.size());
  const auto softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kDim)));
  const auto heads_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(heads)));
  for (std::size_t h = 0; h < query.weights.size(); ++h) {
    const float scale =
        oracle::indexer_query(std::span(prepared.q).subspan(h * kSize, kSize), true,
                              std::span(query.codes).subspan(h * kSize, kSize));
    query.weights[h] = query.weights[h] * scale * softmax_scale * heads_scale;
  }
  return query;
}

/// Logits of the row's query with every token that it sees.
oracle::IndexerLogits compute_logits(const SampledRow& row, const ModelPreset& model,
                                     const ValueGenerator& generator) {
  const int heads = model.indexer->num_heads;
  const auto keys = static_cast<std::size_t>(row.position) + 1;
  const Prepared tokens(row, model, generator);
  const IndexQuery query = encode_query(tokens, heads);
  std::vector<std::uint8_t> codes(keys * kSize);
  std::vector<float> scales(keys), result(keys);
  std::vector<double> size(kSize, 0.0), doubts(keys, 0.0);
  for (std::size_t i = 0; i < query.codes.size(); ++i)
    size[i % kSize] += std::abs(static_cast<double>(query.weights[i / kSize]) *
                                oracle::fp8_value(DType::fp8_e4m3, query.codes[i]));
  for (std::size_t j = 0; j < keys; ++j) {
    const IndexKey key = encode(tokens.key(static_cast<std::int64_t>(j)));
    std::ranges::copy(key.codes, codes.begin() + static_cast<std::ptrdiff_t>(j * kSize));
    scales[j] = key.scale;
    for (std::size_t d = 0; d < kSize; ++d) doubts[j] += size[d] * key.doubts[d];
  }
  const std::int32_t start = 0;
  const auto columns = static_cast<std::int64_t>(keys);
  const auto end = static_cast<std::int32_t>(keys);
  Fp8MqaLogitsArgs a;
  a.q = {query.codes.data(), DType::fp8_e4m3, {1, heads, kDim}};
  a.weights = {query.weights.data(), DType::f32, {1, heads}};
  a.ks = {&start, DType::i32, {1}};
  a.ke = {&end, DType::i32, {1}};
  a.k = {codes.data(), DType::fp8_e4m3, {columns, kDim}};
  a.k_scale = {scales.data(), DType::f32, {columns}};
  a.logits = {result.data(), DType::f32, {1, columns}};
  oracle::IndexerLogits logits = oracle::fp8_mqa_logits(a);
  for (std::size_t j = 0; j < keys; ++j) logits.bound[j] += doubts[j];
  return logits;
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
