// Twin of digest_sums in checksum.py for CPUs: reads memory once, for both kinds of sums.

#include <algorithm>
#include <cstdint>

using Int = int64_t;
using Word = uint64_t;  // sums are modulo 2^64

namespace {

constexpr Int ROW = 1024;  // words in a row; as in checksum.py
constexpr Int SHARE = 16;  // rows for which another thread is worth while, at least

// The sum of `n` words by their weights. Each is added to its column as well.
inline Word add_row(const Word *__restrict words, Int n, const Word *__restrict weights, Word *__restrict columns) {
    Word sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Int c = 0; c < n; ++c) {
        sum += words[c] * weights[c];
        columns[c] += words[c];
    }
    return sum;
}

}  // namespace

extern "C" {

// Writes the sums of all rows, of which the last may be short, then those of the columns.
void digest_sums(const Word *words, Int count, const Word *weights, Word *out, Int threads) {
    const Int rows = (count + ROW - 1) / ROW, team = std::max<Int>(1, std::min(threads, rows / SHARE));
    Word *columns = out + rows;
    std::fill_n(columns, ROW, 0);
#pragma omp parallel num_threads(int(team)) if (team > 1)
    {
        alignas(64) Word own[ROW] = {};
#pragma omp for schedule(static) nowait
        for (Int r = 0; r < rows; ++r) {
            const Word *row = words + r * ROW;
            // A number that the compiler knows is worth a loop of its own.
            out[r] = r + 1 < rows ? add_row(row, ROW, weights, own) : add_row(row, count - r * ROW, weights, own);
        }
#pragma omp critical
        for (Int c = 0; c < ROW; ++c) columns[c] += own[c];
    }
}

}  // extern "C"
