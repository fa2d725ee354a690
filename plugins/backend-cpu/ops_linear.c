/*
 * Matrix products and their neighbours: embed, rmsnorm, linear, norm_linear, silu_mul, gate_up. mm_run() serves the experts too.
 */
#include "cpu.h"
#include "latent_math.h"

/* Work of one matrix product: packed tiles of activations times ranges of column blocks. */
struct mm_job {
    const struct mm *m;
    struct arle_device *dev;
    const struct kernels *k;
    enum x_kind x_kind;
    uint32_t row0, n_rows;          /* rows of this pass */
    const char *packed;             /* tiles of max_rows rows, the last one shorter */
    size_t row_bytes;               /* packed bytes of one row */
    void (*gemm)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);
};

static const void *mm_x_row(const struct mm *m, uint32_t row)
{
    return act_at(m->x, m->dtype, m->x_rows ? m->x_rows[row] : (int64_t)row, m->ld_x, 0);
}

/* Packs one tile as [k2][rows][2]; a missing last k is zero. tmp holds k + 1 floats. */
static void pack_tile(const struct mm_job *j, uint32_t row0, unsigned rows, char *out, float *tmp)
{
    int64_t k = j->m->w->k, k2 = j->m->w->k2;
    for (unsigned r = 0; r < rows; r++) {
        const void *x = mm_x_row(j->m, row0 + r);
        bool quant = j->m->w->act_quant != 0;
        if (j->x_kind == X_BF16 && !quant) {
            uint32_t *o = (uint32_t *)(void *)out + r;
            const uint16_t *h = x;
            for (int64_t i = 0; i < k / 2; i++)
                o[i * rows] = (uint32_t)h[2 * i] | (uint32_t)h[2 * i + 1] << 16;
            if (k % 2)
                o[k / 2 * rows] = h[k - 1];
            continue;
        }
        j->k->to_f32(x, j->m->dtype, k, tmp);
        tmp[k] = 0;
        if (quant)
            lat_quant_fp8(tmp, (size_t)k, 128);      /* exact in bf16 */
        for (int64_t i = 0; i < k2; i++) {
            if (j->x_kind == X_BF16) {
                ((uint32_t *)(void *)out)[i * rows + r] = (uint32_t)f32_to_bf16(tmp[2 * i]) | (uint32_t)f32_to_bf16(tmp[2 * i + 1]) << 16;
            } else {
                float *o = (float *)(void *)out + (i * rows + r) * 2;
                o[0] = tmp[2 * i];
                o[1] = tmp[2 * i + 1];
            }
        }
    }
}

static void pack_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct mm_job *j = arg;
    unsigned mr = j->k->max_rows;
    int64_t tiles = (j->n_rows + mr - 1) / mr;
    for (int64_t t = part_begin(tiles, part, n_parts); t < part_begin(tiles, part + 1, n_parts); t++) {
        uint32_t first = (uint32_t)t * mr, rows = j->n_rows - first < mr ? j->n_rows - first : mr;
        pack_tile(j, j->row0 + first, rows, (char *)(uintptr_t)j->packed + first * j->row_bytes, thread_scratch(j->dev, part));
    }
}

static void store_plain(const struct mm_job *j, uint32_t row, int64_t block, unsigned blocks, const float *acc)
{
    const struct mm *m = j->m;
    int64_t c = block * CPU_BLOCK, n = m->w->n - c < blocks * CPU_BLOCK ? m->w->n - c : blocks * CPU_BLOCK;
    void *y = act_at_w(m->y, m->out_dtype, m->y_rows ? m->y_rows[row] : (int64_t)row, m->ld_y, c);
    j->k->store_row(acc, n, y, m->out_dtype, m->accumulate);
}

static void store_gate(const struct mm_job *j, uint32_t row, int64_t block, unsigned blocks, const float *acc)
{
    const struct mm *m = j->m;
    for (unsigned b = 0; b < blocks; b += 2) {
        int64_t c = (block + b) / 2 * CPU_BLOCK, n = m->w->n / 2 - c < CPU_BLOCK ? m->w->n / 2 - c : CPU_BLOCK;
        void *y = act_at_w(m->y, m->out_dtype, m->y_rows ? m->y_rows[row] : (int64_t)row, m->ld_y, c);
        j->k->silu_mul(acc + b * CPU_BLOCK, acc + (b + 1) * CPU_BLOCK, n, m->limit, m->row_weight ? m->row_weight[row] : 1.0f, y,
                       m->out_dtype, m->dtype);
    }
}

