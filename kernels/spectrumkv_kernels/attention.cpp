// Twin of tiered_attention in attention.py for CPUs: reads codes where they lie, in one pass with a running maximum.
//
// A share of a KV head's tokens is one unit of work, whose size depends on neither threads nor batch, so that results do
// not either. Of a share, blocks of tokens become float32 in a buffer that stays in the L1 cache, one query row after the
// other. Everything that a caller says is 8 bytes wide: attention_cpp.py writes the structures below as int64 arrays.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using Int = int64_t;

constexpr Int BLOCK = 32;   // tokens converted at a time
constexpr Int SHARE = 256;  // tokens of one unit of work, at least
constexpr Int LANES = 16;   // vectors are filled up with zeros to a multiple of this
constexpr float HIDDEN = -INFINITY;

constexpr Int padded(Int count) { return (count + LANES - 1) / LANES * LANES; }

enum Kind : Int { FLOAT32, BFLOAT16, FLOAT16, BOOL, NONE };

struct View {
    const void *data;
    Int strides[3];  // in elements; the last dimension is contiguous

    template <typename T>
    const T *at(Int i, Int j, Int k) const {
        return static_cast<const T *>(data) + i * strides[0] + j * strides[1] + k * strides[2];
    }
};

struct Segment {
    Int bits;  // 16: exact
    Int kind;  // of exact tokens
    Int tokens;
    View keys, values;  // [batch, kv_heads, tokens, dim], or packed codes
    View positions;     // int32 [batch, kv_heads, tokens]
    View key_affine, value_affine;
};

struct Problem {
    Int batch, kv_heads, group, queries, key_dim, value_dim, length;
    Int symmetric, hadamard, pairs, interleaved, fine;
    const float *mean;    // [batch, kv_heads, key_dim], or null
    const float *angles;  // cos, then sin, of positions below `fine`, then of its multiples: [any, 2 * pairs]
    Int query_kind;
    View query;  // [batch, heads, queries, key_dim]
    Int mask_kind;
    View mask;  // [batch, heads, queries, columns]; strides of 0 where it is the same for all
    Int mask_stride, columns;
    Int window, ragged;  // a window of 0: none
    const float *sinks;  // [heads], or null
    Int threads, segments;
    // The segments follow, coded ones first.

    const Segment *segment(Int i) const { return reinterpret_cast<const Segment *>(this + 1) + i; }
    Int tokens() const {
        Int all = 0;
        for (Int i = 0; i < segments; ++i) all += segment(i)->tokens;
        return all;
    }
    Int rows() const { return group * queries; }
    Int turns() const { return mean ? 2 * pairs : 0; }         // channels of a query that meet the mean
    Int width() const { return padded(key_dim + turns()); }  // floats of a key or query, with them
    Int depth() const { return padded(value_dim); }          // floats of a value
    Int share() const { return std::max(SHARE, 4 * rows()); }  // so that far less is kept of a share than was read
    Int shares() const { return (tokens() + share() - 1) / share(); }
    Int kept() const { return padded(rows() * (depth() + 2)); }  // weighted values, maxima and sums of a share
    Int team() const { return std::max<Int>(1, std::min(threads, batch * kv_heads * shares())); }
    bool hides() const { return mask_kind != NONE || window || queries > 1 || ragged; }
};

// A thread's memory, and how much that is.
struct Scratch {
    Int used = 0;
    float *base;
    float *plain, *turned, *cosines, *scores, *constant;  // for each query row
    float *keys, *values, *affine;                        // for each token of a block
    float *bias, *other;

    explicit Scratch(const Problem &p, float *base = nullptr) : base(base) {
        Int rows = p.rows();
        plain = take(rows * p.width());
        turned = take(rows * p.width());
        cosines = take(rows * p.turns());
        scores = take(rows * BLOCK);
        constant = take(rows);
        keys = take(BLOCK * p.width());
        values = take(BLOCK * p.depth());
        affine = take(BLOCK * 2);
        bias = take(BLOCK);
        other = take(std::max(p.key_dim, p.value_dim));
    }

