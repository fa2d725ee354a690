/*
 * What a backend offers: devices, memory, streams, events, copies, packed weights, optional step graphs, and the table of
 * ops in <arle/ops.h>. "Device pointer" below means memory from mem.alloc(ARLE_MEM_DEVICE); on a CPU it is ordinary memory.
 *
 * Thread: everything takes a device and is called from the engine thread, except what says otherwise. All functions that
 * take a stream only enqueue: they never wait, and they allocate nothing once the model is loaded.
 * Errors: 0 or negative errno with a reason. -EIO means that the device is dead (see dead()): it answers -EIO from then on.
 */
#ifndef ARLE_BACKEND_H
#define ARLE_BACKEND_H

#include <arle/plugin.h>
#include <arle/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

struct arle_device;         /* one opened device; owned by the backend, closed with close_device() */
struct arle_stream;         /* ordered queue of work on a device */
struct arle_event;          /* a point in a stream */
struct arle_graph;          /* captured sequence of enqueued work */
struct arle_weight;         /* packed weight matrix or vector */
struct arle_ops;

enum arle_mem_kind { ARLE_MEM_DEVICE = 1, ARLE_MEM_PINNED = 2 };       /* pinned: host memory that copies run fast from */
enum arle_copy_dir { ARLE_COPY_H2D = 1, ARLE_COPY_D2H, ARLE_COPY_D2D };

struct arle_device_info {
    uint32_t struct_size;
    uint32_t threads;                   /* CPU: worker threads; GPU: multiprocessors */
    char name[96];                      /* "AMD EPYC, AVX-512 BF16" */
    uint64_t mem_total, mem_free;       /* bytes */
    uint32_t async;                     /* 1: work runs beside the calling thread, so that the engine may plan ahead */
    uint32_t default_compute;           /* enum arle_dtype: what compute = auto means here (ARLE_F32 or ARLE_BF16) */
    uint32_t graphs;                    /* 1: graph_* work */
    uint32_t max_rows;                  /* largest n_tokens of one step, 0 = no limit */
};

/* Memory, streams and copies of one device. Handed to the KV plane as it is. */
struct arle_mem_ops {
    uint32_t struct_size;
    /** Zero-filled memory, 256-byte aligned. -ENOMEM says how much was asked and is free. Any thread. */
    int (*alloc)(struct arle_device *dev, uint32_t kind, size_t bytes, void **out, struct arle_err *err);
    void (*free)(struct arle_device *dev, uint32_t kind, void *ptr);
    int (*stream_create)(struct arle_device *dev, struct arle_stream **out, struct arle_err *err);
    void (*stream_destroy)(struct arle_device *dev, struct arle_stream *st);
    int (*stream_sync)(struct arle_device *dev, struct arle_stream *st, struct arle_err *err);         /* waits */
    int (*event_create)(struct arle_device *dev, struct arle_event **out, struct arle_err *err);
    void (*event_destroy)(struct arle_device *dev, struct arle_event *ev);
    int (*event_record)(struct arle_device *dev, struct arle_event *ev, struct arle_stream *st);
    int (*event_query)(struct arle_device *dev, struct arle_event *ev);        /* 1 passed, 0 not yet, <0 error; any thread */
    int (*event_sync)(struct arle_device *dev, struct arle_event *ev, struct arle_err *err);           /* waits; any thread */
    int (*stream_wait)(struct arle_device *dev, struct arle_stream *st, struct arle_event *ev);        /* st waits for ev */
    /** Copies run in stream order. H2D and D2H are asynchronous only for pinned host memory. Movers call this from their own
     *  thread with their own stream. */
    int (*copy)(struct arle_device *dev, struct arle_stream *st, void *dst, const void *src, size_t bytes, uint32_t dir);
    int (*fill)(struct arle_device *dev, struct arle_stream *st, void *dst, int byte, size_t bytes);
};

enum arle_weight_role {
    ARLE_W_VECTOR = 1,      /* any shape, converted to f32, readable through weight_data(): norm weights, A_log, conv taps */
    ARLE_W_LINEAR,          /* [N, K] for op linear and norm_linear; parts are stacked along N */
    ARLE_W_GATE_UP,         /* two parts [I, K]: gate then up, for op gate_up only (the packing is the backend's own) */
    ARLE_W_EMBED,           /* [vocab, K] for op embed; also usable with op linear (tied head) */
    ARLE_W_EXPERTS,         /* n_experts x [N, K], for op moe_experts (down); part e is expert e */
    ARLE_W_EXPERTS_GATE_UP, /* n_experts x (gate [I, K], up [I, K]), for op moe_experts; parts 2e and 2e+1 */
};

