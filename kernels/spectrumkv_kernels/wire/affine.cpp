// Twin of affine_flaws in affine.py for CPUs.

#include <algorithm>
#include <cstdint>

using Int = int64_t;
using Half = uint16_t;  // the bits of a float16

namespace {

constexpr Half SIGN = 0x8000, INFINITE = 0x7C00;  // bits of -0 and of infinity; NaN's are above those
constexpr Int LANES = 64;  // numbers that are compared side by side: an even number, so that scales keep to theirs

// As in affine.py.
enum Flaw : Int { SOUND, NOT_FINITE, NEGATIVE };

struct Affine {
    const Half *numbers;
    Int count;
    Int step;  // 2 where every other number is a scale, else 1
};

struct Request {
    const Affine *affines;
    Int count;
    Int *flaws;  // one of each
};

// Raises the greatest bits of each lane, without and with their sign, to those of `n` numbers.
inline void add(const Half *__restrict numbers, Int n, Half *__restrict size, Half *__restrict bits) {
#pragma omp simd
    for (Int i = 0; i < n; ++i) {
        const Half number = numbers[i], positive = number & Half(~SIGN);
        size[i] = size[i] < positive ? positive : size[i];
        bits[i] = bits[i] < number ? number : bits[i];
    }
}

Flaw flaw(const Affine &affine) {
    Half size[LANES] = {}, bits[LANES] = {};
    Int c = 0;
    for (; c + LANES <= affine.count; c += LANES) add(affine.numbers + c, LANES, size, bits);  // a number that the compiler knows
    add(affine.numbers + c, affine.count - c, size, bits);
    if (*std::max_element(size, size + LANES) >= INFINITE) return NOT_FINITE;
    for (Int i = 0; i < LANES; i += affine.step) {
        if (bits[i] > SIGN) return NEGATIVE;
    }
    return SOUND;
}

}  // namespace

extern "C" {

Int size_of_Affine() { return sizeof(Affine); }
Int size_of_Request() { return sizeof(Request); }

void affine_flaws(const Request *request) {
    for (Int i = 0; i < request->count; ++i) request->flaws[i] = flaw(request->affines[i]);
}

}  // extern "C"
