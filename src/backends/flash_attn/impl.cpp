// SPDX-License-Identifier: Apache-2.0
// One layer: writes the new keys and values into the cache, then attends by the metadata's plan.
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "attend/ops/cache.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/metadata.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN.make_impl";
constexpr std::string_view kForwardOp = "FLASH_ATTN.forward";

[[noreturn]] void refuse(std::string_view argument, std::string_view expected,
                         std::string_view got) {
  throw InvalidArgument(kForwardOp, argument, expected, got);
}

std::string shown(const ConstTensorView& t) { return t.defined() ? describe(t) : "undefined"; }

void check(const ImplConfig& c) {
  check_attn_type(kMakeOp, c.attn_type);
  check_heads(kMakeOp, c.num_q_heads, c.num_kv_heads, c.head_size);
  if (!is_float_compute(c.dtype)) {
    throw InvalidArgument(kMakeOp, "dtype", "f32, f16 or bf16", std::string(to_string(c.dtype)));
  }
  if (resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype) != c.dtype) {
    throw InvalidArgument(kMakeOp, "kv_cache_dtype", fmt::format("auto or {}", to_string(c.dtype)),
                          c.kv_cache_dtype);
  }
  if (c.scale && !(std::isfinite(*c.scale) && *c.scale > 0.0F)) {
    throw InvalidArgument(kMakeOp, "scale", "finite and > 0", fmt::to_string(*c.scale));
  }
  if (!(std::isfinite(c.softcap) && c.softcap >= 0.0F)) {
    throw InvalidArgument(kMakeOp, "softcap", "finite and >= 0", fmt::to_string(c.softcap));
  }
  if (c.sliding_window && *c.sliding_window < 1) {
    throw InvalidArgument(kMakeOp, "sliding_window", "unset or >= 1",
                          fmt::to_string(*c.sliding_window));
  }
  if (!c.alibi_slopes.empty() && c.alibi_slopes.size() != static_cast<std::size_t>(c.num_q_heads)) {
    throw InvalidArgument(kMakeOp, "alibi_slopes",
                          fmt::format("empty or {} slopes, one a query head", c.num_q_heads),
                          fmt::format("{} slopes", c.alibi_slopes.size()));
  }
  for (std::size_t h = 0; h < c.alibi_slopes.size(); ++h) {
    if (!std::isfinite(c.alibi_slopes[h])) {
      throw InvalidArgument(kMakeOp, fmt::format("alibi_slopes[{}]", h), "finite",
                            fmt::to_string(c.alibi_slopes[h]));
    }
  }
}

