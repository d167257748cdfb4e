// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/projection.h"

#include <cmath>

#include "oracle/bounds.h"
#include "oracle/element.h"

// Derivation of the bounds: docs/numerics.md, section "Projections of MLA".
namespace attend::oracle {
namespace {

constexpr double kSafety = 2.0;         // higher orders
constexpr double kSmallest = 0x1p-126;  // tiles take what is below as 0

double scale_of(const ConstTensorView& scale, std::int64_t row, std::int64_t column) {
  if (!scale.defined()) return 1.0;
  const auto* s = static_cast<const float*>(scale.data);
  if (scale.rank == 2) return s[row / 128 * scale.shape[1] + column / 128];
  return s[scale.numel() == 1 ? 0 : row];
}

/// A sum of products in float32, rounded once to the dtype of the layer.
struct Sum {
  double exact = 0.0, size = 0.0, operands = 0.0;
  int terms = 0;

  void add(double a, double w) {
    exact += a * w;
    size += std::abs(a * w);
    operands += std::abs(a) + std::abs(w);
    ++terms;
  }
  double bound(DType dtype) const {
    // As many roundings of products as of sums, where they are not fused.
    double computed = kSafety * (terms + 1) * kUnit * size;
    computed += kSafety * kSmallest * (operands + terms);
    return computed + rounding_error(dtype, std::abs(exact) + computed);
  }
};

/// Each row of each head: `columns` sums over `depth` elements a(t, h, k) * w(h, k, n).
template <typename Activation, typename Weight>
Projection multiply(const KvBProj& p, std::int64_t rows, int depth, int columns,
                    const Activation& a, const Weight& w) {
  Projection result;
  for (std::int64_t t = 0; t < rows; ++t) {
    for (int h = 0; h < p.num_heads; ++h) {
      for (int n = 0; n < columns; ++n) {
        Sum sum;
        for (int k = 0; k < depth; ++k) sum.add(a(t, h, k), w(h, k, n));
        result.out.push_back(sum.exact);
        result.bound.push_back(sum.bound(p.dtype));
      }
    }
  }
  return result;
}

}  // namespace

double KvBProj::key(int head, int p, int l) const noexcept {
  const std::int64_t rows = dims.qk_nope_head_dim + dims.v_head_dim;
  return weight[static_cast<std::size_t>((head * rows + p) * dims.kv_lora_rank + l)];
}

double KvBProj::value(int head, int v, int l) const noexcept {
  return key(head, dims.qk_nope_head_dim + v, l);
}

KvBProj kv_b_proj(const KvBProjArgs& a) {
  KvBProj p{a.dims, a.num_heads, a.dtype, {}};
  for (std::int64_t r = 0; r < a.weight.shape[0]; ++r) {
    for (std::int64_t c = 0; c < a.weight.shape[1]; ++c) {
      // A code has few enough bits for the product to be exact here: it is rounded once to float32.
      const double product = at(a.weight, {r, c}) * scale_of(a.weight_scale, r, c);
      p.weight.push_back(round_to(a.dtype, round_to(DType::f32, product)));
    }
  }
  return p;
}

Projection up_project_keys(const KvBProj& p, const ConstTensorView& kv_c) {
  return multiply(
      p, kv_c.shape[0], p.dims.kv_lora_rank, p.dims.qk_nope_head_dim,
      [&](std::int64_t t, int, int k) { return at(kv_c, {t, k}); },
      [&](int h, int k, int n) { return p.key(h, n, k); });
}

Projection up_project_values(const KvBProj& p, const ConstTensorView& kv_c) {
  return multiply(
      p, kv_c.shape[0], p.dims.kv_lora_rank, p.dims.v_head_dim,
      [&](std::int64_t t, int, int k) { return at(kv_c, {t, k}); },
      [&](int h, int k, int n) { return p.value(h, n, k); });
}

Projection absorb_query(const KvBProj& p, const ConstTensorView& q_nope) {
  return multiply(
      p, q_nope.shape[0], p.dims.qk_nope_head_dim, p.dims.kv_lora_rank,
      [&](std::int64_t t, int h, int k) { return at(q_nope, {t, h, k}); },
      [&](int h, int k, int n) { return p.key(h, k, n); });
}

Projection v_up_project(const KvBProj& p, const ConstTensorView& latents) {
  return multiply(
      p, latents.shape[0], p.dims.kv_lora_rank, p.dims.v_head_dim,
      [&](std::int64_t t, int h, int k) { return at(latents, {t, h, k}); },
      [&](int h, int k, int n) { return p.value(h, n, k); });
}

}  // namespace attend::oracle
