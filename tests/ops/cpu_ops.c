/*
 * backend-cpu: every kernel set against the double-precision loops, against the reference, and against itself under other
 * batches, chunkings and numbers of threads.
 */
#include "ops_cases.h"
#include "tap.h"

#include <sched.h>

static const char *const isas[] = { "reference", "avx2", "avx512", "avx512bf16", "amx" };
static const uint32_t dtypes[] = { ARLE_F32, ARLE_BF16 };
static const char *isa, *threads;
static struct ops_backend be;

static const char *plugin_path(void)
{
    static char path[4096];
    const char *dir = getenv("ARLE_TEST_PLUGINS");
    snprintf(path, sizeof path, "%s/backend-cpu.so", dir ? dir : ".plugins");
    return path;
}

static int open_cpu(struct ops_backend *b, const char *with_isa, const char *n_threads)
{
    struct arle_err err = ARLE_ERR_INIT;
    const char *conf[] = { "isa", with_isa, "threads", n_threads, NULL };
    static const char *kept[8][5];
    static int n;
    memcpy(kept[n % 8], conf, sizeof conf);
    int r = ops_open(b, plugin_path(), kept[n++ % 8], &err);
    if (r < 0)
        printf("# %s\n", err.msg);
    return r;
}

#define MAX_CASES 256
static struct ops_result result[2][MAX_CASES];          /* of the kernel set under test, kept for the comparisons below */
static struct ops_result ref_result[2][MAX_CASES];      /* of the reference, which is the first set */

static void every_case_agrees_with_double_loops(void)
{
    REQUIRE(ops_n_cases <= MAX_CASES);
    for (unsigned d = 0; d < 2; d++)
        for (unsigned i = 0; i < ops_n_cases; i++) {
            struct ops_result *res = &result[d][i];
            ops_result_free(res);
            int r = ops_run(&be, &ops_cases[i], dtypes[d], res);
            if (r < 0)
                TAP_FAIL("%s %s: %s", isa, ops_cases[i].name, be.why);
            EXPECT(r < 0 || res->n_parts > 0);
            for (unsigned j = 0; j < res->n_parts; j++) {
                double tol = dtypes[d] == ARLE_F32 ? res->part[j].tol_f32 : res->part[j].tol_bf16, e = ops_error(&res->part[j]);
                if (!(e <= tol))
                    TAP_FAIL("%s %s %s, %s: error %.3g, allowed %.3g", isa, d ? "bf16" : "f32", ops_cases[i].name, res->part[j].what, e, tol);
            }
        }
}

static void run_reference(void)
{
    struct ops_backend ref;
    REQUIRE(open_cpu(&ref, "reference", "1") == 0);
    for (unsigned d = 0; d < 2; d++)
        for (unsigned i = 0; i < ops_n_cases; i++)
            EXPECT_EQ(ops_run(&ref, &ops_cases[i], dtypes[d], &ref_result[d][i]), 0);
    ops_close(&ref);
}

/* Both round the same sums in other orders: f32 by a few ulp of the largest term, bf16 by one rounding of the result. */
static void every_case_agrees_with_the_reference(void)
{
    if (ref_result[0][0].n_parts == 0)
        run_reference();
    for (unsigned d = 0; d < 2; d++)
        for (unsigned i = 0; i < ops_n_cases; i++) {
            const struct ops_result *a = &result[d][i], *c = &ref_result[d][i];
            REQUIRE(a->n_parts == c->n_parts);
            for (unsigned j = 0; j < a->n_parts; j++) {
                struct ops_part p = a->part[j];
                p.want = malloc((size_t)p.n * sizeof *p.want);
                for (int64_t k = 0; k < p.n; k++)
                    p.want[k] = c->part[j].got[k];
                double e = ops_error(&p), tol = d == 0 ? p.tol_f32 : p.tol_bf16;
                tol = p.tol_other > tol ? p.tol_other : tol;
                if (!(e <= tol))
                    TAP_FAIL("%s %s %s, %s: %.3g from the reference, allowed %.3g", isa, d ? "bf16" : "f32", ops_cases[i].name, p.what, e, tol);
                free(p.want);
            }
        }
}

