// SPDX-License-Identifier: Apache-2.0
// attend replay: serves a request trace and reports speed and correctness.
#include "serving/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "attend/cache/value_scales.h"
#include "attend/core/error.h"
#include "attend/core/executor.h"
#include "bench/ceilings.h"
#include "cli.h"
#include "progress.h"
#include "replay_report.h"
#include "trace_input.h"

namespace attend::cli {
namespace {

struct ReplayOptions {
  TraceInput input;
  std::string model = "llama-3.1-8b";
  std::string dtype;
  std::string kv_layout;
  std::string cascade = "auto";
  std::string arithmetic = "automatic";
  std::string value_scales;
  std::optional<int> heads;
  std::optional<int> index_topk;
  std::optional<int> threads;
  std::string json_path;
  serving::ReplayConfig config;  // the options that need no parsing go straight in
};

constexpr std::string_view kReplayHelp = R"(
Queries, keys and values are generated from the seed, and so are the weights that make keys and values
of latents and those of differential layers, so no model is needed and any row can be computed again:
--check N recomputes N random rows in float64 without looking at the cache.

What the numbers mean:
  back end     the level of the kernels and the arithmetic of the decoder's layers: exact, fast,
               or integer (int8 queries and keys)
  tokens/s     prompt and generated tokens of the trace over the time of all steps; generating the
               inputs is not counted
  step         one batch through scheduler, metadata builder and all layers
  prefill      useful floating-point operations (visible query-key pairs only) per second
  decode       bytes of keys, values and scales per second that requests generating a token read
               A step with both is divided in proportion to what each part would take at its
               ceiling. Both ceilings are measured after the run, on this machine.
  prefix hits  prompt tokens that were found in the cache and not computed
  cascade      steps in which keys that requests share were read once for all of them; the bytes
               of 'decode' still count them for each request
  drafts       speculative tokens that were computed, and how many of them were kept
  preemptions  requests that lost their blocks to older ones and were computed again

Examples:
  attend replay synthetic --check 100
  attend replay trace.csv --model qwen3-32b --limit 200 --json result.json
  attend replay synthetic --model gpt-oss-20b --speculative-tokens 3 --acceptance 0.6 --check 200
  attend calibrate synthetic --layers 1 --output scales.safetensors
  attend replay synthetic --kv-cache-dtype int8_level1 --value-scales scales.safetensors --check 100
  attend replay synthetic --arithmetic exact --check 100
  attend replay synthetic --model deepseek-v3 --heads 16 --kv-cache-dtype fp8_ds_mla --check 100
  attend replay synthetic --model deepseek-v3.2 --heads 16 --index-topk 256 --check 100
  attend replay synthetic --model phi-4-mini-flash --layers 4 --check 100
  attend replay trace.jsonl --scale-lengths 0.1 --num-blocks 2000 --check 200

Exit code: 0 done, 1 a checked row was wrong, 2 bad option or trace.
)";

std::string help_of_replays() {
  return std::string(kTraceHelp) + std::string(kReplayHelp) + model_list();
}

void add_options(CLI::App& command, ReplayOptions& o) {
  serving::ReplayConfig& c = o.config;
  add_trace_options(command, o.input)->required();
  const auto option = [&](const char* name, auto& value, const char* help, const char* type) {
    return command.add_option(name, value, help)->type_name(type);
  };
  option("--model", o.model, "Model preset, see below", "NAME")->capture_default_str();
  option("--heads", o.heads,
         "Query heads instead of the model's, for machines that the model is too large for: a "
         "multiple of its kv heads, at most 1024",
         "N");
  option("--index-topk", o.index_topk,
         "Tokens that the indexer of a model with sparse attention chooses, instead of the model's",
         "N");
  option("--backend", c.backend, "auto or the name of a back end (attend backends)", "NAME")
      ->capture_default_str();
  option("--layers", c.num_layers,
         "Decoder layers to run, each with its own cache unless the model's share one (and as many "
         "of an encoder before them)",
         "N")
      ->capture_default_str();
  option("--max-num-batched-tokens", c.max_num_batched_tokens,
         "Most query tokens in a step; longer prompts are cut", "N")
      ->capture_default_str();
  option("--max-num-seqs", c.max_num_seqs, "Most requests running at the same time", "N")
      ->capture_default_str();
  option("--block-size", c.block_size, "Tokens in a cache block; default 16", "N");
  option("--num-blocks", c.num_blocks,
         "Blocks in the cache; default: room for the whole trace within a quarter of the free "
         "memory",
         "N");
  option("--num-encoder-blocks", c.num_encoder_blocks,
         "Blocks for the encoder's keys (cross attention); default: room for all that run at once "
         "within a quarter of the free memory",
         "N");
  option("--dtype", o.dtype, "f32, f16 or bf16; default: the model's", "D");
  option(
      "--kv-cache-dtype", c.kv_cache_dtype,
      "Type of the cache: auto (= --dtype), fp8_e4m3, fp8_e5m2, int8_level1 (int8 keys and "
      "values), int8_level2 (int8 keys, 16-bit values) or int8_per_token_head; models with latent "
      "attention: auto, fp8_e4m3, fp8_e5m2 or fp8_ds_mla (rows of 656 bytes)",
      "D")
      ->capture_default_str();
  option("--value-scales", o.value_scales,
         "Scales of the values, from attend calibrate with the same --model and --layers: for "
         "int8_level1, which needs them",
         "FILE");
  option("--kv-layout", o.kv_layout, "nhd or hnd; default: hnd unless the back end insists", "L");
  option("--speculative-tokens", c.num_speculative_tokens,
         "Draft tokens that a decode verifies in one step", "K")
      ->capture_default_str();
  option("--acceptance", c.acceptance, "Chance that a draft is right if all before it are, 0 to 1",
         "P")
      ->capture_default_str();
  option(
      "--cascade", o.cascade,
      "Attend once to what requests share: auto (where it is faster), vllm (by its rule), off or "
      "always",
      "C")
      ->capture_default_str();
  option("--arithmetic", o.arithmetic,
         "automatic, exact (float32 products) or fast (products of bf16 tiles, where a level has "
         "them for the cache's type)",
         "A")
      ->capture_default_str();
  option("--threads", o.threads, "Threads; default: the CPUs this process may use", "N");
  option("--check", c.check_rows, "Recompute N random (step, token, head) rows in float64", "N")
      ->capture_default_str();
  option("--seed", c.seed, "Seed of values, checked rows and the synthetic trace", "S")
      ->capture_default_str();
  command.add_flag("--realtime", c.realtime,
                   "Let requests arrive when the trace says, not all at once");
  add_json_option(command, o.json_path);
}

template <typename T>
std::optional<T> parse_choice(std::string_view name, const std::string& text,
                              std::optional<T> (*parse)(std::string_view) noexcept,
                              std::string_view expected) {
  if (text.empty()) return std::nullopt;
  const auto value = parse(text);
  if (!value) throw InvalidArgument("replay", name, expected, fmt::format("'{}'", text));
  return value;
}

/// The ceilings of this machine now, over as much memory as the run's cache used in a layer. A
/// short run says little about speed, so they need not take longer than it.
bench::Ceilings measure_ceilings(const serving::ReplayResult& result, Executor& executor) {
  constexpr std::int64_t least = 64LL << 20, most = 1LL << 30;
  const double seconds_each = std::clamp(result.step_seconds() / 5, 0.02, 0.3);
  const auto bytes = std::clamp(result.peak_used_blocks * result.block_bytes, least, most);
  return bench::measure_ceilings(executor, static_cast<std::size_t>(bytes), seconds_each);
}

void run(ReplayOptions o) {
  serving::ReplayConfig& config = o.config;
  serving::ModelPreset model = serving::find_model(o.model);
  if (o.heads) model = serving::with_query_heads(model, *o.heads);
  if (o.index_topk) model = serving::with_index_topk(model, *o.index_topk);
  config.model = &model;
  config.dtype = parse_choice("dtype", o.dtype, &parse_dtype, "f32, f16 or bf16");
  config.kv_layout = parse_choice("kv-layout", o.kv_layout, &parse_kv_layout, "nhd or hnd");
  config.cascade =
      *parse_choice("cascade", o.cascade, &parse_cascade_mode, "auto, vllm, off or always");
  config.arithmetic =
      *parse_choice("arithmetic", o.arithmetic, &parse_arithmetic, "automatic, exact or fast");
  std::optional<ValueScales> scales;
  if (!o.value_scales.empty()) scales = ValueScales::load(o.value_scales);
  config.value_scales = scales ? &*scales : nullptr;
  std::unique_ptr<Executor> own_pool;
  if (o.threads) own_pool = make_thread_pool(*o.threads);
  config.executor = own_pool ? own_pool.get() : &default_executor();
  const serving::Trace trace = load_trace(o.input, config.seed);

  Progress progress;
  config.on_progress = [&](const serving::ReplayProgress& p) {
    if (!progress.due()) return;
    progress.update(p.fraction, fmt::format("{} of {} requests, {} steps, {} tokens, {:.0f} s",
                                            p.finished_requests, p.requests, p.steps,
                                            p.computed_tokens, p.seconds));
  };
  const serving::ReplayResult result = serving::replay(trace, config);
  progress.clear();

  const bench::Ceilings ceilings = measure_ceilings(result, *config.executor);
  const ReplayReport report{
      .trace = trace,
      .model = model,
      .num_layers = config.num_layers,
      .threads = config.executor->num_workers(),
      .result = result,
      .ceilings = ceilings,
      .speed = serving::measure_speed(result.steps, ceilings.fma_gflops, ceilings.read_gbps)};
  // Standard output is the JSON's alone if the user asked for it there.
  print_table(report, o.json_path == "-" ? stderr : stdout);
  write_json(to_json(report), o.json_path);
  if (result.check.failed > 0) throw Exit{kCheckFailed};
}

}  // namespace

void add_replay(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "replay", "Serve a request trace through the attention layer and report its speed");
  const auto options = std::make_shared<ReplayOptions>();
  add_options(*command, *options);
  command->footer(help_of_replays());
  command->callback([options] { run(*options); });
}

}  // namespace attend::cli
