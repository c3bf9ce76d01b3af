/* The compiled core of the runtime: a bit-packed network's file, checked and unpacked, and run. See bnn.h.

   A file's arrays are copied into the layout that the chosen kernels read. Channels are rounded up to blocks of 32: one
   word of signs, 32 floats of the stream; what is beyond a layer's channels stays 0. Signs lie in maps with a border of
   zero bits, and a counter starts at what that border counts wrongly, so that padding is exactly 0.

   A block of the network (a half-block, and the 1x1 half-block behind it) goes through both halves by bands of rows, so
   that what is between them stays in the cache. Threads take images of a batch, or bands of one image: a ticket holds
   the step and its next tile, and who finishes the last tile of a step opens the next step. Nobody waits for a thread
   that holds no tile. */

#include "bnn.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0)
#error "results are defined to the bit: build without -ffast-math, on x86 with SSE2"
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#define HAVE_NEON 1
#include <arm_neon.h>
#endif

#ifndef BNN_WITHOUT_CHECKSUM
#define BNN_WITHOUT_CHECKSUM 0   /* 1 for the fuzzer, which cannot mend it */
#endif
#define INLINE static inline __attribute__((always_inline))
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define ALIGNMENT 64
#define MOST_CHANNELS 16384      /* 3 rows of taps stay below 2^16 */
#define ALL_AT_ONCE 7281         /* channels of which all nine taps do */
#define MOST_SIDE 16384
#define MOST_METADATA (1 << 20)
#define BAND_BYTES (256 << 10)   /* of what is between two halves */
#define ROWS_OF_OUTPUTS 64       /* that a thread takes of a linear layer */

enum { STEM = 1, HALF_BLOCK = 2, MEAN = 3, LINEAR = 4 };
enum { NO_RESIDUAL = 0, SAME = 1, POOLED = 2, DOUBLED = 3 };
enum { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2 };
enum { RELU = 1 };
enum { TOP = 8, BOTTOM = 4, LEFT = 2, RIGHT = 1, EDGES = 16 };

typedef struct {
  int32_t operation, kernel, stride, residual, in, out, type, relu;
  int32_t from, side;            /* of the map that it reads, and of its own */
  int32_t words, in_room, out_room; /* words of an input pixel; channels rounded up to 32 */
  void *weights;
  int32_t *start;                /* [EDGES, out_room]: where counters start, by the edges that taps stick out of */
  float *a, *b, *slope, *shift, *threshold, *scale; /* b: the bias of stem and linear layers */
} Layer;

/* Rows [first, end) of a half-block; pointers are to pixel (first, 0), of inputs to the pixel under its middle tap. */
typedef struct {
  const uint32_t *in, *parity;
  const float *residual;
  float *out;
  uint32_t *signs;               /* NULL after the last half-block */
  size_t in_row, parity_row, residual_row, residual_pixel, out_row, signs_row;
  int32_t first, end, wrap;      /* wrap: the channel at which the residual begins again */
} Band;

typedef struct {
  const uint32_t *in, *parity;
  const float *residual;
  float *out;
  uint32_t *signs;
  size_t in_row, parity_row, residual_row, residual_pixel;
  int32_t edges, wrap;
} Row;

typedef struct {
  const char *name;
  void (*half)(const Layer *, const Band *);
  void (*stem)(const Layer *, const float *const rows[3], float *out, uint32_t *signs);
  void (*sum)(const float *map, size_t pixels, size_t room, float *out);
  float (*dot[3])(const float *x, const void *row, size_t room); /* by number type */
  int in_bytes;                  /* binary weights [block, tap, byte, 32], else [block, tap, word, 32] of words */
  int with_parity;               /* the third tap of a row is the parity of the three */
} Kernels;

INLINE Row row_of(const Layer *l, const Band *b, int32_t y) {
  const size_t i = (size_t)(y - b->first), from = i * (size_t)l->stride;
  return (Row){.in = b->in + from * b->in_row, .parity = b->parity ? b->parity + from * b->parity_row : NULL,
               .residual = b->residual + from * b->residual_row, .out = b->out + i * b->out_row,
               .signs = b->signs ? b->signs + i * b->signs_row : NULL, .in_row = b->in_row,
               .parity_row = b->parity_row, .residual_row = b->residual_row, .residual_pixel = b->residual_pixel,
               .edges = (y == 0 ? TOP : 0) | (y * l->stride + 1 >= l->from ? BOTTOM : 0), .wrap = b->wrap};
}

/* Where the counters of pixel x start, of channels from 32 `block` on. */
INLINE const int32_t *start_of(const Layer *l, const Row *r, int32_t block, int32_t x, int kernel) {
  const int edges = r->edges | (x == 0 ? LEFT : 0) | (x * l->stride + 1 >= l->from ? RIGHT : 0);
  return l->start + (size_t)(kernel == 3 ? edges : 0) * (size_t)l->out_room + 32 * block;
}

/* Rows of taps that lie within the map, and the signs under the first tap of one of them. */
INLINE int first_row(const Row *r, int kernel) { return kernel == 3 && r->edges & TOP ? 1 : 0; }
INLINE int end_row(const Row *r, int kernel) { return kernel == 3 && r->edges & BOTTOM ? 2 : kernel; }
INLINE const uint32_t *taps_of(const Layer *l, const Row *r, int32_t x, int ky, int kernel) {
  const uint32_t *pixel = r->in + (size_t)x * (size_t)l->stride * (size_t)l->words;
  return kernel == 1 ? pixel : pixel + (ptrdiff_t)(ky - 1) * (ptrdiff_t)r->in_row - l->words;
}

/* ------------------------------------------------------------------------------------------------ plain C */

/* Bits of each byte, in each byte. Written out, since without an instruction for it the builtin is a call. */
INLINE uint32_t bits_of_bytes(uint32_t x) {
  x -= x >> 1 & 0x55555555;
  x = (x & 0x33333333) + (x >> 2 & 0x33333333);
  return (x + (x >> 4)) & 0x0f0f0f0f;
}

INLINE void count_plain(const Layer *l, const Row *r, int32_t block, int32_t x, int32_t (*counts)[32],
                        const int pixels, const int blocks, const int kernel) {
  const size_t k = (size_t)l->words, step = (size_t)l->stride * k;
  (void)blocks;
  for (int p = 0; p < pixels; p++) memcpy(counts[p], start_of(l, r, block, x + p, kernel), sizeof counts[p]);
  const uint32_t *w = (const uint32_t *)l->weights + (size_t)block * (size_t)(kernel * kernel) * k * 32;
  const int first = first_row(r, kernel), end = end_row(r, kernel);
  const size_t run = (size_t)kernel * k; /* taps of a row lie side by side, in both */
  for (int ky = first; ky < end; ky++) {
    const uint32_t *a = taps_of(l, r, x, ky, kernel), *row = w + (size_t)ky * run * 32;
    for (int p = 0; p < pixels; p++)
      for (size_t from = 0; from < run; from += 31) { /* 31 words of at most 8 bits a byte */
        const size_t to = from + 31 < run ? from + 31 : run;
        uint32_t bytes[32] = {0};
        for (size_t j = from; j < to; j++) {
          const uint32_t value = a[(size_t)p * step + j];
          for (int c = 0; c < 32; c++) bytes[c] += bits_of_bytes(row[j * 32 + (size_t)c] ^ value);
        }
        for (int c = 0; c < 32; c++) {
          const uint32_t pairs = (bytes[c] & 0x00ff00ff) + (bytes[c] >> 8 & 0x00ff00ff);
          counts[p][c] += (int32_t)((pairs & 0xffff) + (pairs >> 16));
        }
      }
  }
}

