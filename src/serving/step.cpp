// SPDX-License-Identifier: Apache-2.0
#include "serving/step.h"

#include <algorithm>
#include <cstring>

#include "attend/batch/fast_prefill.h"
#include "attend/batch/slot_mapping.h"
#include "attend/batch/split.h"
#include "attend/core/float_types.h"
#include "attend/ops/indexer_cache.h"

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

/// Computed tokens in whole blocks that all requests of a batch begin with.
int common_prefix_len(const RequestBatch& batch, int block_size) {
  if (batch.requests.size() < 2) return 0;
  const auto first = batch.requests.front().blocks;
  std::size_t common = first.size();
  for (const ScheduledRequest& r : batch.requests) {
    const auto computed = static_cast<std::size_t>(r.num_computed_tokens / block_size);
    common = std::min({common, computed, r.blocks.size()});
    const auto end = first.begin() + static_cast<std::ptrdiff_t>(common);
    common = static_cast<std::size_t>(std::mismatch(first.begin(), end, r.blocks.begin()).first -
                                      first.begin());
  }
  return static_cast<int>(common) * block_size;
}

/// Work of attention to chosen tokens, and of their choice.
StepWork measure_sparse_work(const RequestBatch& batch, const ModelPreset& model,
                             std::int64_t kv_token_bytes) {
  StepWork work;
  const IndexerPreset& indexer = *model.indexer;
  for (const ScheduledRequest& r : batch.requests) {
    const std::int64_t seq_len = r.num_computed_tokens + r.num_scheduled_tokens;
    if (r.is_decode()) {
      const std::int64_t rows = std::min<std::int64_t>(seq_len, indexer.topk);
      work.decode_bytes += static_cast<double>(rows * kv_token_bytes);
      if (seq_len > indexer.topk)
        work.decode_bytes += static_cast<double>(seq_len * indexer_cache::kRowBytes);
      continue;
    }
    const std::int64_t first = r.num_computed_tokens, topk = indexer.topk;
    work.prefill_flops += causal_pairs(first, seq_len - 1, indexer.topk) * model.num_q_heads * 2 *
                          (model.mla->cache_dim() + model.mla->kv_lora_rank);
    // Tokens that see no more than are chosen need no logits.
    if (seq_len > topk)
      work.prefill_flops += causal_pairs(std::max(first, topk), seq_len - 1, std::nullopt) *
                            indexer.num_heads * 2 * indexer_cache::kDim;
  }
  return work;
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
    }
  }
  if (encoder) return step;
  step.common_prefix_len = common_prefix_len(batch, block_size);
  step.block_table.assign(batch.requests.size() * max_blocks, -1);
  for (std::size_t i = 0; i < batch.requests.size(); ++i) {
    const auto blocks = batch.requests[i].blocks;
    std::copy(blocks.begin(), blocks.end(),
              step.block_table.begin() + static_cast<std::ptrdiff_t>(i * max_blocks));
  }
  m.block_table = ConstTensorView(step.block_table.data(), DType::i32,
                                  {m.num_reqs, static_cast<std::int64_t>(max_blocks)});
  m.slot_mapping = make_slot_mapping(m, block_size);
  return step;
}

RequestBatch make_encoder_batch(const RequestBatch& batch, int encoder_tokens) {
  RequestBatch encoder;
  for (const ScheduledRequest& r : batch.requests) {
    if (!r.new_encoder) continue;
    encoder.requests.push_back(
        {.request = r.request, .num_computed_tokens = 0, .num_scheduled_tokens = encoder_tokens});
    encoder.num_tokens += encoder_tokens;
  }
  return encoder;
}

StepMetadata make_cross_metadata(const StepMetadata& decoder, const RequestBatch& batch,
                                 int encoder_tokens, int block_size) {
  StepMetadata step;
  CommonMetadata& m = step.common;
  m = decoder.common;
  m.slot_mapping.clear();
  m.causal = false;
  for (const ScheduledRequest& r : batch.requests) {
    m.encoder_seq_lens.push_back(encoder_tokens);
    step.block_table.insert(step.block_table.end(), r.encoder_blocks.begin(),
                            r.encoder_blocks.end());
    for (int p = 0; p < encoder_tokens && r.new_encoder; ++p) {
      const auto block =
          static_cast<std::int64_t>(r.encoder_blocks[static_cast<std::size_t>(p / block_size)]);
      m.encoder_slot_mapping.push_back(block * block_size + p % block_size);
    }
  }
  m.block_table = ConstTensorView(step.block_table.data(), DType::i32,
                                  {m.num_reqs, ceil_div(encoder_tokens, block_size)});
  return step;
}

