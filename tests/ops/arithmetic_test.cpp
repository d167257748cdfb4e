// SPDX-License-Identifier: Apache-2.0
// The two arithmetic modes of the ops: which kernels' bits they give, what they refuse and how far
// from float64 the fast one is.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"
#include "attend/oracle/attention.h"
#include "attend/oracle/quantize.h"
#include "attend/plan/kernel_choice.h"
#include "conformance/comparison.h"
#include "conformance/int8_problem.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

IsaLevel top_level() { return available_isa_levels().back(); }
bool has_amx() { return top_level() == IsaLevel::amx; }
/// The level whose kernels exact arithmetic takes on this machine, for kinds with fast kernels.
IsaLevel exact_level() { return has_amx() ? IsaLevel::avx512_spr : top_level(); }

/// One request over ragged keys, causal.
struct Problem {
  HostTensor q, k, v, out, lse, k_scale, v_scale, query_start{DType::i32, {2}},
      key_start{DType::i32, {2}};
  FlashAttnVarlenArgs args;

  Problem(DType dtype, DType kv, int queries, int keys, int q_heads = 4, int kv_heads = 2,
          int dim = 72)
      : q(dtype, {queries, q_heads, dim}),
        k(kv, {keys, kv_heads, dim}),
        v(kv, {keys, kv_heads, dim}),
        out(dtype, {queries, q_heads, dim}),
        lse(DType::f32, {queries, q_heads}),
        k_scale(DType::f32, {keys, kv_heads}),
        v_scale(DType::f32, {keys, kv_heads}) {
    Rng rng(23);
    q.fill_normal(rng);
    fill_keys(k, rng);
    fill_keys(v, rng);
    query_start.as<std::int32_t>()[1] = queries;
    key_start.as<std::int32_t>()[1] = keys;
    args.q = q;
    args.k = k;
    args.v = v;
    args.out = out;
    args.lse = lse;
    args.query_start_loc = query_start;
    args.cu_seqlens_kv = key_start;
    args.params.causal = true;
    out.fill_bytes(0x5a);
    lse.fill_bytes(0x5a);
    if (kv != DType::i8) return;
    args.k_token_scale = k_scale.fill_uniform(rng, 0.01F, 0.03F);
    args.v_token_scale = v_scale.fill_uniform(rng, 0.01F, 0.03F);
  }

  static void fill_keys(HostTensor& t, Rng& rng) {
    const DType dtype = t.view().dtype;
    if (dtype == DType::fp8_e4m3) {
      for (fp8_e4m3& x : t.as<fp8_e4m3>()) x = to_fp8_e4m3(rng.normal());
    } else if (dtype == DType::fp8_e5m2) {
      for (fp8_e5m2& x : t.as<fp8_e5m2>()) x = to_fp8_e5m2(rng.normal());
    } else if (dtype == DType::i8) {
      for (std::int8_t& x : t.as<std::int8_t>())
        x = static_cast<std::int8_t>(std::clamp(40 * rng.normal(), -127.0F, 127.0F));
    } else {
      t.fill_normal(rng);
    }
  }

