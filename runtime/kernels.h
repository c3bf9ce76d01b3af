/* What is done to floats and signs, written once and included for each instruction set with these macros:

   SET             ending of the functions' names
   TARGET          attribute that lets the compiler use the set
   LANES, PIXELS, BLOCKS   floats of a vector; pixels of a tile; blocks of 32 channels of a tile
   FLOATS          a vector, and its operations LOAD, STORE, SET1, ADD, MUL, OF_COUNTS, SLOPE_OF, ABOVE, SUM,
                   OF_HALVES, OF_BYTES

   and count_SET, which counts differing bits of a tile. Multiplications and additions stay apart and in their order:
   that is the format's meaning, to the bit. Only the sums of linear layers have an order of their own. */

#define GLUE_(name, set) name##_##set
#define GLUE(name, set) GLUE_(name, set)
#define NAME(name) GLUE(name, SET)

/* u = (A P + B) + residual; h = u (u > 0 ? 1 : slope) + shift; sign of h beyond the threshold. The constants stay in
   registers for a tile. */
INLINE TARGET void NAME(finish)(const Layer *l, const Row *r, int32_t block, int32_t x, int32_t (*counts)[32],
                                const int pixels, const int pooled) {
  const size_t room = (size_t)l->out_room, wide = (size_t)r->residual_pixel;
  const int32_t first = 32 * block, source = first >= r->wrap ? first - r->wrap : first;
  const float *residual = r->residual + (size_t)x * wide * (pooled ? 2 : 1) + source;
  float *out = r->out + (size_t)x * room + first;
  uint32_t signs[PIXELS] = {0};
#pragma GCC unroll 4
  for (int v = 0; v < 32; v += LANES) {
    const FLOATS a = LOAD(l->a + first + v), b = LOAD(l->b + first + v), slope = LOAD(l->slope + first + v);
    const FLOATS shift = LOAD(l->shift + first + v), threshold = LOAD(l->threshold + first + v);
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++) {
      FLOATS e;
      if (pooled) {
        const float *q = residual + 2 * (size_t)p * wide + v, *below = q + r->residual_row;
        e = MUL(ADD(ADD(ADD(LOAD(q), LOAD(q + wide)), LOAD(below)), LOAD(below + wide)), SET1(0.25f));
      } else {
        e = LOAD(residual + (size_t)p * wide + v);
      }
      const FLOATS u = ADD(ADD(MUL(OF_COUNTS(counts[p] + v), a), b), e);
      const FLOATS h = ADD(MUL(u, SLOPE_OF(u, slope)), shift);
      STORE(out + (size_t)p * room + v, h);
      signs[p] |= ABOVE(h, threshold) << v;
    }
  }
  if (!r->signs) return;
  uint32_t *words = r->signs + (size_t)x * (room / 32) + block;
#pragma GCC unroll 8
  for (int p = 0; p < pixels; p++) words[(size_t)p * (room / 32)] = signs[p];
}

#define TILE(kernel, pooled, blocks, pixels)                                                                       \
  TARGET static void NAME(tile_##kernel##_##pooled##_##blocks##_##pixels)(const Layer *l, const Row *r,            \
                                                                          int32_t block, int32_t x) {              \
    int32_t counts[(pixels) * (blocks)][32] __attribute__((aligned(64)));                                          \
    NAME(count)(l, r, block, x, counts, pixels, blocks, kernel);                                                   \
    for (int o = 0; o < (blocks); o++) NAME(finish)(l, r, block + o, x, counts + o * (pixels), pixels, pooled);    \
  }
#define TILES(pixels)                                                                                              \
  TILE(1, 0, 1, pixels) TILE(1, 1, 1, pixels) TILE(3, 0, 1, pixels) TILE(3, 1, 1, pixels)
#define TILES_2(pixels)                                                                                            \
  TILE(1, 0, 2, pixels) TILE(1, 1, 2, pixels) TILE(3, 0, 2, pixels) TILE(3, 1, 2, pixels)
#define NAMED(kernel, pooled, blocks, pixels) NAME(tile_##kernel##_##pooled##_##blocks##_##pixels)
#if PIXELS == 7
#define EACH(kernel, pooled, blocks)                                                                               \
  {NAMED(kernel, pooled, blocks, 1), NAMED(kernel, pooled, blocks, 2), NAMED(kernel, pooled, blocks, 3),           \
   NAMED(kernel, pooled, blocks, 4), NAMED(kernel, pooled, blocks, 5), NAMED(kernel, pooled, blocks, 6),           \
   NAMED(kernel, pooled, blocks, 7)}
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7)
#elif PIXELS == 4
#define EACH(kernel, pooled, blocks)                                                                               \
  {NAMED(kernel, pooled, blocks, 1), NAMED(kernel, pooled, blocks, 2), NAMED(kernel, pooled, blocks, 3),           \
   NAMED(kernel, pooled, blocks, 4)}
TILES(1) TILES(2) TILES(3) TILES(4)
#elif PIXELS == 3
#define EACH(kernel, pooled, blocks)                                                                               \
  {NAMED(kernel, pooled, blocks, 1), NAMED(kernel, pooled, blocks, 2), NAMED(kernel, pooled, blocks, 3)}
TILES(1) TILES(2) TILES(3)
#if BLOCKS == 2
TILES_2(1) TILES_2(2) TILES_2(3)
#endif
#endif

