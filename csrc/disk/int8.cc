#include "disk/int8.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace kvmem {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kMost = 127.0F;
// Below it a group is zeros: no scale is a number that some processors' modes take for zero.
constexpr float kLeast = 0x1p-100F;
// Adding and subtracting 1.5 * 2^23 rounds a float of small magnitude to the nearest whole number,
// halves to even.
constexpr float kRound = 12582912.0F;

struct Bf16 {
  using Bits = uint16_t;
  static float Widen(Bits bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static Bits Narrow(float value) {  // to nearest, halves to even
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return static_cast<Bits>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Fp16 {
  using Bits = uint16_t;
  static float Widen(Bits bits) {
    const uint32_t sign = uint32_t{bits & 0x8000U} << 16;
    const uint32_t rest = uint32_t{bits & 0x7fffU} << 13;
    // The exponent is moved by multiplying, which is exact for subnormal numbers, too.
    const float moved = std::bit_cast<float>(rest) * 0x1p112F;
    const uint32_t whole = (bits & 0x7c00U) == 0x7c00U ? rest | kInfinity  // no finite number
                                                       : std::bit_cast<uint32_t>(moved);
    return std::bit_cast<float>(sign | whole);
  }
  static Bits Narrow(float value) {  // to nearest, halves to even; beyond the range the largest
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<Bits>((bits >> 16) & 0x8000U);
    const float magnitude = std::min(std::bit_cast<float>(bits & kMagnitude), 65504.0F);
    if (magnitude < 0x1p-14F) {  // in steps of 2^-24
      return static_cast<Bits>(sign | static_cast<uint32_t>(magnitude * 0x1p24F + kRound - kRound));
    }
    const uint32_t from = std::bit_cast<uint32_t>(magnitude);
    const uint32_t rounded = (from + 0xfff + ((from >> 13) & 1)) >> 13;
    return static_cast<Bits>(sign | std::min<uint32_t>(rounded - (112U << 10), 0x7bff));
  }
};

struct Fp32 {
  using Bits = uint32_t;
  static float Widen(Bits bits) { return std::bit_cast<float>(bits); }
  static Bits Narrow(float value) { return std::bit_cast<uint32_t>(value); }
};

// The smallest bf16 that is no less.
uint16_t ScaleOf(float largest) {
  const uint32_t bits = std::bit_cast<uint32_t>(largest / kMost);
  return static_cast<uint16_t>((bits + 0xffff) >> 16);
}

struct Lengths {
  size_t elements, scales;
  size_t stored() const { return 2 * scales + elements; }
};

Lengths LengthsOf(size_t n, size_t width) {
  const size_t elements = n / width;
  return {elements, (elements + kInt8Group - 1) / kInt8Group};
}

// False if some element is no finite number.
template <typename T>
bool EncodeGroup(const std::byte* from, size_t n, uint16_t* scale, int8_t* to) {
  typename T::Bits bits[kInt8Group];
  float values[kInt8Group] = {};
  std::memcpy(bits, from, n * sizeof bits[0]);
  for (size_t i = 0; i < n; ++i) values[i] = T::Widen(bits[i]);
  int32_t largest = 0;  // of magnitudes, as bits: they are in the order of the numbers
  for (const float value : values) {
    largest = std::max(largest, static_cast<int32_t>(std::bit_cast<uint32_t>(value) & kMagnitude));
  }
  if (static_cast<uint32_t>(largest) >= kInfinity) return false;
  *scale = ScaleOf(std::bit_cast<float>(largest));
  const float step = Bf16::Widen(*scale);
  if (std::bit_cast<float>(largest) < kLeast) {
    *scale = 0;
    std::memset(to, 0, n);
    return true;
  }
  int8_t numbers[kInt8Group];
  for (size_t i = 0; i < kInt8Group; ++i) {
    const float rounded = values[i] / step + kRound - kRound;
    numbers[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
  std::memcpy(to, numbers, n);
  return true;
}

template <typename T>
size_t Encode(const std::byte* from, size_t n, std::byte* to, size_t room) {
  constexpr size_t width = sizeof(typename T::Bits);
  const Lengths lengths = LengthsOf(n, width);
  if (n == 0 || n % width != 0 || room < lengths.stored()) return 0;
  auto* const numbers = reinterpret_cast<int8_t*>(to + 2 * lengths.scales);
  for (size_t group = 0; group < lengths.scales; ++group) {
    const size_t first = group * kInt8Group;
    const size_t of_group = std::min(kInt8Group, lengths.elements - first);
    uint16_t scale = 0;
    if (!EncodeGroup<T>(from + first * width, of_group, &scale, numbers + first)) return 0;
    std::memcpy(to + 2 * group, &scale, sizeof scale);
  }
  return lengths.stored();
}

template <typename T>
bool Decode(const std::byte* from, size_t n_stored, std::byte* to, size_t n) {
  constexpr size_t width = sizeof(typename T::Bits);
  const Lengths lengths = LengthsOf(n, width);
  if (n % width != 0 || n_stored != lengths.stored()) return false;
  const std::byte* const numbers = from + 2 * lengths.scales;
  for (size_t group = 0; group < lengths.scales; ++group) {
    const size_t first = group * kInt8Group;
    const size_t of_group = std::min(kInt8Group, lengths.elements - first);
    uint16_t scale = 0;
    std::memcpy(&scale, from + 2 * group, sizeof scale);
    const float step = Bf16::Widen(scale);
    int8_t whole[kInt8Group] = {};
    std::memcpy(whole, numbers + first, of_group);
    typename T::Bits bits[kInt8Group];
    for (size_t i = 0; i < kInt8Group; ++i) {
      bits[i] = T::Narrow(static_cast<float>(whole[i]) * step);
    }
    std::memcpy(to + first * width, bits, of_group * width);
  }
  return true;
}

}  // namespace

size_t EncodeInt8(uint32_t codec, const std::byte* from, size_t n, std::byte* to, size_t room) {
  if (codec == 8) return Encode<Bf16>(from, n, to, room);
  return codec == 9 ? Encode<Fp16>(from, n, to, room) : Encode<Fp32>(from, n, to, room);
}

bool DecodeInt8(uint32_t codec, const std::byte* from, size_t n_stored, std::byte* to, size_t n) {
  if (codec == 8) return Decode<Bf16>(from, n_stored, to, n);
  return codec == 9 ? Decode<Fp16>(from, n_stored, to, n) : Decode<Fp32>(from, n_stored, to, n);
}

}  // namespace kvmem
