// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attend/backend/selector.h"
#include "conformance/check.h"

namespace attend::conformance {

#define ATTEND_CONFORMANCE_OP(name) Op op_##name();
#include "conformance_ops.inc"
#undef ATTEND_CONFORMANCE_OP

const std::vector<Op>& ops() {
  static const std::vector<Op> all = [] {
    std::vector<Op> list{
#define ATTEND_CONFORMANCE_OP(name) op_##name(),
#include "conformance_ops.inc"
#undef ATTEND_CONFORMANCE_OP
    };
    std::sort(list.begin(), list.end(), [](const Op& a, const Op& b) { return a.name < b.name; });
    return list;
  }();
  return all;
}

std::string backend_op_name(std::string_view backend) { return "backend:" + std::string(backend); }

std::vector<std::string> uncovered_backends() {
  std::vector<std::string> missing;
  for (const Backend* backend : backends()) {
    const std::string name = backend_op_name(backend->name());
    const bool covered =
        std::any_of(ops().begin(), ops().end(), [&](const Op& op) { return op.name == name; });
    if (!covered) missing.emplace_back(backend->name());
  }
  return missing;
}

}  // namespace attend::conformance