/// Fills every row with what a row without keys gives. Runs once per layer at start-up.
void fill_profiling_output(const TensorView& output, const TensorView& lse) {
  const auto row_bytes = static_cast<std::size_t>(output.shape[2]) * size_of(output.dtype);
  for (std::int64_t t = 0; t < output.shape[0]; ++t) {
    for (std::int64_t h = 0; h < output.shape[1]; ++h) {
      std::memset(output.select(0, t).select(0, h).data, 0, row_bytes);
      if (lse.defined()) {
        *lse.select(0, t).select(0, h).as<float>() = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

class FlashAttnImpl final : public Impl {
 public:
  explicit FlashAttnImpl(const ImplConfig& config) : config_(config) {
    check(config_);
    if (config_.sliding_window) {
      window_left_ = *config_.sliding_window - 1;
      window_right_ = config_.attn_type == AttentionType::encoder_only ? window_left_ : 0;
    }
  }

  void forward(const ForwardArgs& args, const Metadata* metadata) const override {
    check_rows("output", args.output, config_.num_q_heads, 0);
    if (args.lse.defined()) check_lse(args);
    if (metadata == nullptr) {
      fill_profiling_output(args.output, args.lse);
      return;
    }
    const FlashAttnMetadata& m = checked(metadata);
    check_tensors(args, m);
    if (m.num_tokens == 0) return;

    Executor& executor = args.executor != nullptr ? *args.executor : default_executor();
    const FlashAttnVarlenArgs attention = attention_args(args, m);
    if (is_encoder(m.attn_type) || !args.key.defined() || m.slot_mapping.empty()) {
      flash_attn_varlen(attention, *m.plan, args.workspace, executor);
      return;
    }
    // Nothing may be written if the attention's arguments are wrong: they are checked first.
    validate(attention, *m.plan, args.workspace, executor);
    reshape_and_cache_flash(cache_args(args, m), &executor);
    flash_attn_varlen(attention, *m.plan, args.workspace, executor);
  }

 private:
  const FlashAttnMetadata& checked(const Metadata* metadata) const {
    const auto* m = dynamic_cast<const FlashAttnMetadata*>(metadata);
    if (m == nullptr) refuse("metadata", "what a FLASH_ATTN builder made", "another back end's");
    if (m->attn_type != config_.attn_type) {
      refuse("metadata", fmt::format("made for attention type {}", to_string(config_.attn_type)),
             to_string(m->attn_type));
    }
    const AttentionPlan& plan = *m->plan;
    if (plan.num_q_heads != config_.num_q_heads || plan.num_kv_heads != config_.num_kv_heads ||
        plan.head_dim_qk != config_.head_size) {
      refuse("metadata",
             fmt::format("made for {} query heads, {} kv heads, head_size {}", config_.num_q_heads,
                         config_.num_kv_heads, config_.head_size),
             fmt::format("{}, {}, {}", plan.num_q_heads, plan.num_kv_heads, plan.head_dim_qk));
    }
    if (m->window_left != window_left_ || (m->window_right != window_right_ && !m->all_causal)) {
      refuse("metadata", fmt::format("made for window ({}, {})", window_left_, window_right_),
             fmt::format("({}, {})", m->window_left, m->window_right));
    }
    return *m;
  }

  /// [>= num_tokens, heads, head_size] of the layer's dtype, rows contiguous.
  void check_rows(std::string_view argument, const ConstTensorView& t, int heads,
                  int num_tokens) const {
    const bool usable = t.rank == 3 && (t.defined() || t.numel() == 0) &&
                        t.dtype == config_.dtype && t.device.type == DeviceType::cpu &&
                        t.shape[0] >= num_tokens && t.shape[1] == heads &&
                        t.shape[2] == config_.head_size && t.strides[2] == 1;
    if (usable) return;
    refuse(argument,
           fmt::format("{} [>= {}, {}, {}] on the cpu, last dimension contiguous",
                       to_string(config_.dtype), num_tokens, heads, config_.head_size),
           shown(t));
  }

  void check_lse(const ForwardArgs& args) const {
    const TensorView& lse = args.lse;
    if (lse.rank == 2 && lse.dtype == DType::f32 && lse.device.type == DeviceType::cpu &&
        lse.shape[0] == args.output.shape[0] && lse.shape[1] == config_.num_q_heads) {
      return;
    }
    refuse("lse", fmt::format("f32 [{}, {}] on the cpu", args.output.shape[0], config_.num_q_heads),
           shown(lse));
  }

  void check_tensors(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    check_rows("output", args.output, config_.num_q_heads, m.num_tokens);
    check_rows("query", args.query, config_.num_q_heads, m.num_tokens);
    const bool encoder = is_encoder(m.attn_type);
    if (args.key.defined() != args.value.defined() || (encoder && !args.key.defined())) {
      refuse(args.key.defined() ? "value" : "key",
             encoder ? "given: an encoder reads this step's keys and values"
                     : "key and value both given or both undefined",
             "undefined");
    }
    if (args.key.defined()) {
      check_rows("key", args.key, config_.num_kv_heads, m.num_tokens);
      check_rows("value", args.value, config_.num_kv_heads, m.num_tokens);
    }
    if (!encoder) check_cache(args.kv_cache, m.block_size);
  }

  void check_cache(const TensorView& cache, int block_size) const {
    const bool usable = cache.defined() && cache.rank == 5 && cache.dtype == config_.dtype &&
                        cache.device.type == DeviceType::cpu && cache.shape[0] == 2 &&
                        cache.shape[1] >= 1 && cache.shape[2] == block_size &&
                        cache.shape[3] == config_.num_kv_heads &&
                        cache.shape[4] == config_.head_size && cache.strides[4] == 1;
    if (usable) return;
    refuse(
        "kv_cache",
        fmt::format("{} [2, num_blocks, {}, {}, {}] on the cpu, last dimension contiguous",
                    to_string(config_.dtype), block_size, config_.num_kv_heads, config_.head_size),
        shown(cache));
  }

  FlashAttnVarlenArgs attention_args(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    FlashAttnVarlenArgs a;
    a.q = args.query.slice(0, 0, m.num_tokens);
    a.out = args.output.slice(0, 0, m.num_tokens);
    if (args.lse.defined()) a.lse = args.lse.slice(0, 0, m.num_tokens);
    if (is_encoder(m.attn_type)) {
      a.k = args.key.slice(0, 0, m.num_tokens);
      a.v = args.value.slice(0, 0, m.num_tokens);
    } else {
      a.k = args.kv_cache.select(0, 0);
      a.v = args.kv_cache.select(0, 1);
      a.block_table = m.block_table;
    }
    a.params.scale = config_.scale;
    a.params.causal = m.causal;
    a.params.window_left = m.window_left;
    a.params.window_right = m.window_right;
    a.params.softcap = config_.softcap;
    if (!config_.alibi_slopes.empty()) {
      a.params.alibi_slopes =
          ConstTensorView(config_.alibi_slopes.data(), DType::f32, {config_.num_q_heads});
    }
    return a;
  }

  static ReshapeAndCacheFlashArgs cache_args(const ForwardArgs& args, const FlashAttnMetadata& m) {
    ReshapeAndCacheFlashArgs a;
    a.key = args.key.slice(0, 0, m.num_tokens);
    a.value = args.value.slice(0, 0, m.num_tokens);
    a.key_cache = args.kv_cache.select(0, 0);
    a.value_cache = args.kv_cache.select(0, 1);
    a.slot_mapping = ConstTensorView(m.slot_mapping.data(), DType::i64, {m.num_tokens});
    return a;
  }

  ImplConfig config_;
  int window_left_ = -1;
  int window_right_ = -1;
};

}  // namespace

std::unique_ptr<Impl> make_impl(const ImplConfig& config) {
  return std::make_unique<FlashAttnImpl>(config);
}

}  // namespace attend::flash_attn
