// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/row_format.h"

#include <fmt/format.h>

#include <array>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"

namespace attend {
namespace {

constexpr std::array kFormats = {&fp8_ds_mla::kFormat, &fp8_ds_v4::kFormat};

/// What whoever reads and writes rows counts on.
constexpr bool is_sound(const RowFormat& f) {
  const int tiles = f.latent / f.tile, scales = f.scale == RowScale::f32 ? 4 * tiles : tiles;
  return (f.tile == 64 || f.tile == 128) && f.latent % f.tile == 0 && f.scale_bytes >= scales &&
         f.value_dim <= row_dim(f) && f.row_bytes == f.latent + 2 * f.rope + f.scale_bytes &&
         f.step == (f.scales_apart ? f.row_bytes - f.scale_bytes : f.row_bytes);
}
constexpr bool all_sound() {
  for (std::size_t i = 0; i < kFormats.size(); ++i) {
    if (!is_sound(*kFormats[i])) return false;
    for (std::size_t j = 0; j < i; ++j)
      if (kFormats[i]->row_bytes == kFormats[j]->row_bytes) return false;
  }
  return true;
}
static_assert(all_sound());

}  // namespace

std::span<const RowFormat* const> row_formats() noexcept { return kFormats; }

const RowFormat* find_row_format(std::int64_t row_bytes) noexcept {
  for (const RowFormat* f : kFormats)
    if (f->row_bytes == row_bytes) return f;
  return nullptr;
}

std::string describe_row_formats() {
  std::string all;
  for (const RowFormat* f : kFormats)
    all += fmt::format("{}{} bytes ({})", all.empty() ? "" : " or ", f->row_bytes, f->name);
  return all;
}

}  // namespace attend
