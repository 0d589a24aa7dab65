// Reads one call's DLTensors into StepArguments, and refuses what the step cannot take.
#ifndef SSU_BRIDGE_CPU_TENSOR_READER_H_
#define SSU_BRIDGE_CPU_TENSOR_READER_H_

#include "cpu/argument_rules.h"
#include "cpu/step_arguments.h"

namespace ssu_bridge {

// Fills in everything that the tensors' metadata tell; it reads no element. Raises ValueError for what core/shapes.py
// and core/validate.py refuse too: a device, type, shape or layout.
void read_tensors(const CallTensors& tensors, const CallRules& rules, StepArguments& arguments);
// Reads the seed, if there is one, after the check.
void read_seed(const CallTensors& tensors, StepArguments& arguments);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_TENSOR_READER_H_
