/* The compiled core of the back ends `turbo` and `ffcv`: JPEG (libjpeg-turbo) or raw RGB to uint8 crops.

   One call works on a batch and any number of threads may make it on the same batch: each takes the next row until
   none is left. A row is read, decoded once (only the rows and columns that its windows can see), and every view is
   resampled from that straight into the batch. Nothing here draws, keeps a state or holds Python's lock.

   Resampling is Pillow's separable antialiased filter (triangle, or cubic with a = -0.5), horizontal pass first,
   8 bits between the passes, with weights of 14 bits instead of 22. The AVX2 and the plain path compute the same
   integers. A row with anything odd about it is given up, and the host decodes it, or says what is wrong with it. */

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jpeglib.h>
#include <jerror.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#include <immintrin.h>
#endif

#ifndef LIBJPEG_TURBO_VERSION
#error "libjpeg-turbo is needed: plain libjpeg cannot skip rows or columns"
#endif

#define ABI 3
#define WEIGHT_BITS 14
#define MAX_FILE ((size_t)1 << 30)
#define MAX_SIDE 65500
#define MAX_SCANS 200         /* a progressive file may ask for endless passes over the same pixels */
#define ROW_MARGIN 16         /* chroma upsampling looks one coded block beyond the window */
#define PAD 128               /* bytes that the vector paths may read past a buffer's end */
#define FEW 8                 /* pairs of weights up to which the vector path has loops of fixed length */

enum { KIND_SKIP = -1, KIND_JPEG = 0, KIND_RAW = 1 };
enum { DONE = 0, SKIPPED = 1, FAILED = 2, WARNED = 3 }; /* WARNED: decoded in full, and libjpeg found damage */

/* One axis of one window: output pixel o is centred at start + (o + 0.5) * scale and sees source [low, high). */
typedef struct { double low, high, start, scale; } Axis;

typedef struct {
  int32_t size, cubic;
  uint8_t *out;               /* [rows, size, size, 3] */
} View;

typedef struct {
  int32_t num_rows, num_views;
  int64_t max_pixels;
  const int32_t *kind;        /* [rows] */
  const char *const *path;    /* [rows], or NULL where `data` has the bytes */
  const uint8_t *const *data; /* [rows] */
  const int64_t *offset;      /* [rows], into the file */
  const int64_t *length;      /* [rows] bytes; -1 for a whole file, -2 - n for one that has to have n bytes */
  const int32_t *width;       /* [rows], as indexed */
  const int32_t *height;
  const Axis *windows;        /* [rows, views, 2]: x, y */
  const uint8_t *flip;        /* [rows, views] */
  const View *views;          /* [views]; none: decode everything, keep nothing, look for damage */
  int32_t *status;            /* [rows] */
  int32_t next;               /* next row to take */
} Job;

typedef struct { uint8_t *at; size_t size; } Buffer;
typedef struct { Buffer file, pixels, between, weights[2], bounds[2]; } Workspace;

typedef struct {
  struct jpeg_error_mgr base;
  struct jpeg_progress_mgr progress;
  jmp_buf back;
  int ran_out;                /* the data ended before the picture did */
} Errors;

/* ------------------------------------------------------------------------------------------------ memory, files */

static int grow(Buffer *buffer, size_t size) {
  if (size > SIZE_MAX - PAD) return 0;
  size += PAD;
  if (buffer->size >= size) return 1;
  free(buffer->at);
  buffer->at = malloc(size);
  buffer->size = buffer->at ? size : 0;
  return buffer->at != NULL;
}

/* Bytes that are mapped are gone when somebody cuts their file short: the system then sends SIGBUS to who reads them. */
static __thread jmp_buf *escape = NULL;
static struct sigaction other_handler;

static void on_bus_error(int number) {
  if (escape) longjmp(*escape, 1);
  sigaction(number, &other_handler, NULL); /* not ours: the same access, again, is theirs */
}

/* From now on rows whose bytes are gone have failed. */
void turbo_guard(void) {
  struct sigaction ours = {.sa_handler = on_bus_error, .sa_flags = SA_NODEFER};
  struct sigaction now;
  if (!sigaction(SIGBUS, NULL, &now) && now.sa_handler != on_bus_error) sigaction(SIGBUS, &ours, &other_handler);
}

