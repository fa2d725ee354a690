/*
 * Replays scheduler scenarios: arrivals in, step plans and outcomes out, in virtual time, with a fake model whose every token
 * is checked. A scenario is a text file, tests/replay/scn/NAME.scn:
 *
 *   engine KEY=VALUE...          seqs tokens pages page queue context prefix host aging patience pinpct
 *   req NAME KEY=VALUE...        at prompt new prio tenant deadline n seed stopat mark count temp penalty; count makes NAME0, NAME1, ..., `every` US apart
 *   cancel NAME at=US            also by id: cancelid NAME at=US;  end NAME at=US (request_stop of answer 0)
 *   pin NAME at=US               what is remembered of its prompt; unpin NAME at=US
 *   expect NAME OUTCOME [new=N]  OUTCOME: length stop cancelled deadline error stopped refused
 *   order NAME NAME...           these requests ended in this order
 *   first NAME NAME...           ... got their first token in this order
 *   plan STEP NAME:FROM+N...     parts of that step, in order (checked in the plain run only)
 *   stat FIELD OP VALUE          OP: = >= <=
 *
 * Each scenario runs three times: plainly, on a late device, and on a late device running ahead with captured steps. What
 * must hold holds in all of them.
 */
#include "kv/kv.h"
#include "sched/sched.h"
#include "sched_fake.h"
#include "tap.h"
#include <ctype.h>
#include <dirent.h>

#define MAX_REQ 300
#define MAX_LINES 200

struct job {
    char name[48];
    struct { int64_t at, prompt, new, prio, deadline, n, seed, stopat, temp, penalty, mark; char tenant[16]; } k;
    int32_t *tokens;
    struct request *rq;
    bool submitted, refused, over;
    uint32_t n_new, finish, end_rank, first_rank;
    int64_t first_us, end_us;
};
struct act { char what[12], name[48]; int64_t at; bool done; };
struct scene {
    struct job job[MAX_REQ]; uint32_t n_jobs;
    struct act act[16]; uint32_t n_acts;
    char line[MAX_LINES][200]; uint32_t n_lines;
    int64_t seqs, tokens, pages, page, queue, context, prefix, host, aging, patience, pinpct;
};

static struct scene sc;
static struct arle_device dev;
static const char *scene_name;
static char trace[4000][120];
static uint32_t n_trace, n_ended, n_firsts;

#define BAD(...) (printf("# %s: ", scene_name), printf(__VA_ARGS__), printf("\n"), tap_case_failed = 1)

/* ---- reading ---- */

static bool key(const char *word, const char *name, int64_t *out)
{
    size_t n = strlen(name);
    if (strncmp(word, name, n) != 0 || word[n] != '=')
        return false;
    *out = atoll(word + n + 1);
    return true;
}

static void read_engine(char *save)
{
    for (char *w; (w = strtok_r(NULL, " ", &save)) != NULL;)
        if (!(key(w, "seqs", &sc.seqs) || key(w, "tokens", &sc.tokens) || key(w, "pages", &sc.pages) || key(w, "page", &sc.page) ||
              key(w, "queue", &sc.queue) || key(w, "context", &sc.context) || key(w, "prefix", &sc.prefix) ||
              key(w, "host", &sc.host) || key(w, "aging", &sc.aging) || key(w, "patience", &sc.patience) || key(w, "pinpct", &sc.pinpct)))
            BAD("unknown engine key %s", w);
}

static void read_req(char *save)
{
    struct job j = { .k = { .prompt = 10, .new = 10, .n = 1, .seed = -1, .stopat = -1 } };
    int64_t count = 0, every = 0;
    snprintf(j.name, sizeof j.name, "%s", strtok_r(NULL, " ", &save));
    for (char *w; (w = strtok_r(NULL, " ", &save)) != NULL;) {
        if (strncmp(w, "tenant=", 7) == 0)
            snprintf(j.k.tenant, sizeof j.k.tenant, "%s", w + 7);
        else if (!(key(w, "at", &j.k.at) || key(w, "prompt", &j.k.prompt) || key(w, "new", &j.k.new) || key(w, "prio", &j.k.prio) ||
                   key(w, "deadline", &j.k.deadline) || key(w, "n", &j.k.n) || key(w, "seed", &j.k.seed) || key(w, "temp", &j.k.temp) ||
                   key(w, "stopat", &j.k.stopat) || key(w, "count", &count) || key(w, "every", &every) || key(w, "penalty", &j.k.penalty) ||
                   key(w, "mark", &j.k.mark)))
            BAD("unknown request key %s", w);
    }
    for (int64_t i = 0; i < (count ? count : 1) && sc.n_jobs < MAX_REQ; i++) {
        struct job *o = &sc.job[sc.n_jobs];
        *o = j;
        o->k.at += i * every;
        if (count)
            snprintf(o->name, sizeof o->name, "%.16s%lld", j.name, (long long)i);
        if (o->k.seed < 0)
            o->k.seed = sc.n_jobs;
        sc.n_jobs++;
    }
}

