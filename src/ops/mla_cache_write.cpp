// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <tuple>

#include "attend/core/float_types.h"
#include "attend/ops/mla_cache.h"
#include "core/check.h"
#include "ops/cache_rows.h"
#include "ops/coded_row.h"
#include "ops/fp8_encode.h"
#include "ops/mla_rows.h"
#include "ops/rotary.h"

namespace attend {
namespace {

using Slots = std::span<const std::int64_t>;

// What both ops write; k_pe is rotated by then.
struct Source {
  ConstTensorView kv_c, k_pe;
  TensorView cache;
  float scale = 1.0F;
  const RowFormat* format = nullptr;  // of a cache of bytes
};

const std::byte* row_of(const ConstTensorView& rows, std::int64_t t) noexcept {
  return rows.as<std::byte>() +
         t * rows.strides[0] * static_cast<std::int64_t>(size_of(rows.dtype));
}

std::byte* slot_of(const TensorView& cache, const cache_rows::Place& p) noexcept {
  return cache.as<std::byte>() + (p.block * cache.strides[0] + p.offset * cache.strides[1]) *
                                     static_cast<std::int64_t>(size_of(cache.dtype));
}

std::size_t row_bytes(const ConstTensorView& rows) noexcept {
  return static_cast<std::size_t>(rows.shape[1]) * size_of(rows.dtype);
}

void copy_row(const Source& s, const cache_rows::Place& p) noexcept {
  std::byte* to = slot_of(s.cache, p);
  std::memcpy(to, row_of(s.kv_c, p.row), row_bytes(s.kv_c));
  std::memcpy(to + row_bytes(s.kv_c), row_of(s.k_pe, p.row), row_bytes(s.k_pe));
}

template <typename T, typename Format>
void encode_row(const Source& s, const cache_rows::Place& p) noexcept {
  auto* to = reinterpret_cast<std::uint8_t*>(slot_of(s.cache, p));
  for (const ConstTensorView* part : {&s.kv_c, &s.k_pe}) {
    const T* from = part->as<T>() + p.row * part->strides[0];
    for (std::int64_t i = 0; i < part->shape[1]; ++i) {
      to[i] = encode_fp8<Format>(to_f32(from[i]) / s.scale);
    }
    to += part->shape[1];
  }
}

void encode_coded_row(const Source& s, const cache_rows::Place& p) noexcept {
  const coded_row::Place to =
      coded_row::place(*s.format, s.cache.as<std::uint8_t>() + p.block * s.cache.strides[0],
                       s.cache.shape[1], s.cache.strides[1], p.offset);
  coded_row::encode_latent(*s.format, s.kv_c.as<bf16>() + p.row * s.kv_c.strides[0], to);
  std::memcpy(to.row + s.format->rope_at, row_of(s.k_pe, p.row), row_bytes(s.k_pe));
}

using WriteRow = void (*)(const Source&, const cache_rows::Place&) noexcept;

template <typename T>
WriteRow writer_from(DType cache) noexcept {
  return cache == DType::fp8_e4m3 ? encode_row<T, E4m3Encoding> : encode_row<T, E5m2Encoding>;
}

WriteRow writer(DType rows, DType cache) noexcept {
  if (cache == DType::u8) return encode_coded_row;
  if (!is_fp8(cache)) return copy_row;
  switch (rows) {
    case DType::f16:
      return writer_from<f16>(cache);
    case DType::bf16:
      return writer_from<bf16>(cache);
    default:
      return writer_from<float>(cache);
  }
}

// Work is cut by slots: whoever writes a slot walks the rows in order, so that the later of two
// rows with one slot wins as in a serial loop.
bool is_mine(std::int64_t slot, std::int64_t row, int worker, int workers) noexcept {
  return (slot < 0 ? row : slot) % workers == worker;
}

// What a format holds.
void require_elements(std::string_view op, const Source& s) {
  for (const auto& [name, rows, elements] :
       {std::tuple("kv_c", &s.kv_c, s.format->latent), std::tuple("k_pe", &s.k_pe, s.format->rope)})
    check::require(
        rows->shape[1] == elements && rows->dtype == DType::bf16, {op, name},
        [&] { return fmt::format("{} elements of bf16 for {}", elements, s.format->name); },
        [&] { return describe(*rows); });
}

// Checks rows, cache, slots and scale. Returns the slots.
Slots validate(std::string_view op, Source& s, const ConstTensorView& slot_mapping,
               const ConstTensorView& scale) {
  for (const auto& [name, rows] : {std::pair("kv_c", &s.kv_c), std::pair("k_pe", &s.k_pe)}) {
    check::tensor({op, name}, *rows, 2, {DType::f32, DType::f16, DType::bf16});
    check::unit_last_stride({op, name}, *rows);
  }
  check::shape({op, "k_pe"}, s.k_pe, {s.kv_c.shape[0], -1});
  check::require(
      s.k_pe.dtype == s.kv_c.dtype, {op, "k_pe"},
      [&] { return fmt::format("dtype {} of kv_c", to_string(s.kv_c.dtype)); },
      [&] { return describe(s.k_pe); });
  mla_rows::require_cache(op, "kv_cache", s.cache,
                          {s.kv_c.dtype, DType::fp8_e4m3, DType::fp8_e5m2, DType::u8});
  if (s.cache.dtype == DType::u8) {
    s.format = &mla_rows::require_row_format(op, "kv_cache", s.cache);
    require_elements(op, s);
  } else {
    check::shape({op, "kv_cache"}, s.cache, {-1, -1, s.kv_c.shape[1] + s.k_pe.shape[1]});
  }
  check::distinct_elements({op, "kv_cache"}, s.cache);
  if (is_fp8(s.cache.dtype)) s.scale = mla_rows::require_scale(op, scale);
  const check::Where cache{op, "kv_cache"};
  check::no_overlap(cache, s.cache, "kv_c", s.kv_c);
  check::no_overlap(cache, s.cache, "k_pe", s.k_pe);
  check::no_overlap(cache, s.cache, "slot_mapping", slot_mapping);
  if (is_fp8(s.cache.dtype)) check::no_overlap(cache, s.cache, "scale", scale);
  return cache_rows::require_slots(op, slot_mapping, s.kv_c.shape[0],
                                   s.cache.shape[0] * s.cache.shape[1]);
}

// Writes the rows, after prepare(row) of each.
template <typename Prepare>
void write(const Source& s, Slots slots, bool small, Executor* executor, Prepare&& prepare) {
  const WriteRow write_row = writer(s.kv_c.dtype, s.cache.dtype);
  const std::int64_t block_size = s.cache.shape[1];
  mla_rows::run(small, executor, [&](int worker, int workers) {
    for (std::size_t t = 0; t < slots.size(); ++t) {
      const auto row = static_cast<std::int64_t>(t);
      if (!is_mine(slots[t], row, worker, workers)) continue;
      prepare(row);
      if (slots[t] >= 0) write_row(s, {row, slots[t] / block_size, slots[t] % block_size});
    }
  });
}

constexpr std::string_view kConcat = "concat_and_cache_mla";
constexpr std::string_view kFused = "concat_and_cache_mla_rope_fused";

std::span<const std::int64_t> require_positions(const ConstTensorView& positions,
                                                std::size_t tokens, std::int64_t max_pos) {
  const check::Where where{kFused, "positions"};
  const auto all = check::i64_array(where, positions, -1);
  check::require(
      all.size() >= tokens, where,
      [&] { return fmt::format("at least {} entries, one a slot", tokens); }, all.size());
  for (std::size_t t = 0; t < tokens; ++t) {
    check::require(
        all[t] >= 0 && all[t] < max_pos, where,
        [&] { return fmt::format("positions in [0, {}), the rows of cos_sin_cache", max_pos); },
        [&] { return fmt::format("{} at index {}", all[t], t); });
  }
  return all.first(tokens);
}

void require_rotation(const ConcatAndCacheMlaRopeFusedArgs& a) {
  const std::int64_t rope = a.k_pe.shape[1];
  check::require(rope % 2 == 0, {kFused, "k_pe"}, "an even number of elements to rotate", rope);
  const check::Where query{kFused, "q_pe"};
  check::tensor(query, a.q_pe, 3, {a.kv_c.dtype});
  check::shape(query, a.q_pe, {a.kv_c.shape[0], -1, rope});
  check::unit_last_stride(query, a.q_pe);
  check::distinct_elements(query, a.q_pe);
  check::distinct_elements({kFused, "k_pe"}, a.k_pe);
  const check::Where tables{kFused, "cos_sin_cache"};
  check::tensor(tables, a.cos_sin_cache, 2, {a.kv_c.dtype, DType::f32});
  check::shape(tables, a.cos_sin_cache, {-1, rope});
  check::unit_last_stride(tables, a.cos_sin_cache);

  check::no_overlap(query, a.q_pe, "k_pe", a.k_pe);
  check::no_overlap(query, a.q_pe, "kv_cache", a.kv_cache);
  check::no_overlap({kFused, "kv_cache"}, a.kv_cache, "cos_sin_cache", a.cos_sin_cache);
  check::no_overlap({kFused, "kv_cache"}, a.kv_cache, "positions", a.positions);
  const auto apart_from_inputs = [&](std::string_view name, const TensorView& rotated) {
    check::no_overlap({kFused, name}, rotated, "kv_c", a.kv_c);
    check::no_overlap({kFused, name}, rotated, "cos_sin_cache", a.cos_sin_cache);
    check::no_overlap({kFused, name}, rotated, "positions", a.positions);
    check::no_overlap({kFused, name}, rotated, "slot_mapping", a.slot_mapping);
    if (is_fp8(a.kv_cache.dtype)) check::no_overlap({kFused, name}, rotated, "scale", a.scale);
  };
  apart_from_inputs("q_pe", a.q_pe);
  apart_from_inputs("k_pe", a.k_pe);
}

}  // namespace

void concat_and_cache_mla(const ConcatAndCacheMlaArgs& a, Executor* executor) {
  Source source{a.kv_c, a.k_pe, a.kv_cache};
  const Slots slots = validate(kConcat, source, a.slot_mapping, a.scale);
  const std::int64_t elements =
      static_cast<std::int64_t>(slots.size()) * (a.kv_c.shape[1] + a.k_pe.shape[1]);
  const bool copies = a.kv_cache.dtype == a.kv_c.dtype;
  const bool small = copies ? elements * static_cast<std::int64_t>(size_of(a.kv_c.dtype)) <
                                  mla_rows::kParallelCopyBytes
                            : elements < mla_rows::kParallelElements;
  write(source, slots, small, executor, [](std::int64_t) {});
}

void concat_and_cache_mla_rope_fused(const ConcatAndCacheMlaRopeFusedArgs& a, Executor* executor) {
  Source source{a.kv_c, a.k_pe, a.kv_cache};
  const Slots slots = validate(kFused, source, a.slot_mapping, a.scale);
  require_rotation(a);
  const auto positions = require_positions(a.positions, slots.size(), a.cos_sin_cache.shape[0]);

  const std::int64_t rope = a.k_pe.shape[1], heads = a.q_pe.shape[1];
  const ops::RotaryTables tables{a.cos_sin_cache.slice(1, 0, rope / 2),
                                 a.cos_sin_cache.slice(1, rope / 2, rope / 2), !a.is_neox};
  const DType dtype = a.kv_c.dtype;
  const auto item = static_cast<std::int64_t>(size_of(dtype));
  const auto rotate = [&](std::byte* row, std::int64_t position) {
    ops::rotate_row(tables, position, row, row, rope, dtype);
  };
  const std::int64_t elements =
      static_cast<std::int64_t>(slots.size()) * (a.kv_c.shape[1] + (heads + 1) * rope);
  write(source, slots, elements < mla_rows::kParallelElements, executor, [&](std::int64_t t) {
    const std::int64_t position = positions[static_cast<std::size_t>(t)];
    std::byte* query = a.q_pe.as<std::byte>() + t * a.q_pe.strides[0] * item;
    for (std::int64_t h = 0; h < heads; ++h) rotate(query + h * a.q_pe.strides[1] * item, position);
    rotate(a.k_pe.as<std::byte>() + t * a.k_pe.strides[0] * item, position);
  });
}

}  // namespace attend