static int read_file(Workspace *ws, const char *path, int64_t offset, int64_t length, size_t *count) {
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would wait for its writer */
  if (file < 0) return FAILED;
  struct stat facts;
  int result = FAILED;
  if (!fstat(file, &facts) && S_ISREG(facts.st_mode) && offset >= 0 && offset <= facts.st_size &&
      length <= facts.st_size - offset && (length >= -1 || facts.st_size == -2 - length)) {
    const uint64_t want = (uint64_t)(length < 0 ? facts.st_size - offset : length);
    size_t have = 0;
    if (want <= MAX_FILE && grow(&ws->file, want)) {
      while (have < want) {
        const ssize_t got = pread(file, ws->file.at + have, want - have, offset + (off_t)have);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        have += (size_t)got;
      }
      *count = have;
      result = have == want ? DONE : FAILED;
    }
  }
  close(file);
  return result;
}

/* ------------------------------------------------------------------------------------------------ weights */

static double triangle(double x) { return x < 1 ? 1 - x : 0; }

static double cubic(double x) { /* Keys, a = -0.5 */
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

static int valid_axis(const Axis *axis, int32_t side, int32_t size) {
  return axis->low >= 0 && axis->high <= side && axis->low < axis->high && isfinite(axis->start) &&
         axis->start >= axis->low && axis->scale > 0 && axis->start + size * axis->scale <= axis->high + 1;
}

/* Weights of an axis in pairs of 16 bits: bounds[2o] is the first source pixel, bounds[2o + 1] the number of pairs,
   `most` the largest of these; an odd last pair has a weight of 0, and so have all pairs up to `most` if these are
   few. Returns the pairs reserved for each output pixel, or 0 without memory. */
static size_t make_weights(Workspace *ws, int which, const Axis *axis, int32_t size, int is_cubic, int32_t *most) {
  const double stretch = axis->scale < 1 ? 1 : axis->scale, support = (is_cubic ? 2 : 1) * stretch;
  const double shrink = 1 / stretch;
  const int32_t low = (int32_t)axis->low, high = (int32_t)axis->high;
  const size_t pairs = ((size_t)(2 * support) + 4) / 2;
  if (!grow(&ws->weights[which], pairs * (size_t)size * sizeof(int32_t)) ||
      !grow(&ws->bounds[which], 2 * (size_t)size * sizeof(int32_t)) ||
      !grow(&ws->between, 2 * pairs * (sizeof(double) + sizeof(int32_t))))
    return 0;
  int32_t *weights = (int32_t *)ws->weights[which].at, *bounds = (int32_t *)ws->bounds[which].at;
  double *real = (double *)ws->between.at;
  int32_t *whole = (int32_t *)(real + 2 * pairs);
  *most = 1;
  for (int32_t o = 0; o < size; o++) {
    const double centre = axis->start + (o + 0.5) * axis->scale;
    int32_t first = (int32_t)(centre - support + 0.5), end = (int32_t)(centre + support + 0.5);
    if (centre - support + 0.5 < low) first = low;
    if (first > high - 1) first = high - 1;
    if (end > high) end = high;
    if (end <= first) end = first + 1;
    const int32_t count = end - first;
    double sum = 0;
    for (int32_t i = 0; i < count; i++) {
      const double x = fabs((first + i - centre + 0.5) * shrink);
      real[i] = is_cubic ? cubic(x) : triangle(x);
      sum += real[i];
    }
    const double unit = sum != 0 ? (1 << WEIGHT_BITS) / sum : 0;
    int32_t left = 1 << WEIGHT_BITS, largest = 0;
    for (int32_t i = 0; i < count; i++) {
      const double weight = real[i] * unit;
      whole[i] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
      left -= whole[i];
      if (whole[i] > whole[largest]) largest = i;
    }
    whole[largest] += left; /* the weights sum to exactly one */
    whole[count] = 0;
    for (int32_t i = 0; i < count; i += 2)
      weights[(size_t)o * pairs + (size_t)i / 2] =
          (int32_t)(((uint32_t)whole[i] & 0xffff) | ((uint32_t)whole[i + 1] << 16));
    bounds[2 * o] = first;
    bounds[2 * o + 1] = (count + 1) / 2;
    if (bounds[2 * o + 1] > *most) *most = bounds[2 * o + 1];
  }
  if (*most <= FEW)
    for (int32_t o = 0; o < size; o++)
      for (int32_t i = bounds[2 * o + 1]; i < *most; i++) weights[(size_t)o * pairs + (size_t)i] = 0;
  return pairs;
}

/* ------------------------------------------------------------------------------------------------ passes */

/* What both passes of both paths are given. Source pixels have 4 bytes, those between the passes and of the output 3.
   Rows are counted from the window's first source row. */
typedef struct {
  const uint8_t *source;
  size_t source_stride, between_stride; /* bytes */
  uint8_t *between, *out;
  int32_t size, rows, first_row, flip, most_x;
  const int32_t *wx, *wy, *bx, *by;
  size_t pairs_x, pairs_y;
} Pass;

static uint8_t clip(int32_t sum) {
  sum >>= WEIGHT_BITS;
  return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

static int32_t low_half(int32_t pair) { return (int16_t)(pair & 0xffff); }
static int32_t high_half(int32_t pair) { return pair >> 16; }

static void resample_plain(const Pass *p) {
  const int32_t half = 1 << (WEIGHT_BITS - 1), width = 3 * p->size;
  for (int32_t y = 0; y < p->rows; y++) {
    const uint8_t *row = p->source + (size_t)y * p->source_stride;
    for (int32_t o = 0; o < p->size; o++) {
      const uint8_t *from = row + 4 * (size_t)p->bx[2 * o];
      const int32_t *w = p->wx + (size_t)o * p->pairs_x, n = p->bx[2 * o + 1];
      int32_t red = half, green = half, blue = half;
      for (int32_t i = 0; i < n; i++) {
        const int32_t a = low_half(w[i]), b = high_half(w[i]);
        red += from[8 * i] * a;
        green += from[8 * i + 1] * a;
        blue += from[8 * i + 2] * a;
        if (b) { /* an odd last pair has no second pixel to read */
          red += from[8 * i + 4] * b;
          green += from[8 * i + 5] * b;
          blue += from[8 * i + 6] * b;
        }
      }
      uint8_t *to = p->between + (size_t)y * p->between_stride + 3 * (size_t)(p->flip ? p->size - 1 - o : o);
      to[0] = clip(red);
      to[1] = clip(green);
      to[2] = clip(blue);
    }
  }
  for (int32_t o = 0; o < p->size; o++) {
    const uint8_t *from = p->between + (size_t)(p->by[2 * o] - p->first_row) * p->between_stride;
    const int32_t *w = p->wy + (size_t)o * p->pairs_y, n = p->by[2 * o + 1];
    uint8_t *to = p->out + (size_t)o * (size_t)width;
    for (int32_t x = 0; x < width; x++) {
      int32_t sum = half;
      for (int32_t i = 0; i < n; i++) {
        const uint8_t *at = from + 2 * (size_t)i * p->between_stride + x;
        sum += at[0] * low_half(w[i]);
        if (high_half(w[i])) sum += at[p->between_stride] * high_half(w[i]);
      }
      to[x] = clip(sum);
    }
  }
}

#ifdef HAVE_AVX2
/* Output pixel o of two rows, one in each half: sums of its channels, before rounding down. */
__attribute__((target("avx2"), always_inline)) static inline __m256i two_rows(const Pass *p, const uint8_t *row0,
                                                                              const uint8_t *row1, int32_t o,
                                                                              int32_t fixed) {
  /* For every pair of pixels the channels as 16 bits beside each other. Of the second load the lower half counts. */
  const __m256i spread = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, 0, -1, 4, -1, 1, -1,
                                          5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
  const int32_t at = p->flip ? p->size - 1 - o : o, n = fixed ? fixed : p->bx[2 * at + 1];
  const size_t from = 4 * (size_t)p->bx[2 * at];
  const int32_t *w = p->wx + (size_t)at * p->pairs_x;
  __m256i sum = _mm256_set1_epi32(1 << (WEIGHT_BITS - 1));
  for (int32_t i = 0; i < n; i++) {
    const __m128i a = _mm_loadl_epi64((const __m128i *)(row0 + from + 8 * (size_t)i));
    const __m128i b = _mm_loadu_si128((const __m128i *)(row1 + from + 8 * (size_t)i));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(both, spread), _mm256_set1_epi32(w[i])));
  }
  return _mm256_srai_epi32(sum, WEIGHT_BITS);
}

