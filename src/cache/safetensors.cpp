// SPDX-License-Identifier: Apache-2.0
#include "cache/safetensors.h"

#include <algorithm>
#include <bit>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <tuple>

#include "core/check.h"

namespace attend::safetensors {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "data is copied as it is");

constexpr std::uint64_t kLengthBytes = 8;
// Room for the names of ten thousand layers; what a parsed header takes is a multiple of it.
constexpr std::uint64_t kMaxHeaderBytes = 1 << 20;
// Longest part of the file that a message repeats.
constexpr std::size_t kMaxQuoted = 60;
// Longest part of the parser's own words, which quote the file too.
constexpr std::size_t kMaxError = 160;
constexpr std::string_view kMetadata = "__metadata__";

// Op and file that an error names.
struct Source {
  std::string_view op;
  const std::string& path;

  template <typename Got>
  void require(bool ok, std::string_view expected, const Got& got) const {
    check::require(ok, {op, "path"}, expected,
                   [&] { return fmt::format("{}: {}", path, check::text_of(got)); });
  }
};

std::string in_quotes(std::string_view text) {
  if (text.size() <= kMaxQuoted) return fmt::format("'{}'", text);
  return fmt::format("'{}...'", text.substr(0, kMaxQuoted));
}

std::string dumped(const json& value) {
  const std::string text = value.dump();
  return text.size() <= kMaxQuoted ? text : text.substr(0, kMaxQuoted) + "...";
}

// Where the data of a tensor lies, in bytes from the end of the header.
struct Entry {
  std::string name;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;
};

// The parser keeps the last of two equal names, so they are counted while it reads.
json parse_header(const Source& source, const std::string& text) {
  std::vector<std::set<std::string>> names;  // of the open objects
  const auto check_names = [&](int depth, json::parse_event_t event, const json& parsed) {
    source.require(depth <= 4, "a header of at most 4 levels", "a deeper one");
    if (event == json::parse_event_t::object_start) names.emplace_back();
    if (event == json::parse_event_t::object_end) names.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& name = parsed.get_ref<const std::string&>();
      source.require(names.back().insert(name).second, "names that differ",
                     [&] { return in_quotes(name) + " twice"; });
    }
    return true;
  };
  try {
    return json::parse(text, check_names);
  } catch (const json::exception& e) {
    source.require(false, "a JSON header",
                   [&] { return std::string(e.what()).substr(0, kMaxError); });
    throw;
  }
}

std::vector<std::uint64_t> unsigned_list(const Source& source, std::string_view name,
                                         std::string_view field, const json& list) {
  const bool good = list.is_array() && std::all_of(list.begin(), list.end(), [](const json& n) {
                      return n.is_number_unsigned();
                    });
  source.require(good, "lists of whole numbers >= 0",
                 [&] { return fmt::format("{} {} of {}", field, dumped(list), in_quotes(name)); });
  return list.get<std::vector<std::uint64_t>>();
}

Entry parse_entry(const Source& source, const std::string& name, const json& value) {
  const bool complete = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                        value.contains("shape") && value.contains("data_offsets");
  source.require(complete, "tensors with dtype, shape and data_offsets",
                 [&] { return fmt::format("{} for {}", dumped(value), in_quotes(name)); });
  source.require(value["dtype"] == "F32", "dtype \"F32\"",
                 [&] { return fmt::format("{} for {}", dumped(value["dtype"]), in_quotes(name)); });
  Entry entry{.name = name, .shape = {}};
  const auto offsets = unsigned_list(source, name, "data_offsets", value["data_offsets"]);
  source.require(offsets.size() == 2 && offsets[0] <= offsets[1],
                 "data_offsets [begin, end] in ascending order", [&] {
                   return fmt::format("{} for {}", dumped(value["data_offsets"]), in_quotes(name));
                 });
  entry.begin = offsets[0];
  entry.end = offsets[1];

  std::uint64_t bytes = sizeof(float);
  bool fits = true;
  for (const std::uint64_t n : unsigned_list(source, name, "shape", value["shape"])) {
    fits = fits && n <= INT64_MAX && !__builtin_mul_overflow(bytes, n, &bytes);
    entry.shape.push_back(static_cast<std::int64_t>(n));
  }
  source.require(fits && bytes == entry.end - entry.begin, "a shape that fits its data_offsets",
                 [&] {
                   return fmt::format("{} in {} bytes for {}", dumped(value["shape"]),
                                      entry.end - entry.begin, in_quotes(name));
                 });
  return entry;
}

