// SPDX-License-Identifier: Apache-2.0
#include "bench/tune.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>

#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"
#include "bench/batch.h"
#include "bench/noise.h"
#include "bench/random_fill.h"
#include "kernels/cpu/attention/attention.h"

namespace attend::bench {
namespace {

constexpr Heads kHeads = {.query = 8, .kv = 2, .dim = 128};
constexpr int kBlockSize = 16;

/// Element types of a kind.
struct Types {
  DType q, k, v, out;
};

Types types_of(KernelKind kind) {
  switch (kind) {
    case KernelKind::f32:
      return {DType::f32, DType::f32, DType::f32, DType::f32};
    case KernelKind::f16:
      return {DType::f16, DType::f16, DType::f16, DType::f16};
    case KernelKind::fp8_e4m3:
      return {DType::bf16, DType::fp8_e4m3, DType::fp8_e4m3, DType::bf16};
    case KernelKind::fp8_e5m2:
      return {DType::bf16, DType::fp8_e5m2, DType::fp8_e5m2, DType::bf16};
    case KernelKind::int8_per_token_head:
      return {DType::bf16, DType::i8, DType::i8, DType::bf16};
    case KernelKind::int8_level1:
      return {DType::i8, DType::i8, DType::i8, DType::bf16};
    case KernelKind::int8_level2_f16:
      return {DType::i8, DType::i8, DType::f16, DType::f16};
    case KernelKind::int8_level2_bf16:
      return {DType::i8, DType::i8, DType::bf16, DType::bf16};
    case KernelKind::bf16:
      break;
  }
  return {DType::bf16, DType::bf16, DType::bf16, DType::bf16};
}

/// `count` elements: random ones, the same over and over, which takes less time than all of them.
Buffer make_values(DType dtype, std::int64_t count, std::uint64_t seed) {
  const std::int64_t unique = std::min<std::int64_t>(count, 1 << 14);
  Buffer b(static_cast<std::size_t>(count) * size_of(dtype));
  if (dtype == DType::i8) {
    for (std::int64_t i = 0; i < unique; ++i)
      static_cast<std::int8_t*>(b.data())[i] = static_cast<std::int8_t>(
          static_cast<int>(hash64(seed << 40 | static_cast<std::uint64_t>(i)) % 255) - 127);
  } else {
    fill_random(b.data(), dtype, Elements{0, unique}, seed);
  }
  auto* bytes = static_cast<std::byte*>(b.data());
  const std::size_t period = static_cast<std::size_t>(unique) * size_of(dtype);
  for (std::size_t at = period; at < b.size(); at += period)
    std::memcpy(bytes + at, bytes, std::min(period, b.size() - at));
  return b;
}

/// One batch of a kind, run with the kernels of any level.
class Work {
 public:
  Work(KernelKind kind, std::span<const Request> requests, Executor& executor);
  /// Seconds.
  double run(IsaLevel isa);

 private:
  struct Planned {
    AttentionPlan plan;
    Buffer workspace;
  };
  void make_float_args(const TensorView& q, const TensorView& k, const TensorView& v);
  void make_int8_args(const TensorView& q, const TensorView& k, const TensorView& v);
  Planned& planned(IsaLevel isa);

