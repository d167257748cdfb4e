// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/sparse_mla.h"

#include <limits>

#include "attend/oracle/quantize.h"
#include "oracle/problem.h"

namespace attend::oracle {
namespace {

/// Appends the rows that a token names, in its order.
void append_named_rows(const SparseMlaArgs& a, std::int64_t token, Rows& rows) {
  const ConstTensorView& cache = a.kv_cache;
  const double factor = a.kv_scale.defined() ? element(a.kv_scale, 0) : 1.0;
  std::int64_t length = a.indices.shape[1];
  if (a.topk_length.defined()) length = std::min(length, int_at(a.topk_length, {token}));
  for (std::int64_t i = 0; i < length; ++i) {
    const std::int64_t slot = int_at(a.indices, {token, i});
    if (slot < 0 || slot >= cache.shape[0] * cache.shape[1]) continue;
    const std::int64_t at = offset_of(cache, {slot / cache.shape[1], slot % cache.shape[1]});
    if (cache.dtype != DType::u8) {
      rows.append(cache, at, factor);
      continue;
    }
    const std::vector<double> numbers =
        coded_row(cache, slot / cache.shape[1], slot % cache.shape[1]);
    rows.values.insert(rows.values.end(), numbers.begin(), numbers.end());
  }
}

template <typename Q>
double largest_logit(const RowProblem& p, const Q& q, const Rows& keys) {
  double largest = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = 0; j < p.num_keys; ++j) {
    double dot = 0.0;
    for (int d = 0; d < p.head_dim_qk; ++d) dot += q(d) * keys(j, d);
    largest = std::max(largest, dot * p.scale);
  }
  return largest;
}

}  // namespace

SparseMlaResult sparse_mla_attention(const SparseMlaArgs& a, const SparseMlaArgs* more) {
  const std::int64_t tokens = a.q.shape[0], heads = a.q.shape[1];
  const int dim = static_cast<int>(a.q.shape[2]), latent = static_cast<int>(a.out.shape[2]);
  AttentionParams params;
  params.scale = a.scale;
  params.sinks = a.sinks;
  SparseMlaResult result;
  for (std::int64_t token = 0; token < tokens; ++token) {
    Rows keys;
    keys.dim = dim;
    append_named_rows(a, token, keys);
    if (more != nullptr) append_named_rows(*more, token, keys);
    RowProblem p =
        row_problem(params, dim, latent, static_cast<std::int64_t>(keys.values.size()) / dim);
    p.split_weights = splits_weights(a.kv_cache.dtype);
    for (std::int64_t head = 0; head < heads; ++head) {
      const auto q = [&](int d) { return at(a.q, {token, head, d}); };
      p.sink = sink(params, head);
      const RowResult r = row(p, q, keys, keys);
      const double lse_bound = lse_error_bound(r, dim);
      result.lse.push_back(r.lse);
      result.lse_bound.push_back(lse_bound);
      // The LSE has the errors of the logits and more.
      result.max_logits.push_back(largest_logit(p, q, keys));
      result.max_logits_bound.push_back(lse_bound);
      for (int d = 0; d < latent; ++d) {
        result.out.push_back(r.out[static_cast<std::size_t>(d)]);
        result.out_bound.push_back(out_error_bound(r, d, dim, a.out.dtype));
      }
    }
  }
  return result;
}

}  // namespace attend::oracle
