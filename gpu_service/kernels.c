/* What a decode step is made of, in bf16 with sums in fp32, for CPUs: see kernels.py. OpenMP is the one that torch has
 * loaded. Each sum runs in the same order however many rows there are, so a row's result does not depend on the rows
 * beside it.
 *
 * Products: where the processor multiplies bf16 (AVX512-BF16), its own instruction does. Elsewhere it is portable C with
 * GNU vectors: a bf16 number is the upper half of an fp32, so 16 bits at even places become fp32 by a shift, those at odd
 * places by a mask, two instructions for a whole block of weights; activations are laid out in the same order once.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDE 4   /* vectors of a LoRA pair's outputs that are summed at a time */
#define CHUNK 48 /* rows of weights that one thread takes at a time; they stay in its cache for all of x */

static inline float wide_of(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* To the nearest, ties to even, as torch rounds. */
static inline uint16_t rounded(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0; /* NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

static inline vec wide_of_all(const uint16_t *b) { return (vec)(__builtin_convertvector(*(const halves *)b, bits) << 16); }

static inline void round_all(uint16_t *y, vec v) {
    bits u = (bits)v, none = (bits)(v != v);
    u = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    *(halves *)y = __builtin_convertvector((u & ~none) | (0x7fc0u & none), halves);
}

static inline float total(vec v) {
    quad q = {0};
    for (int i = 0; i < LANES / 4; i++) q += ((const quad *)&v)[i];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

#ifdef __AVX512BF16__
#include <immintrin.h>

#define BLOCK 32 /* K must be a multiple of it */
#define SUMS 16  /* of one tile: rows of x times rows of weights, one register each */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef uint16_t number;

/* Only fills up to a whole tile: rows of 8, and the last ones of 1, 2, 4 or 8. */
static const number *prepared(const uint16_t *x, void *scratch, long M, long K) {
    long rest = M % 8;
    if ((rest & (rest - 1)) == 0) return x;
    memcpy(scratch, x, M * K * 2);
    memset((uint16_t *)scratch + M * K, 0, (rest == 3 ? 1 : 8 - rest) * K * 2);
    return scratch;
}

/* 16 registers -> the sums of their lanes, in their order. */
INLINE __m512 sums(const __m512 *v) {
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++) {
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

/* The products of M_ rows of x with SUMS / M_ rows of w. Weights are asked for a tile ahead: they come from memory, and
 * the processor alone sees too late how the tiles follow each other. */
#define DOTS(M_)                                                                                                  \
    INLINE __m512 dots##M_(const number *x, const uint16_t *w, long K) {                                          \
        enum { N_ = SUMS / M_ };                                                                                  \
        __m512 acc[SUMS];                                                                                         \
        UNROLL for (int i = 0; i < SUMS; i++) acc[i] = _mm512_setzero_ps();                                       \
        for (long k = 0; k < K; k += BLOCK) {                                                                     \
            __m512bh b[N_];                                                                                       \
            UNROLL for (int n = 0; n < N_; n++) {                                                                 \
                b[n] = (__m512bh)_mm512_loadu_si512(w + n * K + k);                                               \
                __builtin_prefetch(w + (n + N_) * K + k);                                                         \
            }                                                                                                     \
            UNROLL for (int m = 0; m < M_; m++) {                                                                 \
                __m512bh a = (__m512bh)_mm512_loadu_si512(x + m * K + k);                                         \
                UNROLL for (int n = 0; n < N_; n++) acc[m * N_ + n] = _mm512_dpbf16_ps(acc[m * N_ + n], a, b[n]); \
            }                                                                                                     \
        }                                                                                                         \
        return sums(acc);                                                                                         \
    }

DOTS(1) DOTS(2) DOTS(4) DOTS(8)

/* s plus what is to be added, into `rows` rows of y, each of the N_ numbers that s has of it. */
INLINE void store(__m512 s, const uint16_t *add, long add_stride, uint16_t *y, long rows, long N_, long N) {
    uint16_t out[SUMS] = {0};
    if (add) {
        for (long m = 0; m < rows && m * N_ < SUMS; m++) memcpy(out + m * N_, add + m * add_stride, 2 * N_);
        __m512i plus = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)out));
        s = _mm512_add_ps(s, _mm512_castsi512_ps(_mm512_slli_epi32(plus, 16)));
    }
    _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(s));
    for (long m = 0; m < rows && m * N_ < SUMS; m++) memcpy(y + m * N, out + m * N_, 2 * N_);
}

