/*
 * The cases: inputs, calls, and the same formulas in double precision, written from <arle/ops.h> alone.
 */
#include "plugin/ops_cases.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- helpers -------------------------------------------------------------------------------------------------------- */

static float *randoms(uint64_t seed, int64_t n, float scale)
{
    float *x = malloc((size_t)n * sizeof *x + 4);
    for (int64_t i = 0; i < n; i++)
        x[i] = ops_random(&seed) * scale;
    return x;
}

/* Adds an output; got and want belong to the result from here on. */
static void part(struct ops_result *r, const char *what, int64_t n, float *got, double *want, double tol_f32, double tol_bf16)
{
    r->part[r->n_parts++] = (struct ops_part) { what, n, got, want, tol_f32, tol_bf16, 0 };
}

static float *fetch(struct ops_backend *b, uint32_t dtype, const void *dev, int64_t n)
{
    float *x = malloc((size_t)n * sizeof *x + 4);
    ops_get_act(b, dtype, dev, n, x);
    return x;
}

static double silu(double x) { return x / (1 + exp(-x)); }
static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double softplus(double x) { return x > 30 ? x : log1p(exp(x)); }
static double clampd(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }

static double dotd(const float *a, const float *b, int64_t n)
{
    double s = 0;
    for (int64_t i = 0; i < n; i++)
        s += (double)a[i] * b[i];
    return s;
}

static double round_to(uint32_t dtype, double x)
{
    if (dtype == ARLE_F32)
        return x;
    float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &u, 4);
    return f;
}

static size_t asize(uint32_t dtype) { return dtype == ARLE_BF16 ? 2 : 4; }

/* ---- embed: p = rows of the table, K, weight dtype ------------------------------------------------------------------- */

static void run_embed(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t vocab = c->p[0], k = c->p[1], n = 9;
    int32_t ids[9] = { 0, 1, (int32_t)vocab - 1, -1, 5, -3, 7, 7, -2 }, sampled[3] = { 3, (int32_t)vocab - 2, 11 };
    float *table = randoms(1, vocab * k, 1);
    struct arle_weight *w = ops_weight(b, ARLE_W_EMBED, (uint32_t)c->p[2], table, vocab, k, 1);
    void *y = ops_alloc(b, (size_t)(n * k) * asize(dtype));
    struct arle_embed_args a = { .dtype = dtype, .n_tokens = (uint32_t)n, .ids = ops_put(b, ids, sizeof ids),
                                 .sampled = ops_put(b, sampled, sizeof sampled), .table = w, .out = y, .ld_out = k };
    if (w != NULL)
        OPS_CALL(b, embed, &a);
    double *want = malloc((size_t)(n * k) * sizeof *want);
    for (int64_t i = 0; i < n * k; i++) {
        int32_t id = ids[i / k] >= 0 ? ids[i / k] : sampled[-1 - ids[i / k]];
        want[i] = table[id * k + i % k];
    }
    part(out, "rows", n * k, fetch(b, dtype, y, n * k), want, 0, 4e-3);
    free(table);
}

/* ---- embed of random weights: the formula of <arle/backend.h> --------------------------------------------------------- */

static void run_embed_random(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t vocab = c->p[0], k = c->p[1], n = 3;
    int32_t ids[3] = { 0, 5, (int32_t)vocab - 1 };
    struct arle_tensor t = { .name = "r", .dtype = (uint32_t)c->p[2], .n_dims = 2, .dim = { vocab + 2, k }, .rand_seed = 0xfeedfacecafebeefu,
                             .rand_mean = 0.25, .rand_std = 0.5 };
    struct arle_weight_part p = { .t = &t, .row0 = 2, .n_rows = vocab, .scale2 = 1 };
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = ARLE_W_EMBED, .n_experts = 1, .n_parts = 1, .parts = &p, .k = k, .name = "r" };
    struct arle_weight *w = NULL;
    ops_check(b, b->api->weight_create(b->dev, &d, &w, NULL), "weight_create");
    double *want = malloc((size_t)(n * k) * sizeof *want);
    void *y = ops_alloc(b, (size_t)(n * k) * asize(dtype));
    struct arle_embed_args a = { .dtype = dtype, .n_tokens = (uint32_t)n, .ids = ops_put(b, ids, sizeof ids), .table = w, .out = y, .ld_out = k };
    if (w != NULL) {
        b->weight[b->n_weights++] = w;
        OPS_CALL(b, embed, &a);
    }
    for (int64_t i = 0; i < n * k; i++) {
        uint64_t index = (uint64_t)((ids[i / k] + 2) * k + i % k), z = t.rand_seed + (index + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        want[i] = (float)(0.25 + 0.5 * 1.7320508075688772 * (2 * ((double)(z >> 40) * 0x1p-24) - 1));
        if (t.dtype == ARLE_BF16)
            want[i] = round_to(ARLE_BF16, want[i]);
    }
    part(out, "rows", n * k, fetch(b, dtype, y, n * k), want, 0, t.dtype == ARLE_BF16 ? 0 : 4e-3);
}

/* ---- rmsnorm: p = tokens, dim, gather rows, in place ----------------------------------------------------------------- */

static void run_rmsnorm(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t n = c->p[0], dim = c->p[1];
    float *x = randoms(2, n * dim, 3), *w = randoms(3, dim, 1), eps = 1e-6f;
    int32_t *rows = malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        rows[i] = (int32_t)((i * 5 + 3) % n);
    void *dx = ops_put_act(b, dtype, x, n * dim, x), *y = c->p[3] ? dx : ops_alloc(b, (size_t)(n * dim) * asize(dtype));
    struct arle_rmsnorm_args a = { .dtype = dtype, .n_tokens = (uint32_t)n, .dim = (uint32_t)dim, .eps = eps, .w_offset = 1, .x = dx, .ld_x = dim,
                                   .rows = c->p[2] ? ops_put(b, rows, (size_t)n * 4) : NULL, .w = ops_put(b, w, (size_t)dim * 4), .out = y, .ld_out = dim };
    OPS_CALL(b, rmsnorm, &a);
    double *want = malloc((size_t)(n * dim) * sizeof *want);
    for (int64_t t = 0; t < n; t++) {
        const float *r = x + (c->p[2] ? rows[t] : t) * dim;
        double rho = 1 / sqrt(dotd(r, r, dim) / (double)dim + eps);
        for (int64_t i = 0; i < dim; i++)
            want[t * dim + i] = r[i] * rho * (1 + w[i]);
    }
    part(out, "out", n * dim, fetch(b, dtype, y, n * dim), want, 1e-5, 1e-2);
    free(x);
    free(w);
    free(rows);
}

/* ---- linear: p = tokens, N, K, weight dtype, f32 output, accumulate, norm first --------------------------------------- */

static void run_linear(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], n = c->p[1], k = c->p[2], ld_x = k + 8, ld_y = n + 8;
    uint32_t out_dtype = c->p[4] ? ARLE_F32 : dtype;
    float *x = randoms(4, t * ld_x, 1), *w = randoms(5, n * k, 1), *y0 = randoms(6, t * ld_y, 1), *nw = randoms(7, k, 0.2f);
    struct arle_weight *pw = ops_weight(b, ARLE_W_LINEAR, (uint32_t)c->p[3], w, n, k, 1);
    void *dx = ops_put_act(b, dtype, x, t * ld_x, x), *y = ops_put_act(b, out_dtype, y0, t * ld_y, y0);
    struct arle_linear_args a = { .dtype = dtype, .out_dtype = out_dtype, .n_tokens = (uint32_t)t, .accumulate = (uint32_t)c->p[5], .x = dx,
                                  .ld_x = ld_x, .w = pw, .y = y, .ld_y = ld_y };
    struct arle_norm_linear_args na = { .dtype = dtype, .out_dtype = out_dtype, .n_tokens = (uint32_t)t, .eps = 1e-6f, .w_offset = 1, .x = dx,
                                        .ld_x = ld_x, .norm_w = ops_put(b, nw, (size_t)k * 4), .w = pw, .y = y, .ld_y = ld_y,
                                        .scratch = ops_alloc(b, (size_t)(t * k) * 4) };
    if (pw != NULL && c->p[6])
        OPS_CALL(b, norm_linear, &na);
    else if (pw != NULL)
        OPS_CALL(b, linear, &a);
    double *want = malloc((size_t)(t * ld_y) * sizeof *want);
    for (int64_t r = 0; r < t; r++) {
        float *xr = x + r * ld_x;
        double rho = 1 / sqrt(dotd(xr, xr, k) / (double)k + 1e-6);
        for (int64_t i = 0; c->p[6] && i < k; i++)
            xr[i] = (float)(xr[i] * rho * (1 + nw[i]));
        for (int64_t i = 0; i < ld_y; i++)          /* columns past N must stay as they were */
            want[r * ld_y + i] = i >= n ? y0[r * ld_y + i] : dotd(xr, w + i * k, k) + (c->p[5] ? y0[r * ld_y + i] : 0);
    }
    part(out, "y", t * ld_y, fetch(b, out_dtype, y, t * ld_y), want, 1e-5, 1e-2);
    free(x);
    free(w);
    free(y0);
    free(nw);
}

/* ---- linear with quantised activations: p = tokens, N, K, weight dtype -------------------------------------------------- */

/* A block of up to 128 values on the E4M3 grid of its power-of-two scale. */
static void to_grid(float *x, int64_t n)
{
    double amax = 1e-4;
    for (int64_t i = 0; i < n; i++)
        amax = fabs(x[i]) > amax ? fabs(x[i]) : amax;
    double s = exp2(ceil(log2(amax / 448)));
    for (int64_t i = 0; i < n; i++) {
        double a = fabs(x[i]) / s, unit = a < 0x1p-6 ? 0x1p-9 : exp2(floor(log2(a)) - 3), q = rint(a / unit) * unit;
        x[i] = (float)((x[i] < 0 ? -1 : 1) * (q > 448 ? 448 : q) * s);
    }
}

static void run_linear_quant(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], n = c->p[1], k = c->p[2];
    float *x = randoms(16, t * k, 1), *w = randoms(17, n * k, 1);
    x[0] = 448;                                     /* the largest value that still has scale 1 */
    for (int64_t i = 0; i < k; i++)
        x[(t - 1) * k + i] *= i < 128 ? 1e-6f : 300;        /* below the floor of the scale; and large */
    b->act_quant = 1;
    struct arle_weight *pw = ops_weight(b, ARLE_W_LINEAR, (uint32_t)c->p[3], w, n, k, 1);
    b->act_quant = 0;
    void *y = ops_alloc(b, (size_t)(t * n) * 4);
    struct arle_linear_args a = { .dtype = dtype, .out_dtype = ARLE_F32, .n_tokens = (uint32_t)t, .x = ops_put_act(b, dtype, x, t * k, x), .ld_x = k,
                                  .w = pw, .y = y, .ld_y = n };
    if (pw != NULL)
        OPS_CALL(b, linear, &a);
    double *want = malloc((size_t)(t * n) * sizeof *want);
    for (int64_t r = 0; r < t; r++) {
        for (int64_t i = 0; i < k; i += 128)
            to_grid(x + r * k + i, k - i < 128 ? k - i : 128);
        for (int64_t i = 0; i < n; i++)
            want[r * n + i] = dotd(x + r * k, w + i * k, k);
    }
    part(out, "y", t * n, fetch(b, ARLE_F32, y, t * n), want, 1e-5, 1e-5);
    free(x);
    free(w);
}

/* ---- silu_mul: p = tokens, dim, limit * 10 ---------------------------------------------------------------------------- */

