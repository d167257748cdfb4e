// SPDX-License-Identifier: Apache-2.0
#include "sparse_indexer_bench.h"

#include <cmath>
#include <cstring>

namespace attend::testing {
namespace {

void fill_row(const TensorView& row, Rng& rng) {
  HostTensor values(row.dtype, {row.numel()});
  values.fill_uniform(rng);
  std::memcpy(row.data, values.view().data, values.bytes());
}

}  // namespace

IndexerBench::IndexerBench(Executor& run_on, const Budgets& budgets, const SparseSetup& setup)
    : executor(run_on),
      layer(setup, run_on),
      cos_sin(DType::f32, {SparseLayer::kMaxTokens, 64}),
      cache(DType::u8,
            {SparseLayer::kMaxRequests * SparseLayer::kMaxTokens / SparseLayer::kBlockSize,
             SparseLayer::kBlockSize, 132}),
      indexer(make_config()) {
  cache.fill_bytes(0xff);
  BuilderConfig config = layer.builder_config();
  config.num_speculative_tokens = 3;
  config.sparse->max_gathered_keys = budgets.keys;
  config.sparse->max_logits_bytes = budgets.logits_bytes;
  layer.builder = find_backend("FLASHMLA_SPARSE").make_builder(config);
}

IndexerBench::Rows IndexerBench::run(const std::vector<MlaStepRequest>& requests,
                                     Communicator* communicator) {
  SparseStep step = layer.prepare(requests);
  SparseIndexerArgs a = args(requests, *step.metadata);
  a.communicator = communicator;
  indexer.forward(a, step.metadata.get());
  Rows rows;
  std::int64_t t = 0;
  for (const MlaStepRequest& r : requests)
    for (int p = r.computed; p < r.computed + r.query; ++p, ++t) {
      const auto* row = chosen->view().select(0, t).as<std::int32_t>();
      rows[{r.id, p}].assign(row, row + kTopk);
    }
  return rows;
}

SparseIndexerArgs IndexerBench::args(const std::vector<MlaStepRequest>& requests,
                                     const Metadata& metadata) {
  std::int64_t tokens = 0;
  for (const MlaStepRequest& r : requests) tokens += r.query;
  const auto make = [](DType dtype, std::initializer_list<std::int64_t> shape) {
    return std::make_unique<HostTensor>(dtype, shape);
  };
  q = make(DType::bf16, {tokens, kHeads * 128});
  k = make(DType::bf16, {tokens, 128});
  weights = make(DType::f32, {tokens, kHeads});
  positions = make(DType::i64, {tokens});
  chosen = make(DType::i32, {tokens + 2, kTopk});
  chosen->fill_bytes(0x77);
  std::int64_t t = 0;
  for (const MlaStepRequest& r : requests)
    for (int p = r.computed; p < r.computed + r.query; ++p, ++t) {
      const auto request = static_cast<std::uint64_t>(r.id) * 100000;
      Rng rng(request + static_cast<std::uint64_t>(p));
      for (HostTensor* tensor : {q.get(), k.get(), weights.get()})
        fill_row(tensor->view().select(0, t), rng);
      // Keys are rotated by their positions: equal ones have equal positions, too.
      Rng of_key(request + static_cast<std::uint64_t>(p % 5));
      if (equal_keys) fill_row(k->view().select(0, t), of_key);
      positions->as<std::int64_t>()[static_cast<std::size_t>(t)] = equal_keys ? 0 : p;
    }
  workspace.reserve(indexer.workspace_bytes(metadata));
  std::memset(workspace.data(), 0xff, workspace.size());
  SparseIndexerArgs a;
  a.q = *q;
  a.k = *k;
  a.weights = *weights;
  a.positions = *positions;
  a.cache = cache;
  a.topk_indices = *chosen;
  a.workspace = workspace.workspace();
  a.executor = &executor;
  return a;
}

SparseIndexerConfig IndexerBench::make_config() {
  Rng rng(9);
  for (std::int64_t p = 0; p < SparseLayer::kMaxTokens; ++p)
    for (int i = 0; i < 32; ++i) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -i / 32.0);
      auto* row = cos_sin.view().select(0, p).as<float>();
      row[i] = static_cast<float>(std::cos(angle));
      row[32 + i] = static_cast<float>(std::sin(angle));
    }
  SparseIndexerConfig c;
  c.num_heads = kHeads;
  c.topk = kTopk;
  c.cos_sin_cache = cos_sin;
  for (int i = 0; i < 128; ++i) {
    c.k_norm_weight.push_back(rng.uniform(0.5F, 1.5F));
    c.k_norm_bias.push_back(rng.uniform(-0.1F, 0.1F));
  }
  return c;
}

SparseSetup IndexerBench::one_rank() {
  SparseSetup s;
  s.heads = 1;
  s.topk = kTopk;
  return s;
}

}  // namespace attend::testing
