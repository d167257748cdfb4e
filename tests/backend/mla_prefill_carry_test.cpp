// SPDX-License-Identifier: Apache-2.0
// Context in chunks that end in a carry, then the rest: the bits of one call over all keys.
#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "attend/core/error.h"
#include "backend/mla_prefill_call.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::PrefillCall;
using testing::PrefillOptions;

using Lens = std::vector<std::int32_t>;

const Lens kQueryLens = {1, 40, 3, 17};
const Lens kSeqLens = {1, 340, 1100, 600};

PrefillOptions whole_options(const char* backend, const char* platform) {
  PrefillOptions o;
  o.backend = backend;
  o.platform = platform;
  o.query_lens = kQueryLens;
  o.key_lens = kSeqLens;
  return o;
}

/// Keys [begin[r], begin[r] + call.options.key_lens[r]) of each request, from the whole problem.
void copy_keys(const HostTensor& whole, const Lens& begin, const Lens& lens, const HostTensor& to) {
  const auto row_bytes = static_cast<std::size_t>(to.view().strides[0]) * size_of(to.view().dtype);
  std::int64_t first = 0, row = 0;
  for (std::size_t r = 0; r < lens.size(); ++r) {
    std::memcpy(to.view().slice(0, row, 1).data, whole.view().slice(0, first + begin[r], 1).data,
                static_cast<std::size_t>(lens[r]) * row_bytes);
    row += lens[r];
    first += kSeqLens[r];
  }
}

/// A call over some of the keys of `whole`.
std::unique_ptr<PrefillCall> part_of(const PrefillCall& whole, const Lens& begin, const Lens& lens,
                                     bool causal) {
  PrefillOptions o = whole.options;
  o.key_lens = lens;
  o.causal = causal;
  auto call = std::make_unique<PrefillCall>(o);
  std::memcpy(call->q.view().data, whole.q.view().data, whole.q.bytes());
  copy_keys(whole.k, begin, lens, call->k);
  copy_keys(whole.v, begin, lens, call->v);
  return call;
}

AttentionCarry carry_of(const HostTensor& state, const HostTensor& resumes, const Lens& done,
                        bool last) {
  for (std::size_t r = 0; r < done.size(); ++r) resumes.view().as<std::uint8_t>()[r] = done[r] > 0;
  AttentionCarry carry;
  carry.state = state;
  carry.resumes = resumes;
  carry.last = last;
  return carry;
}

/// Whole pieces of context, at most `chunk` keys of each request; all 0 = none is left.
Lens next_chunk(const Lens& done, int chunk) {
  Lens lens;
  for (std::size_t r = 0; r < done.size(); ++r) {
    const int context = kSeqLens[r] - kQueryLens[r] - done[r];
    lens.push_back(std::min(chunk, context / kPieceSize * kPieceSize));
  }
  return lens;
}

void expect_bits_of_one_call(const PrefillCall& whole, int chunk) {
  const HostTensor state(DType::f32, {61, whole.options.num_heads, whole.impl->head_dim_v() + 2});
  const HostTensor resumes(DType::u8, {static_cast<std::int64_t>(kSeqLens.size())});
  std::memset(state.view().data, 0xFF, state.bytes());
  Lens done(kSeqLens.size(), 0);
  for (Lens lens = next_chunk(done, chunk); *std::max_element(lens.begin(), lens.end()) > 0;
       lens = next_chunk(done, chunk)) {
    const auto call = part_of(whole, done, lens, false);
    ContextChunkArgs args = call->context_chunk();
    args.out = args.lse = {};
    args.carry = carry_of(state, resumes, done, false);
    const auto num_keys = std::accumulate(lens.begin(), lens.end(), std::int64_t{0});
    args.workspace.size = call->plan.workspace_bytes + call->impl->workspace_bytes(0, num_keys);
    call->impl->run_prefill_context_chunk(args);
    for (std::size_t r = 0; r < lens.size(); ++r) done[r] += lens[r];
  }
  EXPECT_EQ(done, (Lens{0, 256, 1024, 512}));
  const int used = 2 + whole.options.dims.v_head_dim;  // maximum, sum, values
  for (std::int64_t t = kQueryLens[0]; t < state.view().shape[0]; ++t) {
    for (std::int64_t d = used; d < state.view().shape[2]; ++d)
      ASSERT_EQ(testing::get(state, {t, 1, d}), 0.0) << t << " " << d;
  }
  Lens rest = kSeqLens;
  for (std::size_t r = 0; r < rest.size(); ++r) rest[r] -= done[r];
  const auto call = part_of(whole, done, rest, true);
  NewTokensArgs args = call->new_tokens();
  args.carry = carry_of(state, resumes, done, true);
  call->impl->run_prefill_new_tokens(args);
  EXPECT_EQ(call->wide_out.snapshot(), whole.wide_out.snapshot()) << chunk;
  EXPECT_EQ(call->lse.snapshot(), whole.lse.snapshot()) << chunk;
}

struct Where {
  const char* label;
  const char* backend;
  const char* platform;
};
void PrintTo(const Where& w, std::ostream* os) { *os << w.label; }

class MlaPrefillCarry : public ::testing::TestWithParam<Where> {};

TEST_P(MlaPrefillCarry, ChunksOfAnySizeHaveTheBitsOfOneCall) {
  const PrefillCall whole(whole_options(GetParam().backend, GetParam().platform));
  whole.run();
  for (const int chunk : {256, 512, 2048}) expect_bits_of_one_call(whole, chunk);
}

INSTANTIATE_TEST_SUITE_P(All, MlaPrefillCarry,
                         ::testing::Values(Where{"native", "FLASH_ATTN", "cpu"},
                                           Where{"padded", "FLASH_ATTN", "cuda:8.0"},
                                           Where{"aiter", "ROCM_AITER_FA", "rocm:gfx942"}),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(MlaPrefillCarryState, HasTheColumnsOfTheKernelCalls) {
  for (const auto& [platform, columns] : {std::pair{"cpu", 192}, {"cuda:8.0", 128}}) {
    PrefillOptions o = whole_options("FLASH_ATTN", platform);
    o.causal = false;
    const PrefillCall call(o);
    const HostTensor state(DType::f32, {61, 2, columns + 2});
    ContextChunkArgs args = call.context_chunk();
    args.out = args.lse = {};
    args.carry.state = state;
    args.carry.last = false;
    const auto before = state.snapshot();
    EXPECT_THROW(call.impl->run_prefill_context_chunk(args), InvalidArgument) << platform;
    EXPECT_EQ(state.snapshot(), before);
  }
}

}  // namespace
}  // namespace attend
