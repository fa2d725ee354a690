/*
 * gdn and seq_shift: the ops with a state per sequence.
 *
 * The delta rule runs token by token in both decode and prefill, so that a sequence gives the same bits however it was cut.
 * Columns of S do not meet each other, so the work is cut by (sequence, value head, 64 columns): such a slice of S stays in the
 * first-level cache for all tokens of the step. Three passes: convolution, norms and gates (by token); recurrence (by slice);
 * gated norm (by token).
 */
#include "cpu.h"

/* From here on a slice is moved to a compact place first: in its record only every second group of cache lines belongs to it, so
 * that half of the cache's sets would have to hold all of it. */
#define GDN_COPY_TOKENS 4

struct gdn_job {
    struct arle_device *dev;
    const struct arle_gdn_args *a;
    const struct arle_save *saves;
    uint32_t n_saves;
    int64_t n_conv;
    float *y;                   /* [n_tokens][n_conv]: convolved q, k, v; q and k normalised */
    float *gates;               /* [n_tokens][n_v][4]: e^g, beta, k . q */
    float *o;                   /* [n_tokens][n_v * dv] */
};

static char *state_at(const struct arle_state *s, int32_t slot)
{
    return (char *)s->base + (size_t)slot * s->stride + s->offset;
}

/* Row t - back of sequence s before the convolution, from this step or from the conv state. */
static const void *conv_input(const struct gdn_job *j, int64_t s, int64_t t, int back)
{
    const struct arle_gdn_args *a = j->a;
    int64_t first = a->batch->cu[s], at = t - back;
    if (at >= first)
        return act_at(a->proj, a->dtype, at, a->ld_proj, a->u_off);
    return state_at(&a->conv_state, a->batch->slot[s]) + (size_t)((3 + at - first) * j->n_conv) * act_size(a->dtype);
}

static void head_gates(const struct gdn_job *j, int64_t t, unsigned h, float *out)
{
    const struct arle_gdn_args *a = j->a;
    float av = act_get(act_at(a->proj, a->dtype, t, a->ld_proj, a->a_off), a->dtype, h);
    float bv = act_get(act_at(a->proj, a->dtype, t, a->ld_proj, a->b_off), a->dtype, h);
    const float *q = j->y + t * j->n_conv + (int64_t)(h / (a->n_v / a->n_k)) * a->dk, *k = q + (int64_t)a->n_k * a->dk;
    out[0] = expf(-expf(a->A_log[h]) * softplus_f32(av + a->dt_bias[h]));
    out[1] = sigmoid_f32(bv);
    out[2] = j->dev->k->dot(a->dk, q, k);
}

static void conv_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct gdn_job *j = arg;
    const struct arle_gdn_args *a = j->a;
    const struct arle_batch *b = a->batch;
    for (int64_t t = part_begin(b->n_tokens, part, n_parts); t < part_begin(b->n_tokens, part + 1, n_parts); t++) {
        int64_t s = b->seq_of[t];
        const void *u[4] = { conv_input(j, s, t, 3), conv_input(j, s, t, 2), conv_input(j, s, t, 1), conv_input(j, s, t, 0) };
        float *y = j->y + t * j->n_conv;
        j->dev->k->conv(u, a->conv_w, j->n_conv, a->dtype, y);
        for (unsigned h = 0; h < a->n_k; h++) {
            j->dev->k->l2norm(a->dk, 1e-6f, 1.0f / sqrtf((float)a->dk), y + (int64_t)h * a->dk);
            j->dev->k->l2norm(a->dk, 1e-6f, 1.0f, y + (int64_t)(a->n_k + h) * a->dk);
        }
        for (unsigned h = 0; h < a->n_v; h++)
            head_gates(j, t, h, j->gates + (t * a->n_v + h) * 4);
    }
}

/* The inputs of the n <= 3 tokens before token `end` become the last n rows of a conv state. */
static void conv_rows(const struct gdn_job *j, int64_t end, int64_t n, char *state)
{
    const struct arle_gdn_args *a = j->a;
    size_t row = (size_t)j->n_conv * act_size(a->dtype);
    for (int64_t i = 3 - n; i < 3; i++)
        memcpy(state + (size_t)i * row, act_at(a->proj, a->dtype, end - 3 + i, a->ld_proj, a->u_off), row);
}

