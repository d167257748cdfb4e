// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/core/executor.h"
#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"
#include "attend/plan/attention_plan.h"

/// Our side of a comparison with another library: one problem from files, run on demand.
namespace attend::bench {

/// A problem that scripts/peers has written. All requests are alike and causal. The files hold
/// bf16: q [batch * query_len, Hq, D], k and v [batch * seq_len, Hkv, D]. Each side converts them
/// to what it computes with.
struct PeerProblem {
  DType dtype = DType::bf16;     ///< of queries and output: f32, f16 or bf16
  DType kv_dtype = DType::bf16;  ///< of keys and values: dtype, an fp8 one, or i8 (level 1)
  int batch = 1, query_len = 1, seq_len = 1;
  int num_q_heads = 1, num_kv_heads = 1, head_dim = 1;
  int block_size =
      0;  ///< of the paged cache, whose blocks lie shuffled; 0 = ragged keys and values
  std::string q_file, k_file, v_file;
};

/// Reads the JSON description. @throws Error.
PeerProblem read_peer_problem(const std::string& path);

/// Set-up (conversion, cache, plan) happens in the constructor; run() is what is timed.
class AttendSide {
 public:
  /// @throws Error if a file is missing or short.
  AttendSide(PeerProblem problem, Executor& executor);
  void run();
  /// Output of the last run as float32 [batch * query_len, Hq, D]. @throws Error.
  void write_output(const std::string& path) const;

 private:
  void make_table();
  void make_plan();
  void fill_float_cache(const ConstTensorView& k, const ConstTensorView& v);
  void fill_int8_cache(const ConstTensorView& k, const ConstTensorView& v);
  void bind(const ConstTensorView& k, const ConstTensorView& v);
  std::vector<std::int64_t> slots() const;
  std::int64_t keys() const { return std::int64_t{p_.batch} * p_.seq_len; }
  std::int64_t tokens() const { return std::int64_t{p_.batch} * p_.query_len; }

  PeerProblem p_;
  Executor& executor_;
  Buffer q_, out_, workspace_;
  Buffer k_rows_, v_rows_;  // ragged keys and values
  CacheMemory k_, v_;
  Buffer q_codes_, q_scale_, k_scale_, v_scale_;  // i8 caches only
  std::vector<std::int32_t> query_start_, seq_lens_, table_;
  FlashAttnVarlenArgs args_;
  FlashAttnVarlenInt8Args int8_args_;
  AttentionPlan plan_;
};

}  // namespace attend::bench