static void run_silu_mul(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], dim = c->p[1];
    double limit = c->p[2] / 10.0;
    float *gu = randoms(8, t * 2 * dim, 12);
    gu[0] = -100;                                   /* silu must go to zero without becoming NaN */
    void *dx = ops_put_act(b, dtype, gu, t * 2 * dim, gu), *y = ops_alloc(b, (size_t)(t * dim) * asize(dtype));
    struct arle_silu_mul_args a = { .dtype = dtype, .n_tokens = (uint32_t)t, .dim = (uint32_t)dim, .limit = (float)limit, .gu = dx, .ld_gu = 2 * dim,
                                    .out = y, .ld_out = dim };
    OPS_CALL(b, silu_mul, &a);
    double *want = malloc((size_t)(t * dim) * sizeof *want);
    for (int64_t i = 0; i < t * dim; i++) {
        double g = gu[i / dim * 2 * dim + i % dim], u = gu[i / dim * 2 * dim + dim + i % dim];
        if (limit > 0) {
            g = g > limit ? limit : g;
            u = clampd(u, -limit, limit);
        }
        want[i] = silu(g) * u;
    }
    part(out, "out", t * dim, fetch(b, dtype, y, t * dim), want, 1e-5, 1e-2);
    free(gu);
}

/* ---- gate_up: p = tokens, I, K, weight dtype, norm, limit * 10 --------------------------------------------------------- */

static void run_gate_up(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], width = c->p[1], k = c->p[2];
    double limit = c->p[5] / 10.0;
    float *x = randoms(9, t * k, 1), *w = randoms(10, 2 * width * k, 0.3f), *nw = randoms(11, k, 0.2f);
    struct arle_weight *pw = ops_weight(b, ARLE_W_GATE_UP, (uint32_t)c->p[3], w, 2 * width, k, 1);
    void *dx = ops_put_act(b, dtype, x, t * k, x), *y = ops_alloc(b, (size_t)(t * width) * asize(dtype));
    struct arle_gate_up_args a = { .dtype = dtype, .n_tokens = (uint32_t)t, .eps = 1e-6f, .w_offset = 0, .limit = (float)limit, .x = dx, .ld_x = k,
                                   .norm_w = c->p[4] ? ops_put(b, nw, (size_t)k * 4) : NULL, .w = pw, .out = y, .ld_out = width,
                                   .scratch = ops_alloc(b, (size_t)(t * (k + 2 * width)) * 4) };
    if (pw != NULL)
        OPS_CALL(b, gate_up, &a);
    double *want = malloc((size_t)(t * width) * sizeof *want);
    for (int64_t r = 0; r < t; r++) {
        float *xr = x + r * k;
        double rho = 1 / sqrt(dotd(xr, xr, k) / (double)k + 1e-6);
        for (int64_t i = 0; c->p[4] && i < k; i++)
            xr[i] = (float)(xr[i] * rho * nw[i]);
        for (int64_t i = 0; i < width; i++) {
            double g = dotd(xr, w + i * k, k), u = dotd(xr, w + (width + i) * k, k);
            if (limit > 0) {
                g = g > limit ? limit : g;
                u = clampd(u, -limit, limit);
            }
            want[r * width + i] = silu(g) * u;
        }
    }
    part(out, "out", t * width, fetch(b, dtype, y, t * width), want, 1e-5, 2e-2);
    free(x);
    free(w);
    free(nw);
}

/* ---- batches -------------------------------------------------------------------------------------------------------- */

#define MAX_SEQS 6

/* Sequences with a context before the step and new tokens in it; pages are dealt out in a scrambled order, page 0 unused. */
struct layout {
    int n_seqs, ctx[MAX_SEQS], fresh[MAX_SEQS], page_tokens, max_pages, n_pages;
    int32_t *table;
};

static void lay_pages(struct layout *l)
{
    int longest = 0, next = 0;
    for (int s = 0; s < l->n_seqs; s++)
        longest = l->ctx[s] + l->fresh[s] > longest ? l->ctx[s] + l->fresh[s] : longest;
    l->max_pages = (longest + l->page_tokens - 1) / l->page_tokens + 1;
    l->n_pages = l->max_pages * l->n_seqs + 1;
    l->table = calloc((size_t)(l->max_pages * l->n_seqs), sizeof *l->table);
    int step = 7;
    while (l->n_pages - 1 > 1 && (l->n_pages - 1) % step == 0)
        step += 2;
    for (int i = 0; i < l->max_pages * l->n_seqs; i++, next = (next + step) % (l->n_pages - 1))
        l->table[i] = 1 + next;
}

static int32_t slot_of(int seq)
{
    return 1 + (seq * 5 + 2) % MAX_SEQS;
}

/* The batch with all or only some of each sequence's new tokens: from[s] .. to[s]. */
static struct arle_batch batch_of(struct ops_backend *b, const struct layout *l, const int *from, const int *to)
{
    int32_t pos[4096], seq[4096], cu[MAX_SEQS + 1] = { 0 }, len[MAX_SEQS], slot[MAX_SEQS];
    struct arle_batch ba = { .struct_size = sizeof ba, .n_seqs = (uint32_t)l->n_seqs, .page_tokens = (uint32_t)l->page_tokens,
                             .table_stride = (uint32_t)l->max_pages };
    uint32_t n = 0;
    bool decode = true;
    for (int s = 0; s < l->n_seqs; s++) {
        for (int i = from[s]; i < to[s]; i++, n++) {
            pos[n] = l->ctx[s] + i;
            seq[n] = s;
        }
        cu[s + 1] = (int32_t)n;
        len[s] = l->ctx[s] + to[s];
        slot[s] = slot_of(s);
        decode = decode && to[s] - from[s] == 1;
        ba.n_decode += decode;
        ba.max_new = (uint32_t)(to[s] - from[s]) > ba.max_new ? (uint32_t)(to[s] - from[s]) : ba.max_new;
        ba.max_ctx = (uint32_t)len[s] > ba.max_ctx ? (uint32_t)len[s] : ba.max_ctx;
    }
    ba.n_tokens = n;
    ba.pos = ops_put(b, pos, n * 4);
    ba.seq_of = ops_put(b, seq, n * 4);
    ba.cu = ops_put(b, cu, sizeof cu);
    ba.ctx_len = ops_put(b, len, sizeof len);
    ba.slot = ops_put(b, slot, sizeof slot);
    ba.block_table = ops_put(b, l->table, (size_t)(l->max_pages * l->n_seqs) * 4);
    return ba;
}

/* ---- attention: p = head_dim, n_q, n_kv, kv dtype, page tokens, kind of batch, window, first, flags (1 gate, 2 interleaved,
 *      4 no norms, 8 shifted by -1, 16 partial rotation), rot_dim ------------------------------------------------------------- */

struct attn_shape {
    int64_t hd, n_q, n_kv, ld, rot, rot_off;
    size_t entry;
    int kv_dtype, window, first, shift;
    bool gate, interleaved, norms;
    struct layout l;
};

static void attn_shape_of(const struct ops_case *c, struct attn_shape *s)
{
    static const int kinds[][2 * MAX_SEQS + 1] = {
        { 1, 0, 1 }, { 2, 0, 5, 0, 37 }, { 3, 30, 1, 31, 1, 700, 1 }, { 4, 5, 1, 64, 1, 0, 70, 520, 9 }, { 2, 1100, 1, 33, 1 },
        { 3, 700, 3, 0, 40, 15, 17 },
    };
    const int *k = kinds[c->p[5]];
    *s = (struct attn_shape) { .hd = c->p[0], .n_q = c->p[1], .n_kv = c->p[2], .kv_dtype = c->p[3], .window = c->p[6], .first = c->p[7],
                               .gate = c->p[8] & 1, .interleaved = c->p[8] & 2, .norms = !(c->p[8] & 4), .shift = c->p[8] & 8 ? -1 : 0,
                               .rot = c->p[9], .rot_off = c->p[8] & 16 ? c->p[0] - c->p[9] : 0 };
    s->ld = (2 * s->n_q + 2 * s->n_kv) * s->hd + 16;
    s->entry = 2 * (size_t)s->n_kv * arle_kv_vector_bytes((uint32_t)s->kv_dtype, (uint32_t)s->hd);
    s->l.n_seqs = k[0];
    for (int i = 0; i < k[0]; i++) {
        s->l.ctx[i] = k[1 + 2 * i];
        s->l.fresh[i] = k[2 + 2 * i];
    }
    s->l.page_tokens = c->p[4];
    lay_pages(&s->l);
}

/* One vector of an entry, decoded after <arle/kv.h>. */
static void decode_vector(const struct attn_shape *s, const uint8_t *entry, int64_t vec, double *out)
{
    int64_t hd = s->hd, n_vec = 2 * s->n_kv;
    if (s->kv_dtype == ARLE_F32 || s->kv_dtype == ARLE_BF16) {
        for (int64_t i = 0; i < hd; i++) {
            uint32_t u = 0;
            float f;
            if (s->kv_dtype == ARLE_F32)
                memcpy(&u, entry + (size_t)(vec * hd + i) * 4, 4);
            else
                memcpy((char *)&u + 2, entry + (size_t)(vec * hd + i) * 2, 2);
            memcpy(&f, &u, 4);
            out[i] = f;
        }
        return;
    }
    if (s->kv_dtype != ARLE_I4G) {
        float scale;
        memcpy(&scale, entry + n_vec * hd + vec * 4, 4);
        for (int64_t i = 0; i < hd; i++) {
            uint8_t code = entry[vec * hd + i];
            int e = code >> 3 & 15;
            double v = e == 0 ? (code & 7) * 0x1p-9 : ldexp(1 + (code & 7) / 8.0, e - 7);
            out[i] = scale * (s->kv_dtype == ARLE_I8 ? (double)(int8_t)code : code & 0x80 ? -v : v);
        }
        return;
    }
    double rot[512];
    int64_t w = 128;
    while (hd % w)
        w /= 2;
    for (int64_t i = 0; i < hd; i++) {
        uint16_t h;
        uint8_t byte = entry[vec * hd / 2 + i / 2];
        memcpy(&h, entry + n_vec * hd / 2 + vec * hd / 16 + i / 32 * 2, 2);
        double scale = (h >> 10 & 31) == 0 ? (h & 0x3ff) * 0x1p-24 : ldexp(1 + (h & 0x3ff) / 1024.0, (h >> 10 & 31) - 15);
        rot[i] = ((int)(i & 1 ? byte >> 4 : byte & 15) - 8) * scale;
    }
    for (int64_t i = 0; i < hd; i++) {              /* the transform as a matrix: sign is the parity of common bits */
        double sum = 0;
        for (int64_t j = 0; j < w; j++)
            sum += __builtin_parityll((unsigned long long)(i % w & j)) ? -rot[i / w * w + j] : rot[i / w * w + j];
        out[i] = sum / sqrt((double)w);
    }
}

static void norm_rope(const struct attn_shape *s, const float *x, const float *w, const float *freq, int64_t pos, double *out)
{
    double rho = 1 / sqrt(dotd(x, x, s->hd) / (double)s->hd + 1e-6);
    for (int64_t i = 0; i < s->hd; i++)
        out[i] = s->norms ? x[i] * rho * (1 + w[i]) : x[i];
    for (int64_t j = 0; j < s->rot / 2; j++) {
        double *a = out + s->rot_off + (s->interleaved ? 2 * j : j), *b = s->interleaved ? a + 1 : a + s->rot / 2;
        float angle = (float)pos * freq[j];
        double va = *a, vb = *b, cs = cos((double)angle) * 1.25, sn = sin((double)angle) * 1.25;
        *a = va * cs - vb * sn;
        *b = vb * cs + va * sn;
    }
}

/* Everything on the device that an attention run needs; prepare and attend fill and read the cache. */
struct attn_run {
    struct attn_shape s;
    uint32_t dtype;
    float *qkv, *qn, *kn, freq[256];
    float *rows;                /* [sum of ctx + fresh][ld]: projections of every position, sequence by sequence */
    int64_t base[MAX_SEQS];
    struct arle_paged kv;
    void *dqn, *dkn, *dfreq;
};