static float float_of_half(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  uint32_t exponent = half >> 10 & 31, fraction = half & 1023, bits;
  if (exponent == 0 && fraction == 0) {
    bits = sign;
  } else {
    if (exponent == 0) { /* a denormal: its leading bit becomes the implied one */
      for (exponent = 1; !(fraction & 1024); exponent--) fraction <<= 1;
      fraction &= 1023;
    }
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  }
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#define SET plain
#define TARGET
#define LANES 1
#define PIXELS 4
#define BLOCKS 1
#define STEM_PIXELS 1
#define IN_BYTES 0
#define WITH_PARITY 0
#define FLOATS float
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define SET1(v) ((float)(v))
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#define OF_COUNTS(p) ((float)*(p))
#define SLOPE_OF(u, slope) ((u) > 0 ? 1.0f : (slope))
#define ABOVE(h, t) ((uint32_t)((h) > (t)))
#define SUM(v) (v)
#define OF_HALVES(p) float_of_half(*(p))
#define OF_BYTES(p) ((float)*(p))
#include "kernels.h"

/* ------------------------------------------------------------------------------------------------ AVX-512 */

#ifdef HAVE_X86

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vpopcntdq,avx512bitalg,avx512vnni")))

/* popcount(x) + popcount(y) + popcount(z) = popcount(s) + 2 popcount(majority), where s = x ^ y ^ z. Of three taps in
   a row s is parity of the signs ^ parity of the weights, both known beforehand, and the majority is a function of x, y
   and s alone: z is never formed. */
INLINE AVX512 void count_avx512(const Layer *l, const Row *r, int32_t block, int32_t x, int32_t (*counts)[32],
                                const int pixels, const int blocks, const int kernel) {
  const size_t k = (size_t)l->words, step = (size_t)l->stride * k;
  const uint32_t *w = (const uint32_t *)l->weights + (size_t)block * (size_t)(kernel * kernel) * k * 32;
  const __m512i two = _mm512_set1_epi8(2);
  __m512i sums[7][2];
  (void)blocks;
#pragma GCC unroll 8
  for (int p = 0; p < pixels; p++) {
    const int32_t *start = start_of(l, r, block, x + p, kernel);
    sums[p][0] = _mm512_load_si512(start), sums[p][1] = _mm512_load_si512(start + 16);
  }
  if (kernel == 1) {
    const uint32_t *a = taps_of(l, r, x, 0, kernel);
    for (size_t j = 0; j < k; j++) {
      const __m512i w0 = _mm512_load_si512(w + j * 32), w1 = _mm512_load_si512(w + j * 32 + 16);
#pragma GCC unroll 8
      for (int p = 0; p < pixels; p++) {
        const __m512i value = _mm512_set1_epi32((int)a[(size_t)p * step + j]);
        sums[p][0] = _mm512_add_epi32(sums[p][0], _mm512_popcnt_epi32(_mm512_xor_si512(value, w0)));
        sums[p][1] = _mm512_add_epi32(sums[p][1], _mm512_popcnt_epi32(_mm512_xor_si512(value, w1)));
      }
    }
  } else {
    const int first = first_row(r, kernel), end = end_row(r, kernel);
    for (int ky = first; ky < end; ky++) {
      const uint32_t *a = taps_of(l, r, x, ky, kernel);
      const uint32_t *s = r->parity + (ptrdiff_t)(ky - 1) * (ptrdiff_t)r->parity_row + (size_t)x * k;
      const uint32_t *row = w + (size_t)ky * 3 * k * 32;
      for (size_t j = 0; j < k; j++) {
        __m512i w0[2], w1[2], w2[2];
#pragma GCC unroll 2
        for (int o = 0; o < 2; o++) {
          w0[o] = _mm512_load_si512(row + j * 32 + o * 16);
          w1[o] = _mm512_load_si512(row + (k + j) * 32 + o * 16);
          w2[o] = _mm512_load_si512(row + (2 * k + j) * 32 + o * 16);
        }
#pragma GCC unroll 8
        for (int p = 0; p < pixels; p++) {
          const __m512i left = _mm512_set1_epi32((int)a[(size_t)p * step + j]);
          const __m512i middle = _mm512_set1_epi32((int)a[(size_t)p * step + k + j]);
          const __m512i parity = _mm512_set1_epi32((int)s[(size_t)p * k + j]);
#pragma GCC unroll 2
          for (int o = 0; o < 2; o++) {
            const __m512i X = _mm512_xor_si512(left, w0[o]), Y = _mm512_xor_si512(middle, w1[o]);
            const __m512i S = _mm512_xor_si512(parity, w2[o]), majority = _mm512_ternarylogic_epi32(X, Y, S, 0xd4);
            sums[p][o] = _mm512_add_epi32(sums[p][o], _mm512_popcnt_epi32(S));
            sums[p][o] = _mm512_dpbusd_epi32(sums[p][o], _mm512_popcnt_epi8(majority), two);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; p++) {
    _mm512_store_si512(counts[p], sums[p][0]);
    _mm512_store_si512(counts[p] + 16, sums[p][1]);
  }
}

#define SET avx512
#define TARGET AVX512
#define LANES 16
#define PIXELS 7
#define BLOCKS 1
#define STEM_PIXELS 8
#define IN_BYTES 0
#define WITH_PARITY 1
#define FLOATS __m512
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET1(v) _mm512_set1_ps(v)
#define ADD(a, b) _mm512_add_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define OF_COUNTS(p) _mm512_cvtepi32_ps(_mm512_load_si512(p))
#define SLOPE_OF(u, slope)                                                                                         \
  _mm512_mask_blend_ps(_mm512_cmp_ps_mask(u, _mm512_setzero_ps(), _CMP_GT_OQ), slope, _mm512_set1_ps(1))
#define ABOVE(h, t) ((uint32_t)_mm512_cmp_ps_mask(h, t, _CMP_GT_OQ))
#define SUM(v) _mm512_reduce_add_ps(v)
#define OF_HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define OF_BYTES(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#include "kernels.h"

/* ------------------------------------------------------------------------------------------------ AVX2 */

#define AVX2 __attribute__((target("avx2,f16c")))

/* Entry v: popcounts of (low nibble of v) ^ n for n = 0 to 15, then the same of its high nibble. A byte of signs picks
   the entry and the weights' nibbles of 32 channels are the shuffle's index: no xor, no mask of signs. */
#define BIT_(n, b) ((n) >> (b) & 1)
#define BITS_(n) (uint8_t)(BIT_(n, 0) + BIT_(n, 1) + BIT_(n, 2) + BIT_(n, 3))
#define BY_4_(n, w) BITS_((n) ^ (w)), BITS_((n) ^ (w + 1)), BITS_((n) ^ (w + 2)), BITS_((n) ^ (w + 3))
#define BY_16_(n) BY_4_(n, 0), BY_4_(n, 4), BY_4_(n, 8), BY_4_(n, 12)
#define ENTRY_(v) {BY_16_((v) & 15), BY_16_((v) >> 4)}
#define ENTRIES_4_(v) ENTRY_(v), ENTRY_(v + 1), ENTRY_(v + 2), ENTRY_(v + 3)
#define ENTRIES_16_(v) ENTRIES_4_(v), ENTRIES_4_(v + 4), ENTRIES_4_(v + 8), ENTRIES_4_(v + 12)
#define ENTRIES_64_(v) ENTRIES_16_(v), ENTRIES_16_(v + 16), ENTRIES_16_(v + 32), ENTRIES_16_(v + 48)
static const uint8_t bits_of_nibbles[256][32] __attribute__((aligned(64))) = {ENTRIES_64_(0), ENTRIES_64_(64),
                                                                              ENTRIES_64_(128), ENTRIES_64_(192)};

INLINE AVX2 __m256i table_avx2(uint8_t value, int half) {
  return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bits_of_nibbles[value] + 16 * half)));
}

INLINE AVX2 void add_counts_avx2(int32_t *counts, __m128i low, __m128i high) {
  __m256i *to = (__m256i *)counts;
  _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_cvtepu16_epi32(low)));
  _mm256_store_si256(to + 1, _mm256_add_epi32(_mm256_load_si256(to + 1), _mm256_cvtepu16_epi32(high)));
}

