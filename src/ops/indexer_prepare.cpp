// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cmath>
#include <numeric>
#include <span>

#include "attend/core/float_types.h"
#include "attend/ops/indexer.h"
#include "core/check.h"
#include "ops/indexer_encode.h"
#include "ops/mla_rows.h"
#include "ops/rotary.h"

namespace attend {
namespace {

using indexer_cache::kDim;

constexpr std::string_view kOp = "prepare_indexer";
constexpr std::int64_t kRope = 64;
constexpr float kSmallestAmax = 1e-10F;

/// The arguments, checked, with q as [T', H, 128].
struct Inputs {
  const PrepareIndexerArgs& a;
  ConstTensorView q;
  std::span<const std::int64_t> positions;
  ops::RotaryTables tables;
  float softmax_scale = 0.0F, head_scale = 0.0F;

  std::int64_t heads() const noexcept { return q.shape[1]; }
};

ConstTensorView heads_of(const ConstTensorView& q) {
  const check::Where where{kOp, "q"};
  check::tensor(where, q, q.rank == 2 ? 2 : 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride(where, q);
  check::require(q.rank == 3 ? q.shape[2] == kDim : q.shape[1] % kDim == 0, where,
                 "heads of 128 elements", [&] { return describe(q); });
  ConstTensorView heads = q;
  if (q.rank == 2) {
    heads = {q.data, q.dtype, {q.shape[0], q.shape[1] / kDim, kDim}};
    heads.strides[0] = q.strides[0];
  }
  check::require(heads.shape[1] >= 1, where, "at least 1 head", [&] { return describe(q); });
  return heads;
}

/// At least `rows` rows.
void require_rows(check::Where where, const ConstTensorView& t, std::int64_t rows) {
  check::require(
      t.shape[0] >= rows, where, [&] { return fmt::format("{} rows, one a position", rows); },
      [&] { return describe(t); });
}

std::span<const std::int64_t> checked_positions(const PrepareIndexerArgs& a) {
  const check::Where tables{kOp, "cos_sin_cache"}, where{kOp, "positions"};
  check::tensor(tables, a.cos_sin_cache, 2, {a.q.dtype, DType::f32});
  check::shape(tables, a.cos_sin_cache, {-1, kRope});
  check::unit_last_stride(tables, a.cos_sin_cache);
  const auto positions = check::i64_array(where, a.positions, -1);
  const std::int64_t most = a.cos_sin_cache.shape[0];
  for (std::size_t t = 0; t < positions.size(); ++t) {
    check::require(
        positions[t] >= 0 && positions[t] < most, where,
        [&] { return fmt::format("positions in [0, {}), the rows of cos_sin_cache", most); },
        [&] { return fmt::format("{} at index {}", positions[t], t); });
  }
  return positions;
}

void check_inputs(const Inputs& in) {
  const PrepareIndexerArgs& a = in.a;
  const auto rows = static_cast<std::int64_t>(in.positions.size());
  require_rows({kOp, "q"}, in.q, rows);
  check::tensor({kOp, "k"}, a.k, 2, {a.q.dtype});
  check::shape({kOp, "k"}, a.k, {-1, kDim});
  check::unit_last_stride({kOp, "k"}, a.k);
  require_rows({kOp, "k"}, a.k, rows);
  check::tensor({kOp, "weights"}, a.weights, 2, {a.q.dtype, DType::f32});
  check::shape({kOp, "weights"}, a.weights, {-1, in.heads()});
  check::unit_last_stride({kOp, "weights"}, a.weights);
  require_rows({kOp, "weights"}, a.weights, rows);
  for (const auto& [name, t] :
       {std::pair{"k_norm_weight", a.k_norm_weight}, {"k_norm_bias", a.k_norm_bias}}) {
    check::tensor({kOp, name}, t, 1, {DType::f32});
    check::shape({kOp, name}, t, {kDim});
    check::contiguous({kOp, name}, t);
  }
  check::require(std::isfinite(a.k_norm_eps) && a.k_norm_eps > 0.0F, {kOp, "k_norm_eps"},
                 "a finite value > 0", a.k_norm_eps);
  check::require(a.q_scale_fmt == IndexerScale::unrounded || a.q_scale_fmt == IndexerScale::ue8m0,
                 {kOp, "q_scale_fmt"}, "unrounded or ue8m0", static_cast<int>(a.q_scale_fmt));
  check::require(std::isfinite(in.softmax_scale), {kOp, "softmax_scale"}, "a finite value",
                 in.softmax_scale);
}

void check_results(const Inputs& in) {
  const PrepareIndexerArgs& a = in.a;
  const auto rows = static_cast<std::int64_t>(in.positions.size());
  const check::Where codes{kOp, "q_codes"}, weights{kOp, "weights_out"}, keys{kOp, "k_out"};
  check::tensor(codes, a.q_codes, 3, {DType::fp8_e4m3});
  check::shape(codes, a.q_codes, {-1, in.heads(), kDim});
  check::tensor(weights, a.weights_out, 2, {DType::f32});
  check::shape(weights, a.weights_out, {-1, in.heads()});
  check::tensor(keys, a.k_out, 2, {a.q.dtype});
  check::shape(keys, a.k_out, {-1, kDim});
  for (const auto& [where, t] :
       {std::pair{codes, a.q_codes}, {weights, a.weights_out}, {keys, a.k_out}}) {
    check::unit_last_stride(where, t);
    check::distinct_elements(where, t);
    require_rows(where, t, rows);
    for (const auto& [name, input] : {std::pair<const char*, ConstTensorView>{"q", a.q},
                                      {"k", a.k},
                                      {"weights", a.weights},
                                      {"positions", a.positions},
                                      {"cos_sin_cache", a.cos_sin_cache},
                                      {"k_norm_weight", a.k_norm_weight},
                                      {"k_norm_bias", a.k_norm_bias}}) {
      const bool in_place = where.argument == keys.argument && check::same_view(input, t);
      if (!in_place) check::no_overlap(where, t, name, input);
    }
  }
  check::no_overlap(codes, a.q_codes, "weights_out", a.weights_out);
  check::no_overlap(codes, a.q_codes, "k_out", a.k_out);
  check::no_overlap(weights, a.weights_out, "k_out", a.k_out);
}

/// Each stage adds and subtracts elements 1, 2, 4 .. 64 apart.
template <typename T>
void transform(T* row) noexcept {
  constexpr float kScale = 0.088388347648318447F;  // 128^-0.5
  std::array<float, kDim> x;
  for (std::size_t i = 0; i < kDim; ++i) x[i] = to_f32(row[i]);
  for (std::size_t apart = 1; apart < kDim; apart *= 2) {
    for (std::size_t begin = 0; begin < kDim; begin += 2 * apart) {
      for (std::size_t i = begin; i < begin + apart; ++i) {
        const float a = x[i], b = x[i + apart];
        x[i] = a + b;
        x[i + apart] = a - b;
      }
    }
  }
  for (std::size_t i = 0; i < kDim; ++i) row[i] = from_f32<T>(x[i] * kScale);
}

template <typename T>
void normalise(const Inputs& in, const T* from, T* to) noexcept {
  double sum = 0.0, squares = 0.0;
  for (std::int64_t i = 0; i < kDim; ++i) sum += to_f32(from[i]);
  const double mean = sum / kDim;
  for (std::int64_t i = 0; i < kDim; ++i) {
    const double x = to_f32(from[i]) - mean;
    squares += x * x;
  }
  const double factor = 1.0 / std::sqrt(squares / kDim + in.a.k_norm_eps);
  const float* weight = in.a.k_norm_weight.as<float>();
  const float* bias = in.a.k_norm_bias.as<float>();
  for (std::int64_t i = 0; i < kDim; ++i) {
    const double x = (to_f32(from[i]) - mean) * factor * weight[i] + bias[i];
    to[i] = from_f32<T>(static_cast<float>(x));
  }
}

float weight_at(const ConstTensorView& weights, std::int64_t t, std::int64_t h) noexcept {
  const std::int64_t at = t * weights.strides[0] + h;
  if (weights.dtype == DType::f32) return weights.as<float>()[at];
  return weights.dtype == DType::f16 ? to_f32(weights.as<f16>()[at])
                                     : to_f32(weights.as<bf16>()[at]);
}

template <typename T>
void prepare_token(const Inputs& in, std::int64_t t) noexcept {
  const PrepareIndexerArgs& a = in.a;
  const std::int64_t position = in.positions[static_cast<std::size_t>(t)];
  std::array<T, kDim> row;
  const auto rotate = [&](const T* from) {
    ops::rotate_row(in.tables, position, from, row.data(), kDim, a.q.dtype);
    if (a.hadamard) transform(row.data());
  };
  for (std::int64_t h = 0; h < in.heads(); ++h) {
    rotate(in.q.template as<T>() + t * in.q.strides[0] + h * in.q.strides[1]);
    auto* codes =
        a.q_codes.as<std::uint8_t>() + t * a.q_codes.strides[0] + h * a.q_codes.strides[1];
    const float scale = ops::encode_indexer_row(row.data(), {a.q_scale_fmt, kSmallestAmax}, codes);
    a.weights_out.as<float>()[t * a.weights_out.strides[0] + h] =
        weight_at(a.weights, t, h) * scale * in.softmax_scale * in.head_scale;
  }
  std::array<T, kDim> key;
  normalise(in, a.k.as<T>() + t * a.k.strides[0], key.data());
  rotate(key.data());
  std::copy(row.begin(), row.end(), a.k_out.as<T>() + t * a.k_out.strides[0]);
}

template <typename T>
void prepare_all(const Inputs& in, Executor* executor) {
  const auto tokens = static_cast<std::int64_t>(in.positions.size());
  const bool small = tokens * (in.heads() + 1) * kDim < mla_rows::kParallelElements;
  mla_rows::run(small, executor, [&](int worker, int workers) {
    for (std::int64_t t = tokens * worker / workers; t < tokens * (worker + 1) / workers; ++t)
      prepare_token<T>(in, t);
  });
}

}  // namespace

void prepare_indexer(const PrepareIndexerArgs& a, Executor* executor) {
  const ConstTensorView q = heads_of(a.q);
  const auto positions = checked_positions(a);
  const ops::RotaryTables tables{a.cos_sin_cache.slice(1, 0, kRope / 2),
                                 a.cos_sin_cache.slice(1, kRope / 2, kRope / 2), !a.is_neox};
  const Inputs in{a,
                  q,
                  positions,
                  tables,
                  a.softmax_scale.value_or(static_cast<float>(1.0 / std::sqrt(double{kDim}))),
                  static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.shape[1])))};
  check_inputs(in);
  check_results(in);
  switch (a.q.dtype) {
    case DType::f32:
      return prepare_all<float>(in, executor);
    case DType::f16:
      return prepare_all<f16>(in, executor);
    default:
      return prepare_all<bf16>(in, executor);
  }
}

