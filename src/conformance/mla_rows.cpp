// SPDX-License-Identifier: Apache-2.0
#include "conformance/mla_rows.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"
#include "attend/oracle/quantize.h"
#include "conformance/cache_slots.h"

namespace attend::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<std::int32_t> cumulative(const std::vector<std::int32_t>& lengths) {
  std::vector<std::int32_t> sums{0};
  for (const std::int32_t n : lengths) sums.push_back(sums.back() + n);
  return sums;
}

std::vector<std::int32_t> sums_of(const std::vector<std::int32_t>& a,
                                  const std::vector<std::int32_t>& b) {
  std::vector<std::int32_t> sums = a;
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += b[i];
  return sums;
}

std::vector<std::int32_t> random_lengths(Rng& rng) {
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(rng.range(0, 6)));
  for (std::int32_t& n : lengths) {
    if (rng.chance(0.85)) n = static_cast<std::int32_t>(rng.range(1, 90));
  }
  return lengths;
}

std::vector<std::int32_t> random_starts(Rng& rng, std::size_t requests, bool all_zero) {
  std::vector<std::int32_t> starts(requests, 0);
  for (std::int32_t& start : starts) {
    if (!all_zero && rng.chance(0.7)) start = static_cast<std::int32_t>(rng.range(0, 200));
  }
  return starts;
}

float random_scale(Rng& rng) {
  auto scale = static_cast<float>(std::exp2(20.0 * rng.uniform() - 14.0));
  if (rng.chance(0.4)) scale = std::exp2(std::ceil(std::log2(scale)));
  if (rng.chance(0.05)) scale = rng.pick({0.0F, -1.0F, 3e38F, 1e-44F, INFINITY, NAN});
  return scale;
}

// Codes, scales and bits as they may lie in a row, NaN among them; as float32 both unrounded scales
// and powers of two.
void set_random_row(Rng& rng, const MlaRead& read, Storage& cache, const CacheRow& at) {
  const MlaRows& rows = read.rows;
  if (!rows.is_bytes()) {
    for (std::int64_t i = 0; i < rows.dim(); ++i) {
      const std::uint64_t bits = rng.next();
      const std::size_t item = size_of(rows.stored);
      std::memcpy(
          cache.view().as<std::byte>() + static_cast<std::size_t>(read.row_offset(at) + i) * item,
          &bits, item);
    }
    return;
  }
  const RowFormat& f = *rows.format;
  const CodedPlace place = coded_place(read.cache_view(), f, at.block, at.offset);
  std::uint8_t* row = cache.view().as<std::uint8_t>() + place.row;
  std::uint8_t* scales = cache.view().as<std::uint8_t>() + place.scales;
  for (int i = 0; i < f.latent; ++i) row[i] = static_cast<std::uint8_t>(rng.next());
  for (int t = 0; t < f.latent / f.tile; ++t) {
    if (f.scale == RowScale::ue8m0) {
      scales[t] = static_cast<std::uint8_t>(rng.chance(0.1) ? rng.next() : 100 + rng.next() % 40);
      continue;
    }
    const float scale = random_scale(rng);
    std::memcpy(scales + 4 * t, &scale, 4);
  }
  for (int i = 0; i < f.rope; ++i) {
    // Finite: which NaN another type makes of a NaN is not promised.
    const auto bits = static_cast<std::uint16_t>(rng.next() & 0xBFFFU);
    std::memcpy(row + f.rope_at + 2 * i, &bits, 2);
  }
}

}  // namespace

MlaRows::MlaRows(Rng& rng)
    : dtype(rng.pick({DType::f32, DType::f16, DType::bf16})),
      stored(rng.pick({dtype, dtype, DType::fp8_e4m3, DType::fp8_e5m2})),
      latent(rng.pick({512, 256, 8 * rng.range(1, 40)})),
      rope(rng.pick({64, 64, 8 * rng.range(1, 12)})) {
  if (rng.chance(0.35)) use(rng.chance(0.5) ? fp8_ds_mla::kFormat : fp8_ds_v4::kFormat);
}

void MlaRows::use(const RowFormat& f) {
  format = &f;
  dtype = DType::bf16;
  stored = DType::u8;
  latent = f.latent;
  rope = f.rope;
}

std::string MlaRows::describe() const {
  return fmt::format("{} in {}, {} + {}", to_string(dtype),
                     is_bytes() ? format->name : to_string(stored), latent, rope);
}

