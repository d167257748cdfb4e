// SPDX-License-Identifier: Apache-2.0
#include "conformance/sparse_layer_case.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/backend/sparse_indexer.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/core/float_types.h"
#include "attend/ops/mla_weights.h"
#include "attend/oracle/indexer_row.h"
#include "attend/oracle/mla.h"
#include "attend/oracle/quantize.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

constexpr const char* kBackend = "FLASHMLA_SPARSE";
constexpr int kMaxModelLen = 512, kIndexDim = static_cast<int>(indexer_cache::kDim);

struct Lengths {
  std::int32_t context, query;
};

/// All tokens of all requests, one request after the other: context and new ones.
struct Tokens {
  Storage query, kv_c, k_pe, index_q, index_k, index_weights;
};

class SparseLayerCase final : public Case {
 public:
  SparseLayerCase(Rng& rng, bool with_indexer)
      : backend_(find_backend(kBackend)), with_indexer_(with_indexer) {
    choose(rng);
    make_tokens(rng);
    make_blocks(rng);
    make_rope(rng);
    if (!with_indexer_) name_tokens(rng);
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    cache_.reset();
    index_cache_.reset();
    const auto builder = backend_.make_builder(builder_config(kernels.arithmetic, executor));
    const auto impl = backend_.make_impl(impl_config(kernels, executor));
    const Step contexts = make_step(true), rest = make_step(false);
    run_step(contexts, *builder, *impl, executor);
    const Results results = run_step(rest, *builder, *impl, executor);
    Outcome outcome;
    compare_step(outcome, rest, results);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(DType::bf16, cache_dtype_, cache_dtype_);
  }

  std::string describe() const override {
    std::string lens;
    for (const Lengths& n : lengths_) lens += fmt::format(" {}+{}", n.context, n.query);
    return fmt::format(
        "{} heads dims {}/{}/{}/{} cache {} block_size {} context+query{} topk {} {} workspace {} "
        "indexer {} heads {} keys {} logits neox {}",
        heads_, d_.kv_lora_rank, d_.qk_nope_head_dim, d_.qk_rope_head_dim, d_.v_head_dim,
        is_ds() ? "fp8_ds_mla" : "bf16", block_size_, lens, topk_, to_string(strategy_),
        workspace_tokens_, with_indexer_ ? index_heads_ : 0, gathered_keys_, logits_, is_neox_);
  }

 private:
  /// Tokens [begin, end) of each request.
  struct Step {
    std::vector<std::pair<std::int32_t, std::int32_t>> ranges;
    CommonMetadata batch;
    std::vector<std::int64_t> rows;  ///< of the tokens among all
  };
  struct Results {
    std::vector<std::int32_t> chosen;  ///< [T, topk]
    std::vector<bf16> out;             ///< [T, H, V]
    std::vector<float> lse;            ///< [T, H]
  };

  bool is_ds() const { return cache_dtype_ == DType::u8; }

  void choose(Rng& rng) {
    d_ = {512, rng.pick({8, 24, 128}), 64, rng.pick({8, 16, 128})};
    cache_dtype_ = rng.chance(0.6) ? DType::u8 : DType::bf16;
    heads_ = rng.range(1, 3);
    block_size_ = rng.pick({64, 128});
    topk_ = rng.pick({1, 7, 20, 64, 300});
    strategy_ =
        rng.pick({SparseStrategy::automatic, SparseStrategy::mixed, SparseStrategy::separate});
    workspace_tokens_ = rng.pick({0, 60, 200});
    index_heads_ = rng.pick({1, 3, 8});
    gathered_keys_ = rng.pick({0, 50, 200});
    logits_ = rng.pick({kMaxModelLen, 1 << 20});
    is_neox_ = rng.chance(0.5);
    const int requests = rng.range(1, 4);
    for (int r = 0; r < requests; ++r) {
      const int context = rng.chance(0.2) ? 0 : rng.range(1, 150);
      lengths_.push_back({context, rng.chance(0.4) ? 1 : rng.range(0, 6)});
      first_row_.push_back(num_rows_);
      num_rows_ += lengths_.back().context + lengths_.back().query;
    }
  }

