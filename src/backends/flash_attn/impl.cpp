// SPDX-License-Identifier: Apache-2.0
// One layer: writes the new keys and values into the cache, then attends by the metadata's plan.
#include <fmt/format.h>

#include <utility>

#include "attend/ops/attention.h"
#include "attend/ops/cache.h"
#include "attend/ops/int8_cache.h"
#include "backends/common/layer_checks.h"
#include "backends/common/profiling_output.h"
#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/impl_config.h"
#include "backends/flash_attn/int8_layer.h"
#include "backends/flash_attn/metadata.h"
#include "core/check.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kForwardOp = "FLASH_ATTN.forward";

class FlashAttnImpl final : public Impl {
 public:
  explicit FlashAttnImpl(const ImplConfig& config)
      : config_(config), stored_(check_config(config)) {
    spread_kv_scales(config_);
    if (config_.sliding_window) {
      window_left_ = *config_.sliding_window - 1;
      window_right_ = config_.attn_type == AttentionType::encoder_only ? window_left_ : 0;
    }
  }

  void forward(const ForwardArgs& args, const Metadata* metadata) const override {
    check_results(kForwardOp, args, config_, config_.num_q_heads);
    if (metadata == nullptr) {
      fill_profiling_output(args.output, args.lse);
      return;
    }
    const FlashAttnMetadata& m = checked(*metadata);
    check_tensors(args, m);

    Executor& executor = args.executor != nullptr ? *args.executor : default_executor();
    const bool writes = m.num_new_keys > 0 && writes_cache(args, m);
    if (is_int8_level(stored_.format)) {
      Int8Layer(config_, attention_params(config_, m), args, m).forward(writes, executor);
      return;
    }
    // A step may bring encoder rows and no query.
    if (m.num_tokens == 0) {
      if (writes) write_cache(args, m, executor);
      return;
    }
    const FlashAttnVarlenArgs attention = attention_args(args, m);
    if (writes) {
      // Nothing may be written if the attention's arguments are wrong: they are checked first.
      validate(attention, *m.plan, args.workspace, executor);
      write_cache(args, m, executor);
    }
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
        m->format == stored_.format, kWhere,
        [&] { return fmt::format("a {} cache", to_string(stored_.format)); }, to_string(m->format));
    check_layer(kWhere, *m, config_, window_left_, window_right_);
    return *m;
  }

  void check_tensors(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    check_rows({kForwardOp, "output"}, args.output, config_, config_.num_q_heads, m.num_tokens);
    check_rows({kForwardOp, "query"}, args.query, config_, config_.num_q_heads, m.num_tokens);
    const bool encoder = is_encoder(m.attn_type);
    if (!config_.shares_kv_cache) check_new_keys(args, m);
    if (encoder) return;
    const check::Where where{kForwardOp, "kv_cache"};
    check::tensor(where, args.kv_cache, 5, {stored_.dtype});
    if (is_int8_level(stored_.format)) {
      const int planes = stored_.format == KvFormat::int8_level2 ? 3 : 2;
      check::shape(where, args.kv_cache,
                   {planes, -1, config_.num_kv_heads, m.block_size, config_.head_size});
    } else {
      check::shape(where, args.kv_cache,
                   {2, -1, m.block_size, config_.num_kv_heads, config_.head_size});
    }
    check::unit_last_stride(where, args.kv_cache);
    check::distinct_elements(where, args.kv_cache);
    check_scale_cache(args, m);
  }

  void check_scale_cache(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    const check::Where where{kForwardOp, "kv_scale_cache"};
    const TensorView& scales = args.kv_scale_cache;
    if (stored_.format == KvFormat::plain) {
      check::require(!scales.defined(), where, "undefined: the cache has no scales", "a tensor");
      return;
    }
    const std::int64_t blocks = args.kv_cache.shape[1];
    if (is_int8_level(stored_.format)) {
      check::tensor(where, scales, 3, {DType::f32});
      check::shape(where, scales, {blocks, config_.num_kv_heads, m.block_size});
    } else {
      check::tensor(where, scales, 4, {DType::f32});
      check::shape(where, scales, {2, blocks, m.block_size, config_.num_kv_heads});
    }
    check::distinct_elements(where, scales);
    for (const auto& [name, t] :
         {std::pair<const char*, ConstTensorView>{"kv_cache", args.kv_cache},
          {"output", args.output},
          {"lse", args.lse}}) {
      if (t.defined()) check::no_overlap(where, scales, name, t);
    }
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
      check_rows({kForwardOp, "key"}, args.key, config_, config_.num_kv_heads, m.num_new_keys);
      check_rows({kForwardOp, "value"}, args.value, config_, config_.num_kv_heads, m.num_new_keys);
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
    if (is_fp8(stored_.dtype)) {
      a.k_descale = per_request(config_.k_scale, m.num_reqs);
      a.v_descale = per_request(config_.v_scale, m.num_reqs);
    }
    if (stored_.format == KvFormat::int8_per_token_head) {
      a.k_token_scale = args.kv_scale_cache.select(0, 0);
      a.v_token_scale = args.kv_scale_cache.select(0, 1);
    }
    a.params = attention_params(config_, m);
    return a;
  }

  void write_cache(const ForwardArgs& args, const FlashAttnMetadata& m, Executor& executor) const {
    if (stored_.format != KvFormat::int8_per_token_head) {
      reshape_and_cache_flash(cache_args(args, m), &executor);
      return;
    }
    ReshapeAndCachePerTokenHeadArgs a;
    a.key = args.key.slice(0, 0, m.num_new_keys);
    a.value = args.value.slice(0, 0, m.num_new_keys);
    a.key_cache = args.kv_cache.select(0, 0);
    a.value_cache = args.kv_cache.select(0, 1);
    a.key_scale_cache = args.kv_scale_cache.select(0, 0);
    a.value_scale_cache = args.kv_scale_cache.select(0, 1);
    a.slot_mapping = ConstTensorView(m.slot_mapping.data(), DType::i64, {m.num_new_keys});
    reshape_and_cache_int8_per_token_head(a, &executor);
  }

  ReshapeAndCacheFlashArgs cache_args(const ForwardArgs& args, const FlashAttnMetadata& m) const {
    ReshapeAndCacheFlashArgs a;
    a.key = args.key.slice(0, 0, m.num_new_keys);
    a.value = args.value.slice(0, 0, m.num_new_keys);
    a.key_cache = args.kv_cache.select(0, 0);
    a.value_cache = args.kv_cache.select(0, 1);
    a.slot_mapping = ConstTensorView(m.slot_mapping.data(), DType::i64, {m.num_new_keys});
    if (is_fp8(stored_.dtype)) {
      a.k_scale = per_kv_head(config_.k_scale);
      a.v_scale = per_kv_head(config_.v_scale);
    }
    return a;
  }

  ImplConfig config_;  ///< k_scale and v_scale as one value a kv head
  StoredKv stored_;
  int window_left_ = -1;
  int window_right_ = -1;
};

}  // namespace

std::unique_ptr<Impl> make_impl(const ImplConfig& config) {
  return std::make_unique<FlashAttnImpl>(config);
}

}  // namespace attend::flash_attn
