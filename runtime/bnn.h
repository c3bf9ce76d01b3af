/* The runtime of bit-packed binary networks for programs in C: this header and `core.c`, which need only C11.

   A network is opened from the bytes of a file (format version 1, described in `bnn.py`), is never written to again and
   may be shared by threads. A call works in a workspace that belongs to it alone. Nothing here reads files, prints,
   starts threads or aborts: what fails says so by its value. `example.c` shows all of it.

   Build with -ffp-contract=off: the bits of a result are those of separate multiplications and additions. */

#ifndef BNN_H
#define BNN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BNN_ABI 1
#define BNN_MESSAGE 200         /* bytes of a message, its end included */
#define BNN_MAX_THREADS 64

enum { BNN_DONE = 0, BNN_REFUSED = 1, BNN_NO_MEMORY = 2 };
enum { BNN_BYTES = 0, BNN_FLOATS = 1 };

typedef struct bnn_net bnn_net;
typedef struct bnn_workspace bnn_workspace;

/* What a network may ask for; above side and channels of 16,384 nothing is taken whatever they say. */
typedef struct {
  uint32_t side, channels, records;
  uint64_t macs;                /* multiply-accumulates of an image, binary ones included */
  uint64_t memory;              /* bytes of the file, of the opened network, and of a workspace for one thread */
} bnn_limits;

int32_t bnn_abi(void);

/* Name of the number-th set of kernels that this CPU can run, the fastest first; NULL beyond the last. */
const char *bnn_usable(int32_t number);

/* Choose the kernels of networks that are opened from now on, NULL for the fastest; 0 if this CPU cannot run them. */
int32_t bnn_kernels(const char *name);

/* Check and unpack a file's bytes, which may be freed afterwards. `limits` may be NULL (side 4,096, channels 8,192, 512
   records, 2^40 MACs, 1 GiB). BNN_DONE and a network, or else a line in `message`. */
int32_t bnn_open(const void *bytes, size_t count, const bnn_limits *limits, bnn_net **net, char message[BNN_MESSAGE]);
void bnn_close(bnn_net *net);

int32_t bnn_side(const bnn_net *net);
int32_t bnn_layers(const bnn_net *net);

/* Layers that give the features: all but a classifier, which is a last linear layer without ReLU. */
int32_t bnn_feature_layers(const bnn_net *net);

/* What the first `layers` layers give for an image: 3 and a map's [side, side, channels], or 1 and [channels] after the
   mean; and how many floats that is. */
int32_t bnn_shape(const bnn_net *net, int32_t layers, int32_t shape[3]);
size_t bnn_floats(const bnn_net *net, int32_t layers);

/* Room for one call at a time, by 1 to BNN_MAX_THREADS threads; NULL if there is no memory. */
bnn_workspace *bnn_workspace_new(const bnn_net *net, int32_t threads);
void bnn_workspace_free(bnn_workspace *workspace);

/* Images [count] to `out` [count, bnn_floats(net, layers)], alone. `images` is uint8 [side, side, 3] each with
   BNN_BYTES, or float [3, side, side] each, normalized, with BNN_FLOATS. */
void bnn_run(const bnn_net *net, bnn_workspace *workspace, const void *images, int32_t kind, int32_t count,
             int32_t layers, float *out);

/* The same in company: one thread prepares, then any number of threads join, and each returns when all is done. The
   workspace is free again when all have returned; a thread that comes late or never holds up nobody. */
void bnn_prepare(const bnn_net *net, bnn_workspace *workspace, const void *images, int32_t kind, int32_t count,
                 int32_t layers, float *out);
void bnn_join(bnn_workspace *workspace);

#ifdef __cplusplus
}
#endif

#endif