__attribute__((target("avx2"), always_inline)) static inline void across_avx2(const Pass *p, int32_t y, int32_t fixed) {
  const __m128i narrow = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const uint8_t *row0 = p->source + (size_t)y * p->source_stride;
  const uint8_t *row1 = y + 1 < p->rows ? row0 + p->source_stride : row0;
  uint8_t *to0 = p->between + (size_t)y * p->between_stride, *to1 = to0 + p->between_stride;
  int32_t o = 0;
  for (; o + 4 <= p->size; o += 4) { /* writes 16 bytes, of which 12 count; the next ones, or the padding, follow */
    const __m256i low = _mm256_packs_epi32(two_rows(p, row0, row1, o, fixed), two_rows(p, row0, row1, o + 1, fixed));
    const __m256i high = _mm256_packs_epi32(two_rows(p, row0, row1, o + 2, fixed), two_rows(p, row0, row1, o + 3, fixed));
    const __m256i four = _mm256_packus_epi16(low, high);
    _mm_storeu_si128((__m128i *)(to0 + 3 * (size_t)o), _mm_shuffle_epi8(_mm256_castsi256_si128(four), narrow));
    _mm_storeu_si128((__m128i *)(to1 + 3 * (size_t)o), _mm_shuffle_epi8(_mm256_extracti128_si256(four, 1), narrow));
  }
  for (; o < p->size; o++) {
    __m256i sum = two_rows(p, row0, row1, o, fixed);
    sum = _mm256_packs_epi32(sum, sum);
    sum = _mm256_packus_epi16(sum, sum);
    const int32_t pixel0 = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
    const int32_t pixel1 = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
    memcpy(to0 + 3 * (size_t)o, &pixel0, 4);
    memcpy(to1 + 3 * (size_t)o, &pixel1, 4);
  }
}

