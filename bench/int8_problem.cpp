// SPDX-License-Identifier: Apache-2.0
#include "bench/int8_problem.h"

#include <utility>

#include "attend/oracle/attention.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

/// Codes are uniform in [-127, 127]: with this scale their variance is 1, that of the other cases.
constexpr float kScale = 1.7320508F / 127.0F;
constexpr int kWeightLevels = 127;

void fill_codes(void* to, Elements part, std::uint64_t seed) {
  auto* codes = static_cast<std::int8_t*>(to);
  for (std::int64_t i = part.begin; i < part.end; ++i)
    codes[i] = static_cast<std::int8_t>(
        static_cast<int>(hash64(seed << 40 | static_cast<std::uint64_t>(i)) % 255) - 127);
}

std::vector<float> scales(std::int64_t count, std::uint64_t seed) {
  std::vector<float> to(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < to.size(); ++i)
    to[i] = kScale * (1.0F + 0.1F * random_value(seed, i));
  return to;
}

double code_at(const auto& b, std::int64_t i) {
  return static_cast<double>(static_cast<const std::int8_t*>(b.data())[i]);
}

}  // namespace

Int8Problem::Int8Problem(Int8Shape shape, Executor& executor)
    : s_(std::move(shape)),
      batch_(make_batch(s_.requests, s_.block_size)),
      executor_(executor),
      q_count_(std::int64_t{batch_.query_start.back()} * s_.heads.query * s_.heads.dim),
      kv_count_(batch_.num_rows * s_.heads.kv * s_.heads.dim),
      q_(static_cast<std::size_t>(q_count_)),
      out_(q_.size() * size_of(DType::bf16)),
      k_(static_cast<std::size_t>(kv_count_), {.executor = &executor}),
      v_(k_.size() * size_of(s_.v_dtype), {.executor = &executor}),
      q_scale_(scales(q_count_ / s_.heads.dim, 4)),
      k_scale_(scales(kv_count_ / s_.heads.dim, 5)) {
  if (s_.v_dtype == DType::i8) v_scale_ = scales(std::int64_t{s_.heads.kv} * s_.heads.dim, 6);
  fill();
  make_args();
  plan_ = plan_attention(plan_input(batch_, s_.heads, executor_));
  workspace_ = Buffer(plan_.workspace_bytes);
}

void Int8Problem::fill() {
  const int workers = executor_.num_workers();
  executor_.run([&](int worker) {
    const auto part = [&](std::int64_t count) {
      return Elements{count * worker / workers, count * (worker + 1) / workers};
    };
    fill_codes(q_.data(), part(q_count_), 1);
    fill_codes(k_.data(), part(kv_count_), 2);
    if (s_.v_dtype == DType::i8) {
      fill_codes(v_.data(), part(kv_count_), 3);
    } else {
      fill_random(v_.data(), s_.v_dtype, part(kv_count_), 3);
    }
  });
}

void Int8Problem::make_args() {
  const std::int64_t tokens = batch_.query_start.back(), d = s_.heads.dim;
  const std::int64_t blocks = batch_.num_rows / s_.block_size;
  args_.q = {q_.data(), DType::i8, {tokens, s_.heads.query, d}};
  args_.q_scale = {q_scale_.data(), DType::f32, {s_.heads.query, tokens}};
  args_.k = {k_.data(), DType::i8, {blocks, s_.heads.kv, s_.block_size, d}};
  args_.k_scale = {k_scale_.data(), DType::f32, {blocks, s_.heads.kv, s_.block_size}};
  args_.v = {v_.data(), s_.v_dtype, {blocks, s_.heads.kv, s_.block_size, d}};
  if (!v_scale_.empty()) args_.v_scale = {v_scale_.data(), DType::f32, {s_.heads.kv, d}};
  args_.out = {out_.data(), DType::bf16, {tokens, s_.heads.query, d}};
  args_.block_table = batch_.table_view(0, batch_.num_reqs());
  args_.params.causal = true;
}

std::string Int8Problem::verify() const {
  for (const Row& row : sample_rows(batch_, s_.heads.query)) {
    std::string wrong = verify_row(row);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::string Int8Problem::verify_row(const Row& row) const {
  const std::int64_t token = batch_.query_start[static_cast<std::size_t>(row.request)] + row.token;
  const std::int64_t query = token * s_.heads.query + row.head, dim = s_.heads.dim;
  const int kv_head = row.head / s_.heads.group();
  const auto slot = [&](std::int64_t j) {
    const std::int64_t key = batch_.row(row.request, j);
    return (key / s_.block_size * s_.heads.kv + kv_head) * s_.block_size + key % s_.block_size;
  };
  const std::int64_t scale_at = row.head * args_.q_scale.strides[0] + token;
  const double q_scale = q_scale_[static_cast<std::size_t>(scale_at)];
  oracle::RowProblem p = row_problem(batch_, s_.heads, row);
  p.q = [&](int d) { return q_scale * code_at(q_, query * dim + d); };
  p.k = [&](std::int64_t j, int d) {
    return k_scale_[static_cast<std::size_t>(slot(j))] * code_at(k_, slot(j) * dim + d);
  };
  if (s_.v_dtype == DType::i8) {
    p.weight_levels = kWeightLevels;
    p.v = [&](std::int64_t j, int d) {
      return v_scale_[static_cast<std::size_t>(kv_head * dim + d)] * code_at(v_, slot(j) * dim + d);
    };
  } else {
    p.v = [&](std::int64_t j, int d) { return value_at(v_.data(), s_.v_dtype, slot(j) * dim + d); };
  }
  const auto* out = static_cast<const bf16*>(out_.data()) + query * dim;
  return compare_row(p, row, out, DType::bf16);
}

}  // namespace attend::bench
