// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

#include "attend/core/cpu.h"
#include "attend/core/executor.h"
#include "kernels/cpu/matmul/matmul.h"

namespace attend {

/// Computes products of one dtype side by side on all workers. Allocates nothing; an executor that
/// is null is default_executor(). @pre All are valid, and no output overlaps anything else.
void run_products(std::span<const cpu::BatchedProduct> products, IsaLevel level,
                  Executor* executor);

}  // namespace attend
