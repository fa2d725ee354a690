/*
 * `arle bench agent`: sessions that talk in turns. All share a system prompt; each turn re-sends the whole history with a new
 * message (or a tool's result) behind the answer that was really given. The same conversations run a second time, warm.
 */
#include "arle/bench.h"
#include "kv/kv.h"
#include "util/clock.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_TURNS 64

struct session {
    struct request *rq;
    int32_t *tokens; uint32_t n;
    uint32_t marks[MAX_TURNS + 2], n_marks;
    uint32_t turn;
    int64_t cpu_us;             /* the process's processor time when the turn began */
    bool begun;                 /* its first token came */
};
struct plan { uint32_t sessions, turns, system, message, answer, at_once; };
struct turn_sum { double *ttft, *cpu; uint32_t n, n_cpu; uint64_t prompt, cached, out; };

static bool read_plan(const struct bench *b, struct plan *p)
{
    long long sessions, turns, sys, message, answer, at_once;
    if (!args_int(b->args, "sessions", 1, 4096, 4, &sessions) || !args_int(b->args, "turns", 1, MAX_TURNS, 4, &turns) ||
        !args_int(b->args, "system", 1, 1 << 20, 1000, &sys) || !args_int(b->args, "message", 1, 1 << 20, 100, &message) ||
        !args_int(b->args, "answer", 1, 1 << 16, 32, &answer) || !args_int(b->args, "at-once", 1, 4096, sessions, &at_once))
        return false;
    *p = (struct plan){ (uint32_t)sessions, (uint32_t)turns, (uint32_t)sys, (uint32_t)message, (uint32_t)answer, (uint32_t)at_once };
    return true;
}

static int64_t cpu_now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static bool start_turn(struct engine *e, const struct plan *p, struct session *s, uint32_t index)
{
    uint32_t n_valid = engine_model(e)->n_valid;
    if (s->turn == 0) {
        bench_prompt(s->tokens, p->system, 7, n_valid);
        s->n = p->system;
        s->n_marks = 0;
    }
    s->marks[s->n_marks++] = s->n;      /* end of the system prompt, then of each answer */
    bench_prompt(s->tokens + s->n, p->message, index * 1000003ull + s->turn + 11, n_valid);
    s->n += p->message;
    s->begun = false;
    s->cpu_us = cpu_now_us();
    s->rq = bench_submit(e, s->tokens, s->n, p->answer, s->marks, s->n_marks);
    return s->rq != NULL;
}

/* Takes what is there; true when the turn ended. */
static bool end_turn(const struct plan *p, struct session *s, struct turn_sum *sum)
{
    struct token_event ev;
    int r;
    sum = &sum[s->turn];
    while ((r = request_next(s->rq, &ev)) == 1) {
        if (ev.kind != EV_TOKEN)
            continue;
        if (!s->begun)
            sum->cpu[sum->n_cpu++] = (double)(cpu_now_us() - s->cpu_us);
        s->begun = true;
        s->tokens[s->n++] = ev.id;
    }
    struct request_usage u;
    if (r != -EPIPE || !request_usage(s->rq, &u))
        return false;
    sum->ttft[sum->n++] = (double)u.first_token_us;
    sum->prompt += u.prompt_tokens;
    sum->cached += u.cached_tokens;
    sum->out += u.completion_tokens;
    request_unref(s->rq);
    s->rq = NULL;
    s->turn++;
    return true;
}

