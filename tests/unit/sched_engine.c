/* The engine against the fake backend and model, in virtual time: tokens, sampling plumbing, run-ahead, graphs, failures. */
#include "kv/kv.h"
#include "sched_fake.h"
#include "tap.h"

static struct arle_device dev;
static struct engine *eng;
static struct arle_err err;

static void open_with(struct engine_config cfg)
{
    eng = NULL;
    int r = engine_open(&eng, &cfg, &fake_backend, &dev, 0, &fake_model, &dev, &err);
    if (r < 0)
        TAP_FAIL("engine_open: %s", err.msg);
}

static void start(bool async)
{
    fake_init(&dev);
    dev.async = dev.graphs = async;
    open_with(fake_config(&dev));
}

static struct request *submit(const struct request_args *a)
{
    struct request *rq = NULL;
    int r = engine_submit(eng, a, &rq, NULL, &err);
    if (r < 0)
        TAP_FAIL("submit: %d %s", r, err.msg);
    return rq;
}

struct got { int32_t ids[4096]; float lp[4096]; uint32_t n, n_prompt, n_draft, n_top; int finish, error; struct token_event last_prompt, last; int32_t draft[4096]; };

static void read_events(struct request *rq, struct got *g, uint32_t n_answers)
{
    struct token_event ev;
    while (request_next(rq, &ev) == 1) {
        struct got *o = &g[ev.index];
        switch (ev.kind) {
        case EV_TOKEN: o->lp[o->n] = ev.logprob; o->ids[o->n++] = ev.id; o->last = ev; o->n_top += ev.n_top; break;
        case EV_PROMPT: EXPECT_EQ(ev.pos, o->n_prompt); o->n_prompt++; o->last_prompt = ev; break;
        case EV_DRAFT: o->draft[ev.pos] = ev.id; o->n_draft++; break;
        case EV_FINISH: EXPECT_EQ(o->finish, 0); o->finish = ev.finish; o->error = ev.error; break;
        }
    }
}

static void run_dry(void)
{
    for (int i = 0; i < 20000 && engine_turn(eng) > 0; i++)
        ;
}

static void finish(void)
{
    struct kv_stats st;
    engine_kv_stat(eng, &st);
    engine_close(eng);
}

/* Greedy answer of `n_new` tokens is what the model's function says. */
static void expect_greedy(const int32_t *prompt, uint32_t n, const struct got *g, uint32_t n_new)
{
    int32_t all[8192];
    memcpy(all, prompt, n * sizeof *all);
    EXPECT_EQ(g->n, n_new);
    for (uint32_t i = 0; i < g->n; i++) {
        int32_t want = fake_oracle(all, n + i);
        if (g->ids[i] != want) {
            TAP_FAIL("token %u is %d, expected %d", i, g->ids[i], want);
            return;
        }
        all[n + i] = want;
    }
}

static void one_request(bool async)
{
    static struct got g[1];
    int32_t prompt[300];
    memset(g, 0, sizeof g);
    start(async);
    REQUIRE(eng != NULL);
    fake_prompt(prompt, 300, 1);
    struct request_args a = fake_args(prompt, 300, 50);
    struct request *rq = submit(&a);
    REQUIRE(rq != NULL);
    run_dry();
    read_events(rq, g, 1);
    expect_greedy(prompt, 300, g, 50);
    EXPECT_EQ(g->finish, FINISH_LENGTH);
    EXPECT_EQ(request_next(rq, &g->last), -EPIPE);
    struct request_usage u;
    EXPECT(request_usage(rq, &u));
    EXPECT_EQ(u.prompt_tokens, 300);
    EXPECT_EQ(u.completion_tokens, 50);
    EXPECT(u.first_token_us > 0 && u.total_us > u.first_token_us);
    request_unref(rq);
    finish();
}
static void greedy_sync(void) { one_request(false); }
static void greedy_async(void) { one_request(true); }

