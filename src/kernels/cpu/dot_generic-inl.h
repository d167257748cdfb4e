// SPDX-License-Identifier: Apache-2.0
// Integer vocabulary that every level can fall back on, and the panels' layout. Included inside an
// ISA namespace, after Simd.

/// Bytes of one step of an integer dot product: four products are added to one 32-bit sum.
inline constexpr int kDotBytes = 4;
/// Keys are stored with 128 added: one side of the hardware's dot product is unsigned. A query's
/// sum then starts at -128 times the sum of its codes, which makes the result exact.
inline constexpr std::int32_t kKeyBias = 128;

/// Moves the 4 bytes at `from`, with `flip` toggled, to `to`.
ATTEND_INLINE void copy_dot_bytes(const std::int8_t* from, std::uint32_t flip, std::uint8_t* to) {
  std::uint32_t x;
  std::memcpy(&x, from, kDotBytes);
  x ^= flip;
  std::memcpy(to, &x, kDotBytes);
}

/// panel[d / 4][j][4] = biased codes of keys j < kPanelKeys, dimensions [begin, end).
ATTEND_INLINE void pack_biased_keys(const std::int8_t* const* rows, int begin, int end,
                                    std::uint8_t* panel) {
  for (int d = begin; d < end; d += kDotBytes)
    for (int j = 0; j < plan::kPanelKeys; ++j)
      copy_dot_bytes(rows[j] + d, 0x80808080U,
                     panel + (std::int64_t{d} * plan::kPanelKeys + j * kDotBytes));
}

/// panel[c][4] = columns [begin, end) of four value rows.
ATTEND_INLINE void weave_values(const std::int8_t* const* rows, int begin, int end,
                                std::int8_t* panel) {
  for (int c = begin; c < end; ++c)
    for (int j = 0; j < kDotBytes; ++j) panel[c * kDotBytes + j] = rows[j][c];
}
