// SPDX-License-Identifier: Apache-2.0
// Differential attention, beside what it is made of elsewhere: four calls of plain attention.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/core/workspace.h"
#include "attend/ops/differential.h"
#include "attend/oracle/differential.h"
#include "bench/batch.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr float kLambda = 0.5F, kOutScale = 0.2F;

struct DifferentialShape {
  std::vector<Request> requests;
  Heads heads;
  DType kv_dtype = DType::bf16;
  int block_size = 32;  ///< blocks [Hkv / 2, block_size, D] of each branch; 0 = ragged
};

/// Plain attention, planned.
struct PlainCall {
  FlashAttnVarlenArgs args;
  AttentionPlan plan;
  Buffer workspace;
  void run(Executor& executor) const {
    flash_attn_varlen(args, plan, workspace.workspace(), executor);
  }
};

/// Every second head of [T, H, *], from `first` on.
TensorView every_second(const TensorView& t, std::int64_t first) {
  TensorView r = t.slice(1, first, t.shape[1] / 2);
  r.strides[1] *= 2;
  return r;
}

/// A layer of interleaved pairs, queries and results in bf16.
class DifferentialProblem : public Problem {
 public:
  DifferentialProblem(DifferentialShape shape, Bound bound, Executor& executor)
      : s_(std::move(shape)),
        bound_(bound),
        batch_(make_batch(s_.requests, s_.block_size)),
        executor_(executor),
        tokens_(batch_.query_start.back()),
        q_(rows_bytes(1)),
        out_(rows_bytes(1)),
        four_out_(rows_bytes(1)),
        maps_(rows_bytes(2)),
        norm_weight_(static_cast<std::size_t>(2 * s_.heads.dim) * sizeof(float)),
        k_(static_cast<std::size_t>(kv_count()) * size_of(s_.kv_dtype), {.executor = &executor}),
        v_(k_.size(), {.executor = &executor}) {
    fill();
    prepare_fused();
    for (int i = 0; i < 4; ++i) four_calls_[static_cast<std::size_t>(i)] = part_call(i / 2, i % 2);
    plain_ = plain_call(Arithmetic::automatic);
    exact_ = plain_call(Arithmetic::exact);
  }

  void run() override { differential_attention(args_, plan_, workspace_.workspace(), executor_); }
  double flops() const override { return 3 * product_flops(); }
  double bytes() const override {
    return 2.0 * static_cast<double>(batch_.visible_keys(-1, 0, batch_.num_reqs())) * s_.heads.kv *
           s_.heads.dim * static_cast<double>(size_of(s_.kv_dtype));
  }
  std::vector<Part> parts() override {
    const auto plain = [this](std::string_view name, const PlainCall& call, Ratio ratio) {
      return Part{
          name, bound_, 2 * product_flops(), bytes(), [this, &call] { call.run(executor_); },
          ratio};
    };
    return {{"four calls",
             bound_,
             4 * product_flops(),
             2 * bytes(),
             [this] { run_four_calls(); },
             {"speedup_over_four_calls"}},
            plain("plain", plain_, {"time_over_plain", true}),
            plain("plain, exact", exact_, {"time_over_plain_exact", true})};
  }
  std::string verify() const override {
    for (const Row& row : sample_rows(batch_, s_.heads.query)) {
      std::string wrong = verify_row(row);
      if (!wrong.empty()) return wrong;
    }
    return verify_four_calls();
  }

 private:
  /// Of [T, H, factor * D] in bf16.
  std::size_t rows_bytes(std::int64_t factor) const {
    return static_cast<std::size_t>(tokens_ * s_.heads.query * s_.heads.dim * factor) *
           sizeof(bf16);
  }
  std::int64_t kv_count() const { return batch_.num_rows * s_.heads.kv * s_.heads.dim; }
  /// One product of D columns of each query head.
  double product_flops() const {
    return 2.0 * batch_.pairs(-1, 0, batch_.num_reqs()) * s_.heads.dim * s_.heads.query;
  }
  bool is_paged() const { return s_.block_size > 0; }

  void fill() {
    const std::int64_t q_count = tokens_ * s_.heads.query * s_.heads.dim;
    fill_random(q_.data(), DType::bf16, {0, q_count}, 1);
    fill_random(norm_weight_.data(), DType::f32, {0, 2 * s_.heads.dim}, 4);
    const int workers = executor_.num_workers();
    executor_.run([&](int worker) {
      const Elements part{kv_count() * worker / workers, kv_count() * (worker + 1) / workers};
      fill_random(k_.data(), s_.kv_dtype, part, 2);
      fill_random(v_.data(), s_.kv_dtype, part, 3);
    });
  }

