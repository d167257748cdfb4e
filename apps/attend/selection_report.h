// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>

namespace attend::cli {

/// Adds "backend", "also_valid" and "rejected" of a Selection, or of an answer of its shape, to
/// `j`.
template <typename Answer>
void add_selection(nlohmann::ordered_json& j, const Answer& selection) {
  j["backend"] =
      selection.backend != nullptr ? nlohmann::ordered_json(selection.backend->name()) : nullptr;
  j["also_valid"] = selection.also_valid;
  j["rejected"] = nlohmann::ordered_json::array();
  for (const auto& [name, reasons] : selection.rejected) {
    j["rejected"].push_back({{"name", name}, {"reasons", reasons}});
  }
}

/// Prints the same. `config`: what was asked for. `note(name)`: what else to say of one that fits.
template <typename Answer, typename Note>
void print_selection(const Answer& selection, const std::string& config, Note note) {
  const auto print_reason = [](const std::string& text) {
    if (!text.empty()) fmt::print("            - {}\n", text);
  };
  fmt::print("asked for   {}\n", config);
  fmt::print("choice      {}\n",
             selection.backend != nullptr ? selection.backend->name() : "none fits");
  if (selection.backend != nullptr) print_reason(note(std::string(selection.backend->name())));
  for (const std::string& name : selection.also_valid) {
    fmt::print("also valid  {}\n", name);
    print_reason("comes later in the order of this platform");
    print_reason(note(name));
  }
  for (const auto& [name, reasons] : selection.rejected) {
    fmt::print("rejected    {}\n", name);
    for (const std::string& reason : reasons) print_reason(reason);
  }
}

}  // namespace attend::cli
