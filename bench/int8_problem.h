// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/core/workspace.h"
#include "attend/ops/int8_attention.h"
#include "bench/batch.h"
#include "bench/harness.h"

/// Attention of int8 queries and keys.
namespace attend::bench {

/// One batch; caches [num_blocks, Hkv, block_size, D] in shuffled blocks.
struct Int8Shape {
  std::vector<Request> requests;
  Heads heads = {};
  int block_size = 128;
  DType v_dtype = DType::i8;  ///< i8 is level 1; f16 and bf16 are level 2
};

class Int8Problem : public Problem {
 public:
  Int8Problem(Int8Shape shape, Executor& executor);

  void run() override { flash_attn_varlen_int8(args_, plan_, workspace_.workspace(), executor_); }
  std::string verify() const override;
  double flops() const override {
    return 4.0 * batch_.pairs(-1, 0, batch_.num_reqs()) * s_.heads.dim * s_.heads.query;
  }
  double bytes() const override {
    return static_cast<double>(k_.size() + v_.size()) +
           static_cast<double>(k_scale_.size() * sizeof(float));
  }

 private:
  void fill();
  void make_args();
  std::string verify_row(const Row& row) const;

  Int8Shape s_;
  Batch batch_;
  Executor& executor_;
  std::int64_t q_count_, kv_count_;  ///< elements
  Buffer q_, out_, workspace_;
  CacheMemory k_, v_;
  std::vector<float> q_scale_, k_scale_, v_scale_;
  FlashAttnVarlenInt8Args args_;
  AttentionPlan plan_;
};

}  // namespace attend::bench
