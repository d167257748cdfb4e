// SPDX-License-Identifier: Apache-2.0
#include "mla_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace attend::testing {
namespace {

constexpr const char* kBackend = "FLASH_ATTN_MLA";

DType cache_dtype(const MlaSetup& s) {
  if (s.kv_cache_dtype == "auto") return s.dtype;
  if (s.kv_cache_dtype == "fp8_ds_mla") return DType::u8;
  return *parse_dtype(s.kv_cache_dtype);
}

int blocks_of_request(const MlaSetup& s) { return MlaLayer::kMaxTokens / s.block_size; }

/// Fills the row of a token, as every step that has it does.
void fill_row(const TensorView& row, int id, int position, unsigned kind) {
  Rng rng((static_cast<std::uint64_t>(id) << 40) + (static_cast<std::uint64_t>(position) << 8) +
          kind);
  HostTensor values(row.dtype, {row.numel()});
  values.fill_uniform(rng, -1.7F, 1.7F);  // of variance 1
  std::memcpy(row.data, values.view().data, values.bytes());
}

}  // namespace

MlaLayer::MlaLayer(const MlaSetup& s, Executor& run_on)
    : setup(s),
      executor(run_on),
      weight(s.dtype, {std::int64_t{s.heads} * (s.dims.qk_nope_head_dim + s.dims.v_head_dim),
                       s.dims.kv_lora_rank}),
      cache(cache_dtype(s), find_backend(kBackend).kv_cache_shape(spec())),
      block_table(DType::i32, {kMaxRequests, blocks_of_request(s)}) {
  Rng rng(5);
  const float size = 1.7F / std::sqrt(static_cast<float>(s.dims.kv_lora_rank));
  weight.fill_uniform(rng, -size, size);
  cache.fill_bytes(0xff);
  // Blocks of the requests take turns, the last ones first.
  const std::int32_t count = kMaxRequests * blocks_of_request(s);
  for (std::int32_t r = 0; r < kMaxRequests; ++r)
    for (std::int32_t b = 0; b < blocks_of_request(s); ++b)
      block_table.as<std::int32_t>()[static_cast<std::size_t>(r * blocks_of_request(s) + b)] =
          count - 1 - (b * kMaxRequests + r);
  builder = find_backend(kBackend).make_builder(builder_config());
  impl = find_backend(kBackend).make_impl(impl_config());
}

KvCacheSpec MlaLayer::spec() const {
  KvCacheSpec c;
  c.num_blocks = kMaxRequests * blocks_of_request(setup);
  c.block_size = setup.block_size;
  c.num_kv_heads = 1;
  c.head_size = setup.dims.cache_dim();
  c.dtype = cache_dtype(setup);
  if (c.dtype == DType::u8) c.format = KvFormat::fp8_ds_mla;
  return c;
}

BuilderConfig MlaLayer::builder_config() const {
  BuilderConfig c;
  c.num_q_heads = setup.heads;
  c.cache = spec();
  c.num_workers = executor.num_workers();
  MlaBuilderConfig& mla = c.mla.emplace();
  mla.dims = setup.dims;
  mla.dtype = setup.dtype;
  mla.prefill_backend = setup.prefill_backend;
  mla.platform = setup.platform;
  mla.max_model_len = kMaxTokens;
  mla.max_num_seqs = kMaxRequests;
  mla.workspace_tokens = setup.workspace_tokens;
  mla.decode_threshold = setup.decode_threshold;
  mla.short_extends_decode = setup.short_extends_decode;
  mla.quant_output = setup.quant_output;
  return c;
}

ImplConfig MlaLayer::impl_config() const {
  ImplConfig c;
  c.num_q_heads = setup.heads;
  c.num_kv_heads = 1;
  c.head_size = setup.dims.cache_dim();
  c.dtype = setup.dtype;
  c.kv_cache_dtype = setup.kv_cache_dtype;
  if (is_fp8(cache_dtype(setup))) c.k_scale = {0.75F};
  MlaLayerConfig& mla = c.mla.emplace();
  mla.weights = MlaWeights::from_kv_b_proj({.weight = weight,
                                            .dims = setup.dims,
                                            .num_heads = setup.heads,
                                            .dtype = setup.dtype,
                                            .executor = &executor});
  mla.prefill_backend = setup.prefill_backend;
  mla.platform = setup.platform;
  return c;
}

