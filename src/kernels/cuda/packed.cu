// Which kernel takes a product of packed weights, or of bytes.
#include <algorithm>

#include "kernels/cuda/packed.h"

namespace rabit::gpu {
namespace {

bool by_warpgroups(const Linear& w, const DeviceInfo& device) {
  return device.warpgroups && w.format == Format::kResidualBinary;
}

}  // namespace

bool takes_packed(std::initializer_list<const Linear*> linears, int64_t tokens,
                  const DeviceInfo& device) {
  const Linear& first = **linears.begin();
  bool takes = tokens >= 1 && (tokens <= kFewTokens || by_warpgroups(first, device)) &&
               linears.size() <= static_cast<size_t>(kMostLinears);
  for (const Linear* w : linears) {
    takes = takes && w->format == first.format && w->d_in == first.d_in &&
            w->paths == first.paths &&
            (w->format == Format::kResidualBinary ? w->d_in % 8 == 0 : w->format == Format::kQ8_0);
  }
  return takes;
}

PackedNeeds packed_needs(std::initializer_list<const Linear*> linears, const DeviceInfo& device) {
  return by_warpgroups(**linears.begin(), device) ? warpgroup_needs(linears, device.multiprocessors)
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
  const auto multiply =
      by_warpgroups(**linears.begin(), device) ? multiply_warpgroups : multiply_few;
  return multiply(linears, args, device.multiprocessors, stream);
}

}  // namespace rabit::gpu
