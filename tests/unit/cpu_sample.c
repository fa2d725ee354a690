/*
 * Drawing on backend-cpu: the set that top_k, top_p and min_p leave, found by sorting everything; the share of each id in many
 * draws; and that a draw depends on its row, seed and counter alone.
 */
#include "ops_cases.h"
#include "tap.h"

#define VOCAB 3000

static struct ops_backend be;

/* Draws `n` tokens from one row of logits, 100 rows per call. */
static void draw_many(const float *x, struct arle_sample_row row, int n, int32_t *ids)
{
    enum { ROWS = 100 };
    float *logits = malloc((size_t)ROWS * VOCAB * 4);
    struct arle_sample_row rows[ROWS];
    for (int at = 0; at < n; at += ROWS) {
        for (int r = 0; r < ROWS; r++) {
            memcpy(logits + (size_t)r * VOCAB, x, VOCAB * 4);
            rows[r] = row;
            rows[r].target = -1;
            rows[r].repetition = 1;
            rows[r].counter = row.counter + (uint64_t)(at + r);
        }
        struct arle_sample_args a = {
            .n_rows = ROWS, .vocab = VOCAB, .n_valid = VOCAB, .logits = ops_put(&be, logits, (size_t)ROWS * VOCAB * 4), .ld = VOCAB,
            .rows = ops_put(&be, rows, sizeof rows), .ids = ops_alloc(&be, ROWS * 4), .logprob = ops_alloc(&be, ROWS * 4),
            .target_logprob = ops_alloc(&be, ROWS * 4), .top_ids = ops_alloc(&be, ROWS * 80), .top_logprobs = ops_alloc(&be, ROWS * 80),
            .top_logits = ops_alloc(&be, ROWS * 4), .any_draw = 1,
        };
        OPS_CALL(&be, sample, &a);
        ops_get(&be, ids + at, a.ids, ROWS * 4);
        ops_release(&be);
    }
    free(logits);
}

struct ranked { double p; int id; };

static int by_rank(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->id - y->id;
}

/* Probability of every id after temperature and the cuts, by definition. */
static void exact_shares(const float *x, const struct arle_sample_row *row, double *share)
{
    struct ranked *r = malloc(VOCAB * sizeof *r);
    double top = -1e300, total = 0, sum = 0, kept = 0;
    int n = VOCAB;
    for (int i = 0; i < VOCAB; i++)
        top = x[i] > top ? x[i] : top;
    for (int i = 0; i < VOCAB; i++)
        r[i] = (struct ranked) { exp((x[i] - top) / row->temperature), i };
    qsort(r, VOCAB, sizeof *r, by_rank);
    if (row->top_k > 0 && row->top_k < n)
        n = row->top_k;
    for (int i = 0; i < n; i++)
        total += r[i].p;
    if (row->top_p < 1)
        for (int i = 0; i < n; i++) {
            sum += r[i].p;
            if (sum >= row->top_p * total)
                n = i + 1;
        }
    memset(share, 0, VOCAB * sizeof *share);
    for (int i = 0; i < n; i++)
        if (r[i].p >= row->min_p)
            kept += share[r[i].id] = r[i].p;
    for (int i = 0; i < VOCAB; i++)
        share[i] /= kept;
    free(r);
}

/* Nothing outside the set is ever drawn, and shares match within six standard deviations of a fair draw. */
static void check_shares(const float *x, struct arle_sample_row row)
{
    enum { N = 20000 };
    static int32_t ids[N];
    static double share[VOCAB];
    static int seen[VOCAB];
    memset(seen, 0, sizeof seen);
    exact_shares(x, &row, share);
    draw_many(x, row, N, ids);
    for (int i = 0; i < N; i++) {
        REQUIRE(ids[i] >= 0 && ids[i] < VOCAB);
        seen[ids[i]]++;
    }
    for (int i = 0; i < VOCAB; i++) {
        double sd = sqrt(N * share[i] * (1 - share[i])) + 1;
        if (share[i] == 0 ? seen[i] != 0 : fabs(seen[i] - N * share[i]) > 6 * sd)
            TAP_FAIL("id %d drawn %d times, expected %.1f (top_k %d top_p %g min_p %g)", i, seen[i], N * share[i], row.top_k, (double)row.top_p,
                     (double)row.min_p);
    }
}

