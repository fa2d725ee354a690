/*
 * What a step does: decode rows first, then prefill chunks within the token budget, written into one staging buffer that
 * goes to the device in one copy. No allocation; all arrays were sized at open.
 */
#include "sched/sched.h"
#include <string.h>

static size_t place(size_t *at, size_t n, size_t size)
{
    size_t here = *at;
    *at = (here + n * size + 15) & ~(size_t)15;
    return here;
}

struct layout plan_layout(uint32_t n_tokens, uint32_t n_seqs, uint32_t n_rows, uint32_t stride, uint32_t n_bias)
{
    struct layout l;
    size_t at = 0;
    l.table = place(&at, (size_t)n_seqs * stride, 4);
    l.ids = place(&at, n_tokens, 4);
    l.pos = place(&at, n_tokens, 4);
    l.seq_of = place(&at, n_tokens, 4);
    l.cu = place(&at, n_seqs + 1, 4);
    l.ctx_len = place(&at, n_seqs, 4);
    l.slot = place(&at, n_seqs, 4);
    l.rows = place(&at, n_rows, 4);
    l.srows = place(&at, n_rows, sizeof(struct arle_sample_row));
    l.bias = place(&at, n_bias, sizeof(struct arle_bias));      /* last: its size may vary within a captured step */
    l.end = at;
    return l;
}

static size_t result_rows(uint32_t n_rows)
{
    return (n_rows + 3u) & ~3u;             /* arrays stay 16-byte aligned */
}

size_t results_bytes(uint32_t n_rows)
{
    return result_rows(n_rows) * (16 + 8 * ARLE_MAX_TOP);
}

struct results results_at(uint8_t *base, uint32_t n_rows)
{
    struct results r;
    size_t n = result_rows(n_rows);
    r.ids = (int32_t *)base;
    r.logprob = (float *)(base + n * 4);
    r.target = (float *)(base + n * 8);
    r.top_logit = (float *)(base + n * 12);
    r.bytes = n * 16;
    r.top_ids = (int32_t *)(base + r.bytes);
    r.top_logprobs = (float *)(base + r.bytes + n * 4 * ARLE_MAX_TOP);
    r.bytes_top = results_bytes(n_rows);
    return r;
}

/* Positions whose tokens are known or will be when the newest step has run. */
static uint32_t available(const struct seq *sq)
{
    return sq->n_tokens + sq->pending;
}

bool seq_ready(const struct seq *sq)
{
    uint32_t avail = available(sq);
    /* Once the last token is sampled nothing needs to be computed; a request for the prompt alone ends with it. */
    return sq->n_computed < avail && (avail < sq->n_limit || sq->rq->max_new == 0);
}

/* ---- choosing ---- */

static bool wants_sample(const struct seq *sq, uint32_t end)
{
    return sq->rq->max_new > 0 && end == available(sq);
}

/* First position of the part whose log-probability of the next prompt token was asked for and not given yet. */
static uint32_t prompt_row_from(const struct seq *sq, uint32_t from)
{
    uint32_t first = sq->n_reported > 0 ? sq->n_reported - 1 : 0;
    return first > from ? first : from;
}

static uint32_t prompt_rows(const struct seq *sq, uint32_t from, uint32_t end)
{
    uint32_t last = sq->n_prompt - 1, first = prompt_row_from(sq, from);
    if (!sq->rq->prompt_logprobs || sq->index > 0)
        return 0;
    if (end < last)
        last = end;
    return last > first ? last - first : 0;
}

static bool add_part(struct engine *e, struct step *s, struct seq *sq, uint32_t n)
{
    uint32_t from = sq->n_computed, end = from + n, first = prompt_row_from(sq, from), n_prompt = prompt_rows(sq, from, end);
    bool sample = wants_sample(sq, end);
    uint32_t n_bias = sample ? sq->rq->sampling.n_bias : 0;
    if (s->n_parts == e->cfg.max_seqs || s->n_rows + n_prompt + sample > e->max_rows || s->n_bias + n_bias > e->bias_cap)
        return false;
    s->part[s->n_parts++] = (struct part){ sq, from, n };
    for (uint32_t i = 0; i < n_prompt; i++)
        s->row[s->n_rows++] = (struct row){ sq, first + i, false };
    if (sample)
        s->row[s->n_rows++] = (struct row){ sq, end - 1, true };
    s->n_sampled += sample;
    s->n_bias += n_bias;
    s->n_tokens += n;
    s->drafts |= sq->rq->drafts;
    if (n > s->max_new)
        s->max_new = n;
    if (end > s->max_ctx)
        s->max_ctx = end;
    return true;
}