  TensorView rows(const Buffer& b, int factor = 1) const {
    return {b.data(), DType::bf16, {tokens_, s_.heads.query, factor * s_.heads.dim}};
  }
  /// Keys or values as the op takes them.
  TensorView pairs_view(const CacheMemory& m) const {
    if (!is_paged()) return {m.data(), s_.kv_dtype, {batch_.num_rows, s_.heads.kv, s_.heads.dim}};
    const std::int64_t blocks = batch_.num_rows / s_.block_size;
    const TensorView hnd(m.data(), s_.kv_dtype,
                         {2, blocks, s_.heads.kv / 2, s_.block_size, s_.heads.dim});
    return hnd.permute({0, 1, 3, 2, 4});
  }
  TensorView branch(const CacheMemory& m, int b) const {
    return is_paged() ? pairs_view(m).select(0, b) : every_second(pairs_view(m), b);
  }
  /// The same bytes as an ordinary cache.
  TensorView plain_view(const CacheMemory& m) const {
    if (!is_paged()) return pairs_view(m);
    const std::int64_t blocks = batch_.num_rows / s_.block_size;
    const TensorView hnd(m.data(), s_.kv_dtype, {blocks, s_.heads.kv, s_.block_size, s_.heads.dim});
    return hnd.permute({0, 2, 1, 3});
  }

  void prepare_fused() {
    args_.q = rows(q_);
    args_.k = pairs_view(k_);
    args_.v = pairs_view(v_);
    args_.out = rows(out_);
    if (is_paged()) args_.block_table = batch_.table_view(0, batch_.num_reqs());
    args_.params.causal = true;
    args_.combine.lambda = kLambda;
    args_.combine.norm_weight = {norm_weight_.data(), DType::f32, {2 * s_.heads.dim}};
    args_.combine.out_scale = kOutScale;
    AttentionPlanInput in = plan_input(batch_, s_.heads, executor_);
    differential_plan_shape(in, args_.variant, s_.heads.query, s_.heads.kv, s_.heads.dim);
    plan_ = plan_attention(in);
    workspace_ = Buffer(plan_.workspace_bytes);
  }
  PlainCall planned(FlashAttnVarlenArgs args, const Heads& heads, Arithmetic arithmetic) const {
    if (is_paged()) args.block_table = batch_.table_view(0, batch_.num_reqs());
    args.params.causal = true;
    AttentionPlanInput in = plan_input(batch_, heads, executor_);
    in.arithmetic = arithmetic;
    PlainCall call;
    call.args = args;
    call.plan = plan_attention(in);
    call.workspace = Buffer(call.plan.workspace_bytes);
    return call;
  }
  /// Queries and keys of one map over the values of one branch: half of the columns of the map.
  PlainCall part_call(int map, int half) const {
    FlashAttnVarlenArgs a;
    a.q = every_second(rows(q_), map);
    a.k = branch(k_, map);
    a.v = branch(v_, half);
    a.out = every_second(rows(maps_, 2), map).slice(2, half * s_.heads.dim, s_.heads.dim);
    return planned(a, {s_.heads.query / 2, s_.heads.kv / 2, s_.heads.dim}, Arithmetic::automatic);
  }
  /// As many heads, which are no pairs.
  PlainCall plain_call(Arithmetic arithmetic) const {
    FlashAttnVarlenArgs a;
    a.q = rows(q_);
    a.k = plain_view(k_);
    a.v = plain_view(v_);
    a.out = rows(four_out_);  // read no more when this is timed
    return planned(a, s_.heads, arithmetic);
  }
  /// As seed implementations do: maps are rounded to the type of the queries in between.
  void run_four_calls() const {
    for (const PlainCall& call : four_calls_) call.run(executor_);
    differential_combine({.maps = rows(maps_, 2), .out = rows(four_out_), .combine = args_.combine},
                         &executor_);
  }

