// SPDX-License-Identifier: Apache-2.0
// attend info: the build and the machine, for bug reports.
#include <fmt/format.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/core/cpu.h"
#include "attend/core/executor.h"
#include "attend/core/huge_pages.h"
#include "attend/core/numa.h"
#include "attend/plan/kernel_choice.h"
#include "cli.h"

namespace attend::cli {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string size_text(std::int64_t bytes) {
  if (bytes <= 0) return "unknown";
  if (bytes >= 1 << 20) return fmt::format("{:.4g} MiB", static_cast<double>(bytes) / (1 << 20));
  return fmt::format("{:.4g} KiB", static_cast<double>(bytes) / (1 << 10));
}

// "0-3,8": the way Linux writes lists of CPUs.
std::string cpu_ranges(const std::vector<int>& cpus) {
  std::string text;
  for (std::size_t i = 0; i < cpus.size();) {
    std::size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    if (!text.empty()) text += ',';
    text += fmt::to_string(cpus[i]);
    if (last > i) text += fmt::format("-{}", cpus[last]);
    i = last + 1;
  }
  return text;
}

std::string node_text(const NumaNode& node) {
  const std::string cpus =
      node.cpus.empty()
          ? "no cpus"
          : fmt::format("cpu{} {}", node.cpus.size() == 1 ? "" : "s", cpu_ranges(node.cpus));
  return fmt::format("node {}: {}, {}", node.id, cpus,
                     node.memory_bytes == 0
                         ? "no memory"
                         : fmt::format("{:.1f} GiB", static_cast<double>(node.memory_bytes) /
                                                         (std::int64_t{1} << 30)));
}

std::string huge_page_text(HugePageMode mode) {
  switch (mode) {
    case HugePageMode::always:
      return "always";
    case HugePageMode::madvise:
      return "madvise (caches and large buffers ask for them)";
    case HugePageMode::never:
      return "never (switched off: caches have ordinary pages)";
    default:
      return "unknown";
  }
}

std::vector<std::string> kernel_lines(const KernelChoice& choice) {
  switch (choice.source) {
    case ChoiceSource::environment:
      return {"as ATTEND_ISA says"};
    case ChoiceSource::highest:
      if (choice.problem.empty())
        return {"of the highest level (attend tune looks for faster ones)"};
      return {
          fmt::format("of the highest level; {} was not used: {}", choice.file, choice.problem)};
    case ChoiceSource::file:
      break;
  }
  std::vector<std::string> lines = {fmt::format("as measured, {}", choice.file)};
  for (const KernelKind kind : kKernelKinds)
    lines.push_back(fmt::format("{} {}", to_string(kind), to_string(choice.level(kind))));
  return lines;
}

/// "fast for bf16, fp8_e4m3; exact for f32, ...": of kernels that nobody asked for an arithmetic.
std::string arithmetic_text(const KernelChoice& choice) {
  std::string text;
  for (const std::string_view name : {"fast", "exact", "integer"}) {
    std::vector<std::string_view> kinds;
    for (const KernelKind kind : kKernelKinds)
      if (arithmetic_name(choice.level(kind), kind) == name) kinds.push_back(to_string(kind));
    if (kinds.empty()) continue;
    if (!text.empty()) text += "; ";
    text += fmt::format("{} for {}", name, fmt::join(kinds, ", "));
  }
  return text;
}

struct Info {
  CpuInfo cpu = cpu_info();
  std::vector<std::string> isa_levels;
  std::string active = std::string(to_string(active_isa()));
  KernelChoice kernels = kernel_choice();
  int cpus = available_cpus();
  int threads = default_executor().num_workers();
  std::string platform = to_string(Platform{});
  NumaTopology numa = numa_topology();
  HugePageMode huge_pages = huge_page_mode();
  std::vector<std::string> backend_names;