static void choose_decode(struct engine *e, struct step *s)
{
    for (uint32_t i = 0; i < e->n_run; i++) {
        struct seq *sq = e->run[i];
        uint32_t n_pages;
        if (!seq_ready(sq) || available(sq) - sq->n_computed != 1)
            continue;
        kv_seq_pages(sq->kv, &n_pages);
        if (sq->n_computed < n_pages * e->page_tokens && add_part(e, s, sq, 1))
            s->n_decode++;
    }
}

static void choose_prefill(struct engine *e, struct step *s)
{
    for (uint32_t i = 0; i < e->n_run && s->n_tokens < e->cfg.max_tokens; i++) {
        struct seq *sq = e->run[i];
        uint32_t left = available(sq) - sq->n_computed, budget = e->cfg.max_tokens - s->n_tokens, from = sq->n_computed;
        if (!seq_ready(sq) || left <= 1)
            continue;
        if (left > budget)
            left = budget;
        if (sq->rq->prompt_logprobs && left > e->max_rows - s->n_rows)
            left = e->max_rows - s->n_rows;
        struct kv_saves saves;
        uint32_t end = kv_seq_cut(sq->kv, from, from + left, e->n_side - s->n_saves, &saves);
        if (end == from || !add_part(e, s, sq, end - from))
            continue;
        s->n_prefill += end - from;
        for (uint32_t k = 0; k < saves.n; k++, s->n_saves++)
            s->save[s->n_saves] = (struct arle_save){ s->n_parts - 1, saves.pos[k] - from, (uint32_t)kv_side_slot(e->kv, s->n_saves) };
    }
}

/* ---- writing ---- */

static uint32_t pow2_at_least(uint32_t n, uint32_t from)
{
    while (from < n)
        from *= 2;
    return from;
}

/* Block tables are as wide as the longest sequence needs, in powers of two: few widths to capture, and little to copy. */
static uint32_t table_stride(const struct engine *e, const struct step *s)
{
    uint32_t stride = pow2_at_least((s->max_ctx + e->page_tokens - 1) / e->page_tokens, 64);
    return stride < e->max_stride ? stride : e->max_stride;
}

/* The arrays of a step in its staging buffer. */
struct staged {
    int32_t *restrict table, *restrict ids, *restrict pos, *restrict seq_of, *restrict cu, *restrict ctx_len, *restrict slot, *restrict rows;
    struct arle_sample_row *restrict srows;
    struct arle_bias *restrict bias;
};

static struct staged staged_at(uint8_t *in, const struct layout *at)
{
    return (struct staged){
        .table = (int32_t *)(in + at->table), .ids = (int32_t *)(in + at->ids), .pos = (int32_t *)(in + at->pos),
        .seq_of = (int32_t *)(in + at->seq_of), .cu = (int32_t *)(in + at->cu), .ctx_len = (int32_t *)(in + at->ctx_len),
        .slot = (int32_t *)(in + at->slot), .rows = (int32_t *)(in + at->rows),
        .srows = (struct arle_sample_row *)(in + at->srows), .bias = (struct arle_bias *)(in + at->bias),
    };
}

/* Copies what the row does not hold yet from the last time that this staging buffer was used. */
static void write_table(struct step *s, const struct staged *o, const struct seq *sq, uint32_t i)
{
    uint32_t n_pages;
    const int32_t *pages = kv_seq_pages(sq->kv, &n_pages);
    struct shadow *was = &s->shadow[i];
    if (n_pages > s->stride)
        n_pages = s->stride;
    if (was->seated != sq->seated)
        *was = (struct shadow){ sq->seated, 0 };
    if (was->n < n_pages)
        memcpy(o->table + (size_t)i * s->stride + was->n, pages + was->n, (n_pages - was->n) * sizeof *pages);
    was->n = n_pages;
}

static inline void write_token(const struct staged *o, const struct seq *sq, uint32_t i, uint32_t t, uint32_t at)
{
    o->ids[t] = at < sq->n_tokens ? sq->tokens[at] : -1 - (int32_t)sq->pending_row;
    o->pos[t] = (int32_t)at;
    o->seq_of[t] = (int32_t)i;
}

