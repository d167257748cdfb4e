// SPDX-License-Identifier: Apache-2.0
// One layer: writes the new keys and values into the cache, then attends by the metadata's plan.
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "attend/ops/attention.h"
#include "attend/ops/cache.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/metadata.h"
#include "core/check.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN.make_impl";
constexpr std::string_view kForwardOp = "FLASH_ATTN.forward";

void check_kv_scales(const ImplConfig& c, bool allowed) {
  for (const auto& [name, scales] : {std::pair{"k_scale", &c.k_scale}, {"v_scale", &c.v_scale}}) {
    const check::Where where{kMakeOp, name};
    check::require(allowed || scales->empty(), where, "none: the cache is not fp8", scales->size());
    check::require(
        scales->empty() || scales->size() == 1 ||
            scales->size() == static_cast<std::size_t>(c.num_kv_heads),
        where, [&] { return fmt::format("none, 1 or {}, one a kv head", c.num_kv_heads); },
        scales->size());
    for (std::size_t h = 0; h < scales->size(); ++h) {
      const float x = (*scales)[h];
      check::require(std::isfinite(x) && x > 0.0F, where, "finite values > 0",
                     [&] { return fmt::format("{} at index {}", x, h); });
    }
  }
  check::require(
      c.k_scale.size() == c.v_scale.size(), {kMakeOp, "v_scale"},
      [&] { return fmt::format("{} values, as many as k_scale", c.k_scale.size()); },
      c.v_scale.size());
}

