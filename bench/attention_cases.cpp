// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/oracle/attention.h"
#include "attend/plan/cascade.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

/// One shape, all requests alike. Paged cases have HND caches whose blocks lie in shuffled order.
struct Shape {
  std::string_view name, description;
  Bound bound;
  DType dtype, kv_dtype;
  int batch, query_len, seq_len;
  int num_q_heads, num_kv_heads, head_dim;
  int block_size;       // 0 = ragged keys and values
  int shared_keys = 0;  // paged: the first keys of all requests are the same blocks
  bool flat = false;    // each request attends to shared keys for itself, whatever would be faster
};

constexpr Shape kShapes[] = {
    {"prefill_bf16_gqa4_d128_4k", "causal prefill of 4096 tokens, 32 query and 8 kv heads, bf16",
     Bound::compute, DType::bf16, DType::bf16, 1, 4096, 4096, 32, 8, 128, 0},
    {"prefill_f32_gqa4_d128_4k", "the same in float32", Bound::compute, DType::f32, DType::f32, 1,
     4096, 4096, 32, 8, 128, 0},
    {"short_batch_256x128", "causal prefill of 256 prompts of 128 tokens, bf16", Bound::compute,
     DType::bf16, DType::bf16, 256, 128, 128, 32, 8, 128, 0},
    {"decode_bf16_gqa8_d128_32k",
     "one token for each of 4 requests of 32768 keys, 32 query and 4 kv heads, shuffled blocks of "
     "128",
     Bound::memory, DType::bf16, DType::bf16, 4, 1, 32768, 32, 4, 128, 128},
    {"decode_fp8_gqa8_d128_32k", "the same with fp8_e4m3 keys and values", Bound::memory,
     DType::bf16, DType::fp8_e4m3, 4, 1, 32768, 32, 4, 128, 128},
    {"decode_fp8_e5m2_gqa8_d128_32k", "the same with fp8_e5m2 keys and values", Bound::memory,
     DType::bf16, DType::fp8_e5m2, 4, 1, 32768, 32, 4, 128, 128},
    {"cascade_decode_prefix8k_b64",
     "one token for each of 64 requests that share 8192 keys and have 128 of their own, 32 heads, "
     "blocks of 128",
     Bound::compute, DType::bf16, DType::bf16, 64, 1, 8320, 32, 32, 128, 128, 8192},
    {"cascade_decode_prefix8k_b64_flat", "the same, each request for itself", Bound::memory,
     DType::bf16, DType::bf16, 64, 1, 8320, 32, 32, 128, 128, 8192, true},
    {"cascade_decode_prefix8k_b64_gqa8", "32 query and 4 kv heads: arithmetic binds either way",
     Bound::compute, DType::bf16, DType::bf16, 64, 1, 8320, 32, 4, 128, 128, 8192},
    {"cascade_decode_prefix8k_b64_gqa8_flat", "the same, each request for itself", Bound::compute,
     DType::bf16, DType::bf16, 64, 1, 8320, 32, 4, 128, 128, 8192, true},
    {"cascade_decode_prefix128_b8",
     "8 requests of 1024 keys that share 128, 32 query and 4 kv heads: too few keys to gain",
     Bound::memory, DType::bf16, DType::bf16, 8, 1, 1024, 32, 4, 128, 128, 128},
    {"cascade_decode_prefix128_b8_flat", "the same, each request for itself", Bound::memory,
     DType::bf16, DType::bf16, 8, 1, 1024, 32, 4, 128, 128, 128, true},
    {"single_token_128", "one token, 128 keys, 32 query and 8 kv heads, bf16: latency",
     Bound::memory, DType::bf16, DType::bf16, 1, 1, 128, 32, 8, 128, 32},
};

