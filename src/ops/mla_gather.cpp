// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "attend/core/float_types.h"
#include "attend/ops/mla_cache.h"
#include "attend/plan/attention_plan.h"
#include "core/check.h"
#include "ops/coded_row.h"
#include "ops/mla_rows.h"

namespace attend {
namespace {

// Which rows go where, after the checks. Request r fills rows [starts[r], starts[r + 1]) of dst,
// the last one up to `end`.
struct Gather {
  std::string_view op;
  ConstTensorView src;
  TensorView dst;
  ConstTensorView table;
  std::span<const std::int32_t> starts = {};
  std::int64_t end = 0;
  std::span<const std::int32_t> first_tokens = {};  // empty = all 0
  const RowFormat* format = nullptr;                // of a cache of bytes that are decoded

  std::int64_t begin() const noexcept { return starts.empty() ? end : starts.front(); }
  std::int64_t end_of(std::size_t r) const noexcept {
    return r + 1 < starts.size() ? starts[r + 1] : end;
  }
  std::int64_t first_token(std::size_t r) const noexcept {
    return first_tokens.empty() ? 0 : first_tokens[r];
  }
  const std::int32_t* blocks(std::size_t r) const noexcept {
    return table.as<std::int32_t>() + static_cast<std::int64_t>(r) * table.strides[0];
  }
};

void require_dst(const Gather& g, std::initializer_list<DType> dtypes, std::int64_t elements) {
  const check::Where where{g.op, "dst"};
  check::tensor(where, g.dst, 2, dtypes);
  check::shape(where, g.dst, {-1, elements});
  check::unit_last_stride(where, g.dst);
  check::distinct_elements(where, g.dst);
  check::no_overlap(where, g.dst, "src_cache", g.src);
}

// The starts ascend and end in dst. `name` is the argument that they come from.
void require_rows(const Gather& g, std::string_view name) {
  const check::Where where{g.op, name};
  for (std::size_t r = 0; r < g.starts.size(); ++r) {
    check::require(g.starts[r] <= g.end_of(r), where, "ascending entries", [&] {
      return fmt::format("{} then {} at index {}", g.starts[r], g.end_of(r), r + 1);
    });
  }
  check::require(
      g.end <= g.dst.shape[0], where,
      [&] { return fmt::format("at most {} rows, those of dst", g.dst.shape[0]); }, g.end);
}

// Every token of every request has its block in the table and that block is one of the cache.
void require_blocks(const Gather& g) {
  const check::Where where{g.op, "block_table"};
  check::tensor(where, g.table, 2, {DType::i32});
  check::shape(where, g.table, {static_cast<std::int64_t>(g.starts.size()), -1});
  check::unit_last_stride(where, g.table);
  check::no_overlap({g.op, "dst"}, g.dst, "block_table", g.table);
  const std::int64_t num_blocks = g.src.shape[0], block_size = g.src.shape[1];
  for (std::size_t r = 0; r < g.starts.size(); ++r) {
    const std::int64_t rows = g.end_of(r) - g.starts[r];
    if (rows == 0) continue;
    check::require(block_size >= 1, {g.op, "src_cache"}, "blocks of at least one token",
                   [&] { return describe(g.src); });
    const std::int64_t first = g.first_token(r) / block_size;
    const std::int64_t last = (g.first_token(r) + rows - 1) / block_size;
    check::require(
        last < g.table.shape[1], where,
        [&] { return fmt::format("{} blocks or more for request {}", last + 1, r); },
        [&] { return describe(g.table); });
    for (std::int64_t b = first; b <= last; ++b) {
      const std::int32_t block = g.blocks(r)[b];
      check::require(
          block >= 0 && block < num_blocks, where,
          [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", num_blocks, r, b); }, block);
    }
  }
}

// Fills in what cu_seq_lens and seq_starts say and checks all of it.
void require_requests(Gather& g, const ConstTensorView& cu_seq_lens,
                      const ConstTensorView& seq_starts) {
  const check::Where where{g.op, "cu_seq_lens"};
  const auto cu = check::i32_array(where, cu_seq_lens, -1);
  check::require(!cu.empty() && cu[0] == 0, where, "entries from 0 on, one more than requests",
                 [&] { return cu.empty() ? "none" : fmt::format("{} at index 0", cu[0]); });
  g.starts = cu.first(cu.size() - 1);
  g.end = cu.back();
  require_rows(g, "cu_seq_lens");
  check::no_overlap({g.op, "dst"}, g.dst, "cu_seq_lens", cu_seq_lens);
  if (seq_starts.defined()) {
    const check::Where at{g.op, "seq_starts"};
    g.first_tokens = check::i32_array(at, seq_starts, static_cast<std::int64_t>(g.starts.size()));
    for (std::size_t r = 0; r < g.first_tokens.size(); ++r) {
      check::require(g.first_tokens[r] >= 0, at, "numbers >= 0",
                     [&] { return fmt::format("{} at index {}", g.first_tokens[r], r); });
    }
    check::no_overlap({g.op, "dst"}, g.dst, "seq_starts", seq_starts);
  }
  require_blocks(g);
}

std::int64_t row_step(const Gather& g) noexcept {
  return g.src.strides[1] * static_cast<std::int64_t>(size_of(g.src.dtype));
}
std::int64_t dst_step(const Gather& g) noexcept {
  return g.dst.strides[0] * static_cast<std::int64_t>(size_of(g.dst.dtype));
}

// Rows that lie in one block.
struct Run {
  std::byte* to;
  const std::byte* block;
  std::int64_t offset, rows;
};

// Calls copy(run) for the rows [begin, end) of dst, as many at once as lie in one block.
template <typename Copy>
void for_each_run(const Gather& g, std::int64_t begin, std::int64_t end, Copy&& copy) {
  if (begin >= end) return;
  const std::int64_t block_size = g.src.shape[1];
  const std::int64_t block_bytes =
      g.src.strides[0] * static_cast<std::int64_t>(size_of(g.src.dtype));
  auto r =
      static_cast<std::size_t>(std::ranges::upper_bound(g.starts, begin) - g.starts.begin() - 1);
  for (std::int64_t row = begin; row < end; ++r) {
    const std::int64_t request_end = std::min(g.end_of(r), end);
    while (row < request_end) {
      const std::int64_t token = g.first_token(r) + row - g.starts[r];
      const std::int64_t offset = token % block_size;
      const std::int64_t rows = std::min(block_size - offset, request_end - row);
      copy(Run{g.dst.as<std::byte>() + row * dst_step(g),
               g.src.as<std::byte>() + g.blocks(r)[token / block_size] * block_bytes, offset,
               rows});
      row += rows;
    }
  }
}

// Runs for_each_run() over all rows; each worker has as many.
template <typename Copy>
void run(const Gather& g, bool small, Executor* executor, Copy&& copy) {
  const std::int64_t rows = g.end - g.begin();
  if (rows == 0 || g.dst.shape[1] == 0) return;
  mla_rows::run(small, executor, [&](int worker, int workers) {
    for_each_run(g, g.begin() + rows * worker / workers, g.begin() + rows * (worker + 1) / workers,
                 copy);
  });
}

void copy_rows(const Gather& g, Executor* executor) {
  const std::int64_t bytes = g.dst.shape[1] * static_cast<std::int64_t>(size_of(g.dst.dtype));
  const std::int64_t from_step = row_step(g), to_step = dst_step(g);
  const bool one_run = from_step == bytes && to_step == bytes;
  run(g, (g.end - g.begin()) * bytes <= mla_rows::kParallelCopyBytes, executor,
      [=](const Run& run) {
        const std::byte* from = run.block + run.offset * from_step;
        if (one_run) {
          std::memcpy(run.to, from, static_cast<std::size_t>(run.rows * bytes));
          return;
        }
        for (std::int64_t i = 0; i < run.rows; ++i) {
          std::memcpy(run.to + i * to_step, from + i * from_step, static_cast<std::size_t>(bytes));
        }
      });
}

// Runs decode(to, block, offset in the block) for every row.
template <typename T, typename Decode>
void decode_rows(const Gather& g, Executor* executor, Decode&& decode) {
  const std::int64_t to_step = dst_step(g);
  const bool small = (g.end - g.begin()) * g.dst.shape[1] < mla_rows::kParallelElements;
  run(g, small, executor, [&](const Run& run) {
    for (std::int64_t i = 0; i < run.rows; ++i) {
      decode(reinterpret_cast<T*>(run.to + i * to_step),
             reinterpret_cast<const std::uint8_t*>(run.block), run.offset + i);
    }
  });
}

// What each code stands for, times `scale` in float32; the same NaN for all that have none.
std::array<float, 256> values_of_codes(DType format, float scale) noexcept {
  std::array<float, 256> values;
  for (int c = 0; c < 256; ++c) {
    const auto code = static_cast<std::uint8_t>(c);
    const float value =
        (format == DType::fp8_e5m2 ? to_f32(fp8_e5m2{code}) : to_f32(fp8_e4m3{code})) * scale;
    values[static_cast<std::size_t>(c)] =
        std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;
  }
  return values;
}

template <typename T>
void decode_fp8(const Gather& g, float scale, Executor* executor) {
  std::array<T, 256> elements;
  std::ranges::transform(values_of_codes(g.src.dtype, scale), elements.begin(), from_f32<T>);
  const std::int64_t dim = g.dst.shape[1];
  const std::int64_t step = g.src.strides[1];
  decode_rows<T>(g, executor, [&](T* to, const std::uint8_t* block, std::int64_t offset) {
    const std::uint8_t* codes = block + offset * step;
    for (std::int64_t d = 0; d < dim; ++d) to[d] = elements[codes[d]];
  });
}

template <typename T>
void decode_coded(const Gather& g, Executor* executor) {
  const RowFormat& f = *g.format;
  const std::array<float, 256> values = values_of_codes(DType::fp8_e4m3, 1.0F);
  decode_rows<T>(g, executor, [&](T* to, const std::uint8_t* block, std::int64_t offset) {
    // The rows are only read.
    const coded_row::Place from = coded_row::place(f, const_cast<std::uint8_t*>(block),
                                                   g.src.shape[1], g.src.strides[1], offset);
    const std::uint8_t* rope = from.row + f.rope_at;
    // A row of bf16 is made in place: the dead-store pass of GCC 12 loses the rope part of one that
    // is put together on the stack and then copied.
    if constexpr (std::is_same_v<T, bf16>) {
      coded_row::decode_latent(f, values.data(), from, reinterpret_cast<std::uint16_t*>(to));
      std::memcpy(to + f.latent, rope, static_cast<std::size_t>(f.rope) * sizeof(bf16));
    } else {
      std::array<std::uint16_t, kMaxHeadDimQk> latent;
      coded_row::decode_latent(f, values.data(), from, latent.data());
      for (int i = 0; i < f.latent; ++i)
        *to++ = from_f32<T>(to_f32(bf16{latent[static_cast<std::size_t>(i)]}));
      for (int i = 0; i < f.rope; ++i) {
        bf16 element;
        std::memcpy(&element, rope + 2 * i, 2);
        *to++ = from_f32<T>(to_f32(element));
      }
    }
  });
}

template <typename T>
void decode(const Gather& g, float scale, Executor* executor) {
  g.format != nullptr ? decode_coded<T>(g, executor) : decode_fp8<T>(g, scale, executor);
}

}  // namespace

void gather_and_maybe_dequant_cache(const GatherAndMaybeDequantCacheArgs& a, Executor* executor) {
  Gather g{"gather_and_maybe_dequant_cache", a.src_cache, a.dst, a.block_table};
  mla_rows::require_cache(
      g.op, "src_cache", a.src_cache,
      {DType::f32, DType::f16, DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2, DType::u8});
  if (a.src_cache.dtype == DType::u8)
    g.format = &mla_rows::require_row_format(g.op, "src_cache", a.src_cache);
  if (is_float_compute(a.src_cache.dtype)) {
    require_dst(g, {a.src_cache.dtype}, a.src_cache.shape[2]);
  } else {
    require_dst(g, {DType::f32, DType::f16, DType::bf16},
                g.format != nullptr ? row_dim(*g.format) : a.src_cache.shape[2]);
  }
  float scale = 1.0F;
  if (is_fp8(a.src_cache.dtype)) {
    scale = mla_rows::require_scale(g.op, a.scale);
    check::no_overlap({g.op, "dst"}, a.dst, "scale", a.scale);
  }
  require_requests(g, a.cu_seq_lens, a.seq_starts);
  if (is_float_compute(a.src_cache.dtype)) return copy_rows(g, executor);
  switch (a.dst.dtype) {
    case DType::f32:
      return decode<float>(g, scale, executor);
    case DType::f16:
      return decode<f16>(g, scale, executor);
    default:
      return decode<bf16>(g, scale, executor);
  }
}

void cp_gather_cache(const CpGatherCacheArgs& a, Executor* executor) {
  Gather g{"cp_gather_cache", a.src_cache, a.dst, a.block_table};
  mla_rows::require_cache(g.op, "src_cache", a.src_cache, {});
  const RowFormat* format =
      a.src_cache.dtype == DType::u8 ? find_row_format(a.src_cache.shape[2]) : nullptr;
  check::require(format == nullptr || !format->scales_apart, {g.op, "src_cache"},
                 "rows that are one run of bytes each",
                 [&] { return fmt::format("{}, whose scales lie apart", format->name); });
  require_dst(g, {a.src_cache.dtype}, a.src_cache.shape[2]);
  require_requests(g, a.cu_seq_lens, a.seq_starts);
  copy_rows(g, executor);
}

void cp_gather_and_upconvert_fp8_kv_cache(const CpGatherAndUpconvertFp8KvCacheArgs& a,
                                          Executor* executor) {
  Gather g{"cp_gather_and_upconvert_fp8_kv_cache", a.src_cache, a.dst, a.block_table};
  mla_rows::require_cache(g.op, "src_cache", a.src_cache, {DType::u8});
  g.format = &mla_rows::require_row_format(g.op, "src_cache", a.src_cache);
  require_dst(g, {DType::bf16}, row_dim(*g.format));
  const check::Where where{g.op, "workspace_starts"};
  g.starts = check::i32_array(where, a.workspace_starts, -1);
  g.end = a.dst.shape[0];
  check::require(g.starts.empty() || g.starts[0] >= 0, where, "entries >= 0",
                 [&] { return fmt::format("{} at index 0", g.starts[0]); });
  require_rows(g, "workspace_starts");
  check::no_overlap({g.op, "dst"}, a.dst, "workspace_starts", a.workspace_starts);
  require_blocks(g);
  decode_coded<bf16>(g, executor);
}

}  // namespace attend
