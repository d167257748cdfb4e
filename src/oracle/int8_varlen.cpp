// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "attend/oracle/attention.h"
#include "oracle/problem.h"

namespace attend::oracle {
namespace {

constexpr int kWeightLevels = 127;

/// Keys or values of one request and kv head of [num_blocks, Hkv, block_size, D].
struct CacheRows {
  const FlashAttnVarlenInt8Args& args;
  std::int64_t request, kv_head;

  std::int64_t num_keys() const { return int_at(args.seq_lens, {request}); }
  std::int64_t query_len() const {
    return int_at(args.query_start_loc, {request + 1}) - int_at(args.query_start_loc, {request});
  }
  std::int64_t first_key() const { return first_visible_key(args.params, num_keys(), query_len()); }
  /// Calls f(block, offset in the block) for every key that a query may see.
  template <typename F>
  void for_each(const F& f) const {
    const std::int64_t block_size = args.k.shape[2];
    for (std::int64_t j = first_key(); j < num_keys(); ++j)
      f(int_at(args.block_table, {request, j / block_size}), j % block_size);
  }
};

double mean_at(const FlashAttnVarlenInt8Args& a, std::int64_t request, std::int64_t kv_head,
               int d) {
  return a.k_mean.defined() ? at(a.k_mean, {request, kv_head, d}) : 0.0;
}

Rows read_keys(const FlashAttnVarlenInt8Args& a, const CacheRows& cache) {
  Rows rows;
  rows.dim = static_cast<int>(a.k.shape[3]);
  rows.skip(cache.first_key());
  cache.for_each([&](std::int64_t block, std::int64_t offset) {
    const double scale = at(a.k_scale, {block, cache.kv_head, offset});
    for (int d = 0; d < rows.dim; ++d)
      rows.values.push_back(scale * at(a.k, {block, cache.kv_head, offset, d}) +
                            mean_at(a, cache.request, cache.kv_head, d));
  });
  return rows;
}

Rows read_values(const FlashAttnVarlenInt8Args& a, const CacheRows& cache) {
  Rows rows;
  rows.dim = static_cast<int>(a.v.shape[3]);
  rows.skip(cache.first_key());
  cache.for_each([&](std::int64_t block, std::int64_t offset) {
    for (int d = 0; d < rows.dim; ++d) {
      const double scale = a.v_scale.defined() ? at(a.v_scale, {cache.kv_head, d}) : 1.0;
      rows.values.push_back(scale * at(a.v, {block, cache.kv_head, offset, d}));
    }
  });
  return rows;
}

void store(const FlashAttnVarlenInt8Args& a, const RowResult& r, std::size_t row, Result& to) {
  const int dim = static_cast<int>(a.q.shape[2]);
  const int dim_v = static_cast<int>(a.v.shape[3]);
  to.lse[row] = r.lse;
  to.lse_bound[row] = lse_error_bound(r, dim);
  for (int d = 0; d < dim_v; ++d) {
    const auto i = row * static_cast<std::size_t>(dim_v) + static_cast<std::size_t>(d);
    to.out[i] = r.out[static_cast<std::size_t>(d)];
    to.out_bound[i] = out_error_bound(r, d, dim, a.out.dtype);
  }
}

}  // namespace

Result flash_attn_varlen_int8(const FlashAttnVarlenInt8Args& a) {
  const std::int64_t num_reqs = a.query_start_loc.shape[0] - 1;
  const std::int64_t q_heads = a.q.shape[1];
  const std::int64_t kv_heads = a.k.shape[1];
  const std::int64_t group_size = q_heads / kv_heads;
  const int dim = static_cast<int>(a.q.shape[2]);
  Result result;
  result.out.resize(static_cast<std::size_t>(a.q.shape[0] * q_heads * a.v.shape[3]));
  result.lse.resize(static_cast<std::size_t>(a.q.shape[0] * q_heads));
  result.out_bound.resize(result.out.size());
  result.lse_bound.resize(result.lse.size());
  for (std::int64_t request = 0; request < num_reqs; ++request) {
    for (std::int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      const CacheRows cache{a, request, kv_head};
      const std::int64_t query_len = cache.query_len();
      if (query_len == 0) continue;
      RowProblem p = row_problem(a.params, dim, static_cast<int>(a.v.shape[3]), cache.num_keys());
      p.weight_levels = a.v.dtype == DType::i8 ? kWeightLevels : 0;
      const Rows k = read_keys(a, cache);
      const Rows v = read_values(a, cache);
      for (std::int64_t n = 0; n < query_len * group_size; ++n) {
        const std::int64_t head = kv_head * group_size + n % group_size;
        const std::int64_t token = int_at(a.query_start_loc, {request}) + n / group_size;
        p.position = n / group_size + p.num_keys - query_len;
        p.alibi_slope = alibi_slope(a.params, request, head);
        p.sink = sink(a.params, head);
        const double scale = at(a.q_scale, {head, token});
        const auto q = [&](int d) { return scale * at(a.q, {token, head, d}); };
        double mean_magnitude = 0.0;
        for (int d = 0; d < dim; ++d)
          mean_magnitude += std::abs(q(d) * mean_at(a, request, kv_head, d));
        // The kernel multiplies codes and means apart: what they lose to each other counts twice.
        p.extra_logit_magnitude = 2.0 * std::abs(p.scale) * mean_magnitude;
        store(a, row(p, q, k, v), static_cast<std::size_t>(token * q_heads + head), result);
      }
    }
  }
  return result;
}

}  // namespace attend::oracle
