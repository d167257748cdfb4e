// SPDX-License-Identifier: Apache-2.0
// One layer: writes the new keys and values into the cache, then attends by the metadata's plan to
// what the cache holds, or to the rows of prompts that leave keys out of it.
#include <fmt/format.h>

#include "attend/ops/cache.h"
#include "attend/ops/differential_cache.h"
#include "backends/common/layer_checks.h"
#include "backends/common/profiling_output.h"
#include "backends/differential/differential.h"
#include "backends/differential/impl_config.h"
#include "backends/differential/metadata.h"
#include "core/check.h"

namespace attend::differential {
namespace {

constexpr std::string_view kForwardOp = "DIFFERENTIAL_FLASH_ATTN.forward";

constexpr check::Where at(std::string_view argument) { return {kForwardOp, argument}; }

class DifferentialImpl final : public Impl {
 public:
  explicit DifferentialImpl(const ImplConfig& config)
      : config_(config),
        stored_(check_config(config)),
        variant_(config.differential->variant),
        combine_(make_combine(config_)) {
    spread_kv_scales(config_);
    if (!config_.sliding_window) return;
    window_left_ = *config_.sliding_window - 1;
    window_right_ = 0;
  }

  void forward(const ForwardArgs& args, const Metadata* metadata) const override {
    check_results(kForwardOp, args, config_, num_out_heads());
    if (metadata == nullptr) {
      fill_profiling_output(args.output, args.lse);
      return;
    }
    const DifferentialMetadata& m = checked(*metadata);
    check_tensors(args, m);
    const bool reads_rows = checked_source(args, m);
    if (m.num_tokens == 0) return;

    Executor& executor = args.executor != nullptr ? *args.executor : default_executor();
    const DifferentialAttentionArgs attention = attention_args(args, m, reads_rows);
    if (has_cache(args) && has_keys(args) && !m.slot_mapping.empty()) {
      // Nothing may be written if the attention's arguments are wrong: they are checked first.
      validate(attention, *m.plan, args.workspace, executor);
      write_cache(args, m, executor);
    }
    differential_attention(attention, *m.plan, args.workspace, executor);
  }

 private:
  bool has_branches() const noexcept { return variant_ == DifferentialVariant::v1; }
  int num_out_heads() const noexcept {
    return has_branches() ? config_.num_q_heads : config_.num_q_heads / 2;
  }
  /// Dimension of the cache that counts blocks.
  int block_dim() const noexcept { return has_branches() ? 2 : 1; }
  /// The layer is given keys and values of its own, which it writes or reads.
  bool has_keys(const ForwardArgs& args) const noexcept {
    return !config_.shares_kv_cache && args.key.defined();
  }
  bool has_cache(const ForwardArgs& args) const noexcept {
    return args.kv_cache.defined() && args.kv_cache.shape[block_dim()] > 0;
  }

  /// The metadata, if it was made for layers like this one.
  const DifferentialMetadata& checked(const Metadata& metadata) const {
    constexpr check::Where kWhere = at("metadata");
    const auto* m = dynamic_cast<const DifferentialMetadata*>(&metadata);
    check::require(m != nullptr, kWhere, "what a DIFFERENTIAL_FLASH_ATTN builder made",
                   "another back end's");
    const auto name = [](DifferentialVariant v) {
      return v == DifferentialVariant::v1 ? "variant v1" : "variant v2";
    };
    check::require(m->variant == variant_, kWhere, name(variant_), name(m->variant));
    check_layer(kWhere, *m, config_, window_left_, window_right_);
    return *m;
  }

  void check_tensors(const ForwardArgs& args, const DifferentialMetadata& m) const {
    check_rows(at("output"), args.output, config_, num_out_heads(), m.num_tokens);
    check_rows(at("query"), args.query, config_, config_.num_q_heads, m.num_tokens);
    if (!config_.shares_kv_cache) check_new_keys(args, m);
    if (args.kv_cache.defined()) check_cache(args.kv_cache, m);
    check::require(!args.kv_scale_cache.defined(), at("kv_scale_cache"),
                   "undefined: the cache has no scales", "a tensor");
    check::require(args.token_lambda.defined() != has_branches(), at("token_lambda"),
                   has_branches() ? "undefined: variant v1 has one lambda for all tokens"
                                  : "a tensor: variant v2 has a lambda for each token and pair",
                   has_branches() ? "a tensor" : "an undefined tensor");
    if (!args.token_lambda.defined()) return;
    check::tensor(at("token_lambda"), args.token_lambda, 2, {DType::f32, DType::f16, DType::bf16});
    check::shape(at("token_lambda"), args.token_lambda, {-1, config_.num_q_heads / 2});
    check::require(
        args.token_lambda.shape[0] >= m.num_tokens, at("token_lambda"),
        [&] { return fmt::format("at least {} rows", m.num_tokens); },
        [&] { return describe(args.token_lambda); });
  }

  void check_new_keys(const ForwardArgs& args, const DifferentialMetadata& m) const {
    check::require(args.key.defined() == args.value.defined(),
                   at(args.key.defined() ? "value" : "key"), "key and value, or neither",
                   "an undefined tensor");
    if (!args.key.defined()) return;
    check_rows(at("key"), args.key, config_, config_.num_kv_heads, m.num_new_keys);
    check_rows(at("value"), args.value, config_, config_.num_kv_heads, m.num_new_keys);
  }

