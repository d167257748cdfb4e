// SPDX-License-Identifier: Apache-2.0
// A layer of FLASH_ATTN_MLA whose new tokens have a long context: in chunks, and all at once.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/cache/cache_memory.h"
#include "attend/ops/mla_weights.h"
#include "attend/oracle/mla.h"
#include "bench/batch.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr MlaDims kDims = {
    .kv_lora_rank = 512, .qk_nope_head_dim = 128, .qk_rope_head_dim = 64, .v_head_dim = 128};
constexpr int kHeads = 16, kBlockSize = 64, kQuery = 2048, kKeys = 16384;
constexpr std::int64_t kHeadRows = kDims.qk_nope_head_dim + kDims.v_head_dim;

/// The last kQuery of kKeys tokens, bf16.
class ContextProblem : public Problem {
 public:
  explicit ContextProblem(Executor& executor)
      : batch_(make_batch(requests(1, kQuery, kKeys), kBlockSize)),
        executor_(executor),
        weight_(kHeads * kHeadRows * kDims.kv_lora_rank * sizeof(bf16)),
        query_(static_cast<std::size_t>(kQuery) * kHeads * kDims.qk_head_dim() * sizeof(bf16)),
        out_(static_cast<std::size_t>(kQuery) * kHeads * kDims.v_head_dim * sizeof(bf16)),
        cache_(static_cast<std::size_t>(batch_.num_rows) * kDims.cache_dim() * sizeof(bf16),
               {.executor = &executor}) {
    fill(weight_, 1);
    fill(query_, 2);
    fill_random(cache_.data(), DType::bf16, {0, batch_.num_rows * kDims.cache_dim()}, 3);
    // Rows of variance 1 / L make keys and values of variance 1.
    auto* weights = static_cast<bf16*>(weight_.data());
    const float size = 1.0F / std::sqrt(static_cast<float>(kDims.kv_lora_rank));
    for (std::size_t i = 0; i < weight_.size() / sizeof(bf16); ++i)
      weights[i] = to_bf16(size * to_f32(weights[i]));
    const Backend& backend = find_backend("FLASH_ATTN_MLA");
    impl_ = backend.make_impl(impl_config());
    chunked_ = make_call(backend, 0);
    whole_ = make_call(backend, kKeys);
  }

  void run() override { run(chunked_); }
  std::vector<Part> parts() override {
    return {{"one chunk", Bound::compute, flops(), bytes(), [this] { run(whole_); }}};
  }
  /// Attention, and the projection of every latent once.
  double flops() const override {
    const double attention =
        2.0 * batch_.pairs(-1, 0, 1) * (kDims.qk_head_dim() + kDims.v_head_dim) * kHeads;
    return attention + 2.0 * kKeys * static_cast<double>(kHeadRows) * kDims.kv_lora_rank * kHeads;
  }
  double bytes() const override { return 2.0 * kKeys * kDims.cache_dim(); }
  std::string verify() const override {
    for (const auto& [token, head] : {std::pair{0, 3}, {kQuery - 1, 15}, {777, 8}}) {
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
  ImplConfig impl_config() const {
    ImplConfig c;
    c.num_q_heads = kHeads;
    c.num_kv_heads = 1;
    c.head_size = kDims.cache_dim();
    c.mla.emplace().weights = MlaWeights::from_kv_b_proj(
        {.weight = {weight_.data(), DType::bf16, {kHeads * kHeadRows, kDims.kv_lora_rank}},
         .dims = kDims,
         .num_heads = kHeads,
         .executor = &executor_});
    return c;
  }
  Call make_call(const Backend& backend, std::int64_t workspace_tokens) const {
    BuilderConfig c;
    c.num_q_heads = kHeads;
    c.cache.num_blocks = batch_.num_rows / kBlockSize;
    c.cache.block_size = kBlockSize;
    c.cache.num_kv_heads = 1;
    c.cache.head_size = kDims.cache_dim();
    c.num_workers = executor_.num_workers();
    MlaBuilderConfig& mla = c.mla.emplace();
    mla.dims = kDims;
    mla.max_model_len = kKeys;
    mla.max_num_seqs = 1;
    mla.workspace_tokens = workspace_tokens;
    CommonMetadata m;
    m.query_start_loc = batch_.query_start;
    m.seq_lens = batch_.seq_lens;
    m.num_reqs = 1;
    m.num_tokens = m.max_query_len = kQuery;
    m.max_seq_len = kKeys;
    m.block_table = batch_.table_view(0, 1);
    Call call;
    call.metadata = backend.make_builder(c)->build(0, m);
    call.workspace = Buffer(call.metadata->workspace_bytes());
    return call;
  }
  void run(const Call& call) const {
    ForwardArgs a;
    a.query = {query_.data(), DType::bf16, {kQuery, kHeads, kDims.qk_head_dim()}};
    a.kv_cache = {
        cache_.data(), DType::bf16, {batch_.num_rows / kBlockSize, kBlockSize, kDims.cache_dim()}};
    a.output = {out_.data(), DType::bf16, {kQuery, kHeads, kDims.v_head_dim}};
    a.workspace = call.workspace.workspace();
    a.executor = &executor_;
    impl_->forward(a, call.metadata.get());
  }
  std::string verify_row(int token, int head) const {
    oracle::MlaRowProblem p;
    p.dims = kDims;
    p.position = kKeys - kQuery + token;
    p.num_keys = kKeys;
    p.scale = 1.0 / std::sqrt(kDims.qk_head_dim());
    const auto at = [](const auto& memory, std::int64_t row, int columns, int i) {
      return static_cast<double>(value_at(memory.data(), DType::bf16, row * columns + i));
    };
    const std::int64_t row = std::int64_t{token} * kHeads + head;
    p.q = [&](int d) { return at(query_, row, kDims.qk_head_dim(), d); };
    p.latent = [&](std::int64_t j, int l) {
      return at(cache_, batch_.row(0, j), kDims.cache_dim(), l);
    };
    p.k_pe = [&](std::int64_t j, int d) {
      return at(cache_, batch_.row(0, j), kDims.cache_dim(), kDims.kv_lora_rank + d);
    };
    p.w_uk = [&](int i, int l) { return at(weight_, head * kHeadRows + i, kDims.kv_lora_rank, l); };
    p.w_uv = [&](int v, int l) {
      return at(weight_, head * kHeadRows + kDims.qk_nope_head_dim + v, kDims.kv_lora_rank, l);
    };
    const oracle::MlaRowResult want = oracle::mla_prefill_row(p);
    for (int v = 0; v < kDims.v_head_dim; ++v) {
      const auto i = static_cast<std::size_t>(v);
      const double got = at(out_, row, kDims.v_head_dim, v);
      if (!(std::abs(got - want.out[i]) <= want.out_bound[i]))
        return fmt::format("token {} head {} dim {}: expected {} +- {}, got {}", token, head, v,
                           want.out[i], want.out_bound[i], got);
    }
    return "";
  }

  Batch batch_;
  Executor& executor_;
  Buffer weight_, query_, out_;
  CacheMemory cache_;
  std::unique_ptr<Impl> impl_;
  Call chunked_, whole_;
};

}  // namespace

std::vector<Case> mla_context_cases() {
  return {{"mla_context_2k_of_16k",
           "prefill of the last 2048 of 16384 tokens of an MLA layer of 16 heads, projection "
           "included, beside the same with the whole context at once",
           Bound::parts,
           [](Executor& executor) { return std::make_unique<ContextProblem>(executor); }}};
}

}  // namespace attend::bench
