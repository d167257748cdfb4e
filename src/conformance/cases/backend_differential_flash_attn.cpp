// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "attend/backend/selector.h"
#include "attend/oracle/differential.h"
#include "conformance/attention_shape.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

constexpr const char* kDifferentialBackend = "DIFFERENTIAL_FLASH_ATTN";

/// One layer of a step: builder, impl and cache, as an engine drives them.
class DifferentialBackendCase final : public Case {
 public:
  explicit DifferentialBackendCase(Rng& rng) : backend_(find_backend(kDifferentialBackend)) {
    make_shape(rng);
    make_layer(rng);
    make_rows(rng);
    make_cache(rng);
    make_batch(rng);
    write_new_rows();
    expected_ = oracle::differential_attention(oracle_args());
    poison_new_rows();
    for (Storage* s : {&output_, &lse_, &cache_}) s->freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    for (Storage* s : {&output_, &lse_, &cache_}) s->reset();
    BuilderConfig config = builder_config_;
    config.arithmetic = kernels.arithmetic;
    config.num_workers = executor.num_workers();
    const auto metadata = backend_.make_builder(config)->build(0, batch_);
    Buffer workspace(metadata->workspace_bytes());
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    ForwardArgs args;
    args.query = query_.view();
    if (!keys_in_cache_) {
      args.key = key_.view();
      args.value = value_.view();
    }
    args.token_lambda = token_lambda_.view();
    args.kv_cache = cache_.view();
    args.output = output_.view();
    args.lse = lse_.view();
    args.workspace = workspace.workspace();
    args.executor = &executor;
    backend_.make_impl(impl_config_)->forward(args, metadata.get());

    Outcome outcome;
    compare_rows(outcome, "output", output_, expected_.out, expected_.out_bound);
    compare_rows(outcome, "lse", lse_, expected_.lse, expected_.lse_bound);
    for_written_elements([&](double x, std::int64_t to) { cache_.expect_value(to, x); });
    expect_undamaged(outcome, "kv_cache", cache_);
    return outcome;
  }

  std::string describe() const override {
    std::string text = fmt::format(
        "{} {} {}{} block_size {} {} cache", is_v1() ? "v1" : "v2",
        layer().pairing == HeadPairing::halves ? "halves" : "interleaved", shape_.describe(),
        layer().norm ? " norm" : "", spec_.block_size, to_string(spec_.dtype));
    if (keys_in_cache_) text += " keys already in the cache";
    if (leaves_out_) text += " prompts that leave keys out";
    return text;
  }

 private:
  bool is_v1() const noexcept { return layer().variant == DifferentialVariant::v1; }
  const DifferentialLayerConfig& layer() const { return *impl_config_.differential; }
  int num_tokens() const { return shape_.query_start_loc().back(); }
  std::int32_t first_new_key(int request) const {
    const auto r = static_cast<std::size_t>(request);
    return shape_.seq_lens[r] - shape_.query_lens[r];
  }

  void make_shape(Rng& rng) {
    ShapeLimits limits;
    limits.keys_cover_queries = limits.same_head_dims = true;
    limits.products = 500'000;
    shape_ = random_shape(rng, limits);
    const bool v1 = rng.chance(0.75);
    shape_.kv_heads = 2 * rng.range(1, 2);
    shape_.group_size = v1 ? rng.pick({1, 2, 3}) : rng.pick({2, 4});
    impl_config_.differential.emplace();
    impl_config_.differential->variant = v1 ? DifferentialVariant::v1 : DifferentialVariant::v2;
    if (rng.chance(0.3)) {
      shape_.seq_lens = shape_.query_lens;  // whole prompts
      leaves_out_ = rng.chance(0.5);
    }
    if (shape_.window_left >= 0) impl_config_.sliding_window = shape_.window_left + 1;
    shape_.window_right = shape_.window_left >= 0 ? 0 : -1;
    if (shape_.alibi != AlibiSlopes::none) shape_.alibi = AlibiSlopes::per_head;
    keys_in_cache_ = !leaves_out_ && rng.chance(0.2);
  }

  static std::vector<float> random_values(Rng& rng, int count, double magnitude) {
    std::vector<float> v(static_cast<std::size_t>(count));
    for (float& x : v) x = static_cast<float>(magnitude * (2.0 * rng.uniform() - 1.0));
    return v;
  }

