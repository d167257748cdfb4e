// SPDX-License-Identifier: Apache-2.0
#include "serving/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <span>
#include <thread>

#include "attend/backend/selector.h"
#include "serving/kv_storage.h"
#include "serving/layer_group.h"
#include "serving/sparse_layer.h"
#include "serving/step.h"

namespace attend::serving {
namespace {

constexpr int kMaxDrafts = 1024;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Everything that a step's layers are called with, by kind.
struct StepInput {
  const RequestBatch* batch = nullptr;
  std::vector<StepToken> tokens;
  StepMetadata metadata;
  // Of models whose layers share a cache.
  std::vector<StepToken> sharing_tokens;
  StepMetadata sharing_metadata;
  // Of models with cross attention; the encoder's is empty in steps without a new request.
  RequestBatch encoder_batch;
  std::vector<StepToken> encoder_tokens;
  StepMetadata encoder_metadata, cross_metadata;

  const StepMetadata& metadata_of(const LayerKind& kind) const {
    if (kind.type == AttentionType::encoder) return encoder_metadata;
    if (kind.type == AttentionType::encoder_decoder) return cross_metadata;
    return kind.shares_cache ? sharing_metadata : metadata;
  }
  std::span<const StepToken> queries_of(const LayerKind& kind) const {
    if (kind.type == AttentionType::encoder) return encoder_tokens;
    return kind.shares_cache ? sharing_tokens : tokens;
  }
  /// Tokens whose keys and values the step brings.
  std::span<const StepToken> keys_of(const LayerKind& kind) const {
    if (kind.shares_cache) return {};
    const bool self = kind.type != AttentionType::encoder_decoder;
    return self ? queries_of(kind) : encoder_tokens;
  }
};

class Engine {
 public:
  Engine(const Trace& trace, const ReplayConfig& config);
  ReplayResult run();

 private:
  void choose_blocks();
  std::int64_t choose_number(std::string_view option, std::optional<std::int64_t> asked,
                             std::int64_t fallback) const;
  StepInput make_input(const RequestBatch& batch);
  void build_metadata(const StepInput& input);
  bool admit_arrivals();
  void run_step();
  double run_layer(const LayerGroup& group, std::size_t index, const StepInput& input);
  void sample_rows(const LayerGroup& group, int layer, std::span<const StepToken> tokens);
  void report_progress() const;
  int num_self_caches() const { return model_.num_self_caches(config_.num_layers); }
  KvCacheSpec cache_spec() const;
  KvCacheSpec encoder_cache_spec() const;