__attribute__((target("avx2"))) static void down_avx2(const Pass *p, int32_t o) {
  const __m256i half = _mm256_set1_epi32(1 << (WEIGHT_BITS - 1)), zero = _mm256_setzero_si256();
  const int32_t width = 3 * p->size, *w = p->wy + (size_t)o * p->pairs_y, n = p->by[2 * o + 1];
  const uint8_t *from = p->between + (size_t)(p->by[2 * o] - p->first_row) * p->between_stride;
  uint8_t *to = p->out + (size_t)o * (size_t)width;
  for (int32_t x = 0; x < width; x += 32) {
    __m256i s0 = half, s1 = half, s2 = half, s3 = half;
    for (int32_t i = 0; i < n; i++) {
      const uint8_t *at = from + 2 * (size_t)i * p->between_stride + x;
      const __m256i weight = _mm256_set1_epi32(w[i]), a = _mm256_loadu_si256((const __m256i *)at);
      const __m256i b = _mm256_loadu_si256((const __m256i *)(at + p->between_stride));
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
      s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
      s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
      s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    const __m256i low = _mm256_packs_epi32(_mm256_srai_epi32(s0, WEIGHT_BITS), _mm256_srai_epi32(s1, WEIGHT_BITS));
    const __m256i high = _mm256_packs_epi32(_mm256_srai_epi32(s2, WEIGHT_BITS), _mm256_srai_epi32(s3, WEIGHT_BITS));
    const __m256i bytes = _mm256_packus_epi16(low, high);
    if (width - x >= 32) {
      _mm256_storeu_si256((__m256i *)(to + x), bytes);
    } else {
      uint8_t tail[32];
      _mm256_storeu_si256((__m256i *)tail, bytes);
      memcpy(to + x, tail, (size_t)(width - x));
    }
  }
}

__attribute__((target("avx2"))) static void resample_avx2(const Pass *p) {
  switch (p->most_x) { /* a loop whose length is known is unrolled */
#define ACROSS(n) \
  case n: \
    for (int32_t y = 0; y < p->rows; y += 2) across_avx2(p, y, n); \
    break;
    ACROSS(1) ACROSS(2) ACROSS(3) ACROSS(4) ACROSS(5) ACROSS(6) ACROSS(7) ACROSS(FEW)
#undef ACROSS
    default:
      for (int32_t y = 0; y < p->rows; y += 2) across_avx2(p, y, 0);
  }
  for (int32_t o = 0; o < p->size; o++) down_avx2(p, o);
}

__attribute__((target("avx2"))) static void widen_avx2(const uint8_t *from, uint8_t *to, int32_t pixels) {
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  int32_t x = 0;
  for (; x + 6 <= pixels; x += 4) /* reads 16 bytes, of which 12 count */
    _mm_storeu_si128((__m128i *)(to + 4 * (size_t)x),
                     _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(from + 3 * (size_t)x)), spread));
  for (; x < pixels; x++) memcpy(to + 4 * (size_t)x, from + 3 * (size_t)x, 3);
}
#endif

