/*
 * The trained checkpoints on the GPU in bf16 against their golden outputs (f32, computed by an independent implementation): mean
 * NLL within 0.01, greedy tokens equal up to the first step whose margin is under 0.1, whole and in chunks. Skips without a GPU.
 */
#include "model_harness.h"
#include "tap.h"

#include <sys/wait.h>
#include <unistd.h>

static const char *model;
static uint32_t chunk;

static void golden_outputs(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    struct golden *g = NULL;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/%s", getenv("ARLE_TEST_MODELS") ? getenv("ARLE_TEST_MODELS") : "models", model);
    bool drafts = strcmp(model, "qwen35-tiny") == 0;
    const struct harness_options o = { .model_dir = dir, .compute = ARLE_BF16, .kv_dtype = ARLE_BF16, .page_tokens = 16, .max_tokens = 2048,
                                       .n_seqs = 2, .seq_tokens = 2048, .drafts = drafts };
    int opened = harness_open(&h, &o, &err);
    if (opened == -ENOEXEC || opened == -ENOENT) {      /* refused or not there; any other failure is one */
        printf("# %s\n", err.msg);
        SKIP("no CUDA device");
    }
    if (opened < 0)
        TAP_FAIL("%s", err.msg);
    REQUIRE(opened == 0);
    REQUIRE(golden_open(&g, dir, &err) == 0);
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
        EXPECT(r.nll_diff <= 0.01);
        EXPECT(r.greedy_equal >= r.greedy_must);
        EXPECT(r.drafts_wrong * 20 <= r.drafts_seen);       /* near ties fall the other way in bf16 */
    }
    golden_close(g);
    harness_close(h);
}

/* The registry judges plugins in children, which cannot use a GPU that their parent has opened: one process per model. */
static void in_a_child(void)
{
    int status = 0;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        golden_outputs();
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
    for (unsigned i = 0; i < 3; i++)
        for (unsigned j = 0; j < 2; j++) {
            model = models[i];
            chunk = j == 0 ? 2048 : 64;
            RUN(in_a_child);
        }
    return tap_done();
}
