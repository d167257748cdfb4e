// SPDX-License-Identifier: Apache-2.0
// Keys in several calls must give the bits of one call.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "support/host_tensor.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

constexpr int kHeads = 6, kKvHeads = 2;

struct Sizes {
  DType dtype;
  std::optional<DType> codes;
  int dim, dim_v;
};

std::int64_t sum(const std::vector<std::int32_t>& lens) {
  return std::reduce(lens.begin(), lens.end());
}

/// Requests whose last query_lens keys are those of their queries, causal.
struct Problem {
  Sizes sizes;
  std::vector<std::int32_t> query_lens, seq_lens;
  Rng rng{11};
  HostTensor q, k, v, out, lse;

  Problem(const Sizes& s, std::vector<std::int32_t> queries, std::vector<std::int32_t> keys)
      : sizes(s),
        query_lens(std::move(queries)),
        seq_lens(std::move(keys)),
        q(s.dtype, {sum(query_lens), kHeads, s.dim}),
        k(s.codes.value_or(s.dtype), {sum(seq_lens), kKvHeads, s.dim}),
        v(s.codes.value_or(s.dtype), {sum(seq_lens), kKvHeads, s.dim_v}),
        out(s.dtype, {sum(query_lens), kHeads, s.dim_v}),
        lse(DType::f32, {sum(query_lens), kHeads}) {
    q.fill_normal(rng);
    for (HostTensor* t : {&k, &v}) {
      if (!s.codes) {
        t->fill_normal(rng);
        continue;
      }
      auto* codes = static_cast<std::uint8_t*>(t->view().data);  // small numbers, no NaN
      for (std::size_t i = 0; i < t->bytes(); ++i)
        codes[i] = static_cast<std::uint8_t>(rng.uniform(0.0F, 256.0F)) & 0xbf;
    }
    clear();
  }
  void clear() {
    out.fill_bytes(0xff);
    lse.fill_bytes(0xff);
  }
};

HostTensor starts_of(const std::vector<std::int32_t>& lens) {
  HostTensor t(DType::i32, {static_cast<std::int64_t>(lens.size()) + 1});
  std::partial_sum(lens.begin(), lens.end(), t.as<std::int32_t>().begin() + 1);
  return t;
}

void run_whole(Problem& p, IsaLevel isa) {
  const HostTensor query_start = starts_of(p.query_lens), key_start = starts_of(p.seq_lens);
  FlashAttnVarlenArgs a;
  a.q = p.q;
  a.k = p.k;
  a.v = p.v;
  a.out = p.out;
  a.lse = p.lse;
  a.query_start_loc = query_start;
  a.cu_seqlens_kv = key_start;
  a.params.causal = true;
  flash_attn_varlen(a, nullptr, isa);
}

/// Rows [begin[r], end[r]) of each request's keys or values, one after the other.
HostTensor cut(const HostTensor& t, const std::vector<std::int32_t>& seq_lens,
               const std::vector<std::int32_t>& begin, const std::vector<std::int32_t>& end) {
  const ConstTensorView view = t;
  std::int64_t rows = 0;
  for (std::size_t r = 0; r < begin.size(); ++r) rows += end[r] - begin[r];
  HostTensor to(view.dtype, {rows, view.shape[1], view.shape[2]});
  const std::size_t row_bytes =
      static_cast<std::size_t>(view.shape[1] * view.shape[2]) * size_of(view.dtype);
  auto* at = static_cast<std::byte*>(TensorView(to).data);
  std::size_t first = 0;
  for (std::size_t r = 0; r < begin.size(); ++r) {
    const auto count = static_cast<std::size_t>(end[r] - begin[r]);
    std::memcpy(at,
                static_cast<const std::byte*>(view.data) +
                    (first + static_cast<std::size_t>(begin[r])) * row_bytes,
                count * row_bytes);
    at += count * row_bytes;
    first += static_cast<std::size_t>(seq_lens[r]);
  }
  return to;
}