  Info() {
    for (const IsaLevel level : available_isa_levels()) isa_levels.emplace_back(to_string(level));
    for (const Backend* backend : backends()) backend_names.emplace_back(backend->name());
  }
};

nlohmann::ordered_json as_json(const Info& info) {
  nlohmann::ordered_json j;
  j["version"] = ATTEND_VERSION;
  j["compiler"] = compiler();
  j["platform"] = info.platform;
  j["cpu"] = {{"model", info.cpu.model},
              {"l1d_bytes", info.cpu.l1d_bytes},
              {"l2_bytes", info.cpu.l2_bytes},
              {"l3_bytes", info.cpu.l3_bytes}};
  j["isa"] = {{"available", info.isa_levels}, {"active", info.active}};
  j["kernels"] = {{"source", to_string(info.kernels.source)},
                  {"file", info.kernels.file},
                  {"problem", info.kernels.problem}};
  for (const KernelKind kind : kKernelKinds) {
    const std::string name(to_string(kind));
    const IsaLevel level = info.kernels.level(kind);
    j["kernels"]["levels"][name] = to_string(level);
    j["kernels"]["arithmetic"][name] = arithmetic_name(level, kind);
  }
  j["cpus"] = info.cpus;
  j["threads"] = info.threads;
  auto nodes = nlohmann::ordered_json::array();
  for (const NumaNode& node : info.numa.nodes)
    nodes.push_back({{"node", node.id}, {"cpus", node.cpus}, {"memory_bytes", node.memory_bytes}});
  j["numa"] = {{"nodes", nodes}, {"problem", info.numa.problem}};
  j["huge_pages"] = to_string(info.huge_pages);
  j["backends"] = info.backend_names;
  return j;
}

void print(const Info& info) {
  const auto row = [](const char* label, const std::string& text) {
    fmt::print("{:<12}{}\n", label, text);
  };
  row("version", ATTEND_VERSION);
  row("compiler", compiler());
  row("platform", info.platform);
  row("cpu", info.cpu.model.empty() ? "unknown" : info.cpu.model);
  row("caches", fmt::format("L1d {}, L2 {} per core; L3 {} shared", size_text(info.cpu.l1d_bytes),
                            size_text(info.cpu.l2_bytes), size_text(info.cpu.l3_bytes)));
  row("isa", fmt::format("{} (active: {})", fmt::join(info.isa_levels, ", "), info.active));
  const char* label = "kernels";
  for (const std::string& line : kernel_lines(info.kernels)) {
    row(label, line);
    label = "";
  }
  row("arithmetic", arithmetic_text(info.kernels));
  row("cpus", fmt::to_string(info.cpus));
  row("threads", fmt::to_string(info.threads));
  label = "memory";
  for (const NumaNode& node : info.numa.nodes) {
    row(label, node_text(node));
    label = "";
  }
  if (info.numa.nodes.empty())
    row(label, fmt::format("nodes unknown ({}), used as one", info.numa.problem));
  row("huge pages", huge_page_text(info.huge_pages));
  row("back ends", fmt::format("{}", fmt::join(info.backend_names, ", ")));
}

}  // namespace

void add_info(CLI::App& app) {
  auto json_path = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("info", "Show this build and this machine");
  command->footer(
      "cpus is what this process may use (affinity mask and cgroup quota), threads what the "
      "default\n"
      "pool has. memory lists the nodes over which caches are spread, huge pages what the kernel "
      "gives\n"
      "them. isa lists the instruction-set levels that this machine can run, kernels\n"
      "says which of them is used where a caller names none, and why; arithmetic says what those\n"
      "kernels multiply: bf16 tiles (fast), float32 numbers (exact) or int8 codes (integer).\n\n"
      "ATTEND_ISA=LEVEL forces a level (an unavailable one is an error), ATTEND_NUM_THREADS=N "
      "sets\n"
      "the size of the default pool.\n\n"
      "Examples:\n"
      "  attend info\n"
      "  ATTEND_ISA=avx2 attend info --json -");
  add_json_option(*command, *json_path);
  command->callback([json_path] {
    const Info info;
    if (*json_path != "-") print(info);
    write_json(as_json(info), *json_path);
  });
}

}  // namespace attend::cli
