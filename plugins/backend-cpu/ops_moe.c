/*
 * moe_route and moe_experts. Tokens are gathered by expert, each expert runs as a matrix product over its tokens, and every
 * token then adds its own results in the order of its ids: the grouping changes nothing in the sums.
 */
#include "cpu.h"

/* ---- moe_route ------------------------------------------------------------------------------------------------------ */

struct route_job {
    const struct arle_moe_route_args *a;
};

static void scores_of(const struct arle_moe_route_args *a, float *l)
{
    float top = l[0], sum = 0;
    if (a->score == ARLE_MOE_SQRTSOFTPLUS) {
        for (uint32_t e = 0; e < a->n_experts; e++)
            l[e] = sqrtf(softplus_f32(l[e]));
        return;
    }
    for (uint32_t e = 1; e < a->n_experts; e++)
        top = l[e] > top ? l[e] : top;
    for (uint32_t e = 0; e < a->n_experts; e++) {
        l[e] = expf(l[e] - top);
        sum += l[e];
    }
    for (uint32_t e = 0; e < a->n_experts; e++)
        l[e] /= sum;
}

/* The k largest of score + bias, lower index first among equals; NaN scores lose against everything. */
static void select_largest(const struct arle_moe_route_args *a, const float *score, int32_t *ids)
{
    for (uint32_t i = 0; i < a->k; i++) {
        int32_t best = -1;
        float best_value = 0;
        for (uint32_t e = 0; e < a->n_experts; e++) {
            float v = score[e] + (a->bias ? a->bias[e] : 0);
            bool taken = false;
            for (uint32_t p = 0; p < i; p++)
                taken |= ids[p] == (int32_t)e;
            if (!taken && (best < 0 || v > best_value || (isnan(best_value) && !isnan(v)))) {
                best = (int32_t)e;
                best_value = v;
            }
        }
        ids[i] = best;
    }
}

static void route_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct arle_moe_route_args *a = ((const struct route_job *)arg)->a;
    for (int64_t t = part_begin(a->n_tokens, part, n_parts); t < part_begin(a->n_tokens, part + 1, n_parts); t++) {
        float *score = a->scratch + t * a->n_experts, *w = a->weights + t * a->k, sum = 0;
        int32_t *ids = a->ids + t * a->k;
        scores_of(a, score);
        if (a->table != NULL) {
            int32_t id = a->token_ids[t] >= 0 ? a->token_ids[t] : a->sampled[-1 - a->token_ids[t]];
            memcpy(ids, a->table + (int64_t)id * a->k, a->k * sizeof *ids);
        } else {
            select_largest(a, score, ids);
        }
        for (uint32_t i = 0; i < a->k; i++)
            sum += score[ids[i]];
        for (uint32_t i = 0; i < a->k; i++)
            w[i] = score[ids[i]] / sum * a->route_scale;
    }
}

int cpu_moe_route(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_route_args *a)
{
    struct route_job j = { a };
    struct arle_linear_args lin = { .dtype = a->dtype, .out_dtype = ARLE_F32, .n_tokens = a->n_tokens, .x = a->x, .ld_x = a->ld_x,
                                    .w = a->router, .y = a->scratch, .ld_y = a->n_experts };
    if (a->k == 0 || a->k > a->n_experts || a->router == NULL || a->router->n != a->n_experts)
        return -EINVAL;
    int r = cpu_linear(dev, st, &lin);
    if (r < 0)
        return r;
    count(dev, N_moe_route, 1);
    run_parts(dev, a->n_tokens * (double)a->n_experts * (5.0 + a->k), route_part, &j);
    return 0;
}

/* ---- moe_experts ---------------------------------------------------------------------------------------------------- */

struct experts_job {
    struct arle_device *dev;
    const struct arle_moe_experts_args *a;
    uint32_t slots;             /* results per token: k routed, then the shared one */
    int32_t *order;             /* [n_tokens * k] pair indices (t * k + i) by expert, in token order */
    int32_t *tokens, *dest;     /* of one expert's pairs: row of x, row of f and e */
    int32_t *first;             /* [n_experts + 1] */
    float *w1;                  /* weights of one expert's pairs */
    char *f;                    /* [n_tokens * slots][I] act */
    float *e;                   /* [n_tokens * slots][H] */
    int64_t width, hidden;
};

