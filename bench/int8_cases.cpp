// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "attend/core/workspace.h"
#include "attend/ops/int8_attention.h"
#include "attend/oracle/attention.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

/// One shape, all requests alike; caches in shuffled blocks of 128 keys, level 1.
struct Shape {
  std::string_view name, description;
  Bound bound;
  int batch, query_len, seq_len;
  int num_q_heads, num_kv_heads, head_dim;
};

constexpr int kBlockSize = 128;
/// Codes are uniform in [-127, 127]: with this scale their variance is 1, that of the other cases.
constexpr float kScale = 1.7320508F / 127.0F;
constexpr int kWeightLevels = 127;

constexpr Shape kShapes[] = {
    {"prefill_int8l1_gqa4_d128_4k", "prefill_bf16_gqa4_d128_4k with int8 queries, keys and values",
     Bound::int8_compute, 1, 4096, 4096, 32, 8, 128},
    {"decode_int8l1_gqa8_d128_32k", "decode_bf16_gqa8_d128_32k with int8 queries, keys and values",
     Bound::memory, 4, 1, 32768, 32, 4, 128},
};

class Int8Problem : public Problem {
 public:
  Int8Problem(const Shape& shape, Executor& executor) : s_(shape), executor_(executor) {
    const std::int64_t tokens = std::int64_t{s_.batch} * s_.query_len;
    const std::int64_t keys = std::int64_t{s_.batch} * s_.seq_len;
    q_ = codes(tokens * s_.num_q_heads * s_.head_dim, 1);
    k_ = codes(keys * s_.num_kv_heads * s_.head_dim, 2);
    v_ = codes(keys * s_.num_kv_heads * s_.head_dim, 3);
    out_ = Buffer(q_.size() * size_of(DType::bf16));
    q_scale_ = scales(tokens * s_.num_q_heads, 4);
    k_scale_ = scales(keys * s_.num_kv_heads, 5);
    v_scale_ = scales(std::int64_t{s_.num_kv_heads} * s_.head_dim, 6);
    make_args(tokens, keys);
    make_plan();
  }

  void run() override { flash_attn_varlen_int8(args_, plan_, workspace_.workspace(), executor_); }
  double flops() const override {
    const double first = s_.seq_len - s_.query_len + 1;
    const double pairs = s_.batch * s_.query_len * (first + s_.seq_len) / 2.0;
    return 4.0 * pairs * s_.head_dim * s_.num_q_heads;
  }
  double bytes() const override {
    return static_cast<double>(k_.size() + v_.size()) +
           static_cast<double>(k_scale_.size() * sizeof(float));
  }

