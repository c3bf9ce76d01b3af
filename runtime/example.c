/* A network without Python:

       cc -std=c11 -O3 -ffp-contract=off -o example example.c core.c
       ./example net.bnn image.rgb > outputs.f32      bytes [side, side, 3] to the last layer's outputs
       ./example net.bnn image.rgb plain 5            by those kernels, and what the first five layers give */

#include "bnn.h"

#include <stdio.h>
#include <stdlib.h>

static unsigned char *content_of(const char *path, size_t *count) {
  FILE *file = fopen(path, "rb");
  unsigned char *bytes = NULL;
  size_t room = 0;
  *count = 0;
  while (file && !ferror(file) && !feof(file)) {
    unsigned char *more = realloc(bytes, room += 1 << 20);
    if (!more) break;
    bytes = more;
    *count += fread(bytes + *count, 1, room - *count, file);
  }
  if (!file || !feof(file)) free(bytes), bytes = NULL;
  if (file) fclose(file);
  return bytes;
}

int main(int argc, char **argv) {
  char message[BNN_MESSAGE] = "cannot be read";
  bnn_net *net = NULL;
  size_t count = 0, pixels = 0;
  if (argc < 3) return fprintf(stderr, "usage: %s net.bnn image.rgb [kernels [layers]] > outputs.f32\n", argv[0]), 2;
  if (argc > 3 && !bnn_kernels(argv[3])) return fprintf(stderr, "%s: not for this CPU\n", argv[3]), 2;
  unsigned char *bytes = content_of(argv[1], &count), *image = content_of(argv[2], &pixels);
  if (!bytes || bnn_open(bytes, count, NULL, &net, message)) return fprintf(stderr, "%s: %s\n", argv[1], message), 2;
  free(bytes); /* the network has what it needs */
  const size_t side = (size_t)bnn_side(net), expected = 3 * side * side;
  if (!image || pixels != expected)
    return fprintf(stderr, "%s: expected %zu bytes, an image [%zu, %zu, 3]\n", argv[2], expected, side, side), 2;

  const int layers = argc > 4 ? atoi(argv[4]) : bnn_layers(net);
  bnn_workspace *workspace = bnn_workspace_new(net, 1);
  float *out = malloc(sizeof *out * bnn_floats(net, layers));
  if (!workspace || !out) return fprintf(stderr, "there is no memory\n"), 1;
  bnn_run(net, workspace, image, BNN_BYTES, 1, layers, out);
  const int done = fwrite(out, sizeof *out, bnn_floats(net, layers), stdout) == bnn_floats(net, layers);
  free(out), free(image), bnn_workspace_free(workspace), bnn_close(net);
  return done ? 0 : 1;
}
