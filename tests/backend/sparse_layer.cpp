// SPDX-License-Identifier: Apache-2.0
#include "sparse_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend/dist/decode_context_parallel.h"

namespace attend::testing {
namespace {

constexpr const char* kBackend = "FLASHMLA_SPARSE";
constexpr int kBlocks = SparseLayer::kMaxTokens / SparseLayer::kBlockSize;  // of a request

DType cache_dtype(const SparseSetup& s) {
  return s.kv_cache_dtype == "fp8_ds_mla" ? DType::u8 : DType::bf16;
}

/// Fills the row of a token, as every step that has it does.
void fill_row(const TensorView& row, int id, int position, unsigned kind) {
  Rng rng((static_cast<std::uint64_t>(id) << 40) + (static_cast<std::uint64_t>(position) << 8) +
          kind);
  HostTensor values(row.dtype, {row.numel()});
  values.fill_uniform(rng, -1.7F, 1.7F);  // of variance 1
  std::memcpy(row.data, values.view().data, values.bytes());
}

std::unique_ptr<HostTensor> make(DType dtype, std::initializer_list<std::int64_t> shape) {
  return std::make_unique<HostTensor>(dtype, shape);
}

}  // namespace

std::vector<std::int32_t> random_choice(int id, int position, int topk) {
  Rng rng((static_cast<std::uint64_t>(id) << 32) + static_cast<std::uint64_t>(position));
  std::vector<std::int32_t> chosen;
  for (int i = 0; i < topk; ++i)
    chosen.push_back(static_cast<std::int32_t>(rng.next() % static_cast<unsigned>(position + 1)));
  if (topk > 3) {
    chosen[1] = -1;
    chosen[2] = position + 1;  // a later token
    chosen[3] = position;
  }
  return chosen;
}

std::vector<std::int32_t> whole_context(int /*id*/, int position, int topk) {
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(topk), -1);
  for (int i = 0; i <= position; ++i) chosen.at(static_cast<std::size_t>(i)) = i;
  return chosen;
}

SparseLayer::SparseLayer(const SparseSetup& s, Executor& run_on)
    : setup(s),
      executor(run_on),
      weight(DType::bf16, {std::int64_t{s.heads} * (s.dims.qk_nope_head_dim + s.dims.v_head_dim),
                           s.dims.kv_lora_rank}),
      cache(cache_dtype(s), find_backend(kBackend).kv_cache_shape(spec())),
      block_table(DType::i32, {kMaxRequests, kBlocks}) {
  Rng rng(5 + static_cast<std::uint64_t>(s.head_group));
  const float size = 1.7F / std::sqrt(static_cast<float>(s.dims.kv_lora_rank));
  weight.fill_uniform(rng, -size, size);
  cache.fill_bytes(0xff);
  // Blocks of the requests take turns, the last ones first.
  for (std::int32_t r = 0; r < kMaxRequests; ++r)
    for (std::int32_t b = 0; b < kBlocks; ++b)
      block_table.as<std::int32_t>()[static_cast<std::size_t>(r * kBlocks + b)] =
          kMaxRequests * kBlocks - 1 - (b * kMaxRequests + r);
  builder = find_backend(kBackend).make_builder(builder_config());
  impl = find_backend(kBackend).make_impl(impl_config());
}

KvCacheSpec SparseLayer::spec() const {
  KvCacheSpec c;
  c.num_blocks = kMaxRequests * kBlocks;
  c.block_size = kBlockSize;
  c.num_kv_heads = 1;
  c.head_size = setup.dims.cache_dim();
  c.dtype = cache_dtype(setup);
  if (c.dtype == DType::u8) c.format = KvFormat::fp8_ds_mla;
  return c;
}

BuilderConfig SparseLayer::builder_config() const {
  BuilderConfig c;
  c.num_q_heads = setup.heads;
  c.cache = spec();
  c.num_workers = executor.num_workers();
  MlaBuilderConfig& mla = c.mla.emplace();
  mla.dims = setup.dims;
  mla.max_model_len = kMaxTokens;
  mla.max_num_seqs = kMaxRequests;
  mla.workspace_tokens = setup.workspace_tokens;
  mla.quant_output = setup.quant_output;
  SparseBuilderConfig& sparse = c.sparse.emplace();
  sparse.topk = setup.topk;
  sparse.max_num_batched_tokens = 2 * kMaxTokens;
  sparse.strategy = setup.strategy;
  sparse.dcp_world_size = setup.world_size;
  sparse.dcp_rank = setup.rank;
  sparse.dcp_interleave = setup.interleave;
  return c;
}

ImplConfig SparseLayer::impl_config() const {
  ImplConfig c;
  c.num_q_heads = setup.heads;
  c.num_kv_heads = 1;
  c.head_size = setup.dims.cache_dim();
  c.kv_cache_dtype = setup.kv_cache_dtype;
  c.mla.emplace().weights = MlaWeights::from_kv_b_proj({.weight = weight,
                                                        .dims = setup.dims,
                                                        .num_heads = setup.heads,
                                                        .dtype = DType::bf16,
                                                        .executor = &executor});
  return c;
}