  void make_tokens(Rng& rng) {
    const auto make = [&](Storage& s, std::vector<std::int64_t> shape) {
      s = Storage(rng, DType::bf16, std::move(shape));
      s.set_random(rng, 1.0);
    };
    make(t_.query, {num_rows_, heads_, d_.qk_head_dim()});
    make(t_.kv_c, {num_rows_, d_.kv_lora_rank});
    make(t_.k_pe, {num_rows_, d_.qk_rope_head_dim});
    make(t_.index_q, {num_rows_, index_heads_, kIndexDim});
    make(t_.index_k, {num_rows_, kIndexDim});
    make(t_.index_weights, {num_rows_, index_heads_});
    weight_ =
        Storage(rng, DType::bf16,
                {std::int64_t{heads_} * (d_.qk_nope_head_dim + d_.v_head_dim), d_.kv_lora_rank});
    weight_.set_random(rng, 1.0 / std::sqrt(d_.kv_lora_rank));
  }

  void make_blocks(Rng& rng) {
    std::vector<std::int32_t> lens, nothing_hidden(lengths_.size(), 0);
    for (const Lengths& n : lengths_) lens.push_back(n.context + n.query);
    blocks_.emplace(rng, lens, nothing_hidden, block_size_, false);
    const int width = is_ds() ? fp8_ds_mla::kRowBytes : d_.cache_dim();
    cache_ = Storage(rng, cache_dtype_, {blocks_->num_blocks, block_size_, width});
    index_cache_ = Storage(rng, DType::u8, {blocks_->num_blocks, block_size_, 132});
    cache_.freeze();
    index_cache_.freeze();
  }

  void make_rope(Rng& rng) {
    rope_ = Storage(rng, DType::f32, {kMaxModelLen, 64});
    for (std::int64_t p = 0; p < kMaxModelLen; ++p) {
      for (int i = 0; i < 32; ++i) {
        const double angle = static_cast<double>(p) * std::pow(10000.0, -i / 32.0);
        rope_.set(rope_.offset({p, i}), std::cos(angle));
        rope_.set(rope_.offset({p, 32 + i}), std::sin(angle));
      }
    }
    for (int i = 0; i < kIndexDim; ++i) {
      norm_weight_.push_back(static_cast<float>(0.5 + rng.uniform()));
      norm_bias_.push_back(static_cast<float>(0.2 * rng.bell()));
    }
  }

  /// Tokens by chance, some of them twice, and names of nothing.
  void name_tokens(Rng& rng) {
    for (const Lengths& n : lengths_) {
      for (std::int32_t p = 0; p < n.context + n.query; ++p) {
        const bool nothing = rng.chance(0.05);
        for (int i = 0; i < topk_; ++i) {
          const bool named = !nothing && rng.chance(0.8);
          named_.push_back(named ? rng.range(0, p) : rng.pick({-1, -7, p + 1, 1 << 30}));
        }
      }
    }
  }

  Step make_step(bool contexts) const {
    Step s;
    CommonMetadata& m = s.batch;
    m.query_start_loc.push_back(0);
    for (std::size_t r = 0; r < lengths_.size(); ++r) {
      const Lengths& n = lengths_[r];
      const std::pair<std::int32_t, std::int32_t> range =
          contexts ? std::pair{0, n.context} : std::pair{n.context, n.context + n.query};
      s.ranges.push_back(range);
      for (std::int32_t p = range.first; p < range.second; ++p) {
        s.rows.push_back(first_row_[r] + p);
        m.positions.push_back(p);
        m.slot_mapping.push_back(blocks_->block(static_cast<int>(r), p) * block_size_ +
                                 p % block_size_);
      }
      const std::int32_t queries = range.second - range.first;
      m.query_start_loc.push_back(m.query_start_loc.back() + queries);
      m.seq_lens.push_back(range.second);
      m.max_query_len = std::max(m.max_query_len, queries);
      m.max_seq_len = std::max(m.max_seq_len, range.second);
    }
    m.num_reqs = static_cast<int>(lengths_.size());
    m.num_tokens = m.query_start_loc.back();
    m.block_table = blocks_->table.view();
    return s;
  }

