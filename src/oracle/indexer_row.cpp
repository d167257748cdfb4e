// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/indexer_row.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "attend/core/float_types.h"
#include "attend/oracle/quantize.h"

namespace attend::oracle {
namespace {

constexpr std::int64_t kDim = indexer_cache::kDim;
constexpr auto kSize = static_cast<std::size_t>(kDim);

std::vector<std::byte> stored(DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    switch (dtype) {
      case DType::f32:
        reinterpret_cast<float*>(bytes.data())[i] = values[i];
        break;
      case DType::f16:
        reinterpret_cast<f16*>(bytes.data())[i] = to_f16(values[i]);
        break;
      default:
        reinterpret_cast<bf16*>(bytes.data())[i] = to_bf16(values[i]);
    }
  }
  return bytes;
}

/// Queries and a key at a position as they are before they become codes.
PreparedIndexer prepare(const IndexerRowProblem& p, const std::vector<float>& q,
                        const std::vector<float>& k, std::int64_t position) {
  const std::vector<std::byte> queries = stored(p.dtype, q), key = stored(p.dtype, k);
  const std::vector<float> rope = p.cos_sin(position);
  const auto heads = static_cast<std::int64_t>(q.size() / kSize);
  const std::int64_t first = 0;
  std::vector<std::byte> codes(q.size());
  PrepareIndexerArgs a;
  a.q = {queries.data(), p.dtype, {1, heads, kDim}};
  a.k = {key.data(), p.dtype, {1, kDim}};
  a.positions = {&first, DType::i64, {1}};
  a.cos_sin_cache = {rope.data(), DType::f32, {1, 64}};
  a.is_neox = p.is_neox;
  a.k_norm_weight = {p.k_norm_weight.data(), DType::f32, {kDim}};
  a.k_norm_bias = {p.k_norm_bias.data(), DType::f32, {kDim}};
  a.q_codes = {codes.data(), DType::fp8_e4m3, {1, heads, kDim}};
  return oracle::prepare_indexer(a);
}

/// A key as the cache gives it back, with the error that its preparation may make in each element.
struct IndexKey {
  std::array<std::uint8_t, kSize> codes{};
  float scale = 0.0F;
  std::vector<double> doubts = std::vector<double>(kSize, 0.0);
};

IndexKey encode(const PreparedIndexer& prepared) {
  IndexKey key;
  key.scale = indexer_key(prepared.k, true, key.codes);
  const bool exact =
      std::ranges::all_of(prepared.k_bound, [](double bound) { return bound == 0.0; });
  if (exact) return key;
  const auto value = [](std::uint8_t code, float scale) {
    return fp8_value(DType::fp8_e4m3, code) * static_cast<double>(scale);
  };
  for (const double sign : {-1.0, 1.0}) {
    std::vector<double> moved = prepared.k;
    for (std::size_t d = 0; d < kSize; ++d) moved[d] += sign * prepared.k_bound[d];
    std::array<std::uint8_t, kSize> codes{};
    const float scale = indexer_key(moved, true, codes);
    for (std::size_t d = 0; d < kSize; ++d)
      key.doubts[d] = std::max(key.doubts[d],
                               std::abs(value(codes[d], scale) - value(key.codes[d], key.scale)));
  }
  return key;
}

/// Queries of all heads, as codes, and what their products count.
struct IndexQuery {
  std::vector<std::uint8_t> codes;
  std::vector<float> weights;
};

IndexQuery encode_query(const IndexerRowProblem& p) {
  const PreparedIndexer prepared = prepare(p, p.q, std::vector<float>(kSize, 1.0F), p.position);
  IndexQuery query{std::vector<std::uint8_t>(prepared.q.size()), p.weights};
  const auto softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kDim)));
  const auto heads_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.num_heads)));
  for (std::size_t h = 0; h < query.weights.size(); ++h) {
    const float scale = indexer_query(std::span(prepared.q).subspan(h * kSize, kSize), true,
                                      std::span(query.codes).subspan(h * kSize, kSize));
    query.weights[h] = query.weights[h] * scale * softmax_scale * heads_scale;
  }
  return query;
}

}  // namespace

IndexerLogits indexer_row(const IndexerRowProblem& p) {
  const auto keys = static_cast<std::size_t>(p.position) + 1;
  const IndexQuery query = encode_query(p);
  std::vector<std::uint8_t> codes(keys * kSize);
  std::vector<float> scales(keys), result(keys);
  // What one unit of each element of a key counts in a logit at most.
  std::vector<double> size(kSize, 0.0), doubts(keys, 0.0);
  for (std::size_t i = 0; i < query.codes.size(); ++i)
    size[i % kSize] += std::abs(static_cast<double>(query.weights[i / kSize]) *
                                fp8_value(DType::fp8_e4m3, query.codes[i]));
  const std::vector<float> no_query(kSize, 0.0F);
  for (std::size_t j = 0; j < keys; ++j) {
    const auto position = static_cast<std::int64_t>(j);
    const IndexKey key = encode(prepare(p, no_query, p.key(position), position));
    std::ranges::copy(key.codes, codes.begin() + static_cast<std::ptrdiff_t>(j * kSize));
    scales[j] = key.scale;
    for (std::size_t d = 0; d < kSize; ++d) doubts[j] += size[d] * key.doubts[d];
  }
  const std::int32_t start = 0;
  const auto end = static_cast<std::int32_t>(keys);
  const auto columns = static_cast<std::int64_t>(keys);
  Fp8MqaLogitsArgs a;
  a.q = {query.codes.data(), DType::fp8_e4m3, {1, p.num_heads, kDim}};
  a.weights = {query.weights.data(), DType::f32, {1, p.num_heads}};
  a.ks = {&start, DType::i32, {1}};
  a.ke = {&end, DType::i32, {1}};
  a.k = {codes.data(), DType::fp8_e4m3, {columns, kDim}};
  a.k_scale = {scales.data(), DType::f32, {columns}};
  a.logits = {result.data(), DType::f32, {1, columns}};
  IndexerLogits logits = oracle::fp8_mqa_logits(a);
  for (std::size_t j = 0; j < keys; ++j) logits.bound[j] += doubts[j];
  return logits;
}

}  // namespace attend::oracle