// The tensors must fill the data exactly once.
void require_dense(const Source& source, const std::vector<Entry>& entries,
                   std::uint64_t data_bytes) {
  std::uint64_t end = 0;
  for (const Entry& e : entries) {
    const auto place = [&] {
      return fmt::format("{} at [{}, {}), after {}, of {} bytes of data", in_quotes(e.name),
                         e.begin, e.end, end, data_bytes);
    };
    source.require(e.end <= data_bytes, "tensors inside the file", place);
    source.require(e.begin >= end, "tensors that do not overlap", place);
    source.require(e.begin == end, "tensors without gaps", place);
    end = e.end;
  }
  source.require(end == data_bytes, "a file that ends with its last tensor",
                 [&] { return fmt::format("{} more bytes", data_bytes - end); });
}

std::map<std::string, std::string> parse_metadata(const Source& source, const json& value) {
  const bool strings =
      value.is_object() &&
      std::all_of(value.begin(), value.end(), [](const json& v) { return v.is_string(); });
  source.require(strings, "__metadata__ with strings only", [&] { return dumped(value); });
  return value.get<std::map<std::string, std::string>>();
}

void read_bytes(const Source& source, std::ifstream& in, void* to, std::uint64_t count) {
  in.read(static_cast<char*>(to), static_cast<std::streamsize>(count));
  source.require(static_cast<std::uint64_t>(in.gcount()) == count, "a readable file",
                 [&] { return fmt::format("{} of {} bytes", in.gcount(), count); });
}

std::uint64_t regular_file_size(const Source& source) {
  std::error_code error;
  const bool regular = std::filesystem::is_regular_file(source.path, error);
  source.require(regular, "a regular file",
                 [&] { return error ? error.message() : std::string("something else"); });
  const std::uintmax_t size = std::filesystem::file_size(source.path, error);
  source.require(!error, "a readable file", [&] { return error.message(); });
  return size;
}

std::string encode_header(const File& file) {
  json header = json::object();
  header[std::string(kMetadata)] = file.metadata;
  std::uint64_t begin = 0;
  for (const Tensor& t : file.tensors) {
    const std::uint64_t end = begin + t.data.size() * sizeof(float);
    header[t.name] = {{"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text = header.dump();
  // Data begins at a multiple of 8 bytes, so that a mapped file is aligned.
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

}  // namespace

File read(std::string_view op, const std::string& path) {
  const Source source{op, path};
  const std::uint64_t size = regular_file_size(source);
  std::ifstream in(path, std::ios::binary);
  source.require(in.is_open(), "a readable file", "no permission to open it");
  source.require(size >= kLengthBytes, "8 bytes with the length of the header",
                 [&] { return fmt::format("a file of {} bytes", size); });
  std::uint64_t header_bytes = 0;
  read_bytes(source, in, &header_bytes, kLengthBytes);
  source.require(header_bytes <= size - kLengthBytes, "a header inside the file", [&] {
    return fmt::format("a header of {} bytes in a file of {}", header_bytes, size);
  });
  source.require(header_bytes <= kMaxHeaderBytes, "a header of at most 1 MiB",
                 [&] { return fmt::format("{} bytes", header_bytes); });
  std::string text(header_bytes, '\0');
  read_bytes(source, in, text.data(), header_bytes);
  const json header = parse_header(source, text);
  source.require(header.is_object() && text.front() == '{', "a JSON object as the header",
                 [&] { return dumped(header); });

  File file;
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadata) {
      file.metadata = parse_metadata(source, value);
    } else {
      entries.push_back(parse_entry(source, name, value));
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  require_dense(source, entries, size - kLengthBytes - header_bytes);
  for (Entry& e : entries) {
    Tensor tensor{std::move(e.name), std::move(e.shape), {}};
    tensor.data.resize((e.end - e.begin) / sizeof(float));
    read_bytes(source, in, tensor.data.data(), e.end - e.begin);
    file.tensors.push_back(std::move(tensor));
  }
  return file;
}

void write(const std::string& path, const File& file) {
  const std::string header = encode_header(file);
  const std::uint64_t header_bytes = header.size();
  const std::string partial = path + ".partial";
  std::error_code error;
  {
    std::ofstream out(partial, std::ios::binary | std::ios::trunc);
    out.write(reinterpret_cast<const char*>(&header_bytes), kLengthBytes);
    out.write(header.data(), static_cast<std::streamsize>(header.size()));
    for (const Tensor& t : file.tensors) {
      out.write(reinterpret_cast<const char*>(t.data.data()),
                static_cast<std::streamsize>(t.data.size() * sizeof(float)));
    }
    out.close();
    if (!out) {
      std::filesystem::remove(partial, error);
      throw DeviceError(fmt::format("{}: cannot be written", partial));
    }
  }
  std::filesystem::rename(partial, path, error);
  if (error) {
    const std::string reason = error.message();
    std::filesystem::remove(partial, error);
    throw DeviceError(fmt::format("{}: cannot be written: {}", path, reason));
  }
}

}  // namespace attend::safetensors