static void attn_setup(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct attn_run *r)
{
    int64_t total = 0;
    attn_shape_of(c, &r->s);
    struct attn_shape *s = &r->s;
    r->dtype = dtype;
    for (int i = 0; i < s->l.n_seqs; i++) {
        r->base[i] = total;
        total += s->l.ctx[i] + s->l.fresh[i];
    }
    r->rows = randoms(12, total * s->ld, 1.5f);
    r->qn = randoms(13, s->hd, 0.3f);
    r->kn = randoms(14, s->hd, 0.3f);
    for (int64_t j = 0; j < s->rot / 2; j++)
        r->freq[j] = (float)pow(1e4, -2.0 * (double)j / (double)s->rot);
    size_t page = (size_t)s->l.page_tokens * s->entry + 128, bytes = page * (size_t)s->l.n_pages;
    uint8_t *nan = malloc(bytes);
    memset(nan, 0xff, bytes);                       /* NaN in every float form: entries never written must not be read */
    r->kv = (struct arle_paged) { .base = ops_put(b, nan, bytes), .page_stride = page, .offset = 64, .entry_stride = s->entry,
                                  .dtype = (uint32_t)s->kv_dtype };
    free(nan);
    r->dqn = ops_put(b, r->qn, (size_t)s->hd * 4);
    r->dkn = ops_put(b, r->kn, (size_t)s->hd * 4);
    r->dfreq = ops_put(b, r->freq, sizeof r->freq);
}

static void attn_free(struct attn_run *r)
{
    free(r->rows);
    free(r->qn);
    free(r->kn);
    free(r->s.l.table);
}

/* Runs positions ctx + from .. ctx + to of each sequence; q and o get [tokens][n_q * hd]. Returns the number of tokens. */
static int64_t attn_step(struct ops_backend *b, struct attn_run *r, const struct layout *l, const int *from, const int *to, bool attend,
                         float **q, float **o)
{
    const struct attn_shape *s = &r->s;
    struct arle_batch ba = batch_of(b, l, from, to);
    int64_t n = ba.n_tokens, width = s->n_q * s->hd, at = 0;
    float *x = malloc((size_t)(n * s->ld) * 4 + 4);
    for (int i = 0; i < l->n_seqs; i++)
        for (int t = from[i]; t < to[i]; t++, at++)
            memcpy(x + at * s->ld, r->rows + (r->base[i] + l->ctx[i] + t) * s->ld, (size_t)s->ld * 4);
    void *dx = ops_put_act(b, r->dtype, x, n * s->ld, NULL), *dq = ops_alloc(b, (size_t)(n * width) * asize(r->dtype));
    void *dout = ops_alloc(b, (size_t)(n * width) * asize(r->dtype));
    free(x);
    /* query head h at 2 h hd, its gate behind it; then keys, then values */
    struct arle_attn_prepare_args pa = {
        .dtype = r->dtype, .n_q = (uint32_t)s->n_q, .n_kv = (uint32_t)s->n_kv, .head_dim = (uint32_t)s->hd, .rot_dim = (uint32_t)s->rot,
        .rot_off = (uint32_t)s->rot_off, .interleaved = s->interleaved, .eps = 1e-6f, .w_offset = 1, .rope_scale = 1.25f, .batch = &ba,
        .qkv = dx, .ld_qkv = s->ld, .q_off = 0, .q_head_stride = 2 * s->hd, .k_off = 2 * width, .v_off = 2 * width + s->n_kv * s->hd,
        .q_norm = s->norms ? r->dqn : NULL, .k_norm = s->norms ? r->dkn : NULL, .inv_freq = r->dfreq, .kv = r->kv, .q_out = dq,
        .pos_shift = s->shift,
    };
    struct arle_attn_paged_args aa = {
        .dtype = r->dtype, .n_q = (uint32_t)s->n_q, .n_kv = (uint32_t)s->n_kv, .head_dim = (uint32_t)s->hd, .window = (uint32_t)s->window,
        .scale = 1.0f / sqrtf((float)s->hd), .batch = &ba, .q = dq, .kv = r->kv, .gate_src = s->gate ? dx : NULL, .ld_gate = s->ld,
        .gate_off = s->hd, .gate_head_stride = 2 * s->hd, .out = dout, .ld_out = width, .pos_shift = s->shift, .first = s->first,
    };
    OPS_CALL(b, attn_prepare, &pa);
    if (attend)
        OPS_CALL(b, attn_paged, &aa);
    if (q != NULL)
        *q = fetch(b, r->dtype, dq, n * width);
    if (o != NULL)
        *o = fetch(b, r->dtype, dout, n * width);
    return n;
}

/* Brings the cache to the state before the step. */
static void attn_fill_context(struct ops_backend *b, struct attn_run *r)
{
    struct layout l = r->s.l;
    int from[MAX_SEQS] = { 0 }, to[MAX_SEQS] = { 0 }, any = 0;
    for (int i = 0; i < l.n_seqs; i++) {
        to[i] = l.ctx[i];
        any |= l.ctx[i];
        l.ctx[i] = 0;
    }
    if (any)
        attn_step(b, r, &l, from, to, false, NULL, NULL);
}

static void run_attention(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    struct attn_run r;
    attn_setup(b, c, dtype, &r);
    const struct attn_shape *s = &r.s;
    const struct layout *l = &s->l;
    int from[MAX_SEQS] = { 0 };
    float *q, *o;
    /* what the device holds is what the loops below must start from */
    int64_t total = r.base[l->n_seqs - 1] + l->ctx[l->n_seqs - 1] + l->fresh[l->n_seqs - 1], width = s->n_q * s->hd, hd = s->hd;
    ops_put_act(b, dtype, r.rows, total * s->ld, r.rows);
    attn_fill_context(b, &r);
    int64_t n = attn_step(b, &r, l, from, l->fresh, true, &q, &o), at = 0;
    size_t bytes = r.kv.page_stride * (size_t)l->n_pages;
    uint8_t *cache = malloc(bytes);
    ops_get(b, cache, r.kv.base, bytes);

    double *want_q = calloc((size_t)(n * width), sizeof *want_q), *want_o = calloc((size_t)(n * width), sizeof *want_o);
    double *keys = calloc((size_t)(total * 2 * s->n_kv * hd), sizeof *keys), *exact = calloc((size_t)(total * 2 * s->n_kv * hd), sizeof *exact);
    float *decoded = calloc((size_t)(total * 2 * s->n_kv * hd), sizeof *decoded);
    for (int i = 0; i < l->n_seqs; i++)
        for (int p = 0; p < l->ctx[i] + l->fresh[i] + s->shift; p++) {
            const uint8_t *e = cache + (size_t)l->table[i * l->max_pages + p / l->page_tokens] * r.kv.page_stride + 64
                             + (size_t)(p % l->page_tokens) * s->entry;
            const float *row = r.rows + (r.base[i] + p - s->shift) * s->ld;
            for (int64_t v = 0; v < 2 * s->n_kv; v++) {
                int64_t slot = ((r.base[i] + p) * 2 * s->n_kv + v) * hd;
                decode_vector(s, e, v, keys + slot);
                if (v < s->n_kv)
                    norm_rope(s, row + 2 * width + v * hd, r.kn, r.freq, p, exact + slot);
                for (int64_t d = 0; d < hd; d++) {
                    decoded[slot + d] = (float)keys[slot + d];
                    if (v >= s->n_kv)
                        exact[slot + d] = row[2 * width + v * hd + d];
                }
            }
        }
    for (int i = 0; i < l->n_seqs; i++)
        for (int t = 0; t < l->fresh[i]; t++, at++) {
            int64_t p = l->ctx[i] + t + s->shift, lo = s->window && p + 1 > s->window ? p + 1 - s->window : 0;
            const float *row = r.rows + (r.base[i] + l->ctx[i] + t) * s->ld;
            lo = s->first > lo ? s->first : lo;
            for (int64_t h = 0; h < s->n_q; h++) {
                double *wq = want_q + at * width + h * hd, *wo = want_o + at * width + h * hd, *sc = malloc((size_t)(p + 2) * sizeof *sc), top = -1e300, sum = 0;
                if (p >= 0)
                    norm_rope(s, row + 2 * h * hd, r.qn, r.freq, p, wq);
                else
                    for (int64_t d = 0; d < hd; d++)        /* skipped rows leave q alone */
                        wq[d] = q[at * width + h * hd + d] = 0;
                const double *kv = keys + (r.base[i] * 2 * s->n_kv + h / (s->n_q / s->n_kv)) * hd;
                for (int64_t j = lo; j <= p; j++) {
                    sc[j] = 0;
                    for (int64_t d = 0; d < hd; d++)        /* with the rounded q that the backend made */
                        sc[j] += (double)q[at * width + h * hd + d] * kv[j * 2 * s->n_kv * hd + d];
                    sc[j] /= sqrt((double)hd);
                    top = sc[j] > top ? sc[j] : top;
                }
                for (int64_t j = lo; j <= p; j++)
                    sum += sc[j] = exp(sc[j] - top);
                for (int64_t j = lo; j <= p; j++)
                    for (int64_t d = 0; d < hd; d++)
                        wo[d] += sc[j] / sum * kv[(j * 2 * s->n_kv + s->n_kv) * hd + d];
                for (int64_t d = 0; s->gate && d < hd; d++)
                    wo[d] *= sigmoid(row[2 * h * hd + hd + d]);
                free(sc);
            }
        }
    double quant = s->kv_dtype == ARLE_I8 ? 6e-3 : s->kv_dtype == ARLE_F8E4M3 ? 4e-2 : s->kv_dtype == ARLE_I4G ? 0.35 : s->kv_dtype == ARLE_BF16 ? 4e-3 : 1e-5;
    part(out, "q", n * width, q, want_q, 1e-5, 1e-2);
    part(out, "cache", total * 2 * s->n_kv * hd, decoded, exact, quant, quant + 6e-3);
    part(out, "out", n * width, o, want_o, 2e-5, 1e-2);
    /* between backends a value at a rounding border may take the next code: one step in the cache, less after averaging */
    if (s->kv_dtype != ARLE_F32) {
        out->part[1].tol_other = s->kv_dtype == ARLE_I4G ? 0.3 : s->kv_dtype == ARLE_F8E4M3 ? 7e-2 : 1e-2;
        out->part[2].tol_other = s->kv_dtype == ARLE_I4G ? 5e-2 : 1e-2;
    }
    free(keys);
    free(cache);
    attn_free(&r);
}

/* ---- gated delta net: p = n_k, n_v, dk, dv, kind of batch, extreme gates, 1: keeps states from the midst ------------------- */

struct gdn_run {
    int64_t n_k, n_v, dk, dv, n_conv, ld;
    uint32_t dtype;
    struct layout l;
    float *rows, *conv_w, *A_log, *dt, *norm_w;
    void *d_conv_w, *d_A, *d_dt, *d_norm;
    struct arle_state conv, s;
    size_t conv_bytes, s_bytes, record;
    struct arle_save saves[ARLE_MAX_SAVES];
    uint32_t n_saves;
};

