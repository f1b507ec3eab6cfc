// The number of threads that a call may use: torch's, but no more than the processors that this process may run on now.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif

namespace rnnorm {

// Threads that share a core wait for each other at every step.
inline int available_threads() {
  int threads = at::get_num_threads();
#if defined(__linux__)
  // Where OpenMP binds threads to cores, the mask of the calling thread is only its own.
  cpu_set_t mask;
  if (omp_get_proc_bind() == omp_proc_bind_false && sched_getaffinity(0, sizeof(mask), &mask) == 0)
    threads = std::min(threads, CPU_COUNT(&mask));
  static const double quota = [] {
    double found = std::numeric_limits<double>::infinity(), part = 0, period = 0;
    const std::string root = "/sys/fs/cgroup/";
    for (const std::string path : {"", "cpu/"}) {
      // cgroup v2: "max 100000" or "150000 100000"; v1: two files, -1 without a limit.
      if (std::ifstream(root + path + "cpu.max") >> part >> period && period > 0) found = std::min(found, part / period);
      if (std::ifstream(root + path + "cpu.cfs_quota_us") >> part && part > 0 &&
          std::ifstream(root + path + "cpu.cfs_period_us") >> period && period > 0)
        found = std::min(found, part / period);
    }
    return found;
  }();
  if (quota < threads) threads = std::max(1, static_cast<int>(std::lround(quota)));
#endif
  return threads;
}

}  // namespace rnnorm
