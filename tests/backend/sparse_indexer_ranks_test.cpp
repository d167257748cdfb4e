// SPDX-License-Identifier: Apache-2.0
// The indexer of a layer whose keys are spread over ranks: every rank gets the bytes that a single
// rank with all keys would get.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "attend/core/error.h"
#include "attend/dist/communicator.h"
#include "backends/flashmla_sparse/indexer_steps.h"
#include "sparse_indexer_bench.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using Budgets = IndexerBench::Budgets;
using Steps = std::vector<std::vector<MlaStepRequest>>;

/// Prompts, decodes of several tokens and of one, requests so short that no logits are needed, and
/// one that is longer than the choice but lies on few ranks. All are prefills and decodes in turn.
Steps ragged_steps() {
  const int prompt = scaled(400, 150), half = prompt / 2;
  return {{{1, 0, 40}, {0, 0, half}, {2, 0, 3}},
          {{1, 40, 4}, {0, half, 4}, {2, 3, 1}, {3, 0, 90}},
          {{2, 4, 1}, {1, 44, 1}, {0, half + 4, 1}, {3, 90, 1}},
          {{3, 91, 1}, {4, 0, 25}, {0, half + 5, prompt - half - 5}, {2, 5, 70}}};
}

/// A rank of a group.
SparseSetup rank_of(const Communicator& comm, int interleave) {
  SparseSetup s = IndexerBench::one_rank();
  s.world_size = comm.size();
  s.rank = comm.rank();
  s.interleave = interleave;
  return s;
}

struct Spread {
  int ranks, interleave;
};

void expect_the_bytes_of_one_rank(const Spread& spread, const Budgets& budgets, bool equal_keys) {
  const Steps steps = ragged_steps();
  std::vector<std::vector<unsigned char>> wanted;
  const auto pool = make_thread_pool(2);
  IndexerBench alone(*pool, {});
  alone.equal_keys = equal_keys;
  for (const auto& step : steps) {
    alone.run(step);
    wanted.push_back(alone.chosen->snapshot());
  }
  run_in_process(spread.ranks, [&](Communicator& comm) {
    const auto own_pool = make_thread_pool(1 + comm.rank() % 2);
    IndexerBench bench(*own_pool, budgets, rank_of(comm, spread.interleave));
    bench.equal_keys = equal_keys;
    for (std::size_t i = 0; i < steps.size(); ++i) {
      bench.run(steps[i], &comm);
      const auto got = bench.chosen->snapshot();
      ASSERT_EQ(got.size(), wanted[i].size());
      EXPECT_EQ(std::memcmp(got.data(), wanted[i].data(), got.size()), 0)
          << "step " << i << ", rank " << comm.rank() << " of " << comm.size() << ", interleave "
          << spread.interleave << ", " << budgets.keys << " keys, " << budgets.logits_bytes
          << " bytes of logits";
    }
  });
}

TEST(SparseIndexerRanks, ChooseWhatOneRankDoesBitForBit) {
  const std::int64_t row_bytes = SparseLayer::kMaxTokens * 4;
  for (const Spread& spread : {Spread{2, 1}, {2, 64}, {3, 1}, {3, 16}}) {
    // All at once; few logits; few keys, so that requests read pages; both.
    for (const Budgets& b :
         {Budgets{}, Budgets{0, row_bytes}, Budgets{60, 3 * row_bytes}, Budgets{4, row_bytes}})
      expect_the_bytes_of_one_rank(spread, b, false);
  }
}

TEST(SparseIndexerRanks, OfEqualLogitsTheLowerPositionWins) {
  for (const Spread& spread : {Spread{2, 1}, {2, 16}, {3, 1}, {3, 64}})
    for (const std::int64_t keys : {0, 4}) expect_the_bytes_of_one_rank(spread, {keys}, true);
}

