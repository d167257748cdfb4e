// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "attend/backend/sparse_indexer.h"
#include "attend/dist/indexer.h"
#include "attend/ops/indexer.h"
#include "attend/ops/indexer_logits.h"
#include "attend/ops/top_k.h"
#include "backends/common/layout_cursor.h"
#include "backends/common/mla_checks.h"
#include "backends/flashmla_sparse/check_group.h"
#include "backends/flashmla_sparse/metadata.h"
#include "core/check.h"

namespace attend {
namespace {

using flashmla_sparse::IndexerStep;
using flashmla_sparse::LogitsChunk;
using flashmla_sparse::SparseMlaMetadata;

constexpr std::string_view kMakeOp = "SparseIndexer";
constexpr std::string_view kOp = "SparseIndexer.forward";
constexpr std::int64_t kDim = indexer_cache::kDim;

check::Where at(std::string_view argument) { return {kOp, argument}; }

/// Where things lie in the workspace, in bytes from its aligned start.
struct Layout {
  std::size_t codes = 0;    ///< fp8_e4m3 [T, H, 128]
  std::size_t weights = 0;  ///< f32 [T, H]
  std::size_t key = 0;      ///< [T, 128], up to 4 bytes an element
  std::size_t keys = 0;     ///< fp8_e4m3 [gathered, 128]
  std::size_t scales = 0;   ///< f32 [gathered]
  std::size_t logits = 0;   ///< f32
  std::size_t chosen = 0;   ///< i32 [tokens of a chunk, topk], of several ranks: this one's choice
  std::size_t total = 0;
};

Layout lay_out(const SparseMlaMetadata& m, int num_heads) {
  const auto tokens = static_cast<std::size_t>(m.num_tokens);
  const auto heads = static_cast<std::size_t>(num_heads);
  const auto keys = static_cast<std::size_t>(m.indexer.most_keys);
  Layout l;
  LayoutCursor cursor(0);
  l.codes = cursor.take(tokens * heads * kDim);
  l.weights = cursor.take(tokens * heads * sizeof(float));
  l.key = cursor.take(tokens * kDim * sizeof(float));
  l.keys = cursor.take(keys * kDim);
  l.scales = cursor.take(keys * sizeof(float));
  l.logits = cursor.take(static_cast<std::size_t>(m.indexer.most_logits) * sizeof(float));
  if (m.dcp.world_size > 1)
    l.chosen = cursor.take(static_cast<std::size_t>(m.indexer.most_tokens * m.topk) *
                           sizeof(std::int32_t));
  l.total = cursor.at() + LayoutCursor::kAlignment;
  return l;
}

const SparseMlaMetadata& checked(const Metadata& metadata, int topk) {
  const auto* m = dynamic_cast<const SparseMlaMetadata*>(&metadata);
  check::require(m != nullptr, at("metadata"), "what a sparse MLA builder made",
                 "another back end's");
  check::require(
      m->topk == topk, at("metadata"), [&] { return fmt::format("{} tokens a query", topk); },
      m->topk);
  return *m;
}

void check_cache(const SparseIndexerArgs& a, const SparseMlaMetadata& m) {
  const check::Where where = at("cache");
  check::tensor(where, a.cache, 3, {DType::u8});
  check::require(
      a.cache.shape[2] == indexer_cache::kRowBytes, where,
      [] { return fmt::format("{} bytes a token", indexer_cache::kRowBytes); },
      [&] { return describe(a.cache); });
  check::require(
      a.cache.shape[1] == m.block_size, where,
      [&] { return fmt::format("blocks of {} tokens, those of the metadata", m.block_size); },
      [&] { return describe(a.cache); });
  check::require(a.cache.strides[2] == 1 && a.cache.strides[1] == indexer_cache::kRowBytes, where,
                 "blocks that are one piece of memory each", [&] { return describe(a.cache); });
  check::distinct_elements(where, a.cache);
  check_mla_cache_room(kOp, a.cache, m.slot_mapping, "cache");
  check_mla_blocks(kOp,
                   {m.block_table, m.seq_lens, m.block_size * m.dcp.world_size, a.cache.shape[0]});
}

void check_args(const SparseIndexerConfig& c, const SparseIndexerArgs& a,
                const SparseMlaMetadata& m, std::size_t workspace_bytes) {
  check::require(a.q.rank == 2 || a.q.rank == 3, at("q"), "rank 2 or 3",
                 [&] { return describe(a.q); });
  check::tensor(at("q"), a.q, a.q.rank, {DType::f32, DType::f16, DType::bf16});
  if (a.q.rank == 3) {
    check::shape(at("q"), a.q, {-1, c.num_heads, kDim});
  } else {
    check::shape(at("q"), a.q, {-1, c.num_heads * kDim});
  }
  check::tensor(at("k"), a.k, 2, {a.q.dtype});
  check::shape(at("k"), a.k, {-1, kDim});
  check::tensor(at("weights"), a.weights, 2, {DType::f32, a.q.dtype});
  check::shape(at("weights"), a.weights, {-1, c.num_heads});
  check::tensor(at("positions"), a.positions, 1, {DType::i64});
  check::contiguous(at("positions"), a.positions);
  const std::array<std::pair<const char*, ConstTensorView>, 4> read = {
      {{"q", a.q}, {"k", a.k}, {"weights", a.weights}, {"positions", a.positions}}};
  for (const auto& [name, t] : read) {
    check::unit_last_stride(at(name), t);
    check_mla_rows(kOp, name, t, m.num_tokens);
  }
  check_cache(a, m);
  check_mla_rows(kOp, "topk_indices", a.topk_indices, m.num_tokens);
  for (const auto& [name, t] : {std::pair<const char*, ConstTensorView>{"cache", a.cache},
                                {"topk_indices", a.topk_indices}}) {
    for (const auto& [other, input] : read) check::no_overlap(at(name), t, other, input);
    if (m.block_table.defined()) check::no_overlap(at(name), t, "block_table", m.block_table);
  }
  check::no_overlap(at("topk_indices"), a.topk_indices, "cache", a.cache);
  flashmla_sparse::check_group(kOp, a.communicator, m.dcp);
  check_mla_workspace(kOp, a.workspace, workspace_bytes);
}

void check_result(const SparseIndexerArgs& a, int topk) {
  check::tensor(at("topk_indices"), a.topk_indices, 2, {DType::i32});
  check::shape(at("topk_indices"), a.topk_indices, {-1, topk});
  check::unit_last_stride(at("topk_indices"), a.topk_indices);
  check::distinct_elements(at("topk_indices"), a.topk_indices);
}

class Call {
 public:
  Call(const SparseIndexerConfig& c, const SparseIndexerArgs& a, const SparseMlaMetadata& m,
       Executor& executor)
      : c_(c),
        a_(a),
        m_(m),
        executor_(executor),
        layout_(lay_out(m, c.num_heads)),
        base_(aligned_start(a.workspace.data)),
        codes_(base_ + layout_.codes, DType::fp8_e4m3, {m.num_tokens, c.num_heads, kDim}),
        weights_(base_ + layout_.weights, DType::f32, {m.num_tokens, c.num_heads}) {}