CommonMetadata MlaLayer::batch(const std::vector<MlaStepRequest>& step) const {
  CommonMetadata m;
  m.query_start_loc.push_back(0);
  for (const MlaStepRequest& r : step) {
    m.query_start_loc.push_back(m.query_start_loc.back() + r.query);
    m.seq_lens.push_back(r.computed + r.query);
    m.max_query_len = std::max(m.max_query_len, r.query);
    m.max_seq_len = std::max(m.max_seq_len, r.computed + r.query);
    for (int p = r.computed; p < r.computed + r.query; ++p) {
      const auto entry =
          static_cast<std::size_t>(r.id * blocks_of_request(setup) + p / setup.block_size);
      m.slot_mapping.push_back(std::int64_t{block_table.as<std::int32_t>()[entry]} *
                                   setup.block_size +
                               p % setup.block_size);
    }
  }
  m.num_reqs = static_cast<int>(step.size());
  m.num_tokens = m.query_start_loc.back();
  return m;
}

ForwardArgs MlaLayer::args(const std::vector<MlaStepRequest>& step) {
  std::int64_t tokens = 0;
  for (const MlaStepRequest& r : step) tokens += r.query;
  const MlaDims& d = setup.dims;
  query = std::make_unique<HostTensor>(
      setup.dtype, std::initializer_list<std::int64_t>{tokens, setup.heads, d.qk_head_dim()});
  kv_c = std::make_unique<HostTensor>(setup.dtype,
                                      std::initializer_list<std::int64_t>{tokens, d.kv_lora_rank});
  k_pe = std::make_unique<HostTensor>(
      setup.dtype, std::initializer_list<std::int64_t>{tokens, d.qk_rope_head_dim});
  output = std::make_unique<HostTensor>(
      setup.quant_output ? DType::fp8_e4m3 : setup.dtype,
      std::initializer_list<std::int64_t>{tokens, setup.heads, d.v_head_dim});
  lse = std::make_unique<HostTensor>(DType::f32,
                                     std::initializer_list<std::int64_t>{tokens, setup.heads});
  output->fill_bytes(0xff);
  lse->fill_bytes(0xff);
  std::int64_t t = 0;
  for (const MlaStepRequest& r : step) {
    for (int p = r.computed; p < r.computed + r.query; ++p, ++t) {
      fill_row(query->view().select(0, t), r.id, p, 0);
      fill_row(kv_c->view().select(0, t), r.id, p, 1);
      fill_row(k_pe->view().select(0, t), r.id, p, 2);
    }
  }
  ForwardArgs a;
  a.query = *query;
  a.kv_c = *kv_c;
  a.k_pe = *k_pe;
  a.kv_cache = cache;
  a.output = *output;
  if (setup.quant_output) a.output_scale = 0.05F;
  a.lse = *lse;
  a.executor = &executor;
  return a;
}

MlaStep MlaLayer::prepare(const std::vector<MlaStepRequest>& step) {
  const auto width = static_cast<std::int64_t>(blocks_of_request(setup));
  MlaStep made{HostTensor(DType::i32, {static_cast<std::int64_t>(step.size()), width}), batch(step),
               nullptr, args(step)};
  for (std::size_t r = 0; r < step.size(); ++r)
    std::memcpy(made.block_table.view().select(0, static_cast<std::int64_t>(r)).data,
                block_table.view().select(0, step[r].id).data,
                sizeof(std::int32_t) * static_cast<std::size_t>(width));
  made.batch.block_table = made.block_table;
  made.metadata = builder->build(0, made.batch);
  workspace.reserve(made.metadata->workspace_bytes());
  std::memset(workspace.data(), 0xff, workspace.size());
  made.args.workspace = workspace.workspace();
  return made;
}

MlaLayer::Rows MlaLayer::run(const std::vector<MlaStepRequest>& step) {
  const MlaStep made = prepare(step);
  impl->forward(made.args, made.metadata.get());

  Rows rows;
  std::int64_t t = 0;
  for (const MlaStepRequest& r : step) {
    for (int p = r.computed; p < r.computed + r.query; ++p, ++t) {
      const auto add = [&](const TensorView& row) {
        const auto* bytes = static_cast<const unsigned char*>(row.data);
        auto& to = rows[{r.id, p}];
        to.insert(to.end(), bytes,
                  bytes + static_cast<std::size_t>(row.numel()) * size_of(row.dtype));
      };
      add(output->view().select(0, t));
      add(lse->view().select(0, t));
    }
  }
  return rows;
}

}  // namespace attend::testing
