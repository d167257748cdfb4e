// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/arithmetic.h"

namespace attend {

std::string_view to_string(Arithmetic arithmetic) noexcept {
  switch (arithmetic) {
    case Arithmetic::automatic:
      return "automatic";
    case Arithmetic::exact:
      return "exact";
    case Arithmetic::fast:
      return "fast";
  }
  return "invalid arithmetic";
}

std::optional<Arithmetic> parse_arithmetic(std::string_view name) noexcept {
  for (const Arithmetic a : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::fast})
    if (to_string(a) == name) return a;
  return std::nullopt;
}

}  // namespace attend
