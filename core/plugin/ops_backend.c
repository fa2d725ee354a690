/*
 * Drives a backend plugin for op tests: a small host, device buffers, weights.
 */
#include "plugin/ops_cases.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- host ----------------------------------------------------------------------------------------------------------- */

static const struct arle_conf_key *key_of(const struct arle_plugin *p, const char *name)
{
    for (const struct arle_conf_key *k = p->keys; k != NULL && k->name != NULL; k++)
        if (strcmp(k->name, name) == 0)
            return k;
    return NULL;
}

/* One plugin is opened at a time in a test process; its key table gives the defaults. */
static const struct arle_plugin *opening;

static const char *conf_str(const struct arle_conf *conf, const char *key)
{
    const char *const *p = ((const struct ops_conf *)(const void *)conf)->pairs;
    for (; p != NULL && p[0] != NULL; p += 2)
        if (strcmp(p[0], key) == 0)
            return p[1];
    const struct arle_conf_key *k = key_of(opening, key);
    return k ? k->def : NULL;
}

static int64_t conf_i64(const struct arle_conf *conf, const char *key)
{
    const char *s = conf_str(conf, key);
    char *end;
    if (s == NULL || strcmp(s, "no") == 0)
        return 0;
    if (strcmp(s, "yes") == 0)
        return 1;
    int64_t v = strtoll(s, &end, 10);
    return strcmp(end, "KiB") == 0 ? v << 10 : strcmp(end, "MiB") == 0 ? v << 20 : strcmp(end, "GiB") == 0 ? v << 30 : v;
}

static double conf_f64(const struct arle_conf *conf, const char *key)
{
    const char *s = conf_str(conf, key);
    return s ? strtod(s, NULL) : 0;
}

static void log_write(enum arle_log_level level, const char *subsystem, const char *event, const char *fields)
{
    printf("# %s %s %s\n", subsystem, event, fields);
}

static const void *service(const struct arle_host *host, const char *name, uint32_t version)
{
    static const struct arle_conf_service conf = { sizeof conf, conf_str, conf_i64, conf_f64 };
    static const struct arle_log_service log = { sizeof log, log_write };
    if (strcmp(name, "conf") == 0 && version == 1)
        return &conf;
    return strcmp(name, "log") == 0 && version == 1 ? &log : NULL;
}

static const struct arle_host host = { sizeof host, ARLE_ABI_MAJOR, ARLE_ABI_MINOR, NULL, service };

int ops_open(struct ops_backend *b, const char *so, const char *const *conf, struct arle_err *err)
{
    memset(b, 0, sizeof *b);
    b->conf.pairs = conf;
    b->dl = dlopen(so, RTLD_NOW | RTLD_LOCAL);
    if (b->dl == NULL)
        return arle_err_set(err, -ENOENT, "%s", dlerror());
    b->plugin = dlsym(b->dl, "arle_plugin_v1");
    if (b->plugin == NULL || b->plugin->magic != ARLE_PLUGIN_MAGIC || b->plugin->kind != ARLE_KIND_BACKEND)
        return arle_err_set(err, -EINVAL, "%s is not a backend plugin", so);
    opening = b->plugin;
    b->api = b->plugin->ops;
    int r = b->plugin->open(&host, (const struct arle_conf *)(const void *)&b->conf, &b->ctx, err);
    if (r == 0 && b->api->n_devices(b->ctx) == 0)
        r = arle_err_set(err, -ENODEV, "no device");
    if (r == 0)
        r = b->api->open_device(b->ctx, 0, &b->dev, err);
    if (r == 0)
        r = b->api->mem.stream_create(b->dev, &b->st, err);
    return r;
}

void ops_close(struct ops_backend *b)
{
    ops_release(b);
    if (b->st != NULL)
        b->api->mem.stream_destroy(b->dev, b->st);
    if (b->dev != NULL)
        b->api->close_device(b->dev);
    if (b->ctx != NULL)
        b->plugin->close(b->ctx);
    memset(b, 0, sizeof *b);        /* the file stays mapped: backends keep code that must outlive close */
}

uint64_t ops_counter(struct ops_backend *b, const char *name)
{
    struct arle_counter c[128];
    uint32_t n = ARLE_HAS(b->api, struct arle_backend_api, counters) ? b->api->counters(b->dev, c, 128) : 0;
    for (uint32_t i = 0; i < n && i < 128; i++)
        if (strcmp(c[i].name, name) == 0)
            return c[i].value;
    return 0;
}

/* ---- buffers -------------------------------------------------------------------------------------------------------- */

void ops_check(struct ops_backend *b, int r, const char *what)
{
    if (r < 0 && b->failed == 0) {
        b->failed = r;
        snprintf(b->why, sizeof b->why, "%s returned %d", what, r);
    }
}

float ops_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}

