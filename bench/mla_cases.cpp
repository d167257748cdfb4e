// SPDX-License-Identifier: Apache-2.0
// Attention of MLA layers: absorbed decode, and prefill over a context in chunks.
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <utility>

#include "attend/cache/cache_memory.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/ops/mla.h"
#include "attend/ops/mla_cache.h"
#include "attend/oracle/attention.h"
#include "attend/oracle/quantize.h"
#include "bench/batch.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr int kLatent = fp8_ds_mla::kLatent, kRope = fp8_ds_mla::kRope, kDim = fp8_ds_mla::kDim;
constexpr int kBlockSize = 64;
constexpr float kScale = 0.07F;

struct DecodeShape {
  std::vector<Request> requests;
  int heads = 16;
  DType stored = DType::bf16;  ///< bf16, fp8_e4m3, or u8 for fp8_ds_mla rows
  Arithmetic arithmetic = Arithmetic::automatic;

  int row_elements() const { return stored == DType::u8 ? fp8_ds_mla::kRowBytes : kDim; }
};

/// mla_decode on bf16 queries.
class MlaDecodeProblem : public Problem {
 public:
  MlaDecodeProblem(DecodeShape shape, Executor& executor)
      : s_(std::move(shape)),
        batch_(make_batch(s_.requests, kBlockSize)),
        executor_(executor),
        q_(static_cast<std::size_t>(rows() * kDim) * sizeof(bf16)),
        out_(static_cast<std::size_t>(rows() * kLatent) * sizeof(bf16)),
        cache_(static_cast<std::size_t>(batch_.num_rows * s_.row_elements()) * size_of(s_.stored),
               {.executor = &executor}) {
    fill_random(q_.data(), DType::bf16, {0, rows() * kDim}, 1);
    fill_cache();
    args_.q = {q_.data(), DType::bf16, {batch_.query_start.back(), s_.heads, kDim}};
    args_.out = {out_.data(), DType::bf16, {batch_.query_start.back(), s_.heads, kLatent}};
    args_.kv_cache = cache_view();
    args_.block_table = batch_.table_view(0, batch_.num_reqs());
    if (is_fp8(s_.stored)) args_.kv_scale = {&kv_scale_, DType::f32, {1}};
    args_.params.scale = kScale;
    args_.params.causal = true;
    AttentionPlanInput in = plan_input(batch_, {s_.heads, 1, kDim, kLatent}, executor);
    in.arithmetic = s_.arithmetic;
    plan_ = plan_mla_decode(in);
    workspace_ = Buffer(plan_.workspace_bytes);
  }

  void run() override { mla_decode(args_, plan_, workspace_.workspace(), executor_); }

