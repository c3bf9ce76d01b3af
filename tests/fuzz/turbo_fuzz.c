/* Coverage-guided fuzzing of the compiled core, under the address and undefined-behavior sanitizers:

       make fuzz              # 30 minutes on one core; FUZZ_SECONDS=60 for a short one

   The first bytes of an input choose views, windows, kind of source and vector path; the rest is the image's bytes. */

#include "../../loaders/turbo.c"

static int size_of(const uint8_t *bytes, size_t count, int32_t *width, int32_t *height) {
  struct jpeg_decompress_struct jpeg;
  Errors errors = {.ran_out = 0};
  memset(&jpeg, 0, sizeof jpeg);
  jpeg.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = on_error;
  errors.base.emit_message = on_message;
  if (setjmp(errors.back)) {
    jpeg_destroy_decompress(&jpeg);
    return 0;
  }
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, bytes, (unsigned long)count);
  jpeg_read_header(&jpeg, TRUE);
  *width = (int32_t)jpeg.image_width, *height = (int32_t)jpeg.image_height;
  jpeg_destroy_decompress(&jpeg);
  return 1;
}

static Axis axis_of(const uint8_t *choice, int32_t side, int32_t size) {
  if (choice[0] == 255) { /* nonsense must be refused, not followed */
    const double odd[4] = {NAN, INFINITY, -1e300, 1e300};
    return (Axis){odd[choice[1] & 3], odd[choice[2] & 3], odd[choice[3] & 3], odd[choice[1] >> 6]};
  }
  const double low = floor(side * (choice[0] / 256.0)), high = low + 1 + floor((side - low - 1) * (choice[1] / 255.0));
  const double start = low + (high - low) * (choice[2] & 1 ? choice[3] / 512.0 : 0);
  return (Axis){low, high, start, (high - start) / size};
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t count) {
  static void *workspace = NULL;
  enum { HEAD = 4 + 4 * 10 };
  if (count < HEAD) return 0;
  if (!workspace) workspace = turbo_workspace();
  turbo_vectors(input[0] & 1);
  const int32_t num_views = input[1] % 5, kind = input[0] & 2 ? KIND_RAW : KIND_JPEG;
  /* Behind a copy of its own, so that a read past the end is seen. */
  const size_t length = count - HEAD;
  uint8_t *bytes = malloc(length ? length : 1);
  memcpy(bytes, input + HEAD, length);
  int32_t width = 1 + input[2], height = 1 + input[3];
  if (kind == KIND_JPEG && !size_of(bytes, length, &width, &height)) width = height = 16;
  if (input[0] & 4) height += 1; /* not the file that was indexed */
  View views[4];
  Axis windows[8];
  uint8_t flip[4];
  for (int32_t v = 0; v < num_views; v++) {
    const uint8_t *choice = input + 4 + 10 * v;
    views[v] = (View){1 + choice[0] % 97, choice[1] & 1, NULL};
    flip[v] = choice[1] >> 7;
    views[v].out = malloc(3 * (size_t)views[v].size * (size_t)views[v].size);
    windows[2 * v] = axis_of(choice + 2, width, views[v].size);
    windows[2 * v + 1] = axis_of(choice + 6, height, views[v].size);
  }
  const char *path = NULL;
  const uint8_t *data = bytes;
  const int64_t offset = 0, size = (int64_t)length;
  int32_t status = -1;
  Job job = {.num_rows = 1, .num_views = num_views, .max_pixels = 1 << 20, .kind = &kind, .path = &path,
             .data = &data, .offset = &offset, .length = &size, .width = &width, .height = &height,
             .windows = windows, .flip = flip, .views = views, .status = &status};
  turbo_run(&job, workspace);
  if (status != DONE && status != FAILED && (num_views || status != WARNED)) abort();
  for (int32_t v = 0; v < num_views; v++) free(views[v].out);
  free(bytes);
  return 0;
}