/* Mixed work: the outputs as one number, to compare ways of running. */
static uint64_t mixed_work(bool async, bool ahead, bool graphs, struct engine_stats *st)
{
    static struct got g[12];
    static int32_t prompt[12][400];
    struct request *rq[12];
    uint64_t h = 0;
    memset(g, 0, sizeof g);
    fake_init(&dev);
    dev.async = dev.graphs = async;
    struct engine_config c = fake_config(&dev);
    c.run_ahead = ahead;
    c.step_graphs = graphs;
    c.max_seqs = 6;
    open_with(c);
    struct arle_bias bias = { 17, 100 };
    for (uint32_t i = 0; i < 12; i++) {
        uint32_t n = 1 + (i * 67) % 390;
        fake_prompt(prompt[i], n, i);
        struct request_args a = fake_args(prompt[i], n, 5 + i * 9 % 60);
        a.sampling.has_seed = true;
        a.sampling.seed = i;
        a.sampling.temperature = i % 3 == 1;
        a.sampling.presence = i % 4 == 2;
        a.sampling.want_logprobs = i % 2;
        a.sampling.n_top = i % 5;
        if (i == 9)
            a.sampling.bias = &bias, a.sampling.n_bias = 1;
        rq[i] = submit(&a);
        engine_turn(eng);
    }
    run_dry();
    engine_stat(eng, st);
    for (uint32_t i = 0; i < 12; i++) {
        read_events(rq[i], &g[i], 1);
        EXPECT_EQ(g[i].finish, FINISH_LENGTH);
        EXPECT_EQ(g[i].n, 5 + i * 9 % 60);
        for (uint32_t t = 0; t < g[i].n; t++) {
            EXPECT(g[i].ids[t] != FAKE_POISON);
            h = fake_mix(h, (uint64_t)g[i].ids[t]);
            if (i % 2)
                EXPECT_NEAR(g[i].lp[t], -g[i].ids[t], 0);
            else
                EXPECT(isnan(g[i].lp[t]));
        }
        if (i == 9)
            EXPECT_EQ(g[i].ids[3], 17);
        if (i % 3 != 1 && i % 4 != 2 && i != 9)
            expect_greedy(prompt[i], 1 + (i * 67) % 390, &g[i], 5 + i * 9 % 60);
        EXPECT_EQ(g[i].n_top, i % 2 ? g[i].n * (i % 5) : 0);
        request_unref(rq[i]);
    }
    engine_close(eng);
    return h;
}

static void ahead_and_graphs_change_no_token(void)
{
    struct engine_stats plain, late, ahead, full;
    uint64_t h = mixed_work(false, false, false, &plain);
    EXPECT_EQ(mixed_work(true, false, false, &late), h);
    EXPECT_EQ(mixed_work(true, true, false, &ahead), h);
    EXPECT_EQ(mixed_work(true, true, true, &full), h);
    EXPECT_EQ(plain.ahead_steps + late.ahead_steps, 0);
    EXPECT(ahead.ahead_steps > 20);
    EXPECT_EQ(ahead.graph_launches, 0);
    EXPECT(full.graph_captures > 0);
    EXPECT(full.graph_launches > 20);
    EXPECT_EQ(dev.captures, full.graph_captures);
    EXPECT_EQ(dev.launches, full.graph_launches);
    EXPECT(dev.padded_rows > 0);
}

static void several_answers(void)
{
    static struct got g[5];
    int32_t prompt[100];
    memset(g, 0, sizeof g);
    start(true);
    fake_prompt(prompt, 100, 3);
    struct request_args a = fake_args(prompt, 100, 12);
    a.n = 5;
    a.sampling.temperature = 1;
    struct request *rq = submit(&a);
    run_dry();
    read_events(rq, g, 5);
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(g[i].n, 12);
        EXPECT_EQ(g[i].finish, FINISH_LENGTH);
        for (int k = 0; k < i; k++)
            EXPECT(memcmp(g[i].ids, g[k].ids, 12 * sizeof(int32_t)) != 0);
    }
    request_unref(rq);
    finish();
}

static void stop_tokens(bool async)
{
    static struct got g[2];
    int32_t all[64];
    memset(g, 0, sizeof g);
    start(async);
    fake_prompt(all, 20, 9);
    for (uint32_t n = 20; n < 40; n++)
        all[n] = fake_oracle(all, n);
    uint32_t at = 27;       /* first place of that token in the answer */
    for (uint32_t n = 20; n < 27; n++)
        if (all[n] == all[27]) {
            at = n;
            break;
        }
    struct request_args a = fake_args(all, 20, 100);
    a.stop_ids = &all[27];
    a.n_stop_ids = 1;
    struct request *rq = submit(&a);
    run_dry();
    read_events(rq, g, 1);
    EXPECT_EQ(g->finish, FINISH_STOP);
    EXPECT_EQ(g->n, at - 20 + 1);
    EXPECT_EQ(g->ids[g->n - 1], all[27]);
    request_unref(rq);
    /* The slot and pages it used serve the next one correctly. */
    a = fake_args(all, 20, 15);
    rq = submit(&a);
    run_dry();
    read_events(rq, &g[1], 1);
    expect_greedy(all, 20, &g[1], 15);
    request_unref(rq);
    finish();
}
static void stop_sync(void) { stop_tokens(false); }
static void stop_ahead(void) { stop_tokens(true); }

