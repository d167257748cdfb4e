// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "attend/backend/selector.h"
#include "attend/core/float_types.h"
#include "attend/oracle/attention.h"
#include "attend/oracle/quantize.h"
#include "conformance/attention_shape.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

constexpr const char* kFlashAttnInt8Backend = "FLASH_ATTN";
constexpr int kWeightLevels = 127;

/// A row of codes; without rounding, of values.
struct Int8Row {
  std::vector<double> codes;
  double scale = 1.0;
  double value(int d) const { return codes[static_cast<std::size_t>(d)] * scale; }
};

/// One decoder layer with an int8 cache: the step's rows are quantised, stored and attended to. The
/// expected codes come from the oracle's definitions, the expected output from those codes.
class Int8BackendCase final : public Case {
 public:
  explicit Int8BackendCase(Rng& rng)
      : backend_(find_backend(kFlashAttnInt8Backend)),
        format_(rng.pick(
            {KvFormat::int8_level1, KvFormat::int8_level2, KvFormat::int8_per_token_head})),
        shape_(random_shape(
            rng, {.keys_cover_queries = true, .same_head_dims = true, .products = 1'000'000})) {
    if (format_ == KvFormat::int8_level2 && shape_.dtype == DType::f32) shape_.dtype = DType::f16;
    if (shape_.window_left >= 0) window_ = shape_.window_left + 1;
    shape_.window_right = window_ ? 0 : -1;
    if (shape_.alibi != AlibiSlopes::none) shape_.alibi = AlibiSlopes::per_head;
    params_ = make_params(rng, shape_, head_values_);
    params_.window_right = shape_.window_right;
    make_rows(rng);
    make_cache(rng);
    make_metadata();
    fill_cache();
    for (Storage* s : {&output_, &lse_, &cache_, &scale_cache_}) s->freeze();
    for (int r = 0; r < shape_.num_reqs(); ++r) expect_request(r);
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    for (Storage* s : {&output_, &lse_, &cache_, &scale_cache_}) s->reset();
    const auto builder = backend_.make_builder(builder_config(kernels.arithmetic, executor));
    const auto metadata = builder->build(0, batch_);
    Buffer workspace(metadata->workspace_bytes());
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    ForwardArgs args;
    args.query = query_.view();
    args.key = key_.view();
    args.value = value_.view();
    args.kv_cache = cache_.view();
    args.kv_scale_cache = scale_cache_.view();
    args.output = output_.view();
    args.lse = lse_.view();
    args.workspace = workspace.workspace();
    args.executor = &executor;
    backend_.make_impl(impl_config())->forward(args, metadata.get());
    Outcome outcome;
    compare_written(outcome, "output", output_, expected_.out, expected_.out_bound);
    compare_written(outcome, "lse", lse_, expected_.lse, expected_.lse_bound);
    for_each_key([&](int r, std::int64_t j, int h) {
      if (j >= first_new_key(r)) store(r, j, h, /*expected=*/true);
    });
    expect_undamaged(outcome, "kv_cache", cache_);
    expect_undamaged(outcome, "kv_scale_cache", scale_cache_);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(shape_.dtype, DType::i8, format_);
  }

  std::string describe() const override {
    return fmt::format("{} {} block_size {}", to_string(format_), shape_.describe(),
                       spec_.block_size);
  }