  double flops() const override {
    return 2.0 * batch_.pairs(-1, 0, batch_.num_reqs()) * (kDim + kLatent) * s_.heads;
  }
  double bytes() const override {
    return static_cast<double>(batch_.visible_keys(-1, 0, batch_.num_reqs())) * s_.row_elements() *
           static_cast<double>(size_of(s_.stored));
  }
  std::string verify() const override {
    for (const Row& row : sample_rows(batch_, s_.heads)) {
      std::string wrong = verify_row(row);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  std::int64_t rows() const { return std::int64_t{batch_.query_start.back()} * s_.heads; }
  TensorView cache_view() const {
    return {
        cache_.data(), s_.stored, {batch_.num_rows / kBlockSize, kBlockSize, s_.row_elements()}};
  }
  /// A latent is as large as a rope value; those of fp8_ds_mla go through the op that writes them.
  void fill_cache() {
    if (s_.stored != DType::u8) {
      fill_random(cache_.data(), s_.stored, {0, batch_.num_rows * kDim}, 2);
      return;
    }
    Buffer plain(static_cast<std::size_t>(batch_.num_rows * kDim) * sizeof(bf16));
    fill_random(plain.data(), DType::bf16, {0, batch_.num_rows * kDim}, 2);
    const TensorView all(plain.data(), DType::bf16, {batch_.num_rows, kDim});
    std::vector<std::int64_t> slots(static_cast<std::size_t>(batch_.num_rows));
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    concat_and_cache_mla({.kv_c = all.slice(1, 0, kLatent),
                          .k_pe = all.slice(1, kLatent, kRope),
                          .kv_cache = cache_view(),
                          .slot_mapping = {slots.data(), DType::i64, {batch_.num_rows}}},
                         &executor_);
  }
  std::vector<double> decoded(std::int64_t row) const {
    std::vector<double> numbers(static_cast<std::size_t>(kDim));
    if (s_.stored == DType::u8) {
      const auto* bytes =
          static_cast<const std::uint8_t*>(cache_.data()) + row * fp8_ds_mla::kRowBytes;
      oracle::fp8_ds_mla_decode({bytes, fp8_ds_mla::kRowBytes}, numbers);
      return numbers;
    }
    for (int d = 0; d < kDim; ++d)
      numbers[static_cast<std::size_t>(d)] = value_at(cache_.data(), s_.stored, row * kDim + d);
    return numbers;
  }
  std::string verify_row(const Row& row) const {
    const std::int64_t token =
        batch_.query_start[static_cast<std::size_t>(row.request)] + row.token;
    const std::int64_t at = token * s_.heads + row.head;
    oracle::RowProblem p = row_problem(batch_, {s_.heads, 1, kDim, kLatent}, row);
    p.scale = kScale;
    p.split_weights = s_.arithmetic != Arithmetic::exact && oracle::splits_weights(s_.stored);
    std::int64_t current = -1;
    std::vector<double> numbers;
    const auto element = [&](std::int64_t j, int d) {
      if (j != current) numbers = decoded(batch_.row(row.request, current = j));
      return numbers[static_cast<std::size_t>(d)];
    };
    p.q = [&](int d) { return value_at(q_.data(), DType::bf16, at * kDim + d); };
    p.k = p.v = element;
    return compare_row(p, row,
                       static_cast<const std::byte*>(out_.data()) +
                           at * kLatent * static_cast<std::int64_t>(sizeof(bf16)),
                       DType::bf16);
  }

  DecodeShape s_;
  Batch batch_;
  Executor& executor_;
  Buffer q_, out_;
  CacheMemory cache_;
  float kv_scale_ = 1.0F;
  MlaDecodeArgs args_;
  AttentionPlan plan_;
  Buffer workspace_;
};

void add_decode(std::vector<Case>& cases, std::string name, std::string description, Bound bound,
                DecodeShape shape) {
  const auto make = [](DecodeShape s) {
    return [s = std::move(s)](Executor& executor) {
      return std::make_unique<MlaDecodeProblem>(s, executor);
    };
  };
  cases.push_back({name, std::move(description), bound, make(shape)});
  shape.arithmetic = Arithmetic::exact;
  cases.push_back({name + "_exact", name + " in exact arithmetic", bound, make(std::move(shape))});
}

}  // namespace

std::vector<Case> mla_cases() {
  std::vector<Case> cases;
  add_decode(cases, "mla_decode_bf16_h128_16k",
             "absorbed decode of one token of 128 heads over 16384 latents, bf16", Bound::compute,
             {requests(1, 1, 16384), 128});
  add_decode(cases, "mla_decode_ds_mla_h128_16k", "the same over fp8_ds_mla rows of 656 bytes",
             Bound::compute, {requests(1, 1, 16384), 128, DType::u8});
  add_decode(cases, "mla_decode_bf16_h16_8x4k",
             "absorbed decode of 8 tokens of 16 heads over 4096 latents each, bf16", Bound::compute,
             {requests(8, 1, 4096), 16});
  add_decode(cases, "mla_decode_fp8_h16_8x4k", "the same over fp8_e4m3 latents", Bound::compute,
             {requests(8, 1, 4096), 16, DType::fp8_e4m3});
  add_decode(cases, "mla_decode_ds_mla_h16_8x4k", "the same over fp8_ds_mla rows of 656 bytes",
             Bound::compute, {requests(8, 1, 4096), 16, DType::u8});
  return cases;
}

}  // namespace attend::bench
