// SPDX-License-Identifier: Apache-2.0
#include "trace_input.h"

#include <fmt/format.h>

#include "serving/model_presets.h"
#include "serving/synthetic.h"

namespace attend::cli {

const std::string_view kTraceHelp = R"(
TRACE is a file or 'synthetic'. The format shows in the first line:
  azure     CSV with TIMESTAMP, ContextTokens, GeneratedTokens
  mooncake  JSON lines with timestamp, input_length, output_length, hash_ids
  lengths   CSV with num_prefill_tokens, num_decode_tokens
'synthetic' needs no file: synthetic:requests=64,rate=4,prompt=512,output=64,spread=0.6,shared=128
(median tokens, log-normal with that spread, after a system prompt of 'shared' tokens).
)";

CLI::Option* add_trace_options(CLI::App& command, TraceInput& input) {
  CLI::Option* trace =
      command.add_option("TRACE", input.name, "Trace file, or synthetic[:key=value,...]");
  command.add_option("--limit", input.limit, "Only the first N requests")->type_name("N");
  command
      .add_option("--scale-lengths", input.scale_lengths,
                  "Multiply all lengths by X, down to one token")
      ->type_name("X")
      ->capture_default_str();
  return trace;
}

serving::Trace load_trace(const TraceInput& input, std::uint64_t seed) {
  serving::Trace trace =
      serving::is_synthetic(input.name)
          ? serving::make_synthetic(serving::SyntheticConfig::parse(input.name), seed)
          : serving::read_trace(input.name);
  if (input.limit) serving::limit_requests(trace, *input.limit);
  if (input.scale_lengths != 1.0) serving::scale_lengths(trace, input.scale_lengths);
  return trace;
}

std::string model_list() {
  std::string text = "\nModels:\n";
  for (const serving::ModelPreset& m : serving::model_presets()) {
    text += fmt::format("  {:<18}{}\n", m.name, m.description);
  }
  return text;
}

}  // namespace attend::cli
