/*
 * One step on the device: the copy in, the model, sampling, the copy out; as a captured graph where that works; and reading
 * the results, which is the one place where the engine thread waits.
 */
#include "sched/sched.h"
#include "util/clock.h"
#include "util/log.h"
#include <math.h>
#include <string.h>

#define KEY_DRAFTS 1u
#define KEY_TOP 2u
#define KEY_DRAW 4u
#define KEY_EDIT 8u

/* ---- launching ---- */

static int enqueue_model(struct engine *e, struct step *s, struct arle_err *err)
{
    uint8_t *d = e->d_in;
    struct results out = results_at(e->d_out, s->n_rows);
    struct arle_step step = {
        .struct_size = sizeof step, .flags = s->drafts ? ARLE_STEP_DRAFTS : 0,
        .batch = { .struct_size = sizeof step.batch, .n_tokens = s->n_tokens, .n_seqs = s->n_seqs, .n_decode = s->n_decode,
                   .max_new = s->max_new, .max_ctx = s->max_ctx, .page_tokens = e->page_tokens, .table_stride = s->stride,
                   .ids = (int32_t *)(d + s->at.ids), .sampled = out.ids, .pos = (int32_t *)(d + s->at.pos),
                   .seq_of = (int32_t *)(d + s->at.seq_of), .cu = (int32_t *)(d + s->at.cu),
                   .ctx_len = (int32_t *)(d + s->at.ctx_len), .slot = (int32_t *)(d + s->at.slot),
                   .block_table = (int32_t *)(d + s->at.table) },
        .n_rows = s->n_rows, .rows = (int32_t *)(d + s->at.rows), .logits = e->d_logits, .ld_logits = e->desc.vocab,
        .drafts = (int32_t *)(e->d_out + e->draft_at), .saves = s->save, .n_saves = s->n_saves,
    };
    int r = e->api->step(e->model, e->stream, &step, err);
    if (r < 0 || s->n_rows == 0)
        return r;
    struct arle_sample_args sample = {
        .n_rows = s->n_rows, .vocab = e->desc.vocab, .n_valid = e->desc.n_valid, .logits = e->d_logits, .ld = e->desc.vocab,
        .rows = (struct arle_sample_row *)(d + s->at.srows), .ids = out.ids, .logprob = out.logprob, .target_logprob = out.target,
        .top_ids = out.top_ids, .top_logprobs = out.top_logprobs, .top_logits = out.top_logit,
        .any_top = s->any_top, .any_draw = s->any_draw, .any_edit = s->any_edit,
    };
    r = e->be->ops->sample(e->dev, e->stream, &sample);
    return r < 0 ? arle_err_set(err, r, "op sample refused a step of %u rows", s->n_rows) : 0;
}

/* 1, 2, 4, 8, then half and whole powers of two. */
uint32_t step_bucket(const struct engine *e, uint32_t n)
{
    uint32_t b = 1;
    while (b < n)
        b = b < 16 ? b * 2 : (b & (b - 1)) == 0 ? b + b / 2 : b / 3 * 4;
    return b < e->cfg.max_seqs ? b : e->cfg.max_seqs;
}

static struct graph *graph_find(struct engine *e, const struct step *s)
{
    struct graph_key key = { s->n_seqs, s->stride, (s->drafts ? KEY_DRAFTS : 0) | (s->any_top ? KEY_TOP : 0) |
                             (s->any_draw ? KEY_DRAW : 0) | (s->any_edit ? KEY_EDIT : 0) };
    for (uint32_t i = 0; i < e->n_graphs; i++)
        if (memcmp(&e->graph[i].key, &key, sizeof key) == 0)
            return &e->graph[i];
    if (e->n_graphs == MAX_GRAPHS)
        return NULL;
    e->graph[e->n_graphs] = (struct graph){ .key = key };
    return &e->graph[e->n_graphs++];
}

static int graph_capture(struct engine *e, struct graph *g, struct step *s, struct arle_err *err)
{
    int r = e->be->graph_begin(e->dev, e->stream, err);
    if (r < 0)
        return r;
    struct arle_err inner = ARLE_ERR_INIT;
    r = enqueue_model(e, s, &inner);
    int r_end = e->be->graph_end(e->dev, e->stream, &g->g, r < 0 ? NULL : err);
    if (r < 0) {
        *err = inner;
        if (r_end == 0)
            e->be->graph_destroy(e->dev, g->g);
        g->g = NULL;
        return r;
    }
    return r_end;
}

/*
 * A decode shape runs plainly the first time, which lets libraries set themselves up, is captured the second time and
 * replayed from then on. Shapes that cannot be captured go on plainly.
 */
