// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "attend/dist/decode_context_parallel.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::get;
using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;

using CombineFn = void (*)(const DcpCombineArgs&, Communicator&);

/// Partial results of all ranks. Rows with an empty LSE hold NaN.
struct Parts {
  Parts(int n, DType type, std::int64_t tokens, std::int64_t heads, std::int64_t dim, Rng& rng)
      : ranks(n), dtype(type) {
    const std::vector<float> special = {kInf, -kInf, kNan, -kNan};
    const std::vector<float> far = {300.0F, -300.0F};
    for (int r = 0; r < n; ++r) {
      out.emplace_back(dtype, std::array{tokens, heads, dim});
      lse.emplace_back(DType::f32, std::array{tokens, heads});
      out.back().fill_normal(rng);
      lse.back().fill_normal(rng, 5.0F);
      for (std::int64_t row = 0; row < tokens * heads; ++row) {
        float& x = lse.back().as<float>()[static_cast<std::size_t>(row)];
        if (rng.chance(0.1)) x = rng.pick(far);
        // Some heads are empty on every rank.
        if (rng.chance(0.3) || row % 5 == 3) {
          x = rng.pick(special);
          fill_row(out.back(), row, dim);
        }
      }
    }
  }
  static void fill_row(const HostTensor& t, std::int64_t row, std::int64_t dim) {
    const std::size_t bytes = static_cast<std::size_t>(dim) * size_of(t.view().dtype);
    // All bits set is NaN in each of the three types.
    std::memset(static_cast<char*>(t.view().data) + static_cast<std::size_t>(row) * bytes, 0xFF,
                bytes);
  }
  int ranks;
  DType dtype;
  std::vector<HostTensor> out, lse;
};

double half_ulp(DType dtype, double x) {
  if (dtype == DType::f16) return std::max(std::abs(x) * 0x1p-11, 0x1p-25);
  return std::abs(x) * (dtype == DType::bf16 ? 0x1p-8 : kUnit);
}

/// One row in float64: sum_r b^(lse_r - L) out_r.
struct Row {
  Row(const Parts& p, std::int64_t t, std::int64_t h, double base) {
    double sum = 0.0;
    for (const HostTensor& lse : p.lse) {
      const double l = get(lse.view(), {t, h});
      weight.push_back(std::isfinite(l) ? std::pow(base, l) : 0.0);
      sum += weight.back();
    }
    lse = sum > 0.0 ? std::log(sum) / std::log(base) : -kInf;
    for (double& w : weight) w = sum > 0.0 ? w / sum : 0.0;
  }
  std::vector<double> weight;
  double lse = 0.0;
};

/// Compares one rank's result with the formula; `first` is its first head.
void expect_combined(const Parts& p, const TensorView& out, const TensorView& lse,
                     std::int64_t first, double base) {
  for (std::int64_t t = 0; t < out.shape[0]; ++t) {
    for (std::int64_t h = 0; h < out.shape[1]; ++h) {
      const Row row(p, t, first + h, base);
      if (std::isinf(row.lse)) {
        ASSERT_EQ(get(lse, {t, h}), -kInf) << t << " " << first + h;
      } else {
        ASSERT_NEAR(get(lse, {t, h}), row.lse, kUnit * std::abs(row.lse) + 1e-12);
      }
      for (std::int64_t d = 0; d < out.shape[2]; ++d) {
        double want = 0.0;
        double absolute = 0.0;
        for (std::size_t r = 0; r < p.out.size(); ++r) {
          if (row.weight[r] == 0.0) continue;
          const double x = row.weight[r] * get(p.out[r].view(), {t, first + h, d});
          want += x;
          absolute += std::abs(x);
        }
        // A weight and a product a rank, the additions; then the result's rounding.
        const double computed = (p.ranks + 2) * kUnit * absolute * 1.001 + 1e-37;
        const double bound =
            std::isinf(row.lse) ? 0.0 : computed + half_ulp(p.dtype, std::abs(want) + computed);
        ASSERT_NEAR(get(out, {t, h, d}), want, bound) << t << " " << first + h << " " << d;
      }
    }
  }
}

struct Result {
  HostTensor out, lse;
};