  void run() {
    prepare();
    // By the tokens of all ranks: what a rank holds may be few where the whole is not.
    indexer_short_rows(
        {.lengths = {m_.buffers->visible_of_token.data(), DType::i32, {m_.num_tokens}},
         .out = a_.topk_indices.slice(0, 0, m_.num_tokens)},
        &executor_);
    for (const IndexerStep& step : m_.indexer.steps) {
      if (!step.cu_seq_lens.empty()) gather(step);
      for (const LogitsChunk& chunk : step.chunks) choose(step, chunk);
    }
  }

 private:
  /// Codes of the queries; keys go to the cache.
  void prepare() const {
    PrepareIndexerArgs p;
    p.q = a_.q;
    p.k = a_.k;
    p.weights = a_.weights;
    p.positions = a_.positions.slice(0, 0, m_.num_tokens);
    p.cos_sin_cache = c_.cos_sin_cache;
    p.is_neox = c_.is_neox;
    p.k_norm_weight = {c_.k_norm_weight.data(), DType::f32, {kDim}};
    p.k_norm_bias = {c_.k_norm_bias.data(), DType::f32, {kDim}};
    p.k_norm_eps = c_.k_norm_eps;
    p.hadamard = c_.hadamard;
    p.q_scale_fmt = c_.scale_fmt;
    p.softmax_scale = c_.softmax_scale;
    p.q_codes = codes_;
    p.weights_out = weights_;
    p.k_out = {base_ + layout_.key, a_.q.dtype, {m_.num_tokens, kDim}};
    prepare_indexer(p, &executor_);
    if (m_.slot_mapping.empty()) return;
    indexer_k_quant_and_cache(
        {.k = p.k_out,
         .kv_cache = a_.cache,
         .slot_mapping = {m_.slot_mapping.data(), DType::i64, {m_.num_tokens}},
         .scale_fmt = c_.scale_fmt},
        &executor_);
  }

  void gather(const IndexerStep& step) const {
    const std::int32_t rows = step.cu_seq_lens.back();
    const std::int64_t requests = step.request_end - step.request_begin;
    cp_gather_indexer_k_quant_cache(
        {.kv_cache = a_.cache,
         .dst_k = {base_ + layout_.keys, DType::fp8_e4m3, {rows, kDim}},
         .dst_scale = {base_ + layout_.scales, DType::f32, {rows}},
         .block_table = m_.block_table.slice(0, step.request_begin, requests),
         .cu_seq_lens = {step.cu_seq_lens.data(), DType::i32, {requests + 1}}},
        &executor_);
  }