static int enqueue_step(struct engine *e, struct step *s, struct arle_err *err)
{
    struct graph *g = s->graph ? graph_find(e, s) : NULL;
    if (g == NULL || g->refused || g->seen++ == 0)
        return enqueue_model(e, s, err);
    if (g->g == NULL) {
        int r = graph_capture(e, g, s, err);
        if (r == -EIO)
            return r;
        if (r < 0) {
            g->refused = true;
            log_warn("sched", "graph_refused", "rows=%u reason=\"%s\"", s->n_seqs, err->msg);
            return enqueue_model(e, s, err);
        }
        e->st.graph_captures++;
    }
    e->st.graph_launches++;
    int r = e->be->graph_launch(e->dev, g->g, e->stream);
    return r < 0 ? arle_err_set(err, r, "launch of a captured step of %u rows failed", s->n_seqs) : 0;
}

void step_graphs_free(struct engine *e)
{
    for (uint32_t i = 0; i < e->n_graphs; i++)
        if (e->graph[i].g != NULL)
            e->be->graph_destroy(e->dev, e->graph[i].g);
    e->n_graphs = 0;
}

/* Sampled tokens join their histories on the device, so that penalties see them even when the host does not know them yet. */
static int append_histories(struct engine *e, struct step *s)
{
    struct results out = results_at(e->d_out, s->n_rows);
    int r = 0;
    for (uint32_t i = 0; i < s->n_real_rows && r == 0; i++) {
        const struct row *row = &s->row[i];
        if (row->sample && row->seq->hist >= 0 && row->pos + 1 < e->hist_stride)
            r = e->mem->copy(e->dev, e->stream, e->d_hist + (size_t)row->seq->hist * e->hist_stride + row->pos + 1, out.ids + i,
                             sizeof(int32_t), ARLE_COPY_D2D);
    }
    return r;
}

static int enqueue_all(struct engine *e, struct step *s, struct arle_err *err)
{
    struct results out = results_at(e->d_out, s->n_rows);
    int r = e->mem->copy(e->dev, e->stream, e->d_in, s->in, s->at.end, ARLE_COPY_H2D);
    if (r == 0)
        r = enqueue_step(e, s, err);
    if (r == 0 && s->any_edit)
        r = append_histories(e, s);
    if (r == 0 && s->n_rows > 0)
        r = e->mem->copy(e->dev, e->stream, s->out, e->d_out, s->any_top ? out.bytes_top : out.bytes, ARLE_COPY_D2H);
    if (r == 0 && s->drafts)
        r = e->mem->copy(e->dev, e->stream, s->out + e->draft_at, e->d_out + e->draft_at, s->n_tokens * 4, ARLE_COPY_D2H);
    return r == 0 ? e->mem->event_record(e->dev, s->done, e->stream) : r;
}

void step_abandon(struct engine *e, struct step *s, int r)
{
    s->in_flight = false;
    for (uint32_t i = 0; i < s->n_parts; i++) {
        seq_finish(e, s->part[i].seq, FINISH_ERROR, r);
        if (--s->part[i].seq->inflight == 0 && s->part[i].seq->reaped)
            seq_release(e, s->part[i].seq);
    }
}

static void step_failed(struct engine *e, struct step *s, int r, const struct arle_err *err)
{
    log_error("sched", "step_failed", "step=%llu tokens=%u errno=%d reason=\"%s\"", (unsigned long long)s->no, s->n_tokens, -r,
              err->msg);
    step_abandon(e, s, r);
}

int step_launch(struct engine *e, struct step *s)
{
    struct arle_err err = ARLE_ERR_INIT;
    /* From before the first call: a backend without a queue of its own does all the work in there. */
    s->launch_us = clock_mono_us();
    atomic_store_explicit(&e->step_started_us, s->launch_us, memory_order_relaxed);     /* read by the watchdog */
    int r = enqueue_all(e, s, &err);
    atomic_store_explicit(&e->step_started_us, 0, memory_order_relaxed);
    e->device_us += clock_mono_us() - s->launch_us;
    if (r < 0) {
        step_failed(e, s, r, &err);
        if (r == -EIO || (e->be->dead != NULL && e->be->dead(e->dev, &err) < 0))
            engine_die(e, &err);
        return r;
    }
    s->in_flight = true;
    for (uint32_t i = 0, saved = 0; i < s->n_parts; i++) {
        struct seq *sq = s->part[i].seq;
        for (; saved < s->n_saves && s->save[saved].seq == i; saved++)      /* in the order of parts */
            kv_seq_saved(sq->kv, s->part[i].from + s->save[saved].n_tokens, saved);
        kv_seq_computed(sq->kv, sq->n_computed);
        e->admit_again |= e->n_followers > 0 && s->part[i].n > 1;      /* it may have got to where somebody waits for it */
        queue_charge(sq, s->part[i].n);
    }
    e->st.steps++;
    e->st.step_tokens += s->n_tokens - (s->n_seqs - s->n_parts);
    e->st.decode_rows += s->graph ? s->n_parts : s->n_decode;
    e->st.prefill_tokens += s->n_prefill;
    return 0;
}

