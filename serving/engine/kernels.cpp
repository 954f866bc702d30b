// What a decoder's step does between its matmuls, on a CPU: each function is one pass where torch makes five to ten.
//
// Compiled on first use by serving/engine/kernels.py, which also says what the arguments are. Everything is computed in fp32
// and rounded once, when it is stored. T is how weights and activations are stored: float, or bf16 as its 16 bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;

inline float load(const float* p) { return *p; }

inline float load(const bf16* p) {
    uint32_t bits = uint32_t(*p) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float* p, float value) { *p = value; }

inline void store(bf16* p, float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = bf16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// e^x by a polynomial (Cephes, as in many vector libraries): within 2 ulp, and the compiler can vectorise it.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.3f), 88.3f);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

template <typename T>
void norm_row(const float* x, T* out, const T* weight, int size, float eps, float offset) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < size; i++) squares += x[i] * x[i];
    float inverse = 1.0f / std::sqrt(squares / size + eps);
#pragma omp simd
    for (int i = 0; i < size; i++) store(out + i, x[i] * inverse * (load(weight + i) + offset));
}

// x += add (normalised first where post is given), then out = norm(x). add may be null: only the norm.
template <typename T>
void add_norm(T* x, const T* add, const T* post, T* out, const T* weight, int tokens, int size, float eps, float offset) {
#pragma omp parallel for schedule(static) if (long(tokens) * size > (1 << 16))
    for (int t = 0; t < tokens; t++) {
        T* row = x + long(t) * size;
        float sum[size];
#pragma omp simd
        for (int i = 0; i < size; i++) sum[i] = load(row + i);
        if (add) {
            const T* added = add + long(t) * size;
            float normed[size];
#pragma omp simd
            for (int i = 0; i < size; i++) normed[i] = load(added + i);
            if (post) {
                T rounded[size];
                norm_row(normed, rounded, post, size, eps, offset);
#pragma omp simd
                for (int i = 0; i < size; i++) normed[i] = load(rounded + i);
            }
#pragma omp simd
            for (int i = 0; i < size; i++) store(row + i, sum[i] + normed[i]);
#pragma omp simd
            for (int i = 0; i < size; i++) sum[i] = load(row + i);
        }
        norm_row(sum, out + long(t) * size, weight, size, eps, offset);
    }
}

// act(gate) * up
template <typename T>
void gate(const T* gate_up, T* out, int tokens, int size, int gelu) {
#pragma omp parallel for schedule(static) if (long(tokens) * size > (1 << 14))
    for (int t = 0; t < tokens; t++) {
        const T* g = gate_up + long(t) * 2 * size;
        const T* u = g + size;
        T* o = out + long(t) * size;
        if (gelu) {
#pragma omp simd
            for (int i = 0; i < size; i++) {
                float v = load(g + i);
                float inner = 0.7978845608f * (v + 0.044715f * v * v * v);
                store(o + i, 0.5f * v * (1.0f + hyperbolic_tangent(inner)) * load(u + i));
            }
        } else {
#pragma omp simd
            for (int i = 0; i < size; i++) {
                float v = load(g + i);
                store(o + i, v / (1.0f + exponential(-v)) * load(u + i));
            }
        }
    }
}

// Norms (if any) and rotates queries and keys in place, then puts keys and values into the cache.
template <typename T>
void rotate_store(T* qkv, const float* cos, const float* sin, const T* q_norm, const T* k_norm, T* cache, const int64_t* places,
                  int tokens, int heads, int kv_heads, int dim, long head_stride, float eps, float offset) {
    int half = dim / 2, all = heads + 2 * kv_heads;
#pragma omp parallel for schedule(static) if (tokens > 32)
    for (int t = 0; t < tokens; t++) {
        const float *c = cos + long(t) * half, *s = sin + long(t) * half;
        for (int h = 0; h < all; h++) {
            T* head = qkv + (long(t) * all + h) * dim;
            if (h < heads + kv_heads) {
                const T* weight = h < heads ? q_norm : k_norm;
                if (weight) {
                    float values[dim];
#pragma omp simd
                    for (int i = 0; i < dim; i++) values[i] = load(head + i);
                    norm_row(values, head, weight, dim, eps, offset);
                }
#pragma omp simd
                for (int i = 0; i < half; i++) {
                    float a = load(head + i), b = load(head + half + i);
                    store(head + i, a * c[i] - b * s[i]);
                    store(head + half + i, b * c[i] + a * s[i]);
                }
            }
            if (h >= heads) std::memcpy(cache + (h - heads) * head_stride + places[t] * dim, head, dim * sizeof(T));
        }
    }
}

