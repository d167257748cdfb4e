// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/attention.h"
#include "oracle/problem.h"

namespace attend::oracle {
namespace {

std::int64_t num_keys(const FlashAttnVarlenArgs& a, std::int64_t request) {
  if (a.block_table.defined()) return int_at(a.seq_lens, {request});
  return int_at(a.cu_seqlens_kv, {request + 1}) - int_at(a.cu_seqlens_kv, {request});
}

/// Keys or values as they lie in memory.
struct Stored {
  const ConstTensorView &codes, &descale, &token_scale;
};

/// Rows of one request and kv head of k or v that a query may see.
Rows read_rows(const FlashAttnVarlenArgs& a, const Stored& stored, std::int64_t request,
               std::int64_t kv_head) {
  const ConstTensorView& t = stored.codes;
  const ConstTensorView& scales = stored.token_scale;
  const double factor = descale(stored.descale, request, kv_head);
  Rows rows;
  rows.dim = static_cast<int>(t.shape[t.rank - 1]);
  const std::int64_t n = num_keys(a, request);
  const std::int64_t query_len =
      int_at(a.query_start_loc, {request + 1}) - int_at(a.query_start_loc, {request});
  const std::int64_t first = first_visible_key(a.params, n, query_len);
  rows.skip(first);
  for (std::int64_t j = first; j < n; ++j) {
    if (a.block_table.defined()) {
      const std::int64_t block_size = t.shape[1];
      const std::int64_t block = int_at(a.block_table, {request, j / block_size});
      const double own = scales.defined() ? at(scales, {block, j % block_size, kv_head}) : 1.0;
      rows.append(t, offset_of(t, {block, j % block_size, kv_head}), own * factor);
    } else {
      const std::int64_t row = int_at(a.cu_seqlens_kv, {request}) + j;
      const double own = scales.defined() ? at(scales, {row, kv_head}) : 1.0;
      rows.append(t, offset_of(t, {row, kv_head}), own * factor);
    }
  }
  return rows;
}

}  // namespace

Result flash_attn_varlen(const FlashAttnVarlenArgs& a) {
  const std::int64_t num_reqs = a.query_start_loc.shape[0] - 1;
  const std::int64_t q_heads = a.q.shape[1];
  const std::int64_t kv_heads = a.k.shape[a.k.rank - 2];
  const std::int64_t group_size = q_heads / kv_heads;
  const int dim = static_cast<int>(a.q.shape[2]);
  const int dim_v = static_cast<int>(a.v.shape[a.v.rank - 1]);
  Result result;
  result.out.resize(static_cast<std::size_t>(a.q.shape[0] * q_heads * dim_v));
  result.lse.resize(static_cast<std::size_t>(a.q.shape[0] * q_heads));
  result.out_bound.resize(result.out.size());
  result.lse_bound.resize(result.lse.size());

  for (std::int64_t request = 0; request < num_reqs; ++request) {
    const std::int64_t first = int_at(a.query_start_loc, {request});
    const std::int64_t query_len = int_at(a.query_start_loc, {request + 1}) - first;
    if (query_len == 0) continue;
    RowProblem p = row_problem(a.params, dim, dim_v, num_keys(a, request));
    p.split_weights = splits_weights(a.v.dtype);
    for (std::int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      const Rows k = read_rows(a, {a.k, a.k_descale, a.k_token_scale}, request, kv_head);
      const Rows v = read_rows(a, {a.v, a.v_descale, a.v_token_scale}, request, kv_head);
      for (std::int64_t n = 0; n < query_len * group_size; ++n) {
        const std::int64_t i = n / group_size;
        const std::int64_t head = kv_head * group_size + n % group_size;
        p.position = i + p.num_keys - query_len;
        p.alibi_slope = alibi_slope(a.params, request, head);
        p.sink = sink(a.params, head);
        const double q_factor = descale(a.q_descale, request, kv_head);
        const auto q = [&](int d) { return q_factor * at(a.q, {first + i, head, d}); };
        const RowResult r = row(p, q, k, v);
        const auto at_row = static_cast<std::size_t>((first + i) * q_heads + head);
        result.lse[at_row] = r.lse;
        result.lse_bound[at_row] = lse_error_bound(r, dim);
        for (int d = 0; d < dim_v; ++d) {
          const auto at_out =
              at_row * static_cast<std::size_t>(dim_v) + static_cast<std::size_t>(d);
          result.out[at_out] = r.out[static_cast<std::size_t>(d)];
          result.out_bound[at_out] = out_error_bound(r, d, dim, a.out.dtype);
        }
      }
    }
  }
  return result;
}

}  // namespace attend::oracle