/* ---- collecting ---- */

/** The one wait of a step: until its results are in host memory. */
int engine_wait_step(struct engine *e, struct step *s, struct arle_err *err)
{
    int64_t t0 = clock_mono_us();
    atomic_store_explicit(&e->step_started_us, s->launch_us, memory_order_relaxed);     /* read by the watchdog */
    int r = e->mem->event_sync(e->dev, s->done, err);
    atomic_store_explicit(&e->step_started_us, 0, memory_order_relaxed);
    /* A step launched ahead waits for the one before; that time is not its own. */
    int64_t now = clock_mono_us(), us = now - (s->launch_us > e->last_done_us ? s->launch_us : e->last_done_us);
    e->device_us += now - t0;
    e->st.collect_us_sum += (uint64_t)(now - t0);
    e->st.step_us_sum += (uint64_t)us;
    e->last_done_us = now;
    hist_add(&e->hists.step, us, 1);
    e->st.slow_steps += us > e->cfg.watchdog_ms * 1000;
    if (s->n_prefill > 0 && s->n_prefill == s->n_tokens)
        kv_report_prefill(e->kv, s->n_prefill, us);
    return r;
}

static void fill_tops(struct token_event *ev, const struct results *res, uint32_t r, uint32_t n_top)
{
    ev->n_top = (uint16_t)n_top;
    memcpy(ev->top_ids, res->top_ids + (size_t)r * ARLE_MAX_TOP, n_top * sizeof(int32_t));
    memcpy(ev->top_logprobs, res->top_logprobs + (size_t)r * ARLE_MAX_TOP, n_top * sizeof(float));
}

static void emit_with_tops(struct engine *e, struct seq *sq, const struct results *res, uint32_t r, float logprob)
{
    struct token_event ev = { .kind = EV_TOKEN, .id = res->ids[r], .pos = sq->n_tokens, .logprob = logprob,
                              .top_logit = res->top_logit[r] };
    fill_tops(&ev, res, r, sq->rq->sampling.n_top);
    seq_emit(e, sq, &ev);
}

static bool is_stop(const struct engine *e, const struct request *rq, int32_t id)
{
    for (uint32_t i = 0; i < rq->n_stop_ids; i++)
        if (rq->stop_ids[i] == id)
            return true;
    for (uint32_t i = 0; i < e->gen.n_eos && !rq->ignore_eos; i++)
        if (e->gen.eos[i] == id)
            return true;
    return false;
}

/* When the results that are being given out came, and the gaps to the tokens before: most rows of a step have the same one. */
struct arrival { int64_t now, gap_us; uint64_t n_gaps; };

static void gaps_flush(struct engine *e, struct arrival *at)
{
    if (at->n_gaps == 0)
        return;
    hist_add(&e->hists.inter_token, at->gap_us, at->n_gaps);
    if (at->gap_us > e->st.longest_gap_us)
        e->st.longest_gap_us = at->gap_us;
    at->n_gaps = 0;
}

static void count_token(struct engine *e, struct seq *sq, struct arrival *at)
{
    struct request *rq = sq->rq;
    e->st.completion_tokens++;
    if (sq->last_token_us != 0) {
        int64_t gap_us = at->now - sq->last_token_us;
        if (gap_us != at->gap_us)
            gaps_flush(e, at);
        at->gap_us = gap_us;
        at->n_gaps++;
    } else if (rq->usage.first_token_us == 0) {
        rq->usage.first_token_us = at->now - rq->submit_us > 0 ? at->now - rq->submit_us : 1;
        hist_add(&e->hists.first_token, rq->usage.first_token_us, 1);
    }
    sq->last_token_us = at->now;
    queue_charge(sq, 1);
}

