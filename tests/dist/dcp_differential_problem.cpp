// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp_differential_problem.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "attend/ops/cache.h"

namespace attend::testing {
namespace {

constexpr double kMapUnit = 0x1p-24;
constexpr float kLambda = 0.63F, kOutScale = 0.4F, kEps = 1e-5F;

DcpShape shape_of_maps(const DcpDifferentialShape& s) {
  DcpShape maps = s.base;
  maps.dtype = DType::f32;
  maps.kv_heads = s.base.heads();
  maps.dim_v = (s.variant == DifferentialVariant::v1 ? 2 : 1) * s.base.dim;
  return maps;
}

void copy_head(const TensorView& to, std::int64_t to_head, const TensorView& from,
               std::int64_t from_head) {
  const std::size_t bytes = static_cast<std::size_t>(from.shape[2]) * size_of(from.dtype);
  for (std::int64_t t = 0; t < from.shape[0]; ++t)
    std::memcpy(to.select(0, t).select(0, to_head).data,
                from.select(0, t).select(0, from_head).data, bytes);
}

/// Columns [column, column + D) of head `to_head`, float32, from a head of any type.
void widen_head(const TensorView& to, std::int64_t to_head, std::int64_t column,
                const TensorView& from, std::int64_t from_head) {
  for (std::int64_t t = 0; t < from.shape[0]; ++t) {
    float* row = to.select(0, t).select(0, to_head).as<float>() + column;
    for (std::int64_t d = 0; d < from.shape[2]; ++d)
      row[d] = static_cast<float>(get(from, {t, from_head, d}));
  }
}

/// Rows of a request's new tokens.
void copy_new(const DcpProblem& p, const TensorView& to, const TensorView& from) {
  for (std::size_t r = 0; r < p.shape.query_lens.size(); ++r) {
    const std::int64_t token = p.query_start_loc.as<std::int32_t>()[r];
    const std::int64_t key = p.cu_seqlens_kv.as<std::int32_t>()[r] + p.shape.context_lens[r];
    const TensorView rows = from.slice(0, key, p.shape.query_lens[r]);
    if (rows.numel() == 0) continue;
    std::memcpy(to.slice(0, token, 1).data, rows.data,
                static_cast<std::size_t>(rows.numel()) * size_of(rows.dtype));
  }
}

/// Heads of one branch of [S, Hk, D].
TensorView branch_of(const TensorView& t, HeadPairing pairing, int branch) {
  const std::int64_t pairs = t.shape[1] / 2;
  if (pairing == HeadPairing::halves) return t.slice(1, branch * pairs, pairs);
  TensorView r = t.slice(1, branch, pairs);
  r.strides[1] *= 2;
  return r;
}

}  // namespace

DcpDifferentialProblem::DcpDifferentialProblem(const DcpDifferentialShape& s, Rng& rng)
    : shape(s),
      maps(shape_of_maps(s), rng),
      q(s.base.dtype, {maps.tokens, s.base.heads(), s.base.dim}),
      k(s.base.dtype, {maps.keys, s.base.kv_heads, s.base.dim}),
      v(s.base.dtype, {maps.keys, s.base.kv_heads, s.base.dim}),
      k_new(s.base.dtype, {maps.tokens, s.base.kv_heads, s.base.dim}),
      v_new(s.base.dtype, {maps.tokens, s.base.kv_heads, s.base.dim}),
      token_lambda(DType::f32, {maps.tokens, s.base.heads() / 2}),
      norm_weight(DType::f32, {2 * s.base.dim}),
      out(s.base.dtype, {maps.tokens, is_v1() ? s.base.heads() : s.base.heads() / 2, s.base.dim}),
      whole_out(s.base.dtype, std::span(out.view().shape.data(), 3)),
      whole_lse(DType::f32, {maps.tokens, s.base.heads()}) {
  q.fill_normal(rng, 1.5F);
  k.fill_normal(rng);
  v.fill_normal(rng);
  token_lambda.fill_normal(rng);
  norm_weight.fill_uniform(rng, 0.5F, 1.5F);
  copy_new(maps, k_new, k);
  copy_new(maps, v_new, v);
  spread_queries();
  fill_maps();
  fill_caches();
}

int DcpDifferentialProblem::head_of(int pair, int map, int heads) const {
  return shape.pairing == HeadPairing::interleaved ? 2 * pair + map : pair + map * heads / 2;
}

int DcpDifferentialProblem::head_of_rank(int pair, int map) const {
  return head_of(pair, map, shape.base.heads_a_rank);
}

void DcpDifferentialProblem::spread_queries() {
  const int pairs = shape.base.heads_a_rank / 2;
  for (int rank = 0; rank < shape.base.layout.world_size; ++rank) {
    const std::array<std::int64_t, 3> dims{maps.tokens, 2 * pairs, shape.base.dim};
    q_rank.emplace_back(shape.base.dtype, dims);
    lse.emplace_back(DType::f32, std::span(dims.data(), 2));
    for (int pair = 0; pair < pairs; ++pair)
      for (int map = 0; map < 2; ++map)
        copy_head(q_rank.back(), head_of_rank(pair, map), q,
                  head_of(rank * pairs + pair, map, heads()));
  }
}

void DcpDifferentialProblem::fill_maps() {
  const int kv_heads = shape.base.kv_heads, dim = shape.base.dim;
  const int group = heads() / 2 / (is_v1() ? kv_heads / 2 : kv_heads);
  for (int pair = 0; pair < heads() / 2; ++pair) {
    for (int map = 0; map < 2; ++map) {
      const int head = 2 * pair + map, kv = pair / group;
      widen_head(maps.q, head, 0, q, head_of(pair, map, heads()));
      widen_head(maps.k, head, 0, k, is_v1() ? head_of(kv, map, kv_heads) : kv);
      if (!is_v1()) widen_head(maps.v, head, 0, v, kv);
      for (int half = 0; is_v1() && half < 2; ++half)
        widen_head(maps.v, head, half * dim, v, head_of(kv, half, kv_heads));
    }
  }
}

void DcpDifferentialProblem::fill_caches() {
  const DcpShape& s = shape.base;
  const int branches = is_v1() ? 2 : 1;
  const std::int64_t blocks = maps.k_cache[0].view().shape[0];
  HostTensor positions(DType::i64, {maps.keys});
  HostTensor slots(DType::i64, {maps.keys});
  for (std::size_t r = 0; r < s.query_lens.size(); ++r) {
    const std::int32_t first = maps.cu_seqlens_kv.as<std::int32_t>()[r];
    for (std::int32_t i = first; i < maps.cu_seqlens_kv.as<std::int32_t>()[r + 1]; ++i)
      positions.as<std::int64_t>()[static_cast<std::size_t>(i)] = i - first;
  }
  for (int rank = 0; rank < s.layout.world_size; ++rank) {
    const std::array<std::int64_t, 5> dims{branches, blocks, s.block_size, s.kv_heads / branches,
                                           s.dim};
    for (auto* cache : {&k_cache, &v_cache})
      cache->emplace_back(s.dtype, std::span(dims)).fill_bytes(0xFF);  // NaN in every type
    dcp_slot_mapping({.positions = positions,
                      .query_start_loc = maps.cu_seqlens_kv,
                      .block_table = maps.block_table,
                      .block_size = s.block_size,
                      .layout = s.layout,
                      .rank = rank,
                      .slot_mapping = slots});
    for (int b = 0; b < branches; ++b)
      reshape_and_cache_flash({.key = is_v1() ? branch_of(k, shape.pairing, b) : k.view(),
                               .value = is_v1() ? branch_of(v, shape.pairing, b) : v.view(),
                               .key_cache = k_cache.back().view().select(0, b),
                               .value_cache = v_cache.back().view().select(0, b),
                               .slot_mapping = slots});
  }
}

DifferentialAttentionArgs DcpDifferentialProblem::whole() const {
  DifferentialAttentionArgs a;
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = whole_out;
  a.lse = whole_lse;
  a.query_start_loc = maps.query_start_loc;
  a.cu_seqlens_kv = maps.cu_seqlens_kv;
  a.variant = shape.variant;
  a.pairing = shape.pairing;
  a.combine = args(0).combine;
  if (!is_v1()) a.combine.token_lambda = token_lambda;
  a.params.causal = shape.base.causal;
  a.params.softcap = shape.base.softcap;
  return a;
}

DcpDifferentialAttentionArgs DcpDifferentialProblem::args(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  const std::int64_t pairs = shape.base.heads_a_rank / 2;
  const std::int64_t out_heads = is_v1() ? 2 * pairs : pairs;
  DcpDifferentialAttentionArgs a;
  a.q = q_rank[r];
  a.k_cache = is_v1() ? k_cache[r].view() : k_cache[r].view().select(0, 0);
  a.v_cache = is_v1() ? v_cache[r].view() : v_cache[r].view().select(0, 0);
  a.k_new = k_new;
  a.v_new = v_new;
  a.out = out.view().slice(1, rank * out_heads, out_heads);
  a.lse = lse[r];
  a.query_start_loc = maps.query_start_loc;
  a.seq_lens = maps.seq_lens;
  a.block_table = maps.block_table;
  a.request_causal = shape.base.request_causal;
  a.interleave = shape.base.layout.interleave;
  a.variant = shape.variant;
  a.pairing = shape.pairing;
  if (is_v1()) {
    a.combine.lambda = kLambda;
    if (shape.norm) a.combine.norm_weight = norm_weight;
  } else {
    a.combine.token_lambda = token_lambda.view().slice(1, rank * pairs, pairs);
  }
  a.combine.norm = is_v1() && shape.norm;
  a.combine.norm_eps = kEps;
  a.combine.out_scale = kOutScale;
  a.params.causal = shape.base.causal;
  a.params.softcap = shape.base.softcap;
  return a;
}

void DcpDifferentialProblem::run(DcpCombine exchange, int threads) {
  out.fill_bytes(0xFF);
  for (HostTensor& t : lse) t.fill_bytes(0xFF);
  run_in_process(shape.base.layout.world_size, [&](Communicator& c) {
    const auto pool = make_thread_pool(threads);
    DcpDifferentialAttentionArgs a = args(c.rank());
    a.exchange = exchange;
    dcp_differential_attention(a, c, pool.get());
  });
}

namespace {

double root_mean_square(const std::vector<double>& values, double eps) {
  double squares = 0.0;
  for (const double value : values) squares += value * value;
  return std::sqrt(squares / static_cast<double>(values.size()) + eps);
}

/// Adds the rows of a pair, from those of its maps that `first` and `second` are the index of.
void append_pair(const DcpDifferentialProblem& p, const oracle::Result& maps, std::size_t first,
                 double lambda, oracle::Result& result) {
  const auto width = static_cast<std::size_t>(p.width());
  const double type_unit = p.out.view().dtype == DType::f32   ? kMapUnit
                           : p.out.view().dtype == DType::f16 ? 0x1p-11
                                                              : 0x1p-8;
  std::vector<double> x, error;
  for (std::size_t d = 0; d < width; ++d) {
    const std::size_t one = first * width + d, two = one + width;
    x.push_back(maps.out[one] - lambda * maps.out[two]);
    const double sizes = std::abs(maps.out[one]) + lambda * std::abs(maps.out[two]);
    // The kernels' sigmoid is right to 2^-20.
    const double of_lambda = p.is_v1() ? 0.0 : 0x1p-20 * sizes;
    error.push_back(maps.out_bound[one] + lambda * maps.out_bound[two] + of_lambda +
                    3 * kMapUnit * sizes);
  }
  const bool norm = p.is_v1() && p.shape.norm;
  const double rms = norm ? root_mean_square(x, kEps) : 1.0;
  const double rms_error = norm ? root_mean_square(error, 0.0) : 0.0;
  const double least = std::max(rms - rms_error, norm ? std::sqrt(double{kEps}) : 1.0);
  for (std::size_t d = 0; d < width; ++d) {
    const double weight = norm ? p.norm_weight.as<float>()[d] : 1.0;
    const double factor = weight * kOutScale;
    const double out = x[d] / rms * factor;
    const double given = (error[d] + std::abs(x[d]) * rms_error / rms) / least * factor;
    const double rounded = (static_cast<double>(width) + 12) * kMapUnit * (std::abs(out) + given);
    result.out.push_back(out);
    result.out_bound.push_back(given + rounded +
                               1.01 * (type_unit * (std::abs(out) + given) + 0x1p-25));
  }
}

}  // namespace

oracle::Result expected(const DcpDifferentialProblem& p) {
  const oracle::Result maps = expected(p.maps);
  oracle::Result result;
  result.lse = maps.lse;
  result.lse_bound = maps.lse_bound;
  for (std::int64_t t = 0; t < p.maps.tokens; ++t) {
    for (int pair = 0; pair < p.heads() / 2; ++pair) {
      const double lambda =
          p.is_v1() ? kLambda : 1.0 / (1.0 + std::exp(-get(p.token_lambda.view(), {t, pair})));
      append_pair(p, maps, static_cast<std::size_t>(t * p.heads() + 2 * pair), lambda, result);
    }
  }
  return result;
}

}  // namespace attend::testing