static void read_scene(const char *path)
{
    char buf[400];
    FILE *f = fopen(path, "re");
    memset(&sc, 0, sizeof sc);
    sc = (struct scene){ .seqs = 4, .tokens = 128, .pages = 100, .page = 16, .queue = 64, .context = 512, .aging = 5000 };
    if (f == NULL) {
        BAD("cannot read %s", path);
        return;
    }
    while (fgets(buf, sizeof buf, f) != NULL) {
        char copy[200], *save = NULL, *w;
        buf[strcspn(buf, "\n#")] = '\0';
        snprintf(copy, sizeof copy, "%.199s", buf);
        w = strtok_r(buf, " ", &save);
        if (w == NULL)
            continue;
        if (strcmp(w, "engine") == 0)
            read_engine(save);
        else if (strcmp(w, "req") == 0)
            read_req(save);
        else if ((strcmp(w, "cancel") == 0 || strcmp(w, "cancelid") == 0 || strcmp(w, "end") == 0 || strcmp(w, "pin") == 0 ||
                  strcmp(w, "unpin") == 0) && sc.n_acts < 16) {
            struct act *a = &sc.act[sc.n_acts++];
            snprintf(a->what, sizeof a->what, "%s", w);
            snprintf(a->name, sizeof a->name, "%s", strtok_r(NULL, " ", &save));
            key(strtok_r(NULL, " ", &save), "at", &a->at);
        } else if (sc.n_lines < MAX_LINES) {
            snprintf(sc.line[sc.n_lines++], sizeof sc.line[0], "%s", copy);
        }
    }
    fclose(f);
}

static struct job *job_named(const char *name)
{
    for (uint32_t i = 0; i < sc.n_jobs; i++)
        if (strcmp(sc.job[i].name, name) == 0)
            return &sc.job[i];
    BAD("no request %s", name);
    return &sc.job[0];
}

/* ---- running ---- */

static void submit_job(struct engine *e, struct job *j)
{
    struct arle_err err = ARLE_ERR_INIT;
    uint32_t n = (uint32_t)j->k.prompt;
    int retry = 0;
    j->submitted = true;
    j->tokens = calloc(n + (size_t)j->k.new + 1, sizeof(int32_t));
    fake_prompt(j->tokens, n, (uint64_t)j->k.seed);
    for (uint32_t i = n; i < n + j->k.new; i++)
        j->tokens[i] = fake_oracle(j->tokens, i);
    struct request_args a = fake_args(j->tokens, n, (uint32_t)j->k.new);
    a.n = (uint32_t)j->k.n;
    a.priority = (int32_t)j->k.prio;
    a.tenant = j->k.tenant;
    a.deadline_ms = j->k.deadline;
    a.sampling.temperature = j->k.temp ? 1 : 0;
    a.sampling.frequency = j->k.penalty ? 1 : 0;
    a.sampling.has_seed = true;
    a.sampling.seed = (uint64_t)j->k.seed;
    uint32_t mark = (uint32_t)j->k.mark;
    if (mark > 0)
        a.marks = &mark, a.n_marks = 1;
    if (j->k.stopat >= 0)
        a.stop_ids = &j->tokens[n + j->k.stopat], a.n_stop_ids = 1;
    int r = engine_submit(e, &a, &j->rq, &retry, &err);
    j->refused = j->over = r < 0;
    if (r == -EAGAIN && retry < 1)
        BAD("%s: refused without a hint when to retry", j->name);
    if (r < 0 && r != -EAGAIN)
        BAD("%s: %s", j->name, err.msg);
}

static void check_token(struct job *j, const struct token_event *ev)
{
    uint32_t at = (uint32_t)j->k.prompt + j->n_new;
    if (ev->id == FAKE_POISON)
        BAD("%s: token %u was made from wrong state", j->name, j->n_new);
    if (j->k.n == 1 && !j->k.temp && !j->k.penalty && (ev->id != j->tokens[at] || ev->pos != at))
        BAD("%s: token %u is %d at %u, expected %d", j->name, j->n_new, ev->id, ev->pos, j->tokens[at]);
    if (j->n_new == 0) {
        j->first_us = fake_clock(&dev);
        j->first_rank = ++n_firsts;
    }
    j->n_new++;
}

