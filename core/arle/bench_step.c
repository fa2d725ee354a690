/* `arle bench step` and `prefill`: times of the engine's own steps, beside the ceilings of the device. */
#include "arle/bench.h"
#include "kv/kv.h"
#include "util/clock.h"
#include <stdlib.h>
#include <string.h>

static uint32_t largest(const uint32_t *list, uint32_t n)
{
    uint32_t max = 0;
    for (uint32_t i = 0; i < n; i++)
        if (list[i] > max)
            max = list[i];
    return max;
}

/* Bytes that a decode step must move at least: weights once, and per sequence its cache entries and its state, there and back.
 * Of routed experts those of one row are counted, which is too few for larger batches. */
static double step_bytes(const struct engine *e, uint32_t batch, uint32_t context)
{
    const struct arle_model_desc *d = engine_model(e);
    struct engine_stats st;
    double per_seq = 0;
    engine_stat(e, &st);
    for (uint32_t i = 0; i < d->n_groups; i++)
        per_seq += d->groups[i].kind == ARLE_CACHE_PAGED ? (double)d->groups[i].page_bytes / st.page_tokens * context
                                                         : 2.0 * (double)d->groups[i].record_bytes;
    return (double)d->step_weight_bytes + batch * per_seq;
}

static void release(struct request **rq, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        request_unref(rq[i]);
}

/* One step. False when there is none to make: the device died, or the requests ended with an error, which the log has. */
static bool turn(struct engine *e)
{
    if (engine_turn(e) > 0)
        return true;
    fprintf(stderr, "arle bench: the engine stopped before the measurement ended; the reason is logged above\n");
    return false;
}

/* Turns the engine until every request has its first token. */
static bool run_to_decode(struct engine *e, uint32_t batch)
{
    struct engine_stats st;
    uint64_t last;
    do {
        engine_stat(e, &st);
        last = st.completion_tokens;
        if (!turn(e))
            return false;
        engine_stat(e, &st);
    } while (st.completion_tokens - last < batch);
    return true;
}

static int step_case(struct bench *b, struct engine *e, uint32_t batch, uint32_t context)
{
    uint32_t n_valid = engine_model(e)->n_valid;
    struct request **rq = calloc(batch, sizeof *rq);
    int32_t *prompt = malloc((size_t)context * sizeof *prompt);
    double *us = calloc((size_t)b->runs, sizeof *us);
    bool ok = rq != NULL && prompt != NULL && us != NULL;
    for (uint32_t i = 0; ok && i < batch; i++) {
        bench_prompt(prompt, context, i + 1, n_valid);
        rq[i] = bench_submit(e, prompt, context, (uint32_t)(b->runs + b->warmups) + 16 + context / (uint32_t)b->chunk * batch, NULL, 0);
        ok = rq[i] != NULL;
    }
    ok = ok && run_to_decode(e, batch);
    for (long long i = 0; ok && i < b->warmups; i++)
        ok = turn(e);
    struct engine_stats was, st;
    engine_stat(e, &was);
    for (long long i = 0; ok && i < b->runs; i++) {
        int64_t t0 = clock_mono_us();
        ok = turn(e);
        us[i] = (double)(clock_mono_us() - t0);
    }
    engine_stat(e, &st);
    if (ok && bench_ceilings(b) == 0) {
        json_object *o = bench_line(b, "step");
        json_object_object_add(o, "compute", json_object_new_string(engine_compute(e)));
        bench_add(o, "batch", batch);
        bench_add(o, "context", context);
        bench_add(o, "warmups", (double)b->warmups);
        double s = bench_times(o, us, (size_t)b->runs) / 1e6, bytes = step_bytes(e, batch, context);
        bench_add(o, "tokens_s", batch / s);
        bench_add(o, "bytes_per_token", bytes / batch);
        bench_add(o, "bytes_s", bytes / s);
        bench_add(o, "ceiling_read_bytes_s", b->read_bytes_s);
        bench_add(o, "of_ceiling", bytes / s / b->read_bytes_s);
        bench_add(o, "host_us", (double)(st.plan_us_sum - was.plan_us_sum) / (double)b->runs);
        bench_add(o, "graph_launches", (double)(st.graph_launches - was.graph_launches));
        bench_add(o, "ahead_steps", (double)(st.ahead_steps - was.ahead_steps));
        bench_print(b, o);
    }
    if (rq != NULL)
        release(rq, batch);
    while (engine_turn(e) > 0)
        ;
    free(rq);
    free(prompt);
    free(us);
    return ok ? 0 : EXIT_FAILED;
}