  const Trace& trace_;
  const ReplayConfig& config_;
  const ModelPreset model_;  // as the run's layers see it
  Executor& executor_;
  DType dtype_;
  const Backend& backend_;
  KvStorage storage_;
  ValueGenerator generator_;
  StepTensors tensors_;
  ReservoirSampler sampler_;
  ReplayResult result_;
  std::optional<BlockPool> pool_, encoder_pool_;
  KvMemory memory_, encoder_memory_;
  std::optional<SparseLayers> indexers_;  // of models with sparse attention
  std::vector<LayerGroup> groups_;
  std::optional<Scheduler> scheduler_;
  Buffer workspace_;
  std::vector<SampledRow> sampled_;
  std::size_t next_arrival_ = 0;
  std::int64_t total_kv_tokens_ = 0;
  int decode_threshold_ = 1;  // of the decoder's layers
  Clock::time_point start_;
};

AttentionConfig attention_config(const ReplayConfig& config, DType dtype, AttentionType type) {
  AttentionConfig a;
  a.head_size = config.model->head_dim;
  a.dtype = dtype;
  // The encoder of a model with cross attention has no cache of its own.
  if (type != AttentionType::encoder) a.kv_cache_dtype = config.kv_cache_dtype;
  a.block_size = config.block_size;
  a.attn_type = type;
  a.use_mla = config.model->mla.has_value();
  a.use_sparse = config.model->indexer.has_value();
  a.use_differential = config.model->differential.has_value();
  a.has_sink = config.model->sinks;
  a.use_alibi_sqrt = config.model->alibi_sqrt;
  return a;
}

/// The back end of the decoder, which must serve the model's other kinds of attention too.
const Backend& choose_backend(const ReplayConfig& config, DType dtype) {
  const ModelPreset& model = *config.model;
  const Backend& backend =
      require_backend(attention_config(config, dtype, model.attn_type), config.backend);
  for (const AttentionType type : attention_types(model)) {
    require_backend(attention_config(config, dtype, type), backend.name());
  }
  return backend;
}

void check_config(const ReplayConfig& config) {
  const auto require = [](std::string_view name, bool valid, std::string_view expected,
                          std::int64_t got) {
    if (!valid) throw InvalidArgument("replay", name, expected, std::to_string(got));
  };
  require("layers", config.num_layers >= 1, ">= 1", config.num_layers);
  require("check", config.check_rows >= 0, ">= 0", config.check_rows);
  require("speculative-tokens",
          config.num_speculative_tokens >= 0 && config.num_speculative_tokens <= kMaxDrafts,
          "from 0 to 1024", config.num_speculative_tokens);
  require("speculative-tokens", !config.model->is_encoder() || config.num_speculative_tokens == 0,
          "0 for an encoder, which generates nothing", config.num_speculative_tokens);
  if (!(config.acceptance >= 0.0 && config.acceptance <= 1.0)) {
    throw InvalidArgument("replay", "acceptance", "from 0 to 1", std::to_string(config.acceptance));
  }
  if (config.block_size) require("block-size", *config.block_size >= 1, ">= 1", *config.block_size);
  if (config.num_blocks) require("num-blocks", *config.num_blocks >= 1, ">= 1", *config.num_blocks);
  if (config.num_encoder_blocks) {
    require("num-encoder-blocks", *config.num_encoder_blocks >= 1, ">= 1",
            *config.num_encoder_blocks);
    require("num-encoder-blocks", config.model->has_cross_attention(),
            "a model with cross attention", *config.num_encoder_blocks);
  }
}

Engine::Engine(const Trace& trace, const ReplayConfig& config)
    : trace_(trace),
      config_((check_config(config), config)),
      model_(with_layers(*config.model, config.num_layers)),
      executor_(config.executor != nullptr ? *config.executor : default_executor()),
      dtype_(config.dtype.value_or(model_.dtype)),
      backend_(choose_backend(config, dtype_)),
      storage_(find_kv_storage(config.kv_cache_dtype, dtype_)),
      generator_(config.seed, dtype_),
      tensors_(model_, dtype_),
      sampler_(config.check_rows, config.seed) {
  set_value_scales(storage_, config.value_scales, model_, config.num_layers);
  result_.backend = backend_.name();
  result_.dtype = dtype_;
  result_.kernel_kind = kernel_kind(dtype_, storage_.dtype, storage_.format);
  // Differential attention has exact kernels only.
  const bool exact = model_.differential && config.arithmetic == Arithmetic::automatic;
  result_.isa =
      arithmetic_level(exact ? Arithmetic::exact : config.arithmetic,
                       kernel_choice().level(result_.kernel_kind), result_.kernel_kind, "replay");
  result_.requests = static_cast<std::int64_t>(trace.requests.size());
  std::int64_t max_model_len = 1;
  for (const Request& r : trace.requests) {
    result_.prompt_tokens += r.prompt_tokens;
    max_model_len = std::max(max_model_len, r.kv_tokens());
    total_kv_tokens_ += model_.is_encoder() ? r.prompt_tokens : r.kv_tokens();
  }
  if (!model_.is_encoder()) choose_blocks();
  groups_ = make_layer_groups({.model = model_,
                               .backend = backend_,
                               .num_layers = config.num_layers,
                               .dtype = dtype_,
                               .kv_cache_dtype = config.kv_cache_dtype,
                               .value_scales = storage_.value_scales,
                               .cache = cache_spec(),
                               .encoder_cache = encoder_cache_spec(),
                               .num_workers = executor_.num_workers(),
                               .num_speculative_tokens = config.num_speculative_tokens,
                               .cascade = config.cascade,
                               .arithmetic = config.arithmetic,
                               .generator = &generator_,
                               .executor = &executor_,
                               .max_model_len = max_model_len,
                               .max_num_seqs = config.max_num_seqs,
                               .max_num_batched_tokens = config.max_num_batched_tokens});
  decode_threshold_ = groups_.back().builder->reorder_batch_threshold().value_or(1);
  SchedulerConfig s;
  s.max_num_batched_tokens = config.max_num_batched_tokens;
  s.max_num_seqs = config.max_num_seqs;
  s.decode_threshold = decode_threshold_;
  s.encoder_tokens = model_.encoder_tokens;
  s.num_speculative_tokens = config.num_speculative_tokens;
  s.acceptance = config.acceptance;
  s.seed = config.seed;
  if (pool_) s.block_size = result_.block_size;
  scheduler_.emplace(s, pool_ ? &*pool_ : nullptr, encoder_pool_ ? &*encoder_pool_ : nullptr);
  for (const Request& r : trace.requests) scheduler_->require_fits(r);
  if (pool_) {
    memory_ = KvMemory(backend_, cache_spec(), num_self_caches(), result_.kv_layout, executor_);
  }
  if (model_.indexer) {
    const IndexerMemory m{result_.num_blocks, result_.block_size, config.num_layers, max_model_len};
    indexers_.emplace(model_, dtype_, m, executor_);
  }
  if (encoder_pool_) {
    encoder_memory_ =
        KvMemory(backend_, encoder_cache_spec(), config.num_layers, result_.kv_layout, executor_);
  }
}

KvCacheSpec Engine::cache_spec() const {
  KvCacheSpec spec;
  spec.num_blocks = result_.num_blocks;
  spec.block_size = result_.block_size;
  spec.num_kv_heads = model_.num_kv_heads;
  spec.head_size = model_.head_dim;
  spec.dtype = storage_.dtype;
  spec.format = storage_.format;
  return spec;
}

KvCacheSpec Engine::encoder_cache_spec() const {
  KvCacheSpec spec = cache_spec();
  spec.num_blocks = result_.num_encoder_blocks;
  return spec;
}

void Engine::choose_blocks() {
  // The caches of the int8 levels have one order only, which is that of HND.
  const std::optional<KvLayout> only = is_int8_level(storage_.format)
                                           ? std::optional(KvLayout::hnd)
                                           : backend_.required_kv_cache_layout();
  result_.kv_layout = only.value_or(config_.kv_layout.value_or(KvLayout::hnd));
  if (config_.kv_layout && *config_.kv_layout != result_.kv_layout) {
    throw InvalidArgument(
        "replay", "kv-layout",
        fmt::format("{} for back end {} and kv-cache-dtype {}", to_string(result_.kv_layout),
                    result_.backend, storage_.name()),
        to_string(*config_.kv_layout));
  }
  result_.block_size = config_.block_size.value_or(backend_.preferred_block_size(16));
  KvCacheSpec one = cache_spec();
  one.num_blocks = 1;
  result_.kv_cache_dtype = storage_.name();
  result_.block_bytes = kv_layer_bytes(backend_, one);
  const std::int64_t index_bytes = model_.indexer ? index_block_bytes(result_.block_size) : 0;
  result_.num_blocks =
      choose_number("num-blocks", config_.num_blocks,
                    default_num_blocks(trace_, result_.block_size,
                                       result_.block_bytes + index_bytes, num_self_caches()));
  pool_.emplace(result_.num_blocks);
  if (!model_.has_cross_attention()) return;
  const std::int64_t each = ceil_div(model_.encoder_tokens, result_.block_size);
  const std::int64_t wanted = each * std::min<std::int64_t>(result_.requests, config_.max_num_seqs);
  const std::int64_t affordable =
      available_memory_bytes() / 4 / (result_.block_bytes * config_.num_layers);
  result_.num_encoder_blocks = choose_number("num-encoder-blocks", config_.num_encoder_blocks,
                                             std::min(wanted, std::max(affordable, each)));
  encoder_pool_.emplace(result_.num_encoder_blocks);
}

/// A number of blocks, if the user gave one, that the memory has room for.
std::int64_t Engine::choose_number(std::string_view option, std::optional<std::int64_t> asked,
                                   std::int64_t fallback) const {
  if (!asked) return fallback;
  const std::int64_t most = available_memory_bytes() / (result_.block_bytes * num_self_caches());
  if (*asked > most) {
    throw InvalidArgument(
        "replay", option,
        fmt::format("at most {}, which fit the available memory ({} layers of {} bytes a block)",
                    most, num_self_caches(), result_.block_bytes),
        std::to_string(*asked));
  }
  return *asked;
}

/// Queues what has arrived, waiting for the next arrival if there is nothing else to do. False when
/// the trace has ended and all its work is done.
bool Engine::admit_arrivals() {
  const auto& requests = trace_.requests;
  while (next_arrival_ < requests.size()) {
    const double wait = requests[next_arrival_].arrival - seconds_since(start_);
    if (config_.realtime && wait > 0) {
      if (scheduler_->has_work()) break;
      std::this_thread::sleep_for(std::chrono::duration<double>(wait));
    }
    scheduler_->add(requests[next_arrival_++]);
  }
  return scheduler_->has_work();
}

ReplayResult Engine::run() {
  start_ = Clock::now();
  while (admit_arrivals()) {
    run_step();
    if (config_.on_progress) report_progress();
  }
  result_.counters = scheduler_->counters();
  if (pool_) result_.peak_used_blocks = pool_->peak_used();
  if (encoder_pool_) result_.peak_used_encoder_blocks = encoder_pool_->peak_used();
  memory_.add_to(result_.memory);
  encoder_memory_.add_to(result_.memory);
  if (indexers_) indexers_->add_to(result_.memory);
  result_.check = check_rows(sampled_, model_, generator_, storage_, executor_);
  return std::move(result_);
}

StepInput Engine::make_input(const RequestBatch& batch) {
  StepInput input;
  input.batch = &batch;
  input.metadata = make_step_metadata(batch, result_.block_size);
  if (config_.fault_injection) config_.fault_injection(input.metadata.common);
  if (model_.shares_caches()) input.sharing_metadata = make_sharing_metadata(input.metadata);
  if (!model_.has_cross_attention()) return input;
  input.encoder_batch = make_encoder_batch(batch, model_.encoder_tokens);
  input.encoder_metadata = make_step_metadata(input.encoder_batch, 0);
  input.cross_metadata =
      make_cross_metadata(input.metadata, batch, model_.encoder_tokens, result_.block_size);
  if (config_.fault_injection) config_.fault_injection(input.cross_metadata.common);
  return input;
}

void Engine::build_metadata(const StepInput& input) {
  std::size_t workspace_bytes = 0;
  bool shares = false;
  for (LayerGroup& group : groups_) {
    const bool encoder = group.kind.type == AttentionType::encoder;
    const bool cross = group.kind.type == AttentionType::encoder_decoder;
    group.metadata.reset();
    if (encoder && input.encoder_batch.requests.empty()) continue;
    const StepMetadata& m = input.metadata_of(group.kind);
    group.metadata = group.builder->build(cross ? 0 : m.common_prefix_len, m.common);
    workspace_bytes = std::max(workspace_bytes, group.metadata->workspace_bytes());
    const CascadeDecision* cascade = group.metadata->cascade_decision();
    if (cascade == nullptr) continue;
    shares |= !cascade->prefixes.empty();
    ++result_.cascade_reasons[cascade->reason];
  }
  result_.cascade_steps += shares ? 1 : 0;
  workspace_.reserve(workspace_bytes);
}

void Engine::run_step() {
  const auto begin = Clock::now();
  const RequestBatch& batch = scheduler_->schedule();
  StepInput input = make_input(batch);
  build_metadata(input);
  StepRecord record;
  record.seconds = seconds_since(begin);

  input.tokens = make_step_tokens(batch);
  if (model_.mla) mark_mla_decodes(input.metadata.common, decode_threshold_, input.tokens);
  if (model_.shares_caches())
    input.sharing_tokens = make_sharing_tokens(input.metadata.common, input.tokens);
  input.encoder_tokens = make_encoder_tokens(input.encoder_batch);
  const std::int64_t kv_token_bytes = pool_ ? result_.block_bytes / result_.block_size : 0;
  for (const LayerGroup& group : groups_) {
    if (group.metadata == nullptr) continue;
    for (std::size_t i = 0; i < group.layers.size(); ++i) {
      record.forward_seconds += run_layer(group, i, input);
    }
    const bool encoder = group.kind.type == AttentionType::encoder;
    const StepWork work =
        measure_work(encoder ? input.encoder_batch : batch, model_, kv_token_bytes, group.kind);
    const auto layers = static_cast<double>(group.layers.size());
    record.prefill_flops += work.prefill_flops * layers;
    record.decode_bytes += work.decode_bytes * layers;
  }
  record.seconds += record.forward_seconds;
  result_.steps.push_back(record);
  scheduler_->complete_step();
}

/// Runs layer `index` of the group; gives the seconds of its call.
double Engine::run_layer(const LayerGroup& group, std::size_t index, const StepInput& input) {
  const int layer = group.layers[index];
  const bool encoder = group.kind.type == AttentionType::encoder;
  const bool cross = group.kind.type == AttentionType::encoder_decoder;
  const std::span<const StepToken> queries = input.queries_of(group.kind);
  const std::span<const StepToken> keys = input.keys_of(group.kind);
  tensors_.fill(queries, keys, layer, generator_, executor_);
  ForwardArgs args;
  args.query = tensors_.query();
  if (!keys.empty()) {  // else they are in the cache
    args.key = tensors_.key();
    args.value = tensors_.value();
    args.kv_c = tensors_.kv_c();
    args.k_pe = tensors_.k_pe();
  }
  if (!encoder) {
    const KvMemory& memory = cross ? encoder_memory_ : memory_;
    const int cache = cross ? layer - config_.num_layers : model_.cache_of(layer);
    args.kv_cache = memory.layer(cache);
    args.kv_scale_cache = memory.scales(cache);
  }
  if (config_.on_values && args.kv_cache.defined() && args.value.defined()) {
    config_.on_values(layer, args.value);
  }
  args.output = tensors_.output();
  args.lse = tensors_.lse();
  args.workspace = workspace_.workspace();
  args.executor = &executor_;
  if (indexers_) indexers_->fill(queries, layer, generator_, executor_);
  const auto begin = Clock::now();
  if (indexers_) args.topk_indices = indexers_->choose(layer, *group.metadata, executor_);
  group.impls[index]->forward(args, group.metadata.get());
  const double seconds = seconds_since(begin);
  sample_rows(group, layer, queries);
  return seconds;
}

void Engine::sample_rows(const LayerGroup& group, int layer, std::span<const StepToken> tokens) {
  const int rows = model_.num_rows();
  const bool cross = group.kind.type == AttentionType::encoder_decoder;
  sampler_.pass(
      static_cast<std::int64_t>(tokens.size()) * rows, [&](std::int64_t item, std::int64_t slot) {
        const auto token = static_cast<int>(item / rows);
        const auto row = static_cast<int>(item % rows);
        const auto lse = [&](int branch) {
          return tensors_.lse_value(token, model_.head_of(row, branch, model_.num_q_heads));
        };
        const StepToken& t = tokens[static_cast<std::size_t>(token)];
        if (slot == static_cast<std::int64_t>(sampled_.size())) sampled_.emplace_back();
        sampled_[static_cast<std::size_t>(slot)] = {
            .request = t.request,
            .step = static_cast<std::int64_t>(result_.steps.size()),
            .position = t.position,
            .num_keys = cross ? model_.encoder_tokens : t.num_keys,
            .first_rejected = t.first_rejected,
            .mla_decode = t.mla_decode,
            .layer = layer,
            .head = row,
            .type = group.kind.type,
            .chosen = indexers_ ? indexers_->chosen_row(token) : std::vector<std::int32_t>(),
            .out = tensors_.output_row(token, row),
            .lse = model_.differential ? lse(0) : tensors_.lse_value(token, row),
            .second_lse = model_.differential ? lse(1) : 0.0F};
      });
}

void Engine::report_progress() const {
  const SchedulerCounters& c = scheduler_->counters();
  ReplayProgress p;
  p.finished_requests = c.finished_requests;
  p.requests = result_.requests;
  // Recomputed tokens count twice: never show more than all.
  p.fraction = std::min(1.0, static_cast<double>(c.computed_tokens + c.prefix_hit_tokens) /
                                 static_cast<double>(total_kv_tokens_));
  p.computed_tokens = c.computed_tokens;
  p.steps = static_cast<std::int64_t>(result_.steps.size());
  p.seconds = seconds_since(start_);
  config_.on_progress(p);
}

}  // namespace

double ReplayResult::step_seconds() const noexcept {
  double sum = 0;
  for (const StepRecord& s : steps) sum += s.seconds;
  return sum;
}

double ReplayResult::tokens_per_second() const noexcept {
  const double seconds = step_seconds();
  return seconds > 0 ? static_cast<double>(prompt_tokens + counters.generated_tokens) / seconds : 0;
}

std::int64_t default_num_blocks(const Trace& trace, int block_size, std::int64_t block_bytes,
                                int num_layers) {
  std::int64_t wanted = 0;
  for (const Request& r : trace.requests) wanted += ceil_div(r.kv_tokens(), block_size);
  const std::int64_t affordable = available_memory_bytes() / 4 / (block_bytes * num_layers);
  return std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(affordable, 1));
}

ReplayResult replay(const Trace& trace, const ReplayConfig& config) {
  return Engine(trace, config).run();
}

}  // namespace attend::serving
