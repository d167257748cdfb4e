// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdio>
#include <nlohmann/json.hpp>

#include "bench/explain.h"

namespace attend::cli {

/// The phases of a case as a table, the cost model's expectation beside them.
void print_explanation(std::FILE* to, const bench::Explanation& e);
nlohmann::ordered_json explanation_json(const bench::Explanation& e);

}  // namespace attend::cli
