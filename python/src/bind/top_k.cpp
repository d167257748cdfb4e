// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/top_k.h"

#include <nanobind/stl/vector.h>

#include "arguments.h"
#include "attend/oracle/indexer.h"
#include "attend/oracle/top_k.h"

namespace attend::python {
namespace {

std::vector<std::int64_t> oracle_top_k(const std::vector<double>& row, std::size_t k) {
  std::vector<std::int64_t> indices(k);
  oracle::top_k(row, indices);
  return indices;
}

bool may_be_top_k(const std::vector<double>& logits, const std::vector<double>& bounds,
                  const std::vector<std::int32_t>& indices) {
  return oracle::may_be_top_k(logits, bounds, indices);
}

}  // namespace

void bind_top_k(nb::module_& m) {
  m.def("top_k_per_row_prefill", [](const nb::kwargs& values) {
    Arguments call("top_k_per_row_prefill", values);
    TopKPerRowPrefillArgs a;
    a.logits = call.in("logits");
    a.row_starts = call.in("row_starts");
    a.row_ends = call.in("row_ends");
    a.out = call.out("out");
    call.run([&](Executor& e) { top_k_per_row_prefill(a, &e); });
  });
  m.def("top_k_per_row_decode", [](const nb::kwargs& values) {
    Arguments call("top_k_per_row_decode", values);
    TopKPerRowDecodeArgs a;
    a.logits = call.in("logits");
    a.seq_lens = call.in("seq_lens");
    a.next_n = call.small_integer("next_n", 1);
    a.out = call.out("out");
    call.run([&](Executor& e) { top_k_per_row_decode(a, &e); });
  });
  m.def("oracle_top_k", &oracle_top_k);
  m.def("oracle_may_be_top_k", &may_be_top_k);
}

}  // namespace attend::python