/// Runs `combine` on all ranks; results poisoned before.
std::vector<Result> run(const Parts& p, CombineFn combine, bool scatter, LseBase base) {
  const TensorView shape = p.out[0].view();
  const std::int64_t heads = scatter ? shape.shape[1] / p.ranks : shape.shape[1];
  std::vector<Result> results;
  for (int r = 0; r < p.ranks; ++r) {
    results.push_back({HostTensor(p.dtype, {shape.shape[0], heads, shape.shape[2]}),
                       HostTensor(DType::f32, {shape.shape[0], heads})});
    results.back().out.fill_bytes(0xFF);
    results.back().lse.fill_bytes(0xFF);
  }
  run_in_process(p.ranks, [&](Communicator& c) {
    const auto r = static_cast<std::size_t>(c.rank());
    combine({.out = p.out[r],
             .lse = p.lse[r],
             .lse_base = base,
             .combined = results[r].out,
             .combined_lse = results[r].lse},
            c);
  });
  return results;
}

class DcpCombineTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, DcpCombineTest,
                         ::testing::Values(DType::f32, DType::f16, DType::bf16));

TEST_P(DcpCombineTest, AllFunctionsMatchTheFormulaAndEachOther) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const int n : {1, 2, 4, 8}) {
    for (const LseBase base : {LseBase::e, LseBase::two}) {
      const double b = base == LseBase::e ? std::exp(1.0) : 2.0;
      const std::int64_t kept = rng.integer(1, 3);
      const Parts p(n, GetParam(), rng.integer(0, 4), kept * n, 8 * rng.integer(1, 3), rng);
      const auto scattered = run(p, cp_lse_ag_out_rs, true, base);
      const auto exchanged = run(p, dcp_a2a_lse_reduce, true, base);
      const auto reduced = run(p, cp_lse_ag_out_ar, false, base);
      for (int r = 0; r < n; ++r) {
        SCOPED_TRACE("rank " + std::to_string(r) + " of " + std::to_string(n));
        const auto i = static_cast<std::size_t>(r);
        expect_combined(p, scattered[i].out, scattered[i].lse, r * kept, b);
        expect_combined(p, reduced[i].out, reduced[i].lse, 0, b);
        EXPECT_EQ(exchanged[i].out.snapshot(), scattered[i].out.snapshot());
        EXPECT_EQ(exchanged[i].lse.snapshot(), scattered[i].lse.snapshot());
        EXPECT_EQ(reduced[i].out.snapshot(), reduced[0].out.snapshot());
        EXPECT_EQ(reduced[i].lse.snapshot(), reduced[0].lse.snapshot());
        // The scattered heads are the reduced ones, bit for bit.
        for (std::int64_t t = 0; t < scattered[i].lse.view().shape[0]; ++t) {
          for (std::int64_t h = 0; h < kept; ++h) {
            const auto one = scattered[i].out.view().select(0, t).select(0, h);
            const auto all = reduced[i].out.view().select(0, t).select(0, r * kept + h);
            EXPECT_EQ(0, std::memcmp(one.data, all.data,
                                     static_cast<std::size_t>(one.numel()) * size_of(one.dtype)));
          }
        }
      }
    }
  }
}

TEST_P(DcpCombineTest, ALonePartIsTakenAsItIs) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (const int n : {1, 4}) {
    Parts p(n, GetParam(), 3, 4, 16, rng);
    for (int r = 0; r < n; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const bool lone = r == n - 1;
      p.lse[i].fill_normal(rng, 9.0F);
      if (lone) p.out[i].fill_normal(rng);
      if (!lone) p.out[i].fill_bytes(0xFF);
      if (!lone) p.lse[i].fill_bytes(0xFF);
    }
    for (const LseBase base : {LseBase::e, LseBase::two}) {
      const auto results = run(p, cp_lse_ag_out_ar, false, base);
      for (const Result& result : results) {
        EXPECT_EQ(result.out.snapshot(), p.out.back().snapshot());
        EXPECT_EQ(result.lse.snapshot(), p.lse.back().snapshot());
      }
    }
  }
}