INLINE AVX2 void count_avx2(const Layer *l, const Row *r, int32_t block, int32_t x, int32_t (*counts)[32],
                            const int pixels, const int blocks, const int kernel) {
  const size_t bytes = 4 * (size_t)l->words, step = (size_t)l->stride * bytes;
  const size_t run = (size_t)kernel * bytes, of_block = run * (size_t)kernel * 32;
  const __m256i low = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
  const int first = first_row(r, kernel), end = end_row(r, kernel);
  __m256i wide[3][2][2];
  for (int o = 0; o < blocks; o++)
    for (int p = 0; p < pixels; p++)
      memcpy(counts[o * pixels + p], start_of(l, r, block + o, x + p, kernel), sizeof *counts);
#pragma GCC unroll 4
  for (int p = 0; p < pixels; p++)
#pragma GCC unroll 2
    for (int o = 0; o < blocks; o++) wide[p][o][0] = wide[p][o][1] = _mm256_setzero_si256();
  for (int ky = first; ky < end; ky++) {
    const uint8_t *a = (const uint8_t *)taps_of(l, r, x, ky, kernel);
    const uint8_t *w = (const uint8_t *)l->weights + (size_t)block * of_block + (size_t)ky * run * 32;
    for (size_t from = 0; from < run; from += 31) { /* 31 bytes of at most 8 bits */
      const size_t to = from + 31 < run ? from + 31 : run;
      __m256i sums[3][2];
#pragma GCC unroll 4
      for (int p = 0; p < pixels; p++)
#pragma GCC unroll 2
        for (int o = 0; o < blocks; o++) sums[p][o] = _mm256_setzero_si256();
      for (size_t j = from; j < to; j++) {
        __m256i lows[2], highs[2];
#pragma GCC unroll 2
        for (int o = 0; o < blocks; o++) {
          const __m256i v = _mm256_load_si256((const __m256i *)(w + (size_t)o * of_block + j * 32));
          lows[o] = _mm256_and_si256(v, low), highs[o] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        }
#pragma GCC unroll 4
        for (int p = 0; p < pixels; p++) {
          const uint8_t value = a[(size_t)p * step + j];
          const __m256i t0 = table_avx2(value, 0), t1 = table_avx2(value, 1);
#pragma GCC unroll 2
          for (int o = 0; o < blocks; o++)
            sums[p][o] = _mm256_add_epi8(sums[p][o], _mm256_add_epi8(_mm256_shuffle_epi8(t0, lows[o]),
                                                                     _mm256_shuffle_epi8(t1, highs[o])));
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < pixels; p++)
#pragma GCC unroll 2
        for (int o = 0; o < blocks; o++) { /* channels 0, 2, 4 ... and 1, 3, 5 ... */
          wide[p][o][0] = _mm256_add_epi16(wide[p][o][0], _mm256_and_si256(sums[p][o], byte));
          wide[p][o][1] = _mm256_add_epi16(wide[p][o][1], _mm256_srli_epi16(sums[p][o], 8));
        }
    }
    if (ky + 1 < end && l->in <= ALL_AT_ONCE) continue;
#pragma GCC unroll 4
    for (int p = 0; p < pixels; p++)
#pragma GCC unroll 2
      for (int o = 0; o < blocks; o++) {
        const __m256i even = _mm256_unpacklo_epi16(wide[p][o][0], wide[p][o][1]);
        const __m256i odd = _mm256_unpackhi_epi16(wide[p][o][0], wide[p][o][1]);
        int32_t *to = counts[o * pixels + p];
        add_counts_avx2(to, _mm256_castsi256_si128(even), _mm256_castsi256_si128(odd));
        add_counts_avx2(to + 16, _mm256_extracti128_si256(even, 1), _mm256_extracti128_si256(odd, 1));
        wide[p][o][0] = wide[p][o][1] = _mm256_setzero_si256();
      }
  }
}

INLINE AVX2 float sum_of_avx2(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#define SET avx2
#define TARGET AVX2
#define LANES 8
#define PIXELS 3
#define BLOCKS 2
#define STEM_PIXELS 2
#define IN_BYTES 1
#define WITH_PARITY 0
#define FLOATS __m256
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET1(v) _mm256_set1_ps(v)
#define ADD(a, b) _mm256_add_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define OF_COUNTS(p) _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(p)))
#define SLOPE_OF(u, slope)                                                                                         \
  _mm256_blendv_ps(slope, _mm256_set1_ps(1), _mm256_cmp_ps(u, _mm256_setzero_ps(), _CMP_GT_OQ))
#define ABOVE(h, t) ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(h, t, _CMP_GT_OQ)))
#define SUM(v) sum_of_avx2(v)
#define OF_HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define OF_BYTES(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#include "kernels.h"

#endif

/* ------------------------------------------------------------------------------------------------ NEON */

#ifdef HAVE_NEON

INLINE void count_neon(const Layer *l, const Row *r, int32_t block, int32_t x, int32_t (*counts)[32],
                       const int pixels, const int blocks, const int kernel) {
  const size_t bytes = 4 * (size_t)l->words, step = (size_t)l->stride * bytes, run = (size_t)kernel * bytes;
  const int first = first_row(r, kernel), end = end_row(r, kernel);
  uint16x8_t wide[4][4];
  (void)blocks;
  for (int p = 0; p < pixels; p++) memcpy(counts[p], start_of(l, r, block, x + p, kernel), sizeof *counts);
#pragma GCC unroll 4
  for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) wide[p][v] = vdupq_n_u16(0);
  for (int ky = first; ky < end; ky++) {
    const uint8_t *a = (const uint8_t *)taps_of(l, r, x, ky, kernel);
    const uint8_t *w = (const uint8_t *)l->weights + ((size_t)block * (size_t)kernel + (size_t)ky) * run * 32;
    for (size_t from = 0; from < run; from += 31) { /* 31 bytes of at most 8 bits */
      const size_t to = from + 31 < run ? from + 31 : run;
      uint8x16_t sums[4][2];
#pragma GCC unroll 4
      for (int p = 0; p < pixels; p++) sums[p][0] = sums[p][1] = vdupq_n_u8(0);
      for (size_t j = from; j < to; j++) {
        const uint8x16_t w0 = vld1q_u8(w + j * 32), w1 = vld1q_u8(w + j * 32 + 16);
#pragma GCC unroll 4
        for (int p = 0; p < pixels; p++) {
          const uint8x16_t value = vdupq_n_u8(a[(size_t)p * step + j]);
          sums[p][0] = vaddq_u8(sums[p][0], vcntq_u8(veorq_u8(value, w0)));
          sums[p][1] = vaddq_u8(sums[p][1], vcntq_u8(veorq_u8(value, w1)));
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < pixels; p++) {
        wide[p][0] = vaddw_u8(wide[p][0], vget_low_u8(sums[p][0]));
        wide[p][1] = vaddw_u8(wide[p][1], vget_high_u8(sums[p][0]));
        wide[p][2] = vaddw_u8(wide[p][2], vget_low_u8(sums[p][1]));
        wide[p][3] = vaddw_u8(wide[p][3], vget_high_u8(sums[p][1]));
      }
    }
    if (ky + 1 < end && l->in <= ALL_AT_ONCE) continue;
#pragma GCC unroll 4
    for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        uint32_t *to = (uint32_t *)counts[p] + 8 * v;
        vst1q_u32(to, vaddw_u16(vld1q_u32(to), vget_low_u16(wide[p][v])));
        vst1q_u32(to + 4, vaddw_u16(vld1q_u32(to + 4), vget_high_u16(wide[p][v])));
        wide[p][v] = vdupq_n_u16(0);
      }
  }
}

INLINE uint32_t above_neon(float32x4_t h, float32x4_t t) {
  static const uint32_t places[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgtq_f32(h, t), vld1q_u32(places)));
}

INLINE float32x4_t of_bytes_neon(const int8_t *p) {
  const int32_t v[4] = {p[0], p[1], p[2], p[3]};
  return vcvtq_f32_s32(vld1q_s32(v));
}

#define SET neon
#define TARGET
#define LANES 4
#define PIXELS 4
#define BLOCKS 1
#define STEM_PIXELS 2
#define IN_BYTES 1
#define WITH_PARITY 0
#define FLOATS float32x4_t
#define LOAD(p) vld1q_f32(p)
#define STORE(p, v) vst1q_f32(p, v)
#define SET1(v) vdupq_n_f32(v)
#define ADD(a, b) vaddq_f32(a, b)
#define MUL(a, b) vmulq_f32(a, b)
#define OF_COUNTS(p) vcvtq_f32_s32(vld1q_s32(p))
#define SLOPE_OF(u, slope) vbslq_f32(vcgtq_f32(u, vdupq_n_f32(0)), vdupq_n_f32(1), slope)
#define ABOVE(h, t) above_neon(h, t)
#define SUM(v) vaddvq_f32(v)
#define OF_HALVES(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define OF_BYTES(p) of_bytes_neon(p)
#include "kernels.h"

#endif

/* ------------------------------------------------------------------------------------------------ choice */

static const Kernels *const ALL[] = {
#ifdef HAVE_X86
    &kernels_avx512, &kernels_avx2,
#endif
#ifdef HAVE_NEON
    &kernels_neon,
#endif
    &kernels_plain,
};
enum { NUM_KERNELS = sizeof ALL / sizeof *ALL };

static const Kernels *chosen = NULL;

