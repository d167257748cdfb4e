// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/mla_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <span>
#include <tuple>

#include "attend/core/error.h"
#include "attend/oracle/projection.h"
#include "backend/allocation_counter.h"
#include "support/host_tensor.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr MlaDims kDims = {
    .kv_lora_rank = 96, .qk_nope_head_dim = 40, .qk_rope_head_dim = 64, .v_head_dim = 72};

std::int64_t weight_rows(const MlaDims& dims, int heads) {
  return std::int64_t{heads} * (dims.qk_nope_head_dim + dims.v_head_dim);
}

// Terms that cancel: the second half of every sum is the first one negated, so that results are
// what rounding left of it, and any other order of adding shows in the bits of 16-bit types too.

/// Elements [half, 2 half) of each run of `dim` become minus those before them.
template <typename T>
void negate_second_halves(std::span<T> x, std::size_t dim) {
  for (std::size_t i = 0; i < x.size(); ++i)
    if (i % dim >= dim / 2) x[i] = from_f32<T>(-to_f32(x[i - dim / 2]));
}
/// The weights of both halves are alike, in the order of either direction.
template <typename T>
void repeat_first_halves(std::span<T> weight, const MlaDims& dims) {
  const auto l = static_cast<std::size_t>(dims.kv_lora_rank);
  const auto p = static_cast<std::size_t>(dims.qk_nope_head_dim);
  const std::size_t head_rows = p + static_cast<std::size_t>(dims.v_head_dim);
  for (std::size_t i = 0; i < weight.size(); ++i) {
    const std::size_t row = i / l % head_rows;
    if (row < p && row >= p / 2) weight[i] = weight[i - p / 2 * l];
    if (i % l >= l / 2) weight[i] = weight[i - l / 2];
  }
}
/// Calls f with the elements of a tensor as what they are.
template <typename Fn>
void with_elements(const HostTensor& t, const Fn& f) {
  if (t.view().dtype == DType::f16) return f(t.as<f16>());
  if (t.view().dtype == DType::bf16) return f(t.as<bf16>());
  f(t.as<float>());
}

/// A layer with random weights.
struct Layer {
  Layer(Rng& rng, DType dtype, IsaLevel isa, int heads = 3, const MlaDims& dims = kDims)
      : weight(dtype, {weight_rows(dims, heads), dims.kv_lora_rank}) {
    weight.fill_uniform(rng);
    with_elements(weight, [&](auto elements) { repeat_first_halves(elements, dims); });
    args.weight = weight;
    args.dims = dims;
    args.num_heads = heads;
    args.dtype = dtype;
    args.isa = isa;
    weights = MlaWeights::from_kv_b_proj(args);
  }
  HostTensor weight;
  KvBProjArgs args;
  std::shared_ptr<const MlaWeights> weights;
};

/// Inputs and outputs of the three products for some tokens.
struct Tensors {
  Tensors(const Layer& layer, std::int64_t tokens)
      : kv_c(layer.args.dtype, {tokens, l(layer)}),
        q_nope(layer.args.dtype, {tokens, h(layer), p(layer)}),
        latents(layer.args.dtype, {tokens, h(layer), l(layer)}),
        k_nope(layer.args.dtype, {tokens, h(layer), p(layer)}),
        v(layer.args.dtype, {tokens, h(layer), layer.args.dims.v_head_dim}),
        ql_nope(layer.args.dtype, {tokens, h(layer), l(layer)}),
        out(layer.args.dtype, {tokens, h(layer), layer.args.dims.v_head_dim}) {}
  static std::int64_t l(const Layer& layer) { return layer.args.dims.kv_lora_rank; }
  static std::int64_t p(const Layer& layer) { return layer.args.dims.qk_nope_head_dim; }
  static std::int64_t h(const Layer& layer) { return layer.args.num_heads; }