/* Prompts whose snapshots lie inside take one step where the model can keep states from its midst, and are resumed from those. */
static void states_from_the_midst(void)
{
    static struct got g[6];
    int32_t p[6][400];
    uint64_t steps[2];
    for (int can = 0; can < 2; can++) {
        fake_init(&dev);
        dev.async = dev.graphs = true;
        dev.max_saves = can ? ARLE_MAX_SAVES : 0;
        struct engine_config cfg = fake_config(&dev);
        cfg.max_tokens = 1024;
        cfg.prefix_cache = true;
        cfg.kv_snapshot_bytes = 64 * sizeof(struct fake_record);
        cfg.kv_snapshot_cadence = 128;
        open_with(cfg);
        memset(g, 0, sizeof g);
        for (int i = 0; i < 6; i++) {           /* two beginnings; three prompts go on from inside the first one's step */
            uint32_t n = (uint32_t)(300 + 17 * i);
            fake_prompt(p[i], n, (uint64_t)(i & 1));
            fake_prompt(p[i] + 200, n - 200, (uint64_t)(100 + i));
            struct request_args a = fake_args(p[i], n, 3);
            struct request *rq = submit(&a);
            run_dry();
            read_events(rq, &g[i], 1);
            EXPECT_EQ(g[i].finish, FINISH_LENGTH);
            expect_greedy(p[i], n, &g[i], 3);
            request_unref(rq);
        }
        steps[can] = dev.steps;
        struct kv_stats st;
        engine_turn(eng);
        engine_kv_stat(eng, &st);
        EXPECT_EQ(can, dev.saved > 0);
        EXPECT_EQ(st.snapshots_inside, dev.saved);
        EXPECT_EQ(st.hit_tokens, 2 * 128 + 2 * 192);    /* of 200 shared tokens: the cadence, then what the second prompt learned */
        engine_close(eng);
    }
    printf("# %llu steps without, %llu with\n", (unsigned long long)steps[0], (unsigned long long)steps[1]);
    EXPECT_EQ(steps[1], 6 * 3);             /* a prompt and two more tokens */
    EXPECT(steps[0] > steps[1] + 6);
}

static void end_tokens_of_the_model(void)
{
    static struct got g[2];
    int32_t prompt[8];
    memset(g, 0, sizeof g);
    fake_init(&dev);
    struct engine_config c = fake_config(&dev);
    c.config_json = "{\"eos_token_id\":[0]}";
    c.config_len = strlen(c.config_json);
    open_with(c);
    EXPECT_EQ(engine_defaults(eng)->n_eos, 1);
    fake_prompt(prompt, 8, 2);
    struct arle_bias bias = { FAKE_EOS, 100 };
    struct request_args a = fake_args(prompt, 8, 6);
    a.sampling.bias = &bias;
    a.sampling.n_bias = 1;
    struct request *one = submit(&a);
    a.ignore_eos = true;
    struct request *two = submit(&a);
    run_dry();
    read_events(one, &g[0], 1);
    read_events(two, &g[1], 1);
    EXPECT_EQ(g[0].n, 1);
    EXPECT_EQ(g[0].finish, FINISH_STOP);
    EXPECT_EQ(g[1].n, 6);
    EXPECT_EQ(g[1].finish, FINISH_LENGTH);
    request_unref(one);
    request_unref(two);
    finish();
}

static void prompt_logprobs(bool async, uint32_t max_new)
{
    static struct got g[1];
    int32_t prompt[400];
    memset(g, 0, sizeof g);
    start(async);
    fake_prompt(prompt, 400, 4);
    struct request_args a = fake_args(prompt, 400, max_new);
    a.prompt_logprobs = a.sampling.want_logprobs = true;
    a.sampling.n_top = 3;
    struct request *rq = submit(&a);
    run_dry();
    read_events(rq, g, 1);
    EXPECT_EQ(g->n_prompt, 400);
    EXPECT_EQ(g->last_prompt.id, prompt[399]);
    EXPECT_NEAR(g->last_prompt.logprob, -prompt[399], 0);
    EXPECT_EQ(g->last_prompt.n_top, 3);
    EXPECT_EQ(g->last_prompt.top_ids[0], fake_oracle(prompt, 399));
    EXPECT_EQ(g->finish, FINISH_LENGTH);
    expect_greedy(prompt, 400, g, max_new);
    request_unref(rq);
    finish();
}
static void echo_sync(void) { prompt_logprobs(false, 7); }
static void echo_ahead(void) { prompt_logprobs(true, 7); }
static void echo_only(void) { prompt_logprobs(true, 0); }

