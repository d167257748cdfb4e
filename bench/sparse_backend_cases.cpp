// SPDX-License-Identifier: Apache-2.0
// A layer of FLASHMLA_SPARSE with an fp8_ds_mla cache whose new tokens have a context: both
// strategies, from which their cost model is fitted (docs/adr/0024-sparse-prefill-strategies.md).
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/cache/cache_memory.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/ops/mla_cache.h"
#include "attend/ops/mla_weights.h"
#include "attend/oracle/mla.h"
#include "attend/oracle/quantize.h"
#include "bench/batch.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr MlaDims kDims = {
    .kv_lora_rank = 512, .qk_nope_head_dim = 128, .qk_rope_head_dim = 64, .v_head_dim = 128};
constexpr int kBlockSize = 64, kTopk = 2048;
constexpr std::int64_t kHeadRows = kDims.qk_nope_head_dim + kDims.v_head_dim;

struct LayerShape {
  int heads, query, keys;
};

/// The last `query` of `keys` tokens.
class SparseLayerProblem : public Problem {
 public:
  SparseLayerProblem(LayerShape shape, Executor& executor)
      : s_(shape),
        batch_(make_batch(requests(1, s_.query, s_.keys), kBlockSize)),
        executor_(executor),
        weight_(static_cast<std::size_t>(s_.heads * kHeadRows * kDims.kv_lora_rank) * sizeof(bf16)),
        query_(static_cast<std::size_t>(s_.query) * static_cast<std::size_t>(s_.heads) *
               kDims.qk_head_dim() * sizeof(bf16)),
        out_(static_cast<std::size_t>(s_.query) * static_cast<std::size_t>(s_.heads) *
             kDims.v_head_dim * sizeof(bf16)),
        cache_(static_cast<std::size_t>(batch_.num_rows) * fp8_ds_mla::kRowBytes,
               {.executor = &executor}),
        indices_(static_cast<std::size_t>(s_.query) * kTopk, -1) {
    fill(weight_, 1);
    fill(query_, 2);
    auto* weights = static_cast<bf16*>(weight_.data());
    const float size = 1.0F / std::sqrt(static_cast<float>(kDims.kv_lora_rank));
    for (std::size_t i = 0; i < weight_.size() / sizeof(bf16); ++i)
      weights[i] = to_bf16(size * to_f32(weights[i]));
    fill_cache();
    name_tokens();
    const Backend& backend = find_backend("FLASHMLA_SPARSE");
    impl_ = backend.make_impl(impl_config());
    automatic_ = make_call(backend, SparseStrategy::automatic);
    mixed_ = make_call(backend, SparseStrategy::mixed);
    separate_ = make_call(backend, SparseStrategy::separate);
  }

