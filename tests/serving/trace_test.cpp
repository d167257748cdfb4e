// SPDX-License-Identifier: Apache-2.0
#include "serving/trace.h"

#include <gmock/gmock.h>

#include <sstream>

namespace attend::serving {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Trace parse(const std::string& text) {
  std::istringstream in(text);
  return read_trace(in, "t.txt");
}

std::string error_of(const std::string& text) {
  try {
    parse(text);
  } catch (const TraceError& e) {
    return e.what();
  }
  return "no error";
}

const std::string kAzure = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n";

TEST(Trace, AzureWithWindowsLineEndsAndNoFinalNewline) {
  const Trace t = parse(kAzure +
                        "2023-11-16 23:59:59.5000000,374,44\r\n"
                        "2023-11-17 00:00:01.7512345,396,0");
  EXPECT_EQ(t.format, "azure");
  ASSERT_EQ(t.requests.size(), 2U);
  EXPECT_EQ(t.requests[0].arrival, 0.0);
  EXPECT_NEAR(t.requests[1].arrival, 2.2512345, 1e-6);
  EXPECT_EQ(t.requests[0].prompt_tokens, 374);
  EXPECT_EQ(t.requests[0].output_tokens, 44);
  EXPECT_EQ(t.requests[1].output_tokens, 0);
  EXPECT_EQ(t.requests[1].id, 1);
}

TEST(Trace, ColumnsAreFoundByName) {
  const Trace t = parse("GeneratedTokens,x,TIMESTAMP,ContextTokens\n3,?,2023-11-16 18:00:00,5\n");
  EXPECT_EQ(t.requests[0].prompt_tokens, 5);
  EXPECT_EQ(t.requests[0].output_tokens, 3);
}

TEST(Trace, RequestsAreSortedByArrival) {
  const Trace t = parse(kAzure + "2023-11-16 18:00:02,7,1\n2023-11-16 18:00:01,8,1\n");
  EXPECT_EQ(t.requests[0].prompt_tokens, 8);
  EXPECT_EQ(t.requests[0].id, 0);
  EXPECT_EQ(t.requests[1].arrival, 1.0);
}

TEST(Trace, MooncakeIdsBecomeSegments) {
  const Trace t =
      parse(R"({"timestamp": 500, "input_length": 1100, "output_length": 3, "hash_ids": [0, 5, 9]})"
            "\n"
            R"({"timestamp": 1500, "input_length": 512, "output_length": 4, "hash_ids": [0]})"
            "\n");
  EXPECT_EQ(t.format, "mooncake");
  EXPECT_EQ(t.requests[1].arrival, 1.0);
  EXPECT_THAT(t.requests[0].segments, ElementsAre(ContentSegment{0, 512}, ContentSegment{5, 1024},
                                                  ContentSegment{9, 1100}));
  EXPECT_THAT(t.requests[1].segments, ElementsAre(ContentSegment{0, 512}));
}

TEST(Trace, Lengths) {
  const Trace t =
      parse("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n");
  EXPECT_EQ(t.format, "lengths");
  EXPECT_EQ(t.requests[0].prompt_tokens, 3772);
  EXPECT_EQ(t.requests[0].output_tokens, 54);
}

TEST(Trace, ErrorsNameFileLineAndColumn) {
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,-3,4\n"),
              HasSubstr("t.txt:3:21: expected a number of tokens"));
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46,374,4x\n"), HasSubstr("t.txt:2:25: "));
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46,374\n"),
              HasSubstr("t.txt:2:24: expected 3 fields as in the header, got 2"));
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46,374,4,5\n"), HasSubstr("t.txt:2:27: "));
  EXPECT_THAT(error_of(kAzure + "\n\n2023-02-30 18:15:46,374,4\n"), HasSubstr("t.txt:4:1: "));
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46.,374,4\n"), HasSubstr("t.txt:2:1: "));
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46,0,4\n"), HasSubstr("t.txt:2:21: "));
  EXPECT_THAT(error_of(kAzure + "2023-11-16 18:15:46,99999999999999999999,4\n"),
              HasSubstr("t.txt:2:21: "));
  EXPECT_THAT(error_of("num_prefill_tokens,num_decode_tokens\n5,\n"), HasSubstr("t.txt:2:3: "));
}

std::string mooncake(const std::string& fields) { return "{" + fields + "}\n"; }

