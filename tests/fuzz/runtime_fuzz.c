/* Coverage-guided fuzzing of the runtime under the address and undefined-behavior sanitizers: files are opened and run.

       make fuzz              # 30 minutes on one core; FUZZ_SECONDS=60 for a short one

   The first byte of an input chooses kernels, threads' number, kind of images and how many layers; the rest is a file,
   whose checksum is not looked at and whose size is put right. */

#define BNN_WITHOUT_CHECKSUM 1
#include "../../runtime/core.c"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t count) {
  static const bnn_limits limits = {256, 1024, 64, 10000000, 1 << 20};
  if (count < 1) return 0;
  const char *kernels = bnn_usable(input[0] & 3);
  bnn_kernels(kernels);
  /* A copy of its own, so that a read past the end is seen. */
  const size_t length = count - 1;
  uint8_t *bytes = malloc(length ? length : 1);
  memcpy(bytes, input + 1, length);
  for (size_t i = 16; i < 24 && i < length; i++) bytes[i] = (uint8_t)((uint64_t)length >> 8 * (i - 16));
  char message[BNN_MESSAGE];
  bnn_net *net = NULL;
  const int status = bnn_open(bytes, length, &limits, &net, message);
  if ((status == BNN_DONE) != (net != NULL) || (status != BNN_DONE && !message[0])) abort();
  free(bytes);
  if (net) {
    const int32_t images = 1 + (input[0] >> 2 & 1), kind = input[0] >> 3 & 1, threads = 1 + (input[0] >> 4 & 1);
    const int32_t layers = input[0] >> 5 ? bnn_layers(net) - (input[0] >> 5) : 0;
    const size_t side = (size_t)bnn_side(net), pixels = 3 * side * side * (size_t)images;
    void *image = calloc(pixels, kind == BNN_FLOATS ? sizeof(float) : 1);
    if (kind == BNN_BYTES) memset(image, input[0], pixels);
    float *out = malloc(sizeof *out * bnn_floats(net, layers) * (size_t)images);
    bnn_workspace *workspace = bnn_workspace_new(net, threads);
    if (!image || !out || !workspace) abort(); /* limits hold memory far below what there is */
    bnn_run(net, workspace, image, kind, images, layers, out);
    bnn_workspace_free(workspace), free(out), free(image);
  }
  bnn_close(net);
  return 0;
}
