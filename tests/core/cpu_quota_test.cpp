// SPDX-License-Identifier: Apache-2.0
#include "core/cpu_quota.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include "attend/core/executor.h"
#include "support/temp_folder.h"

namespace attend {
namespace {

namespace fs = std::filesystem;

// A made-up root folder with /proc/self/cgroup and /sys/fs/cgroup.
class CpuQuotaTest : public ::testing::Test {
 protected:
  void write(const std::string& path, const std::string& text) const { folder_.write(path, text); }

  const testing::TempFolder folder_;
  const fs::path& root_ = folder_.path();
};

TEST_F(CpuQuotaTest, NoFilesNoLimit) { EXPECT_EQ(cgroup_cpu_limit(root_), std::nullopt); }

TEST_F(CpuQuotaTest, Version2RoundsUp) {
  write("proc/self/cgroup", "0::/\n");
  write("sys/fs/cgroup/cpu.max", "150000 100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), 2);
  write("sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), 1);
  write("sys/fs/cgroup/cpu.max", "400000 100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), 4);
}

TEST_F(CpuQuotaTest, Version2MaxIsNoLimit) {
  write("proc/self/cgroup", "0::/\n");
  write("sys/fs/cgroup/cpu.max", "max 100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), std::nullopt);
}

TEST_F(CpuQuotaTest, AncestorsCount) {
  write("proc/self/cgroup", "0::/outer/inner\n");
  write("sys/fs/cgroup/outer/cpu.max", "300000 100000\n");
  write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), 3);
  write("sys/fs/cgroup/outer/inner/cpu.max", "200000 100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), 2);
}

TEST_F(CpuQuotaTest, Version1) {
  write("proc/self/cgroup", "5:memory:/a\n3:cpu,cpuacct:/docker/x\n1:cpuset:/b\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), 3);
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), std::nullopt);
}

TEST_F(CpuQuotaTest, GarbageIsNoLimit) {
  write("proc/self/cgroup", "nonsense\n0::/\n");
  write("sys/fs/cgroup/cpu.max", "many 0\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), std::nullopt);
  write("sys/fs/cgroup/cpu.max", "100000 0\n");
  EXPECT_EQ(cgroup_cpu_limit(root_), std::nullopt);
}

TEST(AvailableCpusTest, FollowsTheAffinityMask) {
  EXPECT_GE(available_cpus(), 1);
  cpu_set_t old;
  ASSERT_EQ(sched_getaffinity(0, sizeof(old), &old), 0);
  EXPECT_LE(available_cpus(), CPU_COUNT(&old));
  int first = 0;
  while (!CPU_ISSET(first, &old)) ++first;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  const int cpus = available_cpus();
  ASSERT_EQ(sched_setaffinity(0, sizeof(old), &old), 0);
  EXPECT_EQ(cpus, 1);
}

}  // namespace
}  // namespace attend
