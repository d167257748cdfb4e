// SPDX-License-Identifier: Apache-2.0
// The public traces themselves, where they lie beside the project.
#include <gmock/gmock.h>

#include <filesystem>
#include <set>

#include "serving/content.h"
#include "serving/trace.h"

namespace attend::serving {
namespace {

struct PublicTrace {
  const char* file;
  const char* format;
  std::size_t requests;
  double mean_prompt, mean_output;
};

class TraceFiles : public ::testing::TestWithParam<PublicTrace> {};

TEST_P(TraceFiles, HaveThePublishedStatistics) {
  const auto path = std::filesystem::path(ATTEND_SOURCE_DIR) / "../shared/traces" / GetParam().file;
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no ../shared/traces/" << GetParam().file;
  const Trace trace = read_trace(path.string());
  EXPECT_EQ(trace.format, GetParam().format);
  ASSERT_EQ(trace.requests.size(), GetParam().requests);
  double prompt = 0, output = 0;
  for (const Request& r : trace.requests) {
    prompt += static_cast<double>(r.prompt_tokens);
    output += static_cast<double>(r.output_tokens);
  }
  const auto n = static_cast<double>(trace.requests.size());
  EXPECT_NEAR(prompt / n, GetParam().mean_prompt, 0.5);
  EXPECT_NEAR(output / n, GetParam().mean_output, 0.5);
}

INSTANTIATE_TEST_SUITE_P(
    All, TraceFiles,
    ::testing::Values(
        PublicTrace{"azure_llm_2023_code.csv", "azure", 8819, 2048, 28},
        PublicTrace{"azure_llm_2023_conv.csv", "azure", 19366, 1155, 211},
        PublicTrace{"mooncake_fast25_conversation_trace.jsonl", "mooncake", 12031, 12035, 343},
        PublicTrace{"mooncake_fast25_synthetic_trace.jsonl", "mooncake", 3993, 15325, 149},
        PublicTrace{"vidur_arxiv_summarization_lengths.csv", "lengths", 28257, 2588, 291}));

}  // namespace
}  // namespace attend::serving