CommonMetadata SparseLayer::batch(const std::vector<MlaStepRequest>& step) const {
  CommonMetadata m;
  m.query_start_loc.push_back(0);
  for (const MlaStepRequest& r : step) {
    m.query_start_loc.push_back(m.query_start_loc.back() + r.query);
    m.seq_lens.push_back(r.computed + r.query);
    m.max_query_len = std::max(m.max_query_len, r.query);
    m.max_seq_len = std::max(m.max_seq_len, r.computed + r.query);
    const DcpLayout layout{setup.world_size, setup.interleave};
    for (int p = r.computed; p < r.computed + r.query; ++p) {
      const std::int64_t local = dcp_local_index(p, layout);
      const auto entry = static_cast<std::size_t>(r.id * kBlocks + local / kBlockSize);
      const std::int64_t block = block_table.as<std::int32_t>()[entry];
      const bool own = dcp_owner(p, layout) == setup.rank;
      m.slot_mapping.push_back(own ? block * kBlockSize + local % kBlockSize : -1);
    }
  }
  m.num_reqs = static_cast<int>(step.size());
  m.num_tokens = m.query_start_loc.back();
  return m;
}

ForwardArgs SparseLayer::args(const std::vector<MlaStepRequest>& step) {
  std::int64_t tokens = 0;
  for (const MlaStepRequest& r : step) tokens += r.query;
  const MlaDims& d = setup.dims;
  query = make(DType::bf16, {tokens, setup.heads, d.qk_head_dim()});
  kv_c = make(DType::bf16, {tokens, d.kv_lora_rank});
  k_pe = make(DType::bf16, {tokens, d.qk_rope_head_dim});
  indices = make(DType::i32, {tokens, setup.topk});
  output =
      make(setup.quant_output ? DType::fp8_e4m3 : DType::bf16, {tokens, setup.heads, d.v_head_dim});
  lse = make(DType::f32, {tokens, setup.heads});
  output->fill_bytes(0xff);
  lse->fill_bytes(0xff);
  std::int64_t t = 0;
  for (const MlaStepRequest& r : step) {
    for (int p = r.computed; p < r.computed + r.query; ++p, ++t) {
      for (int h = 0; h < setup.heads; ++h)
        fill_row(query->view().select(0, t).select(0, h), r.id, p,
                 static_cast<unsigned>(10 + setup.head_group * setup.heads + h));
      fill_row(kv_c->view().select(0, t), r.id, p, 1);
      fill_row(k_pe->view().select(0, t), r.id, p, 2);
      const auto chosen = choose(r.id, p, setup.topk);
      std::ranges::copy(chosen, indices->view().select(0, t).as<std::int32_t>());
    }
  }
  ForwardArgs a;
  a.query = *query;
  a.kv_c = *kv_c;
  a.k_pe = *k_pe;
  a.topk_indices = *indices;
  a.kv_cache = cache;
  a.output = *output;
  if (setup.quant_output) a.output_scale = 0.05F;
  a.lse = *lse;
  a.executor = &executor;
  return a;
}

SparseStep SparseLayer::prepare(const std::vector<MlaStepRequest>& step) {
  SparseStep made{HostTensor(DType::i32, {static_cast<std::int64_t>(step.size()), kBlocks}),
                  batch(step), nullptr, args(step)};
  for (std::size_t r = 0; r < step.size(); ++r)
    std::memcpy(made.block_table.view().select(0, static_cast<std::int64_t>(r)).data,
                block_table.view().select(0, step[r].id).data, sizeof(std::int32_t) * kBlocks);
  made.batch.block_table = made.block_table;
  made.metadata = builder->build(0, made.batch);
  workspace.reserve(made.metadata->workspace_bytes());
  std::memset(workspace.data(), 0xff, workspace.size());
  made.args.workspace = workspace.workspace();
  return made;
}

MlaLayer::Rows SparseLayer::run(const std::vector<MlaStepRequest>& step,
                                Communicator* communicator) {
  SparseStep made = prepare(step);
  made.args.communicator = communicator;
  impl->forward(made.args, made.metadata.get());
  MlaLayer::Rows rows;
  std::int64_t t = 0;
  for (const MlaStepRequest& r : step) {
    for (int p = r.computed; p < r.computed + r.query; ++p, ++t) {
      for (const HostTensor* tensor : {output.get(), lse.get()}) {
        const TensorView row = tensor->view().select(0, t);
        const auto* bytes = static_cast<const unsigned char*>(row.data);
        auto& to = rows[{r.id, p}];
        to.insert(to.end(), bytes,
                  bytes + static_cast<std::size_t>(row.numel()) * size_of(row.dtype));
      }
    }
  }
  return rows;
}

}  // namespace attend::testing
