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

struct Info {
  CpuInfo cpu = cpu_info();
  std::vector<std::string> isa_levels;
  std::string active = std::string(to_string(active_isa()));
  int cpus = available_cpus();
  int threads = default_executor().num_workers();
  std::string platform = to_string(Platform{});
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
  j["cpus"] = info.cpus;
  j["threads"] = info.threads;
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
  row("cpus", fmt::to_string(info.cpus));
  row("threads", fmt::to_string(info.threads));
  row("back ends", fmt::format("{}", fmt::join(info.backend_names, ", ")));
}

}  // namespace

void add_info(CLI::App& app) {
  auto json_path = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("info", "Show this build and this machine");
  command->footer(
      "cpus is what this process may use (affinity mask and cgroup quota), threads what the "
      "default\n"
      "pool has. isa lists the instruction-set levels that this machine can run.\n\n"
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
