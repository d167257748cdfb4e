// SPDX-License-Identifier: Apache-2.0
// Attention reads keys and values where they lie: no copy of a sequence is made.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

/// Largest resident size of this process since the last reset, in bytes; 0 if it cannot be told.
std::int64_t peak_resident_bytes() {
  std::ifstream file("/proc/self/status");
  std::string word;
  while (file >> word) {
    if (word != "VmHWM:") continue;
    std::int64_t kib = 0;
    file >> kib;
    return kib * 1024;
  }
  return 0;
}

bool reset_peak() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  return file.good();
}

TEST(Memory, ADecodeOver32kKeysTakesLessThanTwoPercentOfTheCache) {
  if (scaled(1, 0) == 0) GTEST_SKIP() << "sanitizers and emulators have memory of their own";
  // So many heads that huge pages, which the workspace may get, are small beside the cache.
  constexpr std::int64_t kKeys = 32768, kHeads = 16, kDim = 128, kBlock = 16;
  constexpr std::int64_t kBlocks = kKeys / kBlock;
  constexpr std::size_t kPlane = kKeys * kHeads * kDim * 2;
  Buffer keys(kPlane), values(kPlane), query(32 * kDim * 2), out(32 * kDim * 2);
  std::memset(keys.data(), 0x3c, kPlane);  // small numbers; all memory is touched
  std::memset(values.data(), 0x3d, kPlane);
  std::memset(query.data(), 0x3c, query.size());
  std::vector<std::int32_t> table(kBlocks);
  std::iota(table.rbegin(), table.rend(), 0);
  const std::int32_t starts[] = {0, 1}, lens[] = {kKeys};
  FlashAttnVarlenArgs a;
  a.q = {query.data(), DType::bf16, {1, 32, kDim}};
  a.k = {keys.data(), DType::bf16, {kBlocks, kBlock, kHeads, kDim}};
  a.v = {values.data(), DType::bf16, {kBlocks, kBlock, kHeads, kDim}};
  a.out = {out.data(), DType::bf16, {1, 32, kDim}};
  a.query_start_loc = {starts, DType::i32, {2}};
  a.seq_lens = {lens, DType::i32, {1}};
  a.block_table = {table.data(), DType::i32, {1, kBlocks}};
  a.params.causal = true;

  default_executor();  // its threads are not the decode's
  if (!reset_peak()) GTEST_SKIP() << "the peak cannot be reset here";
  const std::int64_t before = peak_resident_bytes();
  flash_attn_varlen(a);
  const std::int64_t grown = peak_resident_bytes() - before;
  EXPECT_GT(before, static_cast<std::int64_t>(2 * kPlane)) << "the cache is not resident";
  EXPECT_LT(grown, static_cast<std::int64_t>(2 * kPlane) / 50);
}

}  // namespace
}  // namespace attend::testing