/// Context in chunks of `chunk` keys, unmasked, then the rest with the mask.
void run_in_chunks(Problem& p, int chunk, Executor* executor, const KernelOptions& kernels) {
  const HostTensor query_start = starts_of(p.query_lens);
  const auto num_reqs = p.seq_lens.size();
  std::vector<std::int32_t> done(num_reqs, 0);
  HostTensor resumes(DType::u8, {static_cast<std::int64_t>(num_reqs)});
  const std::int64_t tokens = ConstTensorView(p.q).shape[0];
  HostTensor state(DType::f32, {tokens, kHeads, p.sizes.dim_v + 2});
  state.fill_bytes(0xff);
  for (bool last = false; !last;) {
    std::vector<std::int32_t> end(num_reqs), lens(num_reqs);
    last = true;
    for (std::size_t r = 0; r < num_reqs; ++r) {
      const int context = (p.seq_lens[r] - p.query_lens[r]) / kPieceSize * kPieceSize;
      end[r] = std::min(done[r] + chunk, context);
      last &= end[r] == done[r];
    }
    if (last) end = p.seq_lens;
    for (std::size_t r = 0; r < num_reqs; ++r) lens[r] = end[r] - done[r];
    const HostTensor k = cut(p.k, p.seq_lens, done, end), v = cut(p.v, p.seq_lens, done, end);
    const HostTensor key_start = starts_of(lens);
    FlashAttnVarlenArgs a;
    a.q = p.q;
    a.k = k;
    a.v = v;
    a.query_start_loc = query_start;
    a.cu_seqlens_kv = key_start;
    a.params.causal = last;
    a.params.scale = 1.0F / std::sqrt(static_cast<float>(p.sizes.dim));
    a.carry.state = state;
    a.carry.resumes = resumes;
    a.carry.last = last;
    if (last) {
      a.out = p.out;
      a.lse = p.lse;
    }
    flash_attn_varlen(a, executor, kernels);
    for (std::size_t r = 0; r < num_reqs; ++r)
      resumes.as<std::uint8_t>()[r] |= static_cast<std::uint8_t>(lens[r] > 0 || !last);
    done = end;
  }
}

class Carry : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(Carry, HasTheBitsOfOneCall) {
  std::vector<Sizes> all = {{DType::bf16, std::nullopt, 64, 64},
                            {DType::f32, std::nullopt, 64, 64},
                            {DType::f16, std::nullopt, 72, 40},
                            {DType::bf16, std::nullopt, 192, 128},
                            {DType::bf16, DType::fp8_e4m3, 128, 128}};
  all.resize(static_cast<std::size_t>(scaled(static_cast<int>(all.size()), 1)));
  const auto pool = make_thread_pool(3);
  for (const Sizes& sizes : all) {
    for (const auto& [queries, keys] :
         {std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>>{
              {5, 40, 1, 7, 3}, {1300, 700, 1025, 7, 259}},
          {{1}, {scaled(3000, 600)}},
          {{scaled(200, 20)}, {scaled(1500, 600)}}}) {
      Problem whole(sizes, queries, keys), parts(sizes, queries, keys);
      run_whole(whole, GetParam());
      for (const int chunk : {256, 1024}) {
        for (Executor* executor : {static_cast<Executor*>(nullptr), pool.get()}) {
          parts.clear();
          run_in_chunks(parts, chunk, executor, GetParam());
          ASSERT_EQ(parts.out.snapshot(), whole.out.snapshot()) << chunk << " " << sizes.dim;
          ASSERT_EQ(parts.lse.snapshot(), whole.lse.snapshot()) << chunk << " " << sizes.dim;
        }
      }
    }
  }
}

