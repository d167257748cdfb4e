// SPDX-License-Identifier: Apache-2.0
// The indexer of sparse MLA: logits of codes, and the choice of the highest.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/core/workspace.h"
#include "attend/ops/indexer_cache.h"
#include "attend/ops/indexer_logits.h"
#include "attend/ops/top_k.h"
#include "attend/oracle/indexer.h"
#include "attend/oracle/top_k.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr int kHeads = 64, kDim = 128, kBlockSize = 64;

struct LogitsShape {
  int requests, tokens, keys;  ///< query tokens a request, keys a request
};

/// Queries of all requests, and their weights.
class LogitsProblem : public Problem {
 public:
  explicit LogitsProblem(LogitsShape shape)
      : s_(shape),
        q_(static_cast<std::size_t>(rows()) * kHeads * kDim),
        weights_(static_cast<std::size_t>(rows()) * kHeads),
        logits_(static_cast<std::size_t>(rows()) * static_cast<std::size_t>(s_.keys) *
                sizeof(float)) {
    fill_random(q_.data(), DType::fp8_e4m3, {0, rows() * kHeads * kDim}, 1);
    for (std::size_t i = 0; i < weights_.size(); ++i) weights_[i] = random_value(2, i);
  }
  double flops() const override {
    return 2.0 * static_cast<double>(rows()) * kHeads * kDim * s_.keys;
  }
  /// Keys with their scales, and logits.
  double bytes() const override {
    return static_cast<double>(s_.requests) * s_.keys * indexer_cache::kRowBytes +
           static_cast<double>(rows()) * s_.keys * 4.0;
  }