void *ops_alloc(struct ops_backend *b, size_t bytes)
{
    struct arle_err err = ARLE_ERR_INIT;
    void *p = NULL;
    if (b->n_bufs == OPS_MAX_BUFS || b->api->mem.alloc(b->dev, ARLE_MEM_DEVICE, bytes + 64, &p, &err) < 0) {
        fprintf(stderr, "op test: no device memory for %zu bytes: %s\n", bytes, err.msg);
        exit(99);
    }
    b->buf[b->n_bufs++] = p;
    return p;
}

void *ops_put(struct ops_backend *b, const void *data, size_t bytes)
{
    void *p = ops_alloc(b, bytes);
    ops_check(b, b->api->mem.copy(b->dev, b->st, p, data, bytes, ARLE_COPY_H2D), "copy");
    ops_check(b, b->api->mem.stream_sync(b->dev, b->st, NULL), "stream_sync");
    return p;
}

void ops_get(struct ops_backend *b, void *out, const void *dev, size_t bytes)
{
    ops_check(b, b->api->mem.copy(b->dev, b->st, out, dev, bytes, ARLE_COPY_D2H), "copy");
    ops_check(b, b->api->mem.stream_sync(b->dev, b->st, NULL), "stream_sync");
}

static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)(isnan(x) ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

void *ops_put_act(struct ops_backend *b, uint32_t dtype, const float *x, int64_t n, float *rounded)
{
    if (dtype == ARLE_F32) {
        if (rounded != NULL)
            memmove(rounded, x, (size_t)n * 4);
        return ops_put(b, x, (size_t)n * 4);
    }
    uint16_t *h = malloc((size_t)n * 2 + 2);
    for (int64_t i = 0; i < n; i++) {
        h[i] = to_bf16(x[i]);
        if (rounded != NULL)
            rounded[i] = from_bf16(h[i]);
    }
    void *p = ops_put(b, h, (size_t)n * 2);
    free(h);
    return p;
}

void ops_get_act(struct ops_backend *b, uint32_t dtype, const void *dev, int64_t n, float *out)
{
    if (dtype == ARLE_F32) {
        ops_get(b, out, dev, (size_t)n * 4);
        return;
    }
    uint16_t *h = malloc((size_t)n * 2 + 2);
    ops_get(b, h, dev, (size_t)n * 2);
    for (int64_t i = 0; i < n; i++)
        out[i] = from_bf16(h[i]);
    free(h);
}

/* f16 values that the tests use are small multiples of 2^-8, exact in the type. */
static uint16_t to_f16(float *x)
{
    *x = rintf(*x * 256.0f) / 256.0f;
    float a = fabsf(*x);
    int e = 0;
    if (a == 0)
        return 0;
    float m = frexpf(a, &e);        /* a = m 2^e, m in [0.5, 1) */
    return (uint16_t)((*x < 0 ? 0x8000 : 0) | (e + 14) << 10 | ((int)ldexpf(m, 11) & 0x3ff));
}

/* E4M3 code of the grid value nearest below |x|; x becomes that value. */
static uint8_t to_e4m3(float *x)
{
    float a = fabsf(*x);
    int best = 0;
    float best_v = 0;
    for (int c = 0; c < 0x7f; c++) {
        float v = c < 8 ? (float)c * 0x1p-9f : ldexpf(1.0f + (float)(c & 7) / 8, (c >> 3) - 7);
        if (v <= a) {
            best = c;
            best_v = v;
        }
    }
    uint8_t code = (uint8_t)(best | (*x < 0 ? 0x80 : 0));
    *x = *x < 0 ? -best_v : best_v;
    return code;
}

static uint8_t to_e2m1(float *x)
{
    static const float v[8] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
    float a = fabsf(*x);
    int best = 0;
    for (int c = 0; c < 8; c++)
        if (v[c] <= a)
            best = c;
    uint8_t code = (uint8_t)(best | (*x < 0 ? 8 : 0));
    *x = *x < 0 ? -v[best] : v[best];
    return code;
}

/* Encodes x and its scales as the checkpoint would hold them; returns the bytes of t and of scale (malloc). */
static void encode(uint32_t w_dtype, float *x, int64_t n, int64_t k, struct arle_weight_part *part, struct arle_tensor *t,
                   struct arle_tensor *scale)
{
    int64_t elems = n * k;
    *t = (struct arle_tensor) { .name = "w", .dtype = w_dtype, .n_dims = 2, .dim = { n, k } };
    *part = (struct arle_weight_part) { .t = t, .n_rows = n, .scale2 = 1.0f };
    uint8_t *data = calloc(1, (size_t)elems * 4 + 8);
    if (w_dtype == ARLE_F8E4M3) {               /* blocks of 16 x 32, scales 2^-3 .. 2^0 */
        int64_t per_row = (k + 31) / 32, rows = (n + 15) / 16;
        uint8_t *s = malloc((size_t)(rows * per_row));
        for (int64_t i = 0; i < rows * per_row; i++)
            s[i] = (uint8_t)(127 - i % 4);
        for (int64_t i = 0; i < elems; i++) {
            float f = ldexpf(1.0f, s[i / k / 16 * per_row + i % k / 32] - 127), v = x[i] / f;
            data[i] = to_e4m3(&v);
            x[i] = v * f;
        }
        *scale = (struct arle_tensor) { .name = "s", .dtype = ARLE_F8E8M0, .n_dims = 2, .dim = { rows, per_row }, .data = s,
                                        .bytes = (size_t)(rows * per_row) };
        part->format = ARLE_FMT_FP8_BLOCK;
        part->bn = 16;
        part->bk = 32;
        part->scale = scale;
        t->bytes = (size_t)elems;
    } else if (w_dtype == ARLE_U8) {            /* FP4, groups of 32; k is a multiple of 32 */
        uint8_t *s = malloc((size_t)(elems / 32));
        for (int64_t i = 0; i < elems / 32; i++)
            s[i] = (uint8_t)(127 - i % 3);
        for (int64_t i = 0; i < elems; i++) {
            float f = ldexpf(1.0f, s[i / 32] - 127), v = x[i] / f;
            data[i / 2] |= (uint8_t)(to_e2m1(&v) << (i % 2 * 4));
            x[i] = v * f;
        }
        *scale = (struct arle_tensor) { .name = "s", .dtype = ARLE_F8E8M0, .n_dims = 2, .dim = { n, k / 32 }, .data = s,
                                        .bytes = (size_t)(elems / 32) };
        part->format = ARLE_FMT_FP4_GROUP;
        part->bk = 32;
        part->scale = scale;
        t->bytes = (size_t)elems / 2;
    } else {
        for (int64_t i = 0; i < elems; i++) {
            uint16_t h = w_dtype == ARLE_BF16 ? to_bf16(x[i]) : w_dtype == ARLE_F16 ? to_f16(&x[i]) : 0;
            if (w_dtype == ARLE_F32)
                memcpy(data + i * 4, &x[i], 4);
            else
                memcpy(data + i * 2, &h, 2);
            if (w_dtype == ARLE_BF16)
                x[i] = from_bf16(h);
        }
        t->bytes = (size_t)elems * (w_dtype == ARLE_F32 ? 4 : 2);
    }
    t->data = data;
}

struct arle_weight *ops_weight(struct ops_backend *b, uint32_t role, uint32_t w_dtype, float *x, int64_t n, int64_t k, uint32_t n_experts)
{
    struct arle_weight_part part, parts[128];
    struct arle_tensor t, scale = { 0 };
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = role, .n_experts = n_experts, .parts = parts, .k = k, .act_quant = b->act_quant,
                                  .name = "test" };
    struct arle_err err = ARLE_ERR_INIT;
    struct arle_weight *w = NULL;
    bool gate = role == ARLE_W_GATE_UP || role == ARLE_W_EXPERTS_GATE_UP;
    encode(w_dtype, x, n, k, &part, &t, &scale);
    d.n_parts = gate ? 2 * n_experts : role == ARLE_W_EXPERTS ? n_experts : role == ARLE_W_LINEAR && n > 2 ? 2 : 1;
    for (uint32_t i = 0; i < d.n_parts; i++) {
        parts[i] = part;
        parts[i].row0 = n * i / d.n_parts;
        parts[i].n_rows = n * (i + 1) / d.n_parts - parts[i].row0;
    }
    uint64_t predicted = b->api->weight_predict(b->dev, &d);
    if (b->n_weights == OPS_MAX_BUFS || b->api->weight_create(b->dev, &d, &w, &err) < 0) {
        ops_check(b, err.code ? err.code : -EINVAL, "weight_create");
        snprintf(b->why, sizeof b->why, "%.200s", err.msg);
    } else {
        b->weight[b->n_weights++] = w;
        if (b->api->weight_bytes(w) != predicted)
            ops_check(b, -ERANGE, "weight_predict");
    }
    free((void *)(uintptr_t)t.data);
    free((void *)(uintptr_t)scale.data);
    return w;
}

void ops_release(struct ops_backend *b)
{
    while (b->n_bufs > 0)
        b->api->mem.free(b->dev, ARLE_MEM_DEVICE, b->buf[--b->n_bufs]);
    while (b->n_weights > 0)
        b->api->weight_destroy(b->dev, b->weight[--b->n_weights]);
}

double ops_error(const struct ops_part *p)
{
    double worst = 0, scale = 1e-3;
    for (int64_t i = 0; i < p->n; i++) {
        double d = fabs((double)p->got[i] - p->want[i]);
        if (isnan(p->want[i]) && isnan(p->got[i]))
            continue;
        worst = d > worst || isnan(d) ? d : worst;
        if (isnan(d))
            return INFINITY;
        scale = fabs(p->want[i]) > scale ? fabs(p->want[i]) : scale;
    }
    return worst / scale;
}

void ops_result_free(struct ops_result *r)
{
    for (unsigned i = 0; i < r->n_parts; i++) {
        free(r->part[i].got);
        free(r->part[i].want);
    }
    r->n_parts = 0;
}

int ops_run(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    out->n_parts = 0;
    b->failed = 0;
    b->why[0] = '\0';
    c->run(b, c, dtype, out);
    ops_release(b);
    return b->failed;
}