  void choose(const IndexerStep& step, const LogitsChunk& chunk) const {
    const std::int32_t tokens = chunk.num_tokens();
    const ConstTensorView lengths(m_.buffers->held_of_token.data() + chunk.token_begin, DType::i32,
                                  {tokens});
    const ConstTensorView zeros(m_.buffers->zeros.data(), DType::i32, {tokens});
    const ConstTensorView weights = weights_.slice(0, chunk.token_begin, tokens);
    const TensorView logits(base_ + layout_.logits, DType::f32, {tokens, chunk.columns});
    if (step.cu_seq_lens.empty()) {
      const std::int64_t requests = chunk.num_requests(), next_n = tokens / requests;
      Fp8PagedMqaLogitsArgs l;
      l.q = {codes_.slice(0, chunk.token_begin, tokens).data,
             DType::fp8_e4m3,
             {requests, next_n, c_.num_heads, kDim}};
      l.kv_cache = a_.cache;
      l.weights = weights;
      l.context_lens = {lengths.data, DType::i32, {requests, next_n}};
      l.block_table = m_.block_table.slice(0, chunk.request_begin, requests);
      l.logits = logits;
      l.clean_logits = false;  // nobody reads them
      fp8_paged_mqa_logits(l, &executor_);
    } else {
      Fp8MqaLogitsArgs l;
      l.q = codes_.slice(0, chunk.token_begin, tokens);
      l.k = {base_ + layout_.keys + static_cast<std::size_t>(chunk.first_key) * kDim,
             DType::fp8_e4m3,
             {chunk.columns, kDim}};
      l.k_scale = {
          base_ + layout_.scales + static_cast<std::size_t>(chunk.first_key) * sizeof(float),
          DType::f32,
          {chunk.columns}};
      l.weights = weights;
      l.ks = zeros;
      l.ke = lengths;
      l.logits = logits;
      l.clean_logits = false;
      fp8_mqa_logits(l, &executor_);
    }
    const TensorView result = a_.topk_indices.slice(0, chunk.token_begin, tokens);
    const bool alone = m_.dcp.world_size == 1;
    const TensorView chosen =
        alone ? result : TensorView(base_ + layout_.chosen, DType::i32, {tokens, m_.topk});
    top_k_per_row_prefill(
        {.logits = logits, .row_starts = zeros, .row_ends = lengths, .out = chosen}, &executor_);
    if (alone) return;
    dcp_top_k({.logits = logits,
               .row_starts = {},
               .indices = chosen,
               .out = result,
               .interleave = m_.dcp.interleave},
              *a_.communicator, &executor_);
  }

  const SparseIndexerConfig& c_;
  const SparseIndexerArgs& a_;
  const SparseMlaMetadata& m_;
  Executor& executor_;
  Layout layout_;
  std::byte* base_;
  TensorView codes_, weights_;
};

void fill_with_nothing(const TensorView& rows, std::int64_t first) {
  for (std::int64_t t = first; t < rows.shape[0]; ++t)
    std::fill_n(rows.as<std::int32_t>() + t * rows.strides[0], rows.shape[1], -1);
}

}  // namespace

SparseIndexer::SparseIndexer(SparseIndexerConfig config) : config_(std::move(config)) {
  const auto where = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  const SparseIndexerConfig& c = config_;
  check::require(c.num_heads >= 1, where("num_heads"), "a number >= 1", c.num_heads);
  check::require(c.topk >= 1, where("topk"), "a number >= 1", c.topk);
  check::tensor(where("cos_sin_cache"), c.cos_sin_cache, 2, {DType::f32, DType::f16, DType::bf16});
  check::shape(where("cos_sin_cache"), c.cos_sin_cache, {-1, kDim / 2});
  for (const auto& [name, values] :
       {std::pair{"k_norm_weight", &c.k_norm_weight}, std::pair{"k_norm_bias", &c.k_norm_bias}})
    check::require(
        values->size() == static_cast<std::size_t>(kDim), where(name),
        [] { return fmt::format("{} numbers", kDim); }, values->size());
  check::require(std::isfinite(c.k_norm_eps) && c.k_norm_eps > 0.0F, where("k_norm_eps"),
                 "a finite value > 0", c.k_norm_eps);
  check::require(!c.softmax_scale || std::isfinite(*c.softmax_scale), where("softmax_scale"),
                 "a finite value", [&] { return fmt::format("{}", *c.softmax_scale); });
}

std::size_t SparseIndexer::workspace_bytes(const Metadata& metadata) const {
  return lay_out(checked(metadata, config_.topk), config_.num_heads).total;
}

void SparseIndexer::forward(const SparseIndexerArgs& args, const Metadata* metadata) const {
  check_result(args, config_.topk);
  if (metadata == nullptr) {
    fill_with_nothing(args.topk_indices, 0);
    return;
  }
  const SparseMlaMetadata& m = checked(*metadata, config_.topk);
  check_args(config_, args, m, lay_out(m, config_.num_heads).total);
  fill_with_nothing(args.topk_indices, m.num_tokens);
  Call(config_, args, m, args.executor != nullptr ? *args.executor : default_executor()).run();
}

}  // namespace attend