  void make_layer(Rng& rng) {
    params_ = make_params(rng, shape_, head_values_);
    ImplConfig& c = impl_config_;
    c.num_q_heads = shape_.q_heads();
    c.num_kv_heads = shape_.kv_heads;
    c.head_size = shape_.head_dim;
    c.scale = params_.scale;
    c.softcap = params_.softcap;
    const auto per_head = [&](const ConstTensorView& t, std::vector<float>& to) {
      if (t.defined()) to.assign(t.as<float>(), t.as<float>() + shape_.q_heads());
    };
    per_head(params_.alibi_slopes, c.alibi_slopes);
    c.use_alibi_sqrt = params_.alibi_sqrt;
    per_head(params_.sinks, c.sinks);
    c.lse_includes_sink = params_.lse_includes_sink;
    c.dtype = shape_.dtype;
    DifferentialLayerConfig& d = *c.differential;
    d.norm = is_v1() && rng.chance(0.8);
    if (!is_v1()) return;
    d.pairing = rng.pick({HeadPairing::interleaved, HeadPairing::halves});
    for (auto* v : {&d.lambda_q1, &d.lambda_k1, &d.lambda_q2, &d.lambda_k2})
      *v = random_values(rng, shape_.head_dim, 0.2);
    d.lambda_init = differential_lambda_init(rng.range(0, 40));
    if (d.norm && rng.chance(0.6)) d.norm_weight = random_values(rng, 2 * shape_.head_dim, 2.0);
  }

  void make_rows(Rng& rng) {
    Layout rows;
    rows.padded = rng.chance(0.4);
    const std::int64_t tokens = num_tokens() + (rng.chance(0.3) ? rng.range(1, 9) : 0);
    const int heads = shape_.q_heads(), kv_heads = shape_.kv_heads, dim = shape_.head_dim;
    query_ = Storage(rng, shape_.dtype, {tokens, heads, dim}, rows);
    output_ = Storage(rng, shape_.dtype, {tokens, is_v1() ? heads : heads / 2, dim}, rows);
    lse_ = Storage(rng, DType::f32, {tokens, heads}, rows);
    key_ = Storage(rng, shape_.dtype, {tokens, kv_heads, dim}, rows);
    value_ = Storage(rng, shape_.dtype, {tokens, kv_heads, dim}, rows);
    for (int t = 0; t < num_tokens(); ++t) {
      for (int h = 0; h < heads; ++h)
        query_.set_random(rng, query_.offset({t, h, 0}), dim, shape_.query_magnitude);
      for (int h = 0; h < kv_heads; ++h) {
        key_.set_random(rng, key_.offset({t, h, 0}), dim, 1.0);
        value_.set_random(rng, value_.offset({t, h, 0}), dim, shape_.value_magnitude);
      }
    }
    if (is_v1()) return;
    token_lambda_ = Storage(rng, rng.pick({DType::f32, shape_.dtype}), {tokens, heads / 2}, rows);
    for (int t = 0; t < num_tokens(); ++t)
      token_lambda_.set_random(rng, token_lambda_.offset({t, 0}), heads / 2, 2.0);
  }

