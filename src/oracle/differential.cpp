// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/differential.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "oracle/bounds.h"
#include "oracle/problem.h"

// Derivation of the bounds: docs/numerics.md, section "Differential attention". Symbols as there.
namespace attend::oracle {
namespace {

constexpr double kSigmoidError = 0x1p-20;     ///< relative error of the kernels' sigmoid
constexpr double kSigmoidEnd = 0x1p-120;      ///< its absolute error far from 0
constexpr double kSmallestNumber = 0x1p-149;  ///< of float32

/// Numbers and how far those of a kernel may be from them.
struct Values {
  std::vector<double> value, error;
};

/// attn1 - lambda attn2.
Values difference(const Values& first, const Values& second, const DifferentialRowCombine& c) {
  Values x;
  for (std::size_t d = 0; d < first.value.size(); ++d) {
    const double subtrahend = c.lambda * second.value[d];
    const double largest = std::abs(second.value[d]) + second.error[d];
    const double lambda = std::abs(c.lambda) + c.lambda_error;
    x.value.push_back(first.value[d] - subtrahend);
    const double given =
        first.error[d] + lambda * second.error[d] + c.lambda_error * std::abs(second.value[d]);
    const double rounded = kUnit * (2 * lambda * largest + std::abs(first.value[d]));
    x.error.push_back(given + kSafety * (rounded + kSmallestNumber));
  }
  return x;
}

/// RMSNorm, weight and factor.
Values scaled(const Values& x, const DifferentialRowCombine& c) {
  const auto n = static_cast<double>(x.value.size());
  double norm = 1.0, smallest_norm = 1.0, norm_error = 0.0, rounding = 2.0;
  if (c.norm) {
    const auto mean_square = [n](const std::vector<double>& v) {
      return std::inner_product(v.begin(), v.end(), v.begin(), 0.0) / n;
    };
    norm = std::sqrt(mean_square(x.value) + c.norm_eps);
    norm_error = std::sqrt(mean_square(x.error));
    smallest_norm = std::max(std::sqrt(c.norm_eps), norm - norm_error);
    rounding = (n + 3) / 2 + kSmallestNumber / kUnit / c.norm_eps + 6;
  }
  Values y;
  for (std::size_t d = 0; d < x.value.size(); ++d) {
    const double weight = c.norm && !c.norm_weight.empty() ? c.norm_weight[d] : 1.0;
    const double factor = weight * c.out_scale;
    const double out = x.value[d] / norm * factor;
    double given = (x.error[d] + std::abs(x.value[d]) * norm_error / norm) / smallest_norm;
    // Nothing is more than sqrt(W) times as large as the root of its mean square.
    if (c.norm) given = std::min(given, std::sqrt(n) + std::abs(x.value[d]) / norm);
    given *= std::abs(factor);
    y.value.push_back(out);
    y.error.push_back(given + kSafety * (rounding * kUnit * (std::abs(out) + given) +
                                         kSmallestNumber * (1 + std::abs(x.value[d])) *
                                             (1 + std::abs(weight)) * (1 + std::abs(c.out_scale))));
  }
  return y;
}

/// Out and bound of a pair at `out` and `bound`. Where both maps are exactly 0 so is the result.
void combine_maps(const Values& first, const Values& second, const DifferentialRowCombine& c,
                  DType dtype, double* out, double* bound) {
  const Values y = scaled(difference(first, second, c), c);
  for (std::size_t d = 0; d < y.value.size(); ++d) {
    out[d] = y.value[d];
    const bool zero = first.value[d] == 0.0 && second.value[d] == 0.0 && first.error[d] == 0.0 &&
                      second.error[d] == 0.0;
    bound[d] = zero ? 0.0 : y.error[d] + rounding_error(dtype, std::abs(y.value[d]) + y.error[d]);
  }
}

Values map_of(const RowResult& r, int head_dim_qk) {
  Values map{r.out, {}};
  if (r.visible_keys == 0) {
    map.error.assign(r.out.size(), 0.0);
    return map;
  }
  for (int d = 0; d < static_cast<int>(r.out.size()); ++d)
    map.error.push_back(computed_error(r, d, head_dim_qk));
  return map;
}

/// Head of a pair among `heads`.
std::int64_t head_of(HeadPairing pairing, std::int64_t pair, int branch, std::int64_t heads) {
  return pairing == HeadPairing::interleaved ? 2 * pair + branch : pair + branch * heads / 2;
}

DifferentialRowCombine row_combine(const DifferentialCombine& c, std::int64_t token,
                                   std::int64_t pair) {
  DifferentialRowCombine row;
  row.lambda = c.lambda;
  if (c.token_lambda.defined()) set_token_lambda(row, at(c.token_lambda, {token, pair}));
  row.norm = c.norm;
  if (c.norm_weight.defined()) {
    for (std::int64_t d = 0; d < c.norm_weight.shape[0]; ++d)
      row.norm_weight.push_back(at(c.norm_weight, {d}));
  }
  row.norm_eps = c.norm_eps;
  row.out_scale = c.out_scale;
  return row;
}

/// One request's keys and values.
struct Request {
  const DifferentialAttentionArgs& args;
  std::int64_t index;

