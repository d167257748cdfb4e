// SPDX-License-Identifier: Apache-2.0
// Rows of the format fp8_ds_v4: their bytes, what reading makes of them, and attention to them.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"
#include "attend/core/error.h"
#include "attend/core/float_types.h"
#include "attend/ops/mla_cache.h"
#include "attend/oracle/quantize.h"
#include "sparse_batch.h"

namespace attend::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(RowFormats, AreFoundByTheSizeOfTheirRows) {
  EXPECT_EQ(find_row_format(656), &fp8_ds_mla::kFormat);
  EXPECT_EQ(find_row_format(584), &fp8_ds_v4::kFormat);
  EXPECT_EQ(find_row_format(576), nullptr);
  EXPECT_EQ(row_formats().size(), 2U);
  EXPECT_EQ(describe_row_formats(), "656 bytes (fp8_ds_mla) or 584 bytes (fp8_ds_v4)");
  EXPECT_EQ(row_dim(fp8_ds_v4::kFormat), 512);
}

// Two blocks of three tokens, 16 bytes apart; token `slot` has the given latent.
struct Written {
  static constexpr std::int64_t kBlock = 3 * 584 + 16;
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(2 * kBlock, 0x5A);

  TensorView cache() {
    TensorView view(bytes.data(), DType::u8, {2, 3, 584});
    view.strides[0] = kBlock;
    return view;
  }
  void write(std::int64_t slot, const std::vector<float>& latent) {
    HostTensor kv_c(DType::bf16, {1, 448}), k_pe(DType::bf16, {1, 64});
    for (std::size_t i = 0; i < latent.size(); ++i) kv_c.as<bf16>()[i] = to_bf16(latent[i]);
    for (std::size_t i = 0; i < 64; ++i)
      k_pe.as<bf16>()[i].bits = static_cast<std::uint16_t>(0x7F80 + i);
    concat_and_cache_mla({kv_c, k_pe, cache(), ConstTensorView(&slot, DType::i64, {1})});
  }
};

// Every byte of the block, made by hand.
TEST(Fp8DsV4, WritesTheBytesOfTheFormat) {
  std::vector<float> latent(448, 0.0F);
  std::vector<std::uint8_t> expected(2 * Written::kBlock, 0x5A);
  const std::size_t row = Written::kBlock + 2 * 576, scales = Written::kBlock + 3 * 576 + 2 * 8;
  for (std::size_t i = 0; i < 448; ++i) expected[row + i] = 0;
  const auto set = [&](std::size_t at, float x, int code) {
    latent[at] = x;
    expected[row + at] = static_cast<std::uint8_t>(code);
  };
  // 448 fits the scale 1; one more step of bf16 needs 2.
  set(0, 448.0F, 0x7E), set(1, -1.0F, 0xB8), set(63, -0.0F, 0x80);
  set(64, 450.0F, 0x76), set(65, 1.0F, 0x30);
  // 1 / 448 lies between 2^-9 and 2^-8.
  set(128, 1.0F, 0x78), set(129, kInf, 0x7F), set(130, -kInf, 0xFF);
  // Zeros, and what is so small that the floor of amax counts: 1e-4 / 448 is above 2^-23.
  set(256, 0x1p-22F, 0x38), set(257, -0x1p-28F, 0x88);
  set(384, std::numeric_limits<float>::quiet_NaN(), 0x7F);
  set(447, 0x1p100F, 0x78);
  const int exponents[] = {127, 128, 119, 105, 105, 105, 219};
  for (std::size_t t = 0; t < 7; ++t)
    expected[scales + t] = static_cast<std::uint8_t>(exponents[t]);
  expected[scales + 7] = 0;
  for (std::size_t i = 0; i < 64; ++i) {
    const auto bits = static_cast<std::uint16_t>(0x7F80 + i);
    std::memcpy(&expected[row + 448 + 2 * i], &bits, 2);
  }
  Written got;
  got.write(5, latent);
  for (std::size_t i = 0; i < expected.size(); ++i)
    ASSERT_EQ(got.bytes[i], expected[i]) << "byte " << i << ", " << i - row << " of the row";
}

