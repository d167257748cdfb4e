// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/core/float_types.h"
#include "attend/ops/mla_weights.h"
#include "attend/oracle/mla.h"
#include "attend/oracle/quantize.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

constexpr const char* kFlashAttnMlaBackend = "FLASH_ATTN_MLA";

struct Lengths {
  std::int32_t query, seq;
};

/// One layer of a step: builder, impl and cache, as an engine drives them.
class MlaBackendCase final : public Case {
 public:
  explicit MlaBackendCase(Rng& rng) : backend_(find_backend(kFlashAttnMlaBackend)) {
    choose(rng);
    make_rows(rng);
    make_cache(rng);
    make_batch();
    compute_expected();
    poison_new_rows();
    output_.freeze();
    lse_.freeze();
    cache_.freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    output_.reset();
    lse_.reset();
    cache_.reset();
    const auto builder = backend_.make_builder(builder_config(kernels.arithmetic, executor));
    const auto metadata = builder->build(0, batch_);
    Buffer workspace(metadata->workspace_bytes());
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    ForwardArgs args;
    args.query = query_.view();
    args.kv_c = kv_c_.view();
    args.k_pe = k_pe_.view();
    args.kv_cache = cache_.view();
    args.output = output_.view();
    args.lse = lse_.view();
    args.workspace = workspace.workspace();
    args.executor = &executor;
    backend_.make_impl(impl_config(kernels, executor))->forward(args, metadata.get());
    Outcome outcome;
    compare_written(outcome, "output", output_, out_, out_bound_);
    compare_written(outcome, "lse", lse_, lse_expected_, lse_bound_);
    expect_new_rows();
    expect_undamaged(outcome, "kv_cache", cache_);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(dtype_, cache_dtype_, cache_dtype_);
  }

  std::string describe() const override {
    std::string lens;
    for (const Lengths& n : lengths_) lens += fmt::format(" {}/{}", n.query, n.seq);
    return fmt::format(
        "{} heads {} dims {}/{}/{}/{} cache {} block_size {} query/seq{} threshold {} workspace {} "
        "prefill {} on {}",
        to_string(dtype_), heads_, d_.kv_lora_rank, d_.qk_nope_head_dim, d_.qk_rope_head_dim,
        d_.v_head_dim, is_ds() ? "fp8_ds_mla" : to_string(cache_dtype_), block_size_, lens,
        threshold_, workspace_tokens_, prefill_, to_string(platform_));
  }

 private:
  bool is_ds() const { return cache_dtype_ == DType::u8; }

  void choose(Rng& rng) {
    const bool large = rng.chance(0.25);
    d_ = large
             ? MlaDims{512, 128, 64, 128}
             : rng.pick({MlaDims{64, 32, 16, 24}, MlaDims{32, 16, 8, 16}, MlaDims{40, 24, 8, 32}});
    dtype_ = rng.pick({DType::bf16, DType::bf16, DType::f16, DType::f32});
    cache_dtype_ = rng.chance(0.3) ? rng.pick({DType::fp8_e4m3, DType::fp8_e5m2}) : dtype_;
    if (large && rng.chance(0.5)) {
      dtype_ = DType::bf16;
      cache_dtype_ = DType::u8;
    }
    heads_ = large ? rng.range(1, 2) : rng.range(1, 5);
    block_size_ = rng.pick({16, 32, 64, 256});
    threshold_ = rng.pick({0, 1, 2, 8});
    workspace_tokens_ = rng.pick({0, 256, 512});
    prefill_ = rng.pick({"auto", "FLASH_ATTN", "ROCM_AITER_FA"});
    // Some platforms' kernels want padded values; AITER has none.
    if (prefill_ == "FLASH_ATTN" && rng.chance(0.5) && dtype_ != DType::f32)
      platform_ = Platform::parse("cuda:8.0");
    const int requests = rng.range(1, large ? 2 : 4);
    for (int r = 0; r < requests; ++r) {
      const int context = rng.chance(0.3) ? 0 : rng.range(1, large ? 400 : 1100);
      const int query = rng.chance(0.4) ? 1 : rng.range(0, large ? 4 : 12);
      lengths_.push_back({query, context + query});
    }
  }

