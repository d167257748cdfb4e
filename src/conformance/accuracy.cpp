// SPDX-License-Identifier: Apache-2.0
#include "conformance/accuracy.h"

#include <algorithm>
#include <iterator>

namespace attend::conformance {

double AccuracyReport::error(DataKind data, std::string_view scheme) const {
  return std::find_if(schemes.begin(), schemes.end(),
                      [&](const SchemeAccuracy& s) { return s.data == data && s.scheme == scheme; })
      ->error;
}

AccuracyReport measure_accuracy(const AccuracyOptions& options) {
  Executor& executor = options.executor != nullptr ? *options.executor : default_executor();
  const auto per_kind = quant_schemes().size() + quantised_ops().size();
  const auto total = static_cast<int>(std::size(kDataKinds) * per_kind);
  int done = 0;
  const auto begin = [&](std::string_view what) {
    if (options.progress) options.progress(done, total, what);
    ++done;
  };
  AccuracyReport report;
  for (const DataKind kind : kDataKinds) {
    const AttentionData data = make_attention_data(kind, options.shape, options.seed);
    const std::vector<double> exact = exact_attention(data, false, executor);
    for (const QuantScheme& scheme : quant_schemes()) {
      begin(scheme.name);
      const auto got = exact_attention(quantised(data, scheme), scheme.int8_weights, executor);
      report.schemes.push_back({kind, scheme.name, relative_l1(exact, got)});
    }
    for (const QuantisedOp& op : quantised_ops()) {
      begin(op.name);
      const auto got = op.run(data, find_quant_scheme(op.scheme), active_isa(), executor);
      const double error = relative_l1(exact, got);
      report.ops.push_back(
          {kind, op.name, op.scheme, active_isa(), error, error / report.error(kind, op.scheme)});
    }
  }
  return report;
}

}  // namespace attend::conformance
