/*
 * What the C half of the plugin (entry.c) sees of the CUDA half: the api functions, no CUDA type. Every function here does
 * what its namesake in <arle/backend.h> promises.
 */
#ifndef BACKEND_CUDA_BACKEND_H
#define BACKEND_CUDA_BACKEND_H

#include <arle/backend.h>
#include <arle/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The plugin's own keys, as entry.c read them. */
struct cuda_conf {
    int64_t device;             /* ordinal that index 0 maps to */
    uint64_t memory;            /* most bytes this plugin takes on a device, 0 = what is free */
    int deterministic;
    int pdl;                    /* programmatic dependent launch */
    int measure_gaps;           /* log the device time between step graphs */
    int64_t stream_rows;        /* most rows whose products stream the weights through gemv and gemm_stream */
    int64_t tma_rows;           /* and most rows whose weights the copy engine streams, 0 = none */
    char inject_fault[32];      /* "", "kernel:N", "alloc:N" */
};

struct cuda_ctx;                /* one per open(): configuration and log */

int cuda_probe(struct arle_probe *out, struct arle_err *err);
int cuda_ctx_open(const struct cuda_conf *conf, const struct arle_log_service *log, struct cuda_ctx **out, struct arle_err *err);
void cuda_ctx_close(struct cuda_ctx *cx);

uint32_t cuda_n_devices(void *ctx);
int cuda_device_info(void *ctx, uint32_t index, struct arle_device_info *out, struct arle_err *err);
int cuda_open_device(void *ctx, uint32_t index, struct arle_device **out, struct arle_err *err);
void cuda_close_device(struct arle_device *dev);

int cuda_alloc(struct arle_device *dev, uint32_t kind, size_t bytes, void **out, struct arle_err *err);
void cuda_free(struct arle_device *dev, uint32_t kind, void *ptr);
int cuda_stream_create(struct arle_device *dev, struct arle_stream **out, struct arle_err *err);
void cuda_stream_destroy(struct arle_device *dev, struct arle_stream *st);
int cuda_stream_sync(struct arle_device *dev, struct arle_stream *st, struct arle_err *err);
int cuda_event_create(struct arle_device *dev, struct arle_event **out, struct arle_err *err);
void cuda_event_destroy(struct arle_device *dev, struct arle_event *ev);
int cuda_event_record(struct arle_device *dev, struct arle_event *ev, struct arle_stream *st);
int cuda_event_query(struct arle_device *dev, struct arle_event *ev);
int cuda_event_sync(struct arle_device *dev, struct arle_event *ev, struct arle_err *err);
int cuda_stream_wait(struct arle_device *dev, struct arle_stream *st, struct arle_event *ev);
int cuda_copy(struct arle_device *dev, struct arle_stream *st, void *dst, const void *src, size_t bytes, uint32_t dir);
int cuda_fill(struct arle_device *dev, struct arle_stream *st, void *dst, int byte, size_t bytes);

int cuda_weight_create(struct arle_device *dev, const struct arle_weight_desc *desc, struct arle_weight **out,
                       struct arle_err *err);
void cuda_weight_destroy(struct arle_device *dev, struct arle_weight *w);
const float *cuda_weight_data(const struct arle_weight *w);
uint64_t cuda_weight_bytes(const struct arle_weight *w);
uint64_t cuda_weight_predict(struct arle_device *dev, const struct arle_weight_desc *desc);

int cuda_graph_begin(struct arle_device *dev, struct arle_stream *st, struct arle_err *err);
int cuda_graph_end(struct arle_device *dev, struct arle_stream *st, struct arle_graph **out, struct arle_err *err);
int cuda_graph_launch(struct arle_device *dev, struct arle_graph *g, struct arle_stream *st);
void cuda_graph_destroy(struct arle_device *dev, struct arle_graph *g);

int cuda_dead(struct arle_device *dev, struct arle_err *err);
uint32_t cuda_counters(struct arle_device *dev, struct arle_counter *out, uint32_t cap);
int cuda_ceiling(struct arle_device *dev, double *read_bytes_s, double *bf16_flop_s, struct arle_err *err);

int cuda_embed(struct arle_device *dev, struct arle_stream *st, const struct arle_embed_args *a);
int cuda_rmsnorm(struct arle_device *dev, struct arle_stream *st, const struct arle_rmsnorm_args *a);
int cuda_linear(struct arle_device *dev, struct arle_stream *st, const struct arle_linear_args *a);
int cuda_norm_linear(struct arle_device *dev, struct arle_stream *st, const struct arle_norm_linear_args *a);
int cuda_silu_mul(struct arle_device *dev, struct arle_stream *st, const struct arle_silu_mul_args *a);
int cuda_gate_up(struct arle_device *dev, struct arle_stream *st, const struct arle_gate_up_args *a);
int cuda_attn_prepare(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_prepare_args *a);
int cuda_attn_paged(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_paged_args *a);
int cuda_gdn(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_args *a);
int cuda_gdn_keep(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_keep_args *a);
int cuda_moe_route(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_route_args *a);
int cuda_moe_experts(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_experts_args *a);
int cuda_norm_moe(struct arle_device *dev, struct arle_stream *st, const struct arle_norm_moe_args *a);
int cuda_seq_shift(struct arle_device *dev, struct arle_stream *st, const struct arle_seq_shift_args *a);
int cuda_seq_shift_keep(struct arle_device *dev, struct arle_stream *st, const struct arle_seq_shift_keep_args *a);
int cuda_sample(struct arle_device *dev, struct arle_stream *st, const struct arle_sample_args *a);

#ifdef __cplusplus
}
#endif
#endif