 protected:
  std::int64_t rows() const { return std::int64_t{s_.requests} * s_.tokens; }
  TensorView logits() const { return {logits_.data(), DType::f32, {rows(), s_.keys}}; }
  ConstTensorView weights() const { return {weights_.data(), DType::f32, {rows(), kHeads}}; }
  /// One key of one row with the oracle.
  std::string compare(std::int64_t row, std::int64_t key, const std::uint8_t* codes,
                      float scale) const {
    const std::int32_t begin = 0, end = 1;
    Fp8MqaLogitsArgs a;
    a.q = {static_cast<const std::uint8_t*>(q_.data()) + row * kHeads * kDim,
           DType::fp8_e4m3,
           {1, kHeads, kDim}};
    a.k = {codes, DType::fp8_e4m3, {1, kDim}};
    a.k_scale = {&scale, DType::f32, {1}};
    a.weights = {weights_.data() + row * kHeads, DType::f32, {1, kHeads}};
    a.ks = {&begin, DType::i32, {1}};
    a.ke = {&end, DType::i32, {1}};
    const oracle::IndexerLogits expected = oracle::fp8_mqa_logits(a);
    const double got = logits().as<float>()[row * s_.keys + key];
    if (std::abs(got - expected.logits[0]) <= expected.bound[0]) return "";
    return "row " + std::to_string(row) + " key " + std::to_string(key) + " is " +
           std::to_string(got) + ", expected " + std::to_string(expected.logits[0]);
  }
  /// Compares sampled keys; key_at(request, key) gives codes and scale.
  template <typename KeyAt>
  std::string verify_samples(KeyAt&& key_at) const {
    for (std::int64_t i = 0; i < 400; ++i) {
      const auto bits = hash64(static_cast<std::uint64_t>(i));
      const auto row = static_cast<std::int64_t>(bits % static_cast<std::uint64_t>(rows()));
      const std::int64_t sees = s_.keys - s_.tokens + row % s_.tokens + 1;
      const auto key = static_cast<std::int64_t>((bits >> 20) % static_cast<std::uint64_t>(sees));
      const auto [codes, scale] = key_at(row / s_.tokens, key);
      std::string wrong = compare(row, key, codes, scale);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

  LogitsShape s_;
  Buffer q_;
  std::vector<float> weights_;
  Buffer logits_;
};

/// Random keys, encoded as a model's are.
void write_keys(const TensorView& cache, std::int64_t keys, Executor& executor) {
  Buffer plain(static_cast<std::size_t>(keys) * kDim * sizeof(bf16));
  fill_random(plain.data(), DType::bf16, {0, keys * kDim}, 3);
  std::vector<std::int64_t> slots(static_cast<std::size_t>(keys));
  std::iota(slots.begin(), slots.end(), 0);
  indexer_k_quant_and_cache({.k = ConstTensorView(plain.data(), DType::bf16, {keys, kDim}),
                             .kv_cache = cache,
                             .slot_mapping = {slots.data(), DType::i64, {keys}},
                             .scale_fmt = IndexerScale::ue8m0},
                            &executor);
}

/// Decode: keys in shuffled pages.
class PagedLogits : public LogitsProblem {
 public:
  PagedLogits(LogitsShape shape, Executor& executor)
      : LogitsProblem(shape),
        executor_(executor),
        blocks_(std::int64_t{s_.requests} * s_.keys / kBlockSize),
        cache_(static_cast<std::size_t>(blocks_ * kBlockSize * indexer_cache::kRowBytes),
               {.executor = &executor}),
        table_(static_cast<std::size_t>(blocks_)),
        lens_(static_cast<std::size_t>(s_.requests), s_.keys) {
    write_keys(cache_view(), blocks_ * kBlockSize, executor);
    std::iota(table_.begin(), table_.end(), 0);
    for (std::size_t i = table_.size() - 1; i > 0; --i)
      std::swap(table_[i], table_[hash64(i) % (i + 1)]);
    args_.q = {q_.data(), DType::fp8_e4m3, {s_.requests, s_.tokens, kHeads, kDim}};
    args_.kv_cache = cache_view();
    args_.weights = weights();
    args_.context_lens = {lens_.data(), DType::i32, {s_.requests}};
    args_.block_table = {table_.data(), DType::i32, {s_.requests, s_.keys / kBlockSize}};
    args_.logits = logits();
  }
  void run() override { fp8_paged_mqa_logits(args_, &executor_); }
  std::string verify() const override {
    return verify_samples([&](std::int64_t request, std::int64_t key) {
      const std::int64_t block =
          table_[static_cast<std::size_t>((request * s_.keys + key) / kBlockSize)];
      const auto* bytes = static_cast<const std::uint8_t*>(cache_.data()) +
                          block * kBlockSize * indexer_cache::kRowBytes;
      const std::int64_t offset = key % kBlockSize;
      float scale;
      std::memcpy(&scale, bytes + indexer_cache::scale_at(kBlockSize, offset), sizeof scale);
      return std::pair(bytes + indexer_cache::codes_at(offset), scale);
    });
  }

 private:
  TensorView cache_view() const {
    return {cache_.data(), DType::u8, {blocks_, kBlockSize, indexer_cache::kRowBytes}};
  }
  Executor& executor_;
  std::int64_t blocks_;
  CacheMemory cache_;
  std::vector<std::int32_t> table_, lens_;
  Fp8PagedMqaLogitsArgs args_;
};

/// Prefill: gathered keys of one request, causal.
class PrefillLogits : public LogitsProblem {
 public:
  PrefillLogits(LogitsShape shape, Executor& executor)
      : LogitsProblem(shape),
        executor_(executor),
        keys_(static_cast<std::size_t>(s_.keys) * kDim),
        scales_(static_cast<std::size_t>(s_.keys)),
        starts_(static_cast<std::size_t>(rows())) {
    fill_random(keys_.data(), DType::fp8_e4m3, {0, std::int64_t{s_.keys} * kDim}, 3);
    for (std::size_t j = 0; j < scales_.size(); ++j)
      scales_[j] = std::abs(random_value(4, j)) + 0.01F;
    for (int i = 0; i < s_.tokens; ++i) ends_.push_back(s_.keys - s_.tokens + i + 1);
    args_.q = {q_.data(), DType::fp8_e4m3, {rows(), kHeads, kDim}};
    args_.k = {keys_.data(), DType::fp8_e4m3, {s_.keys, kDim}};
    args_.k_scale = {scales_.data(), DType::f32, {s_.keys}};
    args_.weights = weights();
    args_.ks = {starts_.data(), DType::i32, {rows()}};
    args_.ke = {ends_.data(), DType::i32, {rows()}};
    args_.logits = logits();
  }
  void run() override { fp8_mqa_logits(args_, &executor_); }
  std::string verify() const override {
    return verify_samples([&](std::int64_t, std::int64_t key) {
      return std::pair(static_cast<const std::uint8_t*>(keys_.data()) + key * kDim,
                       scales_[static_cast<std::size_t>(key)]);
    });
  }

 private:
  Executor& executor_;
  Buffer keys_;
  std::vector<float> scales_;
  std::vector<std::int32_t> starts_, ends_;
  Fp8MqaLogitsArgs args_;
};

/// Rows of random logits.
class TopK : public Problem {
 public:
  TopK(int rows, int width, int k, Executor& executor)
      : executor_(executor),
        rows_(rows),
        width_(width),
        k_(k),
        logits_(static_cast<std::size_t>(rows) * static_cast<std::size_t>(width) * sizeof(float)),
        lens_(static_cast<std::size_t>(rows), width),
        out_(static_cast<std::size_t>(rows) * static_cast<std::size_t>(k)) {
    fill_random(logits_.data(), DType::f32, {0, std::int64_t{rows} * width}, 5);
  }
  void run() override {
    top_k_per_row_decode({.logits = {logits_.data(), DType::f32, {rows_, width_}},
                          .seq_lens = {lens_.data(), DType::i32, {rows_}},
                          .next_n = 1,
                          .out = {out_.data(), DType::i32, {rows_, k_}}},
                         &executor_);
  }
  double bytes() const override { return static_cast<double>(logits_.size()); }
  std::string verify() const override {
    for (std::int64_t row = 0; row < rows_; ++row) {
      const auto* from = static_cast<const float*>(logits_.data()) + row * width_;
      std::vector<std::int64_t> expected(static_cast<std::size_t>(k_));
      oracle::top_k(std::vector<double>(from, from + width_), expected);
      if (!std::equal(expected.begin(), expected.end(), out_.begin() + row * k_))
        return "row " + std::to_string(row) + " is another choice";
    }
    return "";
  }

 private:
  Executor& executor_;
  std::int64_t rows_, width_, k_;
  Buffer logits_;
  std::vector<std::int32_t> lens_, out_;
};

template <typename P>
Case logits_case(std::string name, std::string description, LogitsShape shape) {
  return {std::move(name), std::move(description), Bound::indexer,
          [shape](Executor& executor) { return std::make_unique<P>(shape, executor); }};
}

}  // namespace

std::vector<Case> indexer_cases() {
  constexpr int kKeys = 32768;
  return {
      logits_case<PagedLogits>("indexer_logits_64x128_32k",
                               "4 query tokens of 2 requests, 64 heads of 128, 32768 keys each",
                               {2, 4, kKeys}),
      logits_case<PagedLogits>("indexer_logits_64x128_32k_next1",
                               "1 query token of 8 requests, 64 heads of 128, 32768 keys each",
                               {8, 1, kKeys}),
      logits_case<PrefillLogits>("indexer_logits_prefill_256x32k",
                                 "the last 256 tokens of 32768, 64 heads of 128, gathered keys",
                                 {1, 256, kKeys}),
      {"top_k_2048_of_131072", "2048 of 131072 logits, 16 rows", Bound::memory,
       [](Executor& executor) { return std::make_unique<TopK>(16, 131072, 2048, executor); }},
  };
}

}  // namespace attend::bench
