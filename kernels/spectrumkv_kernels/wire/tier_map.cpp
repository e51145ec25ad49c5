// Twin of tier_positions in tier_map.py for CPUs.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

using Int = int64_t;
using Word = uint64_t;

namespace {

constexpr Int CODES = 16;  // the most that codes of 4 bits tell apart; as in cpp_tier_map.py
constexpr Int STEP = 8;    // tokens whose positions are written together

// Codes of so many bits, 2 or 4.
template <Int BITS>
struct Map {
    static constexpr Int CODES = 1 << BITS;
    static constexpr Int PER_BYTE = 8 / BITS;             // tokens in a byte,
    static constexpr Int PER_WORD = 64 / BITS;            // and in a word
    static constexpr Word LOW = ~Word(0) / (CODES - 1);  // the lowest bit of each code
};

struct Request {
    const uint8_t *packed;  // [rows, bytes]
    Int rows, tokens;
    Int start;            // position of the first token
    Int bits;             // of a code
    Int sizes[CODES];     // places in a row for the tokens of each code
    int32_t *out[CODES];  // [rows, size] of each code
    Int *counts;          // [rows, 2^bits]
};

// Which bits of a byte are set, from the lowest on.
using Places = std::array<uint8_t, STEP>;

constexpr std::array<Places, 256> all_places() {
    std::array<Places, 256> all{};
    for (int byte = 0; byte < 256; ++byte) {
        for (int i = 0, n = 0; i < STEP; ++i) {
            if (byte >> i & 1) all[byte][n++] = uint8_t(i);
        }
    }
    return all;
}

constexpr auto PLACES = all_places();

// A bit for each of a word's first `tokens` that has `code`, the first in the lowest.
template <Int BITS>
inline uint32_t having(Word codes, Int code, Int tokens) {
    Word other = codes ^ (Map<BITS>::LOW * Word(code));
    if constexpr (BITS == 4) other |= other >> 2;
    Word z = ~(other | other >> 1) & Map<BITS>::LOW;
    if (tokens < Map<BITS>::PER_WORD) z &= (Word(1) << BITS * tokens) - 1;
    if constexpr (BITS == 4) {
        z = (z | z >> 3) & 0x0303030303030303;
        z = (z | z >> 6) & 0x000F000F000F000F;
        z = (z | z >> 12) & 0x000000FF000000FF;
        return uint32_t(z | z >> 24) & 0xFFFF;
    }
    z = (z | z >> 1) & 0x3333333333333333;
    z = (z | z >> 2) & 0x0F0F0F0F0F0F0F0F;
    z = (z | z >> 4) & 0x00FF00FF00FF00FF;
    z = (z | z >> 8) & 0x0000FFFF0000FFFF;
    return uint32_t(z | z >> 16);
}

// Writes the positions of the first `size` tokens of a row that have `code`, behind -1 where there are fewer. Returns how
// many there are.
template <Int BITS>
Int find(const uint8_t *packed, Int tokens, int32_t start, Int code, Int size, int32_t *__restrict out) {
    constexpr Int PER_BYTE = Map<BITS>::PER_BYTE, PER_WORD = Map<BITS>::PER_WORD;
    Int count = 0;
    for (Int t = 0; t < tokens; t += PER_WORD) {
        const Int here = std::min(PER_WORD, tokens - t);
        Word codes = 0;
        if (here == PER_WORD) {
            std::memcpy(&codes, packed + t / PER_BYTE, sizeof(codes));
        } else {
            std::memcpy(&codes, packed + t / PER_BYTE, (here + PER_BYTE - 1) / PER_BYTE);
        }
        const uint32_t mask = having<BITS>(codes, code, here);
        Int n = count;
        for (Int i = 0; i < PER_WORD && n < size; i += STEP) {
            unsigned bits = mask >> i & 0xFF;
            const Int number = __builtin_popcount(bits);
            const int32_t first = start + int32_t(t + i);
            if (n + STEP <= size) {  // room for eight, of which `number` stay
                const Places &places = PLACES[bits];
                int32_t eight[STEP];
                for (Int j = 0; j < STEP; ++j) eight[j] = first + places[j];
                std::memcpy(out + n, eight, sizeof(eight));
            } else {
                for (Int j = n; bits && j < size; bits &= bits - 1) out[j++] = first + __builtin_ctz(bits);
            }
            n += number;
        }
        count += __builtin_popcount(mask);
    }
    if (count < size) {
        std::copy_backward(out, out + count, out + size);
        std::fill_n(out, size - count, -1);
    }
    return count;
}

template <Int BITS>
void find_all(const Request &q) {
    const Int width = (q.tokens + Map<BITS>::PER_BYTE - 1) / Map<BITS>::PER_BYTE;
    for (Int r = 0; r < q.rows; ++r) {
        for (Int code = 0; code < Map<BITS>::CODES; ++code) {
            const Int size = q.sizes[code];
            int32_t *to = size ? q.out[code] + r * size : nullptr;
            Int &count = q.counts[r * Map<BITS>::CODES + code];
            count = find<BITS>(q.packed + r * width, q.tokens, int32_t(q.start), code, size, to);
        }
    }
}

}  // namespace

extern "C" {

Int size_of_Request() { return sizeof(Request); }

// Positions of the tokens of each code in each row.
void tier_positions(const Request *request) {
    request->bits == 2 ? find_all<2>(*request) : find_all<4>(*request);
}

}  // extern "C"
