// SPDX-License-Identifier: Apache-2.0
#include "serving/mla_layer.h"

#include <cmath>
#include <vector>

#include "attend/core/float_types.h"

namespace attend::serving {
namespace {

float round_to(DType dtype, float x) {
  if (dtype == DType::f16) return to_f32(to_f16(x));
  return dtype == DType::bf16 ? to_f32(to_bf16(x)) : x;
}

}  // namespace

void fill_weight_row(const ValueGenerator& generator, const MlaDims& dims, const WeightRow& row,
                     float* weights) {
  generator.fill_f32(
      {.position = row.row, .layer = row.layer, .head = row.head, .kind = ValueKind::weight},
      dims.kv_lora_rank, weights);
  const float factor = 1.0F / std::sqrt(static_cast<float>(dims.kv_lora_rank));
  for (int l = 0; l < dims.kv_lora_rank; ++l)
    weights[l] = round_to(generator.dtype(), weights[l] * factor);
}

std::shared_ptr<const MlaWeights> make_mla_weights(const ModelPreset& model, int layer,
                                                   const ValueGenerator& generator,
                                                   Executor& executor) {
  const MlaDims& dims = *model.mla;
  const int rows = dims.qk_nope_head_dim + dims.v_head_dim;
  const auto rank = static_cast<std::size_t>(dims.kv_lora_rank);
  // float32 holds the numbers of every dtype: from_kv_b_proj() rounds nothing.
  std::vector<float> weight(static_cast<std::size_t>(model.num_q_heads * rows) * rank);
  executor.run([&](int worker) {
    for (int head = worker; head < model.num_q_heads; head += executor.num_workers()) {
      for (int row = 0; row < rows; ++row) {
        fill_weight_row(generator, dims, {.layer = layer, .head = head, .row = row},
                        weight.data() + static_cast<std::size_t>(head * rows + row) * rank);
      }
    }
  });
  KvBProjArgs args;
  args.weight =
      ConstTensorView(weight.data(), DType::f32, {model.num_q_heads * rows, dims.kv_lora_rank});
  args.dims = dims;
  args.num_heads = model.num_q_heads;
  args.dtype = generator.dtype();
  args.executor = &executor;
  return MlaWeights::from_kv_b_proj(args);
}

}  // namespace attend::serving