  bool paged() const noexcept { return args.block_table.defined(); }
  bool is_v2() const noexcept { return args.variant == DifferentialVariant::v2; }
  std::int64_t first_token() const { return int_at(args.query_start_loc, {index}); }
  std::int64_t query_len() const {
    return int_at(args.query_start_loc, {index + 1}) - first_token();
  }
  std::int64_t first_row() const { return int_at(args.cu_seqlens_kv, {index}); }
  std::int64_t num_keys() const {
    if (paged()) return int_at(args.seq_lens, {index});
    return int_at(args.cu_seqlens_kv, {index + 1}) - first_row();
  }
  /// Rows of k or v that queries may see, of the head that is `branch` of a pair; variant v2: of
  /// head `pair`.
  Rows read(const ConstTensorView& t, const ConstTensorView& scale, std::int64_t pair,
            int branch) const {
    const std::int64_t heads = t.shape[t.rank - 2] * (paged() && !is_v2() ? 2 : 1);
    const std::int64_t head = is_v2() ? pair : head_of(args.pairing, pair, branch, heads);
    const double factor = descale(scale, index, head);
    const std::int64_t block_size = t.shape[t.rank - 3];
    Rows rows;
    rows.dim = static_cast<int>(t.shape[t.rank - 1]);
    const std::int64_t first = first_visible_key(args.params, num_keys(), query_len());
    rows.skip(first);
    for (std::int64_t j = first; j < num_keys(); ++j) {
      std::int64_t offset = 0;
      if (!paged()) {
        offset = offset_of(t, {first_row() + j, head});
      } else {
        const std::int64_t block = int_at(args.block_table, {index, j / block_size});
        offset = is_v2() ? offset_of(t, {block, j % block_size, head})
                         : offset_of(t, {branch, block, j % block_size, pair});
      }
      rows.append(t, offset, factor);
    }
    return rows;
  }
};

/// Both maps of a query pair, whose kv pair (variant v2: kv head) is `kv`.
class Pairs {
 public:
  Pairs(const Request& request, std::int64_t kv) : request_(request), kv_(kv) {
    const DifferentialAttentionArgs& a = request.args;
    for (int b = 0; b < (request.is_v2() ? 1 : 2); ++b) {
      k_.push_back(request.read(a.k, a.k_descale, kv, b));
      v_.push_back(request.read(a.v, a.v_descale, kv, b));
    }
  }

  /// Map of a query head. `i`: token of the request.
  RowResult map(std::int64_t i, std::int64_t head, int branch) const {
    const DifferentialAttentionArgs& a = request_.args;
    const int dim = static_cast<int>(a.q.shape[2]);
    const std::int64_t parts = static_cast<std::int64_t>(v_.size());
    RowProblem p = row_problem(a.params, dim, dim * static_cast<int>(parts), request_.num_keys());
    p.position = i + p.num_keys - request_.query_len();
    p.alibi_slope = alibi_slope(a.params, request_.index, head);
    p.sink = sink(a.params, head);
    const std::int64_t kv_heads = a.k.shape[a.k.rank - 2] * (request_.paged() ? parts : 1);
    const double factor =
        descale(a.q_descale, request_.index,
                request_.is_v2() ? kv_ : head_of(a.pairing, kv_, branch, kv_heads));
    const auto q = [&](int d) { return factor * at(a.q, {request_.first_token() + i, head, d}); };
    const auto v = [&](std::int64_t j, int d) {
      return v_[static_cast<std::size_t>(d / dim)](j, d % dim);
    };
    return row(p, q, k_[k_.size() == 1 ? 0 : static_cast<std::size_t>(branch)], v);
  }

