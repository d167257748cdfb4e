// SPDX-License-Identifier: Apache-2.0
#include "ops/mla_pack.h"

#include <cmath>
#include <cstring>

#include "attend/core/float_types.h"
#include "core/check.h"
#include "kernels/cpu/matmul/matmul.h"

namespace attend::mla_pack {
namespace {

constexpr std::string_view kOp = "MlaWeights::from_kv_b_proj";
constexpr std::int64_t kBlock = 128;  // rows and columns that share a scale

std::int64_t blocks(std::int64_t n) { return (n + kBlock - 1) / kBlock; }

bool is_coded(DType t) noexcept { return t == DType::i8 || t == DType::fp8_e4m3; }

void require_size(std::string_view name, int size) {
  check::require(size > 0 && size % 8 == 0, {kOp, name}, "a multiple of 8 above 0", size);
}

void require_scales(const KvBProjArgs& a) {
  const check::Where where{kOp, "weight_scale"};
  const ConstTensorView& scale = a.weight_scale;
  if (!is_coded(a.weight.dtype)) {
    check::require(!scale.defined(), where, "no scales, which only codes have",
                   [&] { return describe(scale); });
    return;
  }
  check::require(scale.defined(), where, "scales, which codes need", "none");
  check::require(scale.rank <= 2, where, "at most 2 dimensions", [&] { return describe(scale); });
  check::tensor(where, scale, scale.rank, {DType::f32});
  check::contiguous(where, scale);
  const std::int64_t rows = a.weight.shape[0], columns = a.weight.shape[1];
  const bool per_block =
      scale.rank == 2 && scale.shape[0] == blocks(rows) && scale.shape[1] == blocks(columns);
  check::require(
      per_block || (scale.rank < 2 && (scale.numel() == 1 || scale.numel() == rows)), where,
      [&] {
        return fmt::format("shape [1], [{}] or [{}, {}]", rows, blocks(rows), blocks(columns));
      },
      [&] { return describe(scale); });
  for (std::int64_t i = 0; i < scale.numel(); ++i) {
    const float s = scale.as<float>()[i];
    check::require(std::isfinite(s) && s > 0.0F, where, "finite scales above 0",
                   [&] { return fmt::format("{} at index {}", s, i); });
  }
}

/// Scale of an element of the weight.
struct Scales {
  const float* data = nullptr;  // null = 1, exactly: the weight is no code
  std::int64_t row_stride = 0, block_stride = 0;