/* Storage formats of a part beyond plain f32/bf16/f16. */
enum arle_weight_format {
    ARLE_FMT_PLAIN = 0,         /* dtype of the tensor, no scales */
    ARLE_FMT_FP8_BLOCK,         /* E4M3 with one multiplier per block: scale [ceil(N/bn), ceil(K/bk)], dtype F32, BF16 or E8M0 */
    ARLE_FMT_FP4_GROUP,         /* packed E2M1, two per byte, low nibble first; scale [N, K/bk] E8M0 or E4M3; times scale2 */
};

/*
 * Random weights, the same on every backend. Value i (row-major index in the tensor, from 0) of a tensor without data:
 *   z = rand_seed + (i + 1) * 0x9E3779B97F4A7C15;  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;
 *   z = z ^ z >> 31                                     (mod 2^64: the i-th output of splitmix64 seeded with rand_seed)
 *   u = (z >> 40) * 2^-24;  v = f32( rand_mean + rand_std * 1.7320508075688772 * (2 u - 1) )      in double, then rounded to dtype
 */
struct arle_weight_part {
    const struct arle_tensor *t;        /* seen as [rows, K], all leading dimensions folded; data NULL: random */
    const struct arle_tensor *scale;    /* NULL for plain */
    int64_t row0, n_rows;               /* which rows of t belong to this part */
    uint32_t format, bn, bk;            /* enum arle_weight_format and its block shape */
    float scale2;                       /* ARLE_FMT_FP4_GROUP: per-tensor multiplier, 1 if none */
};

struct arle_weight_desc {
    uint32_t struct_size;
    uint32_t role;                      /* enum arle_weight_role */
    uint32_t n_experts;                 /* 1 but for expert roles */
    uint32_t n_parts;
    const struct arle_weight_part *parts;
    int64_t k;                          /* inner dimension; for ARLE_W_VECTOR the element count */
    uint32_t act_quant;                 /* 0 none; 1: quantise activations to E4M3 per row and 128 (UE8M0 scales) first */
    const char *name;                   /* for messages and traces; borrowed during the call */
};

struct arle_counter { const char *name; uint64_t value; };

struct arle_backend_api {
    uint32_t struct_size;
    uint32_t (*n_devices)(void *ctx);
    int (*device_info)(void *ctx, uint32_t index, struct arle_device_info *out, struct arle_err *err);
    int (*open_device)(void *ctx, uint32_t index, struct arle_device **out, struct arle_err *err);
    void (*close_device)(struct arle_device *dev);
    struct arle_mem_ops mem;            /* embedded: its own struct_size says how much of it is there */
    const struct arle_ops *ops;         /* <arle/ops.h>; a NULL entry is an op this backend lacks */

    /** Packs a weight. The tensors may be released after the call. -ENOMEM, -EINVAL (shape, dtype or format not handled). */
    int (*weight_create)(struct arle_device *dev, const struct arle_weight_desc *desc, struct arle_weight **out,
                         struct arle_err *err);
    void (*weight_destroy)(struct arle_device *dev, struct arle_weight *w);
    const float *(*weight_data)(const struct arle_weight *w);          /* device pointer of an ARLE_W_VECTOR, else NULL */
    uint64_t (*weight_bytes)(const struct arle_weight *w);             /* device memory it occupies */
    /** Device bytes weight_create would take for desc, without allocating. */
    uint64_t (*weight_predict)(struct arle_device *dev, const struct arle_weight_desc *desc);

    /* Step graphs; NULL when info.graphs is 0. Everything enqueued on st between begin and end is recorded, not run. */
    int (*graph_begin)(struct arle_device *dev, struct arle_stream *st, struct arle_err *err);
    int (*graph_end)(struct arle_device *dev, struct arle_stream *st, struct arle_graph **out, struct arle_err *err);
    int (*graph_launch)(struct arle_device *dev, struct arle_graph *g, struct arle_stream *st);
    void (*graph_destroy)(struct arle_device *dev, struct arle_graph *g);

    /** 0 while healthy; -EIO and the recorded reason once a sticky error was seen. Any thread. */
    int (*dead)(struct arle_device *dev, struct arle_err *err);
    /** Fills up to cap counters (kernel paths taken, graph launches, bytes), returns how many there are. Any thread. */
    uint32_t (*counters)(struct arle_device *dev, struct arle_counter *out, uint32_t cap);
    /** Measures ceilings: read_bytes_s (memory read bandwidth), bf16_flop_s (best bf16 matrix rate). Takes about a second. */
    int (*ceiling)(struct arle_device *dev, double *read_bytes_s, double *bf16_flop_s, struct arle_err *err);
};

#ifdef __cplusplus
}
#endif
#endif
