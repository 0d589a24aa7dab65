#ifndef SSU_BRIDGE_CPU_USABLE_CORES_H_
#define SSU_BRIDGE_CPU_USABLE_CORES_H_

namespace ssu_bridge {

// The cores that this process may keep busy: those it may be scheduled on, or fewer where its container has a quota.
int usable_cores();

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_USABLE_CORES_H_
