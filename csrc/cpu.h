// What the kernels of the CPU share.
//
// No torch headers and C interfaces: g++ compiles them in seconds at first use, and ctypes calls
// them (kernels/cpu_library.py). OpenMP's run time is the one that torch has loaded, and so are its
// threads.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// e^x for x <= 0, within two units in the last place; 0 below -87. A polynomial, because the
// compiler cannot vectorize calls of std::exp.
inline float exp_nonpositive(float x) {
  const float scaled = x < -87.f ? -87.f : x;
  const float n = std::nearbyint(scaled * 1.44269504f);
  const float r = (scaled - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const uint32_t bits = (static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.f ? 0.f : p * power;
}

}  // namespace