StepMetadata make_sharing_metadata(const StepMetadata& step) {
  return {.common = make_kv_sharing_fast_prefill_metadata(step.common),
          .block_table = {},
          .common_prefix_len = step.common_prefix_len};
}

std::vector<StepToken> make_step_tokens(const RequestBatch& batch) {
  std::vector<StepToken> tokens;
  tokens.reserve(static_cast<std::size_t>(batch.num_tokens));
  for (const ScheduledRequest& r : batch.requests) {
    const std::uint64_t own = own_content_id(*r.request);
    const std::int64_t seq_len = r.num_computed_tokens + r.num_scheduled_tokens;
    const std::int64_t rejected = r.first_rejected();
    const std::uint64_t draft = draft_content_id(*r.request, rejected);
    for (std::int64_t p = r.num_computed_tokens; p < seq_len; ++p) {
      tokens.push_back({.request = r.request,
                        .own_content = p < rejected ? own : draft,
                        .content = p < rejected ? content_id(*r.request, p) : draft,
                        .position = p,
                        .num_keys = seq_len,
                        .first_rejected = rejected});
    }
  }
  return tokens;
}

void mark_mla_decodes(const CommonMetadata& batch, int decode_threshold,
                      std::vector<StepToken>& tokens) {
  const DecodePrefillSplit split = split_decodes_and_prefills(
      batch, {.decode_threshold = decode_threshold, .fresh_prompts_are_prefills = true});
  for (std::size_t t = 0; t < tokens.size(); ++t)
    tokens[t].mla_decode = t < static_cast<std::size_t>(split.num_decode_tokens);
}

std::vector<StepToken> make_sharing_tokens(const CommonMetadata& step,
                                           const std::vector<StepToken>& tokens) {
  std::vector<StepToken> kept;
  for (const std::int32_t t : step.logits_indices)
    kept.push_back(tokens[static_cast<std::size_t>(t)]);
  return kept;
}

std::vector<StepToken> make_encoder_tokens(const RequestBatch& encoder_batch) {
  std::vector<StepToken> tokens = make_step_tokens(encoder_batch);
  for (StepToken& t : tokens) t.own_content = t.content = encoder_content_id(*t.request);
  return tokens;
}

StepTensors::StepTensors(const ModelPreset& model, DType dtype)
    : model_(model),
      dtype_(dtype),
      key_dim_(model.mla ? model.mla->kv_lora_rank : model.head_dim),
      value_dim_(model.mla ? model.mla->qk_rope_head_dim : model.head_dim) {}

std::size_t StepTensors::row_bytes(int dim) const {
  return static_cast<std::size_t>(dim) * size_of(dtype_);
}

void StepTensors::resize(std::size_t num_queries, std::size_t num_keys) {
  num_queries_ = static_cast<int>(num_queries);
  num_keys_ = static_cast<int>(num_keys);
  const auto q_heads = static_cast<std::size_t>(model_.num_q_heads);
  const auto kv_heads = static_cast<std::size_t>(model_.num_kv_heads);
  query_.reserve(num_queries * q_heads * row_bytes(model_.query_dim()));
  key_.reserve(num_keys * kv_heads * row_bytes(key_dim_));
  value_.reserve(num_keys * kv_heads * row_bytes(value_dim_));
  output_.reserve(num_queries * q_heads * row_bytes(model_.output_dim()));
  lse_.reserve(num_queries * q_heads * sizeof(float));
}

