// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "attend/backend/selector.h"
#include "attend/oracle/attention.h"
#include "conformance/attention_shape.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

constexpr const char* kFlashAttnBackend = "FLASH_ATTN";

ShapeLimits backend_limits() {
  ShapeLimits limits;
  limits.keys_cover_queries = true;
  limits.same_head_dims = true;
  return limits;
}

/// One layer of a step: builder, impl and cache, as an engine drives them.
class FlashAttnBackendCase final : public Case {
 public:
  explicit FlashAttnBackendCase(Rng& rng)
      : backend_(find_backend(kFlashAttnBackend)),
        type_(rng.pick({AttentionType::decoder, AttentionType::decoder, AttentionType::decoder,
                        AttentionType::encoder, AttentionType::encoder_only,
                        AttentionType::encoder_decoder, AttentionType::encoder_decoder})),
        shape_(random_shape(rng, backend_limits())),
        padding_(rng.chance(0.3) ? rng.range(1, 9) : 0),
        keys_in_cache_(has_cache() && rng.chance(0.2)),
        with_lse_(rng.chance(0.7)) {
    choose_features(rng);
    make_rows(rng);
    if (has_cache()) make_cache(rng);
    make_metadata();
    write_new_rows();
    for (int r = 0; r < shape_.num_reqs(); ++r) append_expected(r);
    poison_new_rows();
    output_.freeze();
    lse_.freeze();
    if (has_cache()) cache_.freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    output_.reset();
    lse_.reset();
    if (has_cache()) cache_.reset();
    const auto builder = backend_.make_builder(builder_config(kernels.arithmetic, executor));
    const auto metadata = builder->build(0, batch_);
    Buffer workspace(metadata->workspace_bytes());
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    ForwardArgs args;
    args.query = query_.view();
    if (!keys_in_cache_) {
      args.key = key_.view();
      args.value = value_.view();
    }
    if (has_cache()) args.kv_cache = layer_view();
    args.output = output_.view();
    if (with_lse_) args.lse = lse_.view();
    args.workspace = workspace.workspace();
    args.executor = &executor;
    backend_.make_impl(impl_config())->forward(args, metadata.get());

    Outcome outcome;
    compare_rows(outcome, "output", output_, expected_.out, expected_.out_bound);
    if (with_lse_) compare_rows(outcome, "lse", lse_, expected_.lse, expected_.lse_bound);
    if (has_cache()) {
      expect_new_rows();
      expect_undamaged(outcome, "kv_cache", cache_);
    }
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(shape_.dtype, stored(), stored());
  }

  std::string describe() const override {
    std::string text = fmt::format("{} {}", to_string(type_), shape_.describe());
    if (has_cache()) {
      text += fmt::format(" {} block_size {} layers {}", to_string(layout_), spec_.block_size,
                          spec_.num_layers);
    }
    if (is_fp8(spec_.dtype)) text += fmt::format(" {} cache", to_string(spec_.dtype));
    if (keys_in_cache_) text += " keys already in the cache";
    if (!batch_.request_causal.empty()) text += " causal per request";
    return text;
  }

 private:
  bool is_decoder() const noexcept { return type_ == AttentionType::decoder; }
  bool is_cross() const noexcept { return type_ == AttentionType::encoder_decoder; }
  bool has_cache() const noexcept { return is_decoder() || is_cross(); }
  /// The keys of a request from this one on come with the step; those before it are in the cache.
  std::int32_t first_new_key(int request) const {
    const auto r = static_cast<std::size_t>(request);
    if (is_cross()) return new_encoder_[r] != 0 ? 0 : shape_.seq_lens[r];
    return shape_.seq_lens[r] - shape_.query_lens[r];
  }
  /// Rows of key and value that the step brings, in front of request `end`.
  int num_new_keys(int end) const {
    int rows = 0;
    for (int r = 0; r < end; ++r) {
      rows += shape_.seq_lens[static_cast<std::size_t>(r)] - first_new_key(r);
    }
    return rows;
  }
  int num_tokens() const { return shape_.query_start_loc().back(); }