TEST(SparseIndexerRanks, AttentionToTheirChoiceAgreesWithOneRank) {
  run_in_process(2, [](Communicator& comm) {
    const auto pool = make_thread_pool(1);
    SparseSetup setup = IndexerBench::one_rank();
    setup.head_group = comm.rank();
    IndexerBench alone(*pool, {}, setup);
    setup = rank_of(comm, 16);
    setup.head_group = comm.rank();
    IndexerBench spread(*pool, {}, setup);
    for (const auto& requests : ragged_steps()) {
      for (IndexerBench* bench : {&alone, &spread}) {
        Communicator* group = bench == &spread ? &comm : nullptr;
        bench->run(requests, group);
        SparseStep step = bench->layer.prepare(requests);
        step.args.topk_indices =
            ConstTensorView(bench->chosen->view()).slice(0, 0, step.batch.num_tokens);
        step.args.communicator = group;
        bench->layer.impl->forward(step.args, step.metadata.get());
      }
      const auto out = spread.layer.output->as<bf16>(), wanted = alone.layer.output->as<bf16>();
      for (std::size_t i = 0; i < out.size(); ++i)
        ASSERT_NEAR(to_f32(out[i]), to_f32(wanted[i]), 0.02) << i;
    }
  });
}

TEST(SparseIndexerRanks, ShareChunksThatKeepTheBudgetsOfEach) {
  // Two decodes of one token, one of three, a short one, a prompt, one without queries and another.
  const std::vector<std::int32_t> starts = {0, 1, 2, 5, 6, 206, 206, 306},
                                  lens = {100, 300, 90, 20, 200, 50, 150};
  const flashmla_sparse::Requests requests{7, starts, lens};
  for (const DcpLayout& layout : {DcpLayout{2, 1}, {3, 16}, {8, 64}}) {
    for (const std::int64_t keys : {50, 200}) {
      for (const std::int64_t logits : {300, 1000, 1 << 20}) {
        const auto steps = flashmla_sparse::cut_indexer(requests, {.topk = 20,
                                                                   .first_prefill = 4,
                                                                   .max_keys = keys,
                                                                   .max_logits = logits,
                                                                   .layout = layout});
        EXPECT_LE(steps.most_keys, keys);
        EXPECT_LE(steps.most_logits, logits);
        std::int64_t rows = 0;
        for (const auto& step : steps.steps)
          for (const auto& chunk : step.chunks) {
            rows += chunk.num_tokens();
            EXPECT_LE(chunk.num_tokens(), steps.most_tokens);
            EXPECT_GE(chunk.columns, 1);
            EXPECT_TRUE(chunk.num_tokens() == 1 ||
                        chunk.num_tokens() * 2 * 20 * layout.world_size <= logits);
            if (step.cu_seq_lens.empty()) continue;
            EXPECT_LE(chunk.first_key + chunk.columns, step.cu_seq_lens.back());
          }
        EXPECT_EQ(rows, 1 + 1 + 3 + 180 + 100);
      }
    }
  }
}

/// The argument that a call is refused for; nothing may be written.
std::string refused(IndexerBench& bench, Communicator* communicator) {
  SparseStep step = bench.layer.prepare({{0, 0, 50}});
  SparseIndexerArgs a = bench.args({{0, 0, 50}}, *step.metadata);
  a.communicator = communicator;
  const auto cache = bench.cache.snapshot(), chosen = bench.chosen->snapshot();
  std::string argument = "none";
  try {
    bench.indexer.forward(a, step.metadata.get());
  } catch (const InvalidArgument& e) {
    argument = e.argument();
  }
  EXPECT_EQ(bench.cache.snapshot(), cache);
  EXPECT_EQ(bench.chosen->snapshot(), chosen);
  return argument;
}

TEST(SparseIndexerRanks, NeedTheCommunicatorThatTheBuilderWasToldOf) {
  const auto pool = make_thread_pool(1);
  const auto pair = make_in_process_group(2), three = make_in_process_group(3);
  IndexerBench bench(*pool, {}, rank_of(*pair[1], 1)), alone(*pool, {});
  for (Communicator* wrong : {static_cast<Communicator*>(nullptr), pair[0].get(), three[1].get()})
    EXPECT_EQ(refused(bench, wrong), "communicator");
  EXPECT_EQ(refused(alone, pair[0].get()), "communicator");
}

}  // namespace
}  // namespace attend::testing