TEST_P(Carry, KeepsARowThatSeesNothing) {
  Problem p({DType::f32, std::nullopt, 64, 64}, {3, 2}, {256, 0});
  HostTensor state(DType::f32, {5, kHeads, 66}), resumes(DType::u8, {2});
  const HostTensor query_start = starts_of(p.query_lens), key_start = starts_of(p.seq_lens);
  FlashAttnVarlenArgs a;
  a.q = p.q;
  a.k = p.k;
  a.v = p.v;
  a.query_start_loc = query_start;
  a.cu_seqlens_kv = key_start;
  a.carry.state = state;
  a.carry.last = false;
  state.fill_bytes(0xff);
  flash_attn_varlen(a, nullptr, GetParam());
  for (int h = 0; h < kHeads; ++h) {
    EXPECT_EQ(get(state, {4, h, 0}), -std::numeric_limits<double>::infinity());
    EXPECT_EQ(get(state, {4, h, 1}), 0.0);
    EXPECT_EQ(get(state, {4, h, 65}), 0.0);
  }
  const auto before = state.snapshot();
  const HostTensor no_keys(DType::i32, {3});
  a.cu_seqlens_kv = no_keys;
  a.carry.resumes = resumes;
  resumes.as<std::uint8_t>()[0] = resumes.as<std::uint8_t>()[1] = 1;
  flash_attn_varlen(a, nullptr, GetParam());
  EXPECT_EQ(state.snapshot(), before);
}

INSTANTIATE_TEST_SUITE_P(Levels, Carry, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

/// What an op says about its arguments.
std::string refusal(const FlashAttnVarlenArgs& a) {
  try {
    flash_attn_varlen(a);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "accepted";
}

TEST(CarryArguments, AreChecked) {
  Problem p({DType::f32, std::nullopt, 64, 64}, {3, 2}, {300, 20});
  HostTensor state(DType::f32, {5, kHeads, 66}), resumes(DType::u8, {2});
  HostTensor narrow(DType::f32, {5, kHeads, 64}), few(DType::f32, {4, kHeads, 66});
  const HostTensor query_start = starts_of(p.query_lens), key_start = starts_of(p.seq_lens);
  FlashAttnVarlenArgs good;
  good.q = p.q;
  good.k = p.k;
  good.v = p.v;
  good.query_start_loc = query_start;
  good.cu_seqlens_kv = key_start;
  good.carry.state = state;
  good.carry.resumes = resumes;
  good.carry.last = false;
  const auto with = [&](auto change) {
    FlashAttnVarlenArgs a = good;
    change(a);
    return refusal(a);
  };
  using ::testing::HasSubstr;
  EXPECT_EQ(refusal(good), "accepted");
  EXPECT_THAT(with([&](auto& a) { a.out = p.out; }), HasSubstr("'out': expected undefined"));
  EXPECT_THAT(with([&](auto& a) { a.lse = p.lse; }), HasSubstr("'lse': expected undefined"));
  EXPECT_THAT(with([&](auto& a) { a.carry.state = narrow; }), HasSubstr("'carry.state'"));
  EXPECT_THAT(with([&](auto& a) { a.carry.state = few; }), HasSubstr("at least 5 rows"));
  EXPECT_THAT(with([&](auto& a) { a.carry.state = {}; }), HasSubstr("'carry.resumes'"));
  EXPECT_THAT(with([&](auto& a) { a.carry = {.state = {}, .resumes = {}, .last = false}; }),
              HasSubstr("'carry.last'"));
  EXPECT_THAT(with([&](auto& a) { a.carry.resumes = p.lse; }), HasSubstr("'carry.resumes'"));
  EXPECT_THAT(with([&](auto& a) { a.q = TensorView(state).slice(2, 0, 64); }),
              HasSubstr("'carry.state'"));
  // The last call reads the state of requests that resume, and of no others.
  const auto ends = [&](auto& a) {
    a.carry.last = true;
    a.carry.state = few;
    a.out = p.out;
  };
  resumes.as<std::uint8_t>()[0] = 1;
  EXPECT_EQ(with(ends), "accepted");
  resumes.as<std::uint8_t>()[1] = 1;
  EXPECT_THAT(with(ends), HasSubstr("at least 5 rows"));
}

}  // namespace
}  // namespace attend::testing