TEST(DcpCombine, StridedViewsAndUnwantedLse) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  const Parts p(2, DType::bf16, 3, 4, 16, rng);
  const auto want = run(p, cp_lse_ag_out_rs, true, LseBase::e);
  for (const CombineFn combine : {cp_lse_ag_out_rs, dcp_a2a_lse_reduce}) {
    run_in_process(2, [&](Communicator& c) {
      const auto r = static_cast<std::size_t>(c.rank());
      // Heads before tokens everywhere: [H, T, D] and [H, T] memory.
      const auto turned = [](HostTensor& t) {
        TensorView v = t;
        std::swap(v.shape[0], v.shape[1]);
        std::swap(v.strides[0], v.strides[1]);
        return v;
      };
      HostTensor out_memory(DType::bf16, {4, 3, 16}), lse_memory(DType::f32, {4, 3});
      HostTensor result_memory(DType::bf16, {2, 3, 16});
      const TensorView out = turned(out_memory);
      const TensorView lse = turned(lse_memory);
      const TensorView result = turned(result_memory);
      for (std::int64_t t = 0; t < 3; ++t) {
        for (std::int64_t h = 0; h < 4; ++h) {
          *lse.select(0, t).select(0, h).as<float>() =
              *p.lse[r].view().select(0, t).select(0, h).as<float>();
          std::memcpy(out.select(0, t).select(0, h).data,
                      p.out[r].view().select(0, t).select(0, h).data, 32);
        }
      }
      combine({.out = out, .lse = lse, .combined = result, .combined_lse = {}}, c);
      for (std::int64_t t = 0; t < 3; ++t) {
        for (std::int64_t h = 0; h < 2; ++h) {
          EXPECT_EQ(0, std::memcmp(result.select(0, t).select(0, h).data,
                                   want[r].out.view().select(0, t).select(0, h).data, 32));
        }
      }
    });
  }
}

TEST(DcpCombine, BadInputIsRefusedBeforeAnythingIsSent) {
  auto ranks = make_in_process_group(2);  // nobody answers for rank 1
  HostTensor out(DType::f16, {3, 4, 8}), lse(DType::f32, {3, 4});
  HostTensor combined(DType::f16, {3, 2, 8}), combined_lse(DType::f32, {3, 2});
  const auto blame = [&](CombineFn combine, const std::function<void(DcpCombineArgs&)>& change) {
    DcpCombineArgs a{.out = out, .lse = lse, .combined = combined, .combined_lse = combined_lse};
    change(a);
    try {
      combine(a, *ranks[0]);
    } catch (const InvalidArgument& e) {
      return e.argument();
    }
    return std::string("nothing");
  };
  for (const CombineFn f : {cp_lse_ag_out_rs, dcp_a2a_lse_reduce}) {
    EXPECT_EQ(blame(f, [](auto& a) { a.out = {}; }), "out");
    EXPECT_EQ(blame(f, [](auto& a) { a.out.dtype = DType::i8; }), "out");
    EXPECT_EQ(blame(f, [](auto& a) { a.out.shape[1] = 3; }), "out");
    EXPECT_EQ(blame(f, [](auto& a) { std::swap(a.out.strides[1], a.out.strides[2]); }), "out");
    EXPECT_EQ(blame(f, [](auto& a) { a.lse.shape[1] = 2; }), "lse");
    EXPECT_EQ(blame(f, [](auto& a) { a.lse.dtype = DType::i32; }), "lse");
    EXPECT_EQ(blame(f, [](auto& a) { a.combined.shape[1] = 4; }), "combined");
    EXPECT_EQ(blame(f, [](auto& a) { a.combined.dtype = DType::bf16; }), "combined");
    EXPECT_EQ(blame(f, [](auto& a) { a.combined.strides[0] = 0; }), "combined");
    EXPECT_EQ(blame(f, [&](auto& a) { a.combined.data = out.view().data; }), "combined");
    EXPECT_EQ(blame(f, [&](auto& a) { a.combined.data = lse.view().data; }), "combined");
    EXPECT_EQ(blame(f, [](auto& a) { a.combined_lse.shape[0] = 2; }), "combined_lse");
    EXPECT_EQ(blame(f, [](auto& a) { a.combined_lse.strides[1] = 0; }), "combined_lse");
    EXPECT_EQ(blame(f, [&](auto& a) { a.combined_lse.data = combined.view().data; }),
              "combined_lse");
    EXPECT_EQ(blame(f, [&](auto& a) { a.combined_lse.data = lse.view().data; }), "combined_lse");
  }
  EXPECT_EQ(blame(cp_lse_ag_out_ar, [](auto&) {}), "combined");  // all heads stay there
}

}  // namespace
}  // namespace attend
