// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <limits>

#include "attend/ops/sparse_mla.h"
#include "latent_batch.h"

namespace attend::testing {

/// Names all keys of the requests of a batch (one token each), in order, with names of nothing
/// between and behind them where there is room.
class SparseBatch {
 public:
  SparseBatch(LatentBatch& dense, int topk)
      : indices(DType::i32, {dense.q.view().shape[0], topk}),
        lengths(DType::i32, {dense.q.view().shape[0]}),
        max_logits(DType::f32, {dense.q.view().shape[0], dense.options.heads}),
        batch_(dense) {
    for (std::size_t r = 0; r < dense.requests.size(); ++r)
      name_keys(static_cast<std::int64_t>(r), dense.requests[r].keys);
  }

  SparseMlaArgs args() const {
    const MlaDecodeArgs dense = batch_.args();
    SparseMlaArgs a;
    a.q = dense.q;
    a.kv_cache = dense.kv_cache;
    a.indices = indices;
    if (with_lengths) a.topk_length = lengths;
    a.out = dense.out;
    a.lse = dense.lse;
    a.max_logits = max_logits;
    a.kv_scale = dense.kv_scale;
    a.scale = dense.params.scale;
    return a;
  }

  /// Lengths end the rows where the last key is named; rows behind them name rows that are NaN.
  void hide_behind_lengths() {
    with_lengths = true;
    const std::int64_t topk = indices.view().shape[1];
    for (std::int64_t t = 0; t < indices.view().shape[0]; ++t) {
      auto* row = indices.view().select(0, t).as<std::int32_t>();
      std::int64_t length = topk;
      while (length > 0 && !is_slot(row[length - 1])) --length;
      lengths.as<std::int32_t>()[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(length);
      for (std::int64_t i = length; i < topk; ++i) row[i] = static_cast<std::int32_t>(i) % 16;
    }
  }

  LatentBatch::Rows run(Executor* executor, const KernelOptions& kernels) {
    batch_.out.fill_bytes(0xff);
    batch_.lse.fill_bytes(0xff);
    max_logits.fill_bytes(0xff);
    sparse_mla_attention(args(), executor, kernels);
    return batch_.rows();
  }

  HostTensor indices, lengths, max_logits;
  bool with_lengths = false;

 private:
  std::int64_t capacity() const {
    return batch_.cache.view().shape[0] * batch_.cache.view().shape[1];
  }
  bool is_slot(std::int32_t slot) const { return slot >= 0 && slot < capacity(); }

  void name_keys(std::int64_t r, int keys) {
    const std::int32_t nothing[] = {-1, static_cast<std::int32_t>(capacity()),
                                    std::numeric_limits<std::int32_t>::min(),
                                    std::numeric_limits<std::int32_t>::max(), -1000};
    auto* row = indices.view().select(0, r).as<std::int32_t>();
    const auto* table = batch_.block_table.view().select(0, r).as<std::int32_t>();
    const int block_size = batch_.options.block_size;
    const std::int64_t topk = indices.view().shape[1];
    int named = 0;
    for (std::int64_t i = 0; i < topk; ++i) {
      const bool room = topk - i > keys - named;
      if (named == keys || (room && i % 3 == 1)) {
        row[i] = nothing[i % 5];
        continue;
      }
      row[i] = table[named / block_size] * block_size + named % block_size;
      ++named;
    }
  }

  LatentBatch& batch_;
};

}  // namespace attend::testing
