/*
 * embed, rmsnorm, linear, norm_linear, silu_mul, gate_up. Matrix products are mm.c.
 */
#include "cpu.h"

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