static void read_job(struct job *j)
{
    struct token_event ev;
    int r = 0;
    while (j->rq != NULL && !j->over && (r = request_next(j->rq, &ev)) == 1) {
        if (ev.kind == EV_TOKEN)
            check_token(j, &ev);
        else if (ev.kind == EV_FINISH)
            j->finish = ev.finish;
    }
    if (r == -EPIPE) {
        j->over = true;
        j->end_rank = ++n_ended;
        j->end_us = fake_clock(&dev);
    }
}

/* As the engine thread does when it is asked; nobody waits in virtual time. */
static void pin_job(struct engine *e, const struct job *j, bool pin)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct kv_pinned p;
    uint8_t salt[KV_SALT_BYTES];
    kv_salt(e->kv, j->k.tenant, "", salt);
    int r = pin ? kv_pin(e->kv, salt, j->tokens, (uint32_t)j->k.prompt, NULL, 0, &p, &err)
                : kv_unpin(e->kv, salt, j->tokens, (uint32_t)j->k.prompt, &p, &err);
    if (r < 0)
        BAD("%s of %s: %s", pin ? "pin" : "unpin", j->name, err.msg);
}

static void do_acts(struct engine *e, int64_t now)
{
    for (uint32_t i = 0; i < sc.n_acts; i++) {
        struct act *a = &sc.act[i];
        struct job *j = job_named(a->name);
        if (a->done || now < a->at || !j->submitted)
            continue;
        a->done = true;
        if (strcmp(a->what, "cancel") == 0)
            request_cancel(j->rq);
        else if (strcmp(a->what, "cancelid") == 0)
            engine_cancel(e, request_id(j->rq));
        else if (strcmp(a->what, "end") == 0)
            request_stop(j->rq, 0);
        else
            pin_job(e, j, a->what[0] == 'p');
    }
}

static void record_plan(struct engine *e, uint64_t was)
{
    const struct step *s = e->step[0].no == e->step_no ? &e->step[0] : &e->step[1];
    if (e->step_no == was || n_trace >= 4000)
        return;
    size_t at = 0;
    trace[n_trace][0] = '\0';
    for (uint32_t i = 0; i < s->n_parts; i++)
        for (uint32_t k = 0; k < sc.n_jobs && at < 100; k++)
            if (sc.job[k].rq == s->part[i].seq->rq)
                at += (size_t)snprintf(trace[n_trace] + at, 120 - at, "%s%s:%u+%u", at ? " " : "", sc.job[k].name, s->part[i].from, s->part[i].n);
    n_trace++;
}

/* The next thing that happens from outside after `now`, or -1. */
static int64_t next_event(int64_t now)
{
    int64_t next = -1;
    for (uint32_t i = 0; i < sc.n_jobs; i++) {
        struct job *j = &sc.job[i];
        int64_t at = !j->submitted ? j->k.at : !j->over && j->k.deadline ? j->k.at + j->k.deadline * 1000 : -1;
        if (at >= 0 && (next < 0 || at < next))
            next = at;
        if (j->submitted && !j->over && sc.patience && j->k.at + sc.patience * 1000 > now && (next < 0 || j->k.at + sc.patience * 1000 < next))
            next = j->k.at + sc.patience * 1000;
    }
    for (uint32_t i = 0; i < sc.n_acts; i++)
        if (!sc.act[i].done && (next < 0 || sc.act[i].at < next))
            next = sc.act[i].at;
    return next < now ? (next < 0 ? -1 : now + 100) : next;
}

static void drive(struct engine *e)
{
    for (int turns = 0, idle = 0; turns < 100000; turns++) {
        int64_t now = fake_clock(&dev);
        for (uint32_t i = 0; i < sc.n_jobs; i++)
            if (!sc.job[i].submitted && sc.job[i].k.at <= now)
                submit_job(e, &sc.job[i]);
        do_acts(e, now);
        uint64_t was = e->step_no;
        int busy = engine_turn(e);
        record_plan(e, was);
        bool all = true;
        for (uint32_t i = 0; i < sc.n_jobs; i++) {
            read_job(&sc.job[i]);
            all &= sc.job[i].over;
        }
        if (all && !busy)
            return;
        idle = busy ? 0 : idle + 1;
        if (!busy) {
            int64_t next = next_event(now);
            if (next > now)
                atomic_store(&dev.clock_us, next);
            if (e->n_wait > 0)
                usleep(50);         /* a tier's thread may be at work */
        }
        if (idle > 3000) {
            BAD("nothing moves: running=%u waiting=%u parked=%u", e->n_run, e->n_wait, e->n_parked);
            return;
        }
    }
    BAD("no end in 100000 turns");
}