  void make_cache(Rng& rng) {
    spec_.block_size = rng.pick({16, 16, 32, 48, 64, 256});
    spec_.num_kv_heads = shape_.kv_heads;
    spec_.head_size = shape_.head_dim;
    spec_.dtype = shape_.dtype;
    if (!leaves_out_ && rng.chance(0.3)) choose_fp8(rng);
    impl_config_.kv_cache_dtype = to_string(spec_.dtype);
    std::vector<std::int32_t> untouched = shape_.hidden_keys();
    for (std::size_t r = 0; r < untouched.size(); ++r)
      untouched[r] = std::min(untouched[r], first_new_key(static_cast<int>(r)));
    blocks_.emplace(rng, shape_.seq_lens, untouched, spec_.block_size, false);
    spec_.num_blocks = blocks_->num_blocks;
    cache_ = Storage(rng, spec_.dtype,
                     is_v1() ? backend_.kv_cache_shape(spec_) : flash_attn_cache_shape(spec_),
                     random_layout(rng));
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      for (std::int64_t j = shape_.first_visible_key(r); j < first_new_key(r); ++j) {
        for (int h = 0; h < shape_.kv_heads; ++h) {
          cache_.set_random(rng, cache_offset(0, r, j, h), shape_.head_dim, 1.0);
          cache_.set_random(rng, cache_offset(1, r, j, h), shape_.head_dim, shape_.value_magnitude);
        }
      }
    }
  }

  /// NHD or HND, alone or among other layers.
  Layout random_layout(Rng& rng) const {
    const KvLayout layout = rng.pick({KvLayout::nhd, KvLayout::hnd});
    const bool layers = is_v1() && rng.chance(0.4);
    Layout physical;
    physical.order = is_v1() ? backend_.kv_cache_stride_order(layout, layers, spec_.format)
                             : flash_attn_stride_order(layout, false);
    if (!layers) return physical;
    std::erase(physical.order, 0);  // the layers, which then lie between the blocks of this one
    for (int& dim : physical.order) --dim;
    physical.outer_gap =
        std::int64_t{3} * 2 * spec_.block_size * spec_.num_kv_heads * spec_.head_size;
    return physical;
  }

  /// Scales are powers of two, so that dividing by one is exact and the oracle can encode.
  void choose_fp8(Rng& rng) {
    spec_.dtype = rng.pick({DType::fp8_e4m3, DType::fp8_e5m2});
    for (int h = 0; h < shape_.kv_heads; ++h) {
      impl_config_.k_scale.push_back(static_cast<float>(std::ldexp(1.0, rng.range(-3, 3))));
      impl_config_.v_scale.push_back(static_cast<float>(std::ldexp(1.0, rng.range(-3, 3))));
    }
  }
  double cache_scale(int plane, int head) const {
    const std::vector<float>& scales = plane == 0 ? impl_config_.k_scale : impl_config_.v_scale;
    return scales.empty() ? 1.0 : scales[static_cast<std::size_t>(head)];
  }

  /// Offset of key (plane 0) or value (plane 1) row j of a request, by the head of the model.
  std::int64_t cache_offset(int plane, int request, std::int64_t j, int head) const {
    const std::int64_t block = blocks_->block(request, j), slot = j % spec_.block_size;
    if (!is_v1()) return cache_.offset({plane, block, slot, head, 0});
    const int pairs = shape_.kv_heads / 2;
    const bool halves = layer().pairing == HeadPairing::halves;
    return cache_.offset({halves ? head / pairs : head % 2, plane, block, slot,
                          halves ? head % pairs : head / 2, 0});
  }

  void make_batch(Rng& rng) {
    batch_.query_start_loc = shape_.query_start_loc();
    batch_.seq_lens = shape_.seq_lens;
    batch_.num_reqs = shape_.num_reqs();
    batch_.num_tokens = num_tokens();
    batch_.causal = shape_.causal;
    batch_.block_table = blocks_->table.view();
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      batch_.max_query_len = std::max(batch_.max_query_len, shape_.query_lens[i]);
      batch_.max_seq_len = std::max(batch_.max_seq_len, batch_.seq_lens[i]);
      for (std::int64_t j = first_new_key(r); j < shape_.seq_lens[i]; ++j) {
        const bool out = leaves_out_ && rng.chance(0.5);
        batch_.slot_mapping.push_back(
            out ? -1 : blocks_->block(r, j) * spec_.block_size + j % spec_.block_size);
      }
    }
    builder_config_.num_q_heads = shape_.q_heads();
    builder_config_.cache = spec_;
    builder_config_.window_left = shape_.window_left;
    builder_config_.window_right = shape_.window_right;
    builder_config_.differential = DifferentialBuilderConfig{layer().variant};
  }

  /// Calls `visit(value to store, element of the cache)` for this step's rows. `all`: also for
  /// those without a slot.
  template <typename Visit>
  void for_new_elements(bool all, const Visit& visit) {
    std::int64_t token = 0;
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      const std::int64_t end = shape_.seq_lens[static_cast<std::size_t>(r)];
      for (std::int64_t j = first_new_key(r); j < end; ++j, ++token) {
        if (!all && batch_.slot_mapping[static_cast<std::size_t>(token)] < 0) continue;
        for (int h = 0; h < shape_.kv_heads; ++h) {
          for (int plane = 0; plane < 2; ++plane) {
            const Storage& rows = plane == 0 ? key_ : value_;
            const std::int64_t from = rows.offset({token, h, 0});
            const std::int64_t to = cache_offset(plane, r, j, h);
            for (int d = 0; d < shape_.head_dim; ++d)
              visit(rows.get(from + d) / cache_scale(plane, h), to + d);
          }
        }
      }
    }
  }
  template <typename Visit>
  void for_written_elements(const Visit& visit) {
    if (!keys_in_cache_) for_new_elements(false, visit);
  }
  void write_new_rows() {
    for_new_elements(true, [&](double x, std::int64_t to) { cache_.set(to, x); });
  }
  void poison_new_rows() {
    if (keys_in_cache_) return;
    for_new_elements(true, [&](double, std::int64_t to) {
      cache_.set(to, std::numeric_limits<double>::quiet_NaN());
    });
  }

  /// The whole batch, over the cache with this step's rows in it.
  DifferentialAttentionArgs oracle_args() const {
    const DifferentialLayerConfig& d = layer();
    const auto view = [](const std::vector<float>& v) {
      return ConstTensorView(v.data(), DType::f32, {static_cast<std::int64_t>(v.size())});
    };
    const auto lens = [](const std::vector<std::int32_t>& v) {
      return ConstTensorView(v.data(), DType::i32, {static_cast<std::int64_t>(v.size())});
    };
    const int planes = is_v1() ? 1 : 0;
    DifferentialAttentionArgs a;
    a.q = query_.view().slice(0, 0, num_tokens());
    a.k = cache_.view().select(planes, 0);
    a.v = cache_.view().select(planes, 1);
    a.out = output_.view().slice(0, 0, num_tokens());
    a.lse = lse_.view().slice(0, 0, num_tokens());
    a.query_start_loc = lens(batch_.query_start_loc);
    a.seq_lens = lens(batch_.seq_lens);
    a.block_table = batch_.block_table;
    if (is_fp8(spec_.dtype)) {
      const auto descale = [&](const std::vector<float>& scales) {
        ConstTensorView t(scales.data(), DType::f32, {shape_.num_reqs(), shape_.kv_heads});
        t.strides[0] = 0;
        return t;
      };
      a.k_descale = descale(impl_config_.k_scale);
      a.v_descale = descale(impl_config_.v_scale);
    }
    a.variant = d.variant;
    a.pairing = d.pairing;
    a.params = params_;
    a.combine.norm = d.norm;
    if (!is_v1()) {
      a.combine.token_lambda = token_lambda_.view().slice(0, 0, num_tokens());
      return a;
    }
    a.combine.lambda = differential_lambda({view(d.lambda_q1), view(d.lambda_k1), view(d.lambda_q2),
                                            view(d.lambda_k2), d.lambda_init, d.lambda_rounding});
    if (!d.norm_weight.empty()) a.combine.norm_weight = view(d.norm_weight);
    a.combine.out_scale = static_cast<float>(1.0 - d.lambda_init);
    return a;
  }

  /// The batch's rows; padding rows behind them must stay as they were.
  static void compare_rows(Outcome& outcome, std::string_view name, Storage& got,
                           const std::vector<double>& expected, const std::vector<double>& bound) {
    const std::vector<std::int64_t> offsets = got.offsets();
    for (std::size_t i = 0; i < expected.size(); ++i) {
      compare(outcome, got.get(offsets[i]), expected[i], bound[i],
              [&] { return fmt::format("{} element {}", name, i); });
      got.accept(offsets[i]);
    }
    expect_undamaged(outcome, name, got);
  }

  const Backend& backend_;
  AttentionShape shape_;
  ImplConfig impl_config_;
  BuilderConfig builder_config_;
  bool keys_in_cache_ = false;
  bool leaves_out_ = false;  ///< whole prompts, some tokens of which get no slot
  AttentionParams params_;
  HeadValues head_values_;
  Storage query_, output_, lse_, key_, value_, token_lambda_, cache_;
  KvCacheSpec spec_;
  std::optional<RandomBlocks> blocks_;
  CommonMetadata batch_;
  oracle::Result expected_;
};

}  // namespace

// No choice of arithmetic: there are exact kernels alone.
Op op_backend_differential_flash_attn() {
  return {backend_op_name(kDifferentialBackend), false,
          [](Rng& rng) { return std::make_unique<DifferentialBackendCase>(rng); }};
}

}  // namespace attend::conformance