/* The last three inputs become the conv state; short sequences keep what they still need of the old one. */
static void save_conv(const struct gdn_job *j, int64_t s)
{
    const struct arle_gdn_args *a = j->a;
    int64_t end = a->batch->cu[s + 1], n = end - a->batch->cu[s];
    size_t row = (size_t)j->n_conv * act_size(a->dtype);
    char *state = state_at(&a->conv_state, a->batch->slot[s]);
    if (n < 3)
        memmove(state, state + (size_t)n * row, (size_t)(3 - n) * row);
    conv_rows(j, end, n < 3 ? n : 3, state);
}

/* Columns c.. of head h in the record of a slot. */
static float *s_slice(const struct arle_gdn_args *a, uint32_t slot, unsigned h, unsigned c)
{
    return (float *)(void *)state_at(&a->s_state, (int32_t)slot) + (size_t)h * a->dk * a->dv + c;
}

/* Runs a slice that lies in a compact place until `left` tokens are left, and writes S to a record. */
static void recur_until(const struct gdn_job *j, struct gdn_slice *sl, unsigned left, float *to)
{
    unsigned all = sl->n_tokens, n = all - left;
    sl->n_tokens = n;
    j->dev->k->gdn(sl);
    for (unsigned d = 0; d < sl->dk; d++)
        memcpy(to + d * j->a->dv, sl->s + d * sl->ld_s, sl->cols * sizeof *to);
    sl->n_tokens = left;
    sl->q += n * sl->ld_qkv;
    sl->k += n * sl->ld_qkv;
    sl->v += n * sl->ld_qkv;
    sl->gates += n * sl->ld_gates;
    sl->o += n * sl->ld_o;
}

static void recur_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct gdn_job *j = arg;
    const struct arle_gdn_args *a = j->a;
    const struct arle_batch *b = a->batch;
    unsigned slices = (a->dv + CPU_GDN_COLS - 1) / CPU_GDN_COLS;
    int64_t n = (int64_t)b->n_seqs * a->n_v * slices;
    for (int64_t i = part; i < n; i += n_parts) {
        unsigned c = (unsigned)(i % slices) * CPU_GDN_COLS, h = (unsigned)(i / slices % a->n_v);
        int64_t s = i / slices / a->n_v, t0 = b->cu[s];
        float *y = j->y + t0 * j->n_conv, *q = y + (int64_t)(h / (a->n_v / a->n_k)) * a->dk;
        if (b->cu[s + 1] == t0)
            continue;
        struct gdn_slice sl = {
            .dk = a->dk, .cols = a->dv - c < CPU_GDN_COLS ? a->dv - c : CPU_GDN_COLS, .n_tokens = (unsigned)(b->cu[s + 1] - t0),
            .s = s_slice(a, (uint32_t)b->slot[s], h, c), .ld_s = a->dv,
            .q = q, .k = q + (int64_t)a->n_k * a->dk, .v = y + 2 * (int64_t)a->n_k * a->dk + (int64_t)h * a->dv + c, .ld_qkv = j->n_conv,
            .gates = j->gates + (t0 * a->n_v + h) * 4, .ld_gates = (int64_t)a->n_v * 4,
            .o = j->o + t0 * (int64_t)a->n_v * a->dv + (int64_t)h * a->dv + c, .ld_o = (int64_t)a->n_v * a->dv,
        };
        if (sl.n_tokens < GDN_COPY_TOKENS) {
            j->dev->k->gdn(&sl);
            continue;
        }
        float *home = sl.s, *copy = thread_scratch(j->dev, part);
        for (unsigned d = 0; d < a->dk; d++)
            memcpy(copy + d * CPU_GDN_COLS, home + d * sl.ld_s, sl.cols * sizeof *copy);
        sl.s = copy;
        sl.ld_s = CPU_GDN_COLS;
        for (uint32_t k = 0; k < j->n_saves; k++)
            if (j->saves[k].seq == s)
                recur_until(j, &sl, (unsigned)((int64_t)b->cu[s + 1] - t0) - j->saves[k].n_tokens, s_slice(a, j->saves[k].slot, h, c));
        recur_until(j, &sl, 0, home);
    }
    for (int64_t s = part; s < b->n_seqs; s += n_parts)         /* nobody reads the conv state in this pass */
        save_conv(j, s);
    for (uint32_t k = part; k < j->n_saves; k += n_parts)
        conv_rows(j, b->cu[j->saves[k].seq] + (int64_t)j->saves[k].n_tokens, 3, state_at(&a->conv_state, (int32_t)j->saves[k].slot));
}

