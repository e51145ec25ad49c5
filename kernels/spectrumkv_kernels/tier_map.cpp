// Twin of tier_positions in tier_map.py for CPUs.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

using Int = int64_t;

namespace {

constexpr Int CODES = 4;  // as in tier_map.py, and tokens in a byte
constexpr Int PER_BYTE = 4;

// Which of a byte's four tokens have a code, and how many they are.
struct Places {
    uint8_t of[PER_BYTE];
    uint8_t number;
};

constexpr std::array<std::array<Places, 256>, CODES> all_places() {
    std::array<std::array<Places, 256>, CODES> all{};
    for (int byte = 0; byte < 256; ++byte) {
        for (int i = 0; i < PER_BYTE; ++i) {
            Places &p = all[byte >> 2 * i & 3][byte];
            p.of[p.number++] = i;
        }
    }
    return all;
}

constexpr auto PLACES = all_places();

// Writes the positions of the first `size` tokens of a row that have `code`, behind -1 where there are fewer. Returns how
// many there are.
Int find(const uint8_t *packed, Int tokens, int32_t start, Int code, Int size, int32_t *out) {
    const auto &places = PLACES[code];
    const auto put = [=](Int at, int32_t position) {
        if (at < size) out[at] = position;
    };
    const Int whole = tokens / PER_BYTE, rest = tokens % PER_BYTE;
    Int count = 0;
    for (Int b = 0; b < whole; ++b) {
        const Places p = places[packed[b]];
        const int32_t first = start + int32_t(PER_BYTE * b);
        if (count + PER_BYTE <= size) {  // room for four, of which `number` stay
            for (Int i = 0; i < PER_BYTE; ++i) out[count + i] = first + p.of[i];
        } else if (count < size) {
            for (Int i = 0; i < p.number; ++i) put(count + i, first + p.of[i]);
        }
        count += p.number;
    }
    for (Int i = 0; i < rest; ++i) {
        if ((packed[whole] >> 2 * i & 3) == code) put(count++, start + int32_t(PER_BYTE * whole + i));
    }
    if (count < size) {
        std::copy_backward(out, out + count, out + size);
        std::fill_n(out, size - count, -1);
    }
    return count;
}

}  // namespace

extern "C" {

// Positions of the tokens of each code in each row, to `out[code]`, `[rows, sizes[code]]`; counts: `[rows, CODES]`.
void tier_positions(const uint8_t *packed, Int rows, Int tokens, Int start, const Int *sizes, int32_t *const *out, Int *counts) {
    const Int width = (tokens + PER_BYTE - 1) / PER_BYTE;
    for (Int r = 0; r < rows; ++r) {
        for (Int code = 0; code < CODES; ++code) {
            int32_t *to = sizes[code] ? out[code] + r * sizes[code] : nullptr;
            counts[r * CODES + code] = find(packed + r * width, tokens, int32_t(start), code, sizes[code], to);
        }
    }
}

}  // extern "C"