static int use_avx2 = 0;

/* Whether the vector path is used from now on; tests compare both. */
int turbo_vectors(int wanted) {
#ifdef HAVE_AVX2
  __builtin_cpu_init();
  use_avx2 = wanted && __builtin_cpu_supports("avx2");
#else
  (void)wanted;
#endif
  return use_avx2;
}

int turbo_abi(void) { return ABI; }
int turbo_libjpeg(void) { return LIBJPEG_TURBO_VERSION_NUMBER; }

static int resample(Workspace *ws, const uint8_t *pixels, size_t stride, int32_t left, int32_t top, const Axis *axes,
                    const View *view, int flip, uint8_t *out) {
  Axis x = axes[0], y = axes[1];
  x.low -= left, x.high -= left, x.start -= left;
  y.low -= top, y.high -= top, y.start -= top;
  int32_t unused;
  Pass p = {.size = view->size, .flip = flip, .out = out, .source_stride = stride};
  p.pairs_x = make_weights(ws, 0, &x, view->size, view->cubic, &p.most_x);
  p.pairs_y = p.pairs_x ? make_weights(ws, 1, &y, view->size, view->cubic, &unused) : 0;
  if (!p.pairs_y) return FAILED;
  p.wx = (const int32_t *)ws->weights[0].at, p.bx = (const int32_t *)ws->bounds[0].at;
  p.wy = (const int32_t *)ws->weights[1].at, p.by = (const int32_t *)ws->bounds[1].at;
  p.first_row = p.by[0];
  int32_t end_row = 0;
  for (int32_t o = 0; o < view->size; o++) {
    const int32_t end = p.by[2 * o] + 2 * p.by[2 * o + 1];
    if (end > end_row) end_row = end;
  }
  if (end_row > (int32_t)y.high) end_row = (int32_t)y.high; /* the second half of an odd pair has no row */
  p.rows = end_row - p.first_row;
  /* One row more for the row after an odd last one, and one for the second half of an odd last pair. */
  p.between_stride = (3 * (size_t)view->size + 63) / 32 * 32;
  if (!grow(&ws->between, p.between_stride * ((size_t)p.rows + 2))) return FAILED;
  p.between = ws->between.at;
  p.source = pixels + (size_t)p.first_row * stride;
#ifdef HAVE_AVX2
  if (use_avx2) {
    memset(p.between + p.between_stride * (size_t)p.rows, 0, 2 * p.between_stride);
    resample_avx2(&p);
    return DONE;
  }
#endif
  resample_plain(&p);
  return DONE;
}

/* ------------------------------------------------------------------------------------------------ JPEG */

static void on_error(j_common_ptr info) { longjmp(((Errors *)info->err)->back, 1); }

static void on_message(j_common_ptr info, int level) {
  if (level >= 0) return;
  info->err->num_warnings++;
  if (info->err->msg_code == JWRN_JPEG_EOF) ((Errors *)info->err)->ran_out = 1;
}

static void on_progress(j_common_ptr info) {
  if (((j_decompress_ptr)info)->input_scan_number > MAX_SCANS) on_error(info);
}

typedef struct { int32_t left, top, right, bottom; } Box;

