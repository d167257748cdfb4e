// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "attend/cache/row_format.h"
#include "conformance/rng.h"
#include "conformance/storage.h"

/// Caches of rows that are bytes, in random memory. Layouts are those of the oracle's words.
namespace attend::conformance {

/// Memory of such a cache. Where scales lie apart only the blocks have gaps.
Storage coded_storage(Rng& rng, const RowFormat& format, std::int64_t num_blocks,
                      std::int64_t block_size, const Layout& layout);
/// As the ops take it, [num_blocks, block_size, row_bytes].
TensorView coded_view(const Storage& cache, const RowFormat& format, std::int64_t block_size);

/// Offsets of a row and of its scales in the memory, in bytes.
struct CodedPlace {
  std::int64_t row, scales;
};
CodedPlace coded_place(const ConstTensorView& cache, const RowFormat& format, std::int64_t block,
                       std::int64_t offset) noexcept;

/// What a row should be. The bytes of `row` do not count the scales where these lie apart.
struct CodedRow {
  std::vector<std::uint8_t> row, scales;  ///< scales: empty where they lie in the row
};
CodedRow encode_coded_row(const RowFormat& format, std::span<const double> latent,
                          std::span<const std::uint16_t> rope);

/// Writes a row of bell-shaped numbers.
void set_random_coded_row(Rng& rng, const TensorView& cache, const RowFormat& format,
                          std::int64_t block, std::int64_t offset);

}  // namespace attend::conformance