class AttentionProblem : public Problem {
 public:
  AttentionProblem(const Shape& shape, Executor& executor) : s_(shape), executor_(executor) {
    const std::int64_t tokens = std::int64_t{s_.batch} * s_.query_len;
    const std::int64_t own_keys = std::int64_t{s_.batch} * (s_.seq_len - s_.shared_keys);
    const std::int64_t keys = s_.shared_keys + own_keys;
    const auto elem = static_cast<std::int64_t>(size_of(s_.dtype));
    q_count_ = tokens * s_.num_q_heads * s_.head_dim;
    kv_count_ = keys * s_.num_kv_heads * s_.head_dim;
    q_ = Buffer(static_cast<std::size_t>(q_count_ * elem));
    out_ = Buffer(static_cast<std::size_t>(q_count_ * elem));
    k_ = Buffer(static_cast<std::size_t>(kv_count_) * size_of(s_.kv_dtype));
    v_ = Buffer(static_cast<std::size_t>(kv_count_) * size_of(s_.kv_dtype));
    fill();
    make_args(tokens, keys);
    make_plan();
  }

  void run() override { flash_attn_varlen(args_, plan_, workspace_.workspace(), executor_); }
  double flops() const override { return 4.0 * pairs() * s_.head_dim * s_.num_q_heads; }
  double bytes() const override {
    const std::int64_t again = s_.flat ? std::int64_t{s_.batch - 1} * s_.shared_keys : 0;
    return static_cast<double>(2 * (kv_count_ + again * s_.num_kv_heads * s_.head_dim)) *
           static_cast<double>(size_of(s_.kv_dtype));
  }

  std::string verify() const override {
    constexpr int kRows = 24;
    for (int i = 0; i < kRows; ++i) {
      const auto pick = hash64(static_cast<std::uint64_t>(i));
      const auto request = static_cast<int>(pick % static_cast<unsigned>(s_.batch));
      // First and last token of a request always, then anywhere.
      const int token = i == 0 ? 0
                        : i == 1
                            ? s_.query_len - 1
                            : static_cast<int>((pick >> 20) % static_cast<unsigned>(s_.query_len));
      const auto head = static_cast<int>((pick >> 44) % static_cast<unsigned>(s_.num_q_heads));
      const std::string wrong = verify_row(request, token, head);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  void fill() {
    executor_.run([&](int worker) {
      if (worker == 0) fill_random(q_.data(), s_.dtype, q_count_, 1);
      if (worker == 0) fill_random(k_.data(), s_.kv_dtype, kv_count_, 2);
      if (worker == executor_.num_workers() - 1) fill_random(v_.data(), s_.kv_dtype, kv_count_, 3);
    });
  }

  void make_args(std::int64_t tokens, std::int64_t keys) {
    for (int r = 0; r <= s_.batch; ++r) {
      query_start_.push_back(r * s_.query_len);
      key_start_.push_back(r * s_.seq_len);
      if (r < s_.batch) seq_lens_.push_back(s_.seq_len);
    }
    const std::int64_t d = s_.head_dim;
    args_.q = {q_.data(), s_.dtype, {tokens, s_.num_q_heads, d}};
    args_.out = {out_.data(), s_.dtype, {tokens, s_.num_q_heads, d}};
    args_.params.causal = true;
    if (s_.block_size == 0) {
      args_.k = {k_.data(), s_.kv_dtype, {keys, s_.num_kv_heads, d}};
      args_.v = {v_.data(), s_.kv_dtype, {keys, s_.num_kv_heads, d}};
      return;
    }
    const std::int64_t blocks = keys / s_.block_size;
    make_table(blocks);
    const auto hnd = [&](const Buffer& b) {
      return ConstTensorView{b.data(), s_.kv_dtype, {blocks, s_.num_kv_heads, s_.block_size, d}}
          .permute({0, 2, 1, 3});
    };
    args_.k = hnd(k_);
    args_.v = hnd(v_);
    args_.block_table = {table_.data(), DType::i32, {s_.batch, s_.seq_len / s_.block_size}};
  }

  /// Shuffled blocks: the shared ones first, then those of one request after the other.
  void make_table(std::int64_t blocks) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(blocks));
    std::iota(ids.begin(), ids.end(), 0);
    for (std::size_t i = ids.size() - 1; i > 0; --i) std::swap(ids[i], ids[hash64(i) % (i + 1)]);
    const int width = s_.seq_len / s_.block_size, shared = s_.shared_keys / s_.block_size;
    for (int r = 0; r < s_.batch; ++r)
      for (int b = 0; b < width; ++b) {
        const int at = b < shared ? b : r * (width - shared) + b;
        table_.push_back(ids[static_cast<std::size_t>(at)]);
      }
  }

