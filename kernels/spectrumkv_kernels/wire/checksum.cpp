// Twin of digest_sums and write_sums in checksum.py for CPUs: reads memory once, for copying and both kinds of sums.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

using Int = int64_t;
using Word = uint64_t;  // sums are modulo 2^64

namespace {

constexpr Int ROW = 1024;  // words in a row; as in checksum.py
constexpr Int BLOCK = 64;  // words that are summed, then copied
constexpr Int SHARE = 16;  // rows for which another thread is worth while, at least

// Words that lie elsewhere, or where they belong (null), in the order of their places.
struct Piece {
    const Word *source;
    Int count;
};

struct Request {
    const Piece *pieces;
    Int count;            // of pieces
    Word *words;          // where they are put together
    const Word *weights;  // of a row's words
    Word *sums;           // of all rows, the last of which may be short, then of the columns
    Int threads;
};

// The sum of `n` words by their weights. Each is added to its column as well.
inline Word add(const Word *__restrict words, Int n, const Word *__restrict weights, Word *__restrict columns) {
    Word sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Int c = 0; c < n; ++c) {
        sum += words[c] * weights[c];
        columns[c] += words[c];
    }
    return sum;
}

// Copies past the cache, which would first read what is overwritten.
inline void stream(const Word *from, Word *to, Int n) {
#ifdef __SSE2__
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        Int c = 0;
        for (; c + 2 <= n; c += 2) {
            _mm_stream_si128(reinterpret_cast<__m128i *>(to + c), _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + c)));
        }
        if (c < n) to[c] = from[c];
        return;
    }
#endif
    std::memcpy(to, from, n * sizeof(Word));
}

// As `add`; copies the words unless `to` is null.
Word take(const Word *from, Word *to, Int n, const Word *weights, Word *columns) {
    Word sum = 0;
    Int c = 0;
    for (; c + BLOCK <= n; c += BLOCK) {  // a number that the compiler knows
        sum += add(from + c, BLOCK, weights + c, columns + c);
        if (to) stream(from + c, to + c, BLOCK);
    }
    sum += add(from + c, n - c, weights + c, columns + c);
    if (to) stream(from + c, to + c, n - c);
    return sum;
}

}  // namespace

extern "C" {

Int size_of_Piece() { return sizeof(Piece); }
Int size_of_Request() { return sizeof(Request); }

// Puts pieces together, and sums up while it does.
void write_sums(const Request *request) {
    const Piece *pieces = request->pieces;
    const Word *weights = request->weights;
    Word *words = request->words;
    const Int number = request->count;
    Int count = 0;
    for (Int i = 0; i < number; ++i) count += pieces[i].count;
    const Int rows = (count + ROW - 1) / ROW, team = std::max<Int>(1, std::min(request->threads, rows / SHARE));
    Word *columns = request->sums + rows;
    std::fill_n(columns, ROW, 0);
#pragma omp parallel num_threads(int(team)) if (team > 1)
    {
        alignas(64) Word own[ROW] = {};
#pragma omp for schedule(static) nowait
        for (Int r = 0; r < rows; ++r) {
            Word sum = 0;
            for (Int i = 0, start = 0; i < number; start += pieces[i++].count) {
                const Int begin = std::max(start, r * ROW), stop = std::min(start + pieces[i].count, (r + 1) * ROW);
                if (begin >= stop) continue;
                const Word *from = pieces[i].source ? pieces[i].source + (begin - start) : words + begin;
                Word *to = pieces[i].source ? words + begin : nullptr;
                sum += take(from, to, stop - begin, weights + begin % ROW, own + begin % ROW);
            }
            request->sums[r] = sum;
        }
#ifdef __SSE2__
        _mm_sfence();
#endif
#pragma omp critical
        for (Int c = 0; c < ROW; ++c) columns[c] += own[c];
    }
}

}  // extern "C"
