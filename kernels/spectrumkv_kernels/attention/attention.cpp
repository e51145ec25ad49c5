// Twin of tiered_attention in reference.py for CPUs: reads codes where they lie, in one pass with a running maximum.
//
// A share of a KV head's tokens is one unit of work. Its size depends on neither threads nor batch, nor do results. A
// block of its tokens becomes float32 in a buffer that stays in the L1 cache, where all query rows read it. README.md
// derives what is computed. cpp.py has View, Tokens and Problem once more, which the names and sizes must be those of.

#include "attention_vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr Int BLOCK = 32;   // tokens converted at a time
constexpr Int SHARE = 256;  // tokens of one unit of work, at least
constexpr Int TILE = 64;    // tokens of a tile of packed positions, and
constexpr Int START = 4;    // bytes before their steps; as in segment.py
constexpr Int FINE = 256;   // positions in the table of fine angles; as in cpp.py
constexpr float HIDDEN = -INFINITY;

enum Kind : Int { FLOAT32, BFLOAT16, FLOAT16, BOOL, NONE };

struct View {
    const void *data;
    Int row, head, token;  // strides in elements; the last dimension is contiguous

    template <typename T>
    const T *at(Int i, Int j, Int k) const {
        return static_cast<const T *>(data) + i * row + j * head + k * token;
    }
};

struct Tokens {  // of one segment
    Int bits;  // 16: exact
    Int kind;  // of exact tokens
    Int tokens;
    Int packed;         // its positions are
    View keys, values;  // [batch, kv_heads, tokens, dim], or packed codes
    View positions;     // int32 [batch, kv_heads, tokens], or uint8 [batch, kv_heads, tiles, START + TILE]
    View key_affine, value_affine;
    const float *scales;  // what each byte of a one-byte scale stands for: [256], or null
};

struct Problem {
    Int batch, kv_heads, group, queries, key_dim, value_dim, length;
    Int symmetric, hadamard, balanced, pairs, interleaved;
    const float *frame;   // [batch, kv_heads, frame_size], or null
    const float *angles;  // cos, then sin, of positions below FINE, then of its multiples: [any, 2 * pairs]
    Int query_kind;
    View query;  // [batch, heads, queries, key_dim]
    Int mask_kind;
    View mask;  // [batch, heads, queries, columns]; strides of 0 where it is the same for all
    Int mask_stride, columns;
    Int window, ragged;  // a window of 0: none
    const float *sinks;  // [heads], or null
    Int threads;
    Int count;  // of segments
    const Tokens *segments;  // coded ones first
    float scale, softcap;     // a cap of 0: none
    float lowest;             // entries of a mask up to this hide
    float *workspace;         // of `workspace_floats`
    float *out;               // [batch, heads, queries, value_dim]

    Int tokens() const {
        Int all = 0;
        for (Int i = 0; i < count; ++i) all += segments[i].tokens;
        return all;
    }
    Int rows() const { return group * queries; }
    Int frame_size() const { return balanced ? 2 * key_dim + value_dim + 1 : key_dim; }
    Int turns() const { return frame ? 2 * pairs : 0; }  // a key's cosines and sines, which meet the mean in the query
    Int width() const { return padded(key_dim + turns()); }    // floats of a key or query, with them
    Int depth() const { return padded(value_dim); }            // floats of a value
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

void copy(Int kind, const View &view, Int i, Int j, Int k, Int n, float *to) {
    if (kind == FLOAT32) std::memcpy(to, view.at<float>(i, j, k), n * sizeof(float));
    if (kind == BFLOAT16) bfloats(view.at<uint16_t>(i, j, k), n, to);
    if (kind == FLOAT16) halves(view.at<uint16_t>(i, j, k), n, to);
}

// The parts of the frame of a row and KV head, as in codec/frame.py, or null.
struct Frame {
    const float *mean = nullptr, *key_scale = nullptr, *value_mean = nullptr, *value_scale = nullptr;

    Frame(const Problem &p, Int row, Int head) {
        if (!p.frame) return;
        mean = p.frame + (row * p.kv_heads + head) * p.frame_size();
        if (!p.balanced) return;
        key_scale = mean + p.key_dim;
        value_mean = key_scale + p.key_dim;
        value_scale = value_mean + p.value_dim;
    }
};

// What is kept of one share: the values' sum weighted by exp(score - maximum), the maxima and the sums of the weights.
struct Kept {
    float *sums, *maximum, *weight;

