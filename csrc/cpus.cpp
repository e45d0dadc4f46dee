#include "cpus.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <sstream>

namespace looped_fast {

namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

double quota(double microseconds, double period) {
  return microseconds > 0 && period > 0 ? microseconds / period : kUnlimited;
}

// Version 2: "max 100000" or "150000 100000".
double quota_of_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double microseconds, period;
  return file >> microseconds >> period ? quota(microseconds, period) : kUnlimited;
}

// Version 1: a file each; -1 is no limit.
double quota_of_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  double microseconds, period;
  return quota_file >> microseconds && period_file >> period ? quota(microseconds, period)
                                                             : kUnlimited;
}

// The least quota of a group and of those above it. A container may see its own group as the root,
// under a path that leads nowhere.
double least_quota(const std::string& mount, std::string group,
                   double (*quota_of)(const std::string&)) {
  double least = quota_of(mount);
  for (; group.size() > 1; group.resize(group.rfind('/'))) {
    least = std::min(least, quota_of(mount + group));
  }
  return least;
}

}  // namespace

double cgroup_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  const std::string mounts = root + "/sys/fs/cgroup";
  double least = kUnlimited;
  for (std::string line; std::getline(groups, line);) {
    // "0::/group" in version 2, "4:cpu,cpuacct:/group" in version 1
    std::istringstream fields(line);
    std::string hierarchy, controllers, group;
    std::getline(fields, hierarchy, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, group);
    if (group.empty() || group[0] != '/') continue;
    if (controllers.empty()) {
      least = std::min(least, least_quota(mounts, group, quota_of_v2));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      for (const std::string& mount : {mounts + "/cpu", mounts + "/" + controllers}) {
        least = std::min(least, least_quota(mount, group, quota_of_v1));
      }
    }
  }
  return least;
}

int usable_cpus() {
  using Clock = std::chrono::steady_clock;
  static std::atomic<int64_t> next_read{0};  // ticks of Clock
  static std::atomic<int> by_quota{0};
  const int64_t now = Clock::now().time_since_epoch().count();
  if (now >= next_read.load(std::memory_order_acquire)) {
    const double cpus = std::ceil(cgroup_quota(""));
    by_quota.store(static_cast<int>(std::min(cpus, 1e9)), std::memory_order_relaxed);
    const int64_t second = Clock::duration(std::chrono::seconds(1)).count();
    next_read.store(now + second, std::memory_order_release);
  }
  // OpenMP's count is that of the affinity as it is now; where OpenMP itself binds each thread to a
  // CPU (OMP_PROC_BIND), it is the count of all of them.
  return std::min(omp_get_num_procs(), by_quota.load(std::memory_order_relaxed));
}

}  // namespace looped_fast
