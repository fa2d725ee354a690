/* The bookkeeping of the KV plane at 256 running sequences: microseconds per step, and that a step allocates nothing. */
#include "kv_model.h"
#include "util/clock.h"

#include <inttypes.h>

enum { SEQS = 256, PROMPT = 512, WARM = 50, STEPS = 500 };

/* Counts what the plane allocates while it steps; not under a sanitizer, which brings its own allocator. */
static uint64_t allocations;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && defined(__GLIBC__)
extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t m);
extern void *__libc_realloc(void *p, size_t n);
void *malloc(size_t n) { allocations++; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { allocations++; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { allocations++; return __libc_realloc(p, n); }
#endif

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void nothing(void *arg, uint64_t a, uint64_t b)
{
    (void)arg; (void)a; (void)b;
}

int main(int argc, char **argv)
{
    (void)argv;
    static struct kv_seq *s[SEQS];
    static double us[STEPS];
    static int32_t prompt[PROMPT];
    struct fm fm = { 0 };
    struct kv_config cfg = { .page_tokens = 16, .n_pages = SEQS * (PROMPT + STEPS + WARM + 32) / 16, .n_slots = SEQS, .max_seq_tokens = 2048,
                             .prefix_cache = true, .snapshot_bytes = 512 * sizeof(struct fm_state), .snapshot_cadence = 1024,
                             .host_bytes = 8 << 20 };
    uint8_t salt[KV_SALT_BYTES];
    struct kv_hit hit;
    if (fm_init(&fm, &cfg, true, false) < 0)
        return 1;
    kv_salt(fm.kv, "t", "", salt);
    for (int i = 0; i < SEQS; i++) {
        uint32_t length = PROMPT - (argc > 1 ? 0 : (uint32_t)i % 16);      /* with an argument all cross their pages at once */
        for (int k = 0; k < PROMPT; k++)
            prompt[k] = k < 128 ? k : i * 1000 + k;
        if (kv_seq_open(fm.kv, salt, prompt, length, &s[i], &hit, &fm.err) < 0)
            return 1;
        for (uint32_t at = hit.cached_tokens; at < length;) {
            at = kv_seq_cut(s[i], at, length, 0, NULL);
            kv_seq_computed(s[i], at);
        }
    }
    for (int step = 0; step < WARM + STEPS; step++) {
        int64_t start = clock_mono_us();
        uint32_t n, pages;
        for (int i = 0; i < SEQS; i++) {
            kv_seq_tokens(s[i], &n);
            if (kv_seq_reserve(s[i], n + 1) < 0)
                return 1;
            kv_seq_pages(s[i], &pages);
            kv_seq_push(s[i], step * 7 + i);
            kv_seq_computed(s[i], n + 1);
        }
        kv_step_end(fm.kv);
        kv_poll(fm.kv);
        if (step == WARM)
            allocations = 0;
        if (step >= WARM)
            us[step - WARM] = (double)(clock_mono_us() - start);
        fake_call(&fm.dev, fm.compute, nothing, NULL, 0, 0);
    }
    uint64_t seen = allocations;        /* before qsort makes its own */
    qsort(us, STEPS, sizeof *us, by_value);
    printf("{\"bench\": \"kv_step\", \"sequences\": %d, \"warmups\": %d, \"runs\": %d, \"median_us\": %.1f, \"p99_us\": %.1f, "
           "\"allocations\": %" PRIu64 "}\n", SEQS, WARM, STEPS, us[STEPS / 2], us[STEPS * 99 / 100], seen);
    for (int i = 0; i < SEQS; i++)
        kv_seq_close(s[i], false);
    fm_fini(&fm);
    return seen != 0;
}