    float *take(Int count) {
        Int start = used;
        used += padded(count);  // each begins on a cache line
        return base ? base + start : nullptr;
    }
};

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
void hadamard(float *x, Int n, float *other) {
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

void halves(const uint16_t *__restrict from, Int n, float *__restrict to) {
#pragma omp simd
    for (Int d = 0; d < n; ++d) to[d] = from_float16(from[d]);
}

void copy(Int kind, const View &view, Int i, Int j, Int k, Int n, float *__restrict to) {
    if (kind == FLOAT32) {
        std::memcpy(to, view.at<float>(i, j, k), n * sizeof(float));
        return;
    }
    const uint16_t *from = view.at<uint16_t>(i, j, k);
    if (kind == FLOAT16) return halves(from, n, to);
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

// scores[t] = a . b[t] for `count` rows of b, `stride` apart, four at a time. n: a multiple of LANES.
void products(const float *__restrict a, const float *__restrict b, Int stride, Int n, Int count, float *scores) {
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
void accumulate(const float *weights, const float *__restrict b, Int n, Int count, float *__restrict sums) {
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

// What is kept of one share: the values' sum weighted by exp(score - maximum), the maxima and the sums of the weights.
struct Kept {
    float *sums, *maximum, *weight;

    Kept(const Problem &p, float *base) : sums(base), maximum(base + p.rows() * p.depth()), weight(maximum + p.rows()) {}
};

// Reads the tokens of one row and KV head.
class Reader {
  public:
    Reader(const Problem &p, float scale, float softcap, float lowest, float *scratch)
        : p(p), s(p, scratch), scale(scale), softcap(softcap), lowest(lowest) {
        std::fill_n(scratch, s.used, 0.0f);
    }

    // Tokens from `start` to `end`, counted over all segments.
    void read(Int row_, Int head_, Int start, Int end, Kept into) {
        row = row_, head = head_, kept = into;
        prepare();
        std::fill_n(kept.sums, p.rows() * p.depth(), 0.0f);
        std::fill_n(kept.weight, p.rows(), 0.0f);
        std::fill_n(kept.maximum, p.rows(), HIDDEN);
        bool in_codes = true;
        for (Int i = 0; i < p.segments; ++i) {
            const Segment &segment = *p.segment(i);
            if (segment.bits == 16 && in_codes) finish_codes(), in_codes = false;
            Int stop = std::min(end, segment.tokens);
            for (Int t = std::max<Int>(start, 0); t < stop;) t += block(segment, t, stop);
            start -= segment.tokens, end -= segment.tokens;
        }
        if (in_codes) finish_codes();
    }

  private:
    const Problem &p;
    Scratch s;
    float scale, softcap, lowest;
    Int row = 0, head = 0, run = -1;  // run: position / fine, for which the queries are turned
    Kept kept{p, nullptr};

    void prepare() {
        Int dim = p.key_dim;
        const float *mean = p.mean ? p.mean + (row * p.kv_heads + head) * dim : nullptr;
        run = -1;
        for (Int r = 0; r < p.rows(); ++r) {
            float *q = s.plain + r * p.width(), *turned = s.turned + r * p.width();
            copy(p.query_kind, p.query, row, head * p.group + r / p.queries, r % p.queries, dim, q);
            for (Int d = 0; d < dim; ++d) q[d] *= scale;
            std::memcpy(turned, q, dim * sizeof(float));
            if (p.hadamard) hadamard(turned, dim, s.other);
            s.constant[r] = 0;
            if (!mean) continue;
            // q . R(t) mean = sum over pairs of cos(angle) (x mx + y my) + sin(angle) (y mx - x my)
            float *cosines = s.cosines + r * p.turns(), *sines = cosines + p.pairs;
            Int step = p.interleaved ? 2 : 1, second = p.interleaved ? 1 : p.pairs;
            for (Int i = 0; i < p.pairs; ++i) {
                Int a = i * step, b = a + second;
                cosines[i] = q[a] * mean[a] + q[b] * mean[b];
                sines[i] = q[b] * mean[a] - q[a] * mean[b];
            }
            for (Int d = 2 * p.pairs; d < dim; ++d) s.constant[r] += q[d] * mean[d];
        }
    }

    // Leaves to the table of fine angles what is left of the positions `fine * to` and those that follow.
    void turn(Int to) {
        run = to;
        const float *cos = p.angles + (p.fine + run) * 2 * p.pairs, *sin = cos + p.pairs;
        for (Int r = 0; r < p.rows(); ++r) {
            const float *cosines = s.cosines + r * p.turns(), *sines = cosines + p.pairs;
            float *on_cos = s.turned + r * p.width() + p.key_dim, *on_sin = on_cos + p.pairs;
#pragma omp simd
            for (Int i = 0; i < p.pairs; ++i) {
                on_cos[i] = cosines[i] * cos[i] + sines[i] * sin[i];
                on_sin[i] = sines[i] * cos[i] - cosines[i] * sin[i];
            }
        }
    }

    Int place(int32_t position) const { return std::clamp<Int>(position, 0, p.length - 1); }

    // Reads tokens from `t` on, and says how many.
    Int block(const Segment &segment, Int t, Int stop) {
        const int32_t *positions = segment.positions.at<int32_t>(row, head, t);
        Int count = std::min(BLOCK, stop - t), width = p.width();
        bool coded = segment.bits < 16;
        if (coded && p.turns()) {
            Int to = place(positions[0]) / p.fine, same = 1;
            while (same < count && place(positions[same]) / p.fine == to) ++same;
            count = same;
            if (to != run) turn(to);
        }
        if (coded) {
            convert_codes(segment, t, count, positions);
        } else {
            for (Int k = 0; k < count; ++k) {
                copy(segment.kind, segment.keys, row, head, t + k, p.key_dim, s.keys + k * width);
                copy(segment.kind, segment.values, row, head, t + k, p.value_dim, s.values + k * p.depth());
            }
        }
        for (Int r = 0; r < p.rows(); ++r) {
            float *scores = s.scores + r * BLOCK;
            const float *query = (coded ? s.turned : s.plain) + r * width;
            products(query, s.keys, width, coded ? width : padded(p.key_dim), count, scores);
            if (coded) {
                for (Int k = 0; k < count; ++k) scores[k] += s.constant[r];
            }
            if (softcap > 0) cap(scores, count);
        }
        if (p.hides()) hide(positions, count);
        for (Int r = 0; r < p.rows(); ++r) weigh(r, count);
        return count;
    }

    template <int bits>
    void unpack_side(const View &codes, const View &affine, Int t, Int count, Int dim, Int stride, float *to) const {
        Int each = p.symmetric ? 1 : 2;
        if (affine.strides[2] == each) {
            halves(affine.at<uint16_t>(row, head, t), count * each, s.affine);
        } else {
            for (Int k = 0; k < count; ++k) halves(affine.at<uint16_t>(row, head, t + k), each, s.affine + k * each);
        }
        for (Int k = 0; k < count; ++k) {
            float scale = s.affine[k * each];
            float zero = p.symmetric ? -scale * float(1 << (bits - 1)) : s.affine[k * each + 1];
            unpack<bits>(codes.at<uint8_t>(row, head, t + k), dim, scale, zero, to + k * stride);
        }
    }

    template <int bits>
    void unpack_tokens(const Segment &segment, Int t, Int count) const {
        unpack_side<bits>(segment.keys, segment.key_affine, t, count, p.key_dim, p.width(), s.keys);
        unpack_side<bits>(segment.values, segment.value_affine, t, count, p.value_dim, p.depth(), s.values);
    }

    void convert_codes(const Segment &segment, Int t, Int count, const int32_t *positions) {
        if (segment.bits == 8) unpack_tokens<8>(segment, t, count);
        if (segment.bits == 4) unpack_tokens<4>(segment, t, count);
        if (segment.bits == 2) unpack_tokens<2>(segment, t, count);
        Int turns = p.turns(), width = p.width();
        for (Int k = 0; turns && k < count; ++k) {
            const float *angles = p.angles + (place(positions[k]) - run * p.fine) * turns;
            float *to = s.keys + k * width + p.key_dim;
#pragma omp simd
            for (Int d = 0; d < turns; ++d) to[d] = angles[d];
        }
    }

    void cap(float *scores, Int count) const {
#pragma omp simd
        for (Int k = 0; k < count; ++k) {
            float x = scores[k] / softcap, e = exp_negative(-2 * std::fabs(x));
            scores[k] = std::copysign(softcap * (1 - e) / (1 + e), x);
        }
    }

    // What the mask adds to a score: -inf where it hides.
    float entry(Int r, Int column) const {
        Int heads = head * p.group + r / p.queries, offset = column * p.mask_stride;
        if (p.mask_kind == BOOL) return p.mask.at<uint8_t>(row, heads, r % p.queries)[offset] ? 0.0f : HIDDEN;
        float value;
        if (p.mask_kind == FLOAT32) {
            value = p.mask.at<float>(row, heads, r % p.queries)[offset];
        } else {
            uint16_t half = p.mask.at<uint16_t>(row, heads, r % p.queries)[offset];
            value = p.mask_kind == BFLOAT16 ? from_bfloat16(half) : from_float16(half);
        }
        return value <= lowest ? HIDDEN : value;
    }

    void hide(const int32_t *positions, Int count) {
        Int first = p.mask_kind == NONE ? 0 : p.length - p.columns;
        bool alike = p.mask_kind == NONE || p.mask.strides[1] == 0;  // for all query heads
        for (Int i = 0; i < p.queries; ++i) {
            Int at = p.length - p.queries + i;
            for (Int g = 0; g < p.group; ++g) {
                Int r = g * p.queries + i;
                for (Int k = 0; k < count && (g == 0 || !alike); ++k) {
                    Int position = positions[k];
                    bool seen = position >= first && position < p.length;
                    if (p.mask_kind != NONE) {
                        s.bias[k] = seen ? entry(r, position - first) : HIDDEN;
                    } else {
                        seen = seen && position <= at && (!p.window || at - position < p.window);
                        s.bias[k] = seen ? 0.0f : HIDDEN;
                    }
                }
                float *scores = s.scores + r * BLOCK;
#pragma omp simd
                for (Int k = 0; k < count; ++k) scores[k] = s.bias[k] == HIDDEN ? HIDDEN : scores[k] + s.bias[k];
            }
        }
    }

    // Takes the block's values into the sums of row `r`.
    void weigh(Int r, Int count) {
        float *scores = s.scores + r * BLOCK, *sums = kept.sums + r * p.depth(), top = kept.maximum[r];
#pragma omp simd reduction(max : top)
        for (Int k = 0; k < count; ++k) top = scores[k] > top ? scores[k] : top;
        if (top > kept.maximum[r]) {
            float shrunk = exp_negative(kept.maximum[r] - top);
            for (Int d = 0; d < p.depth(); ++d) sums[d] *= shrunk;
            kept.weight[r] *= shrunk;
            kept.maximum[r] = top;
        }
        float origin = top == HIDDEN ? 0.0f : top, weight = 0;
#pragma omp simd reduction(+ : weight)
        for (Int k = 0; k < count; ++k) weight += scores[k] = exp_negative(scores[k] - origin);
        kept.weight[r] += weight;
        accumulate(scores, s.values, p.depth(), count, sums);
    }

    // Values of codes are weighted as they are stored, and turned back once.
    void finish_codes() {
        if (!p.hadamard) return;
        for (Int r = 0; r < p.rows(); ++r) hadamard(kept.sums + r * p.depth(), p.value_dim, s.other);
    }
};

// Joins the shares of row `r` of a KV head into `out`, float32 [value_dim].
void merge(const Problem &p, float *parts, Int r, float sink, float *out) {
    float top = sink, total = 0;
    for (Int i = 0; i < p.shares(); ++i) top = std::max(top, Kept(p, parts + i * p.kept()).maximum[r]);
    float origin = top == HIDDEN ? 0.0f : top;
    std::fill_n(out, p.value_dim, 0.0f);
    for (Int i = 0; i < p.shares(); ++i) {
        Kept kept(p, parts + i * p.kept());
        float factor = exp_negative(kept.maximum[r] - origin);
        total += factor * kept.weight[r];
        const float *sums = kept.sums + r * p.depth();
        for (Int d = 0; d < p.value_dim; ++d) out[d] += factor * sums[d];
    }
    total += exp_negative(sink - origin);
    float share = total > 0 ? 1 / total : total;  // nothing seen: 0; a NaN stays one
    for (Int d = 0; d < p.value_dim; ++d) out[d] *= share;
}

}  // namespace

extern "C" {

// Floats of the workspace that `tiered_attention` takes.
int64_t workspace_floats(const Problem *problem) {
    const Problem &p = *problem;
    return p.team() * Scratch(p).used + p.batch * p.kv_heads * p.shares() * p.kept();
}

// Writes float32 [batch, heads, queries, value_dim]. `lowest`: entries of a mask up to this hide.
void tiered_attention(const Problem *problem, float *workspace, float *out, float scale, float softcap, float lowest) {
    const Problem &p = *problem;
    const Int all = p.tokens(), share = p.share(), shares = p.shares(), flat = p.batch * p.kv_heads, team = p.team();
    const Int scratch = Scratch(p).used;
    float *parts = workspace + team * scratch;
#pragma omp parallel num_threads(int(team)) if (team > 1)
    {
#ifdef _OPENMP
        Int thread = omp_get_thread_num();
#else
        Int thread = 0;
#endif
        Reader reader(p, scale, softcap, lowest, workspace + thread * scratch);
#pragma omp for schedule(dynamic)
        for (Int unit = 0; unit < flat * shares; ++unit) {
            Int start = unit % shares * share, of = unit / shares;
            Kept kept(p, parts + unit * p.kept());
            reader.read(of / p.kv_heads, of % p.kv_heads, start, std::min(start + share, all), kept);
        }
#pragma omp for schedule(static)
        for (Int unit = 0; unit < flat * p.rows(); ++unit) {
            Int of = unit / p.rows(), r = unit % p.rows();
            Int head = of % p.kv_heads * p.group + r / p.queries;
            float sink = p.sinks ? p.sinks[head] : HIDDEN;
            merge(p, parts + of * shares * p.kept(), r, sink, out + unit * p.value_dim);
        }
    }
}

}  // extern "C"