static void nothing_to_generate(void)
{
    static struct got g[1];
    int32_t prompt[3] = { 5, 6, 7 };
    memset(g, 0, sizeof g);
    start(false);
    struct request_args a = fake_args(prompt, 3, 0);
    struct request *rq = submit(&a);
    run_dry();
    read_events(rq, g, 1);
    EXPECT_EQ(g->finish, FINISH_LENGTH);
    EXPECT_EQ(g->n, 0);
    EXPECT_EQ(dev.steps, 0);
    request_unref(rq);
    finish();
}

static void drafts(void)
{
    static struct got g[1];
    int32_t all[200];
    memset(g, 0, sizeof g);
    start(true);
    fake_prompt(all, 150, 6);
    for (uint32_t n = 150; n < 170; n++)
        all[n] = fake_oracle(all, n);
    struct request_args a = fake_args(all, 150, 20);
    a.drafts = true;
    struct request *rq = submit(&a);
    run_dry();
    read_events(rq, g, 1);
    EXPECT_EQ(g->n, 20);
    EXPECT_EQ(g->n_draft, 168);         /* positions 1..168 were computed; the last token is not */
    for (uint32_t p = 2; p <= 169; p++)
        EXPECT_EQ(g->draft[p], fake_oracle(all, p));
    request_unref(rq);
    finish();
}

static void refusals(void)
{
    int32_t prompt[600];
    struct request *rq = NULL;
    start(false);
    fake_prompt(prompt, 600, 1);
#define REFUSE(code, name, ...) do { struct request_args a = fake_args(prompt, 10, 10); __VA_ARGS__; \
        EXPECT_EQ(engine_submit(eng, &a, &rq, NULL, &err), code); EXPECT_STR(err.param, name); } while (0)
    REFUSE(-EINVAL, "prompt", a.n_tokens = 0);
    REFUSE(-E2BIG, "prompt", a.n_tokens = 513);
    REFUSE(-E2BIG, "prompt", a.n_tokens = 512);
    REFUSE(-E2BIG, "max_tokens", a.max_new = 503);
    REFUSE(-EINVAL, "n", a.n = 0);
    REFUSE(-EINVAL, "n", a.n = 1000);
    REFUSE(-EINVAL, "temperature", a.sampling.temperature = -1);
    REFUSE(-EINVAL, "temperature", a.sampling.temperature = NAN);
    REFUSE(-EINVAL, "top_p", a.sampling.top_p = 0);
    REFUSE(-EINVAL, "min_p", a.sampling.min_p = 2);
    REFUSE(-EINVAL, "top_k", a.sampling.top_k = -1);
    REFUSE(-EINVAL, "repetition_penalty", a.sampling.repetition = 0);
    REFUSE(-EINVAL, "presence_penalty", a.sampling.presence = 11);
    REFUSE(-EINVAL, "frequency_penalty", a.sampling.frequency = NAN);
    REFUSE(-EINVAL, "top_logprobs", a.sampling.n_top = 21);
    struct arle_bias bad = { FAKE_VOCAB, 1 };
    REFUSE(-EINVAL, "logit_bias", a.sampling.bias = &bad; a.sampling.n_bias = 1);
    prompt[4] = FAKE_VOCAB;
    REFUSE(-EINVAL, "prompt", a.max_new = 10);
    EXPECT(rq == NULL);
    finish();
}

static void device_death_ends_all(bool async)
{
    static struct got g[3];
    int32_t prompt[50];
    struct request *rq[3];
    struct engine_stats st;
    memset(g, 0, sizeof g);
    fake_init(&dev);
    dev.async = dev.graphs = async;
    dev.die_at_step = 6;
    struct engine_config c = fake_config(&dev);
    c.max_seqs = 2;
    open_with(c);
    fake_prompt(prompt, 50, 1);
    struct request_args a = fake_args(prompt, 50, 40);
    for (int i = 0; i < 3; i++)
        rq[i] = submit(&a);
    run_dry();
    EXPECT_EQ(engine_turn(eng), -EIO);
    for (int i = 0; i < 3; i++) {
        read_events(rq[i], &g[i], 1);
        EXPECT_EQ(g[i].finish, FINISH_ERROR);
        EXPECT_EQ(g[i].error, -EIO);
        EXPECT_EQ(request_next(rq[i], &g[i].last), -EPIPE);
        request_unref(rq[i]);
    }
    engine_stat(eng, &st);
    EXPECT(st.dead);
    EXPECT_STR(st.dead_reason, "fake device died at step 6");
    EXPECT_EQ(engine_submit(eng, &a, &rq[0], NULL, &err), -EIO);
    engine_close(eng);
}
static void death_sync(void) { device_death_ends_all(false); }
static void death_ahead(void) { device_death_ends_all(true); }

