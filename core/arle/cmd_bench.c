/* `arle bench`: options, and which measurement. The measurements are in bench_*.c. */
#include "arle/bench.h"
#include "util/log.h"
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    int (*run)(struct bench *b);
    const char *batch, *context;        /* defaults */
    long long runs;
} kinds[] = {
    { "step", bench_step, "1", "512", 50 },
    { "prefill", bench_prefill, "1", "512,2048", 3 },
    { "ceiling", bench_ceiling, "1", "1", 1 },
    { "tokenize", bench_tokenize, "1", "1", 5 },
    { "agent", bench_agent, "1", "1", 1 },
    { "serve", bench_serve, "1,16", "512", 2 },
};

/* "1,16,64" */
static bool read_list(const struct bench *b, const char *name, const char *otherwise, uint32_t *out, uint32_t *n)
{
    const char *text = args_str(b->args, name);
    for (const char *p = text != NULL ? text : otherwise; *n < BENCH_MAX_LIST;) {
        char *end;
        unsigned long v = strtoul(p, &end, 10);
        if (end == p || v < 1 || v > 1u << 24 || (*end != ',' && *end != '\0'))
            break;
        out[(*n)++] = (uint32_t)v;
        if (*end == '\0')
            return true;
        p = end + 1;
    }
    fprintf(stderr, "arle bench: --%s wants up to %d whole numbers with commas between them\n", name, BENCH_MAX_LIST);
    return false;
}

static bool read_options(struct bench *b, size_t kind)
{
    b->json = args_flag(b->args, "json");
    return args_int(b->args, "runs", 1, 1000000, kinds[kind].runs, &b->runs) && args_int(b->args, "warmups", 0, 1000000, 3, &b->warmups) &&
           args_int(b->args, "chunk", 64, 65536, 512, &b->chunk) && read_list(b, "batch", kinds[kind].batch, b->batch, &b->n_batch) &&
           read_list(b, "context", kinds[kind].context, b->context, &b->n_context);
}

static int run_bench(const struct args *args)
{
    struct bench b = { .args = args };
    size_t n = sizeof kinds / sizeof kinds[0], kind = 0;
    while (kind < n && (args->n_rest == 0 || strcmp(args->rest[0], kinds[kind].name) != 0))
        kind++;
    if (kind == n) {
        fprintf(stderr, "arle bench: wants step, prefill, ceiling, tokenize, agent or serve\n");
        return EXIT_USAGE;
    }
    if (!read_options(&b, kind))
        return EXIT_USAGE;
    int status = cmd_config(args, false, &b.cfg);
    if (status != 0)
        return status;
    if (!config_is_set(b.cfg, "log", "level"))
        log_set_level(ARLE_LOG_WARN);       /* results stand alone unless more is asked for */
    status = kinds[kind].run(&b);
    if (b.reg != NULL)
        registry_close(b.reg);
    config_close(b.cfg);
    free(b.config_json);
    return status;
}

static const struct option_row options[] = {
    { "json", 0, NULL, "Prints one JSON object per measurement." },
    { "model", 'm', "DIR", "Folder of the model." },
    { "shape", 0, "NAME", "A published size with random weights: the name of a file in models/shapes." },
    { "random-weights", 0, NULL, "Takes only config.json from --model." },
    { "backend", 0, "NAME", "Backend plugin; the default takes an accelerator where one works." },
    { "compute", 0, "TYPE", "f32 or bf16; the default is the device's own." },
    { "kv-dtype", 0, "TYPE", "Storage of keys and values: f32, bf16, int8, fp8, int4." },
    { "batch", 'b', "LIST", "step: sequences at once, as 1,16,64; serve: connections at once." },
    { "context", 'c', "LIST", "step: tokens before the measured steps; prefill and serve: length of the prompt." },
    { "chunk", 0, "N", "Tokens of one prefill step (512)." },
    { "runs", 'n', "N", "Measured runs; serve: requests per connection." },
    { "warmups", 0, "N", "Runs before that (3)." },
    { "file", 0, "FILE", "tokenize: the text; without it, made-up English." },
    { "sessions", 0, "N", "agent: conversations (4)." },
    { "at-once", 0, "N", "agent: how many of them at a time (all)." },
    { "turns", 0, "N", "agent: turns of each (4)." },
    { "system", 0, "N", "agent: tokens of the shared system prompt (1000)." },
    { "message", 0, "N", "agent: tokens of each new message or tool result (100)." },
    { "answer", 0, "N", "agent: tokens of each answer (32)." },
    { "output", 0, "N", "serve: tokens of each answer (128)." },
    { "url", 0, "URL", "serve: a running server, http://ADDRESS:PORT, instead of one in this process; --model names what it serves." },
    { "key", 0, "KEY", "serve: API key for --url." },
    { "cache", 0, "WHICH", "agent: prefix cache on, off or both (both)." },
    { NULL, 0, NULL, NULL },
};

const struct command cmd_bench = {
    .name = "bench", .args = "step|prefill|ceiling|tokenize|agent|serve", .max_args = 1,
    .summary = "Measures the engine on this machine, beside what the machine can do at best.",
    .help = "step times decode steps, prefill the time to the first token of a cold prompt, ceiling the memory bandwidth and the "
            "matrix rate of the device, tokenize the tokenizer, agent conversations of many turns with and without the prefix "
            "cache, and serve the whole server under load over HTTP. Times are in microseconds; of_ceiling compares with what was measured in the same run.",
    .options = options, .run = run_bench,
};
