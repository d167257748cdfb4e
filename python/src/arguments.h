// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attend/ops/kernel_options.h"
#include "border.h"
#include "executors.h"

namespace attend::python {

/// The keyword arguments of one call, taken out by name. None is as good as missing. Every error
/// names the function and the argument. A binding takes what it knows, calls done() and runs.
class Arguments {
 public:
  Arguments(const char* function, const nb::kwargs& values) noexcept
      : function_(function), values_(values) {
    taken_.reserve(32);
  }

  const char* function() const noexcept { return function_; }
  /// A tensor that is read; undefined view = not given.
  ConstTensorView in(const char* name) { return tensor(name, false); }
  /// A tensor that is written.
  TensorView out(const char* name) { return tensor(name, true); }
  /// A list or tuple of tensors.
  std::vector<ConstTensorView> in_list(const char* name);
  std::vector<TensorView> out_list(const char* name);

  bool boolean(const char* name, bool otherwise);
  std::int64_t integer(const char* name, std::int64_t otherwise);
  /// An integer that fits an int.
  int small_integer(const char* name, int otherwise);
  std::optional<int> optional_integer(const char* name);
  double number(const char* name, double otherwise);
  std::optional<float> optional_number(const char* name);
  std::optional<std::string> text(const char* name);
  /// A list or tuple of numbers; empty = not given.
  std::vector<float> numbers(const char* name);
  std::vector<std::int64_t> integers(const char* name);
  /// A type by name ("bf16", "bfloat16", ...).
  std::optional<DType> dtype(const char* name);
  /// The object itself, for what a binding reads on its own; invalid = not given.
  nb::handle object(const char* name);
  /// `isa` and `arithmetic`.
  KernelOptions kernels();
  /// `isa` of functions that have one arithmetic.
  std::optional<IsaLevel> isa();

  /// @throws InvalidType for an argument that nothing has taken.
  void done() const;
  /// Takes `executor` and calls body(Executor&) without the GIL.
  template <typename Body>
  auto run(Body&& body) {
    Executor& executor = take_executor();
    done();
    const nb::gil_scoped_release without_gil;
    return body(executor);
  }
  /// Same for what runs on the calling thread and takes no `executor`.
  template <typename Body>
  auto run_here(Body&& body) {
    done();
    const nb::gil_scoped_release without_gil;
    return body();
  }

  [[noreturn]] void refuse(const char* name, std::string_view expected,
                           std::string_view got) const {
    throw InvalidArgument(function_, name, expected, got);
  }
  [[noreturn]] void refuse_type(const char* name, std::string_view expected, nb::handle got) const;

 private:
  /// The value, invalid if it is missing or None; counts as taken.
  nb::handle take(const char* name);
  double number_of(const char* name, nb::handle value) const;
  int small_integer_of(const char* name, nb::handle value) const;
  std::int64_t integer_of(const char* name, nb::handle value) const;
  TensorView tensor(const char* name, bool writable);
  TensorView tensor(const char* name, nb::handle value, bool writable);
  std::vector<nb::object> sequence(const char* name);
  Executor& take_executor();

  const char* function_;
  const nb::kwargs& values_;
  std::vector<const char*> taken_;
  std::size_t num_given_ = 0;  ///< of taken_ that values_ has
  Framework framework_ = Framework::none;
  const char* first_tensor_ = nullptr;  ///< argument that framework_ comes from
  Imports imports_;
};

}  // namespace attend::python