/* One row of x by one of w, the sum as in a tile. */
static void single(const number *x, const uint16_t *w, const uint16_t *add, uint16_t *y, long K) {
    __m512 acc[SUMS] = {_mm512_setzero_ps()};
    for (long k = 0; k < K; k += BLOCK) {
        acc[0] = _mm512_dpbf16_ps(acc[0], (__m512bh)_mm512_loadu_si512(x + k), (__m512bh)_mm512_loadu_si512(w + k));
    }
    *y = rounded(_mm512_cvtss_f32(sums(acc)) + (add ? wide_of(*add) : 0));
}

/* All rows of x by the weights from `first` to `end`. */
static void span(const number *x, const uint16_t *w, const uint16_t *add, long add_stride, uint16_t *y, long first,
                 long end, long M, long N, long K) {
    for (long m = 0; m < M; m += 8) {
        long rows = M - m < 8 ? M - m : 8, n = first;
        const number *row = x + m * K;
        int wide = rows == 1 ? 1 : rows == 2 ? 2 : rows <= 4 ? 4 : 8;
        for (; n + SUMS / wide <= end; n += SUMS / wide) {
            const uint16_t *at = w + n * K, *plus = add ? add + m * add_stride + n : 0;
            uint16_t *to = y + m * N + n;
            switch (wide) {
            case 1: store(dots1(row, at, K), plus, add_stride, to, 1, 16, N); break;
            case 2: store(dots2(row, at, K), plus, add_stride, to, 2, 8, N); break;
            case 4: store(dots4(row, at, K), plus, add_stride, to, rows, 4, N); break;
            default: store(dots8(row, at, K), plus, add_stride, to, rows, 2, N);
            }
        }
        for (; n < end; n++)
            for (long i = m; i < m + rows; i++)
                single(x + i * K, w + n * K, add ? add + i * add_stride + n : 0, y + i * N + n, K);
    }
}

#else

#define BLOCK (2 * LANES) /* K must be a multiple of it */
#define NR 3              /* rows of weights and of activations in one tile: 12 sums, 3 weights and 1 activation fill */
#define MR 4              /* the 16 registers of AVX2 */

typedef float number;

static const number *prepared(const uint16_t *x, void *scratch, long M, long K) {
    float *wide = scratch;
    for (long k = 0; k < M * K; k += BLOCK) {
        bits b = *(const bits *)(x + k);
        *(bits *)(wide + k) = b << 16;
        *(bits *)(wide + k + LANES) = b & 0xffff0000u;
    }
    return wide;
}

/* N_ rows of w times M_ rows of x. */
#define TILE(N_, M_)                                                                                              \
    static inline void tile##N_##M_(const number *x, const uint16_t *w, const uint16_t *add, long add_stride,     \
                                    uint16_t *y, long K, long N) {                                               \
        vec acc[N_][M_] = {0};                                                                                    \
        for (long k = 0; k < K; k += BLOCK) {                                                                     \
            vec even[N_], odd[N_];                                                                                \
            for (int n = 0; n < N_; n++) {                                                                        \
                bits b = *(const bits *)(w + n * K + k);                                                          \
                even[n] = (vec)(b << 16);                                                                         \
                odd[n] = (vec)(b & 0xffff0000u);                                                                  \
            }                                                                                                     \
            for (int m = 0; m < M_; m++)                                                                          \
                for (int n = 0; n < N_; n++) acc[n][m] += *(const vec *)(x + m * K + k) * even[n];                \
            for (int m = 0; m < M_; m++)                                                                          \
                for (int n = 0; n < N_; n++) acc[n][m] += *(const vec *)(x + m * K + k + LANES) * odd[n];         \
        }                                                                                                         \
        for (int m = 0; m < M_; m++)                                                                              \
            for (int n = 0; n < N_; n++)                                                                          \
                y[m * N + n] = rounded(total(acc[n][m]) + (add ? wide_of(add[m * add_stride + n]) : 0));            \
    }

TILE(3, 4) TILE(3, 3) TILE(3, 2) TILE(3, 1) TILE(1, 4) TILE(1, 3) TILE(1, 2) TILE(1, 1)