    Kept(const Problem &p, float *base)
        : sums(base), maximum(base + p.rows() * p.depth()), weight(maximum + p.rows()) {}
};

// Reads the tokens of one row and KV head.
class Reader {
  public:
    Reader(const Problem &p, float *scratch) : p(p), s(p, scratch) {
        std::fill_n(scratch, s.used, 0.0f);
    }

    // Tokens from `start` to `end`, counted over all segments.
    void read(Int row_, Int head_, Int start, Int end, Kept into) {
        row = row_, head = head_, kept = into;
        prepare();
        std::fill_n(kept.sums, p.rows() * p.depth(), 0.0f);
        std::fill_n(kept.weight, p.rows(), 0.0f);
        std::fill_n(kept.maximum, p.rows(), HIDDEN);
        bool in_codes = p.segments[0].bits < 16;
        for (Int i = 0; i < p.count; ++i) {
            const Tokens &segment = p.segments[i];
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
    Int row = 0, head = 0, run = -1;  // run: position / FINE, for which the queries are turned
    int32_t unpacked[BLOCK];
    Kept kept{p, nullptr};

    void prepare() {
        Int dim = p.key_dim;
        const Frame frame(p, row, head);
        const float *mean = frame.mean;
        run = -1;
        for (Int r = 0; r < p.rows(); ++r) {
            float *q = s.plain + r * p.width(), *turned = s.turned + r * p.width();
            copy(p.query_kind, p.query, row, head * p.group + r / p.queries, r % p.queries, dim, q);
            for (Int d = 0; d < dim; ++d) q[d] *= p.scale;
            for (Int d = 0; d < dim; ++d) turned[d] = frame.key_scale ? q[d] * frame.key_scale[d] : q[d];
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

    // Leaves to the table of fine angles what is left of the positions FINE * to and those that follow.
    void turn(Int to) {
        run = to;
        const float *cos = p.angles + (FINE + run) * 2 * p.pairs, *sin = cos + p.pairs;
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

    // Positions from `t` on: as they lie, or from the steps of packed tiles.
    const int32_t *positions_of(const Tokens &segment, Int t, Int count) {
        if (!segment.packed) return segment.positions.at<int32_t>(row, head, t);
        int32_t position = 0;
        for (Int at = t / TILE * TILE; at < t + count; ++at) {
            const uint8_t *tile = segment.positions.at<uint8_t>(row, head, at / TILE);
            if (at % TILE == 0) std::memcpy(&position, tile, START);
            position += tile[START + at % TILE];
            if (at >= t) unpacked[at - t] = position;
        }
        return unpacked;
    }

    // Reads tokens from `t` on, and says how many.
    Int block(const Tokens &segment, Int t, Int stop) {
        Int count = std::min(BLOCK, stop - t), width = p.width();
        const int32_t *positions = positions_of(segment, t, count);
        bool coded = segment.bits < 16;
        if (coded && p.turns()) {
            Int to = place(positions[0]) / FINE, same = 1;
            while (same < count && place(positions[same]) / FINE == to) ++same;
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
            if (p.softcap > 0) cap(scores, count);
        }
        if (p.hides()) hide(positions, count);
        for (Int r = 0; r < p.rows(); ++r) weigh(r, count);
        return count;
    }

    template <int bits>
    void unpack_side(
        const View &codes, const View &affine, const float *scales, Int t, Int count, Int dim, Int stride,
        float *to) const {
        const Int each = p.symmetric ? 1 : 2;
        const float middle = float(1 << (bits - 1)) - (scales ? 0.5f : 0.0f);
        if (scales) {
            for (Int k = 0; k < count; ++k) s.affine[k] = scales[*affine.at<uint8_t>(row, head, t + k)];
        } else if (affine.token == each) {
            halves(affine.at<uint16_t>(row, head, t), count * each, s.affine);
        } else {
            for (Int k = 0; k < count; ++k) halves(affine.at<uint16_t>(row, head, t + k), each, s.affine + k * each);
        }
        for (Int k = 0; k < count; ++k) {
            float scale = s.affine[k * each];
            float zero = p.symmetric ? -scale * middle : s.affine[k * each + 1];
            unpack<bits>(codes.at<uint8_t>(row, head, t + k), dim, scale, zero, to + k * stride);
        }
    }

    template <int bits>
    void unpack_tokens(const Tokens &segment, Int t, Int count) const {
        const float *scales = segment.scales;
        unpack_side<bits>(segment.keys, segment.key_affine, scales, t, count, p.key_dim, p.width(), s.keys);
        unpack_side<bits>(segment.values, segment.value_affine, scales, t, count, p.value_dim, p.depth(), s.values);
    }

    void convert_codes(const Tokens &segment, Int t, Int count, const int32_t *positions) {
        if (segment.bits == 8) unpack_tokens<8>(segment, t, count);
        if (segment.bits == 4) unpack_tokens<4>(segment, t, count);
        if (segment.bits == 3) unpack_tokens<3>(segment, t, count);
        if (segment.bits == 2) unpack_tokens<2>(segment, t, count);
        if (segment.bits == 1) unpack_tokens<1>(segment, t, count);
        Int turns = p.turns(), width = p.width();
        for (Int k = 0; turns && k < count; ++k) {
            const float *angles = p.angles + (place(positions[k]) - run * FINE) * turns;
            float *to = s.keys + k * width + p.key_dim;
#pragma omp simd
            for (Int d = 0; d < turns; ++d) to[d] = angles[d];
        }
    }

    void cap(float *scores, Int count) const {
#pragma omp simd
        for (Int k = 0; k < count; ++k) {
            float x = scores[k] / p.softcap, e = exp_negative(-2 * std::fabs(x));
            scores[k] = std::copysign(p.softcap * (1 - e) / (1 + e), x);
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
        return value <= p.lowest ? HIDDEN : value;
    }

    void hide(const int32_t *positions, Int count) {
        Int first = p.mask_kind == NONE ? 0 : p.length - p.columns;
        bool alike = p.mask_kind == NONE || p.mask.head == 0;  // for all query heads
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

    // Values of codes are weighted as they are stored, and turned back once. No others have been weighted yet, so the
    // sum of the weights is what the mean comes with.
    void finish_codes() {
        const Frame frame(p, row, head);
        for (Int r = 0; r < p.rows(); ++r) {
            float *sums = kept.sums + r * p.depth();
            if (p.hadamard) hadamard(sums, p.value_dim, s.other);
            for (Int d = 0; frame.value_mean && d < p.value_dim; ++d) {
                sums[d] = sums[d] * *frame.value_scale + kept.weight[r] * frame.value_mean[d];
            }
        }
    }
};

// Joins `shares` parts of row `r` of a KV head into `out`, float32 [value_dim].
void merge(const Problem &p, float *parts, Int shares, Int r, float sink, float *out) {
    const Int each = p.kept();
    float top = sink, total = 0;
    for (Int i = 0; i < shares; ++i) top = std::max(top, Kept(p, parts + i * each).maximum[r]);
    float origin = top == HIDDEN ? 0.0f : top;
    std::fill_n(out, p.value_dim, 0.0f);
    for (Int i = 0; i < shares; ++i) {
        Kept kept(p, parts + i * each);
        float factor = exp_negative(kept.maximum[r] - origin);
        total += factor * kept.weight[r];
        const float *sums = kept.sums + r * p.depth();
        for (Int d = 0; d < p.value_dim; ++d) out[d] += factor * sums[d];
    }
    total += exp_negative(sink - origin);
    float scale = total > 0 ? 1 / total : total;  // nothing seen: 0; a NaN stays one
    for (Int d = 0; d < p.value_dim; ++d) out[d] *= scale;
}

}  // namespace

extern "C" {

Int size_of_View() { return sizeof(View); }
Int size_of_Tokens() { return sizeof(Tokens); }
Int size_of_Problem() { return sizeof(Problem); }

// Floats of the workspace, which need not be there yet, nor the output.
Int workspace_floats(const Problem *problem) {
    const Problem &p = *problem;
    return p.team() * Scratch(p).used + p.batch * p.kv_heads * p.shares() * p.kept();
}

void tiered_attention(const Problem *problem) {
    const Problem &p = *problem;
    const Int all = p.tokens(), share = p.share(), shares = p.shares(), flat = p.batch * p.kv_heads, team = p.team();
    const Int scratch = Scratch(p).used;
    float *parts = p.workspace + team * scratch;
#pragma omp parallel num_threads(int(team)) if (team > 1)
    {
#ifdef _OPENMP
        Int thread = omp_get_thread_num();
#else
        Int thread = 0;
#endif
        Reader reader(p, p.workspace + thread * scratch);
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
            merge(p, parts + of * shares * p.kept(), shares, r, sink, p.out + unit * p.value_dim);
        }
    }
}

}  // extern "C"