static void norm_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct gdn_job *j = arg;
    const struct arle_gdn_args *a = j->a;
    int64_t n = a->batch->n_tokens, width = (int64_t)a->n_v * a->dv;
    for (int64_t t = part_begin(n, part, n_parts); t < part_begin(n, part + 1, n_parts); t++)
        for (int64_t c = 0; c < width; c += a->dv)
            j->dev->k->gated_norm(a->dv, j->o + t * width + c, act_at(a->proj, a->dtype, t, a->ld_proj, a->z_off + c), a->norm_w, a->eps,
                                  act_at_w(a->out, a->dtype, t, a->ld_out, c), a->dtype);
}

static int delta_net(struct arle_device *dev, const struct arle_gdn_args *a, const struct arle_save *saves, uint32_t n_saves)
{
    const struct arle_batch *b = a->batch;
    struct gdn_job j = { .dev = dev, .a = a, .saves = saves, .n_saves = n_saves };
    if ((a->dtype != ARLE_F32 && a->dtype != ARLE_BF16) || a->conv_width != 4 || a->n_k == 0 || a->n_v % a->n_k != 0 || a->dk == 0
        || a->dv == 0 || n_saves > ARLE_MAX_SAVES)
        return -EINVAL;
    if (b->n_tokens == 0)
        return 0;
    j.n_conv = 2 * (int64_t)a->n_k * a->dk + (int64_t)a->n_v * a->dv;
    size_t per_token = (size_t)(j.n_conv + (int64_t)a->n_v * (4 + a->dv)) * 4;
    if (a->scratch == NULL || a->scratch_bytes < b->n_tokens * per_token)
        return -EINVAL;
    j.y = a->scratch;
    j.gates = j.y + (size_t)b->n_tokens * (size_t)j.n_conv;
    j.o = j.gates + (size_t)b->n_tokens * a->n_v * 4;
    count(dev, b->n_tokens == b->n_seqs ? N_gdn_decode : N_gdn_prefill, 1);
    run_parts(dev, b->n_tokens * (double)j.n_conv * 0.5, conv_part, &j);
    run_parts(dev, b->n_tokens * (double)a->n_v * a->dk * a->dv * 0.05, recur_part, &j);
    run_parts(dev, b->n_tokens * (double)a->n_v * a->dv * 0.5, norm_part, &j);
    return 0;
}

int cpu_gdn(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_args *a)
{
    (void)st;
    return delta_net(dev, a, NULL, 0);
}

int cpu_gdn_keep(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_keep_args *a)
{
    (void)st;
    return delta_net(dev, &a->gdn, a->saves, a->n_saves);
}

/* ---- seq_shift ------------------------------------------------------------------------------------------------------ */

static int shift(struct arle_device *dev, const struct arle_seq_shift_args *a, const struct arle_save *saves, uint32_t n_saves)
{
    const struct arle_batch *b = a->batch;
    size_t row = a->dim * act_size(a->dtype);
    if ((a->dtype != ARLE_F32 && a->dtype != ARLE_BF16) || n_saves > ARLE_MAX_SAVES)
        return -EINVAL;
    count(dev, N_seq_shift, 1);
    for (int64_t s = 0; s < b->n_seqs; s++) {
        char *record = state_at(&a->record, b->slot[s]);
        if (b->cu[s + 1] == b->cu[s])
            continue;
        for (int64_t t = b->cu[s]; t < b->cu[s + 1]; t++)
            memcpy(act_at_w(a->out, a->dtype, t, a->ld_out, 0),
                   t == b->cu[s] ? record : act_at(a->x, a->dtype, t - 1, a->ld_x, 0), row);
        memcpy(record, act_at(a->x, a->dtype, b->cu[s + 1] - 1, a->ld_x, 0), row);
    }
    for (uint32_t k = 0; k < n_saves; k++)
        memcpy(state_at(&a->record, (int32_t)saves[k].slot),
               act_at(a->x, a->dtype, b->cu[saves[k].seq] + (int64_t)saves[k].n_tokens - 1, a->ld_x, 0), row);
    return 0;
}

int cpu_seq_shift(struct arle_device *dev, struct arle_stream *st, const struct arle_seq_shift_args *a)
{
    (void)st;
    return shift(dev, a, NULL, 0);
}

int cpu_seq_shift_keep(struct arle_device *dev, struct arle_stream *st, const struct arle_seq_shift_keep_args *a)
{
    (void)st;
    return shift(dev, &a->shift, a->saves, a->n_saves);
}