#define WIDEN_BYTES ((size_t)512 << 10)     /* of widened blocks at a time: what the second cache level keeps beside its other users */

/* The blocks of one group as bf16, in the thread's scratch: widened once for all rows. */
static const char *widen_blocks(struct arle_device *dev, const struct arle_weight *w, const char *packed, unsigned blocks, unsigned part)
{
    uint16_t *out = thread_scratch(dev, part);
    for (unsigned i = 0; i < blocks; i++) {
        const uint8_t *codes = (const uint8_t *)packed + i * w->block_bytes;
        dev->k->widen(codes, codes + (size_t)w->k2 * CPU_BLOCK, w->k / 32, out + (size_t)i * (size_t)w->k2 * CPU_BLOCK * 2);
    }
    return (const char *)out;
}

/* Columns outside, row tiles inside: a group of weight blocks is read from memory once and stays in cache for all rows. */
static void mm_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct mm_job *j = arg;
    const struct mm *m = j->m;
    const struct arle_weight *w = m->w;
    unsigned mr = j->k->max_rows, unit = m->form == MM_GATE ? 2 : 1;
    unsigned group = j->k->tile_blocks[j->n_rows < mr ? j->n_rows : mr];
    int64_t units = w->n_blocks / unit, end = part_begin(units, part + 1, n_parts) * unit;
    _Alignas(64) float acc[CPU_MAX_ROWS * CPU_TILE_COLS];
    if (group < unit)
        group = unit;
    size_t block_bytes = w->dtype == CPU_FP4 ? (size_t)w->k2 * CPU_BLOCK * 4 : w->block_bytes;
    while (w->dtype == CPU_FP4 && group > unit && group * block_bytes > WIDEN_BYTES)
        group /= 2;
    for (int64_t b = part_begin(units, part, n_parts) * unit; b < end; b += group) {
        unsigned blocks = end - b < group ? (unsigned)(end - b) : group;
        const char *wb = w->data + m->expert * w->expert_bytes + (size_t)b * w->block_bytes;
        if (w->dtype == CPU_FP4)
            wb = widen_blocks(j->dev, w, wb, blocks, part);
        for (uint32_t r = 0; r < j->n_rows; r += mr) {
            unsigned rows = j->n_rows - r < mr ? j->n_rows - r : mr;
            j->gemm(j->packed + r * j->row_bytes, rows, w->k2, wb, block_bytes, blocks, acc);
            for (unsigned i = 0; i < rows; i++)
                (m->form == MM_GATE ? store_gate : store_plain)(j, j->row0 + r + i, b, blocks, acc + i * blocks * CPU_BLOCK);
        }
    }
}

static void count_path(struct mm_job *j)
{
    static const struct { const char *name; enum counter_id id; } paths[] = {
        { "reference", N_linear_ref }, { "avx2", N_linear_avx2 }, { "avx512", N_linear_avx512 },
    };
    if (j->x_kind == X_BF16)
        count(j->dev, N_linear_avx512bf16, 1);
    else
        for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
            if (strncmp(paths[i].name, j->k->name, strlen(paths[i].name)) == 0 && strlen(j->k->name) == strlen(paths[i].name))
                count(j->dev, paths[i].id, 1);
    count(j->dev, j->m->n_rows == 1 ? N_linear_gemv : N_linear_gemm, 1);
    if (j->m->w->dtype == ARLE_F32)
        count(j->dev, N_linear_f32_weight, 1);
    if (j->m->w->dtype == CPU_FP4)
        count(j->dev, N_linear_fp4, 1);
}