/* The sequence then stands where it will be when the step has run. */
static void write_part(struct step *s, const struct staged *o, uint32_t i, uint32_t first)
{
    const struct part p = s->part[i];
    struct seq *sq = p.seq;
    write_token(o, sq, i, first, p.from);
    for (uint32_t t = 1; t < p.n; t++)
        write_token(o, sq, i, first + t, p.from + t);
    write_table(s, o, sq, i);
    o->cu[i + 1] = (int32_t)(first + p.n);
    o->ctx_len[i] = (int32_t)(p.from + p.n);
    o->slot[i] = kv_seq_slot(sq->kv);
    sq->n_computed += p.n;
    sq->inflight++;
}

/* Rows that fill a bucket: one token of nobody, at page 0 and slot 0, result thrown away. */
static void write_padding(struct step *s, const struct staged *o, uint32_t i)
{
    o->ids[i] = 0;
    o->pos[i] = 0;
    o->seq_of[i] = (int32_t)i;
    memset(o->table + (size_t)i * s->stride, 0, s->stride * sizeof(int32_t));
    s->shadow[i].seated = 0;
    o->cu[i + 1] = (int32_t)i + 1;
    o->ctx_len[i] = 1;
    o->slot[i] = 0;
    o->rows[i] = (int32_t)i;
    o->srows[i] = (struct arle_sample_row){ .top_p = 1, .repetition = 1, .target = -1 };
}

/* After the parts: a token that is sampled now is pending for the next step, not for this one. */
static void write_rows(struct engine *e, struct step *s, const struct staged *o)
{
    uint32_t part = 0, n_bias = 0;
    bool any_top = false, any_draw = false, any_edit = false;
    for (uint32_t r = 0; r < s->n_real_rows; r++) {
        const struct row row = s->row[r];
        struct arle_sample_row *out = &o->srows[r];
        while (s->part[part].seq != row.seq)        /* rows are in the order of their parts */
            part++;
        o->rows[r] = o->cu[part] + (int32_t)(row.pos - s->part[part].from);
        sample_row(e, &row, out);
        if (out->n_bias > 0) {
            memcpy(o->bias + n_bias, row.seq->rq->bias, out->n_bias * sizeof *o->bias);
            out->bias = (const struct arle_bias *)(e->d_in + s->at.bias) + n_bias;
            n_bias += out->n_bias;
        }
        any_top |= out->n_top > 0;
        any_draw |= out->temperature > 0;
        any_edit |= out->n_bias > 0 || out->history != NULL;
        if (row.sample) {
            row.seq->pending++;
            row.seq->pending_row = r;
        }
    }
    s->any_top = any_top;
    s->any_draw = any_draw;
    s->any_edit = any_edit;
}

bool plan_step(struct engine *e, struct step *s)
{
    s->n_tokens = s->n_seqs = s->n_sampled = s->n_decode = s->n_rows = s->n_parts = s->n_prefill = s->max_new = s->max_ctx = s->n_bias = s->n_saves = 0;
    s->drafts = false;
    choose_decode(e, s);
    if (s->n_parts < e->n_run)
        choose_prefill(e, s);
    if (s->n_parts == 0)
        return false;
    s->n_seqs = s->n_parts;
    s->n_real_rows = s->n_rows;
    s->stride = table_stride(e, s);
    s->graph = e->graphs_on && s->n_decode == s->n_parts && s->n_rows == s->n_tokens && s->n_sampled == s->n_rows;
    if (s->graph) {
        uint64_t widest = (uint64_t)s->stride * e->page_tokens;
        s->n_seqs = s->n_tokens = s->n_rows = s->n_decode = step_bucket(e, s->n_parts);
        s->max_ctx = widest < e->context ? (uint32_t)widest : e->context;
    }
    s->at = plan_layout(s->n_tokens, s->n_seqs, s->n_rows, s->stride, s->n_bias);
    /* Tables come first in the buffer: a row stays where it is until tables get wider, or something else lay there.
     * Rows that hold something are the first ones, so the scan ends at the first that holds nothing. */
    if (s->stride != s->shadow_stride)
        memset(s->shadow, 0, e->cfg.max_seqs * sizeof *s->shadow);
    for (uint32_t i = s->n_seqs; i < e->cfg.max_seqs && s->shadow[i].seated != 0; i++)
        s->shadow[i].seated = 0;
    s->shadow_stride = s->stride;
    const struct staged o = staged_at(s->in, &s->at);
    o.cu[0] = 0;
    uint32_t first = 0;
    for (uint32_t i = 0; i < s->n_parts; first += s->part[i++].n)
        write_part(s, &o, i, first);
    for (uint32_t i = s->n_parts; i < s->n_seqs; i++)
        write_padding(s, &o, i);
    write_rows(e, s, &o);
    s->no = ++e->step_no;
    return true;
}
