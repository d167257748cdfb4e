// SPDX-License-Identifier: Apache-2.0
#include "serving/step.h"

#include <algorithm>
#include <cstring>

#include "attend/core/float_types.h"

namespace attend::serving {
namespace {

/// Sum over positions first .. last of the keys visible there, the own one included.
double causal_pairs(std::int64_t first, std::int64_t last, std::optional<int> window) {
  const auto sum_up_to = [&](std::int64_t p) {  // positions 0 .. p - 1
    const std::int64_t full = window ? std::min<std::int64_t>(p, *window) : p;
    const double growing = 0.5 * static_cast<double>(full) * static_cast<double>(full + 1);
    return growing + static_cast<double>(p - full) * static_cast<double>(window.value_or(0));
  };
  return sum_up_to(last + 1) - sum_up_to(first);
}

}  // namespace

StepMetadata make_step_metadata(const RequestBatch& batch, int block_size) {
  StepMetadata step;
  CommonMetadata& m = step.common;
  const bool encoder = block_size == 0;
  m.num_reqs = static_cast<int>(batch.requests.size());
  m.num_tokens = batch.num_tokens;
  m.causal = !encoder;
  m.query_start_loc.push_back(0);
  std::size_t max_blocks = 0;
  for (const ScheduledRequest& r : batch.requests) {
    const std::int64_t seq_len = r.num_computed_tokens + r.num_scheduled_tokens;
    m.query_start_loc.push_back(m.query_start_loc.back() + r.num_scheduled_tokens);
    m.seq_lens.push_back(static_cast<std::int32_t>(seq_len));
    m.max_query_len = std::max(m.max_query_len, r.num_scheduled_tokens);
    m.max_seq_len = std::max(m.max_seq_len, static_cast<int>(seq_len));
    m.is_prefilling.push_back(r.num_computed_tokens < r.request->prompt_tokens ? 1 : 0);
    for (int t = r.num_draft_tokens + 1; t >= 1; --t) {
      m.logits_indices.push_back(m.query_start_loc.back() - t);
    }
    max_blocks = std::max(max_blocks, r.blocks.size());
    for (std::int64_t p = r.num_computed_tokens; p < seq_len; ++p) {
      m.positions.push_back(p);
      if (encoder) continue;
      const auto block =
          static_cast<std::int64_t>(r.blocks[static_cast<std::size_t>(p / block_size)]);
      m.slot_mapping.push_back(block * block_size + p % block_size);
    }
  }
  if (encoder) return step;
  step.block_table.assign(batch.requests.size() * max_blocks, -1);
  for (std::size_t i = 0; i < batch.requests.size(); ++i) {
    const auto blocks = batch.requests[i].blocks;
    std::copy(blocks.begin(), blocks.end(),
              step.block_table.begin() + static_cast<std::ptrdiff_t>(i * max_blocks));
  }
  m.block_table = ConstTensorView(step.block_table.data(), DType::i32,
                                  {m.num_reqs, static_cast<std::int64_t>(max_blocks)});
  return step;
}

std::vector<StepToken> make_step_tokens(const RequestBatch& batch) {
  std::vector<StepToken> tokens;
  tokens.reserve(static_cast<std::size_t>(batch.num_tokens));
  for (const ScheduledRequest& r : batch.requests) {
    const std::uint64_t own = own_content_id(*r.request);
    const std::int64_t seq_len = r.num_computed_tokens + r.num_scheduled_tokens;
    for (std::int64_t p = r.num_computed_tokens; p < seq_len; ++p) {
      const std::int64_t rejected = r.first_rejected();
      if (p < rejected) {
        tokens.push_back({r.request, own, content_id(*r.request, p), p, seq_len, rejected});
      } else {
        const std::uint64_t draft = draft_content_id(*r.request, rejected);
        tokens.push_back({r.request, draft, draft, p, seq_len, rejected});
      }
    }
  }
  return tokens;
}

StepTensors::StepTensors(const ModelPreset& model, DType dtype) : model_(model), dtype_(dtype) {}

void StepTensors::resize(int num_tokens) {
  num_tokens_ = num_tokens;
  const auto row = static_cast<std::size_t>(num_tokens) *
                   static_cast<std::size_t>(model_.head_dim) * size_of(dtype_);
  query_.reserve(row * static_cast<std::size_t>(model_.num_q_heads));
  key_.reserve(row * static_cast<std::size_t>(model_.num_kv_heads));
  value_.reserve(row * static_cast<std::size_t>(model_.num_kv_heads));
  output_.reserve(row * static_cast<std::size_t>(model_.num_q_heads));
  lse_.reserve(static_cast<std::size_t>(num_tokens) * static_cast<std::size_t>(model_.num_q_heads) *
               sizeof(float));
}

void StepTensors::fill(const std::vector<StepToken>& tokens, int layer,
                       const ValueGenerator& generator, Executor& executor) {
  const std::size_t row = static_cast<std::size_t>(model_.head_dim) * size_of(dtype_);
  const auto fill_heads = [&](const Buffer& buffer, std::size_t t, int heads, std::uint64_t content,
                              ValueKind kind) {
    auto* out = static_cast<std::byte*>(buffer.data()) + t * row * static_cast<std::size_t>(heads);
    for (int h = 0; h < heads; ++h, out += row) {
      generator.fill({content, tokens[t].position, layer, h, kind}, model_.head_dim, out);
    }
  };
  const std::size_t count = tokens.size();
  const auto workers = static_cast<std::size_t>(executor.num_workers());
  executor.run([&](int worker) {
    const auto w = static_cast<std::size_t>(worker);
    const auto q_heads = static_cast<std::size_t>(model_.num_q_heads);
    for (std::size_t t = count * w / workers; t < count * (w + 1) / workers; ++t) {
      fill_heads(query_, t, model_.num_q_heads, tokens[t].own_content, ValueKind::query);
      fill_heads(key_, t, model_.num_kv_heads, tokens[t].content, ValueKind::key);
      fill_heads(value_, t, model_.num_kv_heads, tokens[t].content, ValueKind::value);
      std::memset(static_cast<std::byte*>(output_.data()) + t * row * q_heads, 0xff, row * q_heads);
      std::memset(static_cast<float*>(lse_.data()) + t * q_heads, 0xff, q_heads * sizeof(float));
    }
  });
}

TensorView StepTensors::view(const Buffer& buffer, int heads) const {
  return TensorView(buffer.data(), dtype_, {num_tokens_, heads, model_.head_dim});
}
ConstTensorView StepTensors::query() const { return view(query_, model_.num_q_heads); }
ConstTensorView StepTensors::key() const { return view(key_, model_.num_kv_heads); }
ConstTensorView StepTensors::value() const { return view(value_, model_.num_kv_heads); }
TensorView StepTensors::output() const { return view(output_, model_.num_q_heads); }
TensorView StepTensors::lse() const {
  return TensorView(lse_.data(), DType::f32, {num_tokens_, model_.num_q_heads});
}

std::vector<float> StepTensors::output_row(int token, int head) const {
  const TensorView row = output().select(0, token).select(0, head);
  std::vector<float> values(static_cast<std::size_t>(model_.head_dim));
  for (std::size_t d = 0; d < values.size(); ++d) {
    switch (dtype_) {
      case DType::f32:
        values[d] = row.as<float>()[d];
        break;
      case DType::f16:
        values[d] = to_f32(row.as<f16>()[d]);
        break;
      default:
        values[d] = to_f32(row.as<bf16>()[d]);
    }
  }
  return values;
}

float StepTensors::lse_value(int token, int head) const {
  return static_cast<const float*>(lse_.data())[token * model_.num_q_heads + head];
}

StepWork measure_work(const RequestBatch& batch, const ModelPreset& model, DType kv_dtype,
                      std::optional<int> window) {
  StepWork work;
  for (const ScheduledRequest& r : batch.requests) {
    const std::int64_t seq_len = r.num_computed_tokens + r.num_scheduled_tokens;
    if (r.is_decode()) {
      const std::int64_t keys =
          window ? std::min<std::int64_t>(seq_len, *window + r.num_draft_tokens) : seq_len;
      work.decode_bytes += static_cast<double>(keys) * model.num_kv_heads * 2 * model.head_dim *
                           static_cast<double>(size_of(kv_dtype));
      continue;
    }
    const double pairs = model.is_encoder()
                             ? static_cast<double>(seq_len) * static_cast<double>(seq_len)
                             : causal_pairs(r.num_computed_tokens, seq_len - 1, window);
    work.prefill_flops += pairs * model.num_q_heads * 4 * model.head_dim;
  }
  return work;
}

}  // namespace attend::serving