std::int64_t indexer_short_rows(const IndexerShortRowsArgs& a, Executor* executor) {
  constexpr std::string_view kRowsOp = "indexer_short_rows";
  const check::Where result{kRowsOp, "out"};
  check::tensor(result, a.out, 2, {DType::i32});
  check::require(a.out.shape[1] >= 1, result, "k of at least 1", [&] { return describe(a.out); });
  check::unit_last_stride(result, a.out);
  check::distinct_elements(result, a.out);
  const auto lengths = check::i32_array({kRowsOp, "lengths"}, a.lengths, a.out.shape[0]);
  check::no_overlap(result, a.out, "lengths", a.lengths);
  const std::int64_t rows = a.out.shape[0], k = a.out.shape[1];
  mla_rows::run(rows * k < mla_rows::kParallelElements, executor, [&](int worker, int workers) {
    for (std::int64_t t = rows * worker / workers; t < rows * (worker + 1) / workers; ++t) {
      const std::int64_t length = std::max<std::int64_t>(lengths[static_cast<std::size_t>(t)], 0);
      if (length > k) continue;
      std::int32_t* row = a.out.as<std::int32_t>() + t * a.out.strides[0];
      std::iota(row, row + length, 0);
      std::fill(row + length, row + k, -1);
    }
  });
  return std::count_if(lengths.begin(), lengths.end(),
                       [&](std::int32_t length) { return length > k; });
}

}  // namespace attend