  void fill(Rng& rng) {
    for (HostTensor* t : inputs()) {
      t->fill_uniform(rng, -64.0F, 64.0F);
      const auto dim = static_cast<std::size_t>(t->view().shape[t->view().rank - 1]);
      with_elements(*t, [&](auto elements) { negate_second_halves(elements, dim); });
    }
  }
  void run(const Layer& layer, Executor* executor = nullptr) {
    for (HostTensor* t : outputs()) t->fill_bytes(0xff);
    layer.weights->up_project(kv_c, k_nope, v, executor);
    layer.weights->absorb_query(q_nope, ql_nope, executor);
    layer.weights->v_up_project(latents, out, executor);
  }
  std::array<HostTensor*, 3> inputs() { return {&kv_c, &q_nope, &latents}; }
  std::array<HostTensor*, 4> outputs() { return {&k_nope, &v, &ql_nope, &out}; }

  HostTensor kv_c, q_nope, latents, k_nope, v, ql_nope, out;
};

std::size_t row_bytes(const HostTensor& t) {
  return t.bytes() / static_cast<std::size_t>(t.view().shape[0]);
}
const std::byte* row_of(const HostTensor& t, std::int64_t row) {
  return static_cast<const std::byte*>(t.view().data) +
         static_cast<std::size_t>(row) * row_bytes(t);
}
/// Copies row `from` of every input of `source` to row `to` of `target`.
void copy_inputs(Tensors& source, std::int64_t from, Tensors& target, std::int64_t to) {
  const auto sources = source.inputs(), targets = target.inputs();
  for (std::size_t i = 0; i < sources.size(); ++i)
    std::memcpy(const_cast<std::byte*>(row_of(*targets[i], to)), row_of(*sources[i], from),
                row_bytes(*sources[i]));
}
/// Whether all outputs of a row are the same bits.
bool same_outputs(Tensors& a, std::int64_t row_a, Tensors& b, std::int64_t row_b) {
  const auto all_a = a.outputs(), all_b = b.outputs();
  for (std::size_t i = 0; i < all_a.size(); ++i)
    if (std::memcmp(row_of(*all_a[i], row_a), row_of(*all_b[i], row_b), row_bytes(*all_a[i])) != 0)
      return false;
  return true;
}
bool has_nan(const HostTensor& t, std::int64_t row) {
  const TensorView view = t.view();
  for (std::int64_t h = 0; h < view.shape[1]; ++h)
    for (std::int64_t d = 0; d < view.shape[2]; ++d)
      if (std::isnan(testing::get(view, {row, h, d}))) return true;
  return false;
}

class MlaWeightsTest : public ::testing::TestWithParam<std::tuple<IsaLevel, DType>> {
 protected:
  IsaLevel isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(LevelsAndTypes, MlaWeightsTest,
                         ::testing::Combine(::testing::ValuesIn(available_isa_levels()),
                                            ::testing::Values(DType::f32, DType::f16, DType::bf16)),
                         [](const auto& info) {
                           return std::string(to_string(std::get<0>(info.param))) + "_" +
                                  std::string(to_string(std::get<1>(info.param)));
                         });

TEST_P(MlaWeightsTest, ARowHasTheSameBitsAloneAndInAnyBatch) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  const Layer layer(rng, dtype(), isa());
  const std::int64_t tokens = testing::scaled(131, 37);
  Tensors all(layer, tokens);
  all.fill(rng);
  all.run(layer);
  for (const std::int64_t count : {1, 2, 3, 5, 7, 8, 11, 12, 16, 17, 29, 33}) {
    Tensors some(layer, count);
    const std::int64_t first = rng.integer(0, tokens - count);
    // Turned round, so that each row lies elsewhere in its tile.
    for (std::int64_t i = 0; i < count; ++i) copy_inputs(all, first + i, some, count - 1 - i);
    some.run(layer);
    for (std::int64_t i = 0; i < count; ++i)
      ASSERT_TRUE(same_outputs(all, first + i, some, count - 1 - i))
          << "row " << first + i << " of " << count;
  }
}