 private:
  std::int64_t first_new_key(int request) const {
    const auto r = static_cast<std::size_t>(request);
    return shape_.seq_lens[r] - shape_.query_lens[r];
  }
  /// f(request, key, kv head) for every key that a query sees or that is new.
  template <typename F>
  void for_each_key(const F& f) const {
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      const std::int64_t first =
          std::min<std::int64_t>(shape_.first_visible_key(r), first_new_key(r));
      for (std::int64_t j = first; j < shape_.seq_lens[static_cast<std::size_t>(r)]; ++j)
        for (int h = 0; h < shape_.kv_heads; ++h) f(r, j, h);
    }
  }
  std::size_t index(int r, std::int64_t j, int h) const {
    const std::int64_t key = shape_.key_start_loc()[static_cast<std::size_t>(r)] + j;
    return static_cast<std::size_t>(key * shape_.kv_heads + h);
  }

  Int8Row quantise(std::vector<double> row) const {
    Int8Row coded;
    const float scale = oracle::int8_scale(row);
    for (double& x : row) x = oracle::int8_code(x, scale);
    coded.codes = std::move(row);
    coded.scale = static_cast<double>(scale);
    return coded;
  }
  std::vector<double> read(const Storage& s, std::int64_t token, int head) const {
    std::vector<double> row;
    for (int d = 0; d < shape_.head_dim; ++d) row.push_back(s.get(s.offset({token, head, d})));
    return row;
  }

  void make_rows(Rng& rng) {
    Layout rows;
    rows.padded = rng.chance(0.4);
    const std::int64_t tokens = shape_.query_start_loc().back(), dim = shape_.head_dim;
    query_ = Storage(rng, shape_.dtype, {tokens, shape_.q_heads(), dim}, rows);
    query_.set_random(rng, shape_.query_magnitude);
    key_ = Storage(rng, shape_.dtype, {tokens, shape_.kv_heads, dim}, rows);
    key_.set_random(rng, 1.0);
    value_ = Storage(rng, shape_.dtype, {tokens, shape_.kv_heads, dim}, rows);
    value_.set_random(rng, shape_.value_magnitude);
    output_ = Storage(rng, shape_.dtype, {tokens, shape_.q_heads(), dim}, rows);
    lse_ = Storage(rng, DType::f32, {tokens, shape_.q_heads()}, rows);
  }

  void make_cache(Rng& rng) {
    spec_.block_size = rng.pick({16, 16, 32, 48, 64, 256});
    spec_.num_kv_heads = shape_.kv_heads;
    spec_.head_size = shape_.head_dim;
    spec_.dtype = DType::i8;
    spec_.format = format_;
    std::vector<std::int32_t> untouched = shape_.hidden_keys();
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      auto& n = untouched[static_cast<std::size_t>(r)];
      n = std::min(n, static_cast<std::int32_t>(first_new_key(r)));
    }
    blocks_.emplace(rng, shape_.seq_lens, untouched, spec_.block_size, false);
    spec_.num_blocks = blocks_->num_blocks;
    Layout physical;
    physical.order =
        backend_.kv_cache_stride_order(rng.pick({KvLayout::nhd, KvLayout::hnd}), false, format_);
    cache_ = Storage(rng, DType::i8, backend_.kv_cache_shape(spec_), physical);
    scale_cache_ = Storage(rng, DType::f32, backend_.kv_scale_shape(spec_));
    if (format_ == KvFormat::int8_level1) {
      const int count = shape_.kv_heads * shape_.head_dim;
      for (int i = 0; i < count; ++i)
        value_scales_.push_back(
            static_cast<float>(shape_.value_magnitude / 36.0 * std::exp2(rng.uniform() - 0.5)));
    }
    make_codes(rng);
  }

  /// Rows of the cache: random for old keys, quantised from this step's rows for new ones.
  void make_codes(Rng& rng) {
    const auto keys = static_cast<std::size_t>(shape_.key_start_loc().back()) *
                      static_cast<std::size_t>(shape_.kv_heads);
    k_.resize(keys);
    v_.resize(keys);
    for_each_key([&](int r, std::int64_t j, int h) {
      const bool is_new = j >= first_new_key(r);
      const std::int64_t token =
          shape_.query_start_loc()[static_cast<std::size_t>(r)] + j - first_new_key(r);
      const auto row = [&](const Storage& from, double magnitude) {
        if (is_new) return read(from, token, h);
        std::vector<double> old(static_cast<std::size_t>(shape_.head_dim));
        // 16-bit values must be what their type can hold: multiples of 1/32 below 4 are.
        for (double& x : old) x = magnitude * std::nearbyint(32.0 * rng.bell()) / 32.0;
        return old;
      };
      k_[index(r, j, h)] = quantise(row(key_, 1.0));
      std::vector<double> value =
          row(value_, format_ == KvFormat::int8_level2 ? 1.0 : shape_.value_magnitude);
      v_[index(r, j, h)] = code_value(std::move(value), h);
    });
  }
  Int8Row code_value(std::vector<double> row, int head) const {
    if (format_ == KvFormat::int8_per_token_head) return quantise(std::move(row));
    Int8Row coded;
    if (format_ == KvFormat::int8_level1)
      for (int d = 0; d < shape_.head_dim; ++d) {
        auto& x = row[static_cast<std::size_t>(d)];
        x = oracle::int8_code(x, value_scale(head, d));
      }
    coded.codes = std::move(row);
    return coded;
  }
  float value_scale(int head, int d) const {
    return value_scales_[static_cast<std::size_t>(head * shape_.head_dim + d)];
  }
  double value_at(const Int8Row& row, int head, int d) const {
    return format_ == KvFormat::int8_level1
               ? row.value(d) * static_cast<double>(value_scale(head, d))
               : row.value(d);
  }

  void fill_cache() {
    for_each_key([&](int r, std::int64_t j, int h) {
      if (j < first_new_key(r)) store(r, j, h, /*expected=*/false);
    });
  }

  /// Puts a key and its value where the cache has them, or expects them there.
  void store(int r, std::int64_t j, int h, bool expected) {
    const std::int64_t block = blocks_->block(r, j), slot = j % spec_.block_size;
    const Int8Row &k = k_[index(r, j, h)], &v = v_[index(r, j, h)];
    const auto put = [&](Storage& s, std::int64_t at, double x) {
      expected ? s.expect_value(at, x) : s.set(at, x);
    };
    const bool per_token = format_ == KvFormat::int8_per_token_head;
    for (int d = 0; d < shape_.head_dim; ++d) {
      const auto i = static_cast<std::size_t>(d);
      put(cache_,
          per_token ? cache_.offset({0, block, slot, h, d}) : cache_.offset({0, block, h, slot, d}),
          k.codes[i]);
      if (format_ == KvFormat::int8_level2) {
        put_wide(block, h, slot, d, v.codes[i], expected);
      } else {
        put(cache_,
            per_token ? cache_.offset({1, block, slot, h, d})
                      : cache_.offset({1, block, h, slot, d}),
            v.codes[i]);
      }
    }
    if (per_token) {
      put(scale_cache_, scale_cache_.offset({0, block, slot, h}), k.scale);
      put(scale_cache_, scale_cache_.offset({1, block, slot, h}), v.scale);
    } else {
      put(scale_cache_, scale_cache_.offset({block, h, slot}), k.scale);
    }
  }

  /// A 16-bit value in planes 1 and 2, which together hold the values of all blocks in order.
  void put_wide(std::int64_t block, int h, std::int64_t slot, int d, double x, bool expected) {
    const std::int64_t element =
        ((block * shape_.kv_heads + h) * spec_.block_size + slot) * shape_.head_dim + d;
    const std::int64_t at = cache_.offset({1, 0, 0, 0, 0}) + 2 * element;
    const auto f = static_cast<float>(x);
    const std::uint16_t bits = shape_.dtype == DType::f16 ? to_f16(f).bits : to_bf16(f).bits;
    for (int b = 0; b < 2; ++b) {
      const auto byte = static_cast<std::int8_t>(bits >> (8 * b));
      if (expected) {
        cache_.expect_bits(at + b, static_cast<std::uint8_t>(byte));
      } else {
        cache_.view().as<std::int8_t>()[at + b] = byte;
      }
    }
  }

  void make_metadata() {
    batch_.query_start_loc = shape_.query_start_loc();
    batch_.seq_lens = shape_.seq_lens;
    batch_.num_reqs = shape_.num_reqs();
    batch_.num_tokens = shape_.query_start_loc().back();
    batch_.causal = shape_.causal;
    for (int r = 0; r < shape_.num_reqs(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      batch_.max_query_len = std::max(batch_.max_query_len, shape_.query_lens[i]);
      batch_.max_seq_len = std::max(batch_.max_seq_len, shape_.seq_lens[i]);
      for (std::int64_t j = first_new_key(r); j < shape_.seq_lens[i]; ++j)
        batch_.slot_mapping.push_back(std::int64_t{blocks_->block(r, j)} * spec_.block_size +
                                      j % spec_.block_size);
    }
    batch_.block_table = blocks_->table.view();
  }

  void expect_request(int r) {
    const auto i = static_cast<std::size_t>(r);
    oracle::RowProblem p;
    p.head_dim_qk = p.head_dim_v = shape_.head_dim;
    p.num_keys = shape_.seq_lens[i];
    p.scale =
        params_.scale ? static_cast<double>(*params_.scale) : 1.0 / std::sqrt(shape_.head_dim);
    p.causal = shape_.causal;
    p.window_left = params_.window_left;
    p.window_right = params_.window_right;
    p.softcap = params_.softcap;
    p.alibi_sqrt = params_.alibi_sqrt;
    p.lse_includes_sink = params_.lse_includes_sink;
    p.weight_levels = format_ == KvFormat::int8_level1 ? kWeightLevels : 0;
    const bool coded_query = format_ != KvFormat::int8_per_token_head;
    for (std::int64_t t = 0; t < shape_.query_lens[i]; ++t) {
      for (int head = 0; head < shape_.q_heads(); ++head) {
        const int h = head / shape_.group_size;
        p.position = first_new_key(r) + t;
        if (params_.alibi_slopes.defined())
          p.alibi_slope = static_cast<double>(params_.alibi_slopes.as<float>()[head]);
        if (params_.sinks.defined()) p.sink = static_cast<double>(params_.sinks.as<float>()[head]);
        std::vector<double> row = read(query_, shape_.query_start_loc()[i] + t, head);
        const Int8Row query = coded_query ? quantise(std::move(row)) : Int8Row{std::move(row), 1.0};
        p.q = [&](int d) { return query.value(d); };
        p.k = [&](std::int64_t j, int d) { return k_[index(r, j, h)].value(d); };
        p.v = [&](std::int64_t j, int d) { return value_at(v_[index(r, j, h)], h, d); };
        append(oracle::attention_row(p));
      }
    }
  }
  void append(const oracle::RowResult& row) {
    expected_.lse.push_back(row.lse);
    expected_.lse_bound.push_back(oracle::lse_error_bound(row, shape_.head_dim));
    for (int d = 0; d < shape_.head_dim; ++d) {
      expected_.out.push_back(row.out[static_cast<std::size_t>(d)]);
      expected_.out_bound.push_back(oracle::out_error_bound(row, d, shape_.head_dim, shape_.dtype));
    }
  }

  BuilderConfig builder_config(Arithmetic arithmetic, const Executor& executor) const {
    BuilderConfig c;
    c.arithmetic = arithmetic;
    c.num_q_heads = shape_.q_heads();
    c.cache = spec_;
    c.window_left = shape_.window_left;
    c.window_right = shape_.window_right;
    c.num_workers = executor.num_workers();
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
    const auto per_head = [&](const ConstTensorView& t) {
      const auto* x = t.as<float>();
      return t.defined() ? std::vector<float>(x, x + shape_.q_heads()) : std::vector<float>();
    };
    c.alibi_slopes = per_head(params_.alibi_slopes);
    c.use_alibi_sqrt = params_.alibi_sqrt;
    c.sinks = per_head(params_.sinks);
    c.lse_includes_sink = params_.lse_includes_sink;
    c.dtype = shape_.dtype;
    c.kv_cache_dtype = to_string(format_);
    c.value_scales = value_scales_;
    return c;
  }

  const Backend& backend_;
  KvFormat format_;
  AttentionShape shape_;
  std::optional<int> window_;
  AttentionParams params_;
  HeadValues head_values_;
  Storage query_, key_, value_, output_, lse_, cache_, scale_cache_;
  KvCacheSpec spec_;
  std::vector<float> value_scales_;
  std::vector<Int8Row> k_, v_;  ///< [keys of all requests, kv heads]
  std::optional<RandomBlocks> blocks_;
  CommonMetadata batch_;
  oracle::Result expected_;
};

}  // namespace

Op op_backend_flash_attn_int8() {
  return {backend_op_name(kFlashAttnInt8Backend) + ":int8", false,
          [](Rng& rng) { return std::make_unique<Int8BackendCase>(rng); }, true};
}

}  // namespace attend::conformance
