// SPDX-License-Identifier: Apache-2.0
#include "conformance/coded_rows.h"

#include <cmath>
#include <cstring>

#include "attend/core/float_types.h"
#include "attend/oracle/quantize.h"

namespace attend::conformance {

Storage coded_storage(Rng& rng, const RowFormat& format, std::int64_t num_blocks,
                      std::int64_t block_size, const Layout& layout) {
  if (!format.scales_apart)
    return Storage(rng, DType::u8, {num_blocks, block_size, format.row_bytes}, layout);
  return Storage(rng, DType::u8, {num_blocks, block_size * format.row_bytes}, layout);
}

TensorView coded_view(const Storage& cache, const RowFormat& format, std::int64_t block_size) {
  const TensorView memory = cache.view();
  if (!format.scales_apart) return memory;
  TensorView view(memory.data, DType::u8, {memory.shape[0], block_size, format.row_bytes});
  view.strides[0] = memory.strides[0];
  return view;
}

CodedPlace coded_place(const ConstTensorView& cache, const RowFormat& format, std::int64_t block,
                       std::int64_t offset) noexcept {
  const std::int64_t begin = block * cache.strides[0];
  if (!format.scales_apart) {
    const std::int64_t row = begin + offset * cache.strides[1];
    return {row, row + format.scales_at};
  }
  const std::int64_t data_bytes = format.row_bytes - format.scale_bytes;
  return {begin + offset * data_bytes,
          begin + cache.shape[1] * data_bytes + offset * format.scale_bytes};
}

CodedRow encode_coded_row(const RowFormat& format, std::span<const double> latent,
                          std::span<const std::uint16_t> rope) {
  CodedRow coded;
  if (!format.scales_apart) {
    coded.row.resize(static_cast<std::size_t>(format.row_bytes));
    oracle::fp8_ds_mla_encode(latent, rope, coded.row);
    return coded;
  }
  coded.row.resize(static_cast<std::size_t>(format.row_bytes - format.scale_bytes));
  coded.scales.resize(static_cast<std::size_t>(format.scale_bytes));
  oracle::fp8_ds_v4_encode(latent, rope, coded.row, coded.scales);
  return coded;
}

void set_random_coded_row(Rng& rng, const TensorView& cache, const RowFormat& format,
                          std::int64_t block, std::int64_t offset) {
  std::vector<double> latent(static_cast<std::size_t>(format.latent));
  std::vector<std::uint16_t> rope(static_cast<std::size_t>(format.rope));
  const double size = std::exp2(4.0 * rng.uniform() - 2.0);
  for (double& x : latent) x = size * rng.bell();
  for (std::uint16_t& bits : rope) bits = to_bf16(static_cast<float>(rng.bell())).bits;
  const CodedRow coded = encode_coded_row(format, latent, rope);
  const CodedPlace at = coded_place(cache, format, block, offset);
  auto* bytes = cache.as<std::uint8_t>();
  std::memcpy(bytes + at.row, coded.row.data(), coded.row.size());
  if (!coded.scales.empty())
    std::memcpy(bytes + at.scales, coded.scales.data(), coded.scales.size());
}

}  // namespace attend::conformance
