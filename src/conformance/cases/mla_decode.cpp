// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"
#include "attend/ops/mla.h"
#include "attend/oracle/mla_decode.h"
#include "conformance/attention_shape.h"
#include "conformance/check.h"
#include "conformance/coded_rows.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

struct Sizes {
  int dim, latent;
};

/// Lengths and masks of any attention; heads and sizes of latent attention.
AttentionShape latent_shape(Rng& rng, Sizes sizes) {
  ShapeLimits limits;
  limits.products = 150'000;
  AttentionShape s = random_shape(rng, limits);
  s.kv_heads = 1;
  s.group_size = rng.pick({1, 2, 5, 12, 16, 17, 32, 64});
  s.head_dim = sizes.dim;
  s.head_dim_v = sizes.latent;
  s.default_scale = false;
  return s;
}

class MlaDecodeCase final : public Case {
 public:
  explicit MlaDecodeCase(Rng& rng) {
    if (rng.chance(0.35)) format_ = rng.chance(0.5) ? &fp8_ds_mla::kFormat : &fp8_ds_v4::kFormat;
    const Sizes sizes =
        format_ != nullptr
            ? Sizes{row_dim(*format_), format_->value_dim}
            : rng.pick({Sizes{576, 512}, {320, 256}, {72, 64}, {64, 64}, {40, 32}, {24, 8}});
    shape_ = latent_shape(rng, sizes);
    if (format_ != nullptr) shape_.dtype = DType::bf16;
    block_size_ = random_block_size(rng);
    planned_ = rng.chance(0.5);
    cache_dtype_ = format_ != nullptr ? DType::u8
                   : rng.chance(0.4)  ? rng.pick({DType::fp8_e4m3, DType::fp8_e5m2})
                                      : shape_.dtype;
    make_memory(rng);
    expected_ = oracle::mla_decode(args());
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    out_.reset();
    lse_.reset();
    MlaDecodeArgs a = args();
    if (planned_) {
      AttentionPlanInput in = plan_input(executor);
      in.isa = kernels.isa;
      in.arithmetic = kernels.arithmetic;
      const AttentionPlan plan = plan_mla_decode(in);
      Buffer workspace(plan.workspace_bytes);
      // Contents of a workspace are undefined: NaN must not reach the result.
      if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
      a.query_start_loc = a.seq_lens = {};
      mla_decode(a, plan, workspace.workspace(), executor);
    } else {
      mla_decode(a, &executor, kernels);
    }
    Outcome outcome;
    compare_written(outcome, "out", out_, expected_.out, expected_.out_bound);
    compare_written(outcome, "lse", lse_, expected_.lse, expected_.lse_bound);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(shape_.dtype, cache_dtype_, cache_dtype_);
  }

  std::string describe() const override {
    return fmt::format("{} block_size {} kv {}{}", shape_.describe(), block_size_,
                       format_ != nullptr ? format_->name : to_string(cache_dtype_),
                       planned_ ? " planned" : "");
  }

 private:
  void make_memory(Rng& rng) {
    query_start_ = shape_.query_start_loc();
    const std::int64_t tokens = query_start_.back();
    Layout rows;
    rows.padded = rng.chance(0.4);
    q_ = Storage(rng, shape_.dtype, {tokens, shape_.group_size, shape_.head_dim}, rows);
    q_.set_random(rng, shape_.query_magnitude);
    out_ = Storage(rng, shape_.dtype, {tokens, shape_.group_size, shape_.head_dim_v}, rows);
    lse_ = Storage(rng, DType::f32, {tokens, shape_.group_size});
    query_start_loc_ = int_storage(rng, query_start_);
    seq_lens_ = int_storage(rng, shape_.seq_lens);
    params_ = make_params(rng, shape_, head_values_);
    if (!params_.scale) params_.scale = 0.1F;
    if (is_fp8(cache_dtype_)) {
      kv_scale_ = Storage(rng, DType::f32, {1});
      kv_scale_.set(0, std::exp2(2.0 * rng.uniform() - 1.0));
    }
    RandomBlocks blocks(rng, shape_.seq_lens, shape_.hidden_keys(), block_size_, rows.padded);
    cache_ = format_ != nullptr ? coded_storage(rng, *format_, blocks.num_blocks, block_size_, rows)
                                : Storage(rng, cache_dtype_,
                                          {blocks.num_blocks, block_size_, shape_.head_dim}, rows);
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      for (std::int64_t j = shape_.first_visible_key(r);
           j < shape_.seq_lens[static_cast<std::size_t>(r)]; ++j)
        fill_row(rng, blocks.block(r, j), j % block_size_);
    }
    table_ = std::move(blocks.table);
    out_.freeze();
    lse_.freeze();
  }

  void fill_row(Rng& rng, std::int64_t block, std::int64_t offset) {
    if (format_ != nullptr) {
      set_random_coded_row(rng, cache_view(), *format_, block, offset);
    } else {
      cache_.set_random(rng, cache_.offset({block, offset, 0}), shape_.head_dim, 1.0);
    }
  }
  TensorView cache_view() const {
    return format_ != nullptr ? coded_view(cache_, *format_, block_size_) : cache_.view();
  }

  AttentionPlanInput plan_input(const Executor& executor) const {
    AttentionPlanInput in;
    in.query_start_loc = query_start_;
    in.seq_lens = shape_.seq_lens;
    in.num_q_heads = shape_.group_size;
    in.num_kv_heads = 1;
    in.head_dim_qk = shape_.head_dim;
    in.head_dim_v = shape_.head_dim_v;
    in.causal = shape_.causal;
    in.window_left = shape_.window_left;
    in.window_right = shape_.window_right;
    in.num_workers = executor.num_workers();
    return in;
  }

  MlaDecodeArgs args() const {
    MlaDecodeArgs a;
    a.q = q_.view();
    a.kv_cache = cache_view();
    a.block_table = table_.view();
    a.query_start_loc = query_start_loc_.view();
    a.seq_lens = seq_lens_.view();
    a.out = out_.view();
    a.lse = lse_.view();
    a.kv_scale = kv_scale_.view();
    a.params = params_;
    return a;
  }

  AttentionShape shape_;
  std::vector<std::int32_t> query_start_;
  const RowFormat* format_ = nullptr;
  bool planned_ = false;
  int block_size_ = 16;
  DType cache_dtype_ = DType::bf16;
  HeadValues head_values_;
  AttentionParams params_;
  Storage q_, cache_, kv_scale_, out_, lse_, query_start_loc_, seq_lens_, table_;
  oracle::Result expected_;
};

}  // namespace

Op op_mla_decode() {
  return {"mla_decode", true, [](Rng& rng) { return std::make_unique<MlaDecodeCase>(rng); }, true};
}

}  // namespace attend::conformance