/* Decode `box` as 4-byte pixels; `box` becomes what was decoded, which is more. Without a box nothing is kept. */
static int decode(Workspace *ws, const Job *job, int32_t row, const uint8_t *bytes, size_t count, Box *box,
                  size_t *stride) {
  struct jpeg_decompress_struct jpeg;
  Errors errors = {.ran_out = 0};
  memset(&jpeg, 0, sizeof jpeg);
  jpeg.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = on_error;
  errors.base.emit_message = on_message;
  errors.progress.progress_monitor = on_progress;
  jmp_buf *const outer = escape;
  if (setjmp(errors.back)) {
    escape = outer;
    jpeg_destroy_decompress(&jpeg);
    return FAILED;
  }
  if (outer) escape = &errors.back;
  jpeg_create_decompress(&jpeg);
  jpeg.progress = &errors.progress;
  jpeg_mem_src(&jpeg, bytes, (unsigned long)count);
  jpeg_read_header(&jpeg, TRUE);
  if ((int64_t)jpeg.image_width != job->width[row] || (int64_t)jpeg.image_height != job->height[row]) {
    on_error((j_common_ptr)&jpeg); /* no longer the file that was indexed; nothing of its size was made room for */
  }
  /* Without its end a file has been cut short, and is bad whatever the windows see of it. More may follow the end. */
  const uint8_t *mark = bytes + count - 2;
  while (mark >= jpeg.src->next_input_byte && (mark[0] != 0xff || mark[1] != 0xd9)) mark--;
  if (mark < jpeg.src->next_input_byte) on_error((j_common_ptr)&jpeg);
  jpeg.out_color_space = JCS_EXT_RGBX;
  jpeg.dct_method = JDCT_ISLOW; /* as Pillow, torchvision and DALI: their pixels to the bit */
  jpeg_start_decompress(&jpeg);

  JDIMENSION first = 0, width = jpeg.output_width, skipped = 0, end = jpeg.output_height;
  if (box) {
    first = box->left > ROW_MARGIN ? (JDIMENSION)(box->left - ROW_MARGIN) : 0;
    JDIMENSION right = (JDIMENSION)box->right + ROW_MARGIN;
    width = (right < jpeg.output_width ? right : jpeg.output_width) - first;
    if (width < jpeg.output_width) jpeg_crop_scanline(&jpeg, &first, &width);
    if (box->top > 2 * ROW_MARGIN) {
      JDIMENSION want = (JDIMENSION)(box->top - ROW_MARGIN) / ROW_MARGIN * ROW_MARGIN;
      skipped = jpeg_skip_scanlines(&jpeg, want);
      if (skipped != want) on_error((j_common_ptr)&jpeg);
    }
    end = (JDIMENSION)box->bottom;
  }
  *stride = 4 * (size_t)jpeg.output_width;
  const size_t kept = box ? end - skipped : 0;
  if (!grow(&ws->pixels, *stride * (kept + 1))) on_error((j_common_ptr)&jpeg);
  while (jpeg.output_scanline < end) { /* rows that nobody wants go to the spare one */
    const size_t place = jpeg.output_scanline - skipped;
    JSAMPROW line = ws->pixels.at + *stride * (place < kept ? place : kept);
    if (jpeg_read_scanlines(&jpeg, &line, 1) != 1) break;
  }
  const int complete = jpeg.output_scanline >= end && !errors.ran_out;
  const int warned = !box && errors.base.num_warnings;
  if (box) *box = (Box){(int32_t)first, (int32_t)skipped, (int32_t)(first + jpeg.output_width), (int32_t)end};
  escape = outer;
  jpeg_destroy_decompress(&jpeg);
  return !complete ? FAILED : warned ? WARNED : DONE;
}

/* ------------------------------------------------------------------------------------------------ rows */

static int union_of(const Job *job, int32_t row, Box *box) {
  const int32_t width = job->width[row], height = job->height[row];
  *box = (Box){width, height, 0, 0};
  for (int32_t v = 0; v < job->num_views; v++) {
    const Axis *axes = job->windows + 2 * ((size_t)row * (size_t)job->num_views + (size_t)v);
    const int32_t size = job->views[v].size;
    if (size < 1 || size > MAX_SIDE || !valid_axis(&axes[0], width, size) || !valid_axis(&axes[1], height, size)) return 0;
    for (int a = 0; a < 2; a++) {
      /* What the filter can see of [low, high), and a pixel more for rounding. */
      const double reach = (job->views[v].cubic ? 2 : 1) * (axes[a].scale < 1 ? 1 : axes[a].scale) + 1;
      const double from = axes[a].start - reach, to = axes[a].start + size * axes[a].scale + reach;
      const int32_t low = (int32_t)(from < axes[a].low ? axes[a].low : from);
      const int32_t high = (int32_t)(to > axes[a].high ? axes[a].high : ceil(to));
      int32_t *least = a ? &box->top : &box->left, *most = a ? &box->bottom : &box->right;
      if (low < *least) *least = low;
      if (high > *most) *most = high;
    }
  }
  return 1;
}

static int raw(Workspace *ws, const Job *job, int32_t row, const uint8_t *bytes, size_t count, const Box *box,
               size_t *stride) {
  const size_t width = (size_t)job->width[row], height = (size_t)job->height[row];
  if (count != 3 * width * height) return FAILED;
  const int32_t columns = box->right - box->left;
  *stride = 4 * (size_t)columns;
  if (!grow(&ws->pixels, *stride * (size_t)(box->bottom - box->top))) return FAILED;
  for (int32_t y = box->top; y < box->bottom; y++) {
    const uint8_t *from = bytes + 3 * ((size_t)y * width + (size_t)box->left);
    uint8_t *to = ws->pixels.at + (size_t)(y - box->top) * *stride;
#ifdef HAVE_AVX2
    if (use_avx2) {
      widen_avx2(from, to, columns);
      continue;
    }
#endif
    for (int32_t x = 0; x < columns; x++) memcpy(to + 4 * (size_t)x, from + 3 * (size_t)x, 3);
  }
  return DONE;
}