  void make_plan() {
    AttentionPlanInput in;
    in.query_start_loc = query_start_;
    in.seq_lens = seq_lens_;
    in.num_q_heads = s_.num_q_heads;
    in.num_kv_heads = s_.num_kv_heads;
    in.head_dim_qk = in.head_dim_v = s_.head_dim;
    in.num_workers = executor_.num_workers();
    CascadeInput cascade;
    cascade.mode = s_.flat ? CascadeMode::off : CascadeMode::automatic;
    cascade.batch = in;
    cascade.block_table = args_.block_table;
    cascade.block_size = s_.block_size;
    cascade.kv_dtype = s_.kv_dtype;
    const CascadeDecision decision = decide_cascade(cascade);
    in.shared_prefixes = decision.prefixes;
    plan_ = plan_attention(in);
    workspace_ = Buffer(plan_.workspace_bytes);
  }

  double pairs() const {
    const double first = s_.seq_len - s_.query_len + 1;
    return s_.batch * s_.query_len * (first + s_.seq_len) / 2.0;
  }

  std::int64_t kv_index(int request, std::int64_t j, int head, int d) const {
    const std::int64_t dim = s_.head_dim;
    if (s_.block_size == 0)
      return ((std::int64_t{request} * s_.seq_len + j) * s_.num_kv_heads + head) * dim + d;
    const auto slot =
        static_cast<std::size_t>((std::int64_t{request} * s_.seq_len + j) / s_.block_size);
    return ((std::int64_t{table_[slot]} * s_.num_kv_heads + head) * s_.block_size +
            j % s_.block_size) *
               dim +
           d;
  }

  std::string verify_row(int request, int token, int head) const {
    const std::int64_t row =
        ((std::int64_t{request} * s_.query_len + token) * s_.num_q_heads + head) * s_.head_dim;
    const int kv_head = head / (s_.num_q_heads / s_.num_kv_heads);
    oracle::RowProblem p;
    p.head_dim_qk = p.head_dim_v = s_.head_dim;
    p.position = token + s_.seq_len - s_.query_len;
    p.num_keys = s_.seq_len;
    p.split_weights = oracle::splits_weights(s_.kv_dtype);
    p.scale = 1.0 / std::sqrt(static_cast<double>(s_.head_dim));
    p.q = [&](int d) { return value_at(q_.data(), s_.dtype, row + d); };
    p.k = [&](std::int64_t j, int d) {
      return value_at(k_.data(), s_.kv_dtype, kv_index(request, j, kv_head, d));
    };
    p.v = [&](std::int64_t j, int d) {
      return value_at(v_.data(), s_.kv_dtype, kv_index(request, j, kv_head, d));
    };
    const oracle::RowResult want = oracle::attention_row(p);
    for (int d = 0; d < s_.head_dim; ++d) {
      const double got = value_at(out_.data(), s_.dtype, row + d);
      const double bound = oracle::out_error_bound(want, d, s_.head_dim, s_.dtype);
      const auto i = static_cast<std::size_t>(d);
      if (!(std::abs(got - want.out[i]) <= bound))
        return fmt::format("request {} token {} head {} dim {}: expected {} +- {}, got {}", request,
                           token, head, d, want.out[i], bound, got);
    }
    return "";
  }

  Shape s_;
  Executor& executor_;
  Buffer q_, k_, v_, out_, workspace_;
  std::int64_t q_count_ = 0, kv_count_ = 0;
  std::vector<std::int32_t> query_start_, key_start_, seq_lens_, table_;
  FlashAttnVarlenArgs args_;
  AttentionPlan plan_;
};

}  // namespace

std::vector<Case> attention_cases() {
  std::vector<Case> cases;
  for (const Shape& shape : kShapes)
    cases.push_back({shape.name, shape.description, shape.bound, [&shape](Executor& executor) {
                       return std::make_unique<AttentionProblem>(shape, executor);
                     }});
  return cases;
}

}  // namespace attend::bench
