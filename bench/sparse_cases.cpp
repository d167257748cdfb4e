// SPDX-License-Identifier: Apache-2.0
// Sparse attention of MLA layers: every token names the rows of its keys.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"
#include "attend/ops/mla.h"
#include "attend/ops/mla_cache.h"
#include "attend/ops/sparse_mla.h"
#include "attend/oracle/attention.h"
#include "attend/oracle/quantize.h"
#include "bench/batch.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr int kBlockSize = 64;
constexpr float kScale = 0.07F;

struct SparseShape {
  int tokens, heads, topk, rows;
  const RowFormat* format = nullptr;  ///< null = bf16 rows of 576
  bool against_dense = false;         ///< the tokens see all rows, too

  DType stored() const { return format != nullptr ? DType::u8 : DType::bf16; }
  int dim() const { return format != nullptr ? row_dim(*format) : fp8_ds_mla::kDim; }
  int latent() const { return format != nullptr ? format->value_dim : fp8_ds_mla::kLatent; }
  int row_elements() const { return format != nullptr ? format->row_bytes : fp8_ds_mla::kDim; }
  double row_flops() const { return 2.0 * (dim() + latent()) * heads; }
  double row_bytes() const { return row_elements() * static_cast<double>(size_of(stored())); }
};

class SparseProblem : public Problem {
 public:
  SparseProblem(SparseShape shape, Executor& executor)
      : s_(shape),
        executor_(executor),
        q_(static_cast<std::size_t>(num_rows() * s_.dim()) * sizeof(bf16)),
        out_(static_cast<std::size_t>(num_rows() * s_.latent()) * sizeof(bf16)),
        cache_(static_cast<std::size_t>(s_.rows) * static_cast<std::size_t>(s_.row_elements()) *
                   size_of(s_.stored()),
               {.executor = &executor}),
        indices_(static_cast<std::size_t>(s_.tokens) * static_cast<std::size_t>(s_.topk)) {
    fill_random(q_.data(), DType::bf16, {0, num_rows() * s_.dim()}, 1);
    fill_cache();
    name_rows();
    args_.q = {q_.data(), DType::bf16, {s_.tokens, s_.heads, s_.dim()}};
    args_.kv_cache = cache_view();
    args_.indices = {indices_.data(), DType::i32, {s_.tokens, s_.topk}};
    args_.out = {out_.data(), DType::bf16, {s_.tokens, s_.heads, s_.latent()}};
    args_.scale = kScale;
    SparseMlaPlanInput in;
    in.num_tokens = s_.tokens;
    in.topk = s_.topk;
    in.num_heads = s_.heads;
    in.head_dim_qk = s_.dim();
    in.head_dim_v = s_.latent();
    in.num_workers = executor.num_workers();
    plan_ = plan_sparse_mla(in);
    workspace_ = Buffer(plan_.workspace_bytes);
    if (s_.against_dense) prepare_dense();
  }

  void run() override { sparse_mla_attention(args_, plan_, workspace_.workspace(), executor_); }

