// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/cpu.h"

/// Contract of the CPU kernels of the indexer's logits: rows of heads of e4m3 codes against keys of
/// e4m3 codes. Trusted input, no allocation.
namespace attend::cpu {

inline constexpr int kIndexerDim = 128;
/// Packed keys are filled up to a multiple of it.
inline constexpr int kIndexerPanel = 32;
/// Packed keys that leave room for others in the second cache of a core.
inline constexpr int kIndexerPackedBytes = 512 << 10;

/// Keys to pack.
struct IndexerPack {
  /// Codes of each key, `count` rounded up to kIndexerPanel of them; any codes behind `count`.
  const std::uint8_t* const* rows = nullptr;
  int count = 0;
  void* packed = nullptr;  ///< aligned to 64 bytes
};

/// A row of queries, and packed keys.
struct IndexerRow {
  const std::uint8_t* q = nullptr;  ///< 128 codes of each head
  std::int64_t q_head = 0;          ///< codes from head to head
  const float* weights = nullptr;   ///< [heads]
  int heads = 0;
  const void* packed = nullptr;
  const float* scales = nullptr;  ///< of the packed keys
  int begin = 0, end = 0;         ///< packed keys that are wanted
  float* logits = nullptr;        ///< of the first packed key
  void* scratch = nullptr;        ///< scratch_bytes(), aligned to 64 bytes
};

struct IndexerKernel {
  IsaLevel isa = IsaLevel::scalar;
  std::int64_t key_bytes = 0;   ///< of a packed key
  std::int64_t head_bytes = 0;  ///< of a head in the scratch memory of a row
  void (*pack)(const IndexerPack&) noexcept = nullptr;
  /// Most keys of a pack, a multiple of kIndexerPanel.
  std::int64_t most_keys() const noexcept { return kIndexerPackedBytes / key_bytes; }
  /// logits[j] = scales[j] * sum over heads of weights[h] * max(q[h] . key j, 0), each in float32.
  /// A NaN anywhere gives the positive quiet NaN without payload.
  void (*logits)(const IndexerRow&) noexcept = nullptr;

  /// Heads in scratch memory, filled up with zeros.
  static constexpr std::int64_t padded_heads(std::int64_t heads) noexcept {
    return (heads + 31) / 32 * 32;
  }
  std::int64_t scratch_bytes(std::int64_t heads) const noexcept {
    return padded_heads(heads) * (head_bytes + static_cast<std::int64_t>(sizeof(float)));
  }
};

/// The kernel of `level`. Levels without one of their own have that of the next lower level.
const IndexerKernel& indexer_kernel(IsaLevel level) noexcept;

}  // namespace attend::cpu