/* ---- judging ---- */

static void check_expect(char *save)
{
    static const char *const words[] = { "none", "stop", "length", "cancelled", "deadline", "error" };
    struct job *j = job_named(strtok_r(NULL, " ", &save));
    const char *want = strtok_r(NULL, " ", &save), *is = j->refused ? "refused" : words[j->finish];
    if (j->finish == FINISH_NONE && !j->refused && j->over)
        is = "stopped";
    if (strcmp(want, is) != 0)
        BAD("%s ended as %s, expected %s", j->name, is, want);
    int64_t n;
    char *w = strtok_r(NULL, " ", &save);
    if (w != NULL && key(w, "new", &n) && n != j->n_new)
        BAD("%s made %u tokens, expected %lld", j->name, j->n_new, (long long)n);
}

static void check_order(char *save, bool first)
{
    uint32_t last = 0;
    for (char *w; (w = strtok_r(NULL, " ", &save)) != NULL;) {
        struct job *j = job_named(w);
        uint32_t rank = first ? j->first_rank : j->end_rank;
        if (rank <= last)
            BAD("%s comes too early in the order of %s", w, first ? "first tokens" : "ends");
        last = rank;
    }
}

static void check_stat(const struct engine_stats *st, const struct kv_stats *kv, char *save)
{
    const struct { const char *name; uint64_t value; } fields[] = {
        { "steps", st->steps }, { "preempted", st->preempted }, { "resumed", st->resumed }, { "recomputed", st->recomputed_tokens },
        { "finished", st->finished }, { "cancelled", st->cancelled }, { "rejected", st->rejected }, { "errors", st->errors },
        { "prefill", st->prefill_tokens }, { "tokens", st->completion_tokens }, { "end_us", (uint64_t)fake_clock(&dev) }, { "gap_us", (uint64_t)st->longest_gap_us },
        { "yielded", kv->pins_yielded }, { "pinned", kv->pinned_pages },
    };
    const char *name = strtok_r(NULL, " ", &save), *op = strtok_r(NULL, " ", &save);
    uint64_t want = strtoull(strtok_r(NULL, " ", &save), NULL, 10);
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        uint64_t is = fields[i].value;
        if (strcmp(fields[i].name, name) != 0)
            continue;
        if (!(op[0] == '=' ? is == want : op[0] == '>' ? is >= want : is <= want))
            BAD("%s is %llu, expected %s %llu", name, (unsigned long long)is, op, (unsigned long long)want);
        return;
    }
    BAD("no figure %s", name);
}

static void check_plan(char *save)
{
    uint32_t step = (uint32_t)atoi(strtok_r(NULL, " ", &save));
    const char *is = step >= 1 && step <= n_trace ? trace[step - 1] : "(none)";
    while (*save == ' ')
        save++;
    if (strcmp(is, save) != 0)
        BAD("step %u was \"%s\", expected \"%s\"", step, is, save);
}

static void judge(const struct engine_stats *st, const struct kv_stats *kv, bool plain)
{
    for (uint32_t i = 0; i < sc.n_lines; i++) {
        char buf[200], *save = NULL;
        snprintf(buf, sizeof buf, "%s", sc.line[i]);
        char *w = strtok_r(buf, " ", &save);
        if (strcmp(w, "expect") == 0)
            check_expect(save);
        else if (strcmp(w, "order") == 0 || strcmp(w, "first") == 0)
            check_order(save, w[0] == 'f');
        else if (strcmp(w, "stat") == 0)
            check_stat(st, kv, save);
        else if (strcmp(w, "plan") == 0) {
            if (plain)
                check_plan(save);
        } else
            BAD("unknown line: %s", sc.line[i]);
    }
}

