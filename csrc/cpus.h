// CPUs that this process may use.
#pragma once

#include <string>

namespace looped_fast {

// CPUs' worth of time that the control groups of this process grant it (version 1 and 2; all of
// its groups up to the root), infinity without a limit. Reads below the folder `root`, which is ""
// but in tests. A file that is missing or makes no sense limits nothing.
double cgroup_quota(const std::string& root);

// CPUs that the calling thread may use at a time: those of its affinity, at most the quota rounded
// up. The quota is read once a second at most.
int usable_cpus();

}  // namespace looped_fast
