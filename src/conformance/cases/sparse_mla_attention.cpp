// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"
#include "attend/oracle/sparse_mla.h"
#include "conformance/check.h"
#include "conformance/coded_rows.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

struct Sizes {
  int dim, latent;
};

class SparseMlaCase final : public Case {
 public:
  explicit SparseMlaCase(Rng& rng) {
    dtype_ = rng.pick({DType::f32, DType::f16, DType::bf16});
    if (rng.chance(0.4)) format_ = rng.chance(0.5) ? &fp8_ds_mla::kFormat : &fp8_ds_v4::kFormat;
    if (format_ != nullptr) dtype_ = DType::bf16;
    sizes_ = format_ != nullptr
                 ? Sizes{row_dim(*format_), format_->value_dim}
                 : rng.pick({Sizes{576, 512}, {512, 512}, {320, 256}, {72, 64}, {64, 64}, {24, 8}});
    cache_dtype_ = format_ != nullptr ? DType::u8
                   : rng.chance(0.4)  ? rng.pick({DType::fp8_e4m3, DType::fp8_e5m2})
                                      : dtype_;
    heads_ = rng.pick({1, 2, 5, 12, 16, 17, 32, 64, 128});
    tokens_ = rng.range(0, 6);
    topk_ = rng.pick({1, 2, 31, 64, 250, 256, 257, 300, 600});
    // Float64 takes its time: large problems have few tokens.
    while (tokens_ > 1 && std::int64_t{tokens_} * topk_ * heads_ > 40'000) --tokens_;
    while (heads_ > 1 && topk_ * heads_ > 40'000) heads_ /= 2;
    planned_ = rng.chance(0.5);
    make_memory(rng);
    expected_ = oracle::sparse_mla_attention(args());
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    out_.reset();
    lse_.reset();
    max_logits_.reset();
    if (planned_) {
      const SparseMlaPlan plan = plan_sparse_mla({.num_tokens = tokens_,
                                                  .topk = topk_,
                                                  .num_heads = heads_,
                                                  .head_dim_qk = sizes_.dim,
                                                  .head_dim_v = sizes_.latent,
                                                  .num_workers = executor.num_workers(),
                                                  .isa = kernels.isa,
                                                  .arithmetic = kernels.arithmetic});
      Buffer workspace(plan.workspace_bytes + 64);
      // Contents of a workspace are undefined: NaN must not reach the result.
      std::memset(workspace.data(), 0xff, workspace.size());
      sparse_mla_attention(args(), plan, workspace.workspace(), executor);
    } else {
      sparse_mla_attention(args(), &executor, kernels);
    }
    Outcome outcome;
    compare_written(outcome, "out", out_, expected_.out, expected_.out_bound);
    compare_written(outcome, "lse", lse_, expected_.lse, expected_.lse_bound);
    compare_written(outcome, "max_logits", max_logits_, expected_.max_logits,
                    expected_.max_logits_bound);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(dtype_, cache_dtype_, cache_dtype_);
  }

  std::string describe() const override {
    return fmt::format(
        "{} kv {} tokens {} heads {} dim {} latent {} topk {} block_size {}{}", to_string(dtype_),
        format_ != nullptr ? format_->name : to_string(cache_dtype_), tokens_, heads_, sizes_.dim,
        sizes_.latent, topk_, block_size_, planned_ ? " planned" : "");
  }

 private:
  void make_memory(Rng& rng) {
    Layout rows;
    rows.padded = rng.chance(0.4);
    q_ = Storage(rng, dtype_, {tokens_, heads_, sizes_.dim}, rows);
    q_.set_random(rng, rng.pick({0.3, 1.0, 4.0}));
    out_ = Storage(rng, dtype_, {tokens_, heads_, sizes_.latent}, rows);
    lse_ = Storage(rng, DType::f32, {tokens_, heads_}, rows);
    max_logits_ = Storage(rng, DType::f32, {tokens_, heads_}, rows);
    scale_ = static_cast<float>(0.02 + 0.2 * rng.uniform());
    if (is_fp8(cache_dtype_)) {
      kv_scale_ = Storage(rng, DType::f32, {1});
      kv_scale_.set(0, std::exp2(2.0 * rng.uniform() - 1.0));
    }
    if (rng.chance(0.4)) {
      sinks_ = Storage(rng, DType::f32, {heads_});
      sinks_.set_random(rng, 2.0);
      if (rng.chance(0.3)) sinks_.set(0, -std::numeric_limits<double>::infinity());
    }
    block_size_ = rng.pick({1, 3, 16, 64});
    num_blocks_ = rng.range(1, 700 / block_size_ + 1);
    cache_ = format_ != nullptr
                 ? coded_storage(rng, *format_, num_blocks_, block_size_, rows)
                 : Storage(rng, cache_dtype_, {num_blocks_, block_size_, sizes_.dim}, rows);
    written_.assign(static_cast<std::size_t>(capacity()), false);
    name_keys(rng, rows);
    out_.freeze();
    lse_.freeze();
    max_logits_.freeze();
  }

  std::int64_t capacity() const { return std::int64_t{num_blocks_} * block_size_; }

  /// Fills the rows that are named, and no other.
  void name_keys(Rng& rng, const Layout& layout) {
    indices_ = Storage(rng, DType::i32, {tokens_, topk_}, layout);
    const bool short_rows = rng.chance(0.5);
    if (short_rows) topk_length_ = Storage(rng, DType::i32, {tokens_});
    const double hole = rng.pick({0.0, 0.1, 0.9, 1.0});
    constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min(),
                           kHighest = std::numeric_limits<std::int32_t>::max();
    for (int t = 0; t < tokens_; ++t) {
      std::int32_t length = topk_;
      if (short_rows) {
        length = rng.pick({-1, 0, topk_ / 2, topk_ - 1, topk_, topk_ + 1, kHighest});
        topk_length_.view().as<std::int32_t>()[topk_length_.offset({t})] = length;
      }
      for (int i = 0; i < topk_; ++i) {
        auto slot = static_cast<std::int32_t>(rng.range(std::int64_t{0}, capacity() - 1));
        if (rng.chance(hole))
          slot = rng.pick({-1, -64, kLowest, kHighest, static_cast<std::int32_t>(capacity())});
        indices_.view().as<std::int32_t>()[indices_.offset({t, i})] = slot;
        if (i < length && slot >= 0 && slot < capacity()) fill_row(rng, slot);
      }
    }
  }

  void fill_row(Rng& rng, std::int32_t slot) {
    if (written_[static_cast<std::size_t>(slot)]) return;
    written_[static_cast<std::size_t>(slot)] = true;
    const int block = slot / block_size_, offset = slot % block_size_;
    if (format_ != nullptr) {
      set_random_coded_row(rng, cache_view(), *format_, block, offset);
    } else {
      cache_.set_random(rng, cache_.offset({block, offset, 0}), sizes_.dim, 1.0);
    }
  }

  TensorView cache_view() const {
    return format_ != nullptr ? coded_view(cache_, *format_, block_size_) : cache_.view();
  }

  SparseMlaArgs args() const {
    SparseMlaArgs a;
    a.q = q_.view();
    a.kv_cache = cache_view();
    a.indices = indices_.view();
    a.topk_length = topk_length_.view();
    a.out = out_.view();
    a.lse = lse_.view();
    a.max_logits = max_logits_.view();
    a.kv_scale = kv_scale_.view();
    a.sinks = sinks_.view();
    a.scale = scale_;
    return a;
  }

  DType dtype_ = DType::bf16, cache_dtype_ = DType::bf16;
  const RowFormat* format_ = nullptr;
  bool planned_ = false;
  Sizes sizes_{};
  int heads_ = 1, tokens_ = 1, topk_ = 1, block_size_ = 16, num_blocks_ = 1;
  float scale_ = 1.0F;
  std::vector<bool> written_;
  Storage q_, cache_, kv_scale_, sinks_, indices_, topk_length_, out_, lse_, max_logits_;
  oracle::SparseMlaResult expected_;
};

}  // namespace

Op op_sparse_mla_attention() {
  return {"sparse_mla_attention", true,
          [](Rng& rng) { return std::make_unique<SparseMlaCase>(rng); }, true};
}

}  // namespace attend::conformance
