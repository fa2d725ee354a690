/* See log.h. One mutex guards the sink and the table of repeats; a line is formatted before it is taken. */
#include "util/log.h"
#include "util/clock.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 2048, N_REPEATS = 64, HEAD_MAX = 96 };

struct repeat {
    uint64_t hash;              /* 0: free */
    int64_t start_ms;
    uint32_t n_seen, n_held;
    enum arle_log_level level;
    char head[HEAD_MAX];        /* "kv evicted" */
};

static const char *const level_words[] = { "error", "warn", "info", "debug" };
static const int syslog_priority[] = { 3, 4, 6, 7 };

static atomic_int log_level = ARLE_LOG_INFO;
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;     /* guards everything below */
static struct repeat repeats[N_REPEATS];
static log_sink_fn sink;
static void *sink_arg;
static int64_t (*now_fn)(void);

void log_set_level(enum arle_log_level level)
{
    atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
}

int log_level_parse(const char *word, enum arle_log_level *out_level)
{
    for (int i = 0; i < 4; i++) {
        if (strcasecmp(word, level_words[i]) == 0) {
            *out_level = (enum arle_log_level)i;
            return 0;
        }
    }
    return -EINVAL;
}

bool log_enabled(enum arle_log_level level)
{
    return (int)level <= atomic_load_explicit(&log_level, memory_order_relaxed);
}

/* True when stderr is the stream that journald gave us. */
static bool under_journal(void)
{
    static atomic_int known = -1;
    int k = atomic_load_explicit(&known, memory_order_relaxed);
    if (k < 0) {
        const char *env = getenv("JOURNAL_STREAM");
        unsigned long long dev, ino;
        struct stat st;
        k = env != NULL && sscanf(env, "%llu:%llu", &dev, &ino) == 2 && fstat(STDERR_FILENO, &st) == 0
            && (unsigned long long)st.st_dev == dev && (unsigned long long)st.st_ino == ino;
        atomic_store_explicit(&known, k, memory_order_relaxed);
    }
    return k != 0;
}

static void emit(enum arle_log_level level, int64_t now_ms, const char *text)
{
    char line[LINE_MAX_BYTES + 64];
    int n;
    if (sink == NULL && under_journal()) {
        n = snprintf(line, sizeof line, "<%d>%s %s\n", syslog_priority[level], level_words[level], text);
    } else {
        char stamp[CLOCK_STAMP_BYTES];
        n = snprintf(line, sizeof line, "%s %s %s\n", clock_stamp(stamp, now_ms / 1000), level_words[level], text);
    }
    if (sink != NULL) {
        sink(sink_arg, line, (size_t)n);
        return;
    }
    /* One write per line: lines of several processes on one pipe stay whole. A broken stderr is nobody's business here. */
    if (write(STDERR_FILENO, line, (size_t)n) < 0)
        return;
}

static void report(struct repeat *r, int64_t now_ms)
{
    if (r->hash != 0 && r->n_held > 0) {
        char text[HEAD_MAX + 64];
        int64_t s = (now_ms - r->start_ms + 999) / 1000;
        snprintf(text, sizeof text, "%s ... %u more in %lld s", r->head, r->n_held, (long long)(s > 0 ? s : 1));
        emit(r->level, now_ms, text);
    }
    memset(r, 0, sizeof *r);
}

static uint64_t hash_text(uint64_t h, const char *s)
{
    for (; *s != '\0'; s++)
        h = (h ^ (unsigned char)*s) * 1099511628211ull;
    return h;
}

/* Counts the line in its window; true when it should be held back. */
static bool held_back(enum arle_log_level level, const char *head, const char *fields, int64_t now_ms)
{
    uint64_t h = hash_text(14695981039346656037ull ^ (uint64_t)level, head);
    uint32_t burst = LOG_BURST;
    if (level > ARLE_LOG_WARN) {
        h = hash_text(h, fields);
        burst = 1;
    }
    h |= 1;

    struct repeat *mine = NULL, *oldest = &repeats[0];
    for (int i = 0; i < N_REPEATS; i++) {
        struct repeat *r = &repeats[i];
        if (r->hash != 0 && now_ms - r->start_ms >= LOG_WINDOW_MS)
            report(r, now_ms);
        if (r->hash == h)
            mine = r;
        if (r->start_ms < oldest->start_ms)
            oldest = r;
    }
    if (mine == NULL) {
        mine = oldest;
        report(mine, now_ms);
        mine->hash = h;
        mine->start_ms = now_ms;
        mine->level = level;
        snprintf(mine->head, sizeof mine->head, "%s", head);
    }
    if (++mine->n_seen <= burst)
        return false;
    mine->n_held++;
    return true;
}

static void make_plain(char *s)
{
    for (; *s != '\0'; s++) {
        if ((unsigned char)*s < 0x20 || *s == 0x7f)
            *s = '?';
    }
}

static int64_t now(void)
{
    return now_fn != NULL ? now_fn() : clock_wall_ms();
}

void log_write(enum arle_log_level level, const char *subsystem, const char *event, const char *fmt, ...)
{
    if (!log_enabled(level))
        return;
    char head[HEAD_MAX], fields[LINE_MAX_BYTES - HEAD_MAX - 2], text[LINE_MAX_BYTES];
    va_list ap;
    snprintf(head, sizeof head, "%s %s", subsystem, event);
    va_start(ap, fmt);
    vsnprintf(fields, sizeof fields, fmt, ap);
    va_end(ap);
    make_plain(head);
    make_plain(fields);
    snprintf(text, sizeof text, "%s%s%s", head, fields[0] != '\0' ? " " : "", fields);

    pthread_mutex_lock(&mu);
    int64_t now_ms = now();
    if (!held_back(level, head, fields, now_ms))
        emit(level, now_ms, text);
    pthread_mutex_unlock(&mu);
}

void log_flush(void)
{
    pthread_mutex_lock(&mu);
    for (int i = 0; i < N_REPEATS; i++)
        report(&repeats[i], now());
    pthread_mutex_unlock(&mu);
}

void log_redirect(log_sink_fn new_sink, void *arg, int64_t (*now_ms)(void))
{
    pthread_mutex_lock(&mu);
    sink = new_sink;
    sink_arg = arg;
    now_fn = now_ms;
    memset(repeats, 0, sizeof repeats);
    pthread_mutex_unlock(&mu);
}
