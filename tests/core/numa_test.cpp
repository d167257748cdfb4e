// SPDX-License-Identifier: Apache-2.0
#include "attend/core/numa.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <algorithm>

#include "core/affinity.h"
#include "support/temp_folder.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::TempFolder;

// A made-up /sys/devices/system/node.
struct FakeNodes {
  TempFolder folder;
  void add(const std::string& number, const std::string& cpus, const std::string& memory) const {
    folder.write("node" + number + "/cpulist", cpus);
    folder.write("node" + number + "/meminfo", memory);
  }
  static std::string meminfo(const std::string& kib) {
    return "Node 0 MemTotal:       " + kib + " kB\nNode 0 MemFree:        12 kB\n";
  }
  NumaTopology read() const { return read_numa_topology(folder.path()); }
};

TEST(NumaTopology, OneNode) {
  FakeNodes fake;
  fake.add("0", "0-3\n", FakeNodes::meminfo("2048"));
  fake.folder.write("possible", "0\n");
  const NumaTopology t = fake.read();
  EXPECT_EQ(t.problem, "");
  ASSERT_EQ(t.nodes.size(), 1U);
  EXPECT_EQ(t.nodes[0].id, 0);
  EXPECT_THAT(t.nodes[0].cpus, ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(t.nodes[0].memory_bytes, 2 << 20);
}

TEST(NumaTopology, NodesAscendWithGapsInTheirNumbers) {
  FakeNodes fake;
  fake.add("10", "1,3,8-9\n", FakeNodes::meminfo("4"));
  fake.add("2", "0,2,4-7", FakeNodes::meminfo("8"));
  const NumaTopology t = fake.read();
  ASSERT_EQ(t.nodes.size(), 2U) << t.problem;
  EXPECT_EQ(t.nodes[0].id, 2);
  EXPECT_THAT(t.nodes[0].cpus, ElementsAre(0, 2, 4, 5, 6, 7));
  EXPECT_EQ(t.nodes[1].id, 10);
  EXPECT_THAT(t.nodes[1].cpus, ElementsAre(1, 3, 8, 9));
}

TEST(NumaTopology, NodesWithoutCpusAndWithoutMemory) {
  FakeNodes fake;
  fake.add("0", "0-1\n", FakeNodes::meminfo("0"));
  fake.add("1", "\n", FakeNodes::meminfo("16"));
  const NumaTopology t = fake.read();
  ASSERT_EQ(t.nodes.size(), 2U) << t.problem;
  EXPECT_EQ(t.nodes[0].memory_bytes, 0);
  EXPECT_THAT(t.nodes[1].cpus, IsEmpty());
  EXPECT_EQ(t.nodes[1].memory_bytes, 16 << 10);
}

TEST(NumaTopology, OtherNamesAreNoNodes) {
  FakeNodes fake;
  fake.add("0", "0\n", FakeNodes::meminfo("4"));
  for (const char* name : {"", "x", "0x", "-1", "99999999999999999999", "4096"})
    fake.add(name, "garbage", "garbage");
  EXPECT_EQ(fake.read().nodes.size(), 1U) << fake.read().problem;
}

TEST(NumaTopology, AListOfCpusThatCannotBeUnderstoodLeavesNothingKnown) {
  for (const char* cpus : {"x", "0-", "-3", "3-1", "1,1", "2,1", "0,,1", "0,", ",", "0-1-2", "0 1",
                           "65536", "0-99999999999", "0-4294967296", "+1", "0x1"}) {
    SCOPED_TRACE(cpus);
    FakeNodes fake;
    fake.add("0", "0\n", FakeNodes::meminfo("4"));
    fake.add("1", cpus, FakeNodes::meminfo("4"));
    const NumaTopology t = fake.read();
    EXPECT_THAT(t.nodes, IsEmpty());
    EXPECT_THAT(t.problem, HasSubstr("node1/cpulist"));
  }
}

TEST(NumaTopology, MemoryThatCannotBeUnderstoodLeavesNothingKnown) {
  for (const char* text : {"", "Node 0 MemTotal: 12", "Node 0 MemTotal: -1 kB",
                           "Node 0 MemTotal: 99999999999999999 kB", "MemTotal 4 kB"}) {
    SCOPED_TRACE(text);
    FakeNodes fake;
    fake.add("0", "0\n", text);
    const NumaTopology t = fake.read();
    EXPECT_THAT(t.nodes, IsEmpty());
    EXPECT_THAT(t.problem, HasSubstr("node0/meminfo"));
  }
}

TEST(NumaTopology, ACpuOfTwoNodesLeavesNothingKnown) {
  FakeNodes fake;
  fake.add("0", "0-2\n", FakeNodes::meminfo("4"));
  fake.add("1", "2-3\n", FakeNodes::meminfo("4"));
  EXPECT_THAT(fake.read().nodes, IsEmpty());
  EXPECT_THAT(fake.read().problem, HasSubstr("CPU 2"));
}

TEST(NumaTopology, FilesThatAreNoneOrTooLargeLeaveNothingKnown) {
  EXPECT_THAT(read_numa_topology("/nonexistent/node").problem, HasSubstr("No such file"));
  EXPECT_EQ(FakeNodes().read().problem, "no nodes");
  FakeNodes missing;
  missing.folder.write("node0/cpulist", "0\n");
  EXPECT_THAT(missing.read().problem, HasSubstr("node0/meminfo"));
  FakeNodes large;
  large.add("0", std::string((1 << 20) + 1, ' '), FakeNodes::meminfo("4"));
  EXPECT_THAT(large.read().problem, HasSubstr("more than"));
  FakeNodes pipe;
  pipe.folder.write("node0/meminfo", FakeNodes::meminfo("4"));
  ASSERT_EQ(mkfifo((pipe.folder.path() / "node0/cpulist").c_str(), 0600), 0);
  EXPECT_THAT(pipe.read().problem, HasSubstr("not a regular file"));
}

TEST(NumaTopology, OfThisMachineHasTheCpusOfThisThread) {
  const NumaTopology& t = numa_topology();
  if (t.nodes.empty()) GTEST_SKIP() << t.problem;
  for (const int cpu : thread_cpus()) {
    EXPECT_TRUE(std::ranges::any_of(t.nodes, [&](const NumaNode& n) {
      return std::ranges::binary_search(n.cpus, cpu);
    })) << cpu;
  }
}

}  // namespace
}  // namespace attend