static void sort_by_expert(struct experts_job *j)
{
    const struct arle_moe_experts_args *a = j->a;
    int64_t pairs = (int64_t)a->n_tokens * a->k;
    memset(j->first, 0, (a->n_experts + 1) * sizeof *j->first);
    for (int64_t p = 0; p < pairs; p++)
        j->first[a->ids[p] + 1]++;
    for (uint32_t e = 0; e < a->n_experts; e++)
        j->first[e + 1] += j->first[e];
    for (int64_t p = 0; p < pairs; p++)
        j->order[j->first[a->ids[p]]++] = (int32_t)p;
    for (uint32_t e = a->n_experts; e > 0; e--)        /* every start has moved to its end */
        j->first[e] = j->first[e - 1];
    j->first[0] = 0;
}

/* f and e rows of one expert for the pairs listed in tokens and dest. */
static void run_expert(struct experts_job *j, const struct arle_weight *up, const struct arle_weight *down, uint32_t expert, uint32_t n,
                       const float *row_weight)
{
    const struct arle_moe_experts_args *a = j->a;
    struct mm m = { .form = MM_GATE, .dtype = a->dtype, .out_dtype = a->dtype, .n_rows = n, .x = a->x, .ld_x = a->ld_x,
                    .x_rows = j->tokens, .y_rows = j->dest, .w = up, .expert = expert, .limit = a->limit, .row_weight = row_weight,
                    .y = j->f, .ld_y = j->width };
    mm_run(j->dev, &m);
    struct mm d = { .form = MM_STORE, .dtype = a->dtype, .out_dtype = ARLE_F32, .n_rows = n, .x = j->f, .ld_x = j->width,
                    .x_rows = j->dest, .y_rows = j->dest, .w = down, .expert = expert, .y = j->e, .ld_y = j->hidden };
    mm_run(j->dev, &d);
}

static void sum_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct experts_job *j = arg;
    const struct arle_moe_experts_args *a = j->a;
    float *acc = thread_scratch(j->dev, part), *x = acc + j->hidden;
    for (int64_t t = part_begin(a->n_tokens, part, n_parts); t < part_begin(a->n_tokens, part + 1, n_parts); t++) {
        void *y = act_at_w(a->y, a->dtype, t, a->ld_y, 0);
        memset(acc, 0, (size_t)j->hidden * sizeof *acc);
        if (a->accumulate)
            j->dev->k->to_f32(y, a->dtype, j->hidden, acc);
        for (uint32_t i = 0; i < j->slots && a->down->act_quant; i++) {    /* a quantised linear's output is an act value */
            float *e = j->e + (t * j->slots + i) * j->hidden;
            j->dev->k->store_row(e, j->hidden, x, a->dtype, false);
            j->dev->k->to_f32(x, a->dtype, j->hidden, e);
        }
        for (uint32_t i = 0; i < a->k; i++)
            j->dev->k->axpy(j->hidden, a->weight_first ? 1.0f : a->weights[t * a->k + i], j->e + (t * j->slots + i) * j->hidden, acc);
        if (a->shared_down != NULL) {
            float s = 1.0f;
            if (a->shared_gate != NULL) {
                j->dev->k->to_f32(act_at(a->x, a->dtype, t, a->ld_x, 0), a->dtype, j->hidden, x);
                s = sigmoid_f32(j->dev->k->dot(j->hidden, a->shared_gate, x));
            }
            j->dev->k->axpy(j->hidden, s, j->e + (t * j->slots + a->k) * j->hidden, acc);
        }
        j->dev->k->store_row(acc, j->hidden, y, a->dtype, false);
    }
}

