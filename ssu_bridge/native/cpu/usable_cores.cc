#include "cpu/usable_cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace ssu_bridge {
namespace {

int scheduled_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// The quota that a container's control group sets on processor time, in cores; infinite where there is none.
double quota_in_cores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (file >> quota >> period && quota != "max" && period > 0) return std::atof(quota.c_str()) / period;
  return INFINITY;
}

}  // namespace

int usable_cores() {
  double cores = std::min<double>(scheduled_cores(), std::ceil(quota_in_cores()));
  return std::max(1, static_cast<int>(cores));
}

}  // namespace ssu_bridge
