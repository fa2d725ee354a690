/*
 * The trained checkpoints on the GPU in bf16 against their golden outputs (f32, computed by an independent implementation): mean
 * NLL within 0.01, greedy tokens equal up to the first step whose margin is under 0.1, whole, in chunks, and token by token through
 * captured steps. Skips without a GPU.
 */
#include "model_harness.h"
#include "tap.h"

#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *model;
static uint32_t chunk;              /* 1: through step graphs */

static bool open_model(struct harness **h, struct golden **g, uint32_t n_seqs, bool drafts)
{
    struct arle_err err = ARLE_ERR_INIT;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/%s", getenv("ARLE_TEST_MODELS") ? getenv("ARLE_TEST_MODELS") : "models", model);
    const struct harness_options o = { .model_dir = dir, .compute = ARLE_BF16, .kv_dtype = ARLE_BF16, .page_tokens = 16, .max_tokens = 2048,
                                       .n_seqs = n_seqs, .seq_tokens = 2048, .drafts = drafts, .graphs = chunk == 1 };
    int opened = harness_open(h, &o, &err);
    if (opened == -ENOEXEC || opened == -ENOENT) {      /* refused or not there; any other failure is one */
        printf("# %s\n", err.msg);
        tap_skip = "no CUDA device";
        return false;
    }
    if (opened < 0 || golden_open(g, dir, &err) < 0) {
        TAP_FAIL("%s", err.msg);
        return false;
    }
    return true;
}

/* A chunk of one is nothing but captured steps. */
static void was_replayed(struct harness *h)
{
    if (chunk == 1)
        EXPECT(harness_counter(h, "graph_launch") > 0);
}

static void golden_outputs(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    struct golden *g = NULL;
    bool drafts = strcmp(model, "qwen35-tiny") == 0;
    if (!open_model(&h, &g, 2, drafts))
        return;
    for (uint32_t i = 0; i < golden_count(g); i++) {
        const struct golden_case *c = golden_at(g, i);
        struct golden_result r;
        int e = golden_run(h, c, chunk, 0.1, drafts && c->drafts != NULL, &r, &err);
        if (e < 0) {
            TAP_FAIL("%s: %s", c->name, err.msg);
            break;
        }
        printf("# %s %s, chunk %u: NLL %.1e off, worst logit %.2e, greedy %u of %u (%u required), drafts wrong %u of %u\n", model, c->name,
               chunk, r.nll_diff, r.worst_logit, r.greedy_equal, c->n_greedy, r.greedy_must, r.drafts_wrong, r.drafts_seen);
        /* Rounding errors of a mean shrink with the root of the number of tokens; the shortest case has fifteen. */
        EXPECT(r.nll_diff <= 0.01 * fmax(1, sqrt(64.0 / c->n_ids)));
        EXPECT(r.greedy_equal >= r.greedy_must);
        EXPECT(r.drafts_wrong * 20 <= r.drafts_seen);       /* near ties fall the other way in bf16 */
    }
    was_replayed(h);
    golden_close(g);
    harness_close(h);
}

/* Several sequences side by side in captured steps, each with the same tokens: their logits are the same bits in every row, and
 * those of the row that ran alone before. */
static void rows_side_by_side(void)
{
    enum { ROWS = 8, STEPS = 40 };
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    struct golden *g = NULL;
    const float *x = NULL;
    if (!open_model(&h, &g, ROWS, false))
        return;
    const struct golden_case *c = golden_at(g, 0);
    uint32_t V = harness_desc(h)->vocab, steps = c->n_ids < STEPS ? c->n_ids : STEPS;
    float *alone = malloc((size_t)steps * V * sizeof *alone);
    for (uint32_t rows = 1; rows <= ROWS && !tap_case_failed; rows++) {
        double worst = 0;
        for (uint32_t s = 0; s < rows; s++)
            harness_reset(h, s);
        for (uint32_t t = 0; t < steps && !tap_case_failed; t++) {
            struct harness_piece p[ROWS];
            for (uint32_t s = 0; s < rows; s++)
                p[s] = (struct harness_piece){ s, t, c->ids + t, 1 };
            if (harness_step(h, p, rows, &x, NULL, &err) < 0)
                TAP_FAIL("%s", err.msg);
            else if (rows == 1)
                memcpy(alone + (size_t)t * V, x, V * sizeof *x);
            for (uint32_t s = 1; s < rows && !tap_case_failed; s++)
                EXPECT(memcmp(x + (size_t)s * V, x, V * sizeof *x) == 0);
            for (uint32_t i = 0; i < V && !tap_case_failed; i++)
                worst = fmax(worst, fabs((double)x[i] - alone[(size_t)t * V + i]));
        }
        printf("# %s, %u rows: worst logit %.2e off that of one row\n", model, rows, worst);
        EXPECT(worst < 0.25);
    }
    was_replayed(h);
    free(alone);
    golden_close(g);
    harness_close(h);
}

/* The registry judges plugins in children, which cannot use a GPU that their parent has opened: one process per model. */
static void (*what)(void);

static void in_a_child(void)
{
    int status = 0;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        what();
        fflush(stdout);
        _exit(tap_skip != NULL && !tap_case_failed ? 77 : tap_case_failed);
    }
    REQUIRE(pid > 0 && waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        SKIP("no CUDA device");
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
    static const char *const models[] = { "qwen35-tiny", "qwen35-micro", "qwen35-moe-tiny" };
    setenv("ARLE_TEST_BACKEND", "cuda", 0);
    static const uint32_t chunks[] = { 2048, 64, 1 };
    for (unsigned i = 0; i < 3; i++) {
        model = models[i];
        what = golden_outputs;
        for (unsigned j = 0; j < 3; j++) {
            chunk = chunks[j];
            RUN(in_a_child);
        }
        what = rows_side_by_side;
        RUN(in_a_child);
    }
    return tap_done();
}