// Scores of several queries with one key.
template <typename T>
inline void dots(int groups, const float* queries, const T* key, int dim, float* out, long stride) {
    for (int g = 0; g < groups; g++) {
        const float* q = queries + g * dim;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < dim; i++) sum += q[i] * load(key + i);
        out[g * stride] = sum;
    }
}

// One new token of each of several sequences, with all that its window shows it. Sequence n's blocks are
// blocks[starts[n] .. starts[n + 1]); its token is row n of qkv.
template <typename T>
void attend(const T* qkv, T* out, const T* cache, const int* blocks, const int* starts, const int* lengths, int sequences,
            int heads, int kv_heads, int dim, long head_stride, int block_size, int window, float scale, float softcap) {
    int groups = heads / kv_heads, all = heads + 2 * kv_heads;
    long work = 0;
    for (int n = 0; n < sequences; n++) work += lengths[n];
#pragma omp parallel if (work * heads * dim > (1 << 15))
    {
        std::vector<float> queries(groups * dim), sums(groups * dim), scores;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < sequences * kv_heads; item++) {
            int n = item / kv_heads, kv = item % kv_heads, length = lengths[n];
            int first = window > 0 ? std::max(0, length - window) : 0, seen = length - first;
            const int* table = blocks + starts[n];
            const T* keys = cache + kv * head_stride;
            const T* values = cache + (kv_heads + kv) * head_stride;
            const T* q = qkv + (long(n) * all + kv * groups) * dim;
            for (int i = 0; i < groups * dim; i++) queries[i] = load(q + i) * scale;
            scores.resize(long(groups) * seen);
            for (int at = first; at < length;) {
                long row = long(table[at / block_size]) * block_size + at % block_size;
                int stop = std::min(length, (at / block_size + 1) * block_size);
                for (; at < stop; at++, row++) dots(groups, queries.data(), keys + row * dim, dim, &scores[at - first], seen);
            }
            for (int g = 0; g < groups; g++) {
                float* row = &scores[long(g) * seen];
                if (softcap > 0) {
#pragma omp simd
                    for (int i = 0; i < seen; i++) row[i] = hyperbolic_tangent(row[i] / softcap) * softcap;
                }
                float most = row[0], sum = 0;
#pragma omp simd reduction(max : most)
                for (int i = 0; i < seen; i++) most = std::max(most, row[i]);
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < seen; i++) {
                    row[i] = exponential(row[i] - most);
                    sum += row[i];
                }
                float inverse = 1.0f / sum;
#pragma omp simd
                for (int i = 0; i < seen; i++) row[i] *= inverse;
            }
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int at = first; at < length;) {
                long row = long(table[at / block_size]) * block_size + at % block_size;
                int stop = std::min(length, (at / block_size + 1) * block_size);
                for (; at < stop; at++, row++) {
                    const T* value = values + row * dim;
                    for (int g = 0; g < groups; g++) {
                        float weight = scores[long(g) * seen + at - first], *sum = &sums[g * dim];
#pragma omp simd
                        for (int i = 0; i < dim; i++) sum[i] += weight * load(value + i);
                    }
                }
            }
            T* to = out + (long(n) * heads + kv * groups) * dim;
            for (int i = 0; i < groups * dim; i++) store(to + i, sums[i]);
        }
    }
}

// One adapter's update of one projection, as serving/engine/kernels.py lays it out.
struct Update {
    const void* a;  // [rank, in]; null: this adapter does not have this projection
    const void* b;  // [rank, out], times the scale
    int32_t rank, start, size, unused;
};

// Tokens start to stop have the adapter in this slot.
struct Segment {
    int32_t slot, start, stop;
};