static void gdn_setup(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct gdn_run *r)
{
    static const int kinds[][MAX_SEQS + 1] = { { 1, 1 }, { 1, 7 }, { 3, 1, 1, 1 }, { 4, 1, 2, 70, 3 }, { 2, 129, 1 }, { 3, 200, 64, 17 },
                                               { 4, 1, 5, 16, 2 }, { 3, 1, 200, 321 } };
    const int *kind = kinds[c->p[4]];
    *r = (struct gdn_run) { .n_k = c->p[0], .n_v = c->p[1], .dk = c->p[2], .dv = c->p[3], .dtype = dtype };
    r->n_conv = 2 * r->n_k * r->dk + r->n_v * r->dv;
    r->ld = (r->n_conv + r->n_v * r->dv + 2 * r->n_v + 15) / 8 * 8;
    r->l = (struct layout) { .n_seqs = kind[0], .page_tokens = 16 };
    int64_t total = 0;
    for (int i = 0; i < kind[0]; i++)
        total += r->l.fresh[i] = kind[i + 1];
    lay_pages(&r->l);
    r->rows = randoms(20, total * r->ld, 2);
    r->conv_w = randoms(21, r->n_conv * 4, 0.7f);
    r->A_log = randoms(22, r->n_v, 1.5f);
    r->dt = randoms(23, r->n_v, 1);
    r->norm_w = randoms(24, r->dv, 1);
    for (int64_t h = 0; c->p[5] && h < r->n_v; h++) {
        r->A_log[h] = h % 2 ? 5 : -12;              /* state wiped at once; never forgotten */
        r->dt[h] = h % 2 ? 4 : -3;
    }
    r->conv_bytes = 3 * (size_t)r->n_conv * asize(dtype);
    r->s_bytes = (size_t)(r->n_v * r->dk * r->dv) * 4;
    r->record = (r->conv_bytes + 63) / 64 * 64 + r->s_bytes + 64;
    uint8_t *mem = malloc(r->record * (MAX_SEQS + 1));
    memset(mem, 0xff, r->record * (MAX_SEQS + 1));  /* slots that nobody uses are NaN */
    for (int i = 0; i < r->l.n_seqs; i++) {
        uint8_t *rec = mem + (size_t)slot_of(i) * r->record;
        memset(rec, 0, r->record);
        if (i % 2 == 0)
            continue;                               /* every second sequence goes on from a state */
        float *conv = randoms(30 + (uint64_t)i, 3 * r->n_conv, 1), *st = randoms(40 + (uint64_t)i, r->n_v * r->dk * r->dv, 0.5f);
        for (int64_t j = 0; j < 3 * r->n_conv; j++) {
            uint32_t u;
            memcpy(&u, &conv[j], 4);
            if (dtype == ARLE_F32)
                memcpy(rec + j * 4, &u, 4);
            else
                memcpy(rec + j * 2, (char *)&u + 2, 2);
        }
        memcpy(rec + (r->conv_bytes + 63) / 64 * 64, st, r->s_bytes);
        free(conv);
        free(st);
    }
    void *base = ops_put(b, mem, r->record * (MAX_SEQS + 1));
    free(mem);
    r->conv = (struct arle_state) { base, r->record, 0 };
    r->s = (struct arle_state) { base, r->record, (r->conv_bytes + 63) / 64 * 64 };
    r->d_conv_w = ops_put(b, r->conv_w, (size_t)r->n_conv * 16);
    r->d_A = ops_put(b, r->A_log, (size_t)r->n_v * 4);
    r->d_dt = ops_put(b, r->dt, (size_t)r->n_v * 4);
    r->d_norm = ops_put(b, r->norm_w, (size_t)r->dv * 4);
}

static void gdn_free(struct gdn_run *r)
{
    free(r->rows);
    free(r->conv_w);
    free(r->A_log);
    free(r->dt);
    free(r->norm_w);
    free(r->l.table);
}

/* Tokens from .. to of each sequence; out rows land at their place in `out` [total][n_v * dv]. */
static void gdn_step(struct ops_backend *b, struct gdn_run *r, const int *from, const int *to, float *out)
{
    struct arle_batch ba = batch_of(b, &r->l, from, to);
    int64_t n = ba.n_tokens, width = r->n_v * r->dv, at = 0, base = 0;
    float *x = malloc((size_t)(n * r->ld) * 4 + 4);
    for (int i = 0; i < r->l.n_seqs; base += r->l.fresh[i++])
        for (int t = from[i]; t < to[i]; t++, at++)
            memcpy(x + at * r->ld, r->rows + (base + t) * r->ld, (size_t)r->ld * 4);
    size_t scratch = (size_t)(n * (r->n_conv + r->n_v * (r->dk + 2 * r->dv + 8))) * 4;
    void *dout = ops_alloc(b, (size_t)(n * width) * asize(r->dtype));
    struct arle_gdn_args a = {
        .dtype = r->dtype, .n_k = (uint32_t)r->n_k, .n_v = (uint32_t)r->n_v, .dk = (uint32_t)r->dk, .dv = (uint32_t)r->dv, .conv_width = 4,
        .eps = 1e-6f, .batch = &ba, .proj = ops_put_act(b, r->dtype, x, n * r->ld, NULL), .ld_proj = r->ld, .u_off = 0, .z_off = r->n_conv,
        .a_off = r->n_conv + width, .b_off = r->n_conv + width + r->n_v, .conv_w = r->d_conv_w, .A_log = r->d_A, .dt_bias = r->d_dt,
        .norm_w = r->d_norm, .conv_state = r->conv, .s_state = r->s, .out = dout, .ld_out = width, .scratch = ops_alloc(b, scratch),
        .scratch_bytes = scratch,
    };
    free(x);
    const struct arle_gdn_keep_args keep = { a, r->saves, r->n_saves };
    if (r->n_saves > 0)
        OPS_CALL(b, gdn_keep, &keep);
    else
        OPS_CALL(b, gdn, &a);
    float *o = fetch(b, r->dtype, dout, n * width);
    at = base = 0;
    for (int i = 0; i < r->l.n_seqs; base += r->l.fresh[i++])
        for (int t = from[i]; t < to[i]; t++, at++)
            memcpy(out + (base + t) * width, o + at * width, (size_t)width * 4);
    free(o);
}

/* The state in a slot: conv rows, then S. */
static void gdn_state(struct ops_backend *b, const struct gdn_run *r, int32_t slot, float *x)
{
    int64_t nc = 3 * r->n_conv, ns = r->n_v * r->dk * r->dv;
    const char *rec = (const char *)r->conv.base + (size_t)slot * r->record;
    ops_get_act(b, r->dtype, rec, nc, x);
    ops_get(b, x + nc, rec + r->s.offset, (size_t)ns * 4);
}

/* States of all sequences, one after another. */
static float *gdn_states(struct ops_backend *b, const struct gdn_run *r, int64_t *out_n)
{
    int64_t per = 3 * r->n_conv + r->n_v * r->dk * r->dv;
    float *x = malloc((size_t)(per * r->l.n_seqs) * 4);
    for (int i = 0; i < r->l.n_seqs; i++)
        gdn_state(b, r, slot_of(i), x + i * per);
    *out_n = per * r->l.n_seqs;
    return x;
}

/* The recurrence of one sequence in double; state [3 n_conv] then [n_v][dk][dv] is read and replaced. */
static void gdn_exact(const struct gdn_run *r, const float *rows, int64_t n, double *state, double *out)
{
    double *conv = state, *S = state + 3 * r->n_conv, *y = malloc((size_t)r->n_conv * sizeof *y), *o = malloc((size_t)r->dv * sizeof *o);
    for (int64_t t = 0; t < n; t++) {
        const float *u = rows + t * r->ld;
        for (int64_t c = 0; c < r->n_conv; c++) {
            double sum = r->conv_w[c * 4 + 3] * (double)u[c];
            for (int i = 0; i < 3; i++)
                sum += r->conv_w[c * 4 + i] * conv[i * r->n_conv + c];
            y[c] = round_to(r->dtype, silu(sum));
            conv[c] = conv[r->n_conv + c];
            conv[r->n_conv + c] = conv[2 * r->n_conv + c];
            conv[2 * r->n_conv + c] = u[c];
        }
        for (int64_t h = 0; h < 2 * r->n_k; h++) {
            double ss = 1e-6;
            for (int64_t i = 0; i < r->dk; i++)
                ss += y[h * r->dk + i] * y[h * r->dk + i];
            for (int64_t i = 0; i < r->dk; i++)
                y[h * r->dk + i] /= sqrt(ss) * (h < r->n_k ? sqrt((double)r->dk) : 1);
        }
        for (int64_t h = 0; h < r->n_v; h++) {
            const double *q = y + h / (r->n_v / r->n_k) * r->dk, *k = q + r->n_k * r->dk, *v = y + 2 * r->n_k * r->dk + h * r->dv;
            double a = u[r->n_conv + r->n_v * r->dv + h], bb = u[r->n_conv + r->n_v * r->dv + r->n_v + h];
            double beta = sigmoid(bb), eg = exp(-exp(r->A_log[h]) * softplus(a + r->dt[h])), ss = 0;
            for (int64_t c = 0; c < r->dv; c++) {
                double *Sc = S + h * r->dk * r->dv + c, m = 0;
                for (int64_t i = 0; i < r->dk; i++) {
                    Sc[i * r->dv] *= eg;
                    m += Sc[i * r->dv] * k[i];
                }
                o[c] = 0;
                for (int64_t i = 0; i < r->dk; i++) {
                    Sc[i * r->dv] += k[i] * beta * (v[c] - m);
                    o[c] += Sc[i * r->dv] * q[i];
                }
                o[c] = round_to(r->dtype, o[c]);
                ss += o[c] * o[c];
            }
            for (int64_t c = 0; c < r->dv; c++)
                out[t * r->n_v * r->dv + h * r->dv + c] = o[c] / sqrt(ss / (double)r->dv + 1e-6) * r->norm_w[c]
                    * silu(u[r->n_conv + h * r->dv + c]);
        }
    }
    free(y);
    free(o);
}

static void run_gdn(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    struct gdn_run r;
    gdn_setup(b, c, dtype, &r);
    if (c->p[6]) {       /* slots that no sequence has */
        r.n_saves = 3;
        memcpy(r.saves, (const struct arle_save[]) { { 1, 64, 4 }, { 1, 192, 5 }, { 2, 320, 6 } }, 3 * sizeof *r.saves);
    }
    int from[MAX_SEQS] = { 0 };
    int64_t total = 0, n_state, width = r.n_v * r.dv, base = 0, per = 3 * r.n_conv + r.n_v * r.dk * r.dv;
    for (int i = 0; i < r.l.n_seqs; i++)
        total += r.l.fresh[i];
    ops_put_act(b, dtype, r.rows, total * r.ld, r.rows);
    float *got = malloc((size_t)(total * width) * 4), *before = gdn_states(b, &r, &n_state);
    gdn_step(b, &r, from, r.l.fresh, got);
    float *after = gdn_states(b, &r, &n_state);
    double *want = malloc((size_t)(total * width) * sizeof *want), *state = malloc((size_t)n_state * sizeof *state);
    for (int64_t i = 0; i < n_state; i++)
        state[i] = before[i];
    float *kept = malloc((size_t)(per * ARLE_MAX_SAVES) * 4);
    double *want_kept = malloc((size_t)(per * ARLE_MAX_SAVES) * sizeof *want_kept);
    for (int i = 0; i < r.l.n_seqs; base += r.l.fresh[i++]) {
        int64_t at = 0;
        for (uint32_t k = 0; k < r.n_saves; k++) {
            if (r.saves[k].seq != (uint32_t)i)
                continue;
            gdn_exact(&r, r.rows + (base + at) * r.ld, r.saves[k].n_tokens - at, state + i * per, want + (base + at) * width);
            at = r.saves[k].n_tokens;
            memcpy(want_kept + k * per, state + i * per, (size_t)per * sizeof *state);
            gdn_state(b, &r, (int32_t)r.saves[k].slot, kept + k * per);
        }
        gdn_exact(&r, r.rows + (base + at) * r.ld, r.l.fresh[i] - at, state + i * per, want + (base + at) * width);
    }
    part(out, "kept", r.n_saves * per, kept, want_kept, 1e-5, 1e-2);
    part(out, "out", total * width, got, want, 2e-5, 2e-2);
    part(out, "state", n_state, after, state, 1e-5, 1e-2);
    free(before);
    gdn_free(&r);
}

/* ---- routing: p = tokens, experts, k, score, bias, table ---------------------------------------------------------------- */

