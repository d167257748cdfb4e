// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/cpu.h"
#include "attend/core/executor.h"
#include "attend/ops/kernel_options.h"
#include "attend/plan/kernel_choice.h"
#include "conformance/comparison.h"
#include "conformance/rng.h"

/// Random problems of every op and back end, compared with the float64 oracle.
namespace attend::conformance {

/// One random problem with its expected result.
class Case {
 public:
  virtual ~Case() = default;
  /// Runs the op and compares. May be called several times, with different levels. The level is
  /// always given.
  virtual Outcome run(const KernelOptions& kernels, Executor& executor) = 0;
  /// Kind of attention, if there is a choice of arithmetic for it.
  virtual std::optional<KernelKind> kind() const { return std::nullopt; }
  /// The problem in one line.
  virtual std::string describe() const = 0;
};

/// A checked op.
struct Op {
  std::string name;  ///< as on the command line
  /// False: the op has no choice of level and runs once, on active_isa().
  bool every_isa = true;
  std::function<std::unique_ptr<Case>(Rng&)> make_case;
  bool has_arithmetic = false;  ///< some of its cases have a kind()
};

/// All checked ops by name. Each file in cases/ adds one.
const std::vector<Op>& ops();
/// Op name of a back end.
std::string backend_op_name(std::string_view backend);
/// Names of registered back ends that no case covers.
std::vector<std::string> uncovered_backends();

struct CheckOptions {
  int cases = 200;  ///< per op and level
  std::uint64_t seed = 1;
  std::vector<std::string> ops;  ///< names or patterns with * and ?; empty = all
  std::vector<IsaLevel> levels;  ///< empty = all of this machine
  /// Other than automatic: only ops and problems that have a choice are run, and fast only on
  /// levels that have it.
  Arithmetic arithmetic = Arithmetic::automatic;
  std::optional<int> only_case;  ///< run just this index
  /// Called after each case with the number of cases done and to do.
  std::function<void(int done, int total, std::string_view op)> progress;
};

struct CheckFailure {
  std::string op;
  IsaLevel isa;
  int case_index;
  std::string problem;  ///< Case::describe()
  std::string message;
  std::string command;  ///< the shell command that repeats it
};

/// One line of the result: an op on a level.
struct CheckRow {
  std::string op;
  IsaLevel isa = IsaLevel::scalar;
  int cases = 0;  ///< that were run
  int failed = 0;
  double worst_error = 0.0;
  double worst_ratio = 0.0;
};

struct CheckReport {
  std::vector<CheckRow> rows;
  std::vector<CheckFailure> failures;  ///< at most 10 a row
};

/// Runs the checks. @throws InvalidArgument for a pattern that matches no op, listing the ops;
/// Unsupported for a level or an arithmetic that this machine lacks.
CheckReport run_checks(const CheckOptions& options);

}  // namespace attend::conformance