  /// A layer that shares a cache is given that of its producer, which must be of the same shape.
  void check_cache(const TensorView& cache, const DifferentialMetadata& m) const {
    const int pairs = config_.num_kv_heads / 2;
    check::tensor(at("kv_cache"), cache, has_branches() ? 6 : 5, {stored_});
    if (has_branches()) {
      check::shape(at("kv_cache"), cache, {2, 2, -1, m.block_size, pairs, config_.head_size});
    } else {
      check::shape(at("kv_cache"), cache,
                   {2, -1, m.block_size, config_.num_kv_heads, config_.head_size});
    }
    check::unit_last_stride(at("kv_cache"), cache);
    check::distinct_elements(at("kv_cache"), cache);
  }

  /// Whether the batch attends to rows of key and value instead of the cache: prompts that leave
  /// keys out of it because no later query sees them, or profiling without a cache.
  bool checked_source(const ForwardArgs& args, const DifferentialMetadata& m) const {
    if (config_.shares_kv_cache) {
      check::require(has_cache(args), at("kv_cache"),
                     "the cache that an earlier layer of this step wrote (shares_kv_cache)",
                     "no cache");
    }
    const std::int64_t left_out = has_keys(args) ? m.first_without_slot() : -1;
    const bool prompts = has_keys(args) && m.is_pure_prefill();
    check::require(has_cache(args) || prompts, at("kv_cache"),
                   "a cache (only whole prompts with key and value run without one)", "no cache");
    if (left_out >= 0 && has_cache(args)) {
      check::require(
          prompts && !is_fp8(stored_), at("slot_mapping"),
          prompts ? "a slot for each token: rows are attended to as the fp8 cache holds them"
                  : "a slot for each token of a batch with computed tokens: its keys are read from "
                    "the cache",
          [&] { return fmt::format("-1 at index {}", left_out); });
    }
    const bool reads_rows =
        prompts && (left_out >= 0 || !has_cache(args) || !m.block_table.defined());
    check::require(reads_rows || m.num_tokens == 0 || m.block_table.defined(), at("metadata"),
                   "metadata with a block table (only whole prompts with key and value have none)",
                   "an undefined block table");
    return reads_rows;
  }

  DifferentialAttentionArgs attention_args(const ForwardArgs& args, const DifferentialMetadata& m,
                                           bool reads_rows) const {
    DifferentialAttentionArgs a;
    a.q = args.query.slice(0, 0, m.num_tokens);
    a.out = args.output.slice(0, 0, m.num_tokens);
    if (args.lse.defined()) a.lse = args.lse.slice(0, 0, m.num_tokens);
    if (reads_rows) {
      a.k = args.key.slice(0, 0, m.num_tokens);
      a.v = args.value.slice(0, 0, m.num_tokens);
    } else {
      const int planes = has_branches() ? 1 : 0;
      a.k = args.kv_cache.select(planes, 0);
      a.v = args.kv_cache.select(planes, 1);
      a.block_table = m.block_table;
      if (is_fp8(stored_)) {
        a.k_descale = per_request(config_.k_scale, m.num_reqs);
        a.v_descale = per_request(config_.v_scale, m.num_reqs);
      }
    }
    a.variant = variant_;
    a.pairing = config_.differential->pairing;
    a.combine = combine_;
    if (args.token_lambda.defined())
      a.combine.token_lambda = args.token_lambda.slice(0, 0, m.num_tokens);
    a.params = attention_params(config_, m);
    return a;
  }

  void write_cache(const ForwardArgs& args, const DifferentialMetadata& m,
                   Executor& executor) const {
    const auto write = [&](auto a) {
      a.key = args.key.slice(0, 0, m.num_new_keys);
      a.value = args.value.slice(0, 0, m.num_new_keys);
      a.slot_mapping = ConstTensorView(m.slot_mapping.data(), DType::i64, {m.num_new_keys});
      if (is_fp8(stored_)) {
        a.k_scale = per_kv_head(config_.k_scale);
        a.v_scale = per_kv_head(config_.v_scale);
      }
      return a;
    };
    if (has_branches()) {
      DifferentialReshapeAndCacheArgs a;
      a.kv_cache = args.kv_cache;
      a.pairing = config_.differential->pairing;
      differential_reshape_and_cache(write(a), &executor);
    } else {
      ReshapeAndCacheFlashArgs a;
      a.key_cache = args.kv_cache.select(0, 0);
      a.value_cache = args.kv_cache.select(0, 1);
      reshape_and_cache_flash(write(a), &executor);
    }
  }

  ImplConfig config_;  ///< k_scale and v_scale as one value a kv head
  DType stored_;
  DifferentialVariant variant_;
  DifferentialCombine combine_;  ///< views of config_
  int window_left_ = -1;
  int window_right_ = -1;
};

}  // namespace

std::unique_ptr<Impl> make_impl(const ImplConfig& config) {
  return std::make_unique<DifferentialImpl>(config);
}

}  // namespace attend::differential