  void make_rows(Rng& rng) {
    query_start_.push_back(0);
    for (const Lengths& n : lengths_) query_start_.push_back(query_start_.back() + n.query);
    const std::int64_t tokens = query_start_.back();
    Layout rows;
    rows.padded = rng.chance(0.4);
    query_ = Storage(rng, dtype_, {tokens, heads_, d_.qk_head_dim()}, rows);
    kv_c_ = Storage(rng, dtype_, {tokens, d_.kv_lora_rank}, rows);
    k_pe_ = Storage(rng, dtype_, {tokens, d_.qk_rope_head_dim}, rows);
    for (Storage* s : {&query_, &kv_c_, &k_pe_}) s->set_random(rng, 1.0);
    output_ = Storage(rng, dtype_, {tokens, heads_, d_.v_head_dim}, rows);
    lse_ = Storage(rng, DType::f32, {tokens, heads_});
    const std::int64_t weight_rows = std::int64_t{heads_} * (d_.qk_nope_head_dim + d_.v_head_dim);
    weight_ = Storage(rng, dtype_, {weight_rows, d_.kv_lora_rank});
    weight_.set_random(rng, 1.0 / std::sqrt(d_.kv_lora_rank));
    if (is_fp8(cache_dtype_)) kv_scale_ = static_cast<float>(std::exp2(2.0 * rng.uniform() - 1.0));
    if (rng.chance(0.5)) scale_ = 0.1F;
  }

  void make_cache(Rng& rng) {
    std::vector<std::int32_t> seq_lens, nothing_hidden(lengths_.size(), 0);
    for (const Lengths& n : lengths_) seq_lens.push_back(n.seq);
    blocks_.emplace(rng, seq_lens, nothing_hidden, block_size_, false);
    const int width = is_ds() ? fp8_ds_mla::kRowBytes : d_.cache_dim();
    Layout layout;
    if (rng.chance(0.3)) layout.outer_gap = std::int64_t{3} * block_size_ * width;
    cache_ = Storage(rng, cache_dtype_, {blocks_->num_blocks, block_size_, width}, layout);
    for (std::size_t r = 0; r < lengths_.size(); ++r) {
      const std::int32_t context = lengths_[r].seq - lengths_[r].query;
      for (std::int32_t j = 0; j < lengths_[r].seq; ++j) {
        std::vector<double> row;
        for (int i = 0; i < d_.cache_dim(); ++i)
          row.push_back(j < context ? rng.bell() : new_element(r, j - context, i));
        encode(row, row_offset(static_cast<int>(r), j));
      }
    }
  }
  /// Element of the row that a new token of a request brings.
  double new_element(std::size_t r, std::int32_t token, int i) const {
    const std::int64_t t = query_start_[r] + token;
    return i < d_.kv_lora_rank ? kv_c_.get(kv_c_.offset({t, i}))
                               : k_pe_.get(k_pe_.offset({t, i - d_.kv_lora_rank}));
  }
  std::int64_t row_offset(int request, std::int64_t j) const {
    return cache_.offset({blocks_->block(request, j), j % block_size_, 0});
  }

  /// Writes a row as the cache's format holds it.
  void encode(const std::vector<double>& row, std::int64_t to) {
    auto* bytes = static_cast<std::uint8_t*>(cache_.view().data);
    if (is_ds()) {
      std::array<std::uint16_t, fp8_ds_mla::kRope> rope{};
      for (std::size_t i = 0; i < rope.size(); ++i)
        rope[i] = to_bf16(static_cast<float>(row[fp8_ds_mla::kLatent + i])).bits;
      oracle::fp8_ds_mla_encode(std::span(row).first(fp8_ds_mla::kLatent), rope,
                                {bytes + to, fp8_ds_mla::kRowBytes});
      return;
    }
    for (std::size_t i = 0; i < row.size(); ++i) {
      const auto at = to + static_cast<std::int64_t>(i);
      if (is_fp8(cache_dtype_)) {
        bytes[at] = oracle::fp8_code(cache_dtype_, row[i], kv_scale_);
      } else {
        cache_.set(at, row[i]);
      }
    }
  }
  /// What the row gives back.
  std::vector<double> decode(std::int64_t at) const {
    std::vector<double> row(static_cast<std::size_t>(d_.cache_dim()));
    if (is_ds()) {
      oracle::fp8_ds_mla_decode(
          {static_cast<const std::uint8_t*>(cache_.view().data) + at, fp8_ds_mla::kRowBytes}, row);
      return row;
    }
    for (std::size_t i = 0; i < row.size(); ++i)
      row[i] = cache_.get(at + static_cast<std::int64_t>(i)) * static_cast<double>(kv_scale_);
    return row;
  }