/* With n threads; returns how often one of them did products of another's share. */
static uint64_t same_bits_with(const char *n)
{
    struct ops_backend other;
    if (open_cpu(&other, isa, n) < 0) {
        TAP_FAIL("%s does not open with %s threads", isa, n);
        return 0;
    }
    for (unsigned d = 0; d < 2; d++)
        for (unsigned i = 0; i < ops_n_cases; i++) {
            struct ops_result c;
            ops_run(&other, &ops_cases[i], dtypes[d], &c);
            EXPECT_EQ(c.n_parts, result[d][i].n_parts);
            for (unsigned j = 0; j < c.n_parts; j++)
                if (memcmp(result[d][i].part[j].got, c.part[j].got, (size_t)c.part[j].n * 4) != 0)
                    TAP_FAIL("%s %s %s differs with %s threads", isa, ops_cases[i].name, c.part[j].what, n);
            ops_result_free(&c);
        }
    uint64_t helped = ops_counter(&other, "linear_helped");
    EXPECT(ops_counter(&other, "parallel_ops") > 0);
    ops_close(&other);
    return helped;
}

static void threads_do_not_change_a_bit(void)
{
    same_bits_with("2");
    same_bits_with("3");
}

/* Threads that share one processor cannot all have it: who has it does the others' products. */
static void threads_without_a_processor_are_helped(void)
{
    cpu_set_t was, one;
    REQUIRE(sched_getaffinity(0, sizeof was, &was) == 0);
    CPU_ZERO(&one);
    for (int c = 0; c < CPU_SETSIZE && CPU_COUNT(&one) == 0; c++)
        if (CPU_ISSET(c, &was))
            CPU_SET(c, &one);
    REQUIRE(sched_setaffinity(0, sizeof one, &one) == 0);
    EXPECT(same_bits_with("2") > 0);
    sched_setaffinity(0, sizeof was, &was);
}

static void rows_do_not_see_each_other(void)
{
    for (unsigned d = 0; d < 2; d++) {
        EXPECT_EQ(ops_rows_alone(&be, dtypes[d]), 0);
        EXPECT_EQ(ops_moe_alone(&be, dtypes[d]), 0);
    }
}

static void chunks_do_not_change_a_bit(void)
{
    static const uint32_t kv[] = { ARLE_F32, ARLE_BF16, ARLE_I8, ARLE_I4G };
    struct ops_backend two;
    REQUIRE(open_cpu(&two, isa, "2") == 0);
    for (unsigned d = 0; d < 2; d++) {
        EXPECT_EQ(ops_gdn_chunks(&be, dtypes[d]), 0);
        for (unsigned i = 0; i < (strcmp(isa, "reference") == 0 ? 1 : 4); i++)
            EXPECT_EQ(ops_attn_chunks(&two, dtypes[d], kv[i]), 0);
    }
    EXPECT(ops_counter(&two, "attn_split") > 0);        /* both forms of attention took part */
    EXPECT(ops_counter(&two, "attn_tile") > 0);
    ops_close(&two);
}

static void padding_rows_do_not_leak(void)
{
    for (unsigned d = 0; d < 2; d++)
        EXPECT_EQ(ops_padding(&be, dtypes[d]), 0);
}

static void the_chosen_kernels_ran(void)
{
    static const char *const paths[] = { "linear_ref", "linear_avx2", "linear_avx512", "linear_avx512bf16", "linear_amx" };
    for (unsigned i = 0; i < 5; i++) {
        uint64_t n = ops_counter(&be, paths[i]);
        if (strcmp(isas[i], isa) == 0)
            EXPECT(n > 0);
        else                            /* the last two count their f32 products under no level of their own */
            EXPECT_EQ(n, 0);
    }
    EXPECT(ops_counter(&be, "linear_gemv") > 0);
    EXPECT(ops_counter(&be, "linear_gemm") > 0);
    EXPECT_EQ(ops_counter(&be, "linear_panel") > 0, strcmp(isa, "avx2") == 0);
}

int main(int argc, char **argv)
{
    threads = "1";
    for (unsigned i = 0; i < sizeof isas / sizeof *isas; i++) {
        isa = isas[i];
        if (argc > 1 && strcmp(argv[1], isa) != 0)
            continue;
        if (open_cpu(&be, isa, threads) < 0) {
            printf("# this machine has no %s\n", isa);
            continue;
        }
        RUN(every_case_agrees_with_double_loops);
        if (i > 0)
            RUN(every_case_agrees_with_the_reference);
        RUN(rows_do_not_see_each_other);
        RUN(padding_rows_do_not_leak);
        RUN(chunks_do_not_change_a_bit);
        RUN(threads_do_not_change_a_bit);
        RUN(threads_without_a_processor_are_helped);
        RUN(the_chosen_kernels_ran);
        ops_close(&be);
    }
    for (unsigned d = 0; d < 2; d++)
        for (unsigned i = 0; i < ops_n_cases; i++) {
            ops_result_free(&result[d][i]);
            ops_result_free(&ref_result[d][i]);
        }
    return tap_done();
}