static void run_route(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], e = c->p[1], k = c->p[2], h = 48, vocab = 20;
    float *x = randoms(50, t * h, 1), *w = randoms(51, e * h, 1), *bias = randoms(52, e, 0.5f);
    int32_t *table = malloc((size_t)(vocab * k) * 4), *tok = malloc((size_t)t * 4), *ids = malloc((size_t)(t * k) * 4);
    for (int64_t i = 0; i < vocab * k; i++)
        table[i] = (int32_t)((i / k * 3 + i % k) % e);
    for (int64_t i = 0; i < t; i++)
        tok[i] = (int32_t)(i * 7 % vocab);
    struct arle_weight *pw = ops_weight(b, ARLE_W_LINEAR, dtype, w, e, h, 1);       /* act's own type: no selection hangs on rounding */
    struct arle_moe_route_args a = {
        .dtype = dtype, .n_tokens = (uint32_t)t, .n_experts = (uint32_t)e, .k = (uint32_t)k, .score = (uint32_t)c->p[3], .route_scale = 1.5f,
        .x = ops_put_act(b, dtype, x, t * h, x), .ld_x = h, .router = pw, .bias = c->p[4] ? ops_put(b, bias, (size_t)e * 4) : NULL,
        .table = c->p[5] ? ops_put(b, table, (size_t)(vocab * k) * 4) : NULL, .token_ids = ops_put(b, tok, (size_t)t * 4),
        .ids = ops_alloc(b, (size_t)(t * k) * 4), .weights = ops_alloc(b, (size_t)(t * k) * 4), .scratch = ops_alloc(b, (size_t)(t * e) * 4),
    };
    if (pw != NULL)
        OPS_CALL(b, moe_route, &a);
    ops_get(b, ids, a.ids, (size_t)(t * k) * 4);
    float *got_w = fetch(b, ARLE_F32, a.weights, t * k), *got_ids = malloc((size_t)(t * k) * 4);
    double *want_w = malloc((size_t)(t * k) * sizeof *want_w), *want_ids = malloc((size_t)(t * k) * sizeof *want_ids), *score = malloc((size_t)e * sizeof *score);
    for (int64_t r = 0; r < t; r++) {
        double sum = 0, sel = 0;
        for (int64_t i = 0; i < e; i++) {
            double l = dotd(x + r * h, w + i * h, h);
            score[i] = c->p[3] == ARLE_MOE_SOFTMAX ? exp(l) : sqrt(softplus(l));
            sum += score[i];
        }
        for (int64_t i = 0; c->p[3] == ARLE_MOE_SOFTMAX && i < e; i++)
            score[i] /= sum;
        for (int64_t i = 0; i < k; i++) {
            int64_t best = -1;
            for (int64_t j = 0; j < e; j++) {
                bool used = false;
                for (int64_t p = 0; p < i; p++)
                    used = used || want_ids[r * k + p] == (double)j;
                double bj = c->p[4] ? bias[j] : 0, bb = best >= 0 && c->p[4] ? bias[best] : 0;
                if (!used && (best < 0 || score[j] + bj > score[best] + bb))
                    best = j;
            }
            want_ids[r * k + i] = c->p[5] ? table[tok[r] * k + i] : (double)best;
            sel += score[(int64_t)want_ids[r * k + i]];
            got_ids[r * k + i] = (float)ids[r * k + i];
        }
        for (int64_t i = 0; i < k; i++)
            want_w[r * k + i] = score[(int64_t)want_ids[r * k + i]] / sel * 1.5;
    }
    part(out, "ids", t * k, got_ids, want_ids, 0, 0);
    part(out, "weights", t * k, got_w, want_w, 1e-5, 1e-5);
    free(score);
    free(x);
    free(w);
    free(bias);
    free(table);
    free(tok);
    free(ids);
}

/* The published example: logits 1, 3, 2, -1, 2.5 choose experts 1 and 4 with these weights. */
static void run_route_example(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    float x[5] = { 1, 3, 2, -1, 2.5f }, w[25] = { 0 };
    double want_ids[2] = { 1, 4 }, want_w[2] = { 0.62245933, 0.37754067 };
    int32_t ids[2];
    for (int i = 0; i < 5; i++)
        w[i * 6] = 1;
    struct arle_moe_route_args a = {
        .dtype = dtype, .n_tokens = 1, .n_experts = 5, .k = 2, .score = ARLE_MOE_SOFTMAX, .route_scale = 1, .x = ops_put_act(b, dtype, x, 5, NULL),
        .ld_x = 5, .router = ops_weight(b, ARLE_W_LINEAR, ARLE_F32, w, 5, 5, 1), .ids = ops_alloc(b, 8), .weights = ops_alloc(b, 8),
        .scratch = ops_alloc(b, 20),
    };
    if (a.router != NULL)
        OPS_CALL(b, moe_route, &a);
    ops_get(b, ids, a.ids, sizeof ids);
    float *got = malloc(sizeof *got * 2);
    double *wi = malloc(sizeof want_ids), *ww = malloc(sizeof want_w);
    got[0] = (float)ids[0];
    got[1] = (float)ids[1];
    memcpy(wi, want_ids, sizeof want_ids);
    memcpy(ww, want_w, sizeof want_w);
    part(out, "ids", 2, got, wi, 0, 0);
    part(out, "weights", 2, fetch(b, ARLE_F32, a.weights, 2), ww, 1e-6, 1e-6);
}

/* ---- experts: p = tokens, experts, k, H, I, weight dtype, flags (1 weight first, 2 accumulate, 4 shared, 8 shared gate), limit * 10 */

static void expert_into(const float *x, const float *up, const float *down, int64_t h, int64_t width, double limit, double first, double w, double *y)
{
    double *f = malloc((size_t)width * sizeof *f);
    for (int64_t i = 0; i < width; i++) {
        double g = dotd(x, up + i * h, h), u = dotd(x, up + (width + i) * h, h);
        if (limit > 0) {
            g = g > limit ? limit : g;
            u = clampd(u, -limit, limit);
        }
        f[i] = silu(g) * u * first;
    }
    for (int64_t o = 0; o < h; o++) {
        double s = 0;
        for (int64_t i = 0; i < width; i++)
            s += f[i] * down[o * width + i];
        y[o] += w * s;
    }
    free(f);
}

static void run_experts(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], e = c->p[1], k = c->p[2], h = c->p[3], width = c->p[4], wide = width + 16;
    int flags = c->p[6];
    float *x = randoms(60, t * h, 1), *up = randoms(61, e * 2 * width * h, 0.4f), *down = randoms(62, e * h * width, 0.4f), *y0 = randoms(63, t * h, 1);
    float *sup = randoms(64, 2 * wide * h, 0.4f), *sdown = randoms(65, h * wide, 0.4f), *sg = randoms(66, h, 0.5f), *w = randoms(67, t * k, 1);
    int32_t *ids = malloc((size_t)(t * k) * 4);
    for (int64_t i = 0; i < t * k; i++) {
        ids[i] = (int32_t)((i / k * 5 + i % k * 3) % e);       /* distinct while 3 k < 3 e; some experts stay empty for few tokens */
        w[i] = fabsf(w[i]);
    }
    size_t scratch = (size_t)(t * ((k + 1) * (3 * wide + h) + h)) * 4 + 65536;
    struct arle_moe_experts_args a = {
        .dtype = dtype, .n_tokens = (uint32_t)t, .n_experts = (uint32_t)e, .k = (uint32_t)k, .weight_first = flags & 1, .accumulate = (flags & 2) != 0,
        .limit = (float)(c->p[7] / 10.0), .x = ops_put_act(b, dtype, x, t * h, x), .ld_x = h, .ids = ops_put(b, ids, (size_t)(t * k) * 4),
        .weights = ops_put(b, w, (size_t)(t * k) * 4), .gate_up = ops_weight(b, ARLE_W_EXPERTS_GATE_UP, (uint32_t)c->p[5], up, e * 2 * width, h, (uint32_t)e),
        .down = ops_weight(b, ARLE_W_EXPERTS, (uint32_t)c->p[5], down, e * h, width, (uint32_t)e),
        .shared_gate_up = flags & 4 ? ops_weight(b, ARLE_W_GATE_UP, (uint32_t)c->p[5], sup, 2 * wide, h, 1) : NULL,
        .shared_down = flags & 4 ? ops_weight(b, ARLE_W_LINEAR, (uint32_t)c->p[5], sdown, h, wide, 1) : NULL,
        .shared_gate = flags & 8 ? ops_put(b, sg, (size_t)h * 4) : NULL, .y = ops_put_act(b, dtype, y0, t * h, y0), .ld_y = h,
        .scratch = ops_alloc(b, scratch), .scratch_bytes = scratch,
    };
    if (b->failed == 0)
        OPS_CALL(b, moe_experts, &a);
    double *want = calloc((size_t)(t * h), sizeof *want);
    for (int64_t r = 0; r < t; r++) {
        for (int64_t i = 0; i < h && flags & 2; i++)
            want[r * h + i] = y0[r * h + i];
        for (int64_t i = 0; i < k; i++) {
            int64_t id = ids[r * k + i];
            expert_into(x + r * h, up + id * 2 * width * h, down + id * h * width, h, width, c->p[7] / 10.0, flags & 1 ? w[r * k + i] : 1,
                        flags & 1 ? 1 : w[r * k + i], want + r * h);
        }
        if (flags & 4)
            expert_into(x + r * h, sup, sdown, h, wide, c->p[7] / 10.0, 1, flags & 8 ? sigmoid(dotd(sg, x + r * h, h)) : 1, want + r * h);
    }
    part(out, "y", t * h, fetch(b, dtype, a.y, t * h), want, 1e-5, 2e-2);
    free(x);
    free(up);
    free(down);
    free(y0);
    free(sup);
    free(sdown);
    free(sg);
    free(w);
    free(ids);
}

/* ---- norm_moe: p = tokens, experts, k, H, I, shared with its gate ---------------------------------------------------------------------- */

static void run_norm_moe(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t t = c->p[0], e = c->p[1], k = c->p[2], h = c->p[3], width = c->p[4];
    bool shared = c->p[5] != 0;
    float *x = randoms(160, t * h, 1), *nw = randoms(161, h, 0.2f), *router = randoms(162, e * h, 1), *up = randoms(163, e * 2 * width * h, 0.2f);
    float *down = randoms(164, e * h * width, 0.2f), *sup = randoms(165, 2 * width * h, 0.2f), *sdown = randoms(166, h * width, 0.2f), *sg = randoms(167, h, 0.5f);
    size_t scratch = (size_t)(t * ((k + 1) * (3 * width + h) + h)) * 4 + 65536;
    void *dx = ops_put_act(b, dtype, x, t * h, x), *normed = ops_alloc(b, (size_t)(t * h) * 4);
    void *ids = ops_alloc(b, (size_t)(t * k) * 4), *weights = ops_alloc(b, (size_t)(t * k) * 4);
    struct arle_norm_moe_args a = { .eps = 1e-6f, .w_offset = 1, .h = dx, .ld_h = h, .norm_w = ops_put(b, nw, (size_t)h * 4),
        .route = { .dtype = dtype, .n_tokens = (uint32_t)t, .n_experts = (uint32_t)e, .k = (uint32_t)k, .score = ARLE_MOE_SOFTMAX, .route_scale = 1,
                   .x = normed, .ld_x = h, .router = ops_weight(b, ARLE_W_LINEAR, dtype, router, e, h, 1), .ids = ids, .weights = weights,
                   .scratch = ops_alloc(b, (size_t)(t * e) * 4) },
        .experts = { .dtype = dtype, .n_tokens = (uint32_t)t, .n_experts = (uint32_t)e, .k = (uint32_t)k, .accumulate = 1, .x = normed, .ld_x = h,
                     .ids = ids, .weights = weights, .gate_up = ops_weight(b, ARLE_W_EXPERTS_GATE_UP, ARLE_BF16, up, e * 2 * width, h, (uint32_t)e),
                     .down = ops_weight(b, ARLE_W_EXPERTS, ARLE_BF16, down, e * h, width, (uint32_t)e),
                     .shared_gate_up = shared ? ops_weight(b, ARLE_W_GATE_UP, ARLE_BF16, sup, 2 * width, h, 1) : NULL,
                     .shared_down = shared ? ops_weight(b, ARLE_W_LINEAR, ARLE_BF16, sdown, h, width, 1) : NULL,
                     .shared_gate = shared ? ops_put(b, sg, (size_t)h * 4) : NULL, .y = dx, .ld_y = h, .scratch = ops_alloc(b, scratch),
                     .scratch_bytes = scratch } };
    if (b->failed == 0)
        OPS_CALL(b, norm_moe, &a);
    double *want = malloc((size_t)(t * h) * sizeof *want), *l = malloc((size_t)e * sizeof *l), top = 0;
    float *n = malloc((size_t)h * sizeof *n);
    for (int64_t r = 0; r < t; r++) {
        const float *xr = x + r * h;
        double rho = 1 / sqrt(dotd(xr, xr, h) / (double)h + 1e-6), picked[8], sum = 0;
        int64_t id[8];
        for (int64_t i = 0; i < h; i++) {
            n[i] = (float)round_to(dtype, xr[i] * rho * (1 + nw[i]));
            want[r * h + i] = xr[i];
        }
        for (int64_t i = 0; i < e; i++)
            l[i] = dotd(n, router + i * h, h);
        for (int64_t i = 0; i < k; i++) {
            id[i] = 0;
            for (int64_t j = 1; j < e; j++)
                if (l[j] > l[id[i]])
                    id[i] = j;
            top = i == 0 ? l[id[0]] : top;
            picked[i] = exp(l[id[i]] - top);
            sum += picked[i];
            l[id[i]] = -INFINITY;
        }
        for (int64_t i = 0; i < k; i++)
            expert_into(n, up + id[i] * 2 * width * h, down + id[i] * h * width, h, width, 0, 1, picked[i] / sum, want + r * h);
        if (shared)
            expert_into(n, sup, sdown, h, width, 0, 1, sigmoid(dotd(sg, n, h)), want + r * h);
    }
    part(out, "y", t * h, fetch(b, dtype, dx, t * h), want, 1e-5, 2e-2);
    free(x);
    free(nw);
    free(router);
    free(up);
    free(down);
    free(sup);
    free(sdown);
    free(sg);
    free(l);
    free(n);
}