  /// A row as attention sees it: prefill gathers rows in the type of the layer.
  std::vector<double> seen(int r, std::vector<double> row) const {
    if (r < num_decodes()) return row;
    for (double& x : row) {
      const auto rounded = static_cast<float>(x);
      x = dtype_ == DType::bf16  ? to_f32(to_bf16(rounded))
          : dtype_ == DType::f16 ? to_f32(to_f16(rounded))
                                 : rounded;
    }
    return row;
  }

  void make_batch() {
    batch_.query_start_loc = query_start_;
    batch_.num_reqs = static_cast<int>(lengths_.size());
    batch_.num_tokens = query_start_.back();
    for (std::size_t r = 0; r < lengths_.size(); ++r) {
      const Lengths& n = lengths_[r];
      batch_.seq_lens.push_back(n.seq);
      batch_.max_query_len = std::max(batch_.max_query_len, n.query);
      batch_.max_seq_len = std::max(batch_.max_seq_len, n.seq);
      for (std::int32_t j = n.seq - n.query; j < n.seq; ++j)
        batch_.slot_mapping.push_back(blocks_->block(static_cast<int>(r), j) * block_size_ +
                                      j % block_size_);
    }
    batch_.block_table = blocks_->table.view();
  }

  template <typename Visit>
  void for_new_rows(const Visit& visit) {
    for (std::size_t r = 0; r < lengths_.size(); ++r)
      for (std::int32_t j = lengths_[r].seq - lengths_[r].query; j < lengths_[r].seq; ++j)
        visit(row_offset(static_cast<int>(r), j));
  }
  std::int64_t row_elements() const {
    return is_ds() ? std::int64_t{fp8_ds_mla::kRowBytes} : std::int64_t{d_.cache_dim()};
  }
  void poison_new_rows() {
    after_ = bytes_of_rows();
    for_new_rows([&](std::int64_t at) {
      std::memset(static_cast<std::byte*>(cache_.view().data) +
                      at * static_cast<std::int64_t>(size_of(cache_dtype_)),
                  0xff, static_cast<std::size_t>(row_elements()) * size_of(cache_dtype_));
    });
  }
  std::vector<std::uint64_t> bytes_of_rows() {
    std::vector<std::uint64_t> bits;
    const auto size = static_cast<std::int64_t>(size_of(cache_dtype_));
    for_new_rows([&](std::int64_t at) {
      for (std::int64_t i = 0; i < row_elements(); ++i) {
        std::uint64_t element = 0;
        std::memcpy(&element, static_cast<const std::byte*>(cache_.view().data) + (at + i) * size,
                    static_cast<std::size_t>(size));
        bits.push_back(element);
      }
    });
    return bits;
  }
  void expect_new_rows() {
    auto expected = after_.begin();
    for_new_rows([&](std::int64_t at) {
      for (std::int64_t i = 0; i < row_elements(); ++i) cache_.expect_bits(at + i, *expected++);
    });
  }

  /// Requests from the first long or fresh one on take the prefill path.
  int num_decodes() const {
    const int threshold = threshold_ == 0 ? 128 : threshold_;
    for (int r = 0; r < batch_.num_reqs; ++r) {
      const int query = batch_.query_len(r);
      if (query > threshold || (query > 0 && batch_.num_computed_tokens(r) == 0)) return r;
    }
    return batch_.num_reqs;
  }

  void compute_expected() {
    for (std::size_t r = 0; r < lengths_.size(); ++r) {
      std::vector<std::vector<double>> rows;
      for (std::int32_t j = 0; j < lengths_[r].seq; ++j)
        rows.push_back(seen(static_cast<int>(r), decode(row_offset(static_cast<int>(r), j))));
      for (std::int32_t i = 0; i < lengths_[r].query; ++i)
        for (int h = 0; h < heads_; ++h) append_row(static_cast<int>(r), i, h, rows);
    }
  }

