// SPDX-License-Identifier: Apache-2.0
#include "ops/strided_copy.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace attend {

StridedCopy::StridedCopy(const TensorView& dst, const ConstTensorView& src) noexcept
    : run_bytes_(size_of(dst.dtype)) {
  const auto item = static_cast<std::int64_t>(size_of(dst.dtype));
  for (int i = 0; i < dst.rank; ++i) {
    const Dim d{dst.shape[i], dst.strides[i] * item, src.strides[i] * item};
    if (d.size != 1) dims_[static_cast<std::size_t>(num_dims_++)] = d;
  }
  std::sort(dims_.begin(), dims_.begin() + num_dims_,
            [](const Dim& a, const Dim& b) { return std::abs(a.dst_step) > std::abs(b.dst_step); });
  // Dimensions that continue the run without a gap on both sides become part of it.
  while (num_dims_ > 0) {
    const Dim& d = dims_[static_cast<std::size_t>(num_dims_ - 1)];
    const auto run = static_cast<std::int64_t>(run_bytes_);
    if (d.dst_step != run || d.src_step != run) break;
    run_bytes_ *= static_cast<std::size_t>(d.size);
    --num_dims_;
  }
}

void StridedCopy::copy(int dim, std::byte* dst, const std::byte* src) const noexcept {
  if (dim == num_dims_) {
    if (run_bytes_ > 0) std::memcpy(dst, src, run_bytes_);
    return;
  }
  const Dim& d = dims_[static_cast<std::size_t>(dim)];
  for (std::int64_t i = 0; i < d.size; ++i) {
    copy(dim + 1, dst + i * d.dst_step, src + i * d.src_step);
  }
}

}  // namespace attend