template <typename T, int N>
void lora_block(const T* x, T* y, int in, int out, const Update* updates, int projections, float* xs, float* low) {
    for (int n = 0; n < N; n++)
#pragma omp simd
        for (int i = 0; i < in; i++) xs[n * in + i] = load(x + long(n) * in + i);
    for (int p = 0; p < projections; p++) {
        const Update& update = updates[p];
        if (!update.a) continue;
        for (int r = 0; r < update.rank; r++) {
            const T* a = static_cast<const T*>(update.a) + long(r) * in;
            float sums[N] = {};
            if constexpr (N == 1) {
                float s0 = 0;
#pragma omp simd reduction(+ : s0)
                for (int i = 0; i < in; i++) s0 += load(a + i) * xs[i];
                sums[0] = s0;
            } else if constexpr (N == 2) {
                float s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
                for (int i = 0; i < in; i++) {
                    float v = load(a + i);
                    s0 += v * xs[i];
                    s1 += v * xs[in + i];
                }
                sums[0] = s0, sums[1] = s1;
            } else {
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
                for (int i = 0; i < in; i++) {
                    float v = load(a + i);
                    s0 += v * xs[i];
                    s1 += v * xs[in + i];
                    s2 += v * xs[2 * in + i];
                    s3 += v * xs[3 * in + i];
                }
                sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
            }
            for (int n = 0; n < N; n++) low[n * update.rank + r] = sums[n];
        }
        const T* b = static_cast<const T*>(update.b);
        constexpr int WIDTH = 32;
        int o = 0;
        for (; o + WIDTH <= update.size; o += WIDTH) {
            float sums[N][WIDTH];
            for (int n = 0; n < N; n++)
#pragma omp simd
                for (int j = 0; j < WIDTH; j++) sums[n][j] = load(y + long(n) * out + update.start + o + j);
            for (int r = 0; r < update.rank; r++) {
                const T* row = b + long(r) * update.size + o;
                for (int n = 0; n < N; n++) {
                    float weight = low[n * update.rank + r];
#pragma omp simd
                    for (int j = 0; j < WIDTH; j++) sums[n][j] += weight * load(row + j);
                }
            }
            for (int n = 0; n < N; n++)
#pragma omp simd
                for (int j = 0; j < WIDTH; j++) store(y + long(n) * out + update.start + o + j, sums[n][j]);
        }
        for (; o < update.size; o++)
            for (int n = 0; n < N; n++) {
                T* to = y + long(n) * out + update.start + o;
                float sum = load(to);
                for (int r = 0; r < update.rank; r++) sum += low[n * update.rank + r] * load(b + long(r) * update.size + o);
                store(to, sum);
            }
    }
}

// y += (x Aᵀ) Bᵀ, each segment with its own adapter.
template <typename T>
void lora(const T* x, T* y, int in, int out, const Update* table, int projections, const Segment* segments, int count,
          int most_rank) {
    constexpr int BLOCK = 4;
    std::vector<Segment> blocks;
    for (int s = 0; s < count; s++)
        for (int start = segments[s].start; start < segments[s].stop; start += BLOCK)
            blocks.push_back({segments[s].slot, start, std::min(start + BLOCK, segments[s].stop)});
#pragma omp parallel if (blocks.size() > 1)
    {
        std::vector<float> xs(BLOCK * in), low(BLOCK * most_rank);
#pragma omp for schedule(static)
        for (size_t n = 0; n < blocks.size(); n++) {
            const Segment& block = blocks[n];
            const Update* updates = table + long(block.slot) * projections;
            for (int t = block.start; t < block.stop;) {
                const T* from = x + long(t) * in;
                T* to = y + long(t) * out;
                switch (block.stop - t) {
                    case 4: lora_block<T, 4>(from, to, in, out, updates, projections, xs.data(), low.data()); t += 4; break;
                    case 1: lora_block<T, 1>(from, to, in, out, updates, projections, xs.data(), low.data()); t += 1; break;
                    default: lora_block<T, 2>(from, to, in, out, updates, projections, xs.data(), low.data()); t += 2;
                }
            }
        }
    }
}

}  // namespace

#define EXPORTED(T, NAME)                                                                                                       \
    extern "C" void add_norm_##NAME(T* x, const T* add, const T* post, T* out, const T* weight, int tokens, int size, float eps, \
                                    float offset) {                                                                             \
        add_norm<T>(x, add, post, out, weight, tokens, size, eps, offset);                                                      \
    }                                                                                                                           \
    extern "C" void gate_##NAME(const T* gate_up, T* out, int tokens, int size, int gelu) {                                     \
        gate<T>(gate_up, out, tokens, size, gelu);                                                                              \
    }                                                                                                                           \
    extern "C" void rotate_store_##NAME(T* qkv, const float* cos, const float* sin, const T* q_norm, const T* k_norm, T* cache, \
                                        const int64_t* places, int tokens, int heads, int kv_heads, int dim, long head_stride,  \
                                        float eps, float offset) {                                                              \
        rotate_store<T>(qkv, cos, sin, q_norm, k_norm, cache, places, tokens, heads, kv_heads, dim, head_stride, eps, offset);  \
    }                                                                                                                           \
    extern "C" void attend_##NAME(const T* qkv, T* out, const T* cache, const int* blocks, const int* starts,                   \
                                  const int* lengths, int sequences, int heads, int kv_heads, int dim, long head_stride,        \
                                  int block_size, int window, float scale, float softcap) {                                     \
        attend<T>(qkv, out, cache, blocks, starts, lengths, sequences, heads, kv_heads, dim, head_stride, block_size, window,   \
                  scale, softcap);                                                                                              \
    }                                                                                                                           \
    extern "C" void lora_##NAME(const T* x, T* y, int in, int out, const Update* table, int projections,                       \
                                const Segment* segments, int count, int most_rank) {                                            \
        lora<T>(x, y, in, out, table, projections, segments, count, most_rank);                                                 \
    }

EXPORTED(float, float32)
EXPORTED(bf16, bfloat16)
