// SPDX-License-Identifier: Apache-2.0
#include "core/x86_features.h"

namespace attend {
namespace {

constexpr bool has(std::uint32_t word, std::initializer_list<int> bits) noexcept {
  for (const int bit : bits) {
    if ((word >> bit & 1U) == 0) return false;
  }
  return true;
}

constexpr std::uint64_t kAvxState = 0x06;      // xmm, ymm
constexpr std::uint64_t kAvx512State = 0xE0;   // mask registers, upper zmm, zmm 16-31
constexpr std::uint64_t kTileState = 0x60000;  // tile configuration, tile data

bool has_avx2_level(const X86Features& f) noexcept {
  constexpr int kFma = 12;
  constexpr int kAvx = 28;
  constexpr int kF16c = 29;
  constexpr int kAvx2 = 5;
  return (f.xcr0 & kAvxState) == kAvxState && has(f.leaf1_ecx, {kFma, kAvx, kF16c}) &&
         has(f.leaf7_ebx, {kAvx2});
}

bool has_avx512_level(const X86Features& f) noexcept {
  constexpr int kF = 16;
  constexpr int kDq = 17;
  constexpr int kBw = 30;
  constexpr int kVl = 31;
  return (f.xcr0 & kAvx512State) == kAvx512State && has(f.leaf7_ebx, {kF, kDq, kBw, kVl});
}

bool has_tiles(const X86Features& f) noexcept {
  constexpr int kAmxBf16 = 22;
  constexpr int kAmxTile = 24;
  constexpr int kAmxInt8 = 25;
  return (f.xcr0 & kTileState) == kTileState && has(f.leaf7_edx, {kAmxBf16, kAmxTile, kAmxInt8});
}

IsaLevel best_vector_isa(const X86Features& f) noexcept {
  constexpr int kVnni = 11;
  constexpr int kVbmi = 1;
  constexpr int kFp16 = 23;
  constexpr int kBf16 = 5;
  if (!has_avx2_level(f)) return IsaLevel::scalar;
  if (!has_avx512_level(f)) return IsaLevel::avx2;
  if (!has(f.leaf7_ecx, {kVnni})) return IsaLevel::avx512;
  if (!has(f.leaf7_edx, {kFp16}) || !has(f.leaf7_1_eax, {kBf16}) || !has(f.leaf7_ecx, {kVbmi}))
    return IsaLevel::avx512_vnni;
  return IsaLevel::avx512_spr;
}

}  // namespace

IsaLevel best_isa(const X86Features& f) noexcept {
  return tiles_need_permission(f) && f.tiles_permitted ? IsaLevel::amx : best_vector_isa(f);
}

bool tiles_need_permission(const X86Features& f) noexcept {
  return best_vector_isa(f) == IsaLevel::avx512_spr && has_tiles(f);
}

}  // namespace attend
