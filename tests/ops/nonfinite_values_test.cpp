// SPDX-License-Identifier: Apache-2.0
// Infinite and NaN values: they reach the rows that see their key, in their own columns, and
// nothing else, however many rows share a tile.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "attend/ops/attention.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kHeads = 4, kDim = 40, kKeys = 300;

/// Which rows see the bad key: those after it, or those before it.
enum class Hides { the_future, the_past };

class NonfiniteValues : public ::testing::TestWithParam<std::tuple<IsaLevel, DType, Hides>> {};

TEST_P(NonfiniteValues, StayInTheirColumnsOfTheRowsThatSeeThem) {
  const auto [isa, dtype, hides] = GetParam();
  // Few rows, rows that fill some tiles, and one more than that.
  for (const int queries : {2, 24, 25}) {
    HostTensor q(dtype, {queries, kHeads, kDim}), k(dtype, {kKeys, 1, kDim}),
        v(dtype, {kKeys, 1, kDim}), out(dtype, {queries, kHeads, kDim}),
        query_start(DType::i32, {2}), key_start(DType::i32, {2});
    Rng rng(23);
    std::vector<float> values(kKeys * kDim);
    for (float& x : values) x = rng.normal();
    const auto fill_values = [&] { v.fill([at = values.begin()]() mutable { return *at++; }); };
    q.fill_normal(rng);
    k.fill_normal(rng);
    fill_values();
    query_start.as<std::int32_t>()[1] = queries;
    key_start.as<std::int32_t>()[1] = kKeys;
    FlashAttnVarlenArgs args;
    args.q = q;
    args.k = k;
    args.v = v;
    args.out = out;
    args.query_start_loc = query_start;
    args.cu_seqlens_kv = key_start;
    // The last two queries see the bad key, or the first two.
    constexpr int kWindow = 40;
    const bool future = hides == Hides::the_future;
    const int bad_key = future ? kKeys - 2 : kKeys - queries + 1 - kWindow;
    const auto sees = [&](int row) { return future ? row >= queries - 2 : row < 2; };
    args.params.causal = true;
    if (!future) args.params.window_left = kWindow;
    flash_attn_varlen(args, nullptr, isa);
    const std::vector<unsigned char> clean = out.snapshot();

    const float bad[] = {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()};
    for (int c = 0; c < 3; ++c) values[bad_key * kDim + c] = bad[c];
    fill_values();
    flash_attn_varlen(args, nullptr, isa);
    const std::vector<unsigned char> got = out.snapshot();

    const std::size_t size = size_of(dtype);
    for (int row = 0; row < queries; ++row) {
      for (int head = 0; head < kHeads; ++head) {
        for (int c = 0; c < kDim; ++c) {
          const std::string where = std::to_string(queries) + " queries, row " +
                                    std::to_string(row) + " head " + std::to_string(head) +
                                    " column " + std::to_string(c);
          const auto at = static_cast<std::size_t>((row * kHeads + head) * kDim + c) * size;
          if (!sees(row) || c > 2) {
            EXPECT_EQ(std::memcmp(&clean[at], &got[at], size), 0) << where;
          } else if (c == 2) {
            EXPECT_TRUE(std::isnan(get(out, {row, head, c}))) << where;
          } else {
            EXPECT_EQ(get(out, {row, head, c}), bad[c]) << where;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, NonfiniteValues,
                         ::testing::Combine(::testing::ValuesIn(available_isa_levels()),
                                            ::testing::Values(DType::f32, DType::f16, DType::bf16),
                                            ::testing::Values(Hides::the_future, Hides::the_past)),
                         [](const auto& info) {
                           return std::string(to_string(std::get<0>(info.param))) + "_" +
                                  std::string(to_string(std::get<1>(info.param))) +
                                  (std::get<2>(info.param) == Hides::the_future ? "_future"
                                                                                : "_past");
                         });

}  // namespace
}  // namespace attend::testing