  /// The step's rows of a tensor of all tokens.
  static std::vector<bf16> rows_of(const Step& step, const Storage& all) {
    std::vector<bf16> rows;
    const TensorView view = all.view();
    const std::int64_t count = view.numel() / std::max<std::int64_t>(1, view.shape[0]);
    for (const std::int64_t r : step.rows) {
      const auto* row = view.as<bf16>() + r * view.strides[0];
      rows.insert(rows.end(), row, row + count);
    }
    return rows;
  }

  Results run_step(const Step& step, MetadataBuilder& builder, const Impl& impl,
                   Executor& executor) {
    const std::int64_t tokens = step.batch.num_tokens;
    const auto metadata = builder.build(0, step.batch);
    Results r;
    r.out.resize(static_cast<std::size_t>(tokens * heads_ * d_.v_head_dim));
    r.lse.resize(static_cast<std::size_t>(tokens * heads_));
    r.chosen = choose_tokens(step, *metadata, executor);
    const auto query = rows_of(step, t_.query), kv_c = rows_of(step, t_.kv_c),
               k_pe = rows_of(step, t_.k_pe);
    Buffer workspace(metadata->workspace_bytes());
    std::memset(workspace.data(), 0xff, workspace.size());
    ForwardArgs a;
    a.query = {query.data(), DType::bf16, {tokens, heads_, d_.qk_head_dim()}};
    a.kv_c = {kv_c.data(), DType::bf16, {tokens, d_.kv_lora_rank}};
    a.k_pe = {k_pe.data(), DType::bf16, {tokens, d_.qk_rope_head_dim}};
    a.topk_indices = {r.chosen.data(), DType::i32, {tokens, topk_}};
    a.kv_cache = cache_.view();
    a.output = {r.out.data(), DType::bf16, {tokens, heads_, d_.v_head_dim}};
    a.lse = {r.lse.data(), DType::f32, {tokens, heads_}};
    a.workspace = workspace.workspace();
    a.executor = &executor;
    impl.forward(a, metadata.get());
    return r;
  }

  std::vector<std::int32_t> choose_tokens(const Step& step, const Metadata& metadata,
                                          Executor& executor) {
    const std::int64_t tokens = step.batch.num_tokens;
    std::vector<std::int32_t> chosen;
    if (!with_indexer_) {
      for (const std::int64_t r : step.rows)
        chosen.insert(chosen.end(), named_.begin() + r * topk_, named_.begin() + (r + 1) * topk_);
      return chosen;
    }
    SparseIndexerConfig c;
    c.num_heads = index_heads_;
    c.topk = topk_;
    c.cos_sin_cache = rope_.view();
    c.is_neox = is_neox_;
    c.k_norm_weight = norm_weight_;
    c.k_norm_bias = norm_bias_;
    const SparseIndexer indexer(c);
    chosen.assign(static_cast<std::size_t>(tokens * topk_), 1 << 20);
    const auto q = rows_of(step, t_.index_q), k = rows_of(step, t_.index_k),
               weights = rows_of(step, t_.index_weights);
    Buffer workspace(indexer.workspace_bytes(metadata));
    std::memset(workspace.data(), 0xff, workspace.size());
    SparseIndexerArgs a;
    a.q = {q.data(), DType::bf16, {tokens, index_heads_, kIndexDim}};
    a.k = {k.data(), DType::bf16, {tokens, kIndexDim}};
    a.weights = {weights.data(), DType::bf16, {tokens, index_heads_}};
    a.positions = {step.batch.positions.data(), DType::i64, {tokens}};
    a.cache = index_cache_.view();
    a.topk_indices = {chosen.data(), DType::i32, {tokens, topk_}};
    a.workspace = workspace.workspace();
    a.executor = &executor;
    indexer.forward(a, &metadata);
    return chosen;
  }