MlaWrite::MlaWrite(Rng& rng)
    : rows(rng), block_size(rng.pick({1, 16, 48, 64, 128})), tokens(rng.range(0, 150)) {
  const std::int64_t blocks = tokens / block_size + rng.range(1, 4);
  Layout layout;
  layout.padded = rng.chance(0.5);
  // More rows than slots: padding of a captured graph, not read.
  const std::int64_t padded_tokens = tokens + (rng.chance(0.3) ? rng.range(1, 9) : 0);
  kv_c = Storage(rng, rows.dtype, {padded_tokens, rows.latent}, layout);
  k_pe = Storage(rng, rows.dtype, {padded_tokens, rows.rope}, layout);
  const double magnitude = std::exp2(rng.range(-20, 12));
  for (Storage* s : {&kv_c, &k_pe}) {
    s->set_random(rng, magnitude);
    if (!rows.is_coded() || rng.chance(0.5)) continue;
    for (const std::int64_t offset : s->offsets()) {
      if (rng.chance(0.003)) s->set(offset, rng.pick({1e30, -1e30, kInfinity, -kInfinity, kNan}));
    }
  }
  // Tiles of zeros, and of numbers so small that the smallest scale is theirs.
  for (std::int64_t t = 0; rows.is_bytes() && t < tokens; ++t) {
    if (rng.chance(0.9)) continue;
    const int size = rows.format->tile;
    const std::int64_t tile =
        kv_c.offset({t, std::int64_t{size} * rng.range(0, rows.latent / size - 1)});
    kv_c.set_random(rng, tile, size, rng.pick({0.0, 1e-37, 1e-40}));
  }
  if (is_fp8(rows.stored)) {
    scale = Storage(rng, DType::f32, {1});
    scale.set(0, magnitude * std::exp2(12.0 * rng.uniform() - 8.0));
  }
  cache = rows.is_bytes()
              ? coded_storage(rng, *rows.format, blocks, block_size, layout)
              : Storage(rng, rows.stored, {blocks, block_size, rows.stored_dim()}, layout);
  slots = random_slots(rng, tokens, blocks * block_size);
  cache.freeze();
}

void MlaWrite::expect_coded_row(std::int64_t slot, std::int64_t token, const Storage& keys) {
  const std::int64_t latent = kv_c.offset({token, 0}), key = keys.offset({token, 0});
  std::vector<double> values(static_cast<std::size_t>(rows.latent));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = kv_c.get(latent + static_cast<std::int64_t>(i));
  std::vector<std::uint16_t> rope(static_cast<std::size_t>(rows.rope));
  std::memcpy(rope.data(), keys.view().as<std::uint16_t>() + key, 2 * rope.size());
  const CodedRow coded = encode_coded_row(*rows.format, values, rope);
  CodedPlace at = coded_place(cache_view(), *rows.format, slot / block_size, slot % block_size);
  for (const std::uint8_t byte : coded.row) cache.expect_bits(at.row++, byte);
  for (const std::uint8_t byte : coded.scales) cache.expect_bits(at.scales++, byte);
}

void MlaWrite::expect_row(std::int64_t slot, std::int64_t token, const Storage& keys) {
  if (rows.is_bytes()) return expect_coded_row(slot, token, keys);
  const std::int64_t latent = kv_c.offset({token, 0}), key = keys.offset({token, 0});
  std::int64_t to = cache.offset({slot / block_size, slot % block_size, 0});
  for (const auto& [part, from, size] :
       {std::tuple(&std::as_const(kv_c), latent, rows.latent), std::tuple(&keys, key, rows.rope)}) {
    for (std::int64_t i = 0; i < size; ++i, ++to) {
      if (!rows.is_coded()) {
        cache.expect_copy(to, *part, from + i);
      } else {
        const auto s = static_cast<float>(scale.get(0));
        cache.expect_bits(to, oracle::fp8_code(rows.stored, part->get(from + i), s));
      }
    }
  }
}

void MlaWrite::expect_rows(const Storage& keys) {
  for (int t = 0; t < tokens; ++t) {
    const std::int64_t slot = slots[static_cast<std::size_t>(t)];
    if (slot >= 0) expect_row(slot, t, keys);
  }
}

std::string MlaWrite::describe() const {
  return fmt::format("{}, {} tokens, block_size {}", rows.describe(), tokens, block_size);
}

MlaRead::MlaRead(Rng& rng, const MlaRows& shape, bool from_start)
    : rows(shape),
      lengths(random_lengths(rng)),
      starts(random_starts(rng, lengths.size(), from_start)),
      cu_seq_lens(cumulative(lengths)),
      blocks(rng, sums_of(lengths, starts), starts, rng.pick({1, 16, 48, 64, 128}),
             rng.chance(0.5)) {
  Layout layout;
  layout.padded = rng.chance(0.5);
  cache = rows.is_bytes()
              ? coded_storage(rng, *rows.format, blocks.num_blocks, blocks.block_size, layout)
              : Storage(rng, rows.stored, {blocks.num_blocks, blocks.block_size, rows.stored_dim()},
                        layout);
  for_each_row([&](std::int64_t, const CacheRow& at) { set_random_row(rng, *this, cache, at); });
}

std::string MlaRead::describe() const {
  return fmt::format("{}, requests of {} tokens from {} on, block_size {}", rows.describe(),
                     lengths, starts, blocks.block_size);
}

void expect_decoded_row(Storage& dst, std::int64_t to, const MlaRead& read, const CacheRow& from) {
  for (const double x : oracle::coded_row(read.cache_view(), from.block, from.offset))
    dst.expect_value(to++, x);
}

}  // namespace attend::conformance
