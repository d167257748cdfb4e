// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "attend/backend/mla_prefill.h"
#include "attend/backend/selector.h"
#include "attend/core/cpu.h"
#include "attend/core/huge_pages.h"
#include "attend/core/numa.h"
#include "attend/plan/kernel_choice.h"
#include "cli/run_cli.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const Backend* backend : backends()) names.emplace_back(backend->name());
  return names;
}

TEST(InfoCommand, JsonHasTheStableKeys) {
  const CliResult r = run_cli("info --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_FALSE(j.at("version").get<std::string>().empty());
  EXPECT_FALSE(j.at("compiler").get<std::string>().empty());
  EXPECT_EQ(j.at("platform"), "cpu");
  EXPECT_EQ(j.at("cpu").at("model"), cpu_info().model);
  EXPECT_EQ(j.at("isa").at("available").size(), available_isa_levels().size());
  EXPECT_EQ(j.at("isa").at("active"), to_string(active_isa()));
  for (const KernelKind kind : kKernelKinds) {
    EXPECT_EQ(j.at("kernels").at("arithmetic").at(std::string(to_string(kind))),
              arithmetic_name(kernel_choice().level(kind), kind));
  }
  EXPECT_GE(j.at("cpus"), 1);
  EXPECT_GE(j.at("threads"), 1);
  EXPECT_EQ(j.at("numa").at("nodes").size(), numa_topology().nodes.size());
  EXPECT_EQ(j.at("numa").at("problem"), numa_topology().problem);
  EXPECT_EQ(j.at("huge_pages"), to_string(huge_page_mode()));
  EXPECT_EQ(j.at("backends"), backend_names());
}

TEST(InfoCommand, TextNamesTheBackends) {
  const CliResult r = run_cli("info");
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, HasSubstr("FLASH_ATTN"));
  EXPECT_THAT(r.out, HasSubstr("threads"));
  EXPECT_THAT(r.out, HasSubstr("exact for f32"));
  EXPECT_THAT(r.out, HasSubstr("integer for int8_level1"));
  EXPECT_THAT(r.out, HasSubstr("huge pages  "));
  EXPECT_EQ(r.out.find("nodes unknown") != std::string::npos, numa_topology().nodes.empty());
  for (const NumaNode& node : numa_topology().nodes)
    EXPECT_THAT(r.out, HasSubstr("node " + std::to_string(node.id) + ": "));
}

TEST(InfoCommand, EnvironmentDecidesThreadsAndIsa) {
  ASSERT_EQ(setenv("ATTEND_NUM_THREADS", "3", 1), 0);
  ASSERT_EQ(setenv("ATTEND_ISA", "scalar", 1), 0);
  const auto j = nlohmann::json::parse(run_cli("info --json -").out);
  ASSERT_EQ(setenv("ATTEND_ISA", "quantum", 1), 0);
  const CliResult unknown = run_cli("info");
  unsetenv("ATTEND_NUM_THREADS");
  unsetenv("ATTEND_ISA");
  EXPECT_EQ(j.at("threads"), 3);
  EXPECT_EQ(j.at("isa").at("active"), "scalar");
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_THAT(unknown.err, HasSubstr("quantum"));
}

TEST(BackendsCommand, ListsEveryBackendWithItsCapability) {
  const CliResult r = run_cli("backends --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto list = nlohmann::json::parse(r.out).at("backends");
  ASSERT_EQ(list.size(), backends().size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Backend& backend = *backends()[i];
    EXPECT_EQ(list[i].at("name"), backend.name());
    EXPECT_EQ(list[i].at("max_head_size"), backend.capability().max_head_size);
    EXPECT_EQ(list[i].at("block_sizes"), backend.capability().block_sizes);
    EXPECT_EQ(list[i].at("features").at("sink"), backend.capability().supports_sink);
  }
}

TEST(BackendsCommand, ListsEveryMlaPrefillBackend) {
  const CliResult r = run_cli("backends --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto list = nlohmann::json::parse(r.out).at("mla_prefill_backends");
  ASSERT_EQ(list.size(), mla_prefill_backends().size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    const MlaPrefillBackend& backend = *mla_prefill_backends()[i];
    const MlaPrefillCapability& can = backend.capability();
    EXPECT_EQ(list[i].at("name"), backend.name());
    EXPECT_EQ(list[i].at("max_head_dim"), can.max_head_dim);
    EXPECT_EQ(list[i].at("rocm_archs"), can.rocm_archs);
    EXPECT_EQ(list[i].at("features").at("batch_invariance"), can.supports_batch_invariance);
  }
  EXPECT_THAT(run_cli("backends").out,
              HasSubstr("ROCM_AITER_FA (MLA prefill)\n"
                        "  dtypes           f16, bf16, f32 (cpu only: f32)\n"
                        "  dimensions       multiples of 8, heads at most 256\n"
                        "  chosen on        rocm\n"
                        "  cuda capability  any\n"
                        "  rocm archs       gfx942, gfx950\n"
                        "  quantised output nowhere\n"
                        "  batch invariance no\n"));
}

TEST(BackendsCommand, TextShowsLimits) {
  const CliResult r = run_cli("backends");
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, HasSubstr("FLASH_ATTN\n"));
  EXPECT_THAT(r.out, HasSubstr("f16, bf16, f32 (cpu only: f32)"));
  EXPECT_THAT(r.out, HasSubstr("multiples of 8, at most 256"));
}

}  // namespace
}  // namespace attend::testing