  Types types_;
  Batch batch_;
  Executor& executor_;
  Buffer q_, k_, v_, out_;
  std::vector<float> scales_;  ///< alike, as many as any scales here are
  FlashAttnVarlenArgs float_;
  FlashAttnVarlenInt8Args int8_;
  std::map<IsaLevel, Planned> planned_;
};

Work::Work(KernelKind kind, std::span<const Request> requests, Executor& executor)
    : types_(types_of(kind)), batch_(make_batch(requests, kBlockSize)), executor_(executor) {
  const std::int64_t tokens = batch_.query_start.back(), blocks = batch_.num_rows / kBlockSize;
  const std::int64_t q_count = tokens * kHeads.query * kHeads.dim;
  const std::int64_t kv_count = batch_.num_rows * kHeads.kv * kHeads.dim;
  q_ = make_values(types_.q, q_count, 1);
  k_ = make_values(types_.k, kv_count, 2);
  v_ = make_values(types_.v, kv_count, 3);
  out_ = Buffer(static_cast<std::size_t>(q_count) * size_of(types_.out));
  const TensorView q(q_.data(), types_.q, {tokens, kHeads.query, kHeads.dim});
  const TensorView k(k_.data(), types_.k, {blocks, kHeads.kv, kBlockSize, kHeads.dim});
  const TensorView v(v_.data(), types_.v, {blocks, kHeads.kv, kBlockSize, kHeads.dim});
  const std::int64_t scales = std::max(batch_.num_rows, tokens) * kHeads.query;
  const std::int64_t channels = std::int64_t{kHeads.kv} * kHeads.dim;
  scales_.assign(static_cast<std::size_t>(std::max(scales, channels)), 0.01F);
  if (types_.q == DType::i8) {
    make_int8_args(q, k, v);
  } else {
    make_float_args(q, k, v);
  }
}

void Work::make_float_args(const TensorView& q, const TensorView& k, const TensorView& v) {
  float_.q = q;
  float_.k = k.permute({0, 2, 1, 3});
  float_.v = v.permute({0, 2, 1, 3});
  float_.out = {out_.data(), types_.out, {q.shape[0], q.shape[1], q.shape[2]}};
  float_.block_table = batch_.table_view(0, batch_.num_reqs());
  float_.params.causal = true;
  if (types_.k != DType::i8) return;
  const TensorView scales(scales_.data(), DType::f32, {k.shape[0], kBlockSize, kHeads.kv});
  float_.k_token_scale = float_.v_token_scale = scales;
}

void Work::make_int8_args(const TensorView& q, const TensorView& k, const TensorView& v) {
  int8_.q = q;
  int8_.q_scale = {scales_.data(), DType::f32, {kHeads.query, q.shape[0]}};
  int8_.k = k;
  int8_.k_scale = {scales_.data(), DType::f32, {k.shape[0], kHeads.kv, kBlockSize}};
  int8_.v = v;
  if (types_.v == DType::i8) int8_.v_scale = {scales_.data(), DType::f32, {kHeads.kv, kHeads.dim}};
  int8_.out = {out_.data(), types_.out, {q.shape[0], q.shape[1], q.shape[2]}};
  int8_.block_table = batch_.table_view(0, batch_.num_reqs());
  int8_.params.causal = true;
}

Work::Planned& Work::planned(IsaLevel isa) {
  const auto [it, made] = planned_.try_emplace(isa);
  if (made) {
    AttentionPlanInput in = plan_input(batch_, kHeads, executor_);
    in.isa = isa;
    it->second.plan = plan_attention(in);
    it->second.workspace = Buffer(it->second.plan.workspace_bytes);
  }
  return it->second;
}

double Work::run(IsaLevel isa) {
  const Planned& p = planned(isa);
  const auto start = std::chrono::steady_clock::now();
  if (types_.q == DType::i8) {
    flash_attn_varlen_int8(int8_, p.plan, p.workspace.workspace(), executor_);
  } else {
    flash_attn_varlen(float_, p.plan, p.workspace.workspace(), executor_);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Levels take turns, so that what disturbs one disturbs all; the shortest time counts.
KindTimes measure(KernelKind kind, const TuneSize& size, Executor& executor) {
  // Work for every worker, but no more memory than a small machine has.
  const int workers = executor.num_workers();
  Work prefill(kind,
               requests(std::clamp(workers / 2, 1, 32), size.prefill_tokens, size.prefill_tokens),
               executor);
  Work decode(kind, requests(std::clamp(4 * workers, 4, 32), 1, size.decode_keys), executor);
  KindTimes times{kind, {}, {}};
  for (const IsaLevel isa : distinct_levels(kind)) times.levels.push_back({isa, 1e9, 1e9});
  for (int round = 0; round <= size.rounds; ++round) {
    for (LevelTimes& t : times.levels) {
      const double prefill_seconds = prefill.run(t.isa), decode_seconds = decode.run(t.isa);
      if (round == 0) continue;
      t.prefill_seconds = std::min(t.prefill_seconds, prefill_seconds);
      t.decode_seconds = std::min(t.decode_seconds, decode_seconds);
    }
  }
  times.chosen = choose_level(times.levels);
  return times;
}

}  // namespace

KernelLevels Tuning::levels() const {
  KernelLevels levels{};
  for (const KindTimes& k : kinds) levels[static_cast<std::size_t>(k.kind)] = k.chosen;
  return levels;
}

IsaLevel choose_level(std::span<const LevelTimes> levels) {
  const auto product = [](const LevelTimes& t) { return t.prefill_seconds * t.decode_seconds; };
  // The margin is one of time: both factors of the product have it.
  constexpr double kLess = (1.0 - kTuneMargin) * (1.0 - kTuneMargin);
  const LevelTimes& fastest = *std::ranges::min_element(levels, {}, product);
  return product(fastest) <= product(levels.back()) * kLess ? fastest.isa : levels.back().isa;
}

std::vector<IsaLevel> distinct_levels(KernelKind kind) {
  cpu::AttentionProblem problem;
  const Types types = types_of(kind);
  problem.q_dtype = types.q;
  problem.k_dtype = types.k;
  problem.v_dtype = types.v;
  std::vector<IsaLevel> levels;
  cpu::RunUnitFn below = nullptr;
  for (const IsaLevel isa : available_isa_levels()) {
    const cpu::RunUnitFn run_unit = cpu::run_unit_of(isa, problem);
    if (run_unit != below) levels.push_back(isa);
    below = run_unit;
  }
  if (levels.size() > 1) levels.erase(levels.begin());  // scalar, slower by far
  return levels;
}

Tuning tune(Executor& executor, const TuneSize& size) {
  constexpr int kMost = 3;
  constexpr double kSpinSeconds = 0.02;
  return quietest(kMost, [&] {
    Tuning tuning;
    SpinChecks checks(executor);
    for (const KernelKind kind : kKernelKinds) {
      checks.look(kSpinSeconds);
      tuning.kinds.push_back(measure(kind, size, executor));
    }
    tuning.lost_fraction = checks.lost_fraction();
    return tuning;
  });
}

}  // namespace attend::bench
