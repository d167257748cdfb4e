// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "attend/cache/value_scales.h"
#include "attend/core/error.h"
#include "support/temp_folder.h"

namespace attend {
namespace {

using ::testing::HasSubstr;

// A file of its own for each test.
class ValueScalesFileTest : public ::testing::Test {
 protected:
  std::string path() const { return path_.string(); }

  std::string bytes() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const std::string& content) const {
    std::ofstream(path_, std::ios::binary) << content;
  }
  // Header with its length, then `data`.
  void write(const std::string& header, const std::string& data) const {
    const std::uint64_t length = header.size();
    write(std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
  }

  // What load says about the file, without what it expected.
  std::string complaint() const {
    try {
      ValueScales::load(path());
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "ValueScales::load");
      EXPECT_EQ(e.argument(), "path");
      const std::string text = e.what();
      EXPECT_THAT(text, HasSubstr("got " + path() + ": "));
      return text.substr(text.find("expected "), text.find(", got ") - text.find("expected ")) +
             "|" + text.substr(text.find(path()) + path().size() + 2);
    }
    return "accepted";
  }

  const testing::TempFolder folder_;
  const std::filesystem::path path_ = folder_.path() / "scales";
};

constexpr const char* kMeta = R"("__metadata__":{"kind":"attend.value_scale","version":"1"})";

// A tensor entry of [1, 2] numbers.
std::string entry(const std::string& name, int begin, int end, const std::string& shape = "[1,2]",
                  const std::string& dtype = "F32") {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape +
         R"(,"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

std::string header_of(const std::vector<std::string>& parts) {
  std::string text = "{" + std::string(kMeta);
  for (const std::string& p : parts) text += "," + p;
  return text + "}";
}

std::string floats(std::initializer_list<float> values) {
  std::string text;
  for (const float v : values) text.append(reinterpret_cast<const char*>(&v), sizeof v);
  return text;
}

const std::string kLayer0 = "layers.0.value_scale", kLayer1 = "layers.1.value_scale";

TEST_F(ValueScalesFileTest, RoundTrip) {
  ValueScales s{.num_layers = 12, .num_kv_heads = 2, .head_size = 3, .scales = {}};
  for (int i = 0; i < 72; ++i) s.scales.push_back(0.1F * static_cast<float>(i) + 1e-6F);
  s.save(path());
  const ValueScales got = ValueScales::load(path());
  EXPECT_EQ(got.num_layers, 12);
  EXPECT_EQ(got.num_kv_heads, 2);
  EXPECT_EQ(got.head_size, 3);
  EXPECT_EQ(got.scales, s.scales);
  EXPECT_FALSE(std::filesystem::exists(path() + ".partial"));
  s.scales[0] = 9.0F;
  s.save(path());
  EXPECT_EQ(ValueScales::load(path()).scales[0], 9.0F) << "an older file is replaced";
}

TEST_F(ValueScalesFileTest, TheBytesAreThoseOfTheFormat) {
  ValueScales{.num_layers = 1, .num_kv_heads = 1, .head_size = 2, .scales = {0.5F, 2.0F}}.save(
      path());
  std::string header =
      header_of({R"("layers.0.value_scale":{"data_offsets":[0,8],"dtype":"F32","shape":[1,2]})"});
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string got = bytes();
  write(header, floats({0.5F, 2.0F}));
  EXPECT_EQ(got, bytes());
}

TEST_F(ValueScalesFileTest, TensorsMayLieInAnyOrder) {
  write(header_of({entry(kLayer0, 8, 16), entry(kLayer1, 0, 8)}), floats({3, 4, 1, 2}));
  EXPECT_EQ(ValueScales::load(path()).scales, (std::vector<float>{1, 2, 3, 4}));
}

TEST_F(ValueScalesFileTest, SaveRefusesWhatLoadWouldRefuse) {
  ValueScales s{.num_layers = 1, .num_kv_heads = 1, .head_size = 2, .scales = {1, 1}};
  const auto refused = [&](auto change) {
    ValueScales bad = s;
    change(bad);
    EXPECT_THROW(bad.save(path()), InvalidArgument);
    EXPECT_FALSE(std::filesystem::exists(path_));
  };
  refused([](auto& b) { b.num_layers = 0; });
  refused([](auto& b) { b.num_layers = 2; });
  refused([](auto& b) { b.num_kv_heads = -1; });
  refused([](auto& b) { b.head_size = 3; });
  for (const float x : {0.0F, -1.0F, std::numeric_limits<float>::infinity(),
                        std::numeric_limits<float>::quiet_NaN()}) {
    refused([&](auto& b) { b.scales[1] = x; });
  }
  EXPECT_THROW(s.save(path() + "/no/such/folder"), DeviceError);
}

TEST_F(ValueScalesFileTest, FilesThatAreNone) {
  EXPECT_EQ(complaint(), "expected a regular file|No such file or directory");
  std::filesystem::create_directory(path_);
  EXPECT_EQ(complaint(), "expected a regular file|something else");
}

TEST_F(ValueScalesFileTest, HeaderLengths) {
  write("");
  EXPECT_EQ(complaint(), "expected 8 bytes with the length of the header|a file of 0 bytes");
  write("1234567");
  EXPECT_EQ(complaint(), "expected 8 bytes with the length of the header|a file of 7 bytes");
  write(std::string("\x03\0\0\0\0\0\0\0{}", 10));
  EXPECT_EQ(complaint(), "expected a header inside the file|a header of 3 bytes in a file of 10");
  write(std::string(8, '\xff') + "{}");
  EXPECT_EQ(
      complaint(),
      "expected a header inside the file|a header of 18446744073709551615 bytes in a file of 10");
  write(std::string((1 << 20) + 1, ' '), "");
  EXPECT_EQ(complaint(), "expected a header of at most 1 MiB|1048577 bytes");
  write("", "");
  EXPECT_THAT(complaint(), HasSubstr("expected a JSON header|"));
}

TEST_F(ValueScalesFileTest, EveryTruncationIsRefused) {
  write(header_of({entry(kLayer0, 0, 8), entry(kLayer1, 8, 16)}), floats({1, 2, 3, 4}));
  ASSERT_EQ(complaint(), "accepted");
  const std::string whole = bytes();
  for (std::size_t n = 0; n < whole.size(); ++n) {
    write(whole.substr(0, n));
    ASSERT_NE(complaint(), "accepted") << n;
  }
  write(whole + "x");
  EXPECT_EQ(complaint(), "expected a file that ends with its last tensor|1 more bytes");
}

// Single wrong bytes: refused or harmless, but never more than an InvalidArgument.
TEST_F(ValueScalesFileTest, EveryByteMayBeWrong) {
  write(header_of({entry(kLayer0, 0, 8)}), floats({1, 2}));
  const std::string whole = bytes();
  int refused = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const char flip : {'\x01', '\x10', '\x80'}) {
      std::string bad = whole;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      write(bad);
      refused += complaint() != "accepted" ? 1 : 0;
    }
  }
  EXPECT_GT(refused, static_cast<int>(2 * whole.size()));
}