/* Lays the work arrays out in the caller's scratch; false when it is too small. */
static bool lay_out(struct experts_job *j)
{
    const struct arle_moe_experts_args *a = j->a;
    size_t pairs = (size_t)a->n_tokens * a->k, rows = (size_t)a->n_tokens * j->slots, at = 0;
    size_t list = pairs > a->n_tokens ? pairs : a->n_tokens;
    struct { void *out; size_t bytes; } part[] = {
        { &j->f, rows * (size_t)j->width * act_size(a->dtype) }, { &j->e, rows * (size_t)j->hidden * 4 }, { &j->order, pairs * 4 },
        { &j->tokens, list * 4 }, { &j->dest, list * 4 }, { &j->w1, list * 4 }, { &j->first, (a->n_experts + 1) * (size_t)4 },
    };
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        char *p = (char *)a->scratch + at;
        memcpy(part[i].out, &p, sizeof p);
        at += (part[i].bytes + 63) / 64 * 64;
    }
    return a->scratch != NULL && at <= a->scratch_bytes;
}

int cpu_moe_experts(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_experts_args *a)
{
    struct experts_job j = { .dev = dev, .a = a, .slots = a->k + (a->shared_down != NULL) };
    if ((a->dtype != ARLE_F32 && a->dtype != ARLE_BF16) || a->gate_up == NULL || a->down == NULL
        || a->gate_up->role != ARLE_W_EXPERTS_GATE_UP || a->down->role != ARLE_W_EXPERTS || a->gate_up->n_experts != a->n_experts
        || a->down->n_experts != a->n_experts || (a->shared_down != NULL) != (a->shared_gate_up != NULL))
        return -EINVAL;
    if (a->n_tokens == 0)
        return 0;
    j.hidden = a->down->n;
    j.width = a->gate_up->n / 2;
    if (a->shared_gate_up != NULL && a->shared_gate_up->n / 2 > j.width)
        j.width = a->shared_gate_up->n / 2;
    if (!lay_out(&j))
        return -EINVAL;
    for (int64_t p = 0; p < (int64_t)a->n_tokens * a->k; p++)
        if (a->ids[p] < 0 || (uint32_t)a->ids[p] >= a->n_experts)
            return -EINVAL;
    count(dev, N_moe_experts, 1);
    sort_by_expert(&j);
    for (uint32_t e = 0; e < a->n_experts; e++) {
        uint32_t n = (uint32_t)(j.first[e + 1] - j.first[e]);
        for (uint32_t i = 0; i < n; i++) {
            int32_t p = j.order[j.first[e] + (int32_t)i];
            j.tokens[i] = p / (int32_t)a->k;
            j.dest[i] = p / (int32_t)a->k * (int32_t)j.slots + p % (int32_t)a->k;
            j.w1[i] = a->weights[p];
        }
        run_expert(&j, a->gate_up, a->down, e, n, a->weight_first ? j.w1 : NULL);
    }
    if (a->shared_down != NULL) {
        for (uint32_t t = 0; t < a->n_tokens; t++) {
            j.tokens[t] = (int32_t)t;
            j.dest[t] = (int32_t)(t * j.slots + a->k);
        }
        run_expert(&j, a->shared_gate_up, a->shared_down, 0, a->n_tokens, NULL);
    }
    run_parts(dev, a->n_tokens * (double)j.hidden * (a->k + 2) * 0.2, sum_part, &j);
    return 0;
}

int cpu_norm_moe(struct arle_device *dev, struct arle_stream *st, const struct arle_norm_moe_args *a)
{
    const struct arle_moe_route_args *r = &a->route;
    if (a->experts.down == NULL || r->x != a->experts.x || r->ld_x != a->experts.ld_x || r->n_tokens != a->experts.n_tokens)
        return -EINVAL;
    struct arle_rmsnorm_args norm = { .dtype = r->dtype, .n_tokens = r->n_tokens, .dim = (uint32_t)a->experts.down->n, .eps = a->eps,
                                      .w_offset = a->w_offset, .x = a->h, .ld_x = a->ld_h, .w = a->norm_w, .out = (void *)r->x, .ld_out = r->ld_x };
    int e = cpu_rmsnorm(dev, st, &norm);
    if (e == 0)
        e = cpu_moe_route(dev, st, r);
    return e < 0 ? e : cpu_moe_experts(dev, st, &a->experts);
}