  void choose_features(Rng& rng) {
    if (shape_.window_left >= 0) window_ = shape_.window_left + 1;
    shape_.window_right = -1;
    if (window_) shape_.window_right = type_ == AttentionType::encoder_only ? *window_ - 1 : 0;
    if (!is_decoder()) shape_.causal = false;
    if (is_cross()) make_encoder_lengths(rng);
    if (!is_decoder() && !is_cross()) shape_.seq_lens = shape_.query_lens;
    if (shape_.alibi != AlibiSlopes::none) shape_.alibi = AlibiSlopes::per_head;
    params_ = make_params(rng, shape_, head_values_);
    if (is_decoder() && rng.chance(0.2)) {
      for (int r = 0; r < shape_.num_reqs(); ++r) {
        batch_.request_causal.push_back(static_cast<std::uint8_t>(rng.range(0, 1)));
      }
    }
  }

  /// Fewer or more keys than queries, or none; cross attention has neither windows nor slopes.
  void make_encoder_lengths(Rng& rng) {
    for (std::int32_t& keys : shape_.seq_lens) {
      if (rng.chance(0.3)) keys = rng.range(0, keys);
      new_encoder_.push_back(static_cast<std::uint8_t>(rng.range(0, 1)));
    }
    window_.reset();
    shape_.window_left = shape_.window_right = -1;
    shape_.alibi = AlibiSlopes::none;
  }

  void make_rows(Rng& rng) {
    Layout rows;
    rows.padded = rng.chance(0.4);
    const std::int64_t tokens = num_tokens() + padding_;
    const auto heads = shape_.q_heads();
    query_ = Storage(rng, shape_.dtype, {tokens, heads, shape_.head_dim}, rows);
    output_ = Storage(rng, shape_.dtype, {tokens, heads, shape_.head_dim}, rows);
    lse_ = Storage(rng, DType::f32, {tokens, heads}, rows);
    const std::int64_t new_keys = num_new_keys(shape_.num_reqs());
    const std::int64_t key_rows = new_keys + padding_;
    key_ = Storage(rng, shape_.dtype, {key_rows, shape_.kv_heads, shape_.head_dim}, rows);
    value_ = Storage(rng, shape_.dtype, {key_rows, shape_.kv_heads, shape_.head_dim}, rows);
    for (int t = 0; t < num_tokens(); ++t) {
      for (int h = 0; h < heads; ++h) {
        query_.set_random(rng, query_.offset({t, h, 0}), shape_.head_dim, shape_.query_magnitude);
      }
    }
    for (int t = 0; t < new_keys; ++t) {
      for (int h = 0; h < shape_.kv_heads; ++h) {
        key_.set_random(rng, key_.offset({t, h, 0}), shape_.head_dim, 1.0);
        value_.set_random(rng, value_.offset({t, h, 0}), shape_.head_dim, shape_.value_magnitude);
      }
    }
  }

