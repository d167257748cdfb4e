// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "oracle/element.h"
#include "oracle/row.h"

namespace attend::oracle {

/// Decoded rows of one kv head of one request, [num_rows, dim].
struct Rows {
  int dim = 0;
  std::vector<double> values;
  double operator()(std::int64_t j, int d) const noexcept {
    return values[static_cast<std::size_t>(j * dim + d)];
  }
  void append(const ConstTensorView& t, std::int64_t offset, double factor = 1.0) {
    for (int d = 0; d < dim; ++d)
      values.push_back(factor * element(t, offset + d * last_stride(t)));
  }
  /// Rows that nothing reads.
  void skip(std::int64_t n) { values.resize(values.size() + static_cast<std::size_t>(n * dim)); }
  static std::int64_t last_stride(const ConstTensorView& t) noexcept {
    return t.strides[t.rank - 1];
  }
};

/// Row problem with everything that does not depend on the query token or head.
inline RowProblem row_problem(const AttentionParams& params, int head_dim_qk, int head_dim_v,
                              std::int64_t num_keys) {
  RowProblem p;
  p.head_dim_qk = head_dim_qk;
  p.head_dim_v = head_dim_v;
  p.num_keys = num_keys;
  p.scale = params.scale ? static_cast<double>(*params.scale) : 1.0 / std::sqrt(head_dim_qk);
  p.causal = params.causal;
  p.window_left = params.window_left;
  p.window_right = params.window_right;
  p.softcap = params.softcap;
  p.alibi_sqrt = params.alibi_sqrt;
  p.lse_includes_sink = params.lse_includes_sink;
  return p;
}

/// First key that the first query of a request sees, and so any of them. Rows before it are not
/// read: their block-table entries may be garbage.
inline std::int64_t first_visible_key(const AttentionParams& params, std::int64_t num_keys,
                                      std::int64_t query_len) {
  if (params.window_left < 0) return 0;
  return std::clamp<std::int64_t>(num_keys - query_len - params.window_left, 0, num_keys);
}

/// Sink of a head; unset if there are none.
inline std::optional<double> sink(const AttentionParams& params, std::int64_t head) {
  if (!params.sinks.defined()) return std::nullopt;
  return at(params.sinks, {head});
}

/// Factor of stored values: [B, Hkv]; 1 if there is none.
inline double descale(const ConstTensorView& t, std::int64_t request, std::int64_t kv_head) {
  return t.defined() ? at(t, {request, kv_head}) : 1.0;
}

/// Slope of a head: [Hq] or [B, Hq]; 0 if ALiBi is off.
inline double alibi_slope(const AttentionParams& params, std::int64_t request, std::int64_t head) {
  const ConstTensorView& slopes = params.alibi_slopes;
  if (!slopes.defined()) return 0.0;
  return slopes.rank == 1 ? at(slopes, {head}) : at(slopes, {request, head});
}

}  // namespace attend::oracle