  std::string verify() const override {
    constexpr unsigned kRows = 24;
    for (unsigned i = 0; i < kRows; ++i) {
      const auto pick = hash64(i);
      const auto request = static_cast<int>(pick % static_cast<unsigned>(s_.batch));
      // The first and the last token always, then any.
      const auto anywhere = static_cast<int>((pick >> 20) % static_cast<unsigned>(s_.query_len));
      const int token = i == 0 ? 0 : i == 1 ? s_.query_len - 1 : anywhere;
      const auto head = static_cast<int>((pick >> 44) % static_cast<unsigned>(s_.num_q_heads));
      const std::string wrong = verify_row(request, token, head);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

 private:
  static Buffer codes(std::int64_t count, std::uint64_t seed) {
    Buffer b(static_cast<std::size_t>(count));
    auto* to = static_cast<std::int8_t*>(b.data());
    for (std::int64_t i = 0; i < count; ++i)
      to[i] = static_cast<std::int8_t>(
          static_cast<int>(hash64(seed << 40 | static_cast<std::uint64_t>(i)) % 255) - 127);
    return b;
  }
  static std::vector<float> scales(std::int64_t count, std::uint64_t seed) {
    std::vector<float> to(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < to.size(); ++i)
      to[i] = kScale * (1.0F + 0.1F * random_value(seed, i));
    return to;
  }

  void make_args(std::int64_t tokens, std::int64_t keys) {
    const std::int64_t d = s_.head_dim, blocks = keys / kBlockSize;
    for (int r = 0; r <= s_.batch; ++r) query_start_.push_back(r * s_.query_len);
    seq_lens_.assign(static_cast<std::size_t>(s_.batch), s_.seq_len);
    table_.resize(static_cast<std::size_t>(blocks));
    std::iota(table_.begin(), table_.end(), 0);
    for (std::size_t i = table_.size() - 1; i > 0; --i)
      std::swap(table_[i], table_[hash64(i) % (i + 1)]);
    args_.q = {q_.data(), DType::i8, {tokens, s_.num_q_heads, d}};
    args_.q_scale = {q_scale_.data(), DType::f32, {s_.num_q_heads, tokens}};
    args_.k = {k_.data(), DType::i8, {blocks, s_.num_kv_heads, kBlockSize, d}};
    args_.k_scale = {k_scale_.data(), DType::f32, {blocks, s_.num_kv_heads, kBlockSize}};
    args_.v = {v_.data(), DType::i8, {blocks, s_.num_kv_heads, kBlockSize, d}};
    args_.v_scale = {v_scale_.data(), DType::f32, {s_.num_kv_heads, d}};
    args_.out = {out_.data(), DType::bf16, {tokens, s_.num_q_heads, d}};
    args_.block_table = {table_.data(), DType::i32, {s_.batch, blocks / s_.batch}};
    args_.params.causal = true;
  }

  void make_plan() {
    AttentionPlanInput in;
    in.query_start_loc = query_start_;
    in.seq_lens = seq_lens_;
    in.num_q_heads = s_.num_q_heads;
    in.num_kv_heads = s_.num_kv_heads;
    in.head_dim_qk = in.head_dim_v = s_.head_dim;
    in.num_workers = executor_.num_workers();
    plan_ = plan_attention(in);
    workspace_ = Buffer(plan_.workspace_bytes);
  }

  std::string verify_row(int request, int token, int head) const {
    const std::int64_t flat = std::int64_t{request} * s_.query_len + token;
    const int kv_head = head / (s_.num_q_heads / s_.num_kv_heads);
    const auto at = [](const Buffer& b, std::int64_t i) {
      return static_cast<double>(static_cast<const std::int8_t*>(b.data())[i]);
    };
    const auto slot = [&](std::int64_t j) {
      const std::int64_t index = (std::int64_t{request} * s_.seq_len + j) / kBlockSize;
      const std::int64_t block = table_[static_cast<std::size_t>(index)];
      return (block * s_.num_kv_heads + kv_head) * kBlockSize + j % kBlockSize;
    };
    const std::int64_t query = flat * s_.num_q_heads + head;
    const double q_scale =
        q_scale_[static_cast<std::size_t>(head * args_.q_scale.strides[0] + flat)];
    oracle::RowProblem p;
    p.head_dim_qk = p.head_dim_v = s_.head_dim;
    p.position = token + s_.seq_len - s_.query_len;
    p.num_keys = s_.seq_len;
    p.scale = 1.0 / std::sqrt(static_cast<double>(s_.head_dim));
    p.weight_levels = kWeightLevels;
    p.q = [&](int d) { return q_scale * at(q_, query * s_.head_dim + d); };
    p.k = [&](std::int64_t j, int d) {
      return k_scale_[static_cast<std::size_t>(slot(j))] * at(k_, slot(j) * s_.head_dim + d);
    };
    p.v = [&](std::int64_t j, int d) {
      return v_scale_[static_cast<std::size_t>(kv_head * s_.head_dim + d)] *
             at(v_, slot(j) * s_.head_dim + d);
    };
    const oracle::RowResult want = oracle::attention_row(p);
    for (int d = 0; d < s_.head_dim; ++d) {
      const double got = value_at(out_.data(), DType::bf16, query * s_.head_dim + d);
      const double bound = oracle::out_error_bound(want, d, s_.head_dim, DType::bf16);
      const double expected = want.out[static_cast<std::size_t>(d)];
      if (!(std::abs(got - expected) <= bound))
        return fmt::format("request {} token {} head {} dim {}: expected {} +- {}, got {}", request,
                           token, head, d, expected, bound, got);
    }
    return "";
  }

  Shape s_;
  Executor& executor_;
  Buffer q_, k_, v_, out_, workspace_;
  std::vector<float> q_scale_, k_scale_, v_scale_;
  std::vector<std::int32_t> query_start_, seq_lens_, table_;
  FlashAttnVarlenInt8Args args_;
  AttentionPlan plan_;
};

}  // namespace

std::vector<Case> int8_cases() {
  std::vector<Case> cases;
  for (const Shape& shape : kShapes)
    cases.push_back({shape.name, shape.description, shape.bound, [&shape](Executor& executor) {
                       return std::make_unique<Int8Problem>(shape, executor);
                     }});
  return cases;
}

}  // namespace attend::bench
