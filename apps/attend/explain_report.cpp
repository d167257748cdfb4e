// SPDX-License-Identifier: Apache-2.0
#include "explain_report.h"

#include <fmt/format.h>

namespace attend::cli {
namespace {

std::string milliseconds(double seconds) { return fmt::format("{:.4g} ms", seconds * 1e3); }

/// What the model says about a phase of that name, in seconds of the call; 0 = nothing.
double expected(const bench::Explanation& e, std::string_view what) {
  if (!e.model) return 0.0;
  const double share = 1e-6 / e.threads;
  if (what == "pack") return e.model->read_us * share;
  if (what == "PV") return e.model->products_us * share;
  return what == "merge" ? e.model->merge_us * share : 0.0;
}

}  // namespace

void print_explanation(std::FILE* to, const bench::Explanation& e) {
  if (!e.failure.empty()) {
    fmt::print(to, "{}: WRONG, not measured: {}\n", e.name, e.failure);
    return;
  }
  fmt::print(to, "{}: {} a run on {} thread(s), {} without clocks{}\n", e.name,
             milliseconds(e.seconds), e.threads, milliseconds(e.seconds_plain),
             e.lost_fraction > bench::kNoisyAbove
                 ? fmt::format("  (noisy: {:.0f} % lost to others)", 100 * e.lost_fraction)
                 : "");
  for (const bench::Share& s : e.shares) {
    const double model = expected(e, s.what);
    fmt::print(to, "  {:<28} {:>12} {:>6.1f} %{}\n", s.what, milliseconds(s.share * e.seconds),
               100 * s.share,
               model == 0.0 ? ""
                            : fmt::format("   cost model: {}{}", milliseconds(model),
                                          s.what == "PV" ? " with QK and softmax" : ""));
  }
  if (e.shares.empty()) fmt::print(to, "  no attention: there is nothing to explain\n");
  std::fflush(to);
}

nlohmann::ordered_json explanation_json(const bench::Explanation& e) {
  nlohmann::ordered_json j = {{"case", e.name}, {"verified", e.failure.empty()}};
  if (!e.failure.empty()) {
    j["failure"] = e.failure;
    return j;
  }
  j["threads"] = e.threads;
  j["runs"] = e.runs;
  j["seconds"] = e.seconds;
  j["seconds_plain"] = e.seconds_plain;
  j["phases"] = nlohmann::ordered_json::array();
  for (const bench::Share& s : e.shares)
    j["phases"].push_back(
        {{"phase", s.what}, {"share", s.share}, {"seconds", s.share * e.seconds}});
  if (e.model)
    j["model"] = {{"pack_seconds", expected(e, "pack")},
                  {"products_seconds", expected(e, "PV")},
                  {"merge_seconds", expected(e, "merge")}};
  j["lost_fraction"] = e.lost_fraction;
  j["noisy"] = e.lost_fraction > bench::kNoisyAbove;
  j["attempts"] = e.attempts;
  return j;
}

}  // namespace attend::cli