TEST(Trace, MooncakeErrors) {
  const std::string good =
      mooncake(R"("timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": [0])");
  EXPECT_THAT(error_of(good + R"({"timestamp": 0,)" + "\n"), HasSubstr("t.txt:2:17: "));
  EXPECT_THAT(error_of(good + R"({"timestamp": x})" + "\n"), HasSubstr("t.txt:2:15: "));
  EXPECT_THAT(error_of(good + "[1]\n"), HasSubstr("t.txt:2:1: expected a JSON object"));
  EXPECT_THAT(error_of(mooncake(R"("timestamp": 0, "input_length": 5, "output_length": 3)")),
              HasSubstr("hash_ids"));
  EXPECT_THAT(error_of(mooncake(
                  R"("timestamp": 0, "input_length": 513, "output_length": 3, "hash_ids": [0])")),
              HasSubstr("t.txt:1:59: expected hash_ids: 2 ids, one for each 512 of 513 tokens, "
                        "got 1"));
  EXPECT_THAT(error_of(mooncake(
                  R"("timestamp": 0, "input_length": 5.5, "output_length": 3, "hash_ids": [0])")),
              HasSubstr("t.txt:1:18: expected input_length: a number of tokens"));
  EXPECT_THAT(error_of(mooncake(
                  R"("timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": [-1])")),
              HasSubstr("expected hash_ids: ids >= 0, got -1"));
  EXPECT_THAT(
      error_of(mooncake(
          R"("timestamp": 0, "input_length": 18446744073709551615, "output_length": 3, "hash_ids": [])")),
      HasSubstr("expected input_length"));
}

TEST(Trace, EmptyUnknownAndMissing) {
  EXPECT_EQ(error_of(""), "t.txt: the trace is empty");
  EXPECT_EQ(error_of("\n \n"), "t.txt: the trace is empty");
  EXPECT_THAT(error_of(kAzure), HasSubstr("t.txt: the trace is empty: a header and no requests"));
  EXPECT_THAT(error_of("a,b,c\n1,2,3\n"), HasSubstr("t.txt:1:1: expected a JSON object"));
  EXPECT_THROW(read_trace(std::string("no/such/file.csv")), TraceError);
  EXPECT_THROW(read_trace(std::string("/")), TraceError) << "a directory";
}

TEST(ScaleLengths, SegmentsKeepMeaningTheSameTokens) {
  std::string text;
  for (const char* r : {R"("input_length": 1100, "output_length": 1, "hash_ids": [0, 5, 9])",
                        R"("input_length": 1536, "output_length": 500, "hash_ids": [0, 5, 8])"}) {
    text += mooncake(R"("timestamp": 0, )" + std::string(r));
  }
  Trace t = parse(text);
  scale_lengths(t, 0.1);
  EXPECT_EQ(t.requests[0].prompt_tokens, 110);
  EXPECT_EQ(t.requests[0].output_tokens, 1) << "never below one token";
  EXPECT_EQ(t.requests[1].output_tokens, 50);
  EXPECT_THAT(t.requests[0].segments,
              ElementsAre(ContentSegment{0, 51}, ContentSegment{5, 102}, ContentSegment{9, 110}));
  EXPECT_THAT(t.requests[1].segments,
              ElementsAre(ContentSegment{0, 51}, ContentSegment{5, 102}, ContentSegment{8, 154}));
}

TEST(ScaleLengths, TinyFactorsDropEmptySegments) {
  Trace t = parse(mooncake(
      R"("timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [0, 5, 9])"));
  scale_lengths(t, 0.001);
  EXPECT_EQ(t.requests[0].prompt_tokens, 1);
  EXPECT_THAT(t.requests[0].segments, ElementsAre(ContentSegment{0, 1}));
}

TEST(ScaleLengths, RefusesBadFactors) {
  Trace t = parse(kAzure + "2023-11-16 18:15:46,374,44\n");
  for (const double factor : {0.0, -1.0, 1e9, std::numeric_limits<double>::quiet_NaN(),
                              std::numeric_limits<double>::infinity()}) {
    EXPECT_THROW(scale_lengths(t, factor), InvalidArgument) << factor;
  }
}

TEST(LimitRequests, KeepsTheFirst) {
  Trace t = parse(kAzure + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:47,2,1\n");
  limit_requests(t, 5);
  EXPECT_EQ(t.requests.size(), 2U);
  limit_requests(t, 1);
  ASSERT_EQ(t.requests.size(), 1U);
  EXPECT_EQ(t.requests[0].prompt_tokens, 1);
  EXPECT_THROW(limit_requests(t, 0), InvalidArgument);
}

}  // namespace
}  // namespace attend::serving