/* ---- seq_shift: p = dim, 1: keeps records from the midst ------------------------------------------------------------------------------------------------- */

static void run_shift(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    int64_t dim = c->p[0], n = 0;
    struct layout l = { .n_seqs = 3, .ctx = { 4, 0, 9 }, .fresh = { 1, c->p[1] ? 130 : 3, 2 }, .page_tokens = 16 };
    const struct arle_save saves[] = { { 1, 64, 4 }, { 1, 128, 5 } };
    const uint32_t n_saves = c->p[1] ? 2 : 0;
    int from[MAX_SEQS] = { 0 };
    lay_pages(&l);
    for (int i = 0; i < l.n_seqs; i++)
        n += l.fresh[i];
    float *x = randoms(70, n * dim, 1), *rec = randoms(71, (MAX_SEQS + 1) * dim, 1);
    void *drec = ops_put_act(b, dtype, rec, (MAX_SEQS + 1) * dim, rec), *dx = ops_put_act(b, dtype, x, n * dim, x);
    struct arle_batch ba = batch_of(b, &l, from, l.fresh);
    void *y = ops_alloc(b, (size_t)(n * dim) * asize(dtype));
    struct arle_seq_shift_args a = { .dtype = dtype, .dim = (uint32_t)dim, .batch = &ba, .x = dx, .ld_x = dim,
                                     .record = { drec, (size_t)dim * asize(dtype), 0 }, .out = y, .ld_out = dim };
    const struct arle_seq_shift_keep_args keep = { a, saves, n_saves };
    if (n_saves > 0)
        OPS_CALL(b, seq_shift_keep, &keep);
    else
        OPS_CALL(b, seq_shift, &a);
    double *want = malloc((size_t)(n * dim) * sizeof *want), *want_rec = malloc((size_t)((MAX_SEQS + 1) * dim) * sizeof *want_rec);
    for (int64_t i = 0; i < (MAX_SEQS + 1) * dim; i++)
        want_rec[i] = rec[i];
    for (int64_t i = 0, at = 0; i < l.n_seqs; at += l.fresh[i++])
        for (int64_t t = 0; t < l.fresh[i]; t++)
            for (int64_t d = 0; d < dim; d++) {
                int64_t slot = slot_of((int)i);
                want[(at + t) * dim + d] = t == 0 ? rec[slot * dim + d] : x[(at + t - 1) * dim + d];
                if (t == l.fresh[i] - 1)
                    want_rec[slot * dim + d] = x[(at + t) * dim + d];
                for (uint32_t k = 0; k < n_saves; k++)
                    if (saves[k].seq == i && saves[k].n_tokens == t + 1)
                        want_rec[saves[k].slot * dim + d] = x[(at + t) * dim + d];
            }
    part(out, "out", n * dim, fetch(b, dtype, y, n * dim), want, 0, 0);
    part(out, "record", (MAX_SEQS + 1) * dim, fetch(b, dtype, drec, (MAX_SEQS + 1) * dim), want_rec, 0, 0);
    free(x);
    free(rec);
    free(l.table);
}

/* ---- sample: p = vocab, valid ids: greedy rows, logprobs, alternatives, mask, bias, penalties --------------------------- */

static void run_sample(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out)
{
    enum { ROWS = 6 };
    int64_t vocab = c->p[0], valid = c->p[1];
    float *x = randoms(80, ROWS * vocab, 8);
    struct arle_sample_row rows[ROWS];
    int32_t history[8] = { 0, 1, 2, 3, 1, 1, 2, 5 }, ids[ROWS];
    uint32_t *mask = calloc((size_t)(vocab + 31) / 32, 4);
    struct arle_bias bias = { (int32_t)valid - 1, 100 };
    mask[0] = 1u << 7 | 1u << 9;                    /* ids 7 and 9 only */
    x[0 * vocab + 11] = x[0 * vocab + valid - 3] = 20;      /* a tie: the lower id wins */
    for (int i = 0; i < 4; i++)
        x[4 * vocab + i] = 30 - (float)i;
    for (int r = 0; r < ROWS; r++) {
        rows[r] = (struct arle_sample_row) { .top_p = 1, .repetition = 1, .target = r % 2 ? r * 3 : -1, .n_top = r == 1 ? 5 : r == 2 ? 20 : 0 };
        for (int64_t i = valid; i < vocab; i++)
            x[r * vocab + i] = r == 5 ? NAN : 1000;         /* padding ids never count */
    }
    rows[2].mask = ops_put(b, mask, (size_t)(vocab + 31) / 32 * 4);
    rows[3].bias = ops_put(b, &bias, sizeof bias);
    rows[3].n_bias = 1;
    rows[4].history = ops_put(b, history, sizeof history);  /* ids 0 and 1 prompt; output 2, 3, 1, 1, 2, 5 */
    rows[4].n_history = 8;
    rows[4].n_prompt = 2;
    rows[4].repetition = 1.5f;
    rows[4].presence = 0.5f;
    rows[4].frequency = 0.25f;
    float *ops_x = malloc((size_t)(ROWS * vocab) * 4);
    memcpy(ops_x, x, (size_t)(ROWS * vocab) * 4);
    struct arle_sample_args a = {
        .n_rows = ROWS, .vocab = (uint32_t)vocab, .n_valid = (uint32_t)valid, .logits = ops_put(b, ops_x, (size_t)(ROWS * vocab) * 4), .ld = vocab,
        .rows = ops_put(b, rows, sizeof rows), .ids = ops_alloc(b, ROWS * 4), .logprob = ops_alloc(b, ROWS * 4), .target_logprob = ops_alloc(b, ROWS * 4),
        .top_ids = ops_alloc(b, ROWS * ARLE_MAX_TOP * 4), .top_logprobs = ops_alloc(b, ROWS * ARLE_MAX_TOP * 4), .top_logits = ops_alloc(b, ROWS * 4),
        .any_top = 1, .any_edit = 1,
    };
    free(ops_x);
    OPS_CALL(b, sample, &a);
    ops_get(b, ids, a.ids, sizeof ids);
    float *top = fetch(b, ARLE_F32, a.top_logprobs, ROWS * ARLE_MAX_TOP), *got_ids = malloc(ROWS * 4), *got_top = malloc(25 * 4);
    int32_t top_ids[ROWS * ARLE_MAX_TOP];
    ops_get(b, top_ids, a.top_ids, sizeof top_ids);
    double *w_ids = malloc(ROWS * 8), *w_lp = malloc(ROWS * 8), *w_target = malloc(ROWS * 8), *w_top = malloc(25 * 8), *w_max = malloc(ROWS * 8);
    for (int r = 0; r < ROWS; r++) {
        const float *l = x + r * vocab;
        double sum = 0, best = -1e300, edited_best = -1e300;
        for (int64_t i = 0; i < valid; i++)
            best = l[i] > best ? l[i] : best;
        for (int64_t i = 0; i < valid; i++)
            sum += exp(l[i] - best);
        double lse = best + log(sum);
        for (int64_t i = 0; i < valid; i++) {
            double v = l[i] + (r == 3 && i == bias.id ? 100 : 0);
            int in_output = 0, seen = 0;
            for (int j = 0; j < 8 && r == 4; j++) {
                seen |= history[j] == i;
                in_output += j >= 2 && history[j] == i;
            }
            if (seen)
                v = (v > 0 ? v / 1.5 : v * 1.5) - (in_output ? 0.5 + 0.25 * in_output : 0);
            if (r == 2 && !(mask[i / 32] >> (i % 32) & 1))
                continue;
            if (v > edited_best) {
                edited_best = v;
                w_ids[r] = (double)i;
            }
        }
        got_ids[r] = (float)ids[r];
        w_lp[r] = l[(int64_t)w_ids[r]] - lse;
        w_max[r] = best;
        w_target[r] = rows[r].target >= 0 ? l[rows[r].target] - lse : NAN;
        if (r == 1 || r == 2) {
            float *sorted = malloc((size_t)valid * 4);
            memcpy(sorted, l, (size_t)valid * 4);
            for (int i = 0; i < (r == 1 ? 5 : 20); i++) {
                int64_t at = 0;
                for (int64_t j = 1; j < valid; j++)
                    at = sorted[j] > sorted[at] ? j : at;
                w_top[(r == 1 ? 0 : 5) + i] = sorted[at] - lse;
                got_top[(r == 1 ? 0 : 5) + i] = top_ids[r * ARLE_MAX_TOP + i] == at ? top[r * ARLE_MAX_TOP + i] : NAN;
                sorted[at] = -INFINITY;
            }
            free(sorted);
        }
    }
    part(out, "ids", ROWS, got_ids, w_ids, 0, 0);
    part(out, "logprob", ROWS, fetch(b, ARLE_F32, a.logprob, ROWS), w_lp, 1e-5, 1e-5);
    part(out, "target_logprob", ROWS, fetch(b, ARLE_F32, a.target_logprob, ROWS), w_target, 1e-5, 1e-5);
    part(out, "top_logits", ROWS, fetch(b, ARLE_F32, a.top_logits, ROWS), w_max, 0, 0);
    part(out, "top", 25, got_top, w_top, 1e-5, 1e-5);
    free(top);
    free(x);
    free(mask);
}

/* ---- the table ------------------------------------------------------------------------------------------------------- */