static int converse(struct engine *e, const struct plan *p, struct session *all, struct turn_sum *sum)
{
    uint32_t next = 0, active = 0, ended = 0;
    for (uint32_t i = 0; i < p->sessions; i++)
        all[i].turn = 0;
    while (ended < p->sessions) {
        for (; active < p->at_once && next < p->sessions; active++, next++)
            if (!start_turn(e, p, &all[next], next))
                return EXIT_FAILED;
        int r = engine_turn(e);
        if (r < 0)
            return EXIT_FAILED;
        for (uint32_t i = 0; i < next; i++) {
            if (all[i].rq == NULL || !end_turn(p, &all[i], sum))
                continue;
            if (!all[i].begun) {
                fprintf(stderr, "arle bench: session %u got no answer; the reason is logged above\n", i);
                return EXIT_FAILED;
            }
            if (all[i].turn < p->turns) {
                if (!start_turn(e, p, &all[i], i))
                    return EXIT_FAILED;
            } else {
                ended++;
                active--;
            }
        }
        if (r == 0)
            usleep(200);        /* a tier is at work */
    }
    return 0;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(struct bench *b, const struct plan *p, const char *cache, const char *pass, uint32_t turn, struct turn_sum *s)
{
    json_object *o = bench_line(b, "agent");
    json_object_object_add(o, "cache", json_object_new_string(cache));
    json_object_object_add(o, "pass", json_object_new_string(pass));
    bench_add(o, "sessions", p->sessions);
    bench_add(o, "at_once", p->at_once);
    bench_add(o, "turn", turn + 1);
    bench_add(o, "prompt_tokens", s->n ? (double)s->prompt / s->n : 0);
    bench_add(o, "cached_tokens", s->n ? (double)s->cached / s->n : 0);
    bench_add(o, "hit_rate", s->prompt ? (double)s->cached / (double)s->prompt : 0);
    bench_times(o, s->ttft, s->n);
    /* Does not depend on what else the machine does; says something about a turn only when turns run one after the other. */
    if (p->at_once == 1 && s->n_cpu > 0) {
        qsort(s->cpu, s->n_cpu, sizeof *s->cpu, by_value);
        bench_add(o, "median_cpu_us", s->cpu[s->n_cpu / 2]);
    }
    bench_print(b, o);
}

static void report_pass(struct bench *b, const struct plan *p, const char *cache, const char *pass, struct engine *e,
                        const struct kv_stats *was, double seconds, const struct turn_sum *sum)
{
    struct kv_stats now;
    uint64_t out = 0, prompt = 0;
    engine_kv_stat(e, &now);
    for (uint32_t t = 0; t < p->turns; t++)
        out += sum[t].out, prompt += sum[t].prompt;
    json_object *o = bench_line(b, "agent_pass");
    json_object_object_add(o, "cache", json_object_new_string(cache));
    json_object_object_add(o, "pass", json_object_new_string(pass));
    bench_add(o, "seconds", seconds);
    bench_add(o, "output_tokens_s", (double)out / seconds);
    bench_add(o, "prompt_tokens", (double)prompt);
    bench_add(o, "hit_tokens", (double)(now.hit_tokens - was->hit_tokens));
    bench_add(o, "snapshots_taken", (double)(now.snapshots_taken - was->snapshots_taken));
    bench_add(o, "snapshots_restored", (double)(now.snapshots_restored - was->snapshots_restored));
    bench_add(o, "pages_evicted", (double)(now.pages_evicted - was->pages_evicted));
    for (int tier = 0; tier < 4; tier++) {
        static const char *const names[4][2] = { { "demoted_device", "promoted_device" }, { "demoted_host", "promoted_host" },
                                                 { "demoted_disk", "promoted_disk" }, { "demoted_store", "promoted_store" } };
        bench_add(o, names[tier][0], (double)(now.demoted_bytes[tier] - was->demoted_bytes[tier]));
        bench_add(o, names[tier][1], (double)(now.promoted_bytes[tier] - was->promoted_bytes[tier]));
    }
    bench_print(b, o);
}

static int run_pass(struct bench *b, const struct plan *p, bool prefix, const char *pass, struct engine *e, struct session *all)
{
    struct turn_sum sum[MAX_TURNS] = { { 0 } };
    double *times = calloc((size_t)p->turns * p->sessions * 2, sizeof *times);
    struct kv_stats was;
    if (times == NULL)
        return EXIT_FAILED;
    for (uint32_t t = 0; t < p->turns; t++) {
        sum[t].ttft = times + (size_t)t * 2 * p->sessions;
        sum[t].cpu = sum[t].ttft + p->sessions;
    }
    engine_kv_stat(e, &was);
    int64_t t0 = clock_mono_us();
    int status = converse(e, p, all, sum);
    double seconds = (double)(clock_mono_us() - t0) / 1e6;
    for (uint32_t t = 0; status == 0 && t < p->turns; t++)
        report(b, p, prefix ? "on" : "off", pass, t, &sum[t]);
    if (status == 0)
        report_pass(b, p, prefix ? "on" : "off", pass, e, &was, seconds, sum);
    free(times);
    return status;
}

static int with_cache(struct bench *b, const struct plan *p, bool prefix)
{
    uint32_t limit = p->system + p->turns * (p->message + p->answer) + 64;
    struct session *all = calloc(p->sessions, sizeof *all);
    struct engine *e = NULL;
    int status = all == NULL ? EXIT_FAILED : bench_engine(b, p->at_once, limit, prefix, &e);
    for (uint32_t i = 0; status == 0 && i < p->sessions; i++)
        if ((all[i].tokens = malloc(limit * sizeof(int32_t))) == NULL)
            status = EXIT_FAILED;
    if (status == 0)
        status = run_pass(b, p, prefix, "cold", e, all);
    if (status == 0)
        status = run_pass(b, p, prefix, "warm", e, all);
    for (uint32_t i = 0; all != NULL && i < p->sessions; i++) {
        request_unref(all[i].rq);
        free(all[i].tokens);
    }
    engine_close(e);
    free(all);
    return status;
}

int bench_agent(struct bench *b)
{
    struct plan p;
    const char *cache = args_str(b->args, "cache");
    if (!read_plan(b, &p))
        return EXIT_USAGE;
    if (cache != NULL && strcmp(cache, "on") != 0 && strcmp(cache, "off") != 0 && strcmp(cache, "both") != 0) {
        fprintf(stderr, "arle bench: --cache is on, off or both\n");
        return EXIT_USAGE;
    }
    int status = bench_need_model(b);
    if (status == 0 && (cache == NULL || strcmp(cache, "on") != 0))
        status = with_cache(b, &p, false);
    if (status == 0 && (cache == NULL || strcmp(cache, "off") != 0))
        status = with_cache(b, &p, true);
    return status;
}