static void check_nothing_leaked(const struct engine *e)
{
    struct kv_stats kv;
    kv_settle(e->kv, 1000);
    kv_flush(e->kv);
    kv_step_end(e->kv);
    engine_kv_stat(e, &kv);
    if (kv.slots_free != kv.slots_total || kv.pages_free + kv.pages_cached != kv.pages_total)
        BAD("left behind: slots %llu of %llu free, pages %llu + %llu cached of %llu", (unsigned long long)kv.slots_free,
            (unsigned long long)kv.slots_total, (unsigned long long)kv.pages_free, (unsigned long long)kv.pages_cached,
            (unsigned long long)kv.pages_total);
    if (e->n_run + e->n_wait + e->n_parked != 0)
        BAD("left behind: running=%u waiting=%u parked=%u", e->n_run, e->n_wait, e->n_parked);
}

static void play(const char *path, bool async, bool ahead)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct engine *e = NULL;
    struct engine_stats st;
    struct kv_stats kv;
    read_scene(path);
    fake_init(&dev);
    n_trace = n_ended = n_firsts = 0;
    dev.async = async;
    dev.graphs = ahead;
    struct engine_config c = fake_config(&dev);
    c.max_seqs = (uint32_t)sc.seqs;
    c.max_tokens = (uint32_t)sc.tokens;
    c.page_tokens = (uint32_t)sc.page;
    c.max_queue = (uint32_t)sc.queue;
    c.context = (uint32_t)sc.context;
    c.prefix_cache = sc.prefix != 0;
    c.kv_snapshot_bytes = sc.prefix ? 4096 : 0;
    c.kv_host_bytes = (uint64_t)sc.host;
    c.kv_pin_pct = (uint32_t)sc.pinpct;
    c.aging_ms = sc.aging;
    c.run_ahead = ahead;
    c.queue_deadline_ms = sc.patience;
    c.kv_bytes = (uint64_t)(sc.seqs + 1) * sizeof(struct fake_record) + (uint64_t)(sc.pages + 1) * (uint64_t)sc.page * 4;
    if (engine_open(&e, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err) < 0) {
        BAD("engine_open: %s", err.msg);
        return;
    }
    drive(e);
    kv_step_end(e->kv);
    engine_kv_stat(e, &kv);
    check_nothing_leaked(e);
    engine_stat(e, &st);
    judge(&st, &kv, !async);
    if (getenv("SCN_TRACE") != NULL)
        printf("# steps=%llu preempted=%llu resumed=%llu recomputed=%llu prefill=%llu end_us=%lld gap_us=%lld\n", (unsigned long long)st.steps,
               (unsigned long long)st.preempted, (unsigned long long)st.resumed, (unsigned long long)st.recomputed_tokens,
               (unsigned long long)st.prefill_tokens, (long long)fake_clock(&dev), (long long)st.longest_gap_us);
    if (tap_case_failed || getenv("SCN_TRACE") != NULL)
        for (uint32_t i = 0; i < n_trace && i < 24; i++)
            printf("# %u %s\n", i + 1, trace[i]);
    for (uint32_t i = 0; i < sc.n_jobs; i++) {
        request_unref(sc.job[i].rq);
        free(sc.job[i].tokens);
    }
    engine_close(e);
}

static char path_of[1024];
static void plain_run(void) { play(path_of, false, false); }
static void late_run(void) { play(path_of, true, false); }
static void ahead_run(void) { play(path_of, true, true); }

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

int main(int argc, char **argv)
{
    const char *src = getenv("top_srcdir") ? getenv("top_srcdir") : "..";
    char dir[900], label[300];
    struct dirent **list;
    snprintf(dir, sizeof dir, "%s/tests/replay/scn", src);
    int n = scandir(dir, &list, NULL, by_name), n_scenes = 0;
    for (int i = 0; i < n; i++) {
        size_t len = strlen(list[i]->d_name);
        if (len > 4 && strcmp(list[i]->d_name + len - 4, ".scn") == 0 && (argc < 2 || strcmp(argv[1], list[i]->d_name) == 0)) {
            snprintf(path_of, sizeof path_of, "%s/%s", dir, list[i]->d_name);
            scene_name = list[i]->d_name;
            n_scenes++;
            snprintf(label, sizeof label, "%s plain", scene_name);
            tap_run(label, plain_run);
            snprintf(label, sizeof label, "%s late device", scene_name);
            tap_run(label, late_run);
            snprintf(label, sizeof label, "%s running ahead, captured", scene_name);
            tap_run(label, ahead_run);
        }
        free(list[i]);
    }
    if (n >= 0)
        free(list);
    if (n_scenes == 0) {
        printf("not ok 1 - no scenarios in %s\n1..1\n", dir);
        return 1;
    }
    return tap_done();
}