void check_config(const ImplConfig& c) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check_heads(kMakeOp, c.num_q_heads, c.num_kv_heads, c.head_size);
  check::require(is_float_compute(c.dtype), at("dtype"), "f32, f16 or bf16", to_string(c.dtype));
  const DType stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype).value_or(DType::u8);
  check::require(
      stored == c.dtype || (is_fp8(stored) && !is_encoder(c.attn_type)), at("kv_cache_dtype"),
      [&] {
        return fmt::format("auto or {}{}", to_string(c.dtype),
                           is_encoder(c.attn_type) ? "" : ", fp8_e4m3 or fp8_e5m2");
      },
      c.kv_cache_dtype);
  check_kv_scales(c, is_fp8(stored));
  if (c.scale) {
    check::require(std::isfinite(*c.scale) && *c.scale > 0.0F, at("scale"), "finite and > 0",
                   *c.scale);
  }
  check::require(std::isfinite(c.softcap) && c.softcap >= 0.0F, at("softcap"), "finite and >= 0",
                 c.softcap);
  if (c.sliding_window) {
    check::require(*c.sliding_window >= 1, at("sliding_window"), "unset or >= 1",
                   *c.sliding_window);
  }
  if (is_cross(c.attn_type)) {
    // Both depend on the place of a query among its keys, and cross attention has none.
    check::require(!c.sliding_window, at("sliding_window"), "unset for encoder_decoder",
                   c.sliding_window.value_or(0));
    check::require(c.alibi_slopes.empty(), at("alibi_slopes"), "none for encoder_decoder",
                   c.alibi_slopes.size());
  }
  check::require(!c.shares_kv_cache || !is_encoder(c.attn_type), at("shares_kv_cache"),
                 "false for an encoder, which has no cache", "true");
  const auto& slopes = c.alibi_slopes;
  check::require(
      slopes.empty() || slopes.size() == static_cast<std::size_t>(c.num_q_heads),
      at("alibi_slopes"),
      [&] { return fmt::format("none or {}, one a query head", c.num_q_heads); }, slopes.size());
  for (std::size_t h = 0; h < slopes.size(); ++h) {
    check::require(std::isfinite(slopes[h]), at("alibi_slopes"), "finite slopes",
                   [&] { return fmt::format("{} at index {}", slopes[h], h); });
  }
  check::require(
      c.sinks.empty() || c.sinks.size() == static_cast<std::size_t>(c.num_q_heads), at("sinks"),
      [&] { return fmt::format("none or {}, one a query head", c.num_q_heads); }, c.sinks.size());
  for (std::size_t h = 0; h < c.sinks.size(); ++h) {
    check::require(c.sinks[h] < std::numeric_limits<float>::infinity(), at("sinks"),
                   "finite or -infinity",
                   [&] { return fmt::format("{} at index {}", c.sinks[h], h); });
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
    check_config(config_);
    cache_dtype_ = resolve_kv_cache_dtype(config_.kv_cache_dtype, config_.dtype).value();
    const auto per_head = [&](std::vector<float>& scales) {
      const float one = scales.empty() ? 1.0F : scales[0];
      if (scales.size() < 2) scales.assign(static_cast<std::size_t>(config_.num_kv_heads), one);
    };
    per_head(config_.k_scale);
    per_head(config_.v_scale);
    if (config_.sliding_window) {
      window_left_ = *config_.sliding_window - 1;
      window_right_ = config_.attn_type == AttentionType::encoder_only ? window_left_ : 0;
    }
  }

  void forward(const ForwardArgs& args, const Metadata* metadata) const override {
    check_results(args);
    if (metadata == nullptr) {
      fill_profiling_output(args.output, args.lse);
      return;
    }
    const FlashAttnMetadata& m = checked(*metadata);
    check_tensors(args, m);

    Executor& executor = args.executor != nullptr ? *args.executor : default_executor();
    if (m.num_tokens == 0) {
      // A step may bring encoder rows and no query.
      if (m.num_new_keys > 0 && writes_cache(args, m)) {
        reshape_and_cache_flash(cache_args(args, m), &executor);
      }
      return;
    }
    const FlashAttnVarlenArgs attention = attention_args(args, m);
    if (!writes_cache(args, m)) {
      flash_attn_varlen(attention, *m.plan, args.workspace, executor);
      return;
    }
    // Nothing may be written if the attention's arguments are wrong: they are checked first.
    validate(attention, *m.plan, args.workspace, executor);
    reshape_and_cache_flash(cache_args(args, m), &executor);
    flash_attn_varlen(attention, *m.plan, args.workspace, executor);
  }

 private:
  bool writes_cache(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    return !is_encoder(m.attn_type) && !config_.shares_kv_cache && args.key.defined() &&
           !m.slot_mapping.empty();
  }

  /// The metadata, if it was made for layers like this one.
  const FlashAttnMetadata& checked(const Metadata& metadata) const {
    constexpr check::Where kWhere{kForwardOp, "metadata"};
    const auto* m = dynamic_cast<const FlashAttnMetadata*>(&metadata);
    check::require(m != nullptr, kWhere, "what a FLASH_ATTN builder made", "another back end's");
    check::require(
        m->attn_type == config_.attn_type, kWhere,
        [&] { return fmt::format("attention type {}", to_string(config_.attn_type)); },
        to_string(m->attn_type));
    const AttentionPlan& plan = *m->plan;
    const auto heads = [](int q, int kv, int size) {
      return fmt::format("{} query heads, {} kv heads, head_size {}", q, kv, size);
    };
    check::require(
        plan.num_q_heads == config_.num_q_heads && plan.num_kv_heads == config_.num_kv_heads &&
            plan.head_dim_qk == config_.head_size,
        kWhere, [&] { return heads(config_.num_q_heads, config_.num_kv_heads, config_.head_size); },
        [&] { return heads(plan.num_q_heads, plan.num_kv_heads, plan.head_dim_qk); });
    const auto window = [](int left, int right) {
      return fmt::format("window ({}, {})", left, right);
    };
    check::require(
        m->window_left == window_left_ && (m->window_right == window_right_ || m->all_causal),
        kWhere, [&] { return window(window_left_, window_right_); },
        [&] { return window(m->window_left, m->window_right); });
    return *m;
  }

  /// [>= num_tokens, heads, head_size] of the layer's dtype, last dimension contiguous.
  void check_rows(std::string_view argument, const ConstTensorView& t, int heads,
                  int num_tokens) const {
    const check::Where where{kForwardOp, argument};
    check::tensor(where, t, 3, {config_.dtype});
    check::shape(where, t, {-1, heads, config_.head_size});
    check::unit_last_stride(where, t);
    check::require(
        t.shape[0] >= num_tokens, where,
        [&] { return fmt::format("at least {} rows", num_tokens); }, [&] { return describe(t); });
  }

  /// What is written whatever the metadata says.
  void check_results(const ForwardArgs& args) const {
    check_rows("output", args.output, config_.num_q_heads, 0);
    check::distinct_elements({kForwardOp, "output"}, args.output);
    if (!args.lse.defined()) return;
    const check::Where where{kForwardOp, "lse"};
    check::tensor(where, args.lse, 2, {DType::f32});
    check::shape(where, args.lse, {args.output.shape[0], config_.num_q_heads});
    check::distinct_elements(where, args.lse);
    check::no_overlap(where, args.lse, "output", args.output);
  }

  void check_tensors(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    check_rows("output", args.output, config_.num_q_heads, m.num_tokens);
    check_rows("query", args.query, config_.num_q_heads, m.num_tokens);
    const bool encoder = is_encoder(m.attn_type);
    if (!config_.shares_kv_cache) check_new_keys(args, m);
    if (encoder) return;
    const check::Where where{kForwardOp, "kv_cache"};
    check::tensor(where, args.kv_cache, 5, {cache_dtype_});
    check::shape(where, args.kv_cache,
                 {2, -1, m.block_size, config_.num_kv_heads, config_.head_size});
    check::unit_last_stride(where, args.kv_cache);
    check::distinct_elements(where, args.kv_cache);
  }

  void check_new_keys(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    const bool encoder = is_encoder(m.attn_type);
    if (args.key.defined() != args.value.defined() ||
        (encoder && m.num_tokens > 0 && !args.key.defined())) {
      check::fail({kForwardOp, args.key.defined() ? "value" : "key"},
                  encoder ? "a tensor: an encoder reads this step's keys and values"
                          : "key and value, or neither",
                  "an undefined tensor");
    }
    if (args.key.defined()) {
      check_rows("key", args.key, config_.num_kv_heads, m.num_new_keys);
      check_rows("value", args.value, config_.num_kv_heads, m.num_new_keys);
    }
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
    if (is_fp8(cache_dtype_)) {
      a.k_descale = per_request(config_.k_scale, m.num_reqs);
      a.v_descale = per_request(config_.v_scale, m.num_reqs);
    }
    a.params.scale = config_.scale;
    a.params.causal = m.causal;
    a.params.window_left = m.window_left;
    a.params.window_right = m.window_right;
    a.params.softcap = config_.softcap;
    if (!config_.alibi_slopes.empty()) {
      a.params.alibi_slopes =
          ConstTensorView(config_.alibi_slopes.data(), DType::f32, {config_.num_q_heads});
      a.params.alibi_sqrt = config_.use_alibi_sqrt;
    }
    if (!config_.sinks.empty()) {
      a.params.sinks = ConstTensorView(config_.sinks.data(), DType::f32, {config_.num_q_heads});
      a.params.lse_includes_sink = config_.lse_includes_sink;
    }
    return a;
  }

  /// The same scales for every request.
  ConstTensorView per_request(const std::vector<float>& scales, int num_reqs) const {
    ConstTensorView view(scales.data(), DType::f32, {num_reqs, config_.num_kv_heads});
    view.strides[0] = 0;
    return view;
  }

  ReshapeAndCacheFlashArgs cache_args(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    ReshapeAndCacheFlashArgs a;
    a.key = args.key.slice(0, 0, m.num_new_keys);
    a.value = args.value.slice(0, 0, m.num_new_keys);
    a.key_cache = args.kv_cache.select(0, 0);
    a.value_cache = args.kv_cache.select(0, 1);
    a.slot_mapping = ConstTensorView(m.slot_mapping.data(), DType::i64, {m.num_new_keys});
    if (is_fp8(cache_dtype_)) {
      a.k_scale = ConstTensorView(config_.k_scale.data(), DType::f32, {config_.num_kv_heads});
      a.v_scale = ConstTensorView(config_.v_scale.data(), DType::f32, {config_.num_kv_heads});
    }
    return a;
  }

  ImplConfig config_;  ///< k_scale and v_scale as one value a kv head
  DType cache_dtype_ = DType::bf16;
  int window_left_ = -1;
  int window_right_ = -1;
};

}  // namespace

std::unique_ptr<Impl> make_impl(const ImplConfig& config) {
  return std::make_unique<FlashAttnImpl>(config);
}

}  // namespace attend::flash_attn