const struct ops_case ops_cases[] = {
    { "embed bf16", run_embed, { 33, 64, ARLE_BF16 } },
    { "embed f32, odd width", run_embed, { 40, 37, ARLE_F32 } },
    { "embed f16", run_embed, { 17, 48, ARLE_F16 } },
    { "embed random bf16", run_embed_random, { 21, 40, ARLE_BF16 } },
    { "embed random f32", run_embed_random, { 21, 33, ARLE_F32 } },
    { "rmsnorm", run_rmsnorm, { 5, 1024 } },
    { "rmsnorm gathered, odd width", run_rmsnorm, { 7, 77, 1 } },
    { "rmsnorm 1100 rows", run_rmsnorm, { 1100, 2568 } },
    { "rmsnorm 1030 rows, gathered", run_rmsnorm, { 1030, 1000, 1 } },
    { "rmsnorm in place", run_rmsnorm, { 3, 100, 0, 1 } },
    { "linear 1 row", run_linear, { 1, 96, 128, ARLE_BF16 } },
    { "linear 1 row, odd K and N", run_linear, { 1, 83, 131, ARLE_BF16, 1 } },
    { "linear 1 row, long", run_linear, { 1, 40, 3584, ARLE_BF16 } },
    { "linear 1 row, more rows of weights than blocks", run_linear, { 1, 2413, 712, ARLE_BF16, 0, 1 } },
    { "linear 2 rows, more rows of weights than blocks", run_linear, { 2, 2405, 328, ARLE_BF16, 1 } },
    { "linear 1 row, long rows, unevenly many", run_linear, { 1, 2413, 8448, ARLE_BF16, 0, 1 } },
    { "linear 2 rows, long rows, unevenly many", run_linear, { 2, 2405, 8192, ARLE_BF16, 1 } },
    { "linear 2 rows, f32 weight", run_linear, { 2, 50, 65, ARLE_F32 } },
    { "linear 3 rows, f16 weight", run_linear, { 3, 31, 40, ARLE_F16, 0, 1 } },
    { "linear 4 rows", run_linear, { 4, 129, 70, ARLE_BF16, 0, 1 } },
    { "linear 5 rows", run_linear, { 5, 200, 64, ARLE_BF16 } },
    { "linear 6 rows", run_linear, { 6, 17, 30, ARLE_BF16, 1, 1 } },
    { "linear 7 rows, fp8 blocks", run_linear, { 7, 40, 96, ARLE_F8E4M3 } },
    { "linear 9 rows, fp4 groups", run_linear, { 9, 24, 128, ARLE_U8 } },
    { "linear 11 rows", run_linear, { 11, 65, 33, ARLE_BF16 } },
    { "linear 12 rows", run_linear, { 12, 64, 256, ARLE_BF16 } },
    { "linear 13 rows, f32 weight", run_linear, { 13, 47, 77, ARLE_F32, 1 } },
    { "linear 25 rows", run_linear, { 25, 144, 160, ARLE_BF16, 0, 1 } },
    { "linear 70 rows", run_linear, { 70, 100, 1030, ARLE_BF16 } },
    { "linear tiny", run_linear, { 1, 1, 1, ARLE_BF16 } },
    { "linear quantised, 1 row", run_linear_quant, { 1, 40, 256, ARLE_F8E4M3 } },
    { "linear quantised, 9 rows", run_linear_quant, { 9, 33, 320, ARLE_U8 } },
    { "norm_linear 1 row", run_linear, { 1, 60, 256, ARLE_BF16, 0, 0, 1 } },
    { "norm_linear 14 rows", run_linear, { 14, 60, 90, ARLE_BF16, 1, 0, 1 } },
    { "linear 1 row, 2560 wide", run_linear, { 1, 384, 2560, ARLE_BF16 } },
    { "linear 8 rows, aligned", run_linear, { 8, 264, 512, ARLE_BF16 } },
    { "linear 9 rows, aligned", run_linear, { 9, 136, 1024, ARLE_BF16, 0, 1 } },
    { "linear 17 rows, aligned", run_linear, { 17, 200, 520, ARLE_BF16, 1, 1 } },
    { "linear 33 rows, aligned", run_linear, { 33, 129, 256, ARLE_BF16, 1 } },
    { "linear 64 rows, aligned", run_linear, { 64, 300, 512, ARLE_BF16, 0, 1 } },
    { "linear 65 rows, aligned", run_linear, { 65, 96, 512, ARLE_BF16 } },
    { "linear 130 rows, aligned", run_linear, { 130, 264, 1024, ARLE_BF16, 1, 1 } },
    { "linear 16 rows, many of a little", run_linear, { 16, 34064, 72, ARLE_BF16, 1 } },
    { "linear 33 rows, many of a little", run_linear, { 33, 12424, 128, ARLE_BF16 } },
    { "linear 48 rows, 2568 wide", run_linear, { 48, 300, 2568, ARLE_BF16, 0, 1 } },
    { "linear 64 rows, 1544 wide", run_linear, { 64, 1036, 1544, ARLE_BF16, 1, 1 } },
    { "gate_up 18 rows, 1024 wide", run_gate_up, { 18, 520, 1024, ARLE_BF16, 1, 25 } },
    { "gate_up 40 rows, many of a little", run_gate_up, { 40, 6160, 136, ARLE_BF16, 1 } },
    { "norm_linear 20 rows, aligned", run_linear, { 20, 160, 512, ARLE_BF16, 0, 0, 1 } },
    { "silu_mul, aligned", run_silu_mul, { 3, 72, 70 } },
    { "gate_up 1 row, aligned", run_gate_up, { 1, 640, 256, ARLE_BF16, 1 } },
    { "gate_up 20 rows, aligned", run_gate_up, { 20, 72, 512, ARLE_BF16, 1, 25 } },
    { "gate_up 64 rows, aligned", run_gate_up, { 64, 88, 256, ARLE_BF16, 0 } },
    { "gate_up 100 rows, aligned", run_gate_up, { 100, 640, 256, ARLE_BF16, 1 } },
    { "gate_up 3500 rows, aligned", run_gate_up, { 3500, 1016, 16, ARLE_BF16, 1, 25 } },
    { "silu_mul", run_silu_mul, { 3, 70, 0 } },
    { "silu_mul limited", run_silu_mul, { 2, 33, 70 } },
    { "gate_up 1 row", run_gate_up, { 1, 96, 64, ARLE_BF16, 1 } },
    { "gate_up 1 row, odd", run_gate_up, { 1, 43, 61, ARLE_BF16, 0, 25 } },
    { "gate_up 29 rows", run_gate_up, { 29, 51, 128, ARLE_BF16, 1 } },
    { "gate_up 5 rows, f32 weight", run_gate_up, { 5, 20, 40, ARLE_F32, 0 } },
    { "attention one token", run_attention, { 64, 4, 2, ARLE_F32, 16, 0, 0, 0, 0, 16 } },
    { "attention bf16, gated", run_attention, { 64, 4, 2, ARLE_BF16, 16, 1, 0, 0, 1, 16 } },
    { "attention 256, mixed batch", run_attention, { 256, 8, 2, ARLE_BF16, 16, 3, 0, 0, 1, 64 } },
    { "attention decode", run_attention, { 256, 8, 2, ARLE_F32, 16, 2, 0, 0, 1, 64 } },
    { "attention decode over splits", run_attention, { 128, 6, 2, ARLE_BF16, 32, 4, 0, 0, 1, 128 } },
    { "attention odd heads, interleaved", run_attention, { 40, 3, 3, ARLE_F32, 8, 3, 0, 0, 2 | 16, 24 } },
    { "attention 5 heads on 1, no norms", run_attention, { 48, 5, 1, ARLE_F32, 16, 5, 0, 0, 4, 48 } },
    { "attention window", run_attention, { 64, 4, 1, ARLE_BF16, 16, 5, 50, 0, 0, 64 } },
    { "attention window across splits", run_attention, { 64, 4, 2, ARLE_F32, 16, 4, 600, 0, 0, 64 } },
    { "attention shifted, first 1", run_attention, { 64, 4, 2, ARLE_F32, 16, 5, 0, 1, 8, 32 } },
    { "attention int8", run_attention, { 128, 8, 2, ARLE_I8, 16, 3, 0, 0, 1, 64 } },
    { "attention fp8", run_attention, { 256, 4, 1, ARLE_F8E4M3, 16, 2, 0, 0, 0, 64 } },
    { "attention int8, odd width", run_attention, { 40, 2, 1, ARLE_I8, 16, 1, 0, 0, 0, 8 } },
    { "attention 4-bit", run_attention, { 256, 8, 2, ARLE_I4G, 16, 3, 0, 0, 1, 64 } },
    { "attention 4-bit, 64 wide", run_attention, { 64, 2, 2, ARLE_I4G, 16, 5, 0, 0, 0, 16 } },
    { "attention 256, one token", run_attention, { 256, 2, 1, ARLE_BF16, 16, 0, 0, 0, 1, 64 } },
    { "attention 256, decode over splits", run_attention, { 256, 16, 4, ARLE_BF16, 16, 4, 0, 0, 1, 64 } },
    { "attention 256, prefill, 6 on 1", run_attention, { 256, 6, 1, ARLE_BF16, 16, 1, 0, 0, 1, 64 } },
    { "attention 256, 16 on 2, window", run_attention, { 256, 16, 2, ARLE_BF16, 32, 3, 40, 0, 0, 64 } },
    { "attention 256, pieces on contexts", run_attention, { 256, 8, 2, ARLE_BF16, 16, 5, 0, 0, 1, 64 } },
    { "attention 256, shifted, first 1", run_attention, { 256, 4, 1, ARLE_BF16, 16, 5, 0, 1, 1 | 8, 64 } },
    { "attention 256, int8", run_attention, { 256, 8, 2, ARLE_I8, 16, 5, 0, 0, 1, 64 } },
    { "attention 256, fp8", run_attention, { 256, 4, 2, ARLE_F8E4M3, 16, 3, 0, 0, 1, 64 } },
    { "gdn 128, mixed", run_gdn, { 2, 4, 128, 128, 3 } },
    { "gdn 128, decode", run_gdn, { 2, 4, 128, 128, 2 } },
    { "gdn 128, decode, four on one", run_gdn, { 1, 4, 128, 128, 2 } },
    { "gdn 128, pieces", run_gdn, { 1, 2, 128, 128, 5 } },
    { "gdn 128, a few tokens", run_gdn, { 2, 4, 128, 128, 6 } },
    { "gdn 128, one to one", run_gdn, { 2, 2, 128, 128, 4 } },
    { "gdn 128, three on one", run_gdn, { 1, 3, 128, 128, 4 } },
    { "gdn 128, extreme gates", run_gdn, { 1, 2, 128, 128, 4, 1 } },
    { "gdn 128, keeps states", run_gdn, { 2, 4, 128, 128, 7, 0, 1 } },
    { "gdn keeps states", run_gdn, { 1, 2, 24, 40, 7, 0, 1 } },
    { "gdn one token", run_gdn, { 2, 2, 128, 128, 0 } },
    { "gdn seven tokens", run_gdn, { 2, 4, 16, 16, 1 } },
    { "gdn decode", run_gdn, { 2, 4, 64, 128, 2 } },
    { "gdn mixed", run_gdn, { 2, 6, 32, 48, 3 } },
    { "gdn long", run_gdn, { 1, 2, 128, 128, 4 } },
    { "gdn odd widths", run_gdn, { 1, 3, 20, 27, 3 } },
    { "gdn extreme gates", run_gdn, { 1, 4, 64, 64, 4, 1 } },
    { "moe_route example", run_route_example, { 0 } },
    { "moe_route softmax", run_route, { 7, 16, 3, ARLE_MOE_SOFTMAX, 0, 0 } },
    { "moe_route softmax, 130 experts", run_route, { 3, 130, 8, ARLE_MOE_SOFTMAX, 1, 0 } },
    { "moe_route sqrt softplus, table", run_route, { 9, 12, 4, ARLE_MOE_SQRTSOFTPLUS, 0, 1 } },
    { "moe_experts 1 token", run_experts, { 1, 8, 2, 64, 32, ARLE_BF16, 4 | 8 } },
    { "moe_experts 19 tokens, shared", run_experts, { 19, 8, 3, 48, 20, ARLE_BF16, 2 | 4 | 8 } },
    { "moe_experts weight first, limit", run_experts, { 5, 4, 2, 40, 33, ARLE_F32, 1 | 4, 20 } },
    { "moe_experts plain", run_experts, { 30, 3, 1, 32, 64, ARLE_BF16, 0 } },
    { "moe_experts fp4", run_experts, { 6, 4, 2, 64, 32, ARLE_U8, 1 } },
    { "moe_experts fp4, 70 tokens", run_experts, { 70, 4, 2, 288, 96, ARLE_U8, 1 } },
    { "moe_experts 1 token, aligned", run_experts, { 1, 16, 4, 128, 64, ARLE_BF16, 2 | 4 | 8 } },
    { "moe_experts 19 tokens, aligned", run_experts, { 19, 8, 3, 48, 24, ARLE_BF16, 2 | 4 | 8 } },
    { "moe_experts 300 tokens, aligned", run_experts, { 300, 6, 2, 64, 40, ARLE_BF16, 4 } },
    { "moe_experts 900 tokens, 5 experts", run_experts, { 900, 5, 2, 136, 72, ARLE_BF16, 2, 25 } },
    { "moe_experts 264 tokens, 41 experts", run_experts, { 264, 41, 2, 264, 200, ARLE_BF16, 2 | 4 | 8 } },
    { "moe_experts weight first, aligned", run_experts, { 5, 4, 2, 40, 32, ARLE_BF16, 1 | 4, 20 } },
    { "norm_moe 1 token", run_norm_moe, { 1, 16, 8, 512, 128, 1 } },
    { "norm_moe 2 tokens, wide rows", run_norm_moe, { 2, 12, 4, 2328, 264, 1 } },
    { "norm_moe 3 tokens", run_norm_moe, { 3, 18, 3, 264, 72, 1 } },
    { "norm_moe 4 tokens, none shared", run_norm_moe, { 4, 64, 8, 136, 40, 0 } },
    { "norm_moe 2 tokens, odd experts", run_norm_moe, { 2, 9, 2, 64, 24, 1 } },
    { "norm_moe 9 tokens", run_norm_moe, { 9, 16, 3, 64, 32, 1 } },
    { "seq_shift", run_shift, { 40 } },
    { "seq_shift keeps records", run_shift, { 40, 1 } },
    { "sample", run_sample, { 1000, 1000 } },
    { "sample padded vocabulary", run_sample, { 5008, 4999 } },
};
const unsigned ops_n_cases = sizeof ops_cases / sizeof *ops_cases;