void StepTensors::fill(std::span<const StepToken> queries, std::span<const StepToken> keys,
                       int layer, const ValueGenerator& generator, Executor& executor) {
  resize(queries.size(), keys.size());
  const auto q_heads = static_cast<std::size_t>(model_.num_q_heads);
  const std::size_t output_row = q_heads * row_bytes(model_.output_dim());
  const auto fill_heads = [&](const TensorView& rows, std::size_t t, RowKey key) {
    const auto heads = static_cast<int>(rows.shape[1]);
    const auto dim = static_cast<int>(rows.shape[2]);
    auto* out =
        static_cast<std::byte*>(rows.data) + t * static_cast<std::size_t>(heads) * row_bytes(dim);
    for (key.head = 0; key.head < heads; ++key.head, out += row_bytes(dim))
      generator.fill(key, dim, out);
  };
  const TensorView q_rows = view(query_, num_queries_, model_.num_q_heads, model_.query_dim());
  const TensorView k_rows = view(key_, num_keys_, model_.num_kv_heads, key_dim_);
  const TensorView v_rows = view(value_, num_keys_, model_.num_kv_heads, value_dim_);
  const auto workers = static_cast<std::size_t>(executor.num_workers());
  executor.run([&](int worker) {
    const auto w = static_cast<std::size_t>(worker);
    for (std::size_t t = queries.size() * w / workers; t < queries.size() * (w + 1) / workers;
         ++t) {
      const StepToken& q = queries[t];
      fill_heads(q_rows, t, {q.own_content, q.position, layer, 0, ValueKind::query});
      std::memset(static_cast<std::byte*>(output_.data()) + t * output_row, 0xff, output_row);
      std::memset(static_cast<float*>(lse_.data()) + t * q_heads, 0xff, q_heads * sizeof(float));
    }
    for (std::size_t t = keys.size() * w / workers; t < keys.size() * (w + 1) / workers; ++t) {
      const StepToken& k = keys[t];
      fill_heads(k_rows, t, {k.content, k.position, layer, 0, ValueKind::key});
      fill_heads(v_rows, t, {k.content, k.position, layer, 0, ValueKind::value});
    }
  });
}

TensorView StepTensors::view(const Buffer& buffer, int rows, int heads, int dim) const {
  return TensorView(buffer.data(), dtype_, {rows, heads, dim});
}
ConstTensorView StepTensors::query() const {
  return view(query_, num_queries_, model_.num_q_heads, model_.query_dim());
}
ConstTensorView StepTensors::key() const {
  if (model_.mla) return {};
  return view(key_, num_keys_, model_.num_kv_heads, key_dim_);
}
ConstTensorView StepTensors::value() const {
  if (model_.mla) return {};
  return view(value_, num_keys_, model_.num_kv_heads, value_dim_);
}
ConstTensorView StepTensors::kv_c() const {
  if (!model_.mla) return {};
  return ConstTensorView(key_.data(), dtype_, {num_keys_, key_dim_});
}
ConstTensorView StepTensors::k_pe() const {
  if (!model_.mla) return {};
  return ConstTensorView(value_.data(), dtype_, {num_keys_, value_dim_});
}
TensorView StepTensors::output() const {
  return view(output_, num_queries_, model_.num_q_heads, model_.output_dim());
}
TensorView StepTensors::lse() const {
  return TensorView(lse_.data(), DType::f32, {num_queries_, model_.num_q_heads});
}

std::vector<float> StepTensors::output_row(int token, int row_index) const {
  const TensorView row =
      TensorView(output_.data(), dtype_, {num_queries_, model_.num_rows(), model_.row_dim()})
          .select(0, token)
          .select(0, row_index);
  std::vector<float> values(static_cast<std::size_t>(model_.row_dim()));
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

StepWork measure_work(const RequestBatch& batch, const ModelPreset& model,
                      std::int64_t kv_token_bytes, const LayerKind& layer) {
  StepWork work;
  const bool cross = layer.type == AttentionType::encoder_decoder;
  if (model.indexer) return measure_sparse_work(batch, model, kv_token_bytes);
  for (const ScheduledRequest& r : batch.requests) {
    const std::int64_t seq_len = r.num_computed_tokens + r.num_scheduled_tokens;
    const std::int64_t all_keys = cross ? model.encoder_tokens : seq_len;
    if (r.is_decode()) {
      const std::int64_t keys =
          layer.window ? std::min<std::int64_t>(all_keys, *layer.window + r.num_draft_tokens)
                       : all_keys;
      work.decode_bytes += static_cast<double>(keys) * static_cast<double>(kv_token_bytes);
      continue;
    }
    const std::int64_t first =
        layer.shares_cache ? seq_len - 1 - r.num_draft_tokens : r.num_computed_tokens;
    const int value_dim = model.differential ? 2 * model.head_dim : model.output_dim();
    const double pairs =
        layer.type == AttentionType::decoder
            ? causal_pairs(first, seq_len - 1, layer.window)
            : static_cast<double>(r.num_scheduled_tokens) * static_cast<double>(all_keys);
    work.prefill_flops += pairs * model.num_q_heads * 2 * (model.query_dim() + value_dim);
    if (model.mla) {
      const MlaDims& n = *model.mla;
      work.prefill_flops += static_cast<double>(seq_len) * model.num_q_heads * 2 * n.kv_lora_rank *
                            (n.qk_nope_head_dim + n.v_head_dim);
    }
  }
  return work;
}

}  // namespace attend::serving
