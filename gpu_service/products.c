/* Products of fp32-accumulated bf16, for CPUs: see products.py. Portable C with GNU vectors; the compiler chooses the
 * instructions of the processor that it runs on, and OpenMP is the one that torch has loaded.
 *
 * A bf16 number is the upper half of an fp32. So 16 bits at even places become fp32 by a shift, those at odd places by a
 * mask, two instructions for a whole block of weights; activations are laid out in the same order once, beforehand.
 */
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define BLOCK (2 * LANES) /* K must be a multiple of it */
#define NR 3              /* rows of weights and of activations in one tile: 12 sums, 3 weights and 1 activation fill */
#define MR 4              /* the 16 registers of AVX2 */
#define ADAPTED 64        /* outputs of a LoRA pair that one thread takes at a time */
#define CHUNK 16          /* tiles of weights that one thread takes at a time; they stay in its cache for all of x */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

static inline float sum(vec v) {
    quad q = {0};
    for (int i = 0; i < LANES / 4; i++) q += ((const quad *)&v)[i];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

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

/* N_ rows of w times M_ rows of x. Each sum runs in the same order whatever N_ and M_ are, so a row's result does not
 * depend on the rows beside it. */
#define TILE(N_, M_)                                                                                              \
    static inline void tile##N_##M_(const float *x, const uint16_t *w, const uint16_t *add, long add_stride,     \
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
                y[m * N + n] = rounded(sum(acc[n][m]) + (add ? wide_of(add[m * add_stride + n]) : 0));            \
    }

TILE(3, 4) TILE(3, 3) TILE(3, 2) TILE(3, 1) TILE(1, 4) TILE(1, 3) TILE(1, 2) TILE(1, 1)

#define TILES(N_)                                                                                                 \
    switch (M - m) {                                                                                              \
    case 1: tile##N_##1(row, at, plus, add_stride, to, K, N); break;                                              \
    case 2: tile##N_##2(row, at, plus, add_stride, to, K, N); break;                                              \
    case 3: tile##N_##3(row, at, plus, add_stride, to, K, N); break;                                              \
    default: tile##N_##4(row, at, plus, add_stride, to, K, N);                                                    \
    }

long block(void) { return BLOCK; }

/* y (M, N) = x (M, K) . w (N, K)^T + add, all bf16 and dense; add may be null, and is one row (stride 0) or M.
 * `wide` has room for M x K floats. */
void product(const uint16_t *x, const uint16_t *w, const uint16_t *add, long add_stride, uint16_t *y, float *wide,
             long M, long N, long K) {
    for (long k = 0; k < M * K; k += BLOCK) {
        bits b = *(const bits *)(x + k);
        *(bits *)(wide + k) = b << 16;
        *(bits *)(wide + k + LANES) = b & 0xffff0000u;
    }
    long chunks = (N + NR * CHUNK - 1) / (NR * CHUNK);
    /* Dynamic: with few cores another thread often holds one of them, and the other can go on. */
#pragma omp parallel for schedule(dynamic, 1) if (M * N * K > 1 << 15)
    for (long c = 0; c < chunks; c++) {
        long first = c * NR * CHUNK, end = first + NR * CHUNK < N ? first + NR * CHUNK : N;
        for (long m = 0; m < M; m += MR) {
            const float *row = wide + m * K;
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
}

/* What LoRA adds to y (rows x each, N), in place, for x (rows x each, K), all bf16 and dense: row i of `each` rows meets
 * its own pair a[i] (rank[i], K) and b[i] (rank[i], N); at rank 0 its rows stay as they are. `wide` has room for all of x
 * in fp32 and `u` for `most` floats, the highest rank, a row of x. A row's sums do not depend on the rows beside it. */
void adapt(const uint16_t *x, uint16_t *y, const uint16_t **a, const uint16_t **b, const long *rank, const float *scale,
           float *wide, float *u, long rows, long each, long most, long N, long K) {
    long M = rows * each, chunks = (N + ADAPTED - 1) / ADAPTED;
    for (long k = 0; k < M * K; k++) wide[k] = wide_of(x[k]);
#pragma omp parallel if (M * N * most > 1 << 13)
    {
#pragma omp for schedule(static)
        for (long j = 0; j < M * most; j++) {
            long m = j / most, r = j % most, i = m / each;
            if (r >= rank[i]) continue;
            const uint16_t *at = a[i] + r * K;
            const float *row = wide + m * K;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long k = 0; k < K; k++) sum += wide_of(at[k]) * row[k];
            u[m * most + r] = sum * scale[i];
        }
#pragma omp for schedule(static)
        for (long c = 0; c < M * chunks; c++) {
            long m = c / chunks, i = m / each, R = rank[i], first = c % chunks * ADAPTED;
            long end = first + ADAPTED < N ? first + ADAPTED : N;
            const float *own = u + m * most;
            if (R == 0) continue;
            float sums[ADAPTED] = {0};
            for (long r = 0; r < R; r++) {
                const uint16_t *at = b[i] + r * N + first;
#pragma omp simd
                for (long n = 0; n < end - first; n++) sums[n] += wide_of(at[n]) * own[r];
            }
            for (long n = first; n < end; n++) y[m * N + n] = rounded(wide_of(y[m * N + n]) + sums[n - first]);
        }
    }
}