  void compare_step(Outcome& outcome, const Step& step, const Results& results) const {
    std::size_t t = 0;
    for (std::size_t r = 0; r < step.ranges.size(); ++r) {
      for (std::int32_t p = step.ranges[r].first; p < step.ranges[r].second; ++p, ++t) {
        const std::span<const std::int32_t> chosen =
            std::span(results.chosen)
                .subspan(t * static_cast<std::size_t>(topk_), static_cast<std::size_t>(topk_));
        if (with_indexer_) check_chosen(outcome, r, p, chosen);
        for (int h = 0; h < heads_; ++h) compare_row(outcome, {r, p, h, t}, results, chosen);
      }
    }
  }

  void check_chosen(Outcome& outcome, std::size_t r, std::int32_t position,
                    std::span<const std::int32_t> chosen) const {
    oracle::IndexerRowProblem p;
    p.num_heads = index_heads_;
    p.position = position;
    p.is_neox = is_neox_;
    p.k_norm_weight = norm_weight_;
    p.k_norm_bias = norm_bias_;
    const auto values = [&](const Storage& all, std::int64_t row) {
      std::vector<float> numbers;
      const TensorView view = all.view();
      const std::int64_t count = view.numel() / view.shape[0];
      for (std::int64_t i = 0; i < count; ++i)
        numbers.push_back(to_f32(view.as<bf16>()[row * view.strides[0] + i]));
      return numbers;
    };
    p.q = values(t_.index_q, first_row_[r] + position);
    p.weights = values(t_.index_weights, first_row_[r] + position);
    p.key = [&](std::int64_t j) { return values(t_.index_k, first_row_[r] + j); };
    p.cos_sin = [&](std::int64_t at) {
      const auto* row = rope_.view().as<float>() + at * 64;
      return std::vector<float>(row, row + 64);
    };
    const oracle::IndexerLogits logits = oracle::indexer_row(p);
    if (!oracle::may_be_top_k(logits.logits, logits.bound, chosen))
      outcome.fail(fmt::format("request {} position {}: not the tokens with the highest logits", r,
                               position));
  }

  struct RowName {
    std::size_t request;
    std::int32_t position;
    int head;
    std::size_t token;  ///< in the step
  };

  void compare_row(Outcome& outcome, const RowName& n, const Results& results,
                   std::span<const std::int32_t> chosen) const {
    const std::int64_t first = first_row_[n.request], token = first + n.position;
    const std::int64_t first_weight = std::int64_t{n.head} * (d_.qk_nope_head_dim + d_.v_head_dim);
    std::int64_t current = -1;
    std::vector<double> row;
    const auto element = [&](std::int64_t j, int i) {
      if (j != current) row = stored_row(first + j);
      current = j;
      return row[static_cast<std::size_t>(i)];
    };
    oracle::MlaRowProblem p;
    p.dims = d_;
    p.position = n.position;
    p.num_keys = n.position + 1;
    p.scale = 1.0 / std::sqrt(d_.qk_head_dim());
    p.cache_dtype = cache_dtype_;
    p.q = [&](int i) { return t_.query.get(t_.query.offset({token, n.head, i})); };
    p.latent = element;
    p.k_pe = [&](std::int64_t j, int i) { return element(j, d_.kv_lora_rank + i); };
    p.w_uk = [&](int i, int l) { return weight_.get(weight_.offset({first_weight + i, l})); };
    p.w_uv = [&](int v, int l) {
      return weight_.get(weight_.offset({first_weight + d_.qk_nope_head_dim + v, l}));
    };
    const oracle::MlaRowResult want = oracle::mla_sparse_row(p, chosen);
    const auto where = [&](std::string_view what) {
      return fmt::format("{} of request {} position {} head {}", what, n.request, n.position,
                         n.head);
    };
    const std::size_t at =
        n.token * static_cast<std::size_t>(heads_) + static_cast<std::size_t>(n.head);
    for (std::size_t v = 0; v < want.out.size(); ++v)
      compare(outcome, to_f32(results.out[at * want.out.size() + v]), want.out[v],
              want.out_bound[v], [&] { return where(fmt::format("output[{}]", v)); });
    compare(outcome, results.lse[at], want.lse, want.lse_bound, [&] { return where("lse"); });
  }

