// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "attend/core/executor.h"
#include "attend/ops/attention.h"
#include "conformance/attention_shape.h"
#include "conformance/random_blocks.h"
#include "conformance/storage.h"
#include "conformance/varlen_problem.h"

namespace attend::testing {

using conformance::AttentionShape;
using conformance::KvStorage;
using conformance::Rng;
using conformance::Storage;

/// Queries, keys and values of a batch of requests, independent of where they will be stored.
struct BatchData {
  BatchData(Rng& rng, AttentionShape batch_shape);

  AttentionShape shape;
  Storage q;     ///< [T, Hq, D]
  Storage k, v;  ///< [S, Hkv, D], [S, Hkv, Dv]
  conformance::HeadValues head_values;
  AttentionParams params;
};

/// Queries [begin, end) of a request: part of a step.
struct Part {
  int request;
  int begin, end;
};

/// How the steps are run.
struct StepOptions {
  KvStorage kv = KvStorage::paged_nhd;
  int block_size = 16;
  Executor* executor = nullptr;
  KernelOptions kernels;
};

/// A miniature server: steps of any parts of the requests against caches that hold only the keys up
/// to the last query of each step.
class SteppedBatch {
 public:
  SteppedBatch(Rng& rng, const BatchData& data, const StepOptions& options);

  void step(const std::vector<Part>& parts);
  /// All requests whole, in one step.
  void run_whole();

  /// Bytes of out and lse of one query row of all heads; NaN bytes if it was never computed.
  std::vector<std::byte> row(int request, int query) const;

 private:
  void write_keys(int request, std::int64_t end);
  void gather_keys(const std::vector<Part>& parts, FlashAttnVarlenArgs& args);

  const BatchData& data_;
  StepOptions options_;
  std::vector<std::int32_t> query_start_, key_start_;
  std::vector<std::int64_t> written_;  ///< keys in the cache, per request
  std::optional<conformance::RandomBlocks> blocks_;
  Storage k_cache_, v_cache_, out_, lse_;
  // Arrays of the current step; the arguments point into them.
  std::vector<std::int32_t> part_query_start_, part_key_start_, part_seq_lens_, part_table_;
  Storage part_q_, part_k_, part_v_, part_out_, part_lse_;
  std::vector<float> part_slopes_;
};

/// Lengths, heads and features for a property test; causal unless `any_mask`.
AttentionShape random_steps_shape(Rng& rng, std::int64_t products, bool any_mask);

/// Shared pools with 1, 2 and 3 workers.
Executor& executor_of(int num_threads);

}  // namespace attend::testing