  void run() override { run(automatic_); }
  std::vector<Part> parts() override {
    return {{"mixed", Bound::compute, flops(), bytes(), [this] { run(mixed_); }},
            {"separate", Bound::compute, flops(), bytes(), [this] { run(separate_); }}};
  }
  double flops() const override {
    return 2.0 * visits() * (kDims.cache_dim() + kDims.kv_lora_rank) * s_.heads;
  }
  double bytes() const override { return visits() * fp8_ds_mla::kRowBytes; }
  std::string verify() const override {
    for (const auto& [token, head] : {std::pair{0, 0}, {s_.query - 1, s_.heads - 1}}) {
      std::string wrong = verify_row(token, head);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  struct Call {
    std::unique_ptr<Metadata> metadata;
    Buffer workspace;
  };

  static void fill(const Buffer& b, std::uint64_t seed) {
    fill_random(b.data(), DType::bf16,
                Elements{0, static_cast<std::int64_t>(b.size() / sizeof(bf16))}, seed);
  }
  double visits() const {
    double sum = 0.0;
    for (const std::int32_t i : indices_) sum += i >= 0 ? 1.0 : 0.0;
    return sum;
  }
  TensorView cache_view() const {
    return {cache_.data(),
            DType::u8,
            {batch_.num_rows / kBlockSize, kBlockSize, fp8_ds_mla::kRowBytes}};
  }
  void fill_cache() {
    Buffer plain(static_cast<std::size_t>(batch_.num_rows * kDims.cache_dim()) * sizeof(bf16));
    fill(plain, 3);
    const TensorView all(plain.data(), DType::bf16, {batch_.num_rows, kDims.cache_dim()});
    std::vector<std::int64_t> slots(static_cast<std::size_t>(batch_.num_rows));
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    concat_and_cache_mla({.kv_c = all.slice(1, 0, kDims.kv_lora_rank),
                          .k_pe = all.slice(1, kDims.kv_lora_rank, kDims.qk_rope_head_dim),
                          .kv_cache = cache_view(),
                          .slot_mapping = {slots.data(), DType::i64, {batch_.num_rows}}},
                         &executor_);
  }
  /// Each token: one of every stretch of its context, ascending, as the indexer gives them.
  void name_tokens() {
    std::uint64_t state = 7;
    for (int t = 0; t < s_.query; ++t) {
      const std::int64_t seen = s_.keys - s_.query + t + 1;
      const std::int64_t count = std::min<std::int64_t>(kTopk, seen);
      for (std::int64_t i = 0; i < count; ++i) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        const std::int64_t begin = seen * i / count, end = seen * (i + 1) / count;
        indices_[static_cast<std::size_t>(t * std::int64_t{kTopk} + i)] = static_cast<std::int32_t>(
            begin + static_cast<std::int64_t>(state >> 33) % (end - begin));
      }
    }
  }
  ImplConfig impl_config() const {
    ImplConfig c;
    c.num_q_heads = s_.heads;
    c.num_kv_heads = 1;
    c.head_size = kDims.cache_dim();
    c.kv_cache_dtype = "fp8_ds_mla";
    c.mla.emplace().weights = MlaWeights::from_kv_b_proj(
        {.weight = {weight_.data(), DType::bf16, {s_.heads * kHeadRows, kDims.kv_lora_rank}},
         .dims = kDims,
         .num_heads = s_.heads,
         .executor = &executor_});
    return c;
  }
  Call make_call(const Backend& backend, SparseStrategy strategy) const {
    BuilderConfig c;
    c.num_q_heads = s_.heads;
    c.cache = {.num_blocks = batch_.num_rows / kBlockSize,
               .block_size = kBlockSize,
               .num_kv_heads = 1,
               .head_size = kDims.cache_dim(),
               .dtype = DType::u8,
               .format = KvFormat::fp8_ds_mla};
    c.num_workers = executor_.num_workers();
    MlaBuilderConfig& mla = c.mla.emplace();
    mla.dims = kDims;
    mla.max_model_len = s_.keys;
    mla.max_num_seqs = 1;
    SparseBuilderConfig& sparse = c.sparse.emplace();
    sparse.topk = kTopk;
    sparse.max_num_batched_tokens = s_.query;
    sparse.strategy = strategy;
    CommonMetadata m;
    m.query_start_loc = batch_.query_start;
    m.seq_lens = batch_.seq_lens;
    m.num_reqs = 1;
    m.num_tokens = m.max_query_len = s_.query;
    m.max_seq_len = s_.keys;
    m.block_table = batch_.table_view(0, 1);
    Call call;
    call.metadata = backend.make_builder(c)->build(0, m);
    call.workspace = Buffer(call.metadata->workspace_bytes());
    return call;
  }
  void run(const Call& call) const {
    ForwardArgs a;
    a.query = {query_.data(), DType::bf16, {s_.query, s_.heads, kDims.qk_head_dim()}};
    a.kv_cache = cache_view();
    a.topk_indices = {indices_.data(), DType::i32, {s_.query, kTopk}};
    a.output = {out_.data(), DType::bf16, {s_.query, s_.heads, kDims.v_head_dim}};
    a.workspace = call.workspace.workspace();
    a.executor = &executor_;
    impl_->forward(a, call.metadata.get());
  }
  std::string verify_row(int token, int head) const {
    oracle::MlaRowProblem p;
    p.dims = kDims;
    p.position = s_.keys - s_.query + token;
    p.num_keys = s_.keys;
    p.scale = 1.0 / std::sqrt(kDims.qk_head_dim());
    p.cache_dtype = DType::u8;
    const auto at = [](const Buffer& memory, std::int64_t row, int columns, int i) {
      return static_cast<double>(value_at(memory.data(), DType::bf16, row * columns + i));
    };
    std::int64_t current = -1;
    std::vector<double> numbers(static_cast<std::size_t>(kDims.cache_dim()));
    const auto element = [&](std::int64_t j, int i) {
      if (j != current) {
        const auto* bytes = static_cast<const std::uint8_t*>(cache_.data()) +
                            batch_.row(0, j) * fp8_ds_mla::kRowBytes;
        oracle::fp8_ds_mla_decode({bytes, fp8_ds_mla::kRowBytes}, numbers);
        current = j;
      }
      return numbers[static_cast<std::size_t>(i)];
    };
    const std::int64_t row = std::int64_t{token} * s_.heads + head;
    p.q = [&](int d) { return at(query_, row, kDims.qk_head_dim(), d); };
    p.latent = element;
    p.k_pe = [&](std::int64_t j, int d) { return element(j, kDims.kv_lora_rank + d); };
    p.w_uk = [&](int i, int l) { return at(weight_, head * kHeadRows + i, kDims.kv_lora_rank, l); };
    p.w_uv = [&](int v, int l) {
      return at(weight_, head * kHeadRows + kDims.qk_nope_head_dim + v, kDims.kv_lora_rank, l);
    };
    const auto chosen = std::span(indices_).subspan(static_cast<std::size_t>(token) * kTopk, kTopk);
    const oracle::MlaRowResult want = oracle::mla_sparse_row(p, chosen);
    for (int v = 0; v < kDims.v_head_dim; ++v) {
      const auto i = static_cast<std::size_t>(v);
      const double got = at(out_, row, kDims.v_head_dim, v);
      if (!(std::abs(got - want.out[i]) <= want.out_bound[i]))
        return fmt::format("token {} head {} element {} is {}, expected {} +- {:.3g}", token, head,
                           v, got, want.out[i], want.out_bound[i]);
    }
    return "";
  }

  LayerShape s_;
  Batch batch_;
  Executor& executor_;
  Buffer weight_, query_, out_;
  CacheMemory cache_;
  std::vector<std::int32_t> indices_;
  std::unique_ptr<Impl> impl_;
  Call automatic_, mixed_, separate_;
};

Case layer_case(LayerShape s) {
  return {fmt::format("sparse_layer_fp8_h{}_{}_of_{}k", s.heads, s.query, s.keys / 1024),
          fmt::format("layer of {} heads, the last {} of {} tokens, 2048 each, fp8_ds_mla; parts: "
                      "the strategies",
                      s.heads, s.query, s.keys),
          Bound::parts,
          [s](Executor& executor) { return std::make_unique<SparseLayerProblem>(s, executor); }};
}

}  // namespace

std::vector<Case> sparse_backend_cases() {
  return {layer_case({16, 16, 32768}), layer_case({16, 64, 32768}), layer_case({16, 256, 32768}),
          layer_case({128, 64, 32768})};
}

}  // namespace attend::bench