void mm_run(struct arle_device *dev, const struct mm *m)
{
    const struct kernels *k = dev->k;
    struct mm_job j = { .m = m, .dev = dev, .k = k };
    bool bf16_weight = m->w->dtype != ARLE_F32;
    if (m->n_rows == 0)
        return;
    j.x_kind = bf16_weight && m->dtype == ARLE_BF16 && k->bf16_dot ? X_BF16 : X_F32;
    j.gemm = j.x_kind == X_BF16 ? k->gemm_bf16_wbf16 : bf16_weight ? k->gemm_f32_wbf16 : k->gemm_f32_wf32;
    j.row_bytes = (size_t)m->w->k2 * 2 * (j.x_kind == X_BF16 ? 2 : 4);
    count_path(&j);
    size_t fit = CPU_PACK_BYTES / j.row_bytes / k->max_rows * k->max_rows;
    uint32_t most = fit < 8 * k->max_rows ? 8 * k->max_rows : fit > 1024 ? 1024 / k->max_rows * k->max_rows : (uint32_t)fit;
    for (j.row0 = 0; j.row0 < m->n_rows; j.row0 += j.n_rows) {
        const char *x = mm_x_row(m, j.row0);
        j.n_rows = m->n_rows - j.row0 < most ? m->n_rows - j.row0 : most;
        double elems = (double)m->w->n_blocks * CPU_BLOCK * (double)m->w->k;
        j.packed = dev->pack;
        if (m->n_rows == 1 && m->w->k % 2 == 0 && !m->w->act_quant && (j.x_kind == X_BF16 || m->dtype == ARLE_F32))
            j.packed = x;               /* a single row is packed as it is */
        else
            run_parts(dev, j.n_rows < 2 * k->max_rows ? 0 : j.n_rows * (double)m->w->k * 0.3, pack_job, &j);
        run_parts(dev, elems * (0.05 + 0.01 * j.n_rows), mm_job, &j);
    }
}

struct row_job {
    struct arle_device *dev;
    const void *args;
    const void *x;
    int64_t n_rows;
};

static void embed_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct row_job *j = arg;
    const struct arle_embed_args *a = j->args;
    for (int64_t t = part_begin(a->n_tokens, part, n_parts); t < part_begin(a->n_tokens, part + 1, n_parts); t++) {
        int32_t id = a->ids[t] >= 0 ? a->ids[t] : a->sampled[-1 - a->ids[t]];
        void *out = act_at_w(a->out, a->dtype, t, a->ld_out, 0);
        if (id >= 0 && id < a->table->n)
            weight_row(a->table, id, out, a->dtype);
        else                            /* never for checked ids; a wrong one must not read beyond the table */
            memset(out, 0, (size_t)a->table->k * act_size(a->dtype));
    }
}

static bool is_act(uint32_t dtype)
{
    return dtype == ARLE_F32 || dtype == ARLE_BF16;
}

static bool is_matrix(const struct arle_weight *w)
{
    return w != NULL && (w->role == ARLE_W_LINEAR || w->role == ARLE_W_EMBED);
}

int cpu_embed(struct arle_device *dev, struct arle_stream *st, const struct arle_embed_args *a)
{
    struct row_job j = { .dev = dev, .args = a };
    if (!is_act(a->dtype) || !is_matrix(a->table))
        return -EINVAL;
    count(dev, N_embed, 1);
    run_parts(dev, a->n_tokens * (double)a->table->k * 1.5, embed_job, &j);
    return 0;
}

static void rmsnorm_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct row_job *j = arg;
    const struct arle_rmsnorm_args *a = j->args;
    for (int64_t t = part_begin(a->n_tokens, part, n_parts); t < part_begin(a->n_tokens, part + 1, n_parts); t++)
        j->dev->k->rmsnorm(act_at(a->x, a->dtype, a->rows ? a->rows[t] : t, a->ld_x, 0), a->dim, a->eps, a->w_offset, a->w,
                           act_at_w(a->out, a->dtype, t, a->ld_out, 0), a->dtype);
}

int cpu_rmsnorm(struct arle_device *dev, struct arle_stream *st, const struct arle_rmsnorm_args *a)
{
    struct row_job j = { .dev = dev, .args = a };
    if (!is_act(a->dtype))
        return -EINVAL;
    count(dev, N_rmsnorm, 1);
    run_parts(dev, a->n_tokens * (double)a->dim * 0.2, rmsnorm_job, &j);
    return 0;
}

