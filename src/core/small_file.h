// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <filesystem>
#include <string>

namespace attend {

/// A file that was read whole, or why it was not.
struct SmallFile {
  std::string text;
  std::string problem;   ///< in words; empty if the file was read
  bool missing = false;  ///< there is no such file; `problem` says so too
};

/// Reads a regular file of at most `limit` bytes; never waits, whatever the path leads to.
SmallFile read_small_file(const std::filesystem::path& path, std::size_t limit);

}  // namespace attend
