// scm-noise-v1: the noise of a seed, the same to the bit in every language. docs/noise.md states it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace scm {

// Philox4x32-10: encrypts a counter under the two halves of a seed.
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0], b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(a)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Standard normal noise of one sample, `size` numbers in C order, for one noise input.
inline std::vector<float> standard_normal(std::uint64_t seed, std::uint32_t step, std::size_t size) {
  constexpr double kTurn = 2.0 * 3.14159265358979323846 / 4294967296.0;
  std::vector<float> out(size);
  for (std::size_t block = 0; block * 4 < size; ++block) {
    const auto words = philox({static_cast<std::uint32_t>(block), step, 0, 0}, seed);
    for (int pair = 0; pair < 2; ++pair) {
      const double uniform = (words[2 * pair] + 0.5) / 4294967296.0;
      const double radius = std::sqrt(-2.0 * std::log(uniform)), angle = (words[2 * pair + 1] + 0.5) * kTurn;
      const double both[2] = {std::cos(angle) * radius, std::sin(angle) * radius};
      for (int i = 0; i < 2; ++i) {
        const std::size_t at = block * 4 + 2 * pair + i;
        if (at < size) out[at] = static_cast<float>(both[i]);
      }
    }
  }
  return out;
}

}  // namespace scm