/* Rows of a half-block. Channels are the outer loop, so that their weights stay in the cache. */
TARGET static void NAME(half)(const Layer *l, const Band *b) {
  typedef void Tile(const Layer *, const Row *, int32_t, int32_t);
  static Tile *const tiles[BLOCKS][2][2][PIXELS] = {
      {{EACH(1, 0, 1), EACH(1, 1, 1)}, {EACH(3, 0, 1), EACH(3, 1, 1)}},
#if BLOCKS == 2
      {{EACH(1, 0, 2), EACH(1, 1, 2)}, {EACH(3, 0, 2), EACH(3, 1, 2)}},
#endif
  };
  const int32_t blocks = l->out_room / 32, pieces = (l->side + PIXELS - 1) / PIXELS;
  for (int32_t block = 0, taken; block < blocks; block += taken) {
    taken = blocks - block < BLOCKS ? 1 : BLOCKS;
    Tile *const *tile = tiles[taken - 1][l->kernel == 3][l->residual == POOLED];
    for (int32_t y = b->first; y < b->end; y++) {
      const Row row = row_of(l, b, y);
      for (int32_t i = 0, x = 0, next; i < pieces; i++, x = next) {
        next = (int32_t)((int64_t)l->side * (i + 1) / pieces);
        tile[next - x - 1](l, &row, block, x);
      }
    }
  }
}

INLINE TARGET void NAME(stem_tile)(const Layer *l, const float *const rows[3], int32_t block, int32_t x, float *out,
                                   uint32_t *signs, const int pixels) {
  const size_t room = (size_t)l->out_room;
  const int32_t step = 3 * l->stride;
  FLOATS sums[STEM_PIXELS][32 / LANES];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; p++)
#pragma GCC unroll 8
    for (int v = 0; v < 32 / LANES; v++) sums[p][v] = LOAD(l->b + 32 * block + v * LANES);
  const float *w = (const float *)l->weights + (size_t)block * 27 * 32;
  for (int ky = 0; ky < 3; ky++) {
    const float *from = rows[ky] + x * step;
    for (int i = 0; i < 9; i++, w += 32)
#pragma GCC unroll 8
      for (int p = 0; p < pixels; p++) {
        const FLOATS value = SET1(from[i + p * step]);
#pragma GCC unroll 8
        for (int v = 0; v < 32 / LANES; v++) sums[p][v] = ADD(sums[p][v], MUL(value, LOAD(w + v * LANES)));
      }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; p++) {
    uint32_t word = 0;
#pragma GCC unroll 8
    for (int v = 0; v < 32 / LANES; v++) {
      STORE(out + (size_t)(x + p) * room + 32 * block + v * LANES, sums[p][v]);
      word |= ABOVE(sums[p][v], LOAD(l->threshold + 32 * block + v * LANES)) << (v * LANES);
    }
    signs[(size_t)(x + p) * (room / 32) + block] = word;
  }
}

/* A row of the stem: bias + weights times values in the order ky, kx, c; `rows` with a border of zeros. */
TARGET static void NAME(stem)(const Layer *l, const float *const rows[3], float *out, uint32_t *signs) {
  for (int32_t block = 0; block < l->out_room / 32; block++) {
    int32_t x = 0;
    for (; x + STEM_PIXELS <= l->side; x += STEM_PIXELS) NAME(stem_tile)(l, rows, block, x, out, signs, STEM_PIXELS);
    for (; x < l->side; x++) NAME(stem_tile)(l, rows, block, x, out, signs, 1);
  }
}

/* Sums of 32 channels over the pixels of a map, from 0 in their order. */
TARGET static void NAME(sum)(const float *map, size_t pixels, size_t room, float *out) {
  FLOATS sums[32 / LANES];
#pragma GCC unroll 8
  for (int v = 0; v < 32 / LANES; v++) sums[v] = SET1(0);
  for (size_t i = 0; i < pixels; i++)
#pragma GCC unroll 8
    for (int v = 0; v < 32 / LANES; v++) sums[v] = ADD(sums[v], LOAD(map + i * room + v * LANES));
#pragma GCC unroll 8
  for (int v = 0; v < 32 / LANES; v++) STORE(out + v * LANES, sums[v]);
}

/* x . w of one row; `room` is a multiple of 32, and zeros fill both. */
#define DOT(name, type, OF)                                                                                        \
  TARGET static float NAME(name)(const float *x, const void *row, size_t room) {                                   \
    const type *w = row;                                                                                           \
    FLOATS sums[4] = {SET1(0), SET1(0), SET1(0), SET1(0)};                                                         \
    const size_t chains = LANES == 16 ? 2 : 4;                                                                     \
    for (size_t i = 0; i < room; i += chains * LANES)                                                              \
      for (size_t v = 0; v < chains; v++)                                                                          \
        sums[v] = ADD(sums[v], MUL(LOAD(x + i + v * LANES), OF(w + i + v * LANES)));                               \
    return SUM(ADD(ADD(sums[0], sums[1]), ADD(sums[2], sums[3])));                                                 \
  }
DOT(dot_floats, float, LOAD)
DOT(dot_halves, uint16_t, OF_HALVES)
DOT(dot_bytes, int8_t, OF_BYTES)

static const Kernels NAME(kernels) = {
    .name = TEXT(SET), .half = NAME(half), .stem = NAME(stem), .sum = NAME(sum),
    .dot = {NAME(dot_floats), NAME(dot_halves), NAME(dot_bytes)}, .in_bytes = IN_BYTES, .with_parity = WITH_PARITY};

#undef SET
#undef TARGET
#undef LANES
#undef PIXELS
#undef BLOCKS
#undef STEM_PIXELS
#undef FLOATS
#undef LOAD
#undef STORE
#undef SET1
#undef ADD
#undef MUL
#undef OF_COUNTS
#undef SLOPE_OF
#undef ABOVE
#undef SUM
#undef OF_HALVES
#undef OF_BYTES
#undef IN_BYTES
#undef WITH_PARITY
#undef GLUE_
#undef GLUE
#undef NAME
#undef TILE
#undef TILES
#undef TILES_2
#undef NAMED
#undef EACH
#undef DOT
