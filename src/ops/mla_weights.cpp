// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/mla_weights.h"

#include <array>

#include "core/check.h"
#include "ops/isa_choice.h"
#include "ops/mla_pack.h"
#include "ops/mla_product.h"

namespace attend {
namespace {

using check::Where;
using cpu::BatchedProduct;
using mla_pack::Matrices;

Buffer packed(const KvBProjArgs& a, const mla_pack::Source& source, int depth, int columns) {
  Matrices to{nullptr, a.dtype, depth, columns};
  Buffer buffer(static_cast<std::size_t>(a.num_heads * to.elements_per_head()) * size_of(a.dtype));
  to.data = buffer.data();
  mla_pack::pack(a, source, to);
  return buffer;
}

/// A tensor of rows of heads. @param rows -1 = any
void require_heads(Where where, const ConstTensorView& t, DType dtype,
                   std::initializer_list<std::int64_t> shape) {
  check::tensor(where, t, 3, {dtype});
  check::shape(where, t, shape);
  check::unit_last_stride(where, t);
}

/// Rows [T, H, K] (or [T, K] for all heads alike) times matrices, into [T, H, N].
BatchedProduct product(const ConstTensorView& a, const Buffer& weights, const TensorView& out) {
  BatchedProduct p;
  p.dtype = out.dtype;
  p.rows = out.shape[0];
  p.heads = static_cast<int>(out.shape[1]);
  p.columns = static_cast<int>(out.shape[2]);
  p.depth = static_cast<int>(a.shape[a.rank - 1]);
  p.a = a.data;
  p.a_row = a.strides[0];
  p.a_head = a.rank == 3 ? a.strides[1] : 0;
  p.weights = weights.data();
  p.out = out.data;
  p.out_row = out.strides[0];
  p.out_head = out.strides[1];
  return p;
}

}  // namespace

std::shared_ptr<const MlaWeights> MlaWeights::from_kv_b_proj(const KvBProjArgs& args) {
  mla_pack::validate(args);
  return std::shared_ptr<const MlaWeights>(
      new MlaWeights(args, ops::checked_level("MlaWeights::from_kv_b_proj", args.isa)));
}

MlaWeights::MlaWeights(const KvBProjArgs& a, IsaLevel isa)
    : dims_(a.dims), num_heads_(a.num_heads), dtype_(a.dtype), isa_(isa) {
  const int l = dims_.kv_lora_rank, p = dims_.qk_nope_head_dim, v = dims_.v_head_dim;
  keys_up_ = packed(a, {.first_row = 0, .head_rows = p + v, .transposed = false}, l, p);
  values_up_ = packed(a, {.first_row = p, .head_rows = p + v, .transposed = false}, l, v);
  absorb_ = packed(a, {.first_row = 0, .head_rows = p + v, .transposed = true}, p, l);
}

std::int64_t MlaWeights::bytes() const noexcept {
  return static_cast<std::int64_t>(keys_up_.size() + values_up_.size() + absorb_.size());
}

void MlaWeights::up_project(const ConstTensorView& kv_c, const TensorView& k_nope,
                            const TensorView& v, Executor* executor) const {
  constexpr std::string_view kOp = "MlaWeights::up_project";
  check::tensor({kOp, "kv_c"}, kv_c, 2, {dtype_});
  check::shape({kOp, "kv_c"}, kv_c, {-1, dims_.kv_lora_rank});
  check::unit_last_stride({kOp, "kv_c"}, kv_c);
  const std::int64_t rows = kv_c.shape[0];
  require_heads({kOp, "k_nope"}, k_nope, dtype_, {rows, num_heads_, dims_.qk_nope_head_dim});
  require_heads({kOp, "v"}, v, dtype_, {rows, num_heads_, dims_.v_head_dim});
  check::distinct_elements({kOp, "k_nope"}, k_nope);
  check::distinct_elements({kOp, "v"}, v);
  check::no_overlap({kOp, "k_nope"}, k_nope, "kv_c", kv_c);
  check::no_overlap({kOp, "v"}, v, "kv_c", kv_c);
  check::no_overlap({kOp, "v"}, v, "k_nope", k_nope);
  const std::array<BatchedProduct, 2> products = {product(kv_c, keys_up_, k_nope),
                                                  product(kv_c, values_up_, v)};
  run_products(products, isa_, executor);
}

void MlaWeights::absorb_query(const ConstTensorView& q_nope, const TensorView& ql_nope,
                              Executor* executor) const {
  constexpr std::string_view kOp = "MlaWeights::absorb_query";
  require_heads({kOp, "q_nope"}, q_nope, dtype_, {-1, num_heads_, dims_.qk_nope_head_dim});
  require_heads({kOp, "ql_nope"}, ql_nope, dtype_,
                {q_nope.shape[0], num_heads_, dims_.kv_lora_rank});
  check::distinct_elements({kOp, "ql_nope"}, ql_nope);
  check::no_overlap({kOp, "ql_nope"}, ql_nope, "q_nope", q_nope);
  const BatchedProduct p = product(q_nope, absorb_, ql_nope);
  run_products({&p, 1}, isa_, executor);
}

void MlaWeights::v_up_project(const ConstTensorView& latents, const TensorView& out,
                              Executor* executor) const {
  constexpr std::string_view kOp = "MlaWeights::v_up_project";
  require_heads({kOp, "latents"}, latents, dtype_, {-1, num_heads_, dims_.kv_lora_rank});
  require_heads({kOp, "out"}, out, dtype_, {latents.shape[0], num_heads_, dims_.v_head_dim});
  check::distinct_elements({kOp, "out"}, out);
  check::no_overlap({kOp, "out"}, out, "latents", latents);
  const BatchedProduct p = product(latents, values_up_, out);
  run_products({&p, 1}, isa_, executor);
}

void MlaWeights::copy_w_uk_t(const TensorView& out) const {
  constexpr Where kWhere{"MlaWeights::copy_w_uk_t", "out"};
  require_heads(kWhere, out, dtype_, {num_heads_, dims_.qk_nope_head_dim, dims_.kv_lora_rank});
  check::distinct_elements(kWhere, out);
  mla_pack::unpack({absorb_.data(), dtype_, dims_.qk_nope_head_dim, dims_.kv_lora_rank}, out);
}

void MlaWeights::copy_w_uv(const TensorView& out) const {
  constexpr Where kWhere{"MlaWeights::copy_w_uv", "out"};
  require_heads(kWhere, out, dtype_, {num_heads_, dims_.kv_lora_rank, dims_.v_head_dim});
  check::distinct_elements(kWhere, out);
  mla_pack::unpack({values_up_.data(), dtype_, dims_.kv_lora_rank, dims_.v_head_dim}, out);
}

}  // namespace attend