  /// A token's row as the cache gives it back.
  std::vector<double> stored_row(std::int64_t token) const {
    std::vector<double> row;
    for (int i = 0; i < d_.kv_lora_rank; ++i)
      row.push_back(t_.kv_c.get(t_.kv_c.offset({token, i})));
    for (int i = 0; i < d_.qk_rope_head_dim; ++i)
      row.push_back(t_.k_pe.get(t_.k_pe.offset({token, i})));
    if (!is_ds()) return row;
    std::array<std::uint16_t, fp8_ds_mla::kRope> rope{};
    for (std::size_t i = 0; i < rope.size(); ++i)
      rope[i] = to_bf16(static_cast<float>(row[fp8_ds_mla::kLatent + i])).bits;
    std::array<std::uint8_t, fp8_ds_mla::kRowBytes> bytes{};
    oracle::fp8_ds_mla_encode(std::span(row).first(fp8_ds_mla::kLatent), rope, bytes);
    oracle::fp8_ds_mla_decode(bytes, row);
    return row;
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
    c.num_speculative_tokens = 3;
    c.arithmetic = arithmetic;
    MlaBuilderConfig& mla = c.mla.emplace();
    mla.dims = d_;
    mla.max_model_len = kMaxModelLen;
    mla.max_num_seqs = 8;
    mla.workspace_tokens = workspace_tokens_;
    SparseBuilderConfig& sparse = c.sparse.emplace();
    sparse.topk = topk_;
    sparse.max_num_batched_tokens = 4 * kMaxModelLen;
    sparse.strategy = strategy_;
    sparse.max_gathered_keys = gathered_keys_;
    sparse.max_logits_bytes = std::int64_t{logits_} * 4;
    return c;
  }

  ImplConfig impl_config(const KernelOptions& kernels, Executor& executor) const {
    ImplConfig c;
    c.num_q_heads = heads_;
    c.num_kv_heads = 1;
    c.head_size = d_.cache_dim();
    c.kv_cache_dtype = is_ds() ? "fp8_ds_mla" : "auto";
    c.mla.emplace().weights = MlaWeights::from_kv_b_proj({.weight = weight_.view(),
                                                          .dims = d_,
                                                          .num_heads = heads_,
                                                          .dtype = DType::bf16,
                                                          .isa = kernels.isa,
                                                          .executor = &executor});
    return c;
  }

  const Backend& backend_;
  bool with_indexer_;
  MlaDims d_;
  DType cache_dtype_ = DType::bf16;
  int heads_ = 1, block_size_ = 64, topk_ = 1, index_heads_ = 1, logits_ = 0;
  SparseStrategy strategy_ = SparseStrategy::automatic;
  std::int64_t workspace_tokens_ = 0, gathered_keys_ = 0, num_rows_ = 0;
  bool is_neox_ = true;
  std::vector<Lengths> lengths_;
  std::vector<std::int64_t> first_row_;
  std::optional<RandomBlocks> blocks_;
  Tokens t_;
  Storage weight_, cache_, index_cache_, rope_;
  std::vector<float> norm_weight_, norm_bias_;
  std::vector<std::int32_t> named_;  ///< [tokens, topk]
};

}  // namespace

std::unique_ptr<Case> make_sparse_layer_case(Rng& rng, bool with_indexer) {
  return std::make_unique<SparseLayerCase>(rng, with_indexer);
}

}  // namespace attend::conformance