TEST_F(ValueScalesFileTest, HeadersThatAreNone) {
  const auto says = [&](const std::string& header) {
    write(header, floats({1, 2}));
    return complaint();
  };
  EXPECT_THAT(says("{\"a\":"), HasSubstr("expected a JSON header|"));
  EXPECT_THAT(says("\"" + std::string(5000, 'x')), HasSubstr("expected a JSON header|"));
  EXPECT_LT(says("\"" + std::string(5000, 'x')).size(), 300U);
  EXPECT_EQ(says("[1]"), "expected a JSON object as the header|[1]");
  EXPECT_THAT(says(" {}"), HasSubstr("expected a JSON object as the header|"));
  EXPECT_EQ(says(std::string(100000, '[')), "expected a header of at most 4 levels|a deeper one");
  EXPECT_THAT(says("{\"\xff\":1}"), HasSubstr("expected a JSON header|"));
  EXPECT_EQ(says(header_of({entry(kLayer0, 0, 8), entry(kLayer0, 0, 8)})),
            "expected names that differ|'layers.0.value_scale' twice");
  EXPECT_EQ(says(header_of({R"("layers.0.value_scale":{"dtype":"F32","dtype":"F32"})"})),
            "expected names that differ|'dtype' twice");
}

TEST_F(ValueScalesFileTest, Metadata) {
  const auto says = [&](const std::string& meta) {
    write("{" + meta + entry(kLayer0, 0, 8) + "}", floats({1, 2}));
    return complaint();
  };
  EXPECT_EQ(says(""), "expected metadata kind \"attend.value_scale\"|none");
  EXPECT_EQ(says(R"("__metadata__":7,)"), "expected __metadata__ with strings only|7");
  EXPECT_EQ(says(R"("__metadata__":{"kind":1},)"),
            R"(expected __metadata__ with strings only|{"kind":1})");
  EXPECT_EQ(says(R"("__metadata__":{"kind":"x"},)"),
            R"(expected metadata kind "attend.value_scale"|"x")");
  EXPECT_EQ(says(R"("__metadata__":{"kind":"attend.value_scale"},)"),
            R"(expected metadata version "1"|none)");
  EXPECT_EQ(says(R"("__metadata__":{"kind":"attend.value_scale","version":"2"},)"),
            R"(expected metadata version "1"|"2")");
}

