// SPDX-License-Identifier: Apache-2.0
#include "bench/peers/attend_side.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/core/executor.h"
#include "bench/random_fill.h"
#include "support/temp_folder.h"

namespace attend::bench {
namespace {

constexpr int kBatch = 3, kQueries = 5, kKeys = 64, kQHeads = 4, kKvHeads = 2, kDim = 32;

struct Form {
  DType dtype, kv_dtype;
  int block_size;
  /// Of the relative error of all outputs together: above what rounding to the types can do (2^-9
  /// for bf16, 2^-4 and 2^-3 for a code of fp8), and far below 1, which a wrong row or scale gives.
  double bound;
};

class AttendSideTest : public ::testing::TestWithParam<Form> {
 protected:
  static std::vector<bf16> values(std::int64_t count, std::uint64_t seed) {
    std::vector<bf16> v(static_cast<std::size_t>(count));
    fill_random(v.data(), {0, count}, seed);
    return v;
  }
  static std::string bytes(const std::vector<bf16>& v) {
    return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(bf16)};
  }

  PeerProblem problem() const {
    PeerProblem p;
    p.dtype = GetParam().dtype;
    p.kv_dtype = GetParam().kv_dtype;
    p.block_size = GetParam().block_size;
    p.batch = kBatch;
    p.query_len = kQueries;
    p.seq_len = kKeys;
    p.num_q_heads = kQHeads;
    p.num_kv_heads = kKvHeads;
    p.head_dim = kDim;
    p.q_file = folder_.write("q", bytes(q_));
    p.k_file = folder_.write("k", bytes(k_));
    p.v_file = folder_.write("v", bytes(v_));
    return p;
  }

  /// Attention of one row in float64, from the files' values.
  std::vector<double> row(int request, int query, int head) const {
    const auto at = [](const std::vector<bf16>& v, std::int64_t i) {
      return static_cast<double>(to_f32(v[static_cast<std::size_t>(i)]));
    };
    const std::int64_t q = ((request * kQueries + query) * kQHeads + head) * kDim;
    std::vector<double> out(kDim);
    double sum = 0.0;
    for (int j = 0; j <= kKeys - kQueries + query; ++j) {
      const std::int64_t key =
          ((request * kKeys + j) * kKvHeads + head / (kQHeads / kKvHeads)) * kDim;
      double logit = 0.0;
      for (int d = 0; d < kDim; ++d) logit += at(q_, q + d) * at(k_, key + d);
      const double weight = std::exp(logit / std::sqrt(kDim));
      sum += weight;
      for (int d = 0; d < kDim; ++d) out[static_cast<std::size_t>(d)] += weight * at(v_, key + d);
    }
    for (double& x : out) x /= sum;
    return out;
  }

  std::vector<bf16> q_ = values(kBatch * kQueries * kQHeads * kDim, 1);
  std::vector<bf16> k_ = values(kBatch * kKeys * kKvHeads * kDim, 2);
  std::vector<bf16> v_ = values(kBatch * kKeys * kKvHeads * kDim, 3);
  testing::TempFolder folder_;
};

TEST_P(AttendSideTest, WritesTheAttentionOfTheFiles) {
  const auto executor = make_thread_pool(2);
  AttendSide side(problem(), *executor);
  side.run();
  const std::string file = folder_.path() / "out";
  side.write_output(file);
  std::vector<float> got(q_.size() + 1);
  std::ifstream in(file, std::ios::binary);
  in.read(reinterpret_cast<char*>(got.data()),
          static_cast<std::streamsize>(got.size() * sizeof(float)));
  ASSERT_EQ(in.gcount(), static_cast<std::streamsize>(q_.size() * sizeof(float)));

  double errors = 0.0, squares = 0.0;
  std::size_t i = 0;
  for (int r = 0; r < kBatch; ++r)
    for (int t = 0; t < kQueries; ++t)
      for (int h = 0; h < kQHeads; ++h)
        for (const double want : row(r, t, h)) {
          errors += (got[i] - want) * (got[i] - want);
          squares += want * want;
          ++i;
        }
  EXPECT_LT(std::sqrt(errors / squares), GetParam().bound);
}

TEST_P(AttendSideTest, RefusesAShortFile) {
  const auto executor = make_thread_pool(1);
  PeerProblem p = problem();
  p.k_file = folder_.write("short", bytes(values(7, 1)));
  EXPECT_THROW(AttendSide(p, *executor), Error);
}

INSTANTIATE_TEST_SUITE_P(Forms, AttendSideTest,
                         ::testing::Values(Form{DType::bf16, DType::bf16, 0, 5e-3},
                                           Form{DType::f32, DType::f32, 0, 1e-5},
                                           Form{DType::bf16, DType::bf16, 32, 5e-3},
                                           Form{DType::f16, DType::f16, 16, 1e-3},
                                           Form{DType::f32, DType::f32, 32, 1e-5},
                                           Form{DType::bf16, DType::i8, 32, 4e-2},
                                           Form{DType::bf16, DType::fp8_e4m3, 32, 0.1},
                                           Form{DType::bf16, DType::fp8_e5m2, 32, 0.2}),
                         [](const auto& info) {
                           return std::string(to_string(info.param.dtype)) + "_" +
                                  std::string(to_string(info.param.kv_dtype)) + "_" +
                                  std::to_string(info.param.block_size);
                         });

}  // namespace
}  // namespace attend::bench