  explicit Scales(const KvBProjArgs& a) {
    if (!a.weight_scale.defined()) return;
    data = a.weight_scale.as<float>();
    if (a.weight_scale.rank == 2) {
      block_stride = a.weight_scale.shape[1];
    } else if (a.weight_scale.numel() > 1) {
      row_stride = 1;
    }
  }
  float at(std::int64_t row, std::int64_t column) const noexcept {
    const std::int64_t block =
        block_stride == 0 ? 0 : row / kBlock * block_stride + column / kBlock;
    return data[row * row_stride + block];
  }
};

template <typename From, typename To>
To converted(From x, const Scales& scales, std::int64_t row, std::int64_t column) {
  if constexpr (std::is_same_v<From, To>) {
    return x;
  } else if constexpr (std::is_same_v<From, std::int8_t>) {
    return from_f32<To>(static_cast<float>(x) * scales.at(row, column));
  } else if constexpr (std::is_same_v<From, fp8_e4m3>) {
    return from_f32<To>(to_f32(x) * scales.at(row, column));
  } else {
    return from_f32<To>(to_f32(x));
  }
}

/// Place of element (k, n) in the packed matrix of a head.
template <typename T>
std::int64_t place(std::int64_t panel_elements, std::int64_t k, std::int64_t n) {
  constexpr std::int64_t kColumns = cpu::kPanelColumns;
  const std::int64_t panel = n / kColumns * panel_elements, column = n % kColumns;
  if constexpr (std::is_same_v<T, bf16>) return panel + (k / 2 * kColumns + column) * 2 + k % 2;
  return panel + k * kColumns + column;
}

cpu::BatchedProduct shape_of(const Matrices& m) {
  cpu::BatchedProduct p;
  p.depth = m.depth;
  p.columns = m.columns;
  return p;
}

template <typename From, typename To>
void pack_head(const KvBProjArgs& a, const Source& source, const Matrices& to, int head) {
  const Scales scales(a);
  const std::int64_t panel_elements = shape_of(to).panel_elements();
  To* packed = static_cast<To*>(to.data) + head * to.elements_per_head();
  const int rows = source.transposed ? to.depth : to.columns;
  const int columns = source.transposed ? to.columns : to.depth;
  for (int r = 0; r < rows; ++r) {
    const std::int64_t row = source.first_row + head * source.head_rows + r;
    const From* from = a.weight.as<From>() + row * a.weight.strides[0];
    for (int c = 0; c < columns; ++c) {
      const std::int64_t at =
          source.transposed ? place<To>(panel_elements, r, c) : place<To>(panel_elements, c, r);
      packed[at] = converted<From, To>(from[c], scales, row, c);
    }
  }
}

using PackHead = void (*)(const KvBProjArgs&, const Source&, const Matrices&, int);

template <typename To>
PackHead packer_to(DType from) {
  switch (from) {
    case DType::f16:
      return pack_head<f16, To>;
    case DType::bf16:
      return pack_head<bf16, To>;
    case DType::i8:
      return pack_head<std::int8_t, To>;
    case DType::fp8_e4m3:
      return pack_head<fp8_e4m3, To>;
    default:
      return pack_head<float, To>;
  }
}

template <typename T>
void unpack_as(const Matrices& from, const TensorView& out) {
  const std::int64_t panel_elements = shape_of(from).panel_elements();
  for (std::int64_t h = 0; h < out.shape[0]; ++h) {
    const T* packed = static_cast<const T*>(from.data) + h * from.elements_per_head();
    for (std::int64_t k = 0; k < from.depth; ++k) {
      T* row = out.as<T>() + h * out.strides[0] + k * out.strides[1];
      for (std::int64_t n = 0; n < from.columns; ++n)
        row[n] = packed[place<T>(panel_elements, k, n)];
    }
  }
}

}  // namespace

std::int64_t Matrices::elements_per_head() const noexcept {
  const cpu::BatchedProduct p = shape_of(*this);
  return p.panels() * p.panel_elements();
}

void validate(const KvBProjArgs& a) {
  require_size("dims.kv_lora_rank", a.dims.kv_lora_rank);
  require_size("dims.qk_nope_head_dim", a.dims.qk_nope_head_dim);
  require_size("dims.v_head_dim", a.dims.v_head_dim);
  check::require(a.num_heads > 0, {kOp, "num_heads"}, "above 0", a.num_heads);
  check::require(is_float_compute(a.dtype), {kOp, "dtype"}, "f32, f16 or bf16",
                 [&] { return std::string(to_string(a.dtype)); });
  const check::Where where{kOp, "weight"};
  check::require(a.weight.defined(), where, "a weight", "none");
  check::tensor(where, a.weight, 2,
                {DType::f32, DType::f16, DType::bf16, DType::i8, DType::fp8_e4m3});
  const std::int64_t head_rows = std::int64_t{a.dims.qk_nope_head_dim} + a.dims.v_head_dim;
  check::shape(where, a.weight, {a.num_heads * head_rows, a.dims.kv_lora_rank});
  check::unit_last_stride(where, a.weight);
  require_scales(a);
}

void pack(const KvBProjArgs& a, const Source& source, const Matrices& to) {
  const PackHead pack_one = to.dtype == DType::f16    ? packer_to<f16>(a.weight.dtype)
                            : to.dtype == DType::bf16 ? packer_to<bf16>(a.weight.dtype)
                                                      : packer_to<float>(a.weight.dtype);
  Executor& pool = a.executor != nullptr ? *a.executor : default_executor();
  const std::int64_t workers = pool.num_workers();
  const auto task = [&](int worker) {
    const auto end = static_cast<int>(a.num_heads * (worker + 1) / workers);
    for (auto h = static_cast<int>(a.num_heads * worker / workers); h < end; ++h)
      pack_one(a, source, to, h);
  };
  pool.run(task);
}

void unpack(const Matrices& from, const TensorView& out) {
  if (from.dtype == DType::f16) {
    unpack_as<f16>(from, out);
  } else if (from.dtype == DType::bf16) {
    unpack_as<bf16>(from, out);
  } else {
    unpack_as<float>(from, out);
  }
}

}  // namespace attend::mla_pack
