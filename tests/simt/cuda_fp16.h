/* __half for tests/simt: storage and its two conversions, to the bit as on the GPU. */
#pragma once
#include <stdint.h>
#include <string.h>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31,
                   mantissa = x.bits & 1023;
    if (exponent == 0) {
        const float small = (float)mantissa * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t bits =
        sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

inline __half __float2half_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {0x7fff};
    if (bits >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)}; /* 65520 and above */
    if (bits < 0x38800000) {                                    /* subnormal: the addition rounds */
        float y;
        memcpy(&y, &bits, sizeof y);
        y += 0.5f;
        memcpy(&bits, &y, sizeof bits);
        return {(uint16_t)(sign | (bits - 0x3f000000))};
    }
    bits += 0xfff + (bits >> 13 & 1);
    return {(uint16_t)(sign | (bits - 0x38000000) >> 13)};
}
