// Arithmetic on float32 vectors, in loops that compilers turn into vector instructions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using Int = int64_t;

constexpr Int LANES = 16;  // vectors are filled up with zeros to a multiple of this

constexpr Int padded(Int count) { return (count + LANES - 1) / LANES * LANES; }

template <typename To, typename From>
inline To bits_as(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "same size");
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float from_bfloat16(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }

inline float from_float16(uint16_t x) {
    uint32_t exponent = x & 0x7c00u, magnitude = (x & 0x7fffu) << 13;
    float small = bits_as<float>(magnitude + (113u << 23)) - 0x1p-14f;
    float large = bits_as<float>(magnitude + ((exponent == 0x7c00u ? 224u : 112u) << 23));
    return bits_as<float>(bits_as<uint32_t>(exponent ? large : small) | uint32_t(x & 0x8000u) << 16);
}

// e^x for x <= 0, to 1e-7 of it; 0 below -87. A NaN stays one.
inline float exp_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits hold the rounded exponent
    float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float power = bits_as<float>((bits_as<uint32_t>(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

// x times the orthonormal Hadamard matrix, in blocks of the largest power of two that divides n.
inline void hadamard(float *x, Int n, float *other) {
    Int block = n & -n, half = block / 2;
    float norm = 1.0f / std::sqrt(float(block));
    for (float *from = x; from < x + n; from += block) {
        float *a = from, *b = other;
        for (Int size = 1; size < block; size *= 2) {  // as many equal steps as the size has bits
#pragma omp simd
            for (Int i = 0; i < half; ++i) {
                float first = a[i], second = a[i + half];
                b[2 * i] = first + second;
                b[2 * i + 1] = first - second;
            }
            std::swap(a, b);
        }
#pragma omp simd
        for (Int i = 0; i < block; ++i) from[i] = a[i] * norm;
    }
}

inline void halves(const uint16_t *__restrict from, Int n, float *__restrict to) {
#pragma omp simd
    for (Int d = 0; d < n; ++d) to[d] = from_float16(from[d]);
}

inline void bfloats(const uint16_t *__restrict from, Int n, float *__restrict to) {
#pragma omp simd
    for (Int d = 0; d < n; ++d) to[d] = from_bfloat16(from[d]);
}

// A vector of n channels from its codes. Zeros are added here, not to sums, where they would nearly cancel.
template <int bits>
inline void unpack(const uint8_t *__restrict codes, Int n, float scale, float zero, float *__restrict to) {
    const Int bytes = n * bits / 8, whole = bytes & -LANES;
    const int mask = (1 << bits) - 1;
    for (int shift = 0; shift < 8; shift += bits, to += bytes) {
#pragma omp simd
        for (Int i = 0; i < whole; ++i) to[i] = float((codes[i] >> shift) & mask) * scale + zero;
        for (Int i = whole; i < bytes; ++i) to[i] = float((codes[i] >> shift) & mask) * scale + zero;
    }
}

// Channels from `count` bytes of each third of codes of 3 bits. A third has the upper two bits of the channels of even
// eighths, one those of odd ones, one the lowest bits of all. They meet in words as wide as floats: a loop over types
// of several widths would need longer vectors to fill.
template <int count>
inline void unpack_thirds(const uint8_t *__restrict codes, Int bytes, float scale, float zero, float *__restrict to) {
    int words[count];
#pragma omp simd
    for (int i = 0; i < count; ++i) words[i] = codes[i] << 1 | codes[i + bytes] << 9 | codes[i + 2 * bytes] << 17;
    for (int eighth = 0; eighth < 8; ++eighth, to += bytes) {
        const int upper = eighth % 2 * 8 + eighth / 2 * 2, lowest = 17 + eighth;
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            to[i] = float((words[i] >> upper & 6) | (words[i] >> lowest & 1)) * scale + zero;
        }
    }
}

template <>
inline void unpack<3>(const uint8_t *__restrict codes, Int n, float scale, float zero, float *__restrict to) {
    const Int bytes = n / 8;
    Int i = 0;
    for (; i + 16 <= bytes; i += 16) unpack_thirds<16>(codes + i, bytes, scale, zero, to + i);
    for (; i + 8 <= bytes; i += 8) unpack_thirds<8>(codes + i, bytes, scale, zero, to + i);
    for (; i < bytes; ++i) unpack_thirds<1>(codes + i, bytes, scale, zero, to + i);
}

// scores[t] = a . b[t] for `count` rows of b, `stride` apart, four at a time. n: a multiple of LANES.
inline void products(
    const float *__restrict a, const float *__restrict b, Int stride, Int n, Int count, float *scores) {
    n &= -LANES;  // says to the compiler that nothing is left over
    Int t = 0;
    for (; t + 4 <= count; t += 4) {
        const float *b0 = b + t * stride, *b1 = b0 + stride, *b2 = b1 + stride, *b3 = b2 + stride;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (Int d = 0; d < n; ++d) {
            s0 += a[d] * b0[d];
            s1 += a[d] * b1[d];
            s2 += a[d] * b2[d];
            s3 += a[d] * b3[d];
        }
        scores[t] = s0, scores[t + 1] = s1, scores[t + 2] = s2, scores[t + 3] = s3;
    }
    for (; t < count; ++t) {
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (Int d = 0; d < n; ++d) s += a[d] * b[t * stride + d];
        scores[t] = s;
    }
}

// sums += sum_t weights[t] * b[t] over `count` rows of b, four at a time. n: a multiple of LANES.
inline void accumulate(const float *weights, const float *__restrict b, Int n, Int count, float *__restrict sums) {
    n &= -LANES;
    Int t = 0;
    for (; t + 4 <= count; t += 4) {
        const float *b0 = b + t * n, *b1 = b0 + n, *b2 = b1 + n, *b3 = b2 + n;
        float w0 = weights[t], w1 = weights[t + 1], w2 = weights[t + 2], w3 = weights[t + 3];
#pragma omp simd
        for (Int d = 0; d < n; ++d) sums[d] += (w0 * b0[d] + w1 * b1[d]) + (w2 * b2[d] + w3 * b3[d]);
    }
    for (; t < count; ++t) {
#pragma omp simd
        for (Int d = 0; d < n; ++d) sums[d] += weights[t] * b[t * n + d];
    }
}