static int cut_row(Workspace *ws, const Job *job, int32_t row) {
  const int32_t width = job->width[row], height = job->height[row];
  if (job->kind[row] == KIND_SKIP) return SKIPPED;
  if (width < 1 || height < 1 || width > MAX_SIDE || height > MAX_SIDE) return FAILED;
  if ((int64_t)width * height > job->max_pixels) return FAILED;
  Box box;
  if (!union_of(job, row, &box)) return FAILED;
  const uint8_t *bytes = job->data[row];
  size_t count = 0, stride = 0;
  int result = DONE;
  if (job->path[row]) {
    result = read_file(ws, job->path[row], job->offset[row], job->length[row], &count);
    bytes = ws->file.at;
  } else {
    if (!bytes || job->length[row] < 0 || (size_t)job->length[row] > MAX_FILE) return FAILED;
    count = (size_t)job->length[row];
  }
  if (result != DONE) return result;
  if (job->kind[row] == KIND_RAW) {
    if (!job->num_views) return count == 3 * (size_t)width * (size_t)height ? DONE : FAILED;
    result = raw(ws, job, row, bytes, count, &box, &stride);
  } else {
    result = decode(ws, job, row, bytes, count, job->num_views ? &box : NULL, &stride);
  }
  for (int32_t v = 0; v < job->num_views && result == DONE; v++) {
    const View *view = &job->views[v];
    const size_t cell = (size_t)row * (size_t)job->num_views + (size_t)v;
    uint8_t *out = view->out + (size_t)row * (size_t)view->size * (size_t)view->size * 3;
    Axis axes[2] = {job->windows[2 * cell], job->windows[2 * cell + 1]};
    /* Weights outside of what was decoded are zero or beyond the union: cut the axis to it. */
    if (axes[0].low < box.left) axes[0].low = box.left;
    if (axes[0].high > box.right) axes[0].high = box.right;
    if (axes[1].low < box.top) axes[1].low = box.top;
    if (axes[1].high > box.bottom) axes[1].high = box.bottom;
    result = resample(ws, ws->pixels.at, stride, box.left, box.top, axes, view, job->flip[cell], out);
  }
  return result;
}

static int do_row(Workspace *ws, const Job *job, int32_t row) {
  jmp_buf gone;
  if (job->path[row]) return cut_row(ws, job, row);
  if (setjmp(gone)) {
    escape = NULL;
    return FAILED;
  }
  escape = &gone;
  const int result = cut_row(ws, job, row);
  escape = NULL;
  return result;
}

/* ------------------------------------------------------------------------------------------------ headers */

#define WINDOW 4096           /* bytes of a file that are read at a time: most headers lie in the first ones */
#define MAX_WINDOWS 256       /* a file may have endless segments before its frame */
#define ROWS_AT_ONCE 64

enum { FOUND = 0, OTHER = 1, EMPTY = 2, IRREGULAR = 3 }; /* else -errno */

typedef struct {
  int64_t num_rows;
  const int64_t *rows;        /* [num_rows] positions in all that follows; NULL: all of them in their order */
  int32_t base;               /* the folder that names are relative to, or the file that pieces lie in */
  int32_t only_facts;         /* size and time alone: nothing is opened */
  const char *names;          /* each ends with a 0 */
  const int64_t *ends;        /* end of each name, the 0 included; NULL: pieces of the file `base` */
  const int64_t *offset, *length; /* of pieces */
  int64_t *size, *modified;   /* of files: bytes, nanoseconds */
  int32_t *width, *height;    /* of a JPEG, 8 bits a channel, whose header is whole */
  int32_t *status;
  int64_t next;
} Headers;

/* What lies at `at` of a part of a file: bytes that were read, 0 at its end, -errno. */
static ssize_t look(int file, uint8_t *window, int64_t at, int64_t offset, int64_t length) {
  if (at < 0 || at >= length) return 0;
  const int64_t left = length - at;
  for (;;) {
    const ssize_t got = pread(file, window, left < WINDOW ? (size_t)left : WINDOW, (off_t)(offset + at));
    if (got >= 0) return got;
    if (errno != EINTR) return -errno;
  }
}

