// SPDX-License-Identifier: Apache-2.0
#include "serving/sparse_layer.h"

#include <cmath>

namespace attend::serving {
namespace {

constexpr std::int64_t kDim = indexer_cache::kDim;

}  // namespace

void fill_index_rope(std::int64_t position, float* row) {
  for (int i = 0; i < 32; ++i) {
    const double angle = static_cast<double>(position) * std::pow(10000.0, -i / 32.0);
    row[i] = static_cast<float>(std::cos(angle));
    row[32 + i] = static_cast<float>(std::sin(angle));
  }
}

std::int64_t index_block_bytes(int block_size) noexcept {
  return std::int64_t{block_size} * indexer_cache::kRowBytes;
}

SparseLayers::SparseLayers(const ModelPreset& model, DType dtype, const IndexerMemory& memory,
                           Executor& executor)
    : model_(model), dtype_(dtype), memory_(memory) {
  rope_ = Buffer(static_cast<std::size_t>(memory.max_model_len) * 64 * sizeof(float));
  auto* rope = static_cast<float*>(rope_.data());
  for (std::int64_t p = 0; p < memory.max_model_len; ++p) fill_index_rope(p, rope + p * 64);
  CacheMemoryOptions options;
  options.executor = &executor;
  options.fill = 0xff;  // NaN codes and scales
  cache_ = CacheMemory(static_cast<std::size_t>(index_block_bytes(memory.block_size) *
                                                memory.num_blocks * memory.num_layers),
                       options);
  SparseIndexerConfig c;
  c.num_heads = model.indexer->num_heads;
  c.topk = model.indexer->topk;
  c.cos_sin_cache = {rope, DType::f32, {memory.max_model_len, 64}};
  c.k_norm_weight.assign(static_cast<std::size_t>(kDim), 1.0F);
  c.k_norm_bias.assign(static_cast<std::size_t>(kDim), 0.0F);
  indexer_ = std::make_unique<SparseIndexer>(std::move(c));
}

void SparseLayers::fill(std::span<const StepToken> tokens, int layer,
                        const ValueGenerator& generator, Executor& executor) {
  const int heads = model_.indexer->num_heads;
  const auto row = static_cast<std::size_t>(kDim) * size_of(dtype_);
  const std::size_t n = tokens.size();
  num_tokens_ = static_cast<std::int64_t>(n);
  q_.reserve(n * row * static_cast<std::size_t>(heads));
  k_.reserve(n * row);
  weights_.reserve(n * static_cast<std::size_t>(heads) * size_of(dtype_));
  positions_.reserve(n * sizeof(std::int64_t));
  chosen_.reserve(n * static_cast<std::size_t>(model_.indexer->topk) * sizeof(std::int32_t));
  const auto workers = static_cast<std::size_t>(executor.num_workers());
  executor.run([&](int worker) {
    const auto w = static_cast<std::size_t>(worker);
    for (std::size_t t = n * w / workers; t < n * (w + 1) / workers; ++t) {
      const StepToken& s = tokens[t];
      RowKey query{s.own_content, s.position, layer, 0, ValueKind::index_query};
      auto* q = static_cast<std::byte*>(q_.data()) + t * row * static_cast<std::size_t>(heads);
      for (query.head = 0; query.head < heads; ++query.head, q += row)
        generator.fill(query, static_cast<int>(kDim), q);
      generator.fill({s.own_content, s.position, layer, 0, ValueKind::index_weight}, heads,
                     static_cast<std::byte*>(weights_.data()) +
                         t * static_cast<std::size_t>(heads) * size_of(dtype_));
      generator.fill({s.content, s.position, layer, 0, ValueKind::index_key},
                     static_cast<int>(kDim), static_cast<std::byte*>(k_.data()) + t * row);
      static_cast<std::int64_t*>(positions_.data())[t] = s.position;
    }
  });
}

ConstTensorView SparseLayers::choose(int layer, const Metadata& metadata, Executor& executor) {
  const int heads = model_.indexer->num_heads, topk = model_.indexer->topk;
  workspace_.reserve(indexer_->workspace_bytes(metadata));
  SparseIndexerArgs a;
  a.q = {q_.data(), dtype_, {num_tokens_, heads * kDim}};
  a.k = {k_.data(), dtype_, {num_tokens_, kDim}};
  a.weights = {weights_.data(), dtype_, {num_tokens_, heads}};
  a.positions = {positions_.data(), DType::i64, {num_tokens_}};
  a.cache = {static_cast<std::byte*>(cache_.data()) +
                 layer * index_block_bytes(memory_.block_size) * memory_.num_blocks,
             DType::u8,
             {memory_.num_blocks, memory_.block_size, indexer_cache::kRowBytes}};
  a.topk_indices = {chosen_.data(), DType::i32, {num_tokens_, topk}};
  a.workspace = workspace_.workspace();
  a.executor = &executor;
  indexer_->forward(a, &metadata);
  return a.topk_indices;
}

std::vector<std::int32_t> SparseLayers::chosen_row(std::int64_t token) const {
  const std::int64_t topk = model_.indexer->topk;
  const auto* row = static_cast<const std::int32_t*>(chosen_.data()) + token * topk;
  return {row, row + topk};
}

}  // namespace attend::serving