int bench_step(struct bench *b)
{
    struct engine *e = NULL;
    uint32_t batch = largest(b->batch, b->n_batch), context = largest(b->context, b->n_context);
    int status = bench_need_model(b);
    if (status == 0)
        status = bench_ceilings(b);
    if (status == 0)
        status = bench_engine(b, batch, context + (uint32_t)(b->runs + b->warmups) + 32 + context / (uint32_t)b->chunk * batch, false, &e);
    for (uint32_t i = 0; status == 0 && i < b->n_batch; i++)
        for (uint32_t k = 0; status == 0 && k < b->n_context; k++)
            status = step_case(b, e, b->batch[i], b->context[k]);
    engine_close(e);
    return status;
}

/* ---- prefill ---- */

/* Multiply-adds of the weights that a prompt token passes: all that a decode row reads but the output head. Attention and
 * the delta rule come on top, so the rate is a lower bound. */
static double flop_per_token(const struct arle_model_desc *d)
{
    double active = (double)d->n_params * (double)d->step_weight_bytes / (double)d->weight_bytes;
    return 2 * (active - (double)d->vocab * d->hidden);
}

static int prefill_once(struct engine *e, const int32_t *prompt, uint32_t n, double *us)
{
    struct token_event ev;
    int64_t t0 = clock_mono_us();
    struct request *rq = bench_submit(e, prompt, n, 1, NULL, 0);
    bool ok = rq != NULL;
    int got = 0;
    while (ok && got != 1) {
        ok = turn(e);
        while (ok && got != 1 && (got = request_next(rq, &ev)) == 1 && ev.kind != EV_TOKEN)
            got = 0;
    }
    *us = (double)(clock_mono_us() - t0);
    request_unref(rq);
    while (engine_turn(e) > 0)
        ;
    return ok ? 0 : EXIT_FAILED;
}

static int prefill_case(struct bench *b, struct engine *e, uint32_t n)
{
    const struct arle_model_desc *d = engine_model(e);
    int32_t *prompt = malloc((size_t)n * sizeof *prompt);
    double *us = calloc((size_t)b->runs, sizeof *us), ignored;
    int status = prompt == NULL || us == NULL ? EXIT_FAILED : 0;
    for (long long i = 0; status == 0 && i < b->warmups; i++) {
        bench_prompt(prompt, n, (uint64_t)i + 1, d->n_valid);
        status = prefill_once(e, prompt, n, &ignored);
    }
    for (long long i = 0; status == 0 && i < b->runs; i++) {
        bench_prompt(prompt, n, (uint64_t)i + 1000, d->n_valid);
        status = prefill_once(e, prompt, n, &us[i]);
    }
    if (status == 0)
        status = bench_ceilings(b);
    if (status == 0) {
        json_object *o = bench_line(b, "prefill");
        json_object_object_add(o, "compute", json_object_new_string(engine_compute(e)));
        bench_add(o, "prompt", n);
        bench_add(o, "chunk", (double)b->chunk);
        bench_add(o, "warmups", (double)b->warmups);
        double s = bench_times(o, us, (size_t)b->runs) / 1e6;
        bench_add(o, "tokens_s", n / s);
        bench_add(o, "flop_s", flop_per_token(d) * n / s);
        bench_add(o, "ceiling_flop_s", b->bf16_flop_s);
        bench_add(o, "of_ceiling", flop_per_token(d) * n / s / b->bf16_flop_s);
        bench_print(b, o);
    }
    free(prompt);
    free(us);
    return status;
}

int bench_prefill(struct bench *b)
{
    struct engine *e = NULL;
    int status = bench_need_model(b);
    if (status == 0)
        status = bench_ceilings(b);
    if (status == 0)
        status = bench_engine(b, 1, largest(b->context, b->n_context) + 64, false, &e);
    for (uint32_t k = 0; status == 0 && k < b->n_context; k++)
        status = prefill_case(b, e, b->context[k]);
    engine_close(e);
    return status;
}

int bench_ceiling(struct bench *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    const char *name = args_str(b->args, "backend");
    int r = registry_open(&b->reg, b->cfg, REGISTRY_LENIENT, &err);
    if (r == 0)
        r = registry_backend(b->reg, name != NULL ? name : "auto", &b->backend, &err);
    if (r == 0) {
        const struct arle_backend_api *be = b->backend->ops;
        b->info.struct_size = sizeof b->info;
        r = be->device_info(b->backend->ctx, 0, &b->info, &err);
    }
    if (r < 0)
        return cmd_fail(b->args, &err);
    int status = bench_ceilings(b);
    if (status != 0)
        return status;
    json_object *o = bench_line(b, "ceiling");
    bench_add(o, "read_bytes_s", b->read_bytes_s);
    bench_add(o, "bf16_flop_s", b->bf16_flop_s);
    bench_print(b, o);
    return 0;
}
