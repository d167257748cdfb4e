// SPDX-License-Identifier: Apache-2.0
#include "serving/synthetic.h"

#include <gmock/gmock.h>

#include <algorithm>

namespace attend::serving {
namespace {

TEST(Synthetic, ParsesItsKeys) {
  const auto c = SyntheticConfig::parse(
      "synthetic:requests=5,rate=2.5,prompt=100,output=20,spread=0,shared=0");
  EXPECT_EQ(c.requests, 5);
  EXPECT_EQ(c.rate, 2.5);
  EXPECT_EQ(c.prompt, 100);
  EXPECT_EQ(c.output, 20);
  EXPECT_EQ(c.spread, 0.0);
  EXPECT_EQ(c.shared, 0);
  EXPECT_EQ(SyntheticConfig::parse("synthetic").requests, SyntheticConfig{}.requests);
}

TEST(Synthetic, RefusesUnknownKeysAndBadValues) {
  for (const auto* text :
       {"synthetic:request=5", "synthetic:requests", "synthetic:requests=", "synthetic:requests=0",
        "synthetic:requests=5x", "synthetic:rate=-1", "synthetic:rate=nan", "synthetic:spread=9",
        "synthetic:,requests=5", "other"}) {
    EXPECT_THROW(SyntheticConfig::parse(text), InvalidArgument) << text;
  }
}

TEST(Synthetic, OnlyTheExactWordIsNotAFile) {
  EXPECT_TRUE(is_synthetic("synthetic"));
  EXPECT_TRUE(is_synthetic("synthetic:rate=1"));
  EXPECT_FALSE(is_synthetic("synthetic.csv"));
  EXPECT_FALSE(is_synthetic("./synthetic"));
}

TEST(Synthetic, IsReproducibleAndObeysItsSettings) {
  const auto config = SyntheticConfig::parse("synthetic:requests=2000,prompt=100,output=20,rate=5");
  const Trace a = make_synthetic(config, 1), b = make_synthetic(config, 1),
              c = make_synthetic(config, 2);
  ASSERT_EQ(a.requests.size(), 2000U);
  std::vector<std::int64_t> prompts;
  bool differs = false;
  for (std::size_t i = 0; i < a.requests.size(); ++i) {
    const Request& r = a.requests[i];
    EXPECT_EQ(r.prompt_tokens, b.requests[i].prompt_tokens);
    EXPECT_EQ(r.arrival, b.requests[i].arrival);
    differs |= r.prompt_tokens != c.requests[i].prompt_tokens;
    EXPECT_EQ(r.segments, (std::vector<ContentSegment>{{0, 128}}));
    EXPECT_GT(r.prompt_tokens, 128);
    EXPECT_GE(r.output_tokens, 1);
    if (i > 0) {
      EXPECT_GE(r.arrival, a.requests[i - 1].arrival);
    }
    prompts.push_back(r.prompt_tokens - 128);
  }
  EXPECT_TRUE(differs);
  std::nth_element(prompts.begin(), prompts.begin() + 1000, prompts.end());
  EXPECT_NEAR(static_cast<double>(prompts[1000]), 100, 10) << "median";
  EXPECT_NEAR(a.requests.back().arrival, 400, 60) << "2000 requests at 5 a second";
}

TEST(Synthetic, ZeroSpreadGivesEqualLengths) {
  const Trace t = make_synthetic(
      SyntheticConfig::parse("synthetic:requests=20,prompt=10,output=0,spread=0,shared=0,rate=0"),
      1);
  for (const Request& r : t.requests) {
    EXPECT_EQ(r.prompt_tokens, 10);
    EXPECT_EQ(r.output_tokens, 0);
    EXPECT_EQ(r.arrival, 0.0);
    EXPECT_TRUE(r.segments.empty());
  }
}

}  // namespace
}  // namespace attend::serving
