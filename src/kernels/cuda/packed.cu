// Which kernel takes a product of packed weights.
#include <algorithm>

#include "kernels/cuda/packed.h"

namespace rabit::gpu {

bool takes_packed(std::initializer_list<const Linear*> linears, int64_t tokens,
                  const DeviceInfo& device) {
  bool takes = tokens >= 1 && (tokens <= kFewTokens || device.warpgroups) &&
               linears.size() <= static_cast<size_t>(kMostLinears);
  for (const Linear* w : linears) {
    takes = takes && w->format == Format::kResidualBinary && w->d_in % 8 == 0 &&
            w->d_in == (*linears.begin())->d_in && w->paths == (*linears.begin())->paths;
  }
  return takes;
}

PackedNeeds packed_needs(std::initializer_list<const Linear*> linears, const DeviceInfo& device) {
  return device.warpgroups ? warpgroup_needs(linears, device.multiprocessors)
                           : few_needs(linears, device.multiprocessors);
}

Status multiply_packed(std::initializer_list<const Linear*> linears, const uint16_t* x,
                       int64_t tokens, float* y, bool add, const PackedWork& work,
                       const DeviceInfo& device, Stream stream) {
  PackedArgs args = {};
  args.x = x;
  args.y = y;
  args.tokens = static_cast<int32_t>(tokens);
  args.add = add;
  args.partial = work.partial;
  args.counters = work.counters;
  const auto multiply = device.warpgroups ? multiply_warpgroups : multiply_few;
  return multiply(linears, args, device.multiprocessors, stream);
}

}  // namespace rabit::gpu
