// SPDX-License-Identifier: Apache-2.0
#include "serving/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>

#include "attend/backend/selector.h"
#include "serving/kv_memory.h"
#include "serving/step.h"

namespace attend::serving {
namespace {

constexpr int kMaxDrafts = 1024;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Layers that share a window and therefore a builder, an impl and the metadata of a step.
struct LayerGroup {
  std::optional<int> window;
  std::vector<int> layers;
  std::unique_ptr<MetadataBuilder> builder;
  std::unique_ptr<Impl> impl;
  std::unique_ptr<Metadata> metadata;  // of the current step
};

class Engine {
 public:
  Engine(const Trace& trace, const ReplayConfig& config);
  ReplayResult run();

 private:
  void choose_blocks();
  void make_groups();
  bool admit_arrivals();
  void run_step();
  double run_layer(const LayerGroup& group, int layer, const std::vector<StepToken>& tokens);
  void sample_rows(int layer, const std::vector<StepToken>& tokens);
  void report_progress() const;
  KvCacheSpec cache_spec() const;

  const Trace& trace_;
  const ReplayConfig& config_;
  const ModelPreset& model_;
  Executor& executor_;
  DType dtype_;
  const Backend& backend_;
  ValueGenerator generator_;
  StepTensors tensors_;
  ReservoirSampler sampler_;
  ReplayResult result_;
  std::optional<BlockPool> pool_;
  KvMemory memory_;
  std::vector<LayerGroup> groups_;
  std::optional<Scheduler> scheduler_;
  Buffer workspace_;
  std::vector<SampledRow> sampled_;
  std::size_t next_arrival_ = 0;
  std::int64_t total_kv_tokens_ = 0;
  Clock::time_point start_;
};

AttentionConfig attention_config(const ReplayConfig& config, DType dtype) {
  AttentionConfig a;
  a.head_size = config.model->head_dim;
  a.dtype = dtype;
  a.kv_cache_dtype = config.kv_cache_dtype;
  a.block_size = config.block_size;
  a.attn_type = config.model->attn_type;
  a.has_sink = config.model->sinks;
  a.use_alibi_sqrt = config.model->alibi_sqrt;
  return a;
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
}

Engine::Engine(const Trace& trace, const ReplayConfig& config)
    : trace_(trace),
      config_((check_config(config), config)),
      model_(*config.model),
      executor_(config.executor != nullptr ? *config.executor : default_executor()),
      dtype_(config.dtype.value_or(model_.dtype)),
      backend_(require_backend(attention_config(config, dtype_), config.backend)),
      generator_(config.seed, dtype_),
      tensors_(model_, dtype_),
      sampler_(config.check_rows, config.seed) {
  result_.backend = backend_.name();
  result_.dtype = dtype_;
  result_.requests = static_cast<std::int64_t>(trace.requests.size());
  for (const Request& r : trace.requests) {
    result_.prompt_tokens += r.prompt_tokens;
    total_kv_tokens_ += model_.is_encoder() ? r.prompt_tokens : r.kv_tokens();
  }
  if (!model_.is_encoder()) choose_blocks();
  make_groups();
  SchedulerConfig s;
  s.max_num_batched_tokens = config.max_num_batched_tokens;
  s.max_num_seqs = config.max_num_seqs;
  s.decode_threshold = groups_.front().builder->reorder_batch_threshold().value_or(1);
  s.num_speculative_tokens = config.num_speculative_tokens;
  s.acceptance = config.acceptance;
  s.seed = config.seed;
  if (pool_) s.block_size = result_.block_size;
  scheduler_.emplace(s, pool_ ? &*pool_ : nullptr);
  for (const Request& r : trace.requests) scheduler_->require_fits(r);
  if (pool_) {
    memory_ = KvMemory(backend_, cache_spec(), config.num_layers, result_.kv_layout, executor_);
  }
}

KvCacheSpec Engine::cache_spec() const {
  KvCacheSpec spec;
  spec.num_blocks = result_.num_blocks;
  spec.block_size = result_.block_size;
  spec.num_kv_heads = model_.num_kv_heads;
  spec.head_size = model_.head_dim;
  spec.dtype = config_.kv_cache_dtype == "auto"
                   ? dtype_
                   : parse_dtype(config_.kv_cache_dtype).value_or(dtype_);
  return spec;
}

void Engine::choose_blocks() {
  result_.kv_layout =
      backend_.required_kv_cache_layout().value_or(config_.kv_layout.value_or(KvLayout::hnd));
  if (config_.kv_layout && *config_.kv_layout != result_.kv_layout) {
    throw InvalidArgument(
        "replay", "kv-layout",
        std::string(to_string(result_.kv_layout)) + " for back end " + result_.backend,
        to_string(*config_.kv_layout));
  }
  result_.block_size = config_.block_size.value_or(backend_.preferred_block_size(16));
  KvCacheSpec one = cache_spec();
  one.num_blocks = 1;
  result_.block_bytes = cache_bytes(backend_.kv_cache_shape(one), one.dtype);
  if (config_.num_blocks) {
    const std::int64_t most = available_memory_bytes() / (result_.block_bytes * config_.num_layers);
    if (*config_.num_blocks > most) {
      throw InvalidArgument(
          "replay", "num-blocks",
          fmt::format("at most {}, which fit the available memory ({} layers of {} bytes a block)",
                      most, config_.num_layers, result_.block_bytes),
          std::to_string(*config_.num_blocks));
    }
    result_.num_blocks = *config_.num_blocks;
  } else {
    result_.num_blocks =
        default_num_blocks(trace_, result_.block_size, result_.block_bytes, config_.num_layers);
  }
  pool_.emplace(result_.num_blocks);
}

void Engine::make_groups() {
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    const auto window = model_.window_of(layer);
    auto group = std::find_if(groups_.begin(), groups_.end(),
                              [&](const LayerGroup& g) { return g.window == window; });
    if (group == groups_.end()) {
      group = groups_.insert(groups_.end(), LayerGroup{});
      group->window = window;
    }
    group->layers.push_back(layer);
  }
  for (LayerGroup& group : groups_) {
    BuilderConfig b;
    b.num_q_heads = model_.num_q_heads;
    b.cache = cache_spec();
    if (group.window) {
      b.window_left = *group.window - 1;
      b.window_right = model_.is_encoder() ? *group.window - 1 : 0;
    }
    b.num_workers = executor_.num_workers();
    b.num_speculative_tokens = config_.num_speculative_tokens;
    b.attn_type = model_.attn_type;
    group.builder = backend_.make_builder(b);

    ImplConfig i;
    i.num_q_heads = model_.num_q_heads;
    i.num_kv_heads = model_.num_kv_heads;
    i.head_size = model_.head_dim;
    i.scale = model_.scale;
    i.softcap = model_.softcap;
    i.sliding_window = group.window;
    if (model_.alibi) i.alibi_slopes = alibi_slopes(model_.num_q_heads);
    i.use_alibi_sqrt = model_.alibi_sqrt;
    if (model_.sinks) i.sinks = sink_logits(model_.num_q_heads);
    i.attn_type = model_.attn_type;
    i.dtype = dtype_;
    i.kv_cache_dtype = config_.kv_cache_dtype;
    group.impl = backend_.make_impl(i);
  }
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
  result_.check = check_rows(sampled_, model_, generator_, cache_spec().dtype, executor_);
  return std::move(result_);
}

void Engine::run_step() {
  const auto begin = Clock::now();
  const RequestBatch& batch = scheduler_->schedule();
  StepMetadata step = make_step_metadata(batch, result_.block_size);
  if (config_.fault_injection) config_.fault_injection(step.common);
  std::size_t workspace_bytes = 0;
  for (LayerGroup& group : groups_) {
    group.metadata = group.builder->build(0, step.common);
    workspace_bytes = std::max(workspace_bytes, group.metadata->workspace_bytes());
  }
  workspace_.reserve(workspace_bytes);
  StepRecord record;
  record.seconds = seconds_since(begin);

  const auto tokens = make_step_tokens(batch);
  tensors_.resize(batch.num_tokens);
  const DType kv_dtype = cache_spec().dtype;
  for (const LayerGroup& group : groups_) {
    for (const int layer : group.layers) record.forward_seconds += run_layer(group, layer, tokens);
    const StepWork work = measure_work(batch, model_, kv_dtype, group.window);
    const auto layers = static_cast<double>(group.layers.size());
    record.prefill_flops += work.prefill_flops * layers;
    record.decode_bytes += work.decode_bytes * layers;
  }
  record.seconds += record.forward_seconds;
  result_.steps.push_back(record);
  scheduler_->complete_step();
}

double Engine::run_layer(const LayerGroup& group, int layer, const std::vector<StepToken>& tokens) {
  tensors_.fill(tokens, layer, generator_, executor_);
  if (config_.on_values) config_.on_values(layer, tensors_.value());
  ForwardArgs args;
  args.query = tensors_.query();
  args.key = tensors_.key();
  args.value = tensors_.value();
  args.kv_cache = memory_.layer(layer);
  args.output = tensors_.output();
  args.lse = tensors_.lse();
  args.workspace = workspace_.workspace();
  args.executor = &executor_;
  const auto begin = Clock::now();
  group.impl->forward(args, group.metadata.get());
  const double seconds = seconds_since(begin);
  sample_rows(layer, tokens);
  return seconds;
}

void Engine::sample_rows(int layer, const std::vector<StepToken>& tokens) {
  const int heads = model_.num_q_heads;
  sampler_.pass(static_cast<std::int64_t>(tokens.size()) * heads,
                [&](std::int64_t item, std::int64_t slot) {
                  const auto token = static_cast<int>(item / heads);
                  const auto head = static_cast<int>(item % heads);
                  const StepToken& t = tokens[static_cast<std::size_t>(token)];
                  if (slot == static_cast<std::int64_t>(sampled_.size())) sampled_.emplace_back();
                  sampled_[static_cast<std::size_t>(slot)] = {
                      .request = t.request,
                      .step = static_cast<std::int64_t>(result_.steps.size()),
                      .position = t.position,
                      .num_keys = t.num_keys,
                      .first_rejected = t.first_rejected,
                      .layer = layer,
                      .head = head,
                      .out = tensors_.output_row(token, head),
                      .lse = tensors_.lse_value(token, head)};
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