  std::vector<unsigned char> bits() const {
    std::vector<unsigned char> all = out.snapshot(), more = lse.snapshot();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::vector<unsigned char> run(const KernelOptions& kernels) {
    flash_attn_varlen(args, nullptr, kernels);
    return bits();
  }
  AttentionPlan plan(const KernelOptions& kernels) const {
    AttentionPlanInput in;
    in.query_start_loc = query_start.as<std::int32_t>();
    const std::int32_t lens[] = {key_start.as<std::int32_t>()[1]};
    in.seq_lens = lens;
    in.num_q_heads = static_cast<int>(q.view().shape[1]);
    in.num_kv_heads = static_cast<int>(k.view().shape[1]);
    in.head_dim_qk = in.head_dim_v = static_cast<int>(q.view().shape[2]);
    in.num_workers = default_executor().num_workers();
    in.isa = kernels.isa;
    in.arithmetic = kernels.arithmetic;
    return plan_attention(in);
  }
  std::vector<unsigned char> run_planned(const KernelOptions& kernels) {
    const AttentionPlan p = plan(kernels);
    Buffer workspace(p.workspace_bytes);
    flash_attn_varlen(args, p, workspace.workspace(), default_executor());
    return bits();
  }
};

class ArithmeticOfCaches : public ::testing::TestWithParam<DType> {
 protected:
  /// float32 results where there can be any: rounding hides differences.
  static Problem problem(int queries) {
    const DType dtype = GetParam() == DType::bf16 ? DType::bf16 : DType::f32;
    return {dtype, GetParam(), queries, 900};
  }
};
INSTANTIATE_TEST_SUITE_P(Types, ArithmeticOfCaches,
                         ::testing::Values(DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2,
                                           DType::i8),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST_P(ArithmeticOfCaches, ExactHasTheBitsOfTheHighestLevelWithoutFastKernels) {
  for (const int queries : {1, 70}) {
    Problem p = problem(queries);
    const auto expected = p.run(exact_level());
    const auto automatic = p.run(top_level());
    EXPECT_EQ(automatic == expected, !has_amx());
    EXPECT_EQ(p.run({top_level(), Arithmetic::exact}), expected);
    EXPECT_EQ(p.run_planned({top_level(), Arithmetic::exact}), expected);
    EXPECT_EQ(p.run_planned({IsaLevel::scalar, Arithmetic::exact}), p.run(IsaLevel::scalar));
  }
}

TEST_P(ArithmeticOfCaches, FastHasTheBitsOfTheTiles) {
  if (!has_amx()) GTEST_SKIP() << "this machine has no level with fast kernels";
  for (const int queries : {1, 70}) {
    Problem p = problem(queries);
    const auto expected = p.run(IsaLevel::amx);
    EXPECT_NE(p.run(exact_level()), expected);
    EXPECT_EQ(p.run({IsaLevel::amx, Arithmetic::fast}), expected);
    EXPECT_EQ(p.run_planned({IsaLevel::amx, Arithmetic::fast}), expected);
  }
}

void expect_fast_refused(Problem& p, IsaLevel level) {
  SCOPED_TRACE(std::string(to_string(p.args.k.dtype)) + " " + std::string(to_string(level)));
  const KernelOptions fast(level, Arithmetic::fast);
  const auto before = p.bits();
  const auto refused =
      ThrowsMessage<Unsupported>(HasSubstr("[flash_attn_varlen] argument 'arithmetic'"));
  EXPECT_THAT([&] { p.run(fast); }, refused);
  EXPECT_THAT([&] { p.run_planned(fast); }, refused);
  const AttentionPlan plan = p.plan(fast);
  Buffer workspace(plan.workspace_bytes);
  EXPECT_THAT([&] { validate(p.args, plan, workspace.workspace(), default_executor()); }, refused);
  EXPECT_EQ(p.bits(), before);
}

TEST(FastArithmetic, IsRefusedWhereThereIsNoneBeforeAnythingIsWritten) {
  for (const DType dtype : {DType::f32, DType::f16}) {
    Problem p(dtype, dtype, 2, 40);
    expect_fast_refused(p, top_level());
  }
  for (const DType kv : {DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2, DType::i8}) {
    Problem p(DType::bf16, kv, 2, 40);
    for (const IsaLevel level : available_isa_levels())
      if (level < IsaLevel::amx) expect_fast_refused(p, level);
  }
}

/// A decode of two requests that appends one key each.
struct Append {
  HostTensor q, out, k_cache, v_cache, k_new, v_new, cached{DType::i32, {2}};
  FlashAttnWithKvCacheArgs args;

  explicit Append(DType dtype)
      : q(dtype, {2, 1, 4, 64}),
        out(dtype, {2, 1, 4, 64}),
        k_cache(dtype, {2, 300, 2, 64}),
        v_cache(dtype, {2, 300, 2, 64}),
        k_new(dtype, {2, 1, 2, 64}),
        v_new(dtype, {2, 1, 2, 64}) {
    Rng rng(29);
    for (HostTensor* t : {&q, &k_cache, &v_cache, &k_new, &v_new}) t->fill_normal(rng);
    for (std::int32_t& n : cached.as<std::int32_t>()) n = 299;
    args.q = q;
    args.k_cache = k_cache;
    args.v_cache = v_cache;
    args.k_new = k_new;
    args.v_new = v_new;
    args.out = out;
    args.cache_seqlens = cached;
    args.params.causal = true;
  }
  std::vector<unsigned char> run(const KernelOptions& kernels) {
    flash_attn_with_kvcache(args, nullptr, kernels);
    return out.snapshot();
  }
};

TEST(FastArithmetic, IsRefusedBeforeNewKeysAreWritten) {
  for (const auto& [dtype, level] :
       {std::pair{DType::f16, top_level()}, {DType::bf16, IsaLevel::scalar}}) {
    Append p(dtype);
    const auto keys = p.k_cache.snapshot(), values = p.v_cache.snapshot(), out = p.out.snapshot();
    EXPECT_THAT(
        [&] { p.run({level, Arithmetic::fast}); },
        ThrowsMessage<Unsupported>(HasSubstr("[flash_attn_with_kvcache] argument 'arithmetic'")));
    EXPECT_EQ(p.k_cache.snapshot(), keys);
    EXPECT_EQ(p.v_cache.snapshot(), values);
    EXPECT_EQ(p.out.snapshot(), out);
  }
}

TEST(ExactArithmetic, OfAppendingDecodesIsThatOfItsLevel) {
  Append p(DType::bf16);
  const auto expected = p.run(exact_level());
  EXPECT_EQ(p.run(top_level()) == expected, !has_amx());
  EXPECT_EQ(p.run({top_level(), Arithmetic::exact}), expected);
}

TEST(Int8Arithmetic, HasNoModesAndRefusesThemBeforeAnythingIsWritten) {
  for (const DType values : {DType::i8, DType::f16, DType::bf16}) {
    conformance::Rng rng(7);
    conformance::AttentionShape shape;
    shape.dtype = DType::bf16;
    shape.query_lens = {2};
    shape.seq_lens = {20};
    conformance::Int8Problem p(rng, shape, {.values = values});
    p.reset();
    const FlashAttnVarlenInt8Args args = p.args();
    const std::vector<std::int32_t> starts = shape.query_start_loc();
    AttentionPlanInput in;
    in.query_start_loc = starts;
    in.seq_lens = shape.seq_lens;
    in.num_q_heads = in.num_kv_heads = 1;
    in.head_dim_qk = shape.head_dim;
    in.head_dim_v = shape.head_dim_v;
    in.causal = shape.causal;
    in.num_workers = default_executor().num_workers();
    for (const Arithmetic a : {Arithmetic::exact, Arithmetic::fast}) {
      in.arithmetic = a;
      const AttentionPlan plan = plan_attention(in);
      Buffer workspace(plan.workspace_bytes);
      EXPECT_THAT(
          [&] { flash_attn_varlen_int8(args, plan, workspace.workspace(), default_executor()); },
          ThrowsMessage<Unsupported>(
              HasSubstr("[flash_attn_varlen_int8] argument 'arithmetic': expected automatic, got " +
                        std::string(to_string(a)))));
    }
    conformance::Outcome untouched;
    expect_undamaged(untouched, "out", p.out);
    EXPECT_EQ(untouched.failure, "");
    in.arithmetic = Arithmetic::automatic;
    const AttentionPlan plan = plan_attention(in);
    Buffer workspace(plan.workspace_bytes);
    EXPECT_NO_THROW(flash_attn_varlen_int8(args, plan, workspace.workspace(), default_executor()));
  }
}

/// Sums over all outputs of a problem with one head and fp8_e4m3 keys.
struct Errors {
  double got = 0.0;      ///< |op - float64|
  double rounded = 0.0;  ///< |float64 with weights rounded to bf16 - float64|
};

Errors errors_of(const Problem& p) {
  const auto value = [](const HostTensor& t, std::int64_t i) {
    return oracle::fp8_value(DType::fp8_e4m3, t.view().as<std::uint8_t>()[i]);
  };
  const std::int64_t queries = p.q.view().shape[0], keys = p.k.view().shape[0],
                     dim = p.q.view().shape[2];
  Errors errors;
  for (std::int64_t i = 0; i < queries; ++i) {
    const std::int64_t visible = keys - queries + i + 1;
    std::vector<double> weights;
    double largest = -INFINITY;
    for (std::int64_t j = 0; j < visible; ++j) {
      double logit = 0.0;
      for (std::int64_t d = 0; d < dim; ++d) logit += get(p.q, {i, 0, d}) * value(p.k, j * dim + d);
      weights.push_back(logit / std::sqrt(static_cast<double>(dim)));
      largest = std::max(largest, weights.back());
    }
    double sum = 0.0;
    for (double& w : weights) sum += w = std::exp(w - largest);
    for (std::int64_t d = 0; d < dim; ++d) {
      double out = 0.0, rounded = 0.0;
      for (std::int64_t j = 0; j < visible; ++j) {
        const double w = weights[static_cast<std::size_t>(j)], x = value(p.v, j * dim + d);
        out += w * x;
        rounded += to_f32(to_bf16(static_cast<float>(w))) * x;
      }
      errors.got += std::abs(get(p.out, {i, 0, d}) - out / sum);
      errors.rounded += std::abs(rounded - out) / sum;
    }
  }
  return errors;
}

TEST(FastArithmetic, ErrsFarLessThanRoundingWeightsToBf16Does) {
  if (!has_amx()) GTEST_SKIP() << "this machine has no level with fast kernels";
  Problem p(DType::f32, DType::fp8_e4m3, 24, 1000, 1, 1, 128);
  p.run({IsaLevel::amx, Arithmetic::fast});
  const Errors fast = errors_of(p);
  RecordProperty("share", std::to_string(fast.got / fast.rounded));
  EXPECT_LT(8.0 * fast.got, fast.rounded);
}

TEST(ExactArithmetic, ErrsAsWeightsOfFloat32Do) {
  for (const IsaLevel level : available_isa_levels()) {
    Problem p(DType::f32, DType::fp8_e4m3, 24, 1000, 1, 1, 128);
    p.run({level, Arithmetic::exact});
    const Errors exact = errors_of(p);
    RecordProperty(std::string(to_string(level)), std::to_string(exact.got / exact.rounded));
    // Weights of two bf16 parts fail: on average their error is some 1/360 of a rounded weight's.
    EXPECT_LT(1000.0 * exact.got, exact.rounded) << to_string(level);
  }
}

}  // namespace
}  // namespace attend::testing