#define TILES(N_)                                                                                                 \
    switch (M - m) {                                                                                              \
    case 1: tile##N_##1(row, at, plus, add_stride, to, K, N); break;                                              \
    case 2: tile##N_##2(row, at, plus, add_stride, to, K, N); break;                                              \
    case 3: tile##N_##3(row, at, plus, add_stride, to, K, N); break;                                              \
    default: tile##N_##4(row, at, plus, add_stride, to, K, N);                                                    \
    }

/* All rows of x by the weights from `first` to `end`. */
static void span(const number *x, const uint16_t *w, const uint16_t *add, long add_stride, uint16_t *y, long first,
                 long end, long M, long N, long K) {
    for (long m = 0; m < M; m += MR) {
        const number *row = x + m * K;
        long n = first;
        for (; n + NR <= end; n += NR) {
            const uint16_t *at = w + n * K, *plus = add ? add + m * add_stride + n : 0;
            uint16_t *to = y + m * N + n;
            TILES(3)
        }
        for (; n < end; n++) {
            const uint16_t *at = w + n * K, *plus = add ? add + m * add_stride + n : 0;
            uint16_t *to = y + m * N + n;
            TILES(1)
        }
    }
}

#endif

long block(void) { return BLOCK; }

/* y (M, N) = x (M, K) . w (N, K)^T + add, all bf16 and dense; add may be null, and is one row (stride 0) or M.
 * `scratch` has room for M x K floats. */
void product(const uint16_t *x, const uint16_t *w, const uint16_t *add, long add_stride, uint16_t *y, float *scratch,
             long M, long N, long K) {
    const number *rows = prepared(x, scratch, M, K);
    /* Dynamic: with few cores another thread often holds one of them, and the other can go on. */
#pragma omp parallel for schedule(dynamic, 1) if (M * N * K > 1 << 15)
    for (long first = 0; first < N; first += CHUNK)
        span(rows, w, add, add_stride, y, first, first + CHUNK < N ? first + CHUNK : N, M, N, K);
}

/* p (n) = x (K) . w (n, K)^T * scale; K is a multiple of LANES. */
static void dots(const uint16_t *x, const uint16_t *w, float *p, float scale, long n, long K) {
    long j = 0;
#ifdef __AVX512BF16__
    for (; K % BLOCK == 0 && j + SUMS <= n; j += SUMS)
        _mm512_storeu_ps(p + j, _mm512_mul_ps(dots1(x, w + j * K, K), _mm512_set1_ps(scale)));
#endif
    for (; j < n; j++) {
        vec sums = {0};
        for (long k = 0; k < K; k += LANES) sums += wide_of_all(w + j * K + k) * wide_of_all(x + k);
        p[j] = total(sums) * scale;
    }
}

/* What LoRA adds to y (rows x each, N), in place, for x (rows x each, K), all bf16 and dense: row i of `each` rows meets
 * its own pair a[i] (rank[i], K) and b[i] (rank[i], N); at rank 0 its rows stay as they are. `scratch` has room for
 * `most` floats, the highest rank, a row of x. */
void adapt(const uint16_t *x, uint16_t *y, const uint16_t **a, const uint16_t **b, const long *rank, const float *scale,
           float *scratch, long rows, long each, long most, long N, long K) {
#pragma omp parallel for schedule(dynamic, 1) if (rows * each * (N + K) * most > 1 << 15)
    for (long m = 0; m < rows * each; m++) {
        long i = m / each, R = rank[i];
        const uint16_t *own = b[i];
        float *u = scratch + m * most;
        if (R == 0) continue;
        dots(x + m * K, a[i], u, scale[i], R, K);
        uint16_t *out = y + m * N;
        long n = 0;
        for (; n + WIDE * LANES <= N; n += WIDE * LANES) {
            vec sums[WIDE] = {0};
            for (long r = 0; r < R; r++)
                for (int i = 0; i < WIDE; i++) sums[i] += wide_of_all(own + r * N + n + i * LANES) * u[r];
            for (int i = 0; i < WIDE; i++) round_all(out + n + i * LANES, wide_of_all(out + n + i * LANES) + sums[i]);
        }
        for (; n < N; n++) {
            float sum = 0;
            for (long r = 0; r < R; r++) sum += wide_of(own[r * N + n]) * u[r];
            out[n] = rounded(wide_of(out[n]) + sum);
        }
    }
}