int cpu_linear(struct arle_device *dev, struct arle_stream *st, const struct arle_linear_args *a)
{
    if (!is_act(a->dtype) || (a->out_dtype != a->dtype && a->out_dtype != ARLE_F32) || !is_matrix(a->w))
        return -EINVAL;
    struct mm m = { .form = MM_STORE, .dtype = a->dtype, .out_dtype = a->out_dtype, .accumulate = a->accumulate != 0,
                    .n_rows = a->n_tokens, .x = a->x, .ld_x = a->ld_x, .w = a->w, .y = a->y, .ld_y = a->ld_y };
    mm_run(dev, &m);
    return 0;
}

int cpu_norm_linear(struct arle_device *dev, struct arle_stream *st, const struct arle_norm_linear_args *a)
{
    if (!is_act(a->dtype) || (a->out_dtype != a->dtype && a->out_dtype != ARLE_F32) || !is_matrix(a->w))
        return -EINVAL;
    struct arle_rmsnorm_args norm = { .dtype = a->dtype, .n_tokens = a->n_tokens, .dim = (uint32_t)a->w->k, .eps = a->eps,
                                      .w_offset = a->w_offset, .x = a->x, .ld_x = a->ld_x, .w = a->norm_w, .out = a->scratch,
                                      .ld_out = a->w->k };
    struct arle_linear_args lin = { .dtype = a->dtype, .out_dtype = a->out_dtype, .n_tokens = a->n_tokens, .x = a->scratch,
                                    .ld_x = a->w->k, .w = a->w, .y = a->y, .ld_y = a->ld_y };
    int r = cpu_rmsnorm(dev, st, &norm);
    return r < 0 ? r : cpu_linear(dev, st, &lin);
}

static void silu_mul_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct row_job *j = arg;
    const struct arle_silu_mul_args *a = j->args;
    float *g = thread_scratch(j->dev, part), *u = g + a->dim;
    for (int64_t t = part_begin(a->n_tokens, part, n_parts); t < part_begin(a->n_tokens, part + 1, n_parts); t++) {
        j->dev->k->to_f32(act_at(a->gu, a->dtype, t, a->ld_gu, 0), a->dtype, a->dim, g);
        j->dev->k->to_f32(act_at(a->gu, a->dtype, t, a->ld_gu, a->dim), a->dtype, a->dim, u);
        j->dev->k->silu_mul(g, u, a->dim, a->limit, 1.0f, act_at_w(a->out, a->dtype, t, a->ld_out, 0), a->dtype, a->dtype);
    }
}

int cpu_silu_mul(struct arle_device *dev, struct arle_stream *st, const struct arle_silu_mul_args *a)
{
    struct row_job j = { .dev = dev, .args = a };
    if (!is_act(a->dtype) || (size_t)a->dim * 8 > CPU_THREAD_SCRATCH)
        return -EINVAL;
    count(dev, N_silu_mul, 1);
    run_parts(dev, a->n_tokens * (double)a->dim, silu_mul_job, &j);
    return 0;
}

int cpu_gate_up(struct arle_device *dev, struct arle_stream *st, const struct arle_gate_up_args *a)
{
    if (!is_act(a->dtype) || a->w == NULL || a->w->role != ARLE_W_GATE_UP)
        return -EINVAL;
    struct mm m = { .form = MM_GATE, .dtype = a->dtype, .out_dtype = a->dtype, .n_rows = a->n_tokens, .x = a->x, .ld_x = a->ld_x,
                    .w = a->w, .limit = a->limit, .y = a->out, .ld_y = a->ld_out };
    if (a->norm_w != NULL) {
        struct arle_rmsnorm_args norm = { .dtype = a->dtype, .n_tokens = a->n_tokens, .dim = (uint32_t)a->w->k, .eps = a->eps,
                                          .w_offset = a->w_offset, .x = a->x, .ld_x = a->ld_x, .w = a->norm_w,
                                          .out = a->scratch, .ld_out = a->w->k };
        int r = cpu_rmsnorm(dev, st, &norm);
        if (r < 0)
            return r;
        m.x = a->scratch;
        m.ld_x = a->w->k;
    }
    count(dev, N_gate_up, 1);
    mm_run(dev, &m);
    return 0;
}
