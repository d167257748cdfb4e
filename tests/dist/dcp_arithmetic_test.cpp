// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include "attend/core/cpu.h"
#include "attend/core/error.h"
#include "dist/dcp_problem.h"

namespace attend {
namespace {

using testing::DcpProblem;
using testing::DcpShape;
using testing::Rng;

DcpShape shape_of(DType dtype, int ranks) {
  DcpShape s;
  s.dtype = dtype;
  s.layout = {ranks, 4};
  s.kv_heads = 2;
  s.heads_a_rank = 2;
  s.context_lens = {300, 0, 50};
  s.query_lens = {1, 2, 3};
  return s;
}

TEST(DcpArithmetic, ExactHasTheBitsOfTheHighestLevelWithoutFastKernels) {
  const IsaLevel top = available_isa_levels().back();
  const IsaLevel below = top == IsaLevel::amx ? IsaLevel::avx512_spr : top;
  Rng rng(1);
  DcpProblem p(shape_of(DType::bf16, 1), rng);
  const auto bits = [&](const KernelOptions& kernels) {
    dcp_attention(p.args(0), *make_in_process_group(1)[0], nullptr, kernels);
    return p.lse.snapshot();  // float32, while an output hides most differences by its rounding
  };
  const auto expected = bits(below);
  EXPECT_EQ(bits(top) == expected, top == below);
  EXPECT_EQ(bits({top, Arithmetic::exact}), expected);
}

/// Of two ranks only one calls: had it sent something, it would throw CommunicatorAborted.
TEST(DcpArithmetic, FastIsRefusedBeforeAnythingIsSentOrWritten) {
  Rng rng(1);
  DcpProblem p(shape_of(DType::f16, 2), rng);
  p.out.fill_bytes(0x5a);
  const auto before = p.out.snapshot();
  const auto ranks = make_in_process_group(2);
  ranks[1]->abort();
  EXPECT_THAT([&] { dcp_attention(p.args(0), *ranks[0], nullptr, Arithmetic::fast); },
              ::testing::ThrowsMessage<Unsupported>(
                  ::testing::HasSubstr("[dcp_attention] argument 'arithmetic'")));
  EXPECT_EQ(p.out.snapshot(), before);
}

}  // namespace
}  // namespace attend
