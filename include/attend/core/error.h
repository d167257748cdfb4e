// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace attend {

/// Base of every exception that the library throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bad input. Nothing has been written when it is thrown.
/// Text: "[op] argument 'name': expected ..., got ...".
class InvalidArgument : public Error {
 public:
  InvalidArgument(std::string_view op, std::string_view argument, std::string_view expected,
                  std::string_view got);
  const std::string& op() const noexcept { return op_; }
  const std::string& argument() const noexcept { return argument_; }

 private:
  std::string op_, argument_;
};

/// A valid request that nothing here can serve; `reasons()` holds every reason, not the first.
class Unsupported : public Error {
 public:
  Unsupported(std::string_view what, std::vector<std::string> reasons);
  const std::vector<std::string>& reasons() const noexcept { return reasons_; }

 private:
  std::vector<std::string> reasons_;
};

/// A single request needs more KV-cache blocks than the whole cache has.
class OutOfBlocks : public Error {
 public:
  OutOfBlocks(std::int64_t needed, std::int64_t capacity, std::string_view context);
  std::int64_t needed() const noexcept { return needed_; }      ///< blocks
  std::int64_t capacity() const noexcept { return capacity_; }  ///< blocks

 private:
  std::int64_t needed_, capacity_;
};

/// The machine or its driver failed (memory mapping, thread creation, device call).
class DeviceError : public Error {
 public:
  using Error::Error;
};

}  // namespace attend
