// SPDX-License-Identifier: Apache-2.0
#include "serving/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "serving/trace_formats.h"

namespace attend::serving {
namespace {

/// Longest part of a bad field that a message repeats.
constexpr std::size_t kMaxQuoted = 40;

std::string shorten(std::string_view text) {
  if (text.size() <= kMaxQuoted) return std::string(text);
  return std::string(text.substr(0, kMaxQuoted)) + "...";
}

std::int64_t scaled(std::int64_t tokens, double factor) {
  const double exact = static_cast<double>(tokens) * factor;
  if (exact > static_cast<double>(kMaxTokens)) {
    throw InvalidArgument("replay", "scale-lengths",
                          fmt::format("a factor that keeps lengths <= {}", kMaxTokens),
                          fmt::format("{} ({} tokens become {:.0f})", factor, tokens, exact));
  }
  return std::llround(exact);
}

}  // namespace

TraceError::TraceError(std::string_view file, std::size_t line, std::size_t column,
                       std::string_view expected, std::string_view got)
    : Error(fmt::format("{}:{}:{}: expected {}, got {}", file, line, column, expected,
                        shorten(got))) {}

bool LineReader::next() {
  while (std::getline(in_, line_)) {
    ++number_;
    if (!line_.empty() && line_.back() == '\r') line_.pop_back();
    if (line_.find_first_not_of(" \t") != std::string::npos) return true;
  }
  return false;
}

Trace read_trace(std::istream& in, const std::string& name) {
  Trace trace{.name = name, .format = {}, .requests = {}};
  LineReader reader(in, name);
  if (!reader.next()) throw TraceError(fmt::format("{}: the trace is empty", name));
  if (read_mooncake(reader, trace.requests)) {
    trace.format = "mooncake";
  } else if (read_azure(reader, trace.requests)) {
    trace.format = "azure";
  } else if (read_lengths(reader, trace.requests)) {
    trace.format = "lengths";
  } else {
    reader.fail(1,
                "a JSON object with timestamp, input_length, output_length and hash_ids, or a CSV "
                "header with TIMESTAMP, ContextTokens and GeneratedTokens, or one with "
                "num_prefill_tokens and num_decode_tokens",
                reader.line());
  }
  if (in.bad()) throw TraceError(fmt::format("{}: cannot be read", name));
  if (trace.requests.empty()) {
    throw TraceError(fmt::format("{}: the trace is empty: a header and no requests", name));
  }
  auto& requests = trace.requests;
  for (std::size_t i = 0; i < requests.size(); ++i) requests[i].id = static_cast<std::int64_t>(i);
  std::sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
    return a.arrival != b.arrival ? a.arrival < b.arrival : a.id < b.id;
  });
  const double start = requests.front().arrival;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].id = static_cast<std::int64_t>(i);
    requests[i].arrival -= start;
  }
  return trace;
}

Trace read_trace(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  // Opening a directory succeeds, reading from it does not.
  if (!file || (file.peek(), file.bad())) {
    throw TraceError(fmt::format("{}: the trace file is missing or cannot be read", path));
  }
  return read_trace(file, path);
}

void limit_requests(Trace& trace, std::int64_t count) {
  if (count < 1) throw InvalidArgument("replay", "limit", ">= 1", std::to_string(count));
  if (count < static_cast<std::int64_t>(trace.requests.size())) {
    trace.requests.resize(static_cast<std::size_t>(count));
  }
}

void scale_lengths(Trace& trace, double factor) {
  if (!std::isfinite(factor) || factor <= 0) {
    throw InvalidArgument("replay", "scale-lengths", "a finite number > 0",
                          fmt::format("{}", factor));
  }
  for (Request& r : trace.requests) {
    r.prompt_tokens = std::max<std::int64_t>(1, scaled(r.prompt_tokens, factor));
    if (r.output_tokens > 0) {
      r.output_tokens = std::max<std::int64_t>(1, scaled(r.output_tokens, factor));
    }
    std::vector<ContentSegment> kept;
    std::int64_t begin = 0;
    for (const ContentSegment& s : r.segments) {
      const std::int64_t end = std::min(scaled(s.end, factor), r.prompt_tokens);
      if (end > begin) kept.push_back({s.id, end});
      begin = std::max(begin, end);
    }
    r.segments = std::move(kept);
  }
}

}  // namespace attend::serving
