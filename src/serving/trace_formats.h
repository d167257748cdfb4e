// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <istream>
#include <string>
#include <string_view>
#include <vector>

#include "serving/trace.h"

/// One parser for each format that read_trace() recognises; private to it.
namespace attend::serving {

/// Lines of a text, counted from 1, without line ends; blank lines are skipped.
class LineReader {
 public:
  LineReader(std::istream& in, std::string name) : in_(in), name_(std::move(name)) {}
  bool next();
  const std::string& line() const noexcept { return line_; }
  [[noreturn]] void fail(std::size_t column, std::string_view expected,
                         std::string_view got) const {
    throw TraceError(name_, number_, column, expected, got);
  }

 private:
  std::istream& in_;
  std::string name_;
  std::string line_;
  std::size_t number_ = 0;
};

/// The reader stands on the header line. False if the header is not of this format.
bool read_azure(LineReader& reader, std::vector<Request>& requests);
bool read_lengths(LineReader& reader, std::vector<Request>& requests);
/// The reader stands on the first line. False if that is not a JSON object.
bool read_mooncake(LineReader& reader, std::vector<Request>& requests);

}  // namespace attend::serving