static void fill(float *x, uint64_t seed, float scale)
{
    for (int i = 0; i < VOCAB; i++)
        x[i] = ops_random(&seed) * scale;
}

static void shares_match_the_definition(void)
{
    static const struct arle_sample_row rows[] = {
        { .temperature = 1, .top_p = 1 },
        { .temperature = 0.7f, .top_p = 1, .top_k = 20 },
        { .temperature = 1, .top_p = 0.8f },
        { .temperature = 1.3f, .top_p = 0.95f, .top_k = 40 },
        { .temperature = 1, .top_p = 1, .min_p = 0.1f },
        { .temperature = 0.9f, .top_p = 0.9f, .min_p = 0.05f, .top_k = 700 },
        { .temperature = 1, .top_p = 0.9f, .min_p = 0.3f, .top_k = 100 },
        { .temperature = 0.5f, .top_p = 0.001f },
        { .temperature = 2, .top_p = 1, .top_k = 1 },
    };
    float x[VOCAB];
    for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++) {
        fill(x, i + 1, 9);
        check_shares(x, rows[i]);
    }
}

static void equal_values_are_cut_by_id(void)
{
    float x[VOCAB];
    for (int i = 0; i < VOCAB; i++)
        x[i] = i % 3 ? 1 : 2;
    check_shares(x, (struct arle_sample_row) { .temperature = 1, .top_p = 1, .top_k = 7 });
    check_shares(x, (struct arle_sample_row) { .temperature = 1, .top_p = 1, .top_k = 1003 });      /* 1000 twos and three ones */
    check_shares(x, (struct arle_sample_row) { .temperature = 1, .top_p = 0.25f });
}

static void a_draw_is_a_function_of_row_seed_and_counter(void)
{
    float x[VOCAB];
    int32_t a[200], b[200], c[200];
    struct arle_sample_row row = { .temperature = 1, .top_p = 1, .seed = 5 };
    int equal = 0;
    fill(x, 77, 3);
    draw_many(x, row, 200, a);
    row.counter = 100;
    draw_many(x, row, 200, b);
    EXPECT(memcmp(a + 100, b, 100 * sizeof *a) == 0);       /* whatever row of the call it was */
    row.counter = 0;
    row.seed = 6;
    draw_many(x, row, 200, c);
    for (int i = 0; i < 200; i++)
        equal += a[i] == c[i];
    EXPECT(equal < 20);
}

static void infinities_and_nan_are_never_drawn(void)
{
    float x[VOCAB];
    int32_t ids[200];
    for (int i = 0; i < VOCAB; i++)
        x[i] = i % 2 ? -INFINITY : NAN;
    x[40] = x[50] = 1;
    for (int k = 0; k <= 600; k += 200) {
        draw_many(x, (struct arle_sample_row) { .temperature = 1, .top_p = k == 400 ? 0.9f : 1, .top_k = k }, 200, ids);
        for (int i = 0; i < 200; i++)
            EXPECT(ids[i] == 40 || ids[i] == 50);
    }
}

int main(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    char path[4096];
    const char *dir = getenv("ARLE_TEST_PLUGINS");
    snprintf(path, sizeof path, "%s/backend-cpu.so", dir ? dir : ".plugins");
    if (ops_open(&be, path, NULL, &err) < 0) {
        printf("Bail out! %s\n", err.msg);
        return 1;
    }
    RUN(shares_match_the_definition);
    RUN(equal_values_are_cut_by_id);
    RUN(a_draw_is_a_function_of_row_seed_and_counter);
    RUN(infinities_and_nan_are_never_drawn);
    EXPECT(ops_counter(&be, "sample_draw") > 0);
    ops_close(&be);
    return tap_done();
}