  void make_cache(Rng& rng) {
    spec_.block_size = rng.pick({16, 16, 32, 48, 64, 256});
    spec_.num_kv_heads = shape_.kv_heads;
    spec_.head_size = shape_.head_dim;
    spec_.dtype = shape_.dtype;
    if (rng.chance(0.3)) choose_fp8(rng);
    spec_.num_layers = rng.chance(0.4) ? rng.range(1, 3) : 0;
    layout_ = rng.pick({KvLayout::nhd, KvLayout::hnd});
    layer_ = spec_.num_layers > 0 ? rng.range(0, spec_.num_layers - 1) : 0;
    blocks_.emplace(rng, shape_.seq_lens, untouched_slots(), spec_.block_size, false);
    spec_.num_blocks = blocks_->num_blocks;
    Layout physical;
    physical.order = backend_.kv_cache_stride_order(layout_, spec_.num_layers > 0, spec_.format);
    cache_ = Storage(rng, spec_.dtype, backend_.kv_cache_shape(spec_), physical);
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      for (std::int64_t j = shape_.first_visible_key(r); j < first_new_key(r); ++j) {
        for (int h = 0; h < shape_.kv_heads; ++h) {
          cache_.set_random(rng, cache_offset(0, r, j, h), shape_.head_dim, 1.0);
          cache_.set_random(rng, cache_offset(1, r, j, h), shape_.head_dim, shape_.value_magnitude);
        }
      }
    }
  }

  /// Scales are powers of two, so that dividing by one is exact and the oracle can encode.
  void choose_fp8(Rng& rng) {
    spec_.dtype = rng.pick({DType::fp8_e4m3, DType::fp8_e5m2});
    const auto scales =
        rng.chance(0.5) ? std::size_t{1} : static_cast<std::size_t>(shape_.kv_heads);
    for (std::size_t h = 0; h < scales; ++h) {
      k_scale_.push_back(static_cast<float>(std::ldexp(1.0, rng.range(-3, 3))));
      v_scale_.push_back(static_cast<float>(std::ldexp(1.0, rng.range(-3, 3))));
    }
  }
  double cache_scale(int plane, int head) const {
    const std::vector<float>& scales = plane == 0 ? k_scale_ : v_scale_;
    if (scales.empty()) return 1.0;
    return scales[scales.size() == 1 ? 0 : static_cast<std::size_t>(head)];
  }

  /// Slots of each request that are neither read nor written.
  std::vector<std::int32_t> untouched_slots() const {
    std::vector<std::int32_t> untouched = shape_.hidden_keys();
    for (std::size_t r = 0; r < untouched.size(); ++r) {
      untouched[r] = std::min(untouched[r], first_new_key(static_cast<int>(r)));
    }
    return untouched;
  }

  /// Offset in the whole cache of key (plane 0) or value (plane 1) row j of a request.
  std::int64_t cache_offset(int plane, int request, std::int64_t j, int head) const {
    const std::int64_t block = blocks_->block(request, j), slot = j % spec_.block_size;
    return spec_.num_layers > 0 ? cache_.offset({layer_, plane, block, slot, head, 0})
                                : cache_.offset({plane, block, slot, head, 0});
  }

  TensorView layer_view() const {
    return spec_.num_layers > 0 ? cache_.view().select(0, layer_) : cache_.view();
  }

  void make_metadata() {
    batch_.query_start_loc = shape_.query_start_loc();
    (is_cross() ? batch_.encoder_seq_lens : batch_.seq_lens) = shape_.seq_lens;
    if (is_cross()) batch_.seq_lens = shape_.query_lens;
    batch_.num_reqs = shape_.num_reqs();
    batch_.num_tokens = num_tokens();
    batch_.causal = shape_.causal;
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      const auto request = static_cast<std::size_t>(r);
      batch_.max_query_len = std::max(batch_.max_query_len, shape_.query_lens[request]);
      batch_.max_seq_len = std::max(batch_.max_seq_len, batch_.seq_lens[request]);
      if (!has_cache()) continue;
      auto& slots = is_cross() ? batch_.encoder_slot_mapping : batch_.slot_mapping;
      for (std::int64_t j = first_new_key(r); j < shape_.seq_lens[request]; ++j) {
        slots.push_back(blocks_->block(r, j) * spec_.block_size + j % spec_.block_size);
      }
    }
    if (has_cache()) batch_.block_table = blocks_->table.view();
  }

  /// Calls `visit(value to store, element of the cache)` for this step's rows.
  template <typename Visit>
  void for_new_elements(const Visit& visit) {
    if (!has_cache()) return;
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      const std::int64_t start = num_new_keys(r), first = first_new_key(r);
      const std::int64_t count = shape_.seq_lens[static_cast<std::size_t>(r)] - first;
      for (std::int64_t i = 0; i < count; ++i) {
        for (int h = 0; h < shape_.kv_heads; ++h) {
          for (int plane = 0; plane < 2; ++plane) {
            const Storage& rows = plane == 0 ? key_ : value_;
            const std::int64_t to = cache_offset(plane, r, first + i, h);
            const std::int64_t from = rows.offset({start + i, h, 0});
            for (int d = 0; d < shape_.head_dim; ++d)
              visit(rows.get(from + d) / cache_scale(plane, h), to + d);
          }
        }
      }
    }
  }
  void write_new_rows() {
    for_new_elements([&](double x, std::int64_t to) { cache_.set(to, x); });
  }
  void poison_new_rows() {
    if (keys_in_cache_) return;
    for_new_elements(
        [&](double, std::int64_t to) { cache_.set(to, std::numeric_limits<double>::quiet_NaN()); });
  }
  void expect_new_rows() {
    if (keys_in_cache_) return;
    for_new_elements([&](double x, std::int64_t to) { cache_.expect_value(to, x); });
  }

  /// [1, kv heads], in `values`.
  ConstTensorView descale(int plane, std::vector<float>& values) const {
    for (int h = 0; h < shape_.kv_heads; ++h)
      values.push_back(static_cast<float>(cache_scale(plane, h)));
    return {values.data(), DType::f32, {1, shape_.kv_heads}};
  }

  /// Oracle of one request, over the cache with this step's rows in it (or over the rows alone).
  void append_expected(int request) {
    const auto r = static_cast<std::size_t>(request);
    const std::int64_t first = shape_.query_start_loc()[r], query_len = shape_.query_lens[r];
    const std::int32_t q_start[] = {0, shape_.query_lens[r]};
    const std::int32_t seq_len[] = {shape_.seq_lens[r]};
    std::vector<float> k_descale, v_descale;
    FlashAttnVarlenArgs a;
    a.q = query_.view().slice(0, first, query_len);
    a.out = output_.view().slice(0, first, query_len);
    a.query_start_loc = {q_start, DType::i32, {2}};
    if (has_cache()) {
      a.k = layer_view().select(0, 0);
      a.v = layer_view().select(0, 1);
      a.seq_lens = {seq_len, DType::i32, {1}};
      a.block_table = blocks_->table.view().slice(0, request, 1);
      if (is_fp8(spec_.dtype)) {
        a.k_descale = descale(0, k_descale);
        a.v_descale = descale(1, v_descale);
      }
    } else {
      a.k = key_.view().slice(0, first, query_len);
      a.v = value_.view().slice(0, first, query_len);
      a.cu_seqlens_kv = a.query_start_loc;
    }
    a.params = params_;
    if (!batch_.request_causal.empty()) a.params.causal = batch_.request_causal[r] != 0;
    const oracle::Result one = oracle::flash_attn_varlen(a);
    const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(expected_.out, one.out);
    append(expected_.out_bound, one.out_bound);
    append(expected_.lse, one.lse);
    append(expected_.lse_bound, one.lse_bound);
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

  DType stored() const { return has_cache() ? spec_.dtype : shape_.dtype; }

  BuilderConfig builder_config(Arithmetic arithmetic, const Executor& executor) const {
    BuilderConfig c;
    c.arithmetic = arithmetic;
    c.num_q_heads = shape_.q_heads();
    c.cache = spec_;
    c.cache.num_kv_heads = shape_.kv_heads;
    c.cache.head_size = shape_.head_dim;
    c.cache.dtype = stored();
    c.window_left = shape_.window_left;
    c.window_right = shape_.window_right;
    c.num_workers = executor.num_workers();
    c.attn_type = type_;
    return c;
  }

  ImplConfig impl_config() const {
    ImplConfig c;
    c.num_q_heads = shape_.q_heads();
    c.num_kv_heads = shape_.kv_heads;
    c.head_size = shape_.head_dim;
    c.scale = params_.scale;
    c.softcap = params_.softcap;
    c.sliding_window = window_;
    if (params_.alibi_slopes.defined()) {
      const auto* slopes = params_.alibi_slopes.as<float>();
      c.alibi_slopes.assign(slopes, slopes + shape_.q_heads());
    }
    c.use_alibi_sqrt = params_.alibi_sqrt;
    if (params_.sinks.defined()) {
      const auto* sinks = params_.sinks.as<float>();
      c.sinks.assign(sinks, sinks + shape_.q_heads());
    }
    c.lse_includes_sink = params_.lse_includes_sink;
    c.attn_type = type_;
    c.dtype = shape_.dtype;
    if (has_cache()) c.kv_cache_dtype = to_string(spec_.dtype);
    c.k_scale = k_scale_;
    c.v_scale = v_scale_;
    return c;
  }

  const Backend& backend_;
  AttentionType type_;
  AttentionShape shape_;
  int padding_;  ///< rows behind the batch's, as under a captured graph
  bool keys_in_cache_, with_lse_;
  std::vector<std::uint8_t> new_encoder_;  ///< cross attention, a request: its keys come now
  std::optional<int> window_;
  AttentionParams params_;
  HeadValues head_values_;
  Storage query_, output_, lse_, key_, value_, cache_;
  KvCacheSpec spec_;
  std::vector<float> k_scale_, v_scale_;  ///< fp8 caches only
  KvLayout layout_ = KvLayout::nhd;
  int layer_ = 0;
  std::optional<RandomBlocks> blocks_;
  CommonMetadata batch_;
  oracle::Result expected_;
};

}  // namespace

Op op_backend_flash_attn() {
  return {backend_op_name(kFlashAttnBackend), false,
          [](Rng& rng) { return std::make_unique<FlashAttnBackendCase>(rng); }, true};
}

}  // namespace attend::conformance
