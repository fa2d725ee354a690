/* The plugin descriptor and its tables: C only, no CUDA type. The work is in the .cu files beside it. */
#include "backend.h"
#include <stdlib.h>
#include <string.h>

static const struct arle_conf_key keys[] = {
    { .name = "device", .type = ARLE_CONF_I64, .def = "0", .min = 0, .max = 64, .unit = "",
      .help = "Ordinal of the first GPU to use, as the driver counts them." },
    { .name = "memory", .type = ARLE_CONF_BYTES, .def = "0", .min = 0, .max = 1e15, .unit = "bytes",
      .help = "Most device memory to take; 0 means whatever is free." },
    { .name = "deterministic", .type = ARLE_CONF_BOOL, .def = "no", .unit = "",
      .help = "Results of a sequence do not depend on what else is in the batch; prefill is slower." },
    { .name = "pdl", .type = ARLE_CONF_BOOL, .def = "yes", .unit = "",
      .help = "Start each kernel while the one before it still runs, where the GPU can (programmatic dependent launch)." },
    { .name = "stream_rows", .type = ARLE_CONF_I64, .def = "8", .min = 4, .max = 64, .unit = "rows",
      .help = "Most rows whose matrix products stream the weights through own kernels where tma_rows does not apply; more go to cuBLASLt." },
    { .name = "tma_rows", .type = ARLE_CONF_I64, .def = "64", .min = 0, .max = 64, .unit = "rows",
      .help = "Most rows, from 3 on, whose products stream the weights through the copy engine, where the GPU has one (compute capability 9.0)." },
    { .name = "measure_gaps", .type = ARLE_CONF_BOOL, .def = "no", .unit = "",
      .help = "Measure the time the device spends between the end of one step graph and the start of the next; logged when the device is closed." },
    { .name = "inject_fault", .type = ARLE_CONF_STR, .def = "", .unit = "",
      .help = "For tests: kernel:N makes the N-th op die on the device, alloc:N makes the N-th allocation fail." },
    { .name = NULL },
};

static int probe(const struct arle_host *host, struct arle_probe *out, struct arle_err *err)
{
    (void)host;
    return cuda_probe(out, err);
}

static int open_plugin(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
    const struct arle_conf_service *cs = arle_host_conf(host);
    struct cuda_conf c = { .pdl = 1, .stream_rows = 8, .tma_rows = 64 };
    if (cs != NULL) {
        c.device = cs->i64(conf, "device");
        c.memory = (uint64_t)cs->i64(conf, "memory");
        c.deterministic = cs->i64(conf, "deterministic") != 0;
        c.pdl = cs->i64(conf, "pdl") != 0;
        c.stream_rows = cs->i64(conf, "stream_rows");
        c.tma_rows = cs->i64(conf, "tma_rows");
        c.measure_gaps = cs->i64(conf, "measure_gaps") != 0;
        const char *fault = cs->str(conf, "inject_fault");
        snprintf(c.inject_fault, sizeof c.inject_fault, "%s", fault != NULL ? fault : "");
    }
    struct cuda_ctx *cx = NULL;
    int r = cuda_ctx_open(&c, arle_host_log(host), &cx, err);
    if (r == 0)
        *out_ctx = cx;
    return r;
}

static void close_plugin(void *ctx)
{
    cuda_ctx_close(ctx);
}

static const struct arle_ops ops = {
    .struct_size = sizeof ops,
    .embed = cuda_embed,
    .rmsnorm = cuda_rmsnorm,
    .linear = cuda_linear,
    .norm_linear = cuda_norm_linear,
    .silu_mul = cuda_silu_mul,
    .gate_up = cuda_gate_up,
    .attn_prepare = cuda_attn_prepare,
    .attn_paged = cuda_attn_paged,
    .gdn = cuda_gdn,
    .gdn_keep = cuda_gdn_keep,
    .moe_route = cuda_moe_route,
    .moe_experts = cuda_moe_experts,
    .norm_moe = cuda_norm_moe,
    .seq_shift = cuda_seq_shift,
    .seq_shift_keep = cuda_seq_shift_keep,
    .sample = cuda_sample,
};

static const struct arle_backend_api api = {
    .struct_size = sizeof api,
    .n_devices = cuda_n_devices,
    .device_info = cuda_device_info,
    .open_device = cuda_open_device,
    .close_device = cuda_close_device,
    .mem = {
        .struct_size = sizeof api.mem,
        .alloc = cuda_alloc, .free = cuda_free,
        .stream_create = cuda_stream_create, .stream_destroy = cuda_stream_destroy, .stream_sync = cuda_stream_sync,
        .event_create = cuda_event_create, .event_destroy = cuda_event_destroy, .event_record = cuda_event_record,
        .event_query = cuda_event_query, .event_sync = cuda_event_sync, .stream_wait = cuda_stream_wait,
        .copy = cuda_copy, .fill = cuda_fill,
    },
    .ops = &ops,
    .weight_create = cuda_weight_create,
    .weight_destroy = cuda_weight_destroy,
    .weight_data = cuda_weight_data,
    .weight_bytes = cuda_weight_bytes,
    .weight_predict = cuda_weight_predict,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_launch = cuda_graph_launch,
    .graph_destroy = cuda_graph_destroy,
    .dead = cuda_dead,
    .counters = cuda_counters,
    .ceiling = cuda_ceiling,
};

ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_BACKEND),
    .name = "backend-cuda",
    .version = "0.1.0",
    .license = "MIT",
    .summary = "Runs models on NVIDIA GPUs in bf16.",
    .keys = keys,
    .probe = probe,
    .open = open_plugin,
    .close = close_plugin,
    .ops = &api,
};