static void take_token(struct engine *e, struct seq *sq, const struct results *res, uint32_t r, struct arrival *at)
{
    struct request *rq = sq->rq;
    int32_t id = res->ids[r];
    sq->pending--;
    if (sq->state == SEQ_DONE)
        return;             /* it ended in the step before this one: thrown away */
    if (id < 0 || (uint32_t)id >= e->desc.n_valid || !isfinite(res->top_logit[r])) {
        log_warn("sched", "no_token", "req=%llx id=%d reason=\"logits are not finite\"", (unsigned long long)rq->id, id);
        seq_finish(e, sq, FINISH_ERROR, -EDOM);
        return;
    }
    float logprob = rq->sampling.want_logprobs ? res->logprob[r] : NAN;
    if (rq->sampling.n_top == 0)
        seq_emit_token(e, sq, id, logprob, res->top_logit[r]);
    else
        emit_with_tops(e, sq, res, r, logprob);
    sq->tokens[sq->n_tokens++] = id;
    count_token(e, sq, at);
    int pushed = sq->kv != NULL ? kv_seq_push(sq->kv, id) : 0;
    if (is_stop(e, rq, id))
        seq_finish(e, sq, FINISH_STOP, 0);
    else if (sq->n_tokens == sq->n_limit)
        seq_finish(e, sq, FINISH_LENGTH, 0);
    else if (pushed < 0)
        seq_finish(e, sq, FINISH_ERROR, pushed);
}

static void take_prompt_row(struct engine *e, const struct row *row, const struct results *res, uint32_t r)
{
    struct seq *sq = row->seq;
    if (sq->state == SEQ_DONE)
        return;
    struct token_event ev = { .kind = EV_PROMPT, .id = sq->tokens[row->pos + 1], .pos = row->pos + 1, .logprob = res->target[r],
                              .top_logit = res->top_logit[r] };
    if (sq->rq->sampling.n_top > 0)
        fill_tops(&ev, res, r, sq->rq->sampling.n_top);
    seq_emit(e, sq, &ev);
    sq->n_reported = row->pos + 2;
}

static void take_drafts(struct engine *e, const struct part *p, const int32_t *drafts)
{
    struct seq *sq = p->seq;
    if (!sq->rq->drafts || sq->state == SEQ_DONE)
        return;
    for (uint32_t t = 0; t < p->n; t++) {
        uint32_t pos = p->from + t;
        if (pos < 1 || pos < sq->n_drafted)
            continue;
        struct token_event ev = { .kind = EV_DRAFT, .id = drafts[t], .pos = pos + 1, .logprob = NAN, .top_logit = NAN };
        seq_emit(e, sq, &ev);
        sq->n_drafted = pos + 1;
    }
}

static void leave_step(struct engine *e, const struct part *p)
{
    struct seq *sq = p->seq;
    if (sq->state != SEQ_DONE && sq->rq->max_new == 0 && p->from + p->n == sq->n_prompt)
        seq_finish(e, sq, FINISH_LENGTH, 0);
    if (--sq->inflight == 0 && sq->reaped)
        seq_release(e, sq);
}

/* What taking a token will touch: the request, and where the next record and the next token go. */
static void prefetch_rows(const struct step *s, uint32_t i)
{
    if (i + PREFETCH_FAR < s->n_real_rows)
        prefetch_lines(s->row[i + PREFETCH_FAR].seq, CACHE_LINE);
    if (i + PREFETCH_NEAR < s->n_real_rows) {
        const struct seq *sq = s->row[i + PREFETCH_NEAR].seq;
        prefetch_lines(sq->rq, REQUEST_HOT);
        __builtin_prefetch(sq->tokens + sq->n_tokens, 1);
        kv_seq_prefetch(sq->kv);
    }
    if (i + PREFETCH_NEAR / 2 < s->n_real_rows) {
        const struct seq *sq = s->row[i + PREFETCH_NEAR / 2].seq;
        __builtin_prefetch(sq->rq->ring.bytes + sq->rq->ring.tail, 1);
        kv_seq_prefetch_end(sq->kv);
    }
}

int step_collect(struct engine *e, struct step *s)
{
    struct arle_err err = ARLE_ERR_INIT;
    int r = engine_wait_step(e, s, &err);
    s->in_flight = false;
    if (r < 0) {
        step_failed(e, s, r, &err);
        engine_die(e, &err);
        return r;
    }
    struct results res = results_at(s->out, s->n_rows);
    const int32_t *drafts = (const int32_t *)(s->out + e->draft_at);
    struct arrival at = { .now = engine_now(e) };
    if (s->drafts)          /* before the tokens: the last token may end the answer */
        for (uint32_t i = 0, first = 0; i < s->n_parts; first += s->part[i++].n)
            take_drafts(e, &s->part[i], drafts + first);
    for (uint32_t i = 0; i < s->n_real_rows; i++) {
        prefetch_rows(s, i);
        if (s->row[i].sample)
            take_token(e, s->row[i].seq, &res, i, &at);
        else
            take_prompt_row(e, &s->row[i], &res, i);
    }
    gaps_flush(e, &at);
    for (uint32_t i = 0; i < s->n_parts; i++)
        leave_step(e, &s->part[i]);
    seq_flush_events(e);
    return 0;
}
