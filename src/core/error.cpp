// SPDX-License-Identifier: Apache-2.0
#include "attend/core/error.h"

#include <fmt/format.h>

#include <utility>

namespace attend {
namespace {

std::string join_reasons(std::string_view what, const std::vector<std::string>& reasons) {
  std::string text(what);
  for (std::size_t i = 0; i < reasons.size(); ++i) {
    text += i == 0 ? ": " : "; ";
    text += reasons[i];
  }
  return text;
}

}  // namespace

InvalidArgument::InvalidArgument(std::string_view op, std::string_view argument,
                                 std::string_view expected, std::string_view got)
    : Error(fmt::format("[{}] argument '{}': expected {}, got {}", op, argument, expected, got)),
      op_(op),
      argument_(argument) {}

Unsupported::Unsupported(std::string_view what, std::vector<std::string> reasons)
    : Error(join_reasons(what, reasons)), reasons_(std::move(reasons)) {}

OutOfBlocks::OutOfBlocks(std::int64_t needed, std::int64_t capacity, std::string_view context)
    : Error(fmt::format("{}: needs {} KV-cache blocks, but the whole cache has {}", context, needed,
                        capacity)),
      needed_(needed),
      capacity_(capacity) {}

}  // namespace attend