TEST_P(MlaWeightsTest, ThreadsDoNotChangeTheBits) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  const Layer layer(rng, dtype(), isa());
  for (const std::int64_t tokens : {1, testing::scaled(200, 20)}) {
    Tensors one(layer, tokens), more(layer, tokens);
    one.fill(rng);
    for (std::int64_t t = 0; t < tokens; ++t) copy_inputs(one, t, more, t);
    one.run(layer, make_thread_pool(1).get());
    for (const int threads : {2, 3, 5}) {
      more.run(layer, make_thread_pool(threads).get());
      for (std::int64_t t = 0; t < tokens; ++t)
        ASSERT_TRUE(same_outputs(one, t, more, t)) << threads << " threads, row " << t;
    }
  }
}

TEST_P(MlaWeightsTest, ANanStaysInItsRow) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  const Layer layer(rng, dtype(), isa());
  const std::int64_t tokens = 21;
  Tensors clean(layer, tokens), spoilt(layer, tokens);
  clean.fill(rng);
  for (std::int64_t t = 0; t < tokens; ++t) copy_inputs(clean, t, spoilt, t);
  clean.run(layer);
  Rng nan(0);
  Tensors poison(layer, 1);
  for (HostTensor* t : poison.inputs()) t->fill([] { return kNan; });
  for (const std::int64_t row : {0, 9, 20}) copy_inputs(poison, 0, spoilt, row);
  spoilt.run(layer);
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (t == 0 || t == 9 || t == 20) {
      for (const HostTensor* out : spoilt.outputs()) EXPECT_TRUE(has_nan(*out, t)) << t;
    } else {
      EXPECT_TRUE(same_outputs(clean, t, spoilt, t)) << t;
    }
  }
}

TEST_P(MlaWeightsTest, StridedTensorsGiveTheSameBitsAndGapsStay) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  const Layer layer(rng, dtype(), isa());
  const std::int64_t tokens = 19, heads = 3, p = kDims.qk_nope_head_dim, v = kDims.v_head_dim;
  Tensors plain(layer, tokens);
  plain.fill(rng);
  plain.run(layer);
  // Latents beside rotated keys; keys and values of a head side by side; heads before tokens.
  HostTensor rows(dtype(), {tokens, kDims.cache_dim()});
  HostTensor kv(dtype(), {tokens, heads, p + v + 8});
  HostTensor turned(dtype(), {heads, tokens, kDims.kv_lora_rank});
  rows.fill([] { return kNan; });
  kv.fill_bytes(0x5a);
  turned.fill_bytes(0xff);
  const TensorView kv_c = rows.view().slice(1, 0, kDims.kv_lora_rank);
  for (std::int64_t t = 0; t < tokens; ++t)
    std::memcpy(kv_c.select(0, t).data, row_of(plain.kv_c, t), row_bytes(plain.kv_c));
  layer.weights->up_project(kv_c, kv.view().slice(2, 0, p), kv.view().slice(2, p, v));
  layer.weights->absorb_query(plain.q_nope, turned.view().permute({1, 0, 2}));
  const std::size_t size = size_of(dtype());
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto bytes = [&](const TensorView& view) {
        return static_cast<const std::byte*>(view.select(0, t).select(0, h).data);
      };
      const std::byte* at = bytes(kv.view());
      ASSERT_EQ(std::memcmp(at, bytes(plain.k_nope.view()), p * size), 0);
      ASSERT_EQ(std::memcmp(at + p * size, bytes(plain.v.view()), v * size), 0);
      ASSERT_EQ(std::memcmp(bytes(turned.view().permute({1, 0, 2})), bytes(plain.ql_nope.view()),
                            kDims.kv_lora_rank * size),
                0);
      for (std::size_t i = 0; i < 8 * size; ++i)
        ASSERT_EQ(at[static_cast<std::size_t>(p + v) * size + i], std::byte{0x5a});
    }
  }
}

