// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "serving/trace_formats.h"

namespace attend::serving {
namespace {

using Json = nlohmann::json;

/// Prompt tokens that one hash id stands for.
constexpr std::int64_t kHashTokens = 512;

/// One line of the file and where its fields stand.
class Record {
 public:
  explicit Record(const LineReader& reader) : reader_(reader) {
    try {
      json_ = Json::parse(reader.line());
    } catch (const Json::parse_error& e) {
      const std::size_t column = std::min(e.byte, reader.line().size() + 1);
      reader.fail(
          std::max<std::size_t>(column, 1), "a JSON object on one line",
          column > reader.line().size()
              ? "the end of the line"
              : fmt::format("'{}'", reader.line().substr(std::max<std::size_t>(column, 1) - 1)));
    }
    if (!json_.is_object()) reader.fail(1, "a JSON object", reader.line());
  }

  const Json& field(std::string_view name, std::string_view expected) const {
    const auto it = json_.find(name);
    if (it == json_.end()) {
      reader_.fail(reader_.line().size(), fmt::format("a field \"{}\": {}", name, expected),
                   "the end of the object");
    }
    return *it;
  }

  std::int64_t tokens(std::string_view name, std::int64_t least) const {
    const std::string expected = fmt::format("a number of tokens in {} .. {}", least, kMaxTokens);
    const Json& value = field(name, expected);
    // Unsigned first: get<int64_t> of a huge unsigned number would wrap.
    const bool valid = value.is_number_integer() &&
                       !(value.is_number_unsigned() && value.get<std::uint64_t>() > kMaxTokens) &&
                       value.get<std::int64_t>() >= least;
    if (!valid) fail(name, expected, value.dump());
    return value.get<std::int64_t>();
  }

  [[noreturn]] void fail(std::string_view name, std::string_view expected,
                         std::string_view got) const {
    const std::size_t pos = reader_.line().find(fmt::format("\"{}\"", name));
    reader_.fail(pos == std::string::npos ? 1 : pos + 1, fmt::format("{}: {}", name, expected),
                 got);
  }

 private:
  const LineReader& reader_;
  Json json_;
};

Request parse_record(const LineReader& reader) {
  const Record record(reader);
  Request r;
  const Json& stamp = record.field("timestamp", "milliseconds");
  if (!stamp.is_number() || !std::isfinite(stamp.get<double>())) {
    record.fail("timestamp", "a number of milliseconds", stamp.dump());
  }
  r.arrival = stamp.get<double>() / 1000.0;
  r.prompt_tokens = record.tokens("input_length", 1);
  r.output_tokens = record.tokens("output_length", 0);

  const Json& ids = record.field("hash_ids", "an array of ids");
  if (!ids.is_array()) record.fail("hash_ids", "an array of ids", ids.dump());
  const std::int64_t expected = ceil_div(r.prompt_tokens, kHashTokens);
  if (static_cast<std::int64_t>(ids.size()) != expected) {
    record.fail(
        "hash_ids",
        fmt::format("{} ids, one for each {} of {} tokens", expected, kHashTokens, r.prompt_tokens),
        fmt::format("{}", ids.size()));
  }
  std::int64_t end = 0;
  for (const Json& id : ids) {
    if (!id.is_number_unsigned()) record.fail("hash_ids", "ids >= 0", id.dump());
    end = std::min(end + kHashTokens, r.prompt_tokens);
    r.segments.push_back({id.get<std::uint64_t>(), end});
  }
  return r;
}

}  // namespace

bool read_mooncake(LineReader& reader, std::vector<Request>& requests) {
  const auto first = reader.line().find_first_not_of(" \t");
  if (reader.line()[first] != '{') return false;
  do {
    requests.push_back(parse_record(reader));
  } while (reader.next());
  return true;
}

}  // namespace attend::serving