  /// The pair that a row's head belongs to.
  std::string verify_row(const Row& row) const {
    const int dim = s_.heads.dim, pair = row.head / 2;
    const int kv_pair = pair / (s_.heads.query / s_.heads.kv);
    const std::int64_t token =
        batch_.query_start[static_cast<std::size_t>(row.request)] + row.token;
    const std::int64_t at = (token * s_.heads.query + 2 * pair) * dim;
    const auto kv_value = [&](const CacheMemory& m, std::int64_t j, int b, int d) {
      return value_at(m.data(), s_.kv_dtype, kv_row(kv_pair, b, batch_.row(row.request, j)) + d);
    };
    std::array<oracle::RowProblem, 2> maps;
    for (int map = 0; map < 2; ++map) {
      oracle::RowProblem& p = maps[static_cast<std::size_t>(map)];
      p = row_problem(batch_, s_.heads, row);
      p.head_dim_v = 2 * dim;
      p.q = [&, map](int d) { return value_at(q_.data(), DType::bf16, at + map * dim + d); };
      p.k = [&, map](std::int64_t j, int d) { return kv_value(k_, j, map, d); };
      p.v = [&](std::int64_t j, int d) { return kv_value(v_, j, d / dim, d % dim); };
    }
    oracle::DifferentialRowCombine c;
    c.lambda = kLambda;
    c.norm_eps = args_.combine.norm_eps;
    c.out_scale = kOutScale;
    for (int d = 0; d < 2 * dim; ++d)
      c.norm_weight.push_back(value_at(norm_weight_.data(), DType::f32, d));
    const oracle::DifferentialRow want = oracle::differential_row(maps[0], maps[1], c, DType::bf16);
    for (int d = 0; d < 2 * dim; ++d) {
      const auto i = static_cast<std::size_t>(d);
      const double got = value_at(out_.data(), DType::bf16, at + d);
      if (!(std::abs(got - want.out[i]) <= want.out_bound[i]))
        return fmt::format("request {} token {} pair {} column {}: expected {} +- {}, got {}",
                           row.request, row.token, pair, d, want.out[i], want.out_bound[i], got);
    }
    return "";
  }
  /// Index of the first element of a row of keys or values.
  std::int64_t kv_row(int kv_pair, int b, std::int64_t row) const {
    std::int64_t at = row * s_.heads.kv + 2 * kv_pair + b;
    if (is_paged()) {
      const std::int64_t block = b * (batch_.num_rows / s_.block_size) + row / s_.block_size;
      at = (block * (s_.heads.kv / 2) + kv_pair) * s_.block_size + row % s_.block_size;
    }
    return at * s_.heads.dim;
  }
  /// What is compared with must be the same layer: off by maps in bf16, 2^-9 of each, and no more.
  std::string verify_four_calls() const {
    constexpr double kMapsRounded = 0.25 * kOutScale;
    run_four_calls();
    for (std::int64_t i = 0; i < tokens_ * s_.heads.query * s_.heads.dim; ++i) {
      const double want = value_at(out_.data(), DType::bf16, i);
      const double got = value_at(four_out_.data(), DType::bf16, i);
      if (!(std::abs(got - want) <= kMapsRounded))
        return fmt::format("four calls, element {}: expected {} +- {}, got {}", i, want,
                           kMapsRounded, got);
    }
    return "";
  }

  DifferentialShape s_;
  Bound bound_;
  Batch batch_;
  Executor& executor_;
  std::int64_t tokens_;
  Buffer q_, out_, four_out_, maps_, norm_weight_;
  CacheMemory k_, v_;
  DifferentialAttentionArgs args_;
  AttentionPlan plan_;
  Buffer workspace_;
  std::array<PlainCall, 4> four_calls_;
  PlainCall plain_, exact_;
};

DifferentialShape decode(Heads heads, DType kv_dtype = DType::bf16) {
  return {requests(4, 1, 16384), heads, kv_dtype};
}

Case differential_case(std::string name, std::string description, Bound bound,
                       DifferentialShape shape) {
  return {std::move(name), std::move(description), bound,
          [bound, shape = std::move(shape)](Executor& executor) {
            return std::make_unique<DifferentialProblem>(shape, bound, executor);
          }};
}

}  // namespace

std::vector<Case> differential_cases() {
  constexpr Heads kD64{40, 20, 64}, kD128{20, 10, 128};
  return {
      differential_case("diff_decode_d64_16k",
                        "differential attention, one token for each of 4 requests of 16384 keys, "
                        "40 query and 20 kv heads of 64, shuffled blocks of 32",
                        Bound::memory, decode(kD64)),
      differential_case("diff_decode_fp8_d64_16k", "the same with fp8_e4m3 keys and values",
                        Bound::memory, decode(kD64, DType::fp8_e4m3)),
      differential_case("diff_decode_d128_16k", "20 query and 10 kv heads of 128", Bound::memory,
                        decode(kD128)),
      differential_case("diff_prefill_d64_4k",
                        "causal prefill of 4096 tokens, 40 query and 20 kv heads of 64",
                        Bound::compute, {requests(1, 4096, 4096), kD64, DType::bf16, 0}),
      differential_case("diff_single_token_128",
                        "one token, 128 keys, 40 query and 20 kv heads of 64: latency",
                        Bound::memory, {requests(1, 1, 128), kD64}),
  };
}

}  // namespace attend::bench