/* Size of a JPEG from its segments, up to the first scan. Anything unusual is left to others. */
static int32_t jpeg_size(int file, int64_t offset, int64_t length, int32_t *width, int32_t *height) {
  uint8_t window[WINDOW];
  int64_t start = 0, at = 2; /* of the window and of the next marker */
  ssize_t have = look(file, window, 0, offset, length);
  if (have < 0) return (int32_t)have;
  if (have < 4 || window[0] != 0xff || window[1] != 0xd8) return OTHER;
  int framed = 0;
  for (int windows = 0; windows < MAX_WINDOWS;) {
    if (at + 10 > start + have) { /* a frame header has no more */
      start = at;
      have = look(file, window, start, offset, length);
      windows++;
      if (have < 0) return (int32_t)have;
      if (have < 4) return OTHER;
    }
    const uint8_t *segment = window + (at - start);
    const int marker = segment[1];
    if (segment[0] != 0xff || marker == 0xff || marker == 0 || marker == 0xd8 || marker == 0xd9) return OTHER;
    if (marker == 0xda) return framed ? FOUND : OTHER;
    const int32_t count = segment[2] << 8 | segment[3];
    if (count < 2) return OTHER;
    if (marker == 0xe2 && have - (at - start) >= 8 && !memcmp(segment + 4, "MPF", 4)) return OTHER; /* many pictures */
    if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) {
      if (framed || count < 8 || have - (at - start) < 10 || segment[4] != 8) return OTHER;
      *height = segment[5] << 8 | segment[6], *width = segment[7] << 8 | segment[8];
      if (!*width || !*height || (segment[9] != 1 && segment[9] != 3)) return OTHER;
      framed = 1;
    }
    at += 2 + count;
  }
  return OTHER;
}

static int32_t facts_of(const struct stat *facts, int64_t *size, int64_t *modified) {
  *size = facts->st_size;
  *modified = (int64_t)facts->st_mtim.tv_sec * 1000000000 + facts->st_mtim.tv_nsec;
  if (!S_ISREG(facts->st_mode)) return IRREGULAR;
  return facts->st_size ? FOUND : EMPTY;
}

static int32_t header_of(const Headers *job, int64_t row) {
  if (!job->ends) {
    if (!job->length[row]) return EMPTY;
    return jpeg_size(job->base, job->offset[row], job->length[row], &job->width[row], &job->height[row]);
  }
  const char *name = job->names + (row ? job->ends[row - 1] : 0);
  struct stat facts;
  if (job->only_facts) {
    if (fstatat(job->base, name, &facts, 0)) return -errno;
    return facts_of(&facts, &job->size[row], &job->modified[row]);
  }
  const int file = openat(job->base, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would wait for its writer */
  if (file < 0) return -errno;
  int32_t status = fstat(file, &facts) ? -errno : facts_of(&facts, &job->size[row], &job->modified[row]);
  if (status == FOUND) status = jpeg_size(file, 0, facts.st_size, &job->width[row], &job->height[row]);
  close(file);
  return status;
}

/* ------------------------------------------------------------------------------------------------ entry points */

/* Read headers of a job's rows until none is left; any number of threads share it. */
void turbo_headers(Headers *job) {
  for (;;) {
    const int64_t first = __atomic_fetch_add(&job->next, ROWS_AT_ONCE, __ATOMIC_RELAXED);
    if (first >= job->num_rows) return;
    const int64_t end = first + ROWS_AT_ONCE < job->num_rows ? first + ROWS_AT_ONCE : job->num_rows;
    for (int64_t i = first; i < end; i++) {
      const int64_t row = job->rows ? job->rows[i] : i;
      job->status[row] = header_of(job, row);
    }
  }
}

void *turbo_workspace(void) { return calloc(1, sizeof(Workspace)); }

void turbo_free(void *workspace) {
  Workspace *ws = workspace;
  if (!ws) return;
  free(ws->file.at), free(ws->pixels.at), free(ws->between.at);
  for (int i = 0; i < 2; i++) free(ws->weights[i].at), free(ws->bounds[i].at);
  free(ws);
}

/* Work on rows of a job until none is left. Threads share the job, each has a workspace of its own. */
void turbo_run(Job *job, void *workspace) {
  for (;;) {
    const int32_t row = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (row >= job->num_rows) return;
    job->status[row] = do_row(workspace, job, row);
  }
}
