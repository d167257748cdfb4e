// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/ops/attention.h"
#include "conformance/attention_shape.h"
#include "conformance/random_blocks.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Options of a flash_attn_with_kvcache problem.
struct KvCacheOptions {
  bool paged = false;
  bool hnd = false;  ///< heads before tokens in the cache
  int block_size = 16;
  bool padded = false;
  bool append = false;
  bool rotary = false;  ///< only with append
  bool rotary_interleaved = true;
  bool leftpad = false;      ///< dense only
  bool batch_idx = false;    ///< dense only
  bool whole_cache = false;  ///< dense, no append: no cache_seqlens given
  bool lse = true;
};
KvCacheOptions random_kvcache_options(Rng& rng, int head_dim);

/// A flash_attn_with_kvcache problem with its memory; NaN as in VarlenProblem.
struct KvCacheProblem {
  explicit KvCacheProblem(Rng& rng);

  FlashAttnWithKvCacheArgs args() const;
  /// Puts outputs and caches back to what they were before the op.
  void reset();
  std::string describe() const;
  /// Index [row or block, token, 0, 0] in the caches of a request's cache row.
  std::int64_t cache_offset(const Storage& cache, int request, std::int64_t row, int head) const;

  AttentionShape shape;  ///< seq_lens: visible keys, appended ones included
  KvCacheOptions options;
  int num_appended = 0;  ///< per request
  std::vector<std::int32_t> cached, left_pad, cache_row;
  Storage q, k_cache, v_cache, k_new, v_new, out, lse;
  HeadValues head_values;
  Storage cache_seqlens, cache_batch_idx, cache_leftpad, block_table, rotary_cos, rotary_sin;
  AttentionParams params;

 private:
  void choose_lengths(Rng& rng);
  void make_caches(Rng& rng);
  void fill_caches(Rng& rng);
  void make_append(Rng& rng);
  void make_rotary(Rng& rng);
};

}  // namespace attend::conformance