static void a_refused_step_ends_its_own(void)
{
    static struct got g[2];
    int32_t prompt[50];
    memset(g, 0, sizeof g);
    fake_init(&dev);
    dev.async = true;
    dev.fail_at_step = 5;
    open_with(fake_config(&dev));
    fake_prompt(prompt, 50, 1);
    struct request_args a = fake_args(prompt, 50, 40);
    struct request *one = submit(&a);
    run_dry();
    struct request *two = submit(&a);
    run_dry();
    read_events(one, &g[0], 1);
    read_events(two, &g[1], 1);
    EXPECT_EQ(g[0].finish, FINISH_ERROR);
    EXPECT_EQ(g[0].error, -EINVAL);
    expect_greedy(prompt, 50, &g[1], 40);
    request_unref(one);
    request_unref(two);
    finish();
}

static void broken_logits_end_one_answer(void)
{
    static struct got g[2];
    int32_t good[20], bad[20];
    memset(g, 0, sizeof g);
    start(true);
    fake_prompt(good, 20, 1);
    fake_prompt(bad, 20, 2);
    dev.nan_after = bad[19];
    EXPECT(good[19] != bad[19]);
    struct request_args a = fake_args(good, 20, 30);
    struct request *one = submit(&a);
    a.tokens = bad;
    struct request *two = submit(&a);
    run_dry();
    dev.nan_after = 0;
    read_events(one, &g[0], 1);
    read_events(two, &g[1], 1);
    expect_greedy(good, 20, &g[0], 30);
    EXPECT_EQ(g[1].finish, FINISH_ERROR);
    EXPECT_EQ(g[1].error, -EDOM);
    EXPECT_EQ(g[1].n, 0);
    request_unref(one);
    request_unref(two);
    finish();
}

static void open_refuses(void)
{
    fake_init(&dev);
    struct engine_config c = fake_config(&dev);
    eng = NULL;
    c.kv_bytes = 10;
    EXPECT_EQ(engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err), -ENOMEM);
    EXPECT_STR(err.param, "kv_bytes");
    c = fake_config(&dev);
    c.compute = "f64";
    EXPECT_EQ(engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err), -EINVAL);
    EXPECT_STR(err.param, "compute");
    c = fake_config(&dev);
    c.kv_dtype = "int3";
    EXPECT_EQ(engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err), -EINVAL);
    c = fake_config(&dev);
    EXPECT_EQ(engine_open(&eng, &c, &fake_backend, &dev, 1, &fake_model, &dev, &err), -ENODEV);
    c.config_json = "[";
    c.config_len = 1;
    EXPECT_EQ(engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err), -EINVAL);
    c.config_json = NULL;
    c.random_weights = false;
    c.model_dir = "/nonexistent";
    EXPECT_EQ(engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err), -ENOENT);
    for (int k = 1; k < 14; k++) {      /* memory runs out at each allocation */
        c = fake_config(&dev);
        dev.allocs_left = k;
        int r = engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err);
        dev.allocs_left = 0;
        if (r == 0) {
            EXPECT(k > 9);
            engine_close(eng);
            break;
        }
        EXPECT_EQ(r, -ENOMEM);
    }
}

int main(void)
{
    RUN(greedy_sync);
    RUN(greedy_async);
    RUN(ahead_and_graphs_change_no_token);
    RUN(several_answers);
    RUN(stop_sync);
    RUN(stop_ahead);
    RUN(states_from_the_midst);
    RUN(end_tokens_of_the_model);
    RUN(echo_sync);
    RUN(echo_ahead);
    RUN(echo_only);
    RUN(nothing_to_generate);
    RUN(drafts);
    RUN(refusals);
    RUN(death_sync);
    RUN(death_ahead);
    RUN(a_refused_step_ends_its_own);
    RUN(broken_logits_end_one_answer);
    RUN(open_refuses);
    return tap_done();
}
