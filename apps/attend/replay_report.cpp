// SPDX-License-Identifier: Apache-2.0
#include "replay_report.h"

#include <fmt/format.h>

#include <algorithm>

#include "attend/core/cpu.h"
#include "attend/plan/kernel_choice.h"
#include "bench/noise.h"

namespace attend::cli {
namespace {

/// Failed rows that the table lists; the rest is only counted.
constexpr std::size_t kListedFailures = 10;

double share(double rate, double ceiling) { return ceiling > 0 ? rate / ceiling : 0; }

void print_rate(std::FILE* out, std::string_view name, double rate, std::string_view unit,
                double ceiling, std::string_view what) {
  if (rate == 0) {
    fmt::print(out, "{:<18}none in this run\n", name);
    return;
  }
  fmt::print(out, "{:<18}{:.1f} {}, {:.0f} % of the {:.1f} of {}\n", name, rate, unit,
             100 * share(rate, ceiling), ceiling, what);
}

void print_check(std::FILE* out, const serving::CheckSummary& check) {
  if (check.rows == 0) {
    fmt::print(out, "{:<18}none (--check N recomputes N rows in float64)\n", "checked rows");
    return;
  }
  fmt::print(out, "{:<18}{}, {} failed; worst error {:.2e}, at most {:.2f} of its bound\n",
             "checked rows", check.rows, check.failed, check.worst_error,
             check.worst_ratio_to_bound);
  for (std::size_t i = 0; i < std::min(check.failures.size(), kListedFailures); ++i) {
    fmt::print(out, "  FAILED {}\n", check.failures[i]);
  }
  if (check.failures.size() > kListedFailures) {
    fmt::print(out, "  ... and {} more\n", check.failures.size() - kListedFailures);
  }
}

void print_memory(std::FILE* out, const serving::MemoryUse& use) {
  constexpr double kMiB = 1 << 20;
  std::vector<std::string> nodes;
  for (const NodeShare& share : use.nodes)
    nodes.push_back(
        fmt::format("{:.1f} on node {}", static_cast<double>(share.bytes) / kMiB, share.node));
  fmt::print(out, "{:<18}{:.1f} MiB, {:.0f} % in huge pages{}{}\n", "cache memory",
             static_cast<double>(use.bytes) / kMiB,
             100.0 * static_cast<double>(use.huge_page_bytes) / static_cast<double>(use.bytes),
             nodes.empty() ? "" : "; MiB: ", fmt::join(nodes, ", "));
  for (const std::string& problem : use.problems) fmt::print(out, "{:<18}  {}\n", "", problem);
}

}  // namespace

nlohmann::ordered_json to_json(const ReplayReport& report) {
  const serving::ReplayResult& r = report.result;
  nlohmann::ordered_json j;
  j["requests"] = r.requests;
  j["prompt_tokens"] = r.prompt_tokens;
  j["generated_tokens"] = r.counters.generated_tokens;
  j["steps"] = r.steps.size();
  j["preemptions"] = r.counters.preemptions;
  j["prefix_hit_tokens"] = r.counters.prefix_hit_tokens;
  j["cascade_steps"] = r.cascade_steps;
  j["cascade_reasons"] = nlohmann::ordered_json::object();
  for (const auto& [reason, count] : r.cascade_reasons)
    j["cascade_reasons"][std::string(to_string(reason))] = count;
  j["draft_tokens"] = r.counters.draft_tokens;
  j["accepted_tokens"] = r.counters.accepted_tokens;
  j["kv_cache"] = {{"num_blocks", r.num_blocks},
                   {"block_size", r.block_size},
                   {"peak_used_blocks", r.peak_used_blocks},
                   {"block_bytes", r.block_bytes},
                   {"dtype", nullptr}};
  if (!r.kv_cache_dtype.empty()) j["kv_cache"]["dtype"] = r.kv_cache_dtype;
  j["kv_cache"]["bytes"] = r.memory.bytes;
  j["kv_cache"]["huge_page_bytes"] = r.memory.huge_page_bytes;
  j["kv_cache"]["node_bytes"] = nlohmann::ordered_json::object();
  for (const NodeShare& share : r.memory.nodes)
    j["kv_cache"]["node_bytes"][std::to_string(share.node)] = share.bytes;
  j["kv_cache"]["memory_problems"] = r.memory.problems;
  j["encoder_tokens"] = r.counters.encoder_tokens;
  j["encoder_cache"] = {{"num_blocks", r.num_encoder_blocks},
                        {"peak_used_blocks", r.peak_used_encoder_blocks}};
  j["check"] = {{"rows", r.check.rows},
                {"failed", r.check.failed},
                {"worst_error", r.check.worst_error},
                {"worst_ratio_to_bound", r.check.worst_ratio_to_bound}};
  j["speed"] = {{"tokens_per_second", r.tokens_per_second()},
                {"prefill_gflops", report.speed.prefill_gflops},
                {"prefill_share", share(report.speed.prefill_gflops, report.ceilings.fma_gflops)},
                {"decode_gbps", report.speed.decode_gbps},
                {"decode_share", share(report.speed.decode_gbps, report.ceilings.read_gbps)},
                {"ceiling_gflops", report.ceilings.fma_gflops},
                {"ceiling_gbps", report.ceilings.read_gbps}};
  j["step_ms"] = {{"p50", serving::step_percentile_ms(r.steps, 50)},
                  {"p99", serving::step_percentile_ms(r.steps, 99)}};
  j["backend"] = r.backend;
  j["model"] = report.model.name;
  j["num_q_heads"] = report.model.num_q_heads;
  j["isa"] = to_string(active_isa());
  j["kernels"] = to_string(kernel_choice().source);
  j["kernel_level"] = to_string(r.isa);
  j["arithmetic"] = arithmetic_name(r.isa, r.kernel_kind);
  j["threads"] = report.threads;
  return j;
}

void print_table(const ReplayReport& report, std::FILE* out) {
  const serving::ReplayResult& r = report.result;
  fmt::print(out, "{:<18}{} ({})\n", "trace", report.trace.name, report.trace.format);
  fmt::print(out, "{:<18}{}, {} layer{}, {} query heads, {}\n", "model", report.model.name,
             report.num_layers, report.num_layers == 1 ? "" : "s", report.model.num_q_heads,
             to_string(r.dtype));
  fmt::print(out, "{:<18}{}, kernels {}{}, {} arithmetic, {} thread{}\n", "back end", r.backend,
             to_string(r.isa), kernel_choice().source == ChoiceSource::file ? " (as measured)" : "",
             arithmetic_name(r.isa, r.kernel_kind), report.threads, report.threads == 1 ? "" : "s");
  fmt::print(out, "{:<18}{} with {} prompt and {} generated tokens\n", "requests", r.requests,
             r.prompt_tokens, r.counters.generated_tokens);
  fmt::print(out, "{:<18}{:.0f}\n", "tokens/s", r.tokens_per_second());
  fmt::print(out, "{:<18}{} in {:.2f} s: p50 {:.3f} ms, p99 {:.3f} ms\n", "steps", r.steps.size(),
             r.step_seconds(), serving::step_percentile_ms(r.steps, 50),
             serving::step_percentile_ms(r.steps, 99));
  print_rate(out, "prefill", report.speed.prefill_gflops, "GFLOP/s", report.ceilings.fma_gflops,
             "float32 FMA");
  print_rate(out, "decode", report.speed.decode_gbps, "GB/s", report.ceilings.read_gbps,
             "streaming read");
  if (report.ceilings.lost_fraction > bench::kNoisyAbove) {
    fmt::print(out, "{:<18}other programs took {:.0f} % of the time: speeds are unreliable\n",
               "NOISY", 100 * report.ceilings.lost_fraction);
  }
  if (r.num_blocks == 0) {
    fmt::print(out, "{:<18}none (encoder)\n", "KV cache");
  } else {
    fmt::print(out, "{:<18}at most {} of {} blocks of {} tokens used ({:.0f} %), {} {}\n",
               "KV cache", r.peak_used_blocks, r.num_blocks, r.block_size,
               100.0 * static_cast<double>(r.peak_used_blocks) / static_cast<double>(r.num_blocks),
               r.kv_cache_dtype, to_string(r.kv_layout));
    print_memory(out, r.memory);
    if (r.num_encoder_blocks > 0) {
      fmt::print(out, "{:<18}{} tokens computed; at most {} of {} blocks used ({:.0f} %)\n",
                 "encoder", r.counters.encoder_tokens, r.peak_used_encoder_blocks,
                 r.num_encoder_blocks,
                 100.0 * static_cast<double>(r.peak_used_encoder_blocks) /
                     static_cast<double>(r.num_encoder_blocks));
    }
    fmt::print(out, "{:<18}{} tokens, {:.1f} % of the prompts\n", "prefix hits",
               r.counters.prefix_hit_tokens,
               100.0 * static_cast<double>(r.counters.prefix_hit_tokens) /
                   static_cast<double>(r.prompt_tokens));
    fmt::print(out, "{:<18}{} of {} steps attended once to what requests share\n", "cascade",
               r.cascade_steps, r.steps.size());
    for (const auto& [reason, count] : r.cascade_reasons)
      fmt::print(out, "{:<18}{} times: {}\n", "", count, to_string(reason));
    fmt::print(out, "{:<18}{}\n", "preemptions", r.counters.preemptions);
  }
  if (r.counters.draft_tokens > 0) {
    fmt::print(out, "{:<18}{}, {} accepted ({:.1f} %)\n", "drafts", r.counters.draft_tokens,
               r.counters.accepted_tokens,
               100.0 * static_cast<double>(r.counters.accepted_tokens) /
                   static_cast<double>(r.counters.draft_tokens));
  }
  print_check(out, r.check);
}

}  // namespace attend::cli
