// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "border.h"

namespace attend::python {

/// Turns the library's exceptions into those of attend.errors.
void bind_errors();

}  // namespace attend::python
