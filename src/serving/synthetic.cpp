// SPDX-License-Identifier: Apache-2.0
#include "serving/synthetic.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>

#include "serving/content.h"

namespace attend::serving {
namespace {

constexpr std::string_view kName = "synthetic";
/// Longest length drawn, as a multiple of the median: keeps the tail of the distribution usable.
constexpr double kMaxMultiple = 8.0;

[[noreturn]] void reject(std::string_view key, std::string_view expected, std::string_view got) {
  throw InvalidArgument("synthetic trace", key, expected, fmt::format("'{}'", got));
}

template <typename T>
T parse_number(std::string_view key, std::string_view text, T least, T most) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || !(value >= least && value <= most)) {
    reject(key, fmt::format("a number in {} .. {}", least, most), text);
  }
  return value;
}

/// Uniform in (0, 1).
class Uniform {
 public:
  explicit Uniform(std::uint64_t seed) : state_(mix64(seed + 1)) {}
  double operator()() {
    state_ += 0x9e3779b97f4a7c15ULL;
    return (static_cast<double>(mix64(state_) >> 11) + 0.5) * 0x1p-53;
  }

 private:
  std::uint64_t state_;
};

std::int64_t draw_length(Uniform& uniform, std::int64_t median, double spread) {
  // Box-Muller: always two draws, so that changing the spread does not shift the sequence.
  const double radius = std::sqrt(-2.0 * std::log(uniform()));
  const double normal = radius * std::cos(2.0 * std::numbers::pi * uniform());
  const double factor = std::min(std::exp(spread * normal), kMaxMultiple);
  const auto length = std::llround(static_cast<double>(median) * factor);
  return std::clamp<std::int64_t>(length, 1, kMaxTokens);
}

}  // namespace

bool is_synthetic(std::string_view argument) noexcept {
  return argument == kName || argument.starts_with("synthetic:");
}

SyntheticConfig SyntheticConfig::parse(std::string_view text) {
  SyntheticConfig c;
  if (!is_synthetic(text)) reject("TRACE", "synthetic or synthetic:key=value,...", text);
  text.remove_prefix(std::min(text.size(), kName.size() + 1));
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), item.size() + 1));
    const std::size_t equals = item.find('=');
    const std::string_view key = item.substr(0, equals);
    const std::string_view value =
        equals == std::string_view::npos ? std::string_view() : item.substr(equals + 1);
    constexpr std::int64_t most = kMaxTokens / 16;  // times kMaxMultiple stays in range
    if (key == "requests") {
      c.requests = parse_number<std::int64_t>(key, value, 1, 10'000'000);
    } else if (key == "rate") {
      c.rate = parse_number(key, value, 0.0, 1e9);
    } else if (key == "prompt") {
      c.prompt = parse_number<std::int64_t>(key, value, 1, most);
    } else if (key == "output") {
      c.output = parse_number<std::int64_t>(key, value, 0, most);
    } else if (key == "spread") {
      c.spread = parse_number(key, value, 0.0, 4.0);
    } else if (key == "shared") {
      c.shared = parse_number<std::int64_t>(key, value, 0, most);
    } else {
      reject("key", "requests, rate, prompt, output, spread or shared", key);
    }
  }
  return c;
}

Trace make_synthetic(const SyntheticConfig& config, std::uint64_t seed) {
  Trace trace;
  trace.format = kName;
  trace.name = fmt::format("synthetic:requests={},rate={},prompt={},output={},spread={},shared={}",
                           config.requests, config.rate, config.prompt, config.output,
                           config.spread, config.shared);
  Uniform uniform(seed);
  double now = 0.0;
  for (std::int64_t i = 0; i < config.requests; ++i) {
    Request r;
    r.id = i;
    r.arrival = now;
    r.prompt_tokens = config.shared + draw_length(uniform, config.prompt, config.spread);
    const std::int64_t output = draw_length(uniform, config.output, config.spread);
    r.output_tokens = config.output == 0 ? 0 : output;
    if (config.shared > 0) r.segments.push_back({0, config.shared});
    trace.requests.push_back(std::move(r));
    const double gap = -std::log(uniform());
    if (config.rate > 0) now += gap / config.rate;
  }
  return trace;
}

}  // namespace attend::serving
