// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "attend/core/workspace.h"
#include "attend/ops/mla_weights.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr MlaDims kDims = {
    .kv_lora_rank = 512, .qk_nope_head_dim = 128, .qk_rope_head_dim = 64, .v_head_dim = 128};
constexpr std::int64_t kHeadRows = 256, kL = 512, kP = 128, kV = 128;

enum class Product : std::uint8_t { up, absorb, v_up };

struct Shape {
  Product product;
  DType dtype;
  int heads;
  std::int64_t tokens;
};

/// One of the products with the weights of an MLA layer, sizes of DeepSeek.
class Projection : public Problem {
 public:
  Projection(const Shape& shape, Executor& executor)
      : shape_(shape),
        executor_(executor),
        weight_(bytes_of(shape.heads * kHeadRows * kL)),
        input_(bytes_of(input_elements())),
        out_(bytes_of(shape.tokens * shape.heads * out_dim())) {
    // Rows of the usual size: sums of L terms are about as large as their terms.
    fill_random(weight_.data(), shape.dtype, {0, shape.heads * kHeadRows * kL}, 1);
    fill_random(input_.data(), shape.dtype, {0, input_elements()}, 2);
    weights_ = MlaWeights::from_kv_b_proj({.weight = weight(),
                                           .dims = kDims,
                                           .num_heads = shape.heads,
                                           .dtype = shape.dtype,
                                           .executor = &executor});
  }

  void run() override {
    const std::int64_t t = shape_.tokens, h = shape_.heads;
    const TensorView out(out_.data(), shape_.dtype, {t, h, out_dim()});
    const ConstTensorView heads(input_.data(), shape_.dtype, {t, h, depth()});
    switch (shape_.product) {
      case Product::up:
        weights_->up_project({input_.data(), shape_.dtype, {t, kL}}, out.slice(2, 0, kP),
                             out.slice(2, kP, kV), &executor_);
        break;
      case Product::absorb:
        weights_->absorb_query(heads, out, &executor_);
        break;
      case Product::v_up:
        weights_->v_up_project(heads, out, &executor_);
        break;
    }
  }

  double flops() const override {
    return 2.0 * static_cast<double>(shape_.tokens * shape_.heads * depth() * out_dim());
  }
  /// Weights, inputs and outputs once.
  double bytes() const override {
    const std::int64_t weights = shape_.heads * depth() * out_dim();
    return static_cast<double>(bytes_of(weights) + input_.size() + out_.size());
  }

  std::string verify() const override {
    constexpr std::int64_t kSampled = 4001;
    for (std::int64_t i = 0; i < shape_.tokens * shape_.heads * out_dim(); i += kSampled) {
      const std::int64_t n = i % out_dim(), h = i / out_dim() % shape_.heads;
      const std::int64_t t = i / out_dim() / shape_.heads;
      double sum = 0.0, size = 0.0;
      for (std::int64_t k = 0; k < depth(); ++k) {
        const double term = input_at(t, h, k) * weight_at(h, n, k);
        sum += term;
        size += std::abs(term);
      }
      const double got = value_at(out_.data(), shape_.dtype, i);
      const double half_ulp = shape_.dtype == DType::f32 ? 0x1p-24 : 0x1p-8;
      if (!(std::abs(got - sum) <= 0x1p-14 * size + half_ulp * std::abs(sum)))
        return fmt::format("element {}: got {}, expected {}", i, got, sum);
    }
    return "";
  }

 private:
  std::int64_t depth() const { return shape_.product == Product::absorb ? kP : kL; }
  std::int64_t out_dim() const {
    if (shape_.product == Product::up) return kHeadRows;
    return shape_.product == Product::absorb ? kL : kV;
  }
  std::int64_t input_elements() const {
    return shape_.tokens * (shape_.product == Product::up ? kL : shape_.heads * depth());
  }
  std::size_t bytes_of(std::int64_t elements) const {
    return static_cast<std::size_t>(elements) * size_of(shape_.dtype);
  }
  ConstTensorView weight() const {
    return {weight_.data(), shape_.dtype, {shape_.heads * kHeadRows, kL}};
  }
  double input_at(std::int64_t t, std::int64_t h, std::int64_t k) const {
    const std::int64_t row = shape_.product == Product::up ? t : t * shape_.heads + h;
    return value_at(input_.data(), shape_.dtype, row * depth() + k);
  }
  /// Factor of input element k in output element n of a head.
  double weight_at(std::int64_t h, std::int64_t n, std::int64_t k) const {
    const std::int64_t row = h * kHeadRows + (shape_.product == Product::absorb ? k
                                              : shape_.product == Product::v_up ? kP + n
                                                                                : n);
    return value_at(weight_.data(), shape_.dtype,
                    row * kL + (shape_.product == Product::absorb ? n : k));
  }

  Shape shape_;
  Executor& executor_;
  Buffer weight_, input_, out_;
  std::shared_ptr<const MlaWeights> weights_;
};

Case projection(std::string name, std::string description, Bound bound, const Shape& shape) {
  return {std::move(name), std::move(description), bound,
          [shape](Executor& executor) { return std::make_unique<Projection>(shape, executor); }};
}

}  // namespace

std::vector<Case> mla_projection_cases() {
  return {
      projection("mla_up_project_bf16_h16_2k",
                 "keys and values of 16 heads from 2048 latents of 512, bf16", Bound::compute,
                 {Product::up, DType::bf16, 16, 2048}),
      projection("mla_up_project_f32_h16_2k", "the same in float32", Bound::compute,
                 {Product::up, DType::f32, 16, 2048}),
      projection("mla_absorb_bf16_h128_1", "one query of 128 heads, 128 to 512 elements, bf16",
                 Bound::memory, {Product::absorb, DType::bf16, 128, 1}),
      projection("mla_v_up_bf16_h128_32", "32 outputs of 128 heads, 512 to 128 elements, bf16",
                 Bound::compute, {Product::v_up, DType::bf16, 128, 32}),
  };
}

}  // namespace attend::bench
