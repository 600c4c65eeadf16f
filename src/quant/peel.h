// The sign rule, once: every derivation of signs and levels goes through it.
#pragma once

namespace rabit::quant {

// Takes path i's signed level off the residual and returns it: +p where residual >= 0 (both zeros
// included), else -p.
inline __attribute__((always_inline)) float peel(float& residual, float p) {
  const float level = residual < 0.0F ? -p : p;
  residual -= level;
  return level;
}

}  // namespace rabit::quant