static int usable(const Kernels *kernels) {
#ifdef HAVE_X86
  __builtin_cpu_init();
  if (kernels == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vnni");
  if (kernels == &kernels_avx2) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
#endif
  return kernels != NULL;
}

int32_t bnn_abi(void) { return BNN_ABI; }

const char *bnn_usable(int32_t number) {
  for (int i = 0; i < NUM_KERNELS; i++)
    if (usable(ALL[i]) && number-- == 0) return ALL[i]->name;
  return NULL;
}

int32_t bnn_kernels(const char *name) {
  for (int i = 0; i < NUM_KERNELS; i++)
    if (usable(ALL[i]) && (!name || !strcmp(name, ALL[i]->name))) {
      __atomic_store_n(&chosen, ALL[i], __ATOMIC_RELAXED);
      return 1;
    }
  return 0;
}

/* ------------------------------------------------------------------------------------------------ opening */

typedef struct {
  int32_t first;                 /* layer */
  int32_t two;                   /* a 1x1 half-block goes with it */
  int32_t units;                 /* rows, blocks of channels or outputs that tiles are made of */
  int32_t most;                  /* units of a tile */
  int32_t to;                    /* which of the two maps, or of the two vectors, it writes */
  size_t signs, parity;          /* of a half-block: where its input lies in a workspace */
} Step;

struct bnn_net {
  const Kernels *kernels;
  int32_t side, layers, steps;
  Layer *layer;
  Step *step;
  float table[3][256];
  void *memory;                  /* of all arrays */
  size_t map[2], vector[2];      /* offsets in what a thread has of a workspace */
  size_t hidden, hidden_signs, doubled, rows;
  size_t bytes;                  /* of it */
};

static const uint8_t SIZE_OF[3] = {4, 2, 1}; /* bytes, by number type */

typedef struct { uint8_t *base; uint64_t used; } Arena;

static void *take(Arena *arena, uint64_t bytes) {
  void *at = arena->base ? arena->base + arena->used : NULL;
  arena->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return at;
}

/* Zeros, aligned; what has to be freed is in `memory`. */
static uint8_t *zeros(size_t bytes, void **memory) {
  *memory = bytes > SIZE_MAX - ALIGNMENT ? NULL : calloc(1, bytes + ALIGNMENT);
  return *memory ? (uint8_t *)(((uintptr_t)*memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT) : NULL;
}

static uint64_t rounded(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static uint32_t u32(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint32_t u16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

static uint32_t crc32_of(const uint8_t *bytes, size_t count) {
  uint32_t table[8][256], crc = 0xffffffff;
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t v = i;
    for (int b = 0; b < 8; b++) v = v >> 1 ^ (v & 1 ? 0xedb88320 : 0);
    table[0][i] = v;
  }
  for (int t = 1; t < 8; t++)
    for (int i = 0; i < 256; i++) table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
  for (; count >= 8; bytes += 8, count -= 8) {
    const uint32_t low = crc ^ u32(bytes), high = u32(bytes + 4);
    crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
          table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
  }
  for (; count; bytes++, count--) crc = crc >> 8 ^ table[0][(crc ^ *bytes) & 255];
  return ~crc;
}

/* What is read of a file, in order. */
typedef struct {
  const uint8_t *bytes;
  uint64_t count, at;
  int32_t record;
  char *message;
} Reader;

#define ULL(x) ((unsigned long long)(x))
#define REFUSE(message, ...) return snprintf(message, BNN_MESSAGE, __VA_ARGS__), BNN_REFUSED

/* Go to the next multiple of the alignment, over zeros. */
static int align(Reader *r) {
  for (; r->at % ALIGNMENT; r->at++)
    if (r->at >= r->count || r->bytes[r->at])
      REFUSE(r->message, "expected zeros up to a multiple of %d at byte %llu", ALIGNMENT, ULL(r->at));
  return BNN_DONE;
}

/* The next array, or NULL and a message. */
static const uint8_t *array(Reader *r, const char *name, uint64_t bytes) {
  if (align(r)) return NULL;
  if (bytes > r->count - r->at) {
    snprintf(r->message, BNN_MESSAGE, "record %d: %s does not fit into the file", r->record, name);
    return NULL;
  }
  r->at += bytes;
  return r->bytes + (r->at - bytes);
}

/* Copy numbers of 4 (float32) or 2 bytes (float16) that have to be finite; thresholds may be +inf. */
static int copy(Reader *r, const char *name, const uint8_t *from, void *to, size_t count, int size) {
  const int may_be_infinite = !strcmp(name, "threshold");
  int odd = 0;
  for (size_t i = 0; i < count; i++) {
    if (size == 4) {
      const uint32_t v = u32(from + 4 * i);
      odd |= (v & 0x7f800000) == 0x7f800000 && !(may_be_infinite && v == 0x7f800000);
      memcpy((uint8_t *)to + 4 * i, &v, 4);
    } else {
      const uint16_t v = (uint16_t)u16(from + 2 * i);
      odd |= (v & 0x7c00) == 0x7c00;
      memcpy((uint8_t *)to + 2 * i, &v, 2);
    }
  }
  if (odd) REFUSE(r->message, "record %d: %s: holds a number that is not finite", r->record, name);
  return BNN_DONE;
}

static int floats(Reader *r, const char *name, float *to, size_t count) {
  const uint8_t *from = array(r, name, 4 * (uint64_t)count);
  return from ? copy(r, name, from, to, count, 4) : BNN_REFUSED;
}

static int signs_of_weights(Reader *r, const Kernels *kernels, const Layer *l) {
  const size_t taps = (size_t)(l->kernel * l->kernel), k = (size_t)l->words, room = (size_t)l->out_room;
  const uint32_t beyond = l->in % 32 ? ~0u << l->in % 32 : 0;
  const uint8_t *bits_of = array(r, "bits", 4 * (uint64_t)l->out * taps * k);
  if (!bits_of) return BNN_REFUSED;
  for (size_t o = 0; o < (size_t)l->out; o++) {
    const uint8_t *row = bits_of + 4 * o * taps * k;
    int32_t left[3] = {0}, right[3] = {0}; /* by ky: what a border of zero bits counts wrongly */
    for (size_t t = 0; t < taps; t++) {
      int32_t bits = 0;
      for (size_t j = 0; j < k; j++) {
        const uint32_t word = u32(row + 4 * (t * k + j));
        if (j == k - 1 && word & beyond)
          REFUSE(r->message, "record %d: bits: expected zeros beyond channel %d", r->record, l->in);
        bits += (int32_t)(bits_of_bytes(word) * 0x01010101u >> 24);
        if (kernels->in_bytes) {
          uint8_t *to = (uint8_t *)l->weights + ((o / 32 * taps + t) * k + j) * 128 + o % 32;
          for (int b = 0; b < 4; b++) to[32 * b] = (uint8_t)(word >> 8 * b);
        } else {
          const uint8_t *tap = row + 4 * (t / 3 * 3 * k + j);
          const int parity = kernels->with_parity && l->kernel == 3 && t % 3 == 2;
          ((uint32_t *)l->weights)[((o / 32 * taps + t) * k + j) * 32 + o % 32] =
              parity ? word ^ u32(tap) ^ u32(tap + 4 * k) : word;
        }
      }
      if (l->kernel == 3 && t % 3 == 0) left[t / 3] = l->in / 2 - bits;
      if (l->kernel == 3 && t % 3 == 2) right[t / 3] = l->in / 2 - bits;
    }
    for (int edges = 0; edges < (l->kernel == 3 ? EDGES : 1); edges++) {
      int32_t start = -(int32_t)taps * l->in / 2;
      for (int ky = 0; ky < (l->kernel == 3 ? 3 : 0); ky++) {
        if ((ky == 0 && edges & TOP) || (ky == 2 && edges & BOTTOM))
          start += 3 * l->in / 2;
        else
          start += (edges & LEFT ? left[ky] : 0) + (edges & RIGHT ? right[ky] : 0);
      }
      l->start[(size_t)edges * room + o] = start;
    }
  }
  return BNN_DONE;
}

/* Rows of a linear layer, each with zeros behind it. */
static int linear_weights(Reader *r, const Layer *l) {
  const size_t in = (size_t)l->in, size = SIZE_OF[l->type];
  const uint8_t *from = array(r, "weight", (uint64_t)size * in * (uint64_t)l->out);
  if (!from) return BNN_REFUSED;
  for (size_t o = 0; o < (size_t)l->out; o++) {
    uint8_t *to = (uint8_t *)l->weights + o * size * (size_t)l->in_room;
    if (l->type == INT8) memcpy(to, from + o * in, in);
    else if (copy(r, "weight", from + o * size * in, to, in, (int)size)) return BNN_REFUSED;
  }
  return BNN_DONE;
}

/* Where the arrays of a layer lie; called once to measure and once to place. */
static void place(Layer *l, Arena *arena) {
  const uint64_t room = (uint64_t)l->out_room, taps = (uint64_t)(l->kernel * l->kernel);
  if (l->operation == STEM) l->weights = take(arena, 4 * 27 * room);
  if (l->operation == HALF_BLOCK) {
    l->weights = take(arena, 4 * room * taps * (uint64_t)l->words);
    l->start = take(arena, 4 * room * (l->kernel == 3 ? EDGES : 1));
    l->a = take(arena, 4 * room), l->slope = take(arena, 4 * room), l->shift = take(arena, 4 * room);
  }
  if (l->operation == LINEAR) {
    l->weights = take(arena, (uint64_t)l->out * (uint64_t)l->in_room * SIZE_OF[l->type]);
    if (l->type == INT8) l->scale = take(arena, 4 * room);
  }
  if (l->operation != MEAN) l->b = take(arena, 4 * room);
  if (l->operation == STEM || l->operation == HALF_BLOCK) l->threshold = take(arena, 4 * room);
}

static int unpack(Reader *r, bnn_net *net, Layer *l) {
  const size_t out = (size_t)l->out;
  if (l->threshold) {
    const float never = __builtin_inff();
    for (int32_t o = 0; o < l->out_room; o++) l->threshold[o] = never;
  }
  if (l->operation == STEM) {
    const uint8_t *from = array(r, "weight", 4 * 27 * (uint64_t)out);
    if (!from) return BNN_REFUSED;
    for (size_t i = 0; i < 27; i++) /* [i, o] to [o / 32, i, 32] */
      for (size_t o = 0; o < out; o += 32)
        if (copy(r, "weight", from + 4 * (i * out + o), (float *)l->weights + (o / 32 * 27 + i) * 32,
                 out - o < 32 ? out - o : 32, 4)) return BNN_REFUSED;
    return floats(r, "bias", l->b, out) || floats(r, "threshold", l->threshold, out) ||
           floats(r, "table", net->table[0], 3 * 256);
  }
  if (l->operation == HALF_BLOCK) {
    return signs_of_weights(r, net->kernels, l) || floats(r, "a", l->a, out) || floats(r, "b", l->b, out) ||
           floats(r, "slope", l->slope, out) || floats(r, "shift", l->shift, out) ||
           (l[1].operation == HALF_BLOCK && floats(r, "threshold", l->threshold, out));
  }
  if (l->operation == LINEAR)
    return linear_weights(r, l) || (l->type == INT8 && floats(r, "scale", l->scale, out)) ||
           floats(r, "bias", l->b, out);
  return BNN_DONE;
}

/* A record's numbers against each other, the record before and the limits; sizes that follow from them. */
static int check_record(char *message, int32_t n, const uint8_t *bytes, const bnn_limits *limits, const Layer *before,
                        int32_t side, Layer *l) {
  uint32_t v[8];
  for (int i = 0; i < 8; i++) v[i] = u32(bytes + 4 * i);
  const uint32_t operation = v[0], kernel = v[1], stride = v[2], residual = v[3], in = v[4], out = v[5];
  static const char *const names[] = {"", "stem", "half-block", "mean", "linear"};
  const int32_t last = before ? before->operation : 0;
  const int follows = operation == STEM ? !last : operation == HALF_BLOCK ? last == STEM || last == HALF_BLOCK
                    : operation == MEAN ? last == HALF_BLOCK : operation == LINEAR && (last == MEAN || last == LINEAR);
  if (!follows) REFUSE(message, "record %d: operation %u cannot stand here", n, operation);
  const char *name = names[operation];
  const int is_map = operation == STEM || operation == HALF_BLOCK;
  if (!(kernel == 3 && is_map) && !(kernel == 1 && operation != STEM))
    REFUSE(message, "record %d (%s): kernel %u, expected %s", n, name, kernel,
           operation == STEM ? "3" : operation == HALF_BLOCK ? "1 or 3" : "1");
  if (stride != 1 && !(stride == 2 && is_map))
    REFUSE(message, "record %d (%s): stride %u, expected %s", n, name, stride, is_map ? "1 or 2" : "1");
  if (operation == HALF_BLOCK ? residual < SAME || residual > DOUBLED : residual != NO_RESIDUAL)
    REFUSE(message, "record %d (%s): residual %u, expected %s", n, name, residual,
           operation == HALF_BLOCK ? "1, 2 or 3" : "0");
  if (v[6] > (operation == LINEAR ? INT8 : FLOAT32))
    REFUSE(message, "record %d (%s): number type %u, expected %s", n, name, v[6],
           operation == LINEAR ? "0, 1 or 2" : "0");
  if (v[7] > (operation == LINEAR ? RELU : 0))
    REFUSE(message, "record %d (%s): flags %u, expected %s", n, name, v[7], operation == LINEAR ? "0 or 1" : "0");
  for (int i = 4; i < 6; i++)
    if (v[i] < 1 || v[i] > limits->channels)
      REFUSE(message, "record %d (%s): %u channels, expected 1 to %u", n, name, v[i], limits->channels);
  if (in != (before ? (uint32_t)before->out : 3))
    REFUSE(message, "record %d (%s): %u channels in, expected %u", n, name, in, before ? (uint32_t)before->out : 3);
  if ((operation == HALF_BLOCK || operation == MEAN) && out != in * (residual == DOUBLED ? 2 : 1))
    REFUSE(message, "record %d (%s): %u channels out, expected %u", n, name, out, in * (residual == DOUBLED ? 2 : 1));
  if (operation == HALF_BLOCK && in % 2)
    REFUSE(message, "record %d (%s): %u channels in, expected an even number", n, name, in);
  if (operation == HALF_BLOCK && (stride == 2) != (residual == POOLED))
    REFUSE(message, "record %d (%s): stride %u with residual %u, expected 2 with 2 alone", n, name, stride, residual);
  if (residual == POOLED && side % 2)
    REFUSE(message, "record %d (%s): halves a map of side %d, expected an even side", n, name, side);
  if (last == LINEAR && !before->relu)
    REFUSE(message, "record %d (%s): comes after a linear layer without ReLU, expected that one last", n, name);
  *l = (Layer){.operation = (int32_t)operation, .kernel = (int32_t)kernel, .stride = (int32_t)stride,
               .residual = (int32_t)residual, .in = (int32_t)in, .out = (int32_t)out, .type = (int32_t)v[6],
               .relu = (int32_t)v[7], .from = side, .side = is_map ? (side + (int32_t)stride - 1) / (int32_t)stride : 1,
               .words = (int32_t)((in + 31) / 32), .in_room = (int32_t)rounded(in, 32),
               .out_room = (int32_t)rounded(out, 32)};
  return BNN_DONE;
}

/* Bytes of a record's arrays in a file, and of the two maps beside them in float32. */
static uint64_t file_bytes(const Layer *l, int has_threshold) {
  const uint64_t in = (uint64_t)l->in, out = (uint64_t)l->out, taps = (uint64_t)(l->kernel * l->kernel);
  if (l->operation == STEM) return 4 * (27 * out + 2 * out + 3 * 256);
  if (l->operation == HALF_BLOCK) return 4 * (out * taps * (uint64_t)l->words + out * (has_threshold ? 5 : 4));
  return l->operation == LINEAR ? SIZE_OF[l->type] * in * out + 4 * out * (l->type == INT8 ? 2 : 1) : 0;
}
static uint64_t map_bytes(const Layer *l) {
  const uint64_t from = (uint64_t)l->from * (uint64_t)l->from, to = (uint64_t)l->side * (uint64_t)l->side;
  return 4 * ((uint64_t)l->in * from + (uint64_t)l->out * to);
}

/* The order of work, and where everything lies in what a thread has of a workspace; its bytes. */
static uint64_t plan(bnn_net *net) {
  uint64_t maps[2] = {0}, vectors = 0, hidden = 0, hidden_signs = 0, doubled = 0;
  Arena arena = {0};
  for (int32_t i = 0; i < net->layers; i++) {
    const Layer *l = net->layer + i, *next = l + 1; /* an empty layer follows the last */
    Step *step = net->step + net->steps;
    *step = (Step){.first = i, .units = l->side, .most = INT32_MAX, .to = net->steps ? !step[-1].to : 0};
    net->steps++;
    if (l->operation == LINEAR || l->operation == MEAN) {
      if (l->operation == MEAN) step->to = 0;
      step->units = l->operation == MEAN ? l->out_room / 32 : l->out;
      if ((uint64_t)l->out_room > vectors) vectors = (uint64_t)l->out_room;
      continue;
    }
    const uint64_t row = 4 * (uint64_t)l->side * (uint64_t)l->out_room;
    if (l->operation == HALF_BLOCK) {
      const uint64_t signs = (uint64_t)(l->from + 2) * (uint64_t)(l->from + 2) * (uint64_t)l->words;
      step->signs = (size_t)arena.used, take(&arena, 4 * signs);
      step->parity = (size_t)arena.used;
      if (l->kernel == 3 && net->kernels->with_parity)
        take(&arena, 4 * (uint64_t)l->from * (uint64_t)l->side * (uint64_t)l->words);
      const int32_t most = row < BAND_BYTES ? (int32_t)(BAND_BYTES / row) : 1, bands = (l->side + most - 1) / most;
      step->most = (l->side + bands - 1) / bands;
      step->two = next->operation == HALF_BLOCK && next->kernel == 1 && next->stride == 1;
      const uint64_t band = (uint64_t)step->most * row;
      if (step->two && band > hidden) hidden = band;
      if (step->two && band / 32 > hidden_signs) hidden_signs = band / 32;
      for (const Layer *d = l; d <= l + step->two; d++) {
        const uint64_t most_doubled = (uint64_t)step->most * (uint64_t)d->side * (uint64_t)d->out_room * 4;
        if (d->residual == DOUBLED && d->in % 32 && most_doubled > doubled) doubled = most_doubled;
      }
    }
    i += step->two;
    const Layer *end = net->layer + i;
    const uint64_t map = 4 * (uint64_t)end->side * (uint64_t)end->side * (uint64_t)end->out_room;
    if (map > maps[step->to]) maps[step->to] = map;
    if (row * (uint64_t)l->side > maps[step->to]) maps[step->to] = row * (uint64_t)l->side;
  }
  for (int i = 0; i < 2; i++) {
    net->map[i] = (size_t)arena.used, take(&arena, maps[i]);
    net->vector[i] = (size_t)arena.used, take(&arena, 4 * vectors);
  }
  net->hidden = (size_t)arena.used, take(&arena, hidden);
  net->hidden_signs = (size_t)arena.used, take(&arena, hidden_signs);
  net->doubled = (size_t)arena.used, take(&arena, doubled);
  net->rows = (size_t)arena.used, take(&arena, 3 * 4 * 3 * (uint64_t)(net->side + 2));
  return arena.used;
}

static int open_net(Reader *r, const bnn_limits *limits, bnn_net *net) {
  static const uint8_t magic[8] = {0x89, 'B', 'N', 'N', 0x0d, 0x0a, 0x1a, 0x0a};
  const uint8_t *bytes = r->bytes;
  char *message = r->message;
  if (r->count > limits->memory)
    REFUSE(message, "has %llu bytes, at most %llu are read", ULL(r->count), ULL(limits->memory));
  if (r->count < 64 || memcmp(bytes, magic, 8)) REFUSE(message, "is not a binary network's file, or is cut short");
  const uint32_t major = u16(bytes + 8), minor = u16(bytes + 10), metadata = u32(bytes + 24), count = u16(bytes + 28);
  const uint32_t side = u32(bytes + 32), outputs = u32(bytes + 36);
  const uint64_t size = u32(bytes + 16) | (uint64_t)u32(bytes + 20) << 32;
  if (major != 1 || minor != 0) REFUSE(message, "has version %u.%u of the format, this reader knows 1.0", major, minor);
  if (size != r->count)
    REFUSE(message, "has %llu bytes where its header says %llu", ULL(r->count), ULL(size));
  if (!BNN_WITHOUT_CHECKSUM && crc32_of(bytes + 16, (size_t)(r->count - 16)) != u32(bytes + 12))
    REFUSE(message, "is damaged, its checksum differs");
  for (int i = 30; i < 64; i += i == 31 ? 9 : 1)
    if (bytes[i]) REFUSE(message, "header: expected zeros at bytes 30 and 40 to 63");
  if (metadata > MOST_METADATA)
    REFUSE(message, "header: %u bytes of metadata, expected at most %u", metadata, MOST_METADATA);
  if (!count || count > limits->records)
    REFUSE(message, "header: %u records, expected 1 to %u", count, limits->records);
  if (side < 1 || side > limits->side)
    REFUSE(message, "header: images of side %u, expected 1 to %u", side, limits->side);
  if (r->count < 64 + 32 * (uint64_t)count) REFUSE(message, "is cut short within its records");
  net->side = (int32_t)side, net->layers = (int32_t)count;
  net->layer = calloc(count + 1, sizeof *net->layer); /* an empty one behind the last */
  net->step = calloc(count, sizeof *net->step);
  if (!net->layer || !net->step) return snprintf(message, BNN_MESSAGE, "there is no memory"), BNN_NO_MEMORY;

  uint64_t macs = 0, arrays = 0, largest = 0;
  for (int32_t i = 0; i < net->layers; i++) {
    Layer *l = net->layer + i;
    const Layer *before = i ? l - 1 : NULL;
    if (check_record(message, i, bytes + 64 + 32 * i, limits, before, before ? before->side : net->side, l))
      return BNN_REFUSED;
    const uint64_t out = (uint64_t)l->side * (uint64_t)l->side, taps = (uint64_t)(l->kernel * l->kernel);
    if (l->operation != MEAN) macs += taps * (uint64_t)l->in * (uint64_t)l->out * out; /* each below 2^60 */
    if (macs > limits->macs)
      REFUSE(message, "records: more than %llu multiply-accumulates an image", ULL(limits->macs));
    arrays += file_bytes(l, i + 1 < net->layers && u32(bytes + 64 + 32 * (i + 1)) == HALF_BLOCK);
    if (map_bytes(l) > largest) largest = map_bytes(l);
  }
  const Layer *last = net->layer + net->layers - 1;
  if (last->operation != MEAN && last->operation != LINEAR)
    REFUSE(message, "records: expected a mean or a linear layer at the end");
  if (outputs != (uint32_t)last->out) REFUSE(message, "header: %u outputs, the last layer has %d", outputs, last->out);
  Arena arena = {0};
  for (int32_t i = 0; i < net->layers; i++) place(net->layer + i, &arena);
  const uint64_t workspace = plan(net);
  if (arrays + largest > limits->memory || arena.used > limits->memory || workspace > limits->memory ||
      workspace > SIZE_MAX / BNN_MAX_THREADS / 2 || arena.used > SIZE_MAX / 2)
    REFUSE(message, "records: need more than %llu bytes of memory", ULL(limits->memory));
  net->bytes = (size_t)workspace;

  /* Arrays have to fill the file, or nothing is made room for. */
  r->at = 64 + 32 * (uint64_t)count;
  if (align(r)) return BNN_REFUSED;
  if (metadata > r->count - r->at || arrays > r->count - r->at - metadata) REFUSE(message, "is cut short");
  r->at += metadata;
  arena = (Arena){.base = zeros((size_t)arena.used, &net->memory)};
  if (!arena.base) return snprintf(message, BNN_MESSAGE, "there is no memory"), BNN_NO_MEMORY;
  for (r->record = 0; r->record < net->layers; r->record++) {
    place(net->layer + r->record, &arena);
    if (unpack(r, net, net->layer + r->record)) return BNN_REFUSED;
  }
  if (align(r)) return BNN_REFUSED;
  if (r->at != r->count)
    REFUSE(message, "has %llu bytes, its records need %llu", ULL(r->count), ULL(r->at));
  return BNN_DONE;
}

int32_t bnn_open(const void *bytes, size_t count, const bnn_limits *limits, bnn_net **net, char message[BNN_MESSAGE]) {
  bnn_limits most = limits ? *limits : (bnn_limits){4096, 8192, 512, 1ull << 40, 1ull << 30};
  if (most.side > MOST_SIDE) most.side = MOST_SIDE;
  if (most.channels > MOST_CHANNELS) most.channels = MOST_CHANNELS;
  if (most.macs > 1ull << 60) most.macs = 1ull << 60;
  *net = NULL, message[0] = 0;
  if (!__atomic_load_n(&chosen, __ATOMIC_RELAXED)) bnn_kernels(NULL);
  bnn_net *made = calloc(1, sizeof *made);
  if (!made) return snprintf(message, BNN_MESSAGE, "there is no memory"), BNN_NO_MEMORY;
  made->kernels = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
  Reader reader = {.bytes = bytes, .count = count, .message = message};
  const int result = open_net(&reader, &most, made);
  if (result == BNN_DONE) *net = made;
  else bnn_close(made);
  return result;
}

void bnn_close(bnn_net *net) {
  if (!net) return;
  free(net->layer), free(net->step), free(net->memory), free(net);
}

int32_t bnn_side(const bnn_net *net) { return net->side; }
int32_t bnn_layers(const bnn_net *net) { return net->layers; }

int32_t bnn_feature_layers(const bnn_net *net) {
  const Layer *last = net->layer + net->layers - 1;
  return net->layers - (last->operation == LINEAR && !last->relu);
}

int32_t bnn_shape(const bnn_net *net, int32_t layers, int32_t shape[3]) {
  const Layer *l = net->layer + (layers < 1 || layers > net->layers ? net->layers : layers) - 1;
  const int is_map = l->operation == STEM || l->operation == HALF_BLOCK;
  shape[0] = is_map ? l->side : l->out, shape[1] = l->side, shape[2] = l->out;
  return is_map ? 3 : 1;
}

size_t bnn_floats(const bnn_net *net, int32_t layers) {
  int32_t shape[3];
  const size_t channels = (size_t)(bnn_shape(net, layers, shape), shape[2]), side = (size_t)shape[1];
  return side * side * channels;
}

/* ------------------------------------------------------------------------------------------------ running */

struct bnn_workspace {
  const bnn_net *net;
  void *memory;
  uint8_t *base;                 /* net->bytes for each thread */
  int32_t threads;
  const void *images;
  float *out;
  int32_t kind, count, layers, steps;
  int32_t whole;                 /* images that a thread takes whole; of the others threads share the steps */
  _Atomic uint64_t ticket;       /* phase << 32 | its next tile; phase 0 are the whole images, then comes each step */
  _Atomic uint32_t finished;     /* tiles of the phase */
  _Atomic int32_t joined;
};

bnn_workspace *bnn_workspace_new(const bnn_net *net, int32_t threads) {
  bnn_workspace *w = calloc(1, sizeof *w);
  if (!w) return NULL;
  w->net = net, w->threads = threads < 1 ? 1 : threads > BNN_MAX_THREADS ? BNN_MAX_THREADS : threads;
  w->base = zeros(net->bytes * (size_t)w->threads, &w->memory);
  if (!w->base) free(w), w = NULL;
  return w;
}

void bnn_workspace_free(bnn_workspace *workspace) {
  if (workspace) free(workspace->memory), free(workspace);
}

/* What tiles work with: the maps of an image, and the thread's own room for what lies between. */
typedef struct {
  const bnn_net *net;
  uint8_t *maps, *own;
  const uint8_t *bytes;          /* the image; one of the two */
  const float *floats;
  int32_t layers;
  float *out;
} Work;

/* Parity of three neighbors for each output pixel of rows of signs with their border. */
static void parity_of(const Layer *l, const uint32_t *signs, uint32_t *parity, int32_t first, int32_t end) {
  const size_t k = (size_t)l->words, step = (size_t)l->stride * k;
  for (int32_t y = first; y < end; y++) {
    const uint32_t *from = signs + (size_t)(y + 1) * (size_t)(l->from + 2) * k;
    uint32_t *to = parity + (size_t)y * (size_t)l->side * k;
    if (l->stride == 1) {
      for (size_t i = 0; i < (size_t)l->side * k; i++) to[i] = from[i] ^ from[i + k] ^ from[i + 2 * k];
    } else {
      for (size_t x = 0; x < (size_t)l->side; x++, from += step, to += k)
        for (size_t j = 0; j < k; j++) to[j] = from[j] ^ from[j + k] ^ from[j + 2 * k];
    }
  }
}

static uint32_t *signs_of(const Work *w, const Step *step) { return (uint32_t *)(w->maps + step->signs); }

/* Where the signs of row y go that a step hands to the next; NULL where there is none. */
static uint32_t *signs_to(const Work *w, const Step *next, int32_t y) {
  const Layer *l = w->net->layer + next->first;
  if (next->first >= w->net->layers || l->operation != HALF_BLOCK) return NULL;
  return signs_of(w, next) + ((size_t)(y + 1) * (size_t)(l->from + 2) + 1) * (size_t)l->words;
}

static void hand_over(const Work *w, const Step *next, int32_t first, int32_t end) {
  const Layer *l = w->net->layer + next->first;
  if (signs_to(w, next, 0) && l->kernel == 3 && w->net->kernels->with_parity)
    parity_of(l, signs_of(w, next), (uint32_t *)(w->maps + next->parity), first, end);
}

/* Row y of the image with its border of zeros, as [side + 2, 3] floats. */
static void image_row(const Work *w, int32_t y, float *to) {
  const size_t side = (size_t)w->net->side;
  memset(to, 0, 12 * (side + 2));
  if (y < 0 || y >= w->net->side) return;
  to += 3;
  if (w->bytes) {
    const uint8_t *from = w->bytes + 3 * side * (size_t)y;
    for (size_t x = 0; x < side; x++)
      for (size_t c = 0; c < 3; c++) to[3 * x + c] = w->net->table[c][from[3 * x + c]];
  } else {
    for (size_t c = 0; c < 3; c++) {
      const float *from = w->floats + (c * side + (size_t)y) * side;
      for (size_t x = 0; x < side; x++) to[3 * x + c] = from[x];
    }
  }
}

static void stem_rows(const Work *w, const Step *step, int32_t first, int32_t end) {
  const bnn_net *net = w->net;
  const Layer *l = net->layer;
  const size_t row = 3 * (size_t)(net->side + 2), out = (size_t)l->side * (size_t)l->out_room;
  float *const ring = (float *)(w->own + net->rows), *const map = (float *)(w->maps + net->map[step->to]);
  int32_t next = first * l->stride - 1; /* row of the image that is not in the ring yet */
  for (int32_t y = first; y < end; y++) {
    const float *rows[3];
    for (; next <= y * l->stride + 1; next++) image_row(w, next, ring + (size_t)((next + 3) % 3) * row);
    for (int ky = 0; ky < 3; ky++) rows[ky] = ring + (size_t)((y * l->stride + ky + 2) % 3) * row;
    net->kernels->stem(l, rows, map + (size_t)y * out, signs_to(w, step + 1, y));
  }
  hand_over(w, step + 1, first, end);
}

/* The residual of a band twice along the channels, where that is not a matter of whole vectors. */
static void double_residual(const Work *w, const Layer *l, Band *b) {
  float *const to = (float *)(w->own + w->net->doubled);
  const size_t in = (size_t)l->in, room = (size_t)l->out_room, side = (size_t)l->side;
  for (size_t y = 0; y < (size_t)(b->end - b->first); y++)
    for (size_t x = 0; x < side; x++) {
      const float *from = b->residual + y * b->residual_row + x * b->residual_pixel;
      float *pixel = to + (y * side + x) * room;
      memcpy(pixel, from, 4 * in), memcpy(pixel + in, from, 4 * in), memset(pixel + 2 * in, 0, 4 * (room - 2 * in));
    }
  b->residual = to, b->residual_pixel = room, b->residual_row = side * room, b->wrap = INT32_MAX;
}

static void half_rows(const Work *w, const Layer *l, Band *b) {
  b->wrap = l->residual == DOUBLED ? l->in : INT32_MAX;
  if (l->residual == DOUBLED && l->in % 32) double_residual(w, l, b);
  w->net->kernels->half(l, b);
}

static void block_rows(const Work *w, const Step *step, int32_t first, int32_t end) {
  const bnn_net *net = w->net;
  const Layer *l = net->layer + step->first;
  const int two = step->two && step->first + 1 < w->layers;
  const size_t k = (size_t)l->words, stride = (size_t)l->stride, from = (size_t)l->from, side = (size_t)l->side;
  const size_t room = (size_t)l->out_room, y = (size_t)first;
  float *const map = (float *)(w->maps + net->map[step->to]);
  Band b = {.first = first, .end = end, .in_row = (from + 2) * k, .parity_row = side * k,
            .residual_row = from * (size_t)l->in_room, .residual_pixel = (size_t)l->in_room, .out_row = side * room};
  b.in = signs_of(w, step) + ((y * stride + 1) * (from + 2) + 1) * k;
  if (l->kernel == 3 && net->kernels->with_parity)
    b.parity = (const uint32_t *)(w->maps + step->parity) + y * stride * b.parity_row;
  b.residual = (const float *)(w->maps + net->map[!step->to]) + y * stride * b.residual_row;
  if (two) {
    b.out = (float *)(w->own + net->hidden);
    b.signs = (uint32_t *)(w->own + net->hidden_signs), b.signs_row = side * (room / 32);
  } else {
    b.out = map + y * b.out_row;
    if (!step->two) b.signs = signs_to(w, step + 1, first), b.signs_row = (side + 2) * (room / 32);
  }
  half_rows(w, l, &b);
  if (two) {
    const Layer *n = l + 1;
    Band c = {.first = first, .end = end, .in = b.signs, .in_row = b.signs_row, .residual = b.out,
              .residual_row = b.out_row, .residual_pixel = room, .out_row = side * (size_t)n->out_room};
    c.out = map + y * c.out_row;
    c.signs = signs_to(w, step + 1, first), c.signs_row = (side + 2) * (size_t)(n->out_room / 32);
    half_rows(w, n, &c);
  }
  if (two || !step->two) hand_over(w, step + 1, first, end);
}

static void linear_rows(const Work *w, const Step *step, int32_t first, int32_t end) {
  const Layer *l = w->net->layer + step->first;
  const float *x = (const float *)(w->maps + w->net->vector[!step->to]);
  float *y = (float *)(w->maps + w->net->vector[step->to]);
  const size_t row = (size_t)l->in_room * SIZE_OF[l->type];
  for (int32_t o = first; o < end; o++) {
    float v = w->net->kernels->dot[l->type](x, (const uint8_t *)l->weights + (size_t)o * row, (size_t)l->in_room);
    if (l->type == INT8) v *= l->scale[o];
    v += l->b[o];
    y[o] = l->relu && v < 0 ? 0 : v;
  }
  /* A vector of another length may have left something where the next row expects zeros. */
  if (end == l->out) memset(y + end, 0, 4 * (size_t)(l->out_room - l->out));
}

static void mean_blocks(const Work *w, const Step *step, int32_t first, int32_t end) {
  const Layer *l = w->net->layer + step->first;
  const size_t pixels = (size_t)l->from * (size_t)l->from;
  const float *map = (const float *)(w->maps + w->net->map[step[-1].to]);
  float *to = (float *)(w->maps + w->net->vector[step->to]);
  for (int32_t block = first; block < end; block++)
    w->net->kernels->sum(map + 32 * block, pixels, (size_t)l->out_room, to + 32 * block);
  for (int32_t c = 32 * first; c < 32 * end; c++) to[c] /= (float)pixels;
}

static void do_tile(const Work *w, const Step *step, int32_t tile, int32_t tiles) {
  const int32_t first = (int32_t)((int64_t)step->units * tile / tiles);
  const int32_t end = (int32_t)((int64_t)step->units * (tile + 1) / tiles);
  switch (w->net->layer[step->first].operation) {
    case STEM: stem_rows(w, step, first, end); break;
    case HALF_BLOCK: block_rows(w, step, first, end); break;
    case MEAN: mean_blocks(w, step, first, end); break;
    default: linear_rows(w, step, first, end);
  }
}

/* What the last step left, without the channels that fill up. */
static void emit(const Work *w, const Step *last) {
  const Layer *l = w->net->layer + w->layers - 1;
  const size_t out = (size_t)l->out, room = (size_t)l->out_room, pixels = (size_t)l->side * (size_t)l->side;
  const int is_map = l->operation == STEM || l->operation == HALF_BLOCK;
  const float *from = (const float *)(w->maps + (is_map ? w->net->map : w->net->vector)[last->to]);
  for (size_t i = 0; i < pixels; i++) memcpy(w->out + i * out, from + i * room, 4 * out);
}

/* Tiles of a step for that many threads. */
static int32_t tiles_of(const bnn_net *net, const Step *step, int32_t threads) {
  int32_t tiles = (int32_t)(((int64_t)step->units + step->most - 1) / step->most);
  int32_t most = step->units;
  if (net->layer[step->first].operation == LINEAR) most = (step->units + ROWS_OF_OUTPUTS - 1) / ROWS_OF_OUTPUTS;
  if (threads > 1) tiles = (int32_t)rounded((uint64_t)tiles, (uint64_t)threads);
  return tiles < most ? tiles : most;
}

static Work work_on(const bnn_workspace *w, int32_t image, int32_t maps, int32_t own) {
  const size_t pixels = (size_t)w->net->side * (size_t)w->net->side;
  Work work = {.net = w->net, .maps = w->base + w->net->bytes * (size_t)maps,
               .own = w->base + w->net->bytes * (size_t)own, .layers = w->layers,
               .out = w->out + bnn_floats(w->net, w->layers) * (size_t)image};
  if (w->kind == BNN_BYTES) work.bytes = (const uint8_t *)w->images + 3 * pixels * (size_t)image;
  else work.floats = (const float *)w->images + 3 * pixels * (size_t)image;
  return work;
}

void bnn_prepare(const bnn_net *net, bnn_workspace *w, const void *images, int32_t kind, int32_t count,
                 int32_t layers, float *out) {
  w->net = net, w->images = images, w->kind = kind, w->out = out, w->count = count < 0 ? 0 : count;
  w->layers = layers < 1 || layers > net->layers ? net->layers : layers;
  for (w->steps = 0; w->steps < net->steps && net->step[w->steps].first < w->layers;) w->steps++;
  w->whole = w->count / w->threads * w->threads;
  atomic_store(&w->finished, 0), atomic_store(&w->joined, 0);
  atomic_store(&w->ticket, w->whole ? 0 : (uint64_t)1 << 32);
}

void bnn_join(bnn_workspace *w) {
  const int32_t own = atomic_fetch_add(&w->joined, 1);
  if (own >= w->threads) return;
  const uint64_t phases = 1 + (uint64_t)(w->count - w->whole) * (uint64_t)(w->steps + 1);
  for (;;) {
    const uint64_t ticket = atomic_fetch_add(&w->ticket, 1), phase = ticket >> 32;
    if (phase >= phases) return;
    const uint32_t tile = (uint32_t)ticket, rounds = (uint32_t)w->steps + 1; /* the last one hands the image out */
    const int32_t at = phase ? (int32_t)((phase - 1) % rounds) : 0;
    const int32_t image = phase ? w->whole + (int32_t)((phase - 1) / rounds) : (int32_t)tile;
    const Step *step = w->net->step + at;
    uint32_t tiles = 1;
    if (!phase) tiles = (uint32_t)w->whole;
    else if (at < w->steps) tiles = (uint32_t)tiles_of(w->net, step, w->threads);
    if (tile < tiles) {
      const Work work = work_on(w, image, phase ? 0 : own, own);
      if (phase && at < w->steps) {
        do_tile(&work, step, (int32_t)tile, (int32_t)tiles);
      } else {
        for (int32_t s = 0; !phase && s < w->steps; s++) {
          const int32_t parts = tiles_of(w->net, w->net->step + s, 1);
          for (int32_t i = 0; i < parts; i++) do_tile(&work, w->net->step + s, i, parts);
        }
        emit(&work, w->net->step + w->steps - 1);
      }
      if (atomic_fetch_add(&w->finished, 1) + 1 == tiles) {
        atomic_store(&w->finished, 0);
        atomic_store(&w->ticket, (phase + 1) << 32);
      }
      continue;
    }
    for (int spins = 0; atomic_load(&w->ticket) >> 32 == phase; spins++) {
      if (spins > 200) sched_yield(); /* others may need this core, the thread that is waited for among them */
#ifdef HAVE_X86
      else _mm_pause();
#endif
    }
  }
}

void bnn_run(const bnn_net *net, bnn_workspace *workspace, const void *images, int32_t kind, int32_t count,
             int32_t layers, float *out) {
  bnn_prepare(net, workspace, images, kind, count, layers, out);
  bnn_join(workspace);
}
