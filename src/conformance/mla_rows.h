// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "conformance/coded_rows.h"
#include "conformance/random_blocks.h"
#include "conformance/rng.h"
#include "conformance/storage.h"

/// Random rows of caches for multi-head latent attention, and what the ops on them have to write.
namespace attend::conformance {

/// Sizes and types of a row: the latent, then the rope part.
struct MlaRows {
  explicit MlaRows(Rng& rng);
  std::int64_t dim() const noexcept { return latent + rope; }
  bool is_bytes() const noexcept { return format != nullptr; }
  bool is_coded() const noexcept { return is_bytes() || is_fp8(stored); }
  /// Makes them rows of a format.
  void use(const RowFormat& f);
  /// Elements of a row of the cache.
  std::int64_t stored_dim() const noexcept { return is_bytes() ? format->row_bytes : dim(); }
  std::string describe() const;

  DType dtype;                        ///< of activations
  DType stored;                       ///< of the cache
  const RowFormat* format = nullptr;  ///< of a cache of bytes
  int latent, rope;
};

/// New rows and the cache that takes them.
struct MlaWrite {
  explicit MlaWrite(Rng& rng);
  /// Expects the rows in the cache, with `keys` as the rope part.
  void expect_rows(const Storage& keys);
  TensorView cache_view() const noexcept {
    return rows.is_bytes() ? coded_view(cache, *rows.format, block_size) : cache.view();
  }
  ConstTensorView slot_view() const noexcept { return {slots.data(), DType::i64, {tokens}}; }
  std::string describe() const;

  MlaRows rows;
  int block_size, tokens;
  Storage kv_c, k_pe, scale, cache;
  std::vector<std::int64_t> slots;

 private:
  void expect_row(std::int64_t slot, std::int64_t token, const Storage& keys);
  void expect_coded_row(std::int64_t slot, std::int64_t token, const Storage& keys);
};

/// Where a row lies in a cache.
struct CacheRow {
  std::int64_t block, offset;
};

/// Tokens of several requests in a cache and the rows that they go to.
struct MlaRead {
  /// Fills the tokens that are read and no others. `from_start` = every request from token 0 on.
  MlaRead(Rng& rng, const MlaRows& shape, bool from_start);
  std::int64_t num_rows() const noexcept { return cu_seq_lens.back(); }
  TensorView cache_view() const noexcept {
    return rows.is_bytes() ? coded_view(cache, *rows.format, blocks.block_size) : cache.view();
  }
  /// Offset of a row in the cache. @pre Its scales do not lie apart.
  std::int64_t row_offset(const CacheRow& at) const noexcept {
    return cache.offset({at.block, at.offset, 0});
  }
  /// Calls visit(row, CacheRow) for each row to gather.
  template <typename Visit>
  void for_each_row(Visit&& visit) const {
    for (std::size_t r = 0; r < lengths.size(); ++r) {
      for (std::int32_t i = 0; i < lengths[r]; ++i) {
        const std::int64_t row = cu_seq_lens[r] + i, token = starts[r] + i;
        visit(row, CacheRow{blocks.block(static_cast<int>(r), token), token % blocks.block_size});
      }
    }
  }
  std::string describe() const;

  MlaRows rows;
  std::vector<std::int32_t> lengths, starts, cu_seq_lens;
  RandomBlocks blocks;
  Storage cache;
};

/// Expects the elements of a row of bytes at offset `to` of dst.
void expect_decoded_row(Storage& dst, std::int64_t to, const MlaRead& read, const CacheRow& from);

}  // namespace attend::conformance