 private:
  const Request& request_;
  std::int64_t kv_;
  std::vector<Rows> k_, v_;
};

}  // namespace

void set_token_lambda(DifferentialRowCombine& combine, double element) noexcept {
  combine.lambda = 1.0 / (1.0 + std::exp(-element));
  combine.lambda_error =
      combine.lambda * (kSigmoidError + 2 * kUnit * std::abs(element)) + kSigmoidEnd;
}

DifferentialRow differential_row(const RowProblem& first, const RowProblem& second,
                                 const DifferentialRowCombine& combine, DType out_dtype) {
  const std::array<const RowProblem*, 2> problems{&first, &second};
  std::array<Values, 2> maps;
  DifferentialRow result;
  for (std::size_t b = 0; b < 2; ++b) {
    const RowResult r = attention_row(*problems[b]);
    maps[b] = map_of(r, problems[b]->head_dim_qk);
    result.lse[b] = r.lse;
    result.lse_bound[b] = lse_error_bound(r, problems[b]->head_dim_qk);
  }
  result.out.resize(maps[0].value.size());
  result.out_bound.resize(result.out.size());
  combine_maps(maps[0], maps[1], combine, out_dtype, result.out.data(), result.out_bound.data());
  return result;
}

Result differential_attention(const DifferentialAttentionArgs& a) {
  const std::int64_t tokens = a.q.shape[0], q_heads = a.q.shape[1];
  const int dim = static_cast<int>(a.q.shape[2]);
  const bool v2 = a.variant == DifferentialVariant::v2;
  const std::int64_t stored = a.k.shape[a.k.rank - 2];
  const std::int64_t kv_pairs = v2 || a.block_table.defined() ? stored : stored / 2;
  const std::int64_t q_pairs = q_heads / 2;
  const auto width = static_cast<std::size_t>(v2 ? dim : 2 * dim);
  const bool maps = a.maps.defined();
  Result result;
  result.out.resize(static_cast<std::size_t>(tokens * (maps ? q_heads : q_pairs)) * width);
  result.lse.resize(static_cast<std::size_t>(tokens * q_heads));
  result.out_bound.resize(result.out.size());
  result.lse_bound.resize(result.lse.size());

  for (std::int64_t index = 0; index + 1 < a.query_start_loc.shape[0]; ++index) {
    const Request request{a, index};
    if (request.query_len() == 0) continue;
    for (std::int64_t kv = 0; kv < kv_pairs; ++kv) {
      const Pairs pairs(request, kv);
      const std::int64_t group = q_pairs / kv_pairs;
      for (std::int64_t n = 0; n < request.query_len() * group; ++n) {
        const std::int64_t i = n / group, token = request.first_token() + i;
        const std::int64_t pair = kv * group + n % group;
        std::array<Values, 2> map;
        for (int b = 0; b < 2; ++b) {
          const std::int64_t head =
              head_of(v2 ? HeadPairing::interleaved : a.pairing, pair, b, q_heads);
          const RowResult r = pairs.map(i, head, b);
          const auto at_row = static_cast<std::size_t>(token * q_heads + head);
          result.lse[at_row] = r.lse;
          result.lse_bound[at_row] = lse_error_bound(r, dim);
          map[static_cast<std::size_t>(b)] = map_of(r, dim);
          for (std::size_t d = 0; d < width && maps; ++d) {
            result.out[at_row * width + d] = r.out[d];
            result.out_bound[at_row * width + d] =
                out_error_bound(r, static_cast<int>(d), dim, DType::f32);
          }
        }
        if (maps) continue;
        const auto at_out = static_cast<std::size_t>(token * q_pairs + pair) * width;
        combine_maps(map[0], map[1], row_combine(a.combine, token, pair), a.out.dtype,
                     &result.out[at_out], &result.out_bound[at_out]);
      }
    }
  }
  return result;
}

Result differential_combine(const DifferentialCombineArgs& a) {
  const std::int64_t tokens = a.maps.shape[0], heads = a.maps.shape[1];
  const std::int64_t width = a.maps.shape[2];
  const bool v2 = a.variant == DifferentialVariant::v2;
  Result result;
  result.out.resize(static_cast<std::size_t>(tokens * heads / 2 * width));
  result.out_bound.resize(result.out.size());
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t pair = 0; pair < heads / 2; ++pair) {
      std::array<Values, 2> map;
      for (int b = 0; b < 2; ++b) {
        const std::int64_t head =
            head_of(v2 ? HeadPairing::interleaved : a.pairing, pair, b, heads);
        Values& m = map[static_cast<std::size_t>(b)];
        for (std::int64_t d = 0; d < width; ++d) m.value.push_back(at(a.maps, {token, head, d}));
        m.error.assign(m.value.size(), 0.0);
      }
      const auto at_out = static_cast<std::size_t>((token * heads / 2 + pair) * width);
      combine_maps(map[0], map[1], row_combine(a.combine, token, pair), a.out.dtype,
                   &result.out[at_out], &result.out_bound[at_out]);
    }
  }
  return result;
}

}  // namespace attend::oracle
