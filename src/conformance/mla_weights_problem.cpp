// SPDX-License-Identifier: Apache-2.0
#include "conformance/mla_weights_problem.h"

#include <fmt/format.h>

#include <cmath>

namespace attend::conformance {
namespace {

int random_dim(Rng& rng) { return rng.chance(0.5) ? 8 * rng.range(1, 24) : 32 * rng.range(1, 5); }

}  // namespace

MlaWeightsProblem::MlaWeightsProblem(Rng& rng) {
  args_.dtype = rng.pick({DType::f32, DType::f16, DType::bf16, DType::bf16});
  args_.num_heads = rng.range(1, 4);
  // Some latents longer than what kernels take at a time.
  args_.dims.kv_lora_rank = rng.chance(0.15) ? 8 * rng.range(60, 70) : random_dim(rng);
  args_.dims.qk_nope_head_dim = random_dim(rng);
  args_.dims.v_head_dim = random_dim(rng);
  args_.dims.qk_rope_head_dim = 64;
  tokens_ = rng.chance(0.1) ? rng.range(97, 110) : rng.range(0, 40);
  choose_weight(rng);
  expected_ = oracle::kv_b_proj(args_);
}

void MlaWeightsProblem::choose_weight(Rng& rng) {
  const DType dtype =
      rng.pick({args_.dtype, args_.dtype, DType::f32, DType::f16, DType::i8, DType::fp8_e4m3});
  const std::int64_t rows =
      std::int64_t{args_.num_heads} * (args_.dims.qk_nope_head_dim + args_.dims.v_head_dim);
  const std::int64_t columns = args_.dims.kv_lora_rank;
  Layout layout;
  layout.padded = rng.chance(0.5);
  weight_ = Storage(rng, dtype, {rows, columns}, layout);
  weight_.set_random(rng, dtype == DType::i8 ? 40.0 : 1.0);
  args_.weight = weight_.view();
  if (dtype != DType::i8 && dtype != DType::fp8_e4m3) return;
  switch (rng.range(0, 2)) {
    case 0:
      scale_ = Storage(rng, DType::f32, {1});
      break;
    case 1:
      scale_ = Storage(rng, DType::f32, {rows});
      break;
    default:
      scale_ = Storage(rng, DType::f32, {(rows + 127) / 128, (columns + 127) / 128});
  }
  for (const std::int64_t at : scale_.offsets())
    scale_.set(at, std::exp2(6.0 * rng.uniform() - 6.0));
  args_.weight_scale = scale_.view();
}

std::shared_ptr<const MlaWeights> MlaWeightsProblem::weights(IsaLevel isa,
                                                             Executor& executor) const {
  KvBProjArgs args = args_;
  args.isa = isa;
  args.executor = &executor;
  return MlaWeights::from_kv_b_proj(args);
}

Storage MlaWeightsProblem::activations(Rng& rng, int dim, bool per_head) const {
  Layout layout;
  layout.padded = rng.chance(0.5);
  std::vector<std::int64_t> shape = {tokens_, dim};
  if (per_head) {
    shape.insert(shape.begin() + 1, args_.num_heads);
    if (rng.chance(0.3)) layout.order = {1, 0, 2};
  }
  Storage rows(rng, args_.dtype, shape, layout);
  rows.set_random(rng, 1.0);
  const double tiny = args_.dtype == DType::f16 ? 0x1p-24 : 0x1p-130;
  for (const std::int64_t at : rows.offsets())
    if (rng.chance(0.01)) rows.set(at, rng.pick({100.0, -100.0, tiny, 0.0}));
  return rows;
}

Storage MlaWeightsProblem::output(Rng& rng, int dim) const {
  Layout layout;
  layout.padded = rng.chance(0.5);
  if (rng.chance(0.3)) layout.order = {1, 0, 2};
  Storage out(rng, args_.dtype, {tokens_, args_.num_heads, dim}, layout);
  out.freeze();
  return out;
}

std::string MlaWeightsProblem::describe() const {
  return fmt::format("{} from {}{}, {} tokens {} heads L {} P {} V {}", to_string(args_.dtype),
                     to_string(args_.weight.dtype),
                     args_.weight_scale.defined()
                         ? fmt::format(" with {} scales", args_.weight_scale.numel())
                         : "",
                     tokens_, args_.num_heads, args_.dims.kv_lora_rank, args_.dims.qk_nope_head_dim,
                     args_.dims.v_head_dim);
}

}  // namespace attend::conformance