TEST(Fp8DsV4, EveryCodeAndScaleIsReadAsTheOracleSays) {
  std::vector<std::uint8_t> block(2 * 584);
  const std::vector<std::int32_t> table = {0}, starts = {0};
  for (int first = 0; first < 256; first += 7) {
    for (std::size_t token = 0; token < 2; ++token) {
      for (std::size_t i = 0; i < 448; ++i)
        block[576 * token + i] = static_cast<std::uint8_t>(i + token);
      for (std::size_t t = 0; t < 7; ++t)
        block[2 * 576 + 8 * token + t] = static_cast<std::uint8_t>(first + static_cast<int>(t));
    }
    const ConstTensorView cache(block.data(), DType::u8, {1, 2, 584});
    HostTensor dst(DType::bf16, {2, 512});
    cp_gather_and_upconvert_fp8_kv_cache({cache, dst,
                                          ConstTensorView(table.data(), DType::i32, {1, 1}),
                                          ConstTensorView(starts.data(), DType::i32, {1})});
    for (std::int64_t token = 0; token < 2; ++token) {
      const std::vector<double> wanted = oracle::coded_row(cache, 0, token);
      for (std::int64_t d = 0; d < 512; ++d) {
        const bf16 want = to_bf16(static_cast<float>(wanted[static_cast<std::size_t>(d)]));
        ASSERT_EQ(dst.as<bf16>()[static_cast<std::size_t>(token * 512 + d)].bits, want.bits)
            << "element " << d << " scales from " << first;
      }
    }
  }
}

TEST(Fp8DsV4, AWrittenTokenComesBackWithinHalfAStepOfItsCodes) {
  Rng rng(11);
  SCOPED_TRACE(rng.trace());
  std::vector<float> latent(448);
  for (float& x : latent) x = rng.uniform(-3.0F, 3.0F);
  Written written;
  written.write(4, latent);
  const std::vector<double> got = oracle::coded_row(written.cache(), 1, 1);
  for (std::size_t i = 0; i < 448; ++i) {
    const double x = to_f32(to_bf16(latent[i]));
    // Scale 2^-7: half a step is 2^-4 of the number, or of the smallest normal one.
    EXPECT_NEAR(got[i], x, std::max(std::abs(x), 0x1p-13) * 0x1p-4) << i;
  }
}

TEST(Fp8DsV4, RowsThatAreNoRunOfBytesAreNotCopiedAsSuch) {
  const std::vector<std::int32_t> table = {0}, cu = {0, 2};
  HostTensor cache(DType::u8, {1, 2, 584}), dst(DType::u8, {2, 584});
  try {
    cp_gather_cache({cache, dst, ConstTensorView(table.data(), DType::i32, {1, 1}),
                     ConstTensorView(cu.data(), DType::i32, {2})});
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "src_cache") << e.what();
  }
}

LatentOptions options_of(int heads, int block_size) {
  LatentOptions o;
  o.cache = DType::u8;
  o.dim = 512;
  o.heads = heads;
  o.block_size = block_size;
  o.placement = 3;
  o.causal = false;
  return o;
}

class Fp8DsV4Attention : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(Fp8DsV4Attention, IsThatToTheBf16RowsThatTheGatherMakes) {
  for (const int heads : {1, 16, 20, 128}) {
    for (const int block_size : {1, 16, 64}) {
      LatentBatch coded(options_of(heads, block_size), {{0, 700, 1}, {1, 1, 1}, {2, 256, 1}});
      const LatentBatch::Rows wanted = upconverted(coded).run(nullptr, GetParam());
      EXPECT_EQ(coded.run(nullptr, GetParam()), wanted) << heads << " heads, dense";
      EXPECT_EQ(SparseBatch(coded, 1300).run(nullptr, GetParam()), wanted) << heads << " heads";
    }
  }
}

TEST_P(Fp8DsV4Attention, BlocksMayLieApart) {
  LatentBatch batch(options_of(4, 16), {{0, 300, 1}, {1, 20, 1}});
  SparseBatch sparse(batch, 320);
  const LatentBatch::Rows wanted = sparse.run(nullptr, GetParam());
  const std::int64_t blocks = batch.cache.view().shape[0];
  // As FlashMLA pads a block, to a multiple of 576 bytes, and by an odd number.
  for (const std::int64_t stride : {std::int64_t{17 * 576}, std::int64_t{16 * 584 + 7}}) {
    HostTensor memory(DType::u8, {blocks * stride});
    memory.fill_bytes(0xff);
    TensorView apart = batch.cache;
    apart.data = memory.view().data;
    apart.strides[0] = stride;
    for (std::int64_t b = 0; b < blocks; ++b)
      std::memcpy(apart.select(0, b).data, batch.cache.view().select(0, b).data, 16 * 584);
    SparseMlaArgs a = sparse.args();
    a.kv_cache = apart;
    batch.out.fill_bytes(0xff);
    sparse_mla_attention(a, nullptr, GetParam());
    EXPECT_EQ(batch.rows(), wanted);
    MlaDecodeArgs dense = batch.args();
    dense.kv_cache = apart;
    batch.out.fill_bytes(0xff);
    mla_decode(dense, nullptr, GetParam());
    EXPECT_EQ(batch.rows(), wanted);
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Fp8DsV4Attention, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing
