// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "attend/ops/flash_mla.h"
#include "attend/oracle/sparse_mla.h"
#include "conformance/coded_rows.h"
#include "conformance/comparison.h"

/// Random problems of FlashMLA's sparse functions, in which each query token names its keys.
namespace attend::conformance {

/// Keys that tokens name: a cache of which only the named rows are numbers, and their indices.
struct NamedKeys {
  NamedKeys() = default;
  NamedKeys(Rng& rng, const RowFormat* format, DType dtype, int dim, int block_size);
  /// Indices of `tokens` of each of `reqs` requests; lengths are those of a request.
  void name(Rng& rng, int reqs, int tokens, int topk, bool with_lengths);
  TensorView cache_view() const;

  const RowFormat* format = nullptr;  ///< null = plain numbers
  int dim = 0, block_size = 1, num_blocks = 1;
  Storage cache, indices, lengths;  ///< indices [reqs, tokens, topk]

 private:
  void fill(Rng& rng, std::int64_t slot);
  std::vector<bool> written_;
};

/// Sizes and tensors that both functions have.
struct FlashMlaProblem {
  /// `batched`: requests of several tokens with a cache of blocks of 64, and maybe a second one;
  /// else tokens and plain rows.
  FlashMlaProblem(Rng& rng, bool batched);
  /// Compares all that was written. `with_max`: max_logits, too.
  void compare(Outcome& outcome, bool with_max);
  std::string describe() const;

  DType dtype = DType::bf16;
  const RowFormat* format = nullptr;
  int reqs = 1, tokens = 1, heads = 1, dim = 576, latent = 512;
  float scale = 1.0F;
  bool batched = false;
  NamedKeys keys;
  std::optional<NamedKeys> extra;
  Storage q, sink, out, lse, max_logits;  ///< q and out [reqs, tokens, H, ...]

 private:
  /// What one token should get: out [H, V] and the rest [H].
  oracle::SparseMlaResult token(int req, int token) const;
  void expect();
  oracle::SparseMlaResult expected_;  ///< in the order of the results
};

}  // namespace attend::conformance
