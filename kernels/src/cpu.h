// Which kernels this machine can run.
#pragma once
#include <string>

#include "types.h"

namespace ernie {

// The kernels called `name`, or the best ones for "". Null when the name is unknown or this machine lacks the instructions.
const Kernels* choose(const std::string& name);

// Names of the kernels this machine can run, best first, separated by commas.
std::string available();

}  // namespace ernie