/* y (M, D) = x (M, D) over the root of its mean square, times w (D); all bf16 and dense. Row m's epsilon is of[m / each],
 * or `eps` where `of` is null. Rounded before the weight too, as the models were trained. */
void rms_norm(const uint16_t *x, const uint16_t *w, const float *of, float eps, uint16_t *y, long M, long each, long D) {
#pragma omp parallel for schedule(static) if (M * D > 1 << 16)
    for (long m = 0; m < M; m++) {
        const uint16_t *row = x + m * D;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long d = 0; d < D; d++) squares += wide_of(row[d]) * wide_of(row[d]);
        float factor = 1 / sqrtf(squares / D + (of ? of[m / each] : eps));
#pragma omp simd
        for (long d = 0; d < D; d++) y[m * D + d] = rounded(wide_of(rounded(wide_of(row[d]) * factor)) * wide_of(w[d]));
    }
}

/* e to the x, for x <= 0; within 2e-7 of it. Below -87 it is 0 for all that follows. */
static inline float exp_of(float x) {
    float t = x * 1.44269504f;
    t = t < -126 ? -126 : t;
    float whole = __builtin_rintf(t), f = t - whole;
    float p = 1 + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * (0.00133336f + f * 0.00015403f)))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static void softmax(float *p, long n) {
    float most = p[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (long j = 0; j < n; j++) most = p[j] > most ? p[j] : most;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < n; j++) {
        p[j] = exp_of(p[j] - most);
        sum += p[j];
    }
    float share = 1 / sum;
    for (long j = 0; j < n; j++) p[j] *= share;
}

/* y (R_, Dh) = p (R_ rows of n, `longest` apart) . values (n, Dh) */
#define WEIGH(R_)                                                                                                 \
    static void weigh##R_(const float *p, const uint16_t *values, uint16_t *y, long longest, long n, long Dh) {   \
        for (long d = 0; d < Dh; d += LANES) {                                                                    \
            vec sums[R_] = {0};                                                                                   \
            for (long j = 0; j < n; j++) {                                                                        \
                vec value = wide_of_all(values + j * Dh + d);                                                     \
                for (int r = 0; r < R_; r++) sums[r] += value * p[r * longest + j];                               \
            }                                                                                                     \
            for (int r = 0; r < R_; r++) round_all(y + r * Dh + d, sums[r]);                                      \
        }                                                                                                         \
    }

WEIGH(1) WEIGH(2) WEIGH(4)

/* One token of each of B rows: its k and v (G x Dh) are written behind the at[b] that keys and values (slots, G, capacity,
 * Dh) hold of row b, and its q (H x Dh) attends to them all; y (B, H, Dh). Dh is a multiple of 16. `strides` are those of
 * q's, k's and v's rows. `scratch` has room for B x H x longest floats, where `longest` counts this token. */
void attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, const long *strides, uint16_t *keys, uint16_t *values,
            const long *at, uint16_t *y, float *scratch, long longest, long B, long H, long G, long Dh, long capacity) {
    long R = H / G; /* heads of q that share one of k */
    float scale = 1 / sqrtf((float)Dh);
#pragma omp parallel for schedule(dynamic, 1) if (B * H * longest * Dh > 1 << 14)
    for (long task = 0; task < B * G; task++) {
        long b = task / G, g = task % G, n = at[b] + 1;
        uint16_t *own_keys = keys + task * capacity * Dh, *own_values = values + task * capacity * Dh;
        const uint16_t *heads = q + b * strides[0] + g * R * Dh;
        uint16_t *out = y + (b * H + g * R) * Dh;
        float *p = scratch + task * R * longest;
        memcpy(own_keys + at[b] * Dh, k + b * strides[1] + g * Dh, 2 * Dh);
        memcpy(own_values + at[b] * Dh, v + b * strides[2] + g * Dh, 2 * Dh);
        for (long r = 0; r < R; r++) {
            dots(heads + r * Dh, own_keys, p + r * longest, scale, n, Dh);
            softmax(p + r * longest, n);
        }
        for (long r = 0, many; r < R; r += many) {
            many = R - r >= 4 ? 4 : R - r >= 2 ? 2 : 1;
            (many == 4 ? weigh4 : many == 2 ? weigh2 : weigh1)(p + r * longest, own_values, out + r * Dh, longest, n, Dh);
        }
    }
}
