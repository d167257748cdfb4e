// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "bench/ceilings.h"
#include "serving/replay.h"

namespace attend::cli {

/// All that the report of a replay says.
struct ReplayReport {
  const serving::Trace& trace;
  const serving::ModelPreset& model;
  int num_layers = 1;
  int threads = 1;
  const serving::ReplayResult& result;
  bench::Ceilings ceilings;
  serving::Speed speed;
};

nlohmann::ordered_json to_json(const ReplayReport& report);
void print_table(const ReplayReport& report, std::FILE* out);

}  // namespace attend::cli
