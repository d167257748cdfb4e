// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <optional>
#include <span>

#include "serving/trace_formats.h"

namespace attend::serving {
namespace {

struct Field {
  std::string_view text;
  std::size_t column;  // from 1
};

std::vector<Field> split(std::string_view line) {
  std::vector<Field> fields;
  std::size_t begin = 0;
  while (true) {
    const std::size_t comma = line.find(',', begin);
    fields.push_back({line.substr(begin, comma - begin), begin + 1});
    if (comma == std::string_view::npos) return fields;
    begin = comma + 1;
  }
}

/// Columns of the wanted names in the header; nullopt if one is missing.
std::optional<std::vector<std::size_t>> find_columns(std::string_view header,
                                                     std::span<const std::string_view> names) {
  const auto fields = split(header);
  std::vector<std::size_t> columns;
  for (const std::string_view name : names) {
    const auto it =
        std::find_if(fields.begin(), fields.end(), [&](const Field& f) { return f.text == name; });
    if (it == fields.end()) return std::nullopt;
    columns.push_back(static_cast<std::size_t>(it - fields.begin()));
  }
  return columns;
}

std::vector<Field> split_row(const LineReader& reader, std::size_t num_fields) {
  auto fields = split(reader.line());
  if (fields.size() != num_fields) {
    reader.fail(fields.size() < num_fields ? reader.line().size() + 1 : fields[num_fields].column,
                fmt::format("{} fields as in the header", num_fields),
                fmt::format("{}", fields.size()));
  }
  return fields;
}

std::int64_t parse_tokens(const LineReader& reader, const Field& field, std::int64_t least) {
  std::int64_t value = 0;
  const char* end = field.text.data() + field.text.size();
  const auto [stop, error] = std::from_chars(field.text.data(), end, value);
  if (error != std::errc() || stop != end || value < least || value > kMaxTokens) {
    reader.fail(field.column, fmt::format("a number of tokens in {} .. {}", least, kMaxTokens),
                fmt::format("'{}'", field.text));
  }
  return value;
}

/// Reads digits at text[pos ..pos + count); nullopt if they are not all digits.
std::optional<int> digits(std::string_view text, std::size_t pos, std::size_t count) {
  int value = 0;
  for (std::size_t i = pos; i < pos + count; ++i) {
    if (i >= text.size() || text[i] < '0' || text[i] > '9') return std::nullopt;
    value = 10 * value + (text[i] - '0');
  }
  return value;
}

/// Seconds since 1970 of "YYYY-MM-DD hh:mm:ss" with an optional fraction; nullopt if malformed.
/// Exact to about a microsecond.
std::optional<double> parse_timestamp(std::string_view text) {
  constexpr std::string_view shape = "0000-00-00 00:00:00";
  if (text.size() < shape.size()) return std::nullopt;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != '0' && text[i] != shape[i]) return std::nullopt;
  }
  const auto year = digits(text, 0, 4), month = digits(text, 5, 2), day = digits(text, 8, 2);
  const auto hour = digits(text, 11, 2), minute = digits(text, 14, 2), second = digits(text, 17, 2);
  if (!year || !month || !day || !hour || !minute || !second) return std::nullopt;
  const std::chrono::year_month_day date{std::chrono::year{*year},
                                         std::chrono::month{static_cast<unsigned>(*month)},
                                         std::chrono::day{static_cast<unsigned>(*day)}};
  if (!date.ok() || *hour > 23 || *minute > 59 || *second > 60) return std::nullopt;
  double fraction = 0.0;
  const std::string_view rest = text.substr(shape.size());
  if (!rest.empty()) {
    if (rest[0] != '.' || rest.size() < 2 || rest.size() > 10) return std::nullopt;
    const auto value = digits(rest, 1, rest.size() - 1);
    if (!value) return std::nullopt;
    fraction = *value;
    for (std::size_t i = 1; i < rest.size(); ++i) fraction /= 10;
  }
  const auto days = std::chrono::sys_days(date).time_since_epoch().count();
  return static_cast<double>(((days * 24L + *hour) * 60 + *minute) * 60 + *second) + fraction;
}

}  // namespace

bool read_azure(LineReader& reader, std::vector<Request>& requests) {
  constexpr std::string_view names[] = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"};
  const auto columns = find_columns(reader.line(), names);
  if (!columns) return false;
  const std::size_t num_fields = split(reader.line()).size();
  while (reader.next()) {
    const auto fields = split_row(reader, num_fields);
    const Field& stamp = fields[(*columns)[0]];
    const auto arrival = parse_timestamp(stamp.text);
    if (!arrival) {
      reader.fail(stamp.column, "a time like 2023-11-16 18:15:46.6805900",
                  fmt::format("'{}'", stamp.text));
    }
    Request r;
    r.arrival = *arrival;
    r.prompt_tokens = parse_tokens(reader, fields[(*columns)[1]], 1);
    r.output_tokens = parse_tokens(reader, fields[(*columns)[2]], 0);
    requests.push_back(std::move(r));
  }
  return true;
}

bool read_lengths(LineReader& reader, std::vector<Request>& requests) {
  constexpr std::string_view names[] = {"num_prefill_tokens", "num_decode_tokens"};
  const auto columns = find_columns(reader.line(), names);
  if (!columns) return false;
  const std::size_t num_fields = split(reader.line()).size();
  while (reader.next()) {
    const auto fields = split_row(reader, num_fields);
    Request r;
    r.prompt_tokens = parse_tokens(reader, fields[(*columns)[0]], 1);
    r.output_tokens = parse_tokens(reader, fields[(*columns)[1]], 0);
    requests.push_back(std::move(r));
  }
  return true;
}

}  // namespace attend::serving