TEST_F(ValueScalesFileTest, Entries) {
  const auto says = [&](const std::string& part) {
    write(header_of({part}), floats({1, 2}));
    return complaint();
  };
  EXPECT_EQ(says("\"layers.0.value_scale\":3"),
            "expected tensors with dtype, shape and data_offsets|3 for 'layers.0.value_scale'");
  EXPECT_EQ(
      says(R"("x":{"dtype":"F32","shape":[1,2]})"),
      R"(expected tensors with dtype, shape and data_offsets|{"dtype":"F32","shape":[1,2]} for 'x')");
  EXPECT_EQ(says(entry(kLayer0, 0, 8, "[1,2]", "F16")),
            "expected dtype \"F32\"|\"F16\" for 'layers.0.value_scale'");
  EXPECT_THAT(says(R"("x":{"dtype":"F32","shape":[-1,2],"data_offsets":[0,8]})"),
              HasSubstr("expected lists of whole numbers >= 0|shape [-1,2]"));
  EXPECT_THAT(says(R"("x":{"dtype":"F32","shape":{"a":1},"data_offsets":[0,8]})"),
              HasSubstr("expected lists of whole numbers >= 0|shape"));
  EXPECT_THAT(says(R"("x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8.0]})"),
              HasSubstr("expected lists of whole numbers >= 0|data_offsets"));
  EXPECT_THAT(says(R"("x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8,9]})"),
              HasSubstr("expected data_offsets [begin, end] in ascending order|"));
  EXPECT_THAT(says(entry(kLayer0, 8, 0)),
              HasSubstr("expected data_offsets [begin, end] in ascending order|"));
  EXPECT_EQ(
      says(entry(kLayer0, 0, 8, "[3,1]")),
      "expected a shape that fits its data_offsets|[3,1] in 8 bytes for 'layers.0.value_scale'");
  // Products that wrap around to 8.
  for (const char* shape : {"[4294967297,4611686018427387906]", "[18446744073709551615,2]",
                            "[9223372036854775809,2]", "[4611686018427387905,2]"}) {
    EXPECT_THAT(says(entry(kLayer0, 0, 8, shape)),
                HasSubstr("expected a shape that fits its data_offsets|"))
        << shape;
  }
}

TEST_F(ValueScalesFileTest, PlacesOfData) {
  const auto says = [&](const std::vector<std::string>& parts) {
    write(header_of(parts), floats({1, 2, 3, 4}));
    return complaint();
  };
  EXPECT_EQ(
      says({entry(kLayer0, 0, 8), entry(kLayer1, 12, 20)}),
      "expected tensors inside the file|'layers.1.value_scale' at [12, 20), after 8, of 16 bytes "
      "of data");
  EXPECT_THAT(says({entry(kLayer0, 0, 8), entry(kLayer1, 4, 12)}),
              HasSubstr("expected tensors that do not overlap|'layers.1.value_scale'"));
  EXPECT_THAT(says({entry(kLayer0, 0, 8), entry(kLayer1, 0, 8)}),
              HasSubstr("expected tensors that do not overlap|"));
  EXPECT_THAT(says({entry(kLayer0, 4, 12)}), HasSubstr("expected tensors without gaps|"));
  EXPECT_EQ(says({entry(kLayer0, 0, 8)}),
            "expected a file that ends with its last tensor|8 more bytes");
  EXPECT_THAT(says({R"("x":{"dtype":"F32","shape":[1,2],)"
                    R"("data_offsets":[18446744073709551607,18446744073709551615]})"}),
              HasSubstr("expected tensors inside the file|"));
}

TEST_F(ValueScalesFileTest, LayersAndShapes) {
  const auto says = [&](const std::vector<std::string>& parts, const std::string& data) {
    write(header_of(parts), data);
    return complaint();
  };
  const std::string four = floats({1, 2, 3, 4});
  EXPECT_EQ(says({}, ""), "expected at least one layer|no tensor");
  for (const char* name : {"layers.1.value_scale", "layers.00.value_scale", "layers.-1.value_scale",
                           "layers..value_scale", "layers.0.value_scales", "layer", "",
                           "layers.99999999999999999999.value_scale"}) {
    EXPECT_EQ(says({entry(name, 0, 8)}, floats({1, 2})),
              "expected tensors layers.N.value_scale, N from 0 to one less than their number|'" +
                  std::string(name) + "' among 1");
  }
  EXPECT_EQ(says({entry(kLayer0, 0, 8, "[2]")}, floats({1, 2})),
            "expected shapes of two sizes >= 1|1 dimensions [2] for 'layers.0.value_scale'");
  EXPECT_EQ(says({entry(kLayer0, 0, 0, "[0,2]")}, ""),
            "expected shapes of two sizes >= 1|2 dimensions [0, 2] for 'layers.0.value_scale'");
  EXPECT_EQ(
      says({entry(kLayer0, 0, 8), entry(kLayer1, 8, 16, "[2,1]")}, four),
      "expected the same shape for all layers|2 dimensions [2, 1] for 'layers.1.value_scale'");
  EXPECT_EQ(says({entry(kLayer0, 0, 8)}, floats({1, 0})),
            "expected finite scales above 0|0 at index 1 of 'layers.0.value_scale'");
  EXPECT_THAT(says({entry(kLayer0, 0, 8)}, floats({-1, 1})), HasSubstr("above 0|-1 at index 0"));
  EXPECT_THAT(says({entry(kLayer0, 0, 8)}, floats({std::numeric_limits<float>::quiet_NaN(), 1})),
              HasSubstr("above 0|nan at index 0"));
}

}  // namespace
}  // namespace attend
