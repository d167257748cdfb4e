// SPDX-License-Identifier: Apache-2.0
#include "backends/common/quantise_output.h"

#include <cstdint>

#include "attend/core/float_types.h"
#include "backends/common/for_rows.h"
#include "ops/fp8_encode.h"

namespace attend {
namespace {

/// Rows are numbered token by token, head by head.
template <typename T>
void quantise_rows(const ConstTensorView& rows, float scale, const TensorView& codes,
                   std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t heads = codes.shape[1];
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t t = i / heads, h = i % heads;
    const T* from = rows.as<T>() + t * rows.strides[0] + h * rows.strides[1];
    std::uint8_t* to = codes.as<std::uint8_t>() + t * codes.strides[0] + h * codes.strides[1];
    for (std::int64_t d = 0; d < codes.shape[2]; ++d) {
      to[d] = encode_fp8<E4m3Encoding>(to_f32(from[d]) / scale);
    }
  }
}

}  // namespace

void quantise_output(const ConstTensorView& rows, float scale, const TensorView& codes,
                     Executor& executor) {
  const auto quantise = rows.dtype == DType::f16    ? quantise_rows<f16>
                        : rows.dtype == DType::bf16 ? quantise_rows<bf16>
                                                    : quantise_rows<float>;
  const auto bytes = rows.shape[2] * static_cast<std::int64_t>(size_of(rows.dtype));
  for_rows(codes.shape[0] * codes.shape[1], bytes, executor,
           [&](std::int64_t begin, std::int64_t end) { quantise(rows, scale, codes, begin, end); });
}

}  // namespace attend
