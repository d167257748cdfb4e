// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "bench/batch.h"
#include "bench/harness.h"

/// Attention from keys and values of a floating-point type.
namespace attend::bench {

/// How keys and values lie in memory.
enum class Layout : std::uint8_t {
  ragged,  ///< [S, Hkv, D]
  hnd,     ///< blocks [Hkv, block_size, D] in shuffled places
  nhd,     ///< blocks [block_size, Hkv, D]; the op is then flash_attn_with_kvcache as it is called
           ///< by someone who has such a cache, so it plans within each call
};

/// One batch; all of it causal.
struct AttentionShape {
  std::vector<Request> requests;
  Heads heads = {};
  DType dtype = DType::bf16;     ///< of queries and outputs
  DType kv_dtype = DType::bf16;  ///< of keys and values
  Layout layout = Layout::ragged;
  int block_size = 0;     ///< 0 if ragged
  int window_left = -1;   ///< as in AttentionParams
  int shared_keys = 0;    ///< hnd: the first keys of all requests are the same blocks
  bool flat = false;      ///< each request attends to shared keys for itself, come what may
  int first_prefill = 0;  ///< hnd: requests before it, decodes, and from it on are parts of a mix
  Arithmetic arithmetic = Arithmetic::automatic;  ///< as in AttentionPlanInput
};

class AttentionProblem : public Problem {
 public:
  AttentionProblem(AttentionShape shape, Executor& executor);

  void run() override;
  std::string verify() const override;
  double flops() const override { return flops_of(0, batch_.num_reqs()); }
  double bytes() const override;
  std::optional<Estimate> estimate() const override;
  std::vector<Part> parts() override;

 private:
  /// The op on some requests that lie next to each other.
  struct Call {
    FlashAttnVarlenArgs args;
    AttentionPlan plan;
    Buffer workspace;
    void run(Executor& executor) { flash_attn_varlen(args, plan, workspace.workspace(), executor); }
  };

  void fill();
  Call make_call(int begin, int end) const;
  FlashAttnWithKvCacheArgs kvcache_args() const;
  TensorView blocks(const CacheMemory& cache, int dim) const;
  double flops_of(int begin, int end) const;
  double bytes_of(int begin, int end) const;
  std::string verify_row(const Row& row) const;
  /// Index of the first element of a row in a cache of heads of `dim` elements.
  std::int64_t kv_row(int kv_head, std::int64_t row, int dim) const;

  AttentionShape s_;
  Batch batch_;
  Executor& executor_;
  std::int64_t q_count_, k_count_, v_count_;  ///< elements
  Buffer q_, out_;
  CacheMemory k_, v_;
  Call whole_;
  FlashAttnWithKvCacheArgs kvcache_;  ///< nhd only
};

/// A case of this kind.
Case attention_case(std::string name, std::string description, Bound bound, AttentionShape shape);

}  // namespace attend::bench
