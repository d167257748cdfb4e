// SPDX-License-Identifier: Apache-2.0
#include "oracle/row.h"

namespace attend::oracle {

RowResult attention_row(const RowProblem& p) { return row(p, p.q, p.k, p.v); }

}  // namespace attend::oracle
