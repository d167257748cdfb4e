// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/mla_decode.h"

#include "attend/oracle/quantize.h"
#include "oracle/problem.h"

namespace attend::oracle {
namespace {

/// Rows of one request that a query may see.
Rows read_rows(const MlaDecodeArgs& a, std::int64_t request) {
  const ConstTensorView& cache = a.kv_cache;
  const bool coded = cache.dtype == DType::u8;
  const double factor = a.kv_scale.defined() ? element(a.kv_scale, 0) : 1.0;
  const std::int64_t num_keys = int_at(a.seq_lens, {request});
  const std::int64_t query_len =
      int_at(a.query_start_loc, {request + 1}) - int_at(a.query_start_loc, {request});
  const std::int64_t first = first_visible_key(a.params, num_keys, query_len);
  Rows rows;
  rows.dim = static_cast<int>(a.q.shape[2]);
  rows.skip(first);
  for (std::int64_t j = first; j < num_keys; ++j) {
    const std::int64_t block = int_at(a.block_table, {request, j / cache.shape[1]});
    const std::int64_t at = offset_of(cache, {block, j % cache.shape[1]});
    if (!coded) {
      rows.append(cache, at, factor);
      continue;
    }
    const std::vector<double> numbers = coded_row(cache, block, j % cache.shape[1]);
    rows.values.insert(rows.values.end(), numbers.begin(), numbers.end());
  }
  return rows;
}

}  // namespace

Result mla_decode(const MlaDecodeArgs& a) {
  const std::int64_t tokens = a.q.shape[0], heads = a.q.shape[1];
  const int dim = static_cast<int>(a.q.shape[2]), latent = static_cast<int>(a.out.shape[2]);
  Result result;
  result.out.resize(static_cast<std::size_t>(tokens * heads * latent));
  result.out_bound.resize(result.out.size());
  result.lse.resize(static_cast<std::size_t>(tokens * heads));
  result.lse_bound.resize(result.lse.size());
  for (std::int64_t request = 0; request + 1 < a.query_start_loc.shape[0]; ++request) {
    const std::int64_t first = int_at(a.query_start_loc, {request});
    const std::int64_t query_len = int_at(a.query_start_loc, {request + 1}) - first;
    if (query_len == 0) continue;
    RowProblem p = row_problem(a.params, dim, latent, int_at(a.seq_lens, {request}));
    p.split_weights = splits_weights(a.kv_cache.dtype);
    const Rows keys = read_rows(a, request);
    for (std::int64_t n = 0; n < query_len * heads; ++n) {
      const std::int64_t token = first + n / heads, head = n % heads;
      p.position = n / heads + p.num_keys - query_len;
      p.alibi_slope = alibi_slope(a.params, request, head);
      p.sink = sink(a.params, head);
      const RowResult r = row(p, [&](int d) { return at(a.q, {token, head, d}); }, keys, keys);
      const auto at_row = static_cast<std::size_t>(token * heads + head);
      result.lse[at_row] = r.lse;
      result.lse_bound[at_row] = lse_error_bound(r, dim);
      for (int d = 0; d < latent; ++d) {
        const auto at_out = at_row * static_cast<std::size_t>(latent) + static_cast<std::size_t>(d);
        result.out[at_out] = r.out[static_cast<std::size_t>(d)];
        result.out_bound[at_out] = out_error_bound(r, d, dim, a.out.dtype);
      }
    }
  }
  return result;
}

}  // namespace attend::oracle