  void append_row(int r, std::int32_t token, int head,
                  const std::vector<std::vector<double>>& rows) {
    const Lengths& n = lengths_[static_cast<std::size_t>(r)];
    const std::int64_t t = query_start_[static_cast<std::size_t>(r)] + token;
    const std::int64_t first_weight = std::int64_t{head} * (d_.qk_nope_head_dim + d_.v_head_dim);
    oracle::MlaRowProblem p;
    p.dims = d_;
    p.position = n.seq - n.query + token;
    p.num_keys = n.seq;
    p.scale = scale_ ? static_cast<double>(*scale_) : 1.0 / std::sqrt(d_.qk_head_dim());
    p.dtype = dtype_;
    p.cache_dtype = cache_dtype_;
    p.q = [&](int i) { return query_.get(query_.offset({t, head, i})); };
    p.latent = [&](std::int64_t j, int l) {
      return rows[static_cast<std::size_t>(j)][static_cast<std::size_t>(l)];
    };
    p.k_pe = [&](std::int64_t j, int i) {
      return rows[static_cast<std::size_t>(j)][static_cast<std::size_t>(d_.kv_lora_rank + i)];
    };
    p.w_uk = [&](int i, int l) { return weight_.get(weight_.offset({first_weight + i, l})); };
    p.w_uv = [&](int i, int l) {
      return weight_.get(weight_.offset({first_weight + d_.qk_nope_head_dim + i, l}));
    };
    const oracle::MlaRowResult row =
        r < num_decodes() ? oracle::mla_decode_row(p) : oracle::mla_prefill_row(p);
    out_.insert(out_.end(), row.out.begin(), row.out.end());
    out_bound_.insert(out_bound_.end(), row.out_bound.begin(), row.out_bound.end());
    lse_expected_.push_back(row.lse);
    lse_bound_.push_back(row.lse_bound);
  }

  BuilderConfig builder_config(Arithmetic arithmetic, const Executor& executor) const {
    BuilderConfig c;
    c.num_q_heads = heads_;
    c.cache.num_blocks = blocks_->num_blocks;
    c.cache.block_size = block_size_;
    c.cache.num_kv_heads = 1;
    c.cache.head_size = d_.cache_dim();
    c.cache.dtype = cache_dtype_;
    if (is_ds()) c.cache.format = KvFormat::fp8_ds_mla;
    c.num_workers = executor.num_workers();
    c.arithmetic = arithmetic;
    MlaBuilderConfig& mla = c.mla.emplace();
    mla.dims = d_;
    mla.dtype = dtype_;
    mla.prefill_backend = prefill_;
    mla.platform = platform_;
    mla.max_model_len = 2048;
    mla.max_num_seqs = 8;
    mla.workspace_tokens = workspace_tokens_;
    mla.decode_threshold = threshold_;
    return c;
  }

  ImplConfig impl_config(const KernelOptions& kernels, Executor& executor) const {
    ImplConfig c;
    c.num_q_heads = heads_;
    c.num_kv_heads = 1;
    c.head_size = d_.cache_dim();
    c.scale = scale_;
    c.dtype = dtype_;
    c.kv_cache_dtype = is_ds() ? "fp8_ds_mla" : std::string(to_string(cache_dtype_));
    if (is_fp8(cache_dtype_)) c.k_scale = {kv_scale_};
    MlaLayerConfig& mla = c.mla.emplace();
    mla.weights = MlaWeights::from_kv_b_proj({.weight = weight_.view(),
                                              .dims = d_,
                                              .num_heads = heads_,
                                              .dtype = dtype_,
                                              .isa = kernels.isa,
                                              .executor = &executor});
    mla.prefill_backend = prefill_;
    mla.platform = platform_;
    return c;
  }

  const Backend& backend_;
  MlaDims d_;
  DType dtype_ = DType::bf16, cache_dtype_ = DType::bf16;
  int heads_ = 1, block_size_ = 16, threshold_ = 0;
  std::int64_t workspace_tokens_ = 0;
  std::string prefill_;
  Platform platform_;
  float kv_scale_ = 1.0F;
  std::optional<float> scale_;
  std::vector<Lengths> lengths_;
  std::vector<std::int32_t> query_start_;
  std::optional<RandomBlocks> blocks_;
  Storage query_, kv_c_, k_pe_, weight_, cache_, output_, lse_;
  CommonMetadata batch_;
  std::vector<std::uint64_t> after_;  ///< elements of the new rows as the layer must write them
  std::vector<double> out_, out_bound_, lse_expected_, lse_bound_;
};

}  // namespace

Op op_backend_flash_attn_mla() {
  return {backend_op_name(kFlashAttnMlaBackend), false,
          [](Rng& rng) { return std::make_unique<MlaBackendCase>(rng); }, true};
}

}  // namespace attend::conformance