TEST_P(MlaWeightsTest, SizesOfDeepSeekMatchTheOracle) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  const MlaDims dims = {512, 128, 64, 128};
  const Layer layer(rng, dtype(), isa(), 1, dims);
  const std::int64_t tokens = testing::scaled(5, 2);
  Tensors t(layer, tokens);
  t.fill(rng);
  t.run(layer);
  const oracle::KvBProj w = oracle::kv_b_proj(layer.args);
  const auto expect = [&](const HostTensor& got, const oracle::Projection& want) {
    std::size_t i = 0;
    for (std::int64_t row = 0; row < tokens; ++row)
      for (std::int64_t d = 0; d < got.view().shape[2]; ++d, ++i)
        ASSERT_NEAR(testing::get(got.view(), {row, 0, d}), want.out[i], want.bound[i]);
  };
  expect(t.k_nope, oracle::up_project_keys(w, t.kv_c));
  expect(t.v, oracle::up_project_values(w, t.kv_c));
  expect(t.ql_nope, oracle::absorb_query(w, t.q_nope));
  expect(t.out, oracle::v_up_project(w, t.latents));
}

TEST_P(MlaWeightsTest, ProductsDoNotAllocate) {
  Rng rng(9);
  const Layer layer(rng, dtype(), isa());
  Tensors t(layer, 40);
  t.fill(rng);
  const auto pool = make_thread_pool(2);
  t.run(layer, pool.get());
  const std::size_t before = testing::num_allocations();
  t.run(layer, pool.get());
  EXPECT_EQ(testing::num_allocations(), before);
}

TEST_P(MlaWeightsTest, NoRowsAreNoError) {
  Rng rng(6);
  const Layer layer(rng, dtype(), isa());
  Tensors none(layer, 0);
  EXPECT_NO_THROW(none.run(layer));
}

TEST_P(MlaWeightsTest, MatricesAreTheRowsOfTheWeight) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  const Layer layer(rng, dtype(), isa());
  const std::int64_t l = kDims.kv_lora_rank, p = kDims.qk_nope_head_dim, v = kDims.v_head_dim;
  HostTensor uk_t(dtype(), {3, p, l}), uv(dtype(), {3, l, v});
  layer.weights->copy_w_uk_t(uk_t);
  layer.weights->copy_w_uv(uv);
  const TensorView w = layer.weight.view();
  for (std::int64_t h = 0; h < 3; ++h) {
    for (std::int64_t k = 0; k < l; ++k) {
      for (std::int64_t d = 0; d < p; ++d)
        ASSERT_EQ(testing::get(uk_t.view(), {h, d, k}), testing::get(w, {h * (p + v) + d, k}));
      for (std::int64_t d = 0; d < v; ++d)
        ASSERT_EQ(testing::get(uv.view(), {h, k, d}), testing::get(w, {h * (p + v) + p + d, k}));
    }
  }
}

TEST(MlaWeightsLevel, IsTheActiveOneUnlessGiven) {
  Rng rng(8);
  Layer layer(rng, DType::bf16, IsaLevel::scalar, 1);
  EXPECT_EQ(layer.weights->isa(), IsaLevel::scalar);
  layer.args.isa.reset();
  EXPECT_EQ(MlaWeights::from_kv_b_proj(layer.args)->isa(), active_isa());
  if (cpu_info().best == IsaLevel::amx) return;
  layer.args.isa = IsaLevel::amx;
  EXPECT_THROW(MlaWeights::from_kv_b_proj(layer.args), Unsupported);
}

TEST(MlaWeightsLevel, EveryElementIsOneChainOnLevelsOfMultiplyAdds) {
  // 2^24 + 1 - 2^24 with another 1 behind: only the ascending order gives exactly 1.
  const MlaDims dims = {40, 8, 64, 8};
  HostTensor weight(DType::f32, {16, 40});
  weight.fill([] { return 1.0F; });
  HostTensor latents(DType::f32, {1, 1, 40}), out(DType::f32, {1, 1, 8});
  auto x = latents.as<float>();
  x[3] = 0x1p24F;
  x[17] = 1.0F;
  x[30] = -0x1p24F;
  x[39] = 1.0F;
  for (const IsaLevel isa : available_isa_levels()) {
    const auto weights = MlaWeights::from_kv_b_proj(
        {.weight = weight, .dims = dims, .num_heads = 1, .dtype = DType::f32, .isa = isa});
    weights->v_up_project(latents, out);
    for (const float got : out.as<float>()) EXPECT_EQ(got, 1.0F) << to_string(isa);
  }
}

}  // namespace
}  // namespace attend
