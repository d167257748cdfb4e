// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "attend/oracle/attention.h"
#include "oracle/bounds.h"
#include "oracle/problem.h"

namespace attend::oracle {
namespace {

using Args = FlashAttnWithKvCacheArgs;

/// Lengths of one request. Positions of keys and queries count from the first valid row.
struct Lengths {
  std::int64_t cached;    ///< rows in the cache before the append, padding included
  std::int64_t left_pad;  ///< rows of padding
  std::int64_t appended;
  std::int64_t num_keys() const noexcept { return cached - left_pad + appended; }
};

Lengths lengths_of(const Args& a, std::int64_t request) {
  Lengths n{};
  n.cached = a.cache_seqlens.defined() ? int_at(a.cache_seqlens, {request}) : a.k_cache.shape[1];
  n.left_pad = a.cache_leftpad.defined() ? int_at(a.cache_leftpad, {request}) : 0;
  n.appended = a.k_new.defined() ? a.k_new.shape[1] : 0;
  return n;
}

/// Rotary embedding of one head row at `position`, computed in float32 and rounded to the dtype of
/// q: for 16-bit formats the products are exact in float32, so that only the sum is rounded and the
/// result has one right value. Without tables the row is returned as it is.
std::vector<double> rotated(const Args& a, const ConstTensorView& t, std::int64_t offset,
                            std::int64_t position) {
  const std::int64_t dim = t.shape[3];
  std::vector<double> x(static_cast<std::size_t>(dim));
  for (std::int64_t d = 0; d < dim; ++d) {
    x[static_cast<std::size_t>(d)] = element(t, offset + d * t.strides[3]);
  }
  if (!a.rotary_cos.defined()) return x;
  const std::int64_t pairs = a.rotary_cos.shape[1];
  const auto round = [&](double y) { return round_to(t.dtype, round_to(DType::f32, y)); };
  for (std::int64_t i = 0; i < pairs; ++i) {
    const auto first = static_cast<std::size_t>(a.rotary_interleaved ? 2 * i : i);
    const std::size_t second = first + static_cast<std::size_t>(a.rotary_interleaved ? 1 : pairs);
    const double c = at(a.rotary_cos, {position, i}), s = at(a.rotary_sin, {position, i});
    const double x0 = x[first], x1 = x[second];
    x[first] = round(x0 * c - x1 * s);
    x[second] = round(x0 * s + x1 * c);
  }
  return x;
}

Rows key_rows(const Args& a, const ConstTensorView& cache, const ConstTensorView& added,
              std::int64_t request, std::int64_t kv_head, bool rotate) {
  const Lengths n = lengths_of(a, request);
  Rows rows;
  rows.dim = static_cast<int>(cache.shape[3]);
  const std::int64_t first =
      n.left_pad +
      std::min(n.cached - n.left_pad, first_visible_key(a.params, n.num_keys(), a.q.shape[1]));
  rows.skip(first - n.left_pad);
  for (std::int64_t j = first; j < n.cached; ++j) {
    if (a.block_table.defined()) {
      const std::int64_t block = int_at(a.block_table, {request, j / cache.shape[1]});
      rows.append(cache, offset_of(cache, {block, j % cache.shape[1], kv_head}));
    } else {
      const std::int64_t row =
          a.cache_batch_idx.defined() ? int_at(a.cache_batch_idx, {request}) : request;
      rows.append(cache, offset_of(cache, {row, j, kv_head}));
    }
  }
  for (std::int64_t i = 0; i < n.appended; ++i) {
    const std::int64_t offset = offset_of(added, {request, i, kv_head});
    if (!rotate) {
      rows.append(added, offset);
      continue;
    }
    const std::vector<double> x = rotated(a, added, offset, n.cached + i);
    rows.values.insert(rows.values.end(), x.begin(), x.end());
  }
  return rows;
}

double norm(const double* x, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return std::sqrt(sum);
}

/// Rotating in float32 costs units of |x0 c| + |x1 s|, which cancellation may make larger than the
/// rotated value; twice the product of the norms bounds the sum of such terms over a row.
void widen_for_rotation(RowResult& r, const RowProblem& p, const std::vector<double>& q,
                        const Rows& k) {
  const KeyRange keys = visible_range(p);
  double largest = 0.0;
  for (std::int64_t j = keys.begin; j < keys.end; ++j) {
    largest = std::max(largest, norm(&k.values[static_cast<std::size_t>(j * k.dim)], k.dim));
  }
  const double bound = 2.0 * std::abs(p.scale) * norm(q.data(), k.dim) * largest;
  r.logit_magnitude = std::max(r.logit_magnitude, bound);
}

/// Rounding errors that rotation in float32 adds to q and k together, as terms of the dot product.
constexpr int kRotationTerms = 8;

struct RowPlace {
  std::int64_t request, query, head;
};

void store(const Args& a, const RowPlace& at_row, const RowResult& r, int error_dim,
           Result& result) {
  const std::int64_t query_len = a.q.shape[1], heads = a.q.shape[2], dim_v = a.v_cache.shape[3];
  const auto lse =
      static_cast<std::size_t>((at_row.request * heads + at_row.head) * query_len + at_row.query);
  const auto out = static_cast<std::size_t>(
      ((at_row.request * query_len + at_row.query) * heads + at_row.head) * dim_v);
  result.lse[lse] = r.lse;
  result.lse_bound[lse] = lse_error_bound(r, error_dim);
  for (int d = 0; d < dim_v; ++d) {
    result.out[out + static_cast<std::size_t>(d)] = r.out[static_cast<std::size_t>(d)];
    result.out_bound[out + static_cast<std::size_t>(d)] =
        out_error_bound(r, d, error_dim, a.out.dtype);
  }
}

void attend_head(const Args& a, std::int64_t request, std::int64_t kv_head, Result& result) {
  const std::int64_t query_len = a.q.shape[1], group_size = a.q.shape[2] / a.k_cache.shape[2];
  const int dim = static_cast<int>(a.q.shape[3]);
  const Lengths n = lengths_of(a, request);
  const Rows k = key_rows(a, a.k_cache, a.k_new, request, kv_head, true);
  const Rows v = key_rows(a, a.v_cache, a.v_new, request, kv_head, false);
  RowProblem p = row_problem(a.params, dim, static_cast<int>(a.v_cache.shape[3]), n.num_keys());
  p.split_weights = splits_weights(a.v_cache.dtype);
  const bool local = a.params.causal || a.params.window_left >= 0 || a.params.window_right >= 0;
  const bool inexact_rotation = a.rotary_cos.defined() && a.q.dtype == DType::f32;
  for (std::int64_t i = 0; i < query_len; ++i) {
    for (std::int64_t head = kv_head * group_size; head < (kv_head + 1) * group_size; ++head) {
      const std::vector<double> q =
          rotated(a, a.q, offset_of(a.q, {request, i, head}), n.cached + (local ? i : 0));
      p.position = i + p.num_keys - query_len;
      p.alibi_slope = alibi_slope(a.params, request, head);
      p.sink = sink(a.params, head);
      RowResult r = row(p, [&](int d) { return q[static_cast<std::size_t>(d)]; }, k, v);
      if (inexact_rotation) widen_for_rotation(r, p, q, k);
      store(a, {request, i, head}, r, dim + (inexact_rotation ? kRotationTerms : 0), result);
    }
  }
}

}  // namespace

Result flash_attn_with_kvcache(const Args& a) {
  Result result;
  const auto rows = static_cast<std::size_t>(a.q.shape[0] * a.q.shape[1] * a.q.shape[2]);
  result.lse.resize(rows);
  result.lse_bound.resize(rows);
  result.out.resize(rows * static_cast<std::size_t>(a.v_cache.shape[3]));
  result.out_bound.resize(result.out.size());
  for (std::int64_t request = 0; request < a.q.shape[0]; ++request) {
    for (std::int64_t kv_head = 0; kv_head < a.k_cache.shape[2]; ++kv_head) {
      attend_head(a, request, kv_head, result);
    }
  }
  return result;
}

AppendedKeys appended_keys(const Args& a) {
  AppendedKeys keys;
  for (std::int64_t request = 0; request < a.k_new.shape[0]; ++request) {
    for (std::int64_t i = 0; i < a.k_new.shape[1]; ++i) {
      for (std::int64_t head = 0; head < a.k_new.shape[2]; ++head) {
        const std::int64_t offset = offset_of(a.k_new, {request, i, head});
        const std::vector<double> x =
            rotated(a, a.k_new, offset, lengths_of(a, request).cached + i);
        keys.value.insert(keys.value.end(), x.begin(), x.end());
        const bool exact = !a.rotary_cos.defined() || a.k_new.dtype != DType::f32;
        double largest = 0.0;
        for (std::int64_t d = 0; d < a.k_new.shape[3]; ++d) {
          largest = std::max(largest, std::abs(element(a.k_new, offset + d * a.k_new.strides[3])));
        }
        // Two products and a sum of at most 2 * largest, with |cos|, |sin| <= 1.
        keys.bound.insert(keys.bound.end(), x.size(), exact ? 0.0 : 4 * kUnit * 2 * largest);
      }
    }
  }
  return keys;
}

}  // namespace attend::oracle
