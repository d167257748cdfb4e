// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attend/oracle/indexer.h"
#include "oracle/bounds.h"
#include "oracle/element.h"

// Derivation of the bounds: docs/numerics.md, section "Indexer".
namespace attend::oracle {
namespace {

constexpr std::int64_t kDim = indexer_cache::kDim;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSmallest = 0x1p-149;  // of float32

using Codes = std::vector<double>;

Codes decoded(const ConstTensorView& t, std::initializer_list<std::int64_t> row) {
  Codes values(static_cast<std::size_t>(kDim));
  const std::int64_t begin = offset_of(t, row);
  for (std::int64_t d = 0; d < kDim; ++d)
    values[static_cast<std::size_t>(d)] = element(t, begin + d);
  return values;
}

struct Key {
  Codes codes;
  double scale = 1.0;
};

/// The logit of one row and one key.
class Logit {
 public:
  void add_head(double weight, const Codes& q, const Codes& k) {
    double product = 0.0, size = 0.0;
    for (std::size_t d = 0; d < q.size(); ++d) {
      product += q[d] * k[d];
      size += std::abs(q[d] * k[d]);
    }
    // No std::max: it would drop a NaN.
    const double positive = product < 0.0 ? 0.0 : product;
    sum_ += weight * positive;
    size_ += std::abs(weight) * positive;
    products_error_ += std::abs(weight) * (kDim + 2) * kUnit * size;
    ++heads_;
  }
  double value(double scale) const { return sum_ * scale; }
  double bound(double scale) const {
    const double added =
        (heads_ + 2) * kUnit * (size_ + products_error_) + kSmallest * static_cast<double>(heads_);
    return kSafety * (std::abs(scale) * (products_error_ + added) + kUnit * std::abs(value(scale)) +
                      kSmallest);
  }

 private:
  double sum_ = 0.0, size_ = 0.0, products_error_ = 0.0;
  int heads_ = 0;
};

/// Logits of a row of queries and some keys.
struct Row {
  std::vector<Codes> heads;
  std::vector<double> weights;

  void append(const Key& key, IndexerLogits& to) const {
    Logit logit;
    for (std::size_t h = 0; h < heads.size(); ++h) logit.add_head(weights[h], heads[h], key.codes);
    to.logits.push_back(logit.value(key.scale));
    to.bound.push_back(logit.bound(key.scale));
  }
};

void append_nothing(IndexerLogits& to, std::int64_t count) {
  to.logits.insert(to.logits.end(), static_cast<std::size_t>(count), -kInfinity);
  to.bound.insert(to.bound.end(), static_cast<std::size_t>(count), 0.0);
}

/// Key `token` of a request in the pages of a cache.
Key paged_key(const Fp8PagedMqaLogitsArgs& a, std::int64_t request, std::int64_t token) {
  const std::int64_t block_size = a.kv_cache.shape[1];
  const std::int64_t block = int_at(a.block_table, {request, token / block_size});
  const auto* bytes =
      static_cast<const std::uint8_t*>(a.kv_cache.data) + block * a.kv_cache.strides[0];
  const std::int64_t offset = token % block_size;
  Key key;
  for (std::int64_t d = 0; d < kDim; ++d)
    key.codes.push_back(fp8_value(DType::fp8_e4m3, bytes[offset * kDim + d]));
  float scale;
  std::memcpy(&scale, bytes + block_size * kDim + 4 * offset, 4);
  key.scale = scale;
  return key;
}

}  // namespace

IndexerLogits fp8_mqa_logits(const Fp8MqaLogitsArgs& a) {
  std::vector<Key> keys;
  for (std::int64_t j = 0; j < a.k.shape[0]; ++j)
    keys.push_back({decoded(a.k, {j, 0}), at(a.k_scale, {j})});
  IndexerLogits result;
  for (std::int64_t i = 0; i < a.q.shape[0]; ++i) {
    Row row;
    for (std::int64_t h = 0; h < a.q.shape[1]; ++h) {
      row.heads.push_back(decoded(a.q, {i, h, 0}));
      row.weights.push_back(at(a.weights, {i, h}));
    }
    const std::int64_t begin = int_at(a.ks, {i}), end = int_at(a.ke, {i});
    append_nothing(result, begin);
    for (std::int64_t j = begin; j < end; ++j)
      row.append(keys[static_cast<std::size_t>(j)], result);
    append_nothing(result, a.k.shape[0] - end);
  }
  return result;
}

IndexerLogits fp8_paged_mqa_logits(const Fp8PagedMqaLogitsArgs& a) {
  IndexerLogits result;
  const std::int64_t next_n = a.q.shape[1];
  for (std::int64_t b = 0; b < a.q.shape[0]; ++b) {
    std::vector<Key> keys;
    for (std::int64_t n = 0; n < next_n; ++n) {
      Row row;
      for (std::int64_t h = 0; h < a.q.shape[2]; ++h) {
        row.heads.push_back(decoded(a.q, {b, n, h, 0}));
        row.weights.push_back(at(a.weights, {b * next_n + n, h}));
      }
      const std::int64_t sees = a.context_lens.rank == 2
                                    ? int_at(a.context_lens, {b, n})
                                    : int_at(a.context_lens, {b}) - (next_n - 1 - n);
      const std::int64_t count = std::max<std::int64_t>(sees, 0);
      for (std::int64_t j = 0; j < count; ++j) {
        if (j == static_cast<std::int64_t>(keys.size())) keys.push_back(paged_key(a, b, j));
        row.append(keys[static_cast<std::size_t>(j)], result);
      }
      append_nothing(result, a.logits.shape[1] - count);
    }
  }
  return result;
}

bool may_be_top_k(std::span<const double> logits, std::span<const double> bounds,
                  std::span<const std::int32_t> indices) {
  const std::size_t wanted = std::min(logits.size(), indices.size());
  std::vector<bool> chosen(logits.size(), false);
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const std::int64_t index = indices[i];
    if (i >= wanted) {
      if (index != -1) return false;
      continue;
    }
    const std::int64_t before = i == 0 ? -1 : indices[i - 1];
    if (index <= before || index >= static_cast<std::int64_t>(logits.size())) return false;
    chosen[static_cast<std::size_t>(index)] = true;
  }
  double lowest = kInfinity, highest = -kInfinity;  // of the chosen at most, of others at least
  for (std::size_t j = 0; j < logits.size(); ++j) {
    if (chosen[j]) lowest = std::min(lowest, logits[j] + bounds[j]);
    if (!chosen[j]) highest = std::max(highest, logits[j] - bounds[j]);
  }
  return lowest >= highest;
}

}  // namespace attend::oracle
