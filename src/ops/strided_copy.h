// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "attend/core/tensor_view.h"

namespace attend {

/// Copies one strided region to another of the same shape and dtype, any number of times: the
/// dimensions are merged once, then each copy needs only two addresses.
class StridedCopy {
 public:
  /// Takes shape and dtype from `dst`. @pre src has the same shape and dtype.
  StridedCopy(const TensorView& dst, const ConstTensorView& src) noexcept;

  /// @pre The regions do not overlap.
  void run(std::byte* dst, const std::byte* src) const noexcept { copy(0, dst, src); }

 private:
  struct Dim {
    std::int64_t size = 1;
    std::int64_t dst_step = 0, src_step = 0;  ///< bytes
  };

  void copy(int dim, std::byte* dst, const std::byte* src) const noexcept;

  std::array<Dim, kMaxRank> dims_{};  // outermost first, without sizes of 1
  int num_dims_ = 0;
  std::size_t run_bytes_ = 0;  // contiguous bytes at the innermost level
};

}  // namespace attend