  double flops() const override { return s_.row_flops() * s_.tokens * s_.topk; }
  double bytes() const override { return s_.row_bytes() * s_.tokens * s_.topk; }
  /// Every token over all rows.
  std::vector<Part> parts() override {
    if (!s_.against_dense) return {};
    const double pairs = static_cast<double>(s_.tokens) * s_.rows;
    return {{"dense", Bound::compute, s_.row_flops() * pairs, s_.row_bytes() * s_.rows,
             [this] { mla_decode(dense_, dense_plan_, dense_workspace_.workspace(), executor_); }}};
  }
  std::string verify() const override {
    for (const Row& row :
         {Row{0, 0, 0}, Row{s_.tokens - 1, 0, s_.heads - 1}, Row{s_.tokens / 2, 0, s_.heads / 3}}) {
      std::string wrong = verify_row(row);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  std::int64_t num_rows() const { return std::int64_t{s_.tokens} * s_.heads; }
  TensorView cache_view() const {
    return {cache_.data(), s_.stored(), {s_.rows / kBlockSize, kBlockSize, s_.row_elements()}};
  }
  void fill_cache() {
    const std::int64_t elements = std::int64_t{s_.rows} * s_.dim();
    if (s_.format == nullptr) {
      fill_random(cache_.data(), DType::bf16, {0, elements}, 2);
      return;
    }
    Buffer plain(static_cast<std::size_t>(elements) * sizeof(bf16));
    fill_random(plain.data(), DType::bf16, {0, elements}, 2);
    const TensorView all(plain.data(), DType::bf16, {s_.rows, s_.dim()});
    std::vector<std::int64_t> slots(static_cast<std::size_t>(s_.rows));
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    concat_and_cache_mla({.kv_c = all.slice(1, 0, s_.format->latent),
                          .k_pe = all.slice(1, s_.format->latent, s_.format->rope),
                          .kv_cache = cache_view(),
                          .slot_mapping = {slots.data(), DType::i64, {s_.rows}}},
                         &executor_);
  }
  /// Each token: one row of every stretch of rows / topk, in any order of stretches.
  void name_rows() {
    std::uint64_t state = 7;
    const auto draw = [&](int n) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      return static_cast<int>((state >> 33) % static_cast<std::uint64_t>(n));
    };
    const int stretch = s_.rows / s_.topk;
    for (int t = 0; t < s_.tokens; ++t) {
      std::int32_t* row = indices_.data() + std::ptrdiff_t{t} * s_.topk;
      for (int i = 0; i < s_.topk; ++i) row[i] = i * stretch + draw(stretch);
      for (int i = s_.topk; i > 1; --i) std::swap(row[i - 1], row[draw(i)]);
    }
  }
  std::vector<double> decoded(std::int64_t row) const {
    if (s_.format != nullptr)
      return oracle::coded_row(cache_view(), row / kBlockSize, row % kBlockSize);
    std::vector<double> numbers(static_cast<std::size_t>(s_.dim()));
    for (int d = 0; d < s_.dim(); ++d)
      numbers[static_cast<std::size_t>(d)] =
          value_at(cache_.data(), DType::bf16, row * s_.dim() + d);
    return numbers;
  }
  /// Every token is a request, and all have the same rows.
  void prepare_dense() {
    const int blocks = s_.rows / kBlockSize;
    for (int t = 0; t <= s_.tokens; ++t) starts_.push_back(t);
    lengths_.assign(static_cast<std::size_t>(s_.tokens), s_.rows);
    for (int i = 0; i < s_.tokens * blocks; ++i) table_.push_back(i % blocks);
    dense_.q = args_.q;
    dense_.kv_cache = args_.kv_cache;
    dense_.out = args_.out;
    dense_.block_table = {table_.data(), DType::i32, {s_.tokens, blocks}};
    dense_.params.scale = kScale;
    AttentionPlanInput in;
    in.query_start_loc = starts_;
    in.seq_lens = lengths_;
    in.num_q_heads = s_.heads;
    in.num_kv_heads = 1;
    in.head_dim_qk = s_.dim();
    in.head_dim_v = s_.latent();
    in.num_workers = executor_.num_workers();
    dense_plan_ = plan_mla_decode(in);
    dense_workspace_ = Buffer(dense_plan_.workspace_bytes);
  }
  /// A row's request is its token.
  std::string verify_row(const Row& row) const {
    const std::int64_t at = std::int64_t{row.request} * s_.heads + row.head;
    oracle::RowProblem p;
    p.head_dim_qk = s_.dim();
    p.head_dim_v = s_.latent();
    p.num_keys = s_.topk;
    p.position = s_.topk - 1;
    p.scale = kScale;
    p.causal = false;
    p.split_weights = oracle::splits_weights(s_.stored());
    std::int64_t current = -1;
    std::vector<double> numbers;
    const auto element = [&](std::int64_t j, int d) {
      if (j != current) {
        const std::int64_t named = std::int64_t{row.request} * s_.topk + j;
        numbers = decoded(indices_[static_cast<std::size_t>(named)]);
        current = j;
      }
      return numbers[static_cast<std::size_t>(d)];
    };
    p.q = [&](int d) { return value_at(q_.data(), DType::bf16, at * s_.dim() + d); };
    p.k = p.v = element;
    return compare_row(p, row,
                       static_cast<const std::byte*>(out_.data()) +
                           at * s_.latent() * static_cast<std::int64_t>(sizeof(bf16)),
                       DType::bf16);
  }

  SparseShape s_;
  Executor& executor_;
  Buffer q_, out_;
  CacheMemory cache_;
  std::vector<std::int32_t> indices_;
  SparseMlaArgs args_;
  SparseMlaPlan plan_;
  Buffer workspace_;
  std::vector<std::int32_t> starts_, lengths_, table_;
  MlaDecodeArgs dense_;
  AttentionPlan dense_plan_;
  Buffer dense_workspace_;
};

Case sparse_case(std::string name, std::string description, SparseShape shape) {
  return {std::move(name), std::move(description), Bound::compute,
          [shape](Executor& executor) { return std::make_unique<SparseProblem>(shape, executor); }};
}

}  // namespace

std::vector<Case> sparse_cases() {
  constexpr int kRows = 65536, kTopk = 2048;
  const RowFormat *mla = &fp8_ds_mla::kFormat, *v4 = &fp8_ds_v4::kFormat;
  Case over_dense = sparse_case(
      "sparse_decode_64k_over_dense",
      "4 tokens of 128 heads, each to its 2048 rows of 65536, fp8_ds_mla; then to all rows",
      {4, 128, kTopk, kRows, mla, true});
  over_dense.against_parts = true;
  return {
      sparse_case("sparse_prefill_bf16_h128_top2048",
                  "64 tokens of 128 heads, each to its 2048 rows of 65536, bf16",
                  {64, 128, kTopk, kRows}),
      sparse_case("sparse_prefill_bf16_h16_top2048", "the same with 16 heads",
                  {64, 16, kTopk, kRows}),
      sparse_case("sparse_decode_fp8_h128_top2048",
                  "16 tokens of 128 heads, each to its 2048 rows of 65536, fp8_ds_mla",
                  {16, 128, kTopk, kRows, mla}),
      sparse_case("sparse_decode_fp8_h16_top2048", "the same with 16 heads",
                  {16, 16, kTopk, kRows, mla}),
      sparse_case("sparse_decode_v4_h128_top2048",
                  "16 tokens of 128 heads, each to its 2048 rows of 65536, fp8_ds_v4",
                  {16, 128, kTopk, kRows, v4}),
      sparse_case("sparse_decode_v4_h16_top2048", "the same with 16 heads",
                  {16, 16, kTopk, kRows, v4}),
      over_dense,
  };
}

}  // namespace attend::bench