/* ---- invariants ------------------------------------------------------------------------------------------------------- */

static int64_t differing(const float *a, const float *b, int64_t n)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++)
        count += memcmp(&a[i], &b[i], 4) != 0;
    return count;
}

static int64_t finish(struct ops_backend *b, int64_t diff)
{
    ops_release(b);
    return b->failed ? -1 : diff;
}

int64_t ops_rows_alone(struct ops_backend *b, uint32_t dtype)
{
    static const int counts[] = { 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 25, 40 };
    enum { ROWS = 40, N = 83, K = 259, I = 37 };
    int64_t diff = 0;
    float *x = randoms(90, ROWS * K, 1), *w = randoms(91, N * K, 1), *gw = randoms(92, 2 * I * K, 0.2f), *nw = randoms(93, K, 1);
    b->failed = 0;
    void *dx = ops_put_act(b, dtype, x, ROWS * K, NULL), *dn = ops_put(b, nw, K * 4), *scratch = ops_alloc(b, ROWS * (K + 2 * I) * 4);
    struct arle_weight *pw[3] = { ops_weight(b, ARLE_W_LINEAR, ARLE_BF16, w, N, K, 1), ops_weight(b, ARLE_W_LINEAR, ARLE_F32, w, N, K, 1),
                                  ops_weight(b, ARLE_W_GATE_UP, ARLE_BF16, gw, 2 * I, K, 1) };
    void *y = ops_alloc(b, ROWS * N * 4);
    for (int form = 0; form < 3 && b->failed == 0; form++) {
        int64_t width = form == 2 ? I : N;
        float *whole = NULL;
        for (int c = (int)(sizeof counts / sizeof *counts) - 1; c >= 0; c--) {
            int n = counts[c];
            for (int first = 0; first + n <= ROWS; first += n) {
                const void *xr = (const char *)dx + (size_t)first * K * asize(dtype);
                struct arle_linear_args a = { .dtype = dtype, .out_dtype = ARLE_F32, .n_tokens = (uint32_t)n, .x = xr, .ld_x = K, .w = pw[form], .y = y, .ld_y = width };
                struct arle_gate_up_args g = { .dtype = dtype, .n_tokens = (uint32_t)n, .eps = 1e-6f, .x = xr, .ld_x = K, .norm_w = dn, .w = pw[2], .out = y,
                                               .ld_out = width, .scratch = scratch };
                if (form < 2)
                    OPS_CALL(b, linear, &a);
                else
                    OPS_CALL(b, gate_up, &g);
                float *got = fetch(b, form == 2 ? dtype : ARLE_F32, y, n * width);
                if (whole == NULL) {
                    whole = got;
                    continue;
                }
                diff += differing(got, whole + first * width, n * width);
                free(got);
            }
        }
        free(whole);
    }
    free(x);
    free(w);
    free(gw);
    free(nw);
    return finish(b, diff);
}

int64_t ops_gdn_chunks(struct ops_backend *b, uint32_t dtype)
{
    static const struct ops_case shape = { "chunks", run_gdn, { 2, 4, 32, 80, 4 } };
    static const int steps[] = { 129, 1, 2, 3, 7, 64, 65 };
    int64_t diff = 0, n_state = 0, width = 4 * 80, total = 130;
    float *whole = NULL, *whole_state = NULL;
    b->failed = 0;
    for (unsigned i = 0; i < sizeof steps / sizeof *steps && b->failed == 0; i++) {
        struct gdn_run r;
        float *got = malloc((size_t)(total * width) * 4), *state;
        gdn_setup(b, &shape, dtype, &r);
        for (int at = 0; at < 129; at += steps[i]) {
            int from[MAX_SEQS] = { at, at == 0 ? 0 : 1 }, to[MAX_SEQS] = { at + steps[i] < 129 ? at + steps[i] : 129, 1 };
            r.l.n_seqs = at == 0 ? 2 : 1;           /* the second sequence takes part once */
            unsigned bufs = b->n_bufs;
            float *o = malloc((size_t)(total * width) * 4);
            gdn_step(b, &r, from, to, o);
            memcpy(got + at * width, o + at * width, (size_t)((to[0] - at) * width) * 4);
            if (at == 0)
                memcpy(got + 129 * width, o + 129 * width, (size_t)width * 4);
            free(o);
            while (b->n_bufs > bufs)
                b->api->mem.free(b->dev, ARLE_MEM_DEVICE, b->buf[--b->n_bufs]);
        }
        r.l.n_seqs = 2;
        state = gdn_states(b, &r, &n_state);
        if (whole == NULL) {
            whole = got;
            whole_state = state;
        } else {
            diff += differing(got, whole, total * width) + differing(state, whole_state, n_state);
            free(got);
            free(state);
        }
        gdn_free(&r);
        ops_release(b);
    }
    free(whole);
    free(whole_state);
    return finish(b, diff);
}

int64_t ops_attn_chunks(struct ops_backend *b, uint32_t dtype, uint32_t kv_dtype)
{
    struct ops_case shape = { "chunks", run_attention, { 64, 6, 2, (int)kv_dtype, 16, 0, 0, 0, 1, 32 } };
    static const int steps[] = { 600, 1, 64, 513 };
    enum { LEN = 600 };
    int64_t diff = 0, width = 6 * 64;
    float *whole = NULL;
    b->failed = 0;
    for (unsigned i = 0; i < sizeof steps / sizeof *steps && b->failed == 0; i++) {
        for (int window = 0; window <= 40; window += 40) {
            struct attn_run r;
            shape.p[6] = window;
            attn_setup(b, &shape, dtype, &r);
            free(r.s.l.table);
            free(r.rows);
            r.s.l = (struct layout) { .n_seqs = 1, .ctx = { 0 }, .fresh = { LEN }, .page_tokens = 16 };
            lay_pages(&r.s.l);
            r.rows = randoms(15, LEN * r.s.ld, 1.5f);
            size_t bytes = r.kv.page_stride * (size_t)r.s.l.n_pages;
            uint8_t *nan = malloc(bytes);
            memset(nan, 0xff, bytes);
            r.kv.base = ops_put(b, nan, bytes);
            free(nan);
            float *got = malloc(LEN * (size_t)width * 4);
            for (int at = 0; at < LEN; at += steps[i]) {
                int from[MAX_SEQS] = { at }, to[MAX_SEQS] = { at + steps[i] < LEN ? at + steps[i] : LEN };
                unsigned bufs = b->n_bufs;
                float *o;
                int64_t n = attn_step(b, &r, &r.s.l, from, to, true, NULL, &o);
                memcpy(got + at * width, o, (size_t)(n * width) * 4);
                free(o);
                while (b->n_bufs > bufs)
                    b->api->mem.free(b->dev, ARLE_MEM_DEVICE, b->buf[--b->n_bufs]);
            }
            if (i == 0) {
                whole = realloc(whole, 2 * LEN * (size_t)width * 4);
                memcpy(whole + (window ? LEN * width : 0), got, LEN * (size_t)width * 4);
            } else {
                diff += differing(got, whole + (window ? LEN * width : 0), LEN * width);
            }
            free(got);
            attn_free(&r);
            ops_release(b);
        }
    }
    free(whole);
    return finish(b, diff);
}

int64_t ops_moe_alone(struct ops_backend *b, uint32_t dtype)
{
    enum { T = 17, E = 6, KK = 2, H = 48, I = 32 };
    float *x = randoms(95, T * H, 1), *up = randoms(96, E * 2 * I * H, 0.3f), *down = randoms(97, E * H * I, 0.3f), *w = randoms(98, T * KK, 1);
    int32_t ids[T * KK];
    int64_t diff = 0;
    for (int i = 0; i < T * KK; i++)
        ids[i] = (i / KK * 5 + i % KK) % E;
    b->failed = 0;
    size_t scratch = (size_t)T * ((KK + 1) * (3 * I + H) + H) * 4 + 65536;
    void *dx = ops_put_act(b, dtype, x, T * H, NULL), *dids = ops_put(b, ids, sizeof ids), *dw = ops_put(b, w, T * KK * 4), *y = ops_alloc(b, T * H * 4);
    struct arle_moe_experts_args a = { .dtype = dtype, .n_experts = E, .k = KK, .ld_x = H, .gate_up = ops_weight(b, ARLE_W_EXPERTS_GATE_UP, ARLE_BF16, up, E * 2 * I, H, E),
                                       .down = ops_weight(b, ARLE_W_EXPERTS, ARLE_BF16, down, E * H, I, E), .y = y, .ld_y = H,
                                       .scratch = ops_alloc(b, scratch), .scratch_bytes = scratch };
    float *whole = NULL;
    for (int step = T; step >= 1; step = step > 4 ? 4 : step - 3)
        for (int at = 0; at < T; at += step) {
            int n = at + step < T ? step : T - at;
            a.n_tokens = (uint32_t)n;
            a.x = (char *)dx + (size_t)(at * H) * asize(dtype);
            a.ids = (int32_t *)dids + at * KK;
            a.weights = (float *)dw + at * KK;
            OPS_CALL(b, moe_experts, &a);
            float *got = fetch(b, dtype, y, n * H);
            if (whole == NULL) {
                whole = got;
                continue;
            }
            diff += differing(got, whole + at * H, n * H);
            free(got);
        }
    free(whole);
    free(x);
    free(up);
    free(down);
    free(w);
    return finish(b, diff);
}

/* A batch of one real sequence and two padding rows on page 0 and slot 0, all NaN: the real rows match a run without padding. */
int64_t ops_padding(struct ops_backend *b, uint32_t dtype)
{
    static const struct ops_case attn = { "padding", run_attention, { 64, 4, 2, ARLE_BF16, 16, 2, 0, 0, 1, 32 } };
    static const struct ops_case gdn = { "padding", run_gdn, { 2, 2, 32, 32, 2 } };
    int64_t diff = 0, width = 4 * 64;
    float *alone = NULL, *o;
    b->failed = 0;
    for (int pad = 0; pad < 2; pad++) {
        struct attn_run r;
        int from[MAX_SEQS] = { 0 };
        attn_setup(b, &attn, dtype, &r);
        r.s.l.n_seqs = 1;
        attn_fill_context(b, &r);
        if (pad) {
            r.s.l.n_seqs = 3;
            for (int i = 1; i < 3; i++) {
                r.s.l.ctx[i] = 0;
                r.s.l.fresh[i] = 1;
                memset(r.s.l.table + i * r.s.l.max_pages, 0, (size_t)r.s.l.max_pages * 4);
                for (int64_t j = 0; j < r.s.ld; j++)
                    r.rows[r.base[i] * r.s.ld + j] = NAN;
            }
        }
        attn_step(b, &r, &r.s.l, from, r.s.l.fresh, true, NULL, &o);
        if (pad) {
            diff += differing(o, alone, width);
            free(alone);
            free(o);
        } else {
            alone = o;
        }
        attn_free(&r);
        ops_release(b);
    }
    for (int pad = 0; pad < 2; pad++) {
        struct gdn_run r;
        int from[MAX_SEQS] = { 0 };
        gdn_setup(b, &gdn, dtype, &r);
        r.l.n_seqs = pad ? 3 : 1;
        for (int64_t j = r.ld; j < 3 * r.ld; j++)
            r.rows[j] = NAN;
        o = malloc((size_t)(3 * r.n_v * r.dv) * 4);
        gdn_step(b, &r, from, r.l.fresh, o);
        if (pad) {
            diff += differing(o, alone, r.n_v * r.dv);
            free(alone);
            free(o);
        } else {
            alone = o;
        }
        gdn_free(&r);
        ops_release(b);
    }
    return finish(b, diff);
}
