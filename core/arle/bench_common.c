/* Model, engine, ceilings and output lines of `arle bench`. */
#include "arle/bench.h"
#include "core/arle/commit.h"     /* made in the build folder */
#include "util/clock.h"
#include "util/place.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(struct bench *b, const struct arle_err *err)
{
    return cmd_fail(b->args, err);
}

static int read_config(struct bench *b, const char *path, struct arle_err *err)
{
    struct stat st;
    FILE *f = fopen(path, "re");
    if (f == NULL || fstat(fileno(f), &st) < 0 || st.st_size > 16 << 20) {
        if (f != NULL)
            fclose(f);
        return arle_err_set(err, -ENOENT, "%s cannot be read", path);
    }
    b->config_json = calloc(1, (size_t)st.st_size + 1);
    b->config_len = b->config_json == NULL ? 0 : fread(b->config_json, 1, (size_t)st.st_size, f);
    fclose(f);
    return b->config_len == (size_t)st.st_size ? 0 : arle_err_set(err, -EIO, "%s cannot be read", path);
}

/* Shapes are looked for beside the shipped models, then in the source tree that the program was started from. */
static int find_config(struct bench *b, struct arle_err *err)
{
    const char *shape = args_str(b->args, "shape"), *model = args_str(b->args, "model"), *env = getenv("ARLE_MODELS");
    const char *places[] = { env, place_models(), "models" };
    char path[4400];
    if ((shape == NULL) == (model == NULL))
        return arle_err_set(err, -EINVAL, "wants either --model DIR or --shape NAME");
    if (model != NULL) {
        snprintf(b->dir, sizeof b->dir, "%s", model);
        const char *base = strrchr(model, '/');
        snprintf(b->label, sizeof b->label, "%.120s", base != NULL && base[1] ? base + 1 : model);
        b->random = args_flag(b->args, "random-weights");
        snprintf(path, sizeof path, "%s/config.json", model);
        return read_config(b, path, err);
    }
    snprintf(b->label, sizeof b->label, "%.120s", shape);
    b->random = true;
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        if (places[i] == NULL || strchr(shape, '/') != NULL)
            continue;
        snprintf(path, sizeof path, "%s/shapes/%s.json", places[i], shape);
        if (read_config(b, path, err) == 0)
            return 0;
    }
    return arle_err_param(err, -ENOENT, "shape", "no shape %s in %s/shapes (or $ARLE_MODELS/shapes)", shape, place_models());
}

int bench_find_model(struct bench *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    return find_config(b, &err) < 0 ? fail(b, &err) : 0;
}

int bench_use_plugins(struct bench *b, struct registry *reg, struct arle_err *err)
{
    const char *backend = args_str(b->args, "backend");
    int r = registry_backend(reg, backend != NULL ? backend : "auto", &b->backend, err);
    if (r == 0)
        r = registry_model(reg, b->config_json, b->config_len, &b->model, err);
    if (r == 0) {
        const struct arle_backend_api *be = b->backend->ops;
        b->info.struct_size = sizeof b->info;
        r = be->device_info(b->backend->ctx, 0, &b->info, err);
    }
    return r;
}

int bench_need_model(struct bench *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    int r = find_config(b, &err);
    if (r == 0)
        r = registry_open(&b->reg, b->cfg, REGISTRY_LENIENT, &err);
    if (r == 0)
        r = bench_use_plugins(b, b->reg, &err);
    return r < 0 ? fail(b, &err) : 0;
}

int bench_ceilings(struct bench *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    const struct arle_backend_api *be = b->backend->ops;
    struct arle_device *dev = NULL;
    double read = 0, flop = 0;
    int r = ARLE_HAS(be, struct arle_backend_api, ceiling) ? be->open_device(b->backend->ctx, 0, &dev, &err)
                                                           : arle_err_set(&err, -ENOTSUP, "%s measures no ceiling", b->backend->name);
    if (r == 0) {
        r = be->ceiling(dev, &read, &flop, &err);
        be->close_device(dev);
    }
    if (r < 0)
        return fail(b, &err);
    b->read_bytes_s = read > b->read_bytes_s ? read : b->read_bytes_s;
    b->bf16_flop_s = flop > b->bf16_flop_s ? flop : b->bf16_flop_s;
    return 0;
}

static void show_progress(void *arg, uint64_t done, uint64_t total)
{
    if (total > 0)
        fprintf(stderr, "\rpacking weights %3u %%%s", (unsigned)(done * 100 / total), done == total ? "\n" : "");
}

int bench_engine(struct bench *b, uint32_t max_seqs, uint32_t context, bool prefix, struct engine **out)
{
    struct arle_err err = ARLE_ERR_INIT;
    bool has_model = config_n_models(b->cfg) > 0;
    const char *section = has_model ? config_model_section(b->cfg, 0) : NULL;
    struct engine_config ec = {
        .name = b->label, .model_dir = b->dir[0] ? b->dir : NULL, .config_json = b->config_json, .config_len = b->config_len,
        .random_weights = b->random, .max_seqs = max_seqs, .max_tokens = (uint32_t)b->chunk, .max_queue = 4096, .context = context,
        .page_tokens = (uint32_t)config_i64(b->cfg, "kv", "page_tokens"),
        .kv_bytes = (uint64_t)config_i64(b->cfg, "kv", "device_bytes"),
        .kv_snapshot_bytes = prefix ? (uint64_t)config_i64(b->cfg, "kv", "snapshot_bytes") : 0,
        .kv_snapshot_cadence = (uint32_t)config_i64(b->cfg, "kv", "snapshot_cadence"),
        .kv_host_bytes = prefix ? (uint64_t)config_i64(b->cfg, "kv", "host_bytes") : 0,
        .kv_disk_dir = prefix ? config_str(b->cfg, "kv", "disk_dir") : "",
        .kv_disk_bytes = (uint64_t)config_i64(b->cfg, "kv", "disk_bytes"),
        .prefix_cache = prefix, .step_graphs = config_bool(b->cfg, "scheduler", "step_graphs"),
        .run_ahead = config_bool(b->cfg, "scheduler", "run_ahead"), .manual = true,
        .compute = has_model ? config_compute(b->cfg, 0, b->backend->name) : args_str(b->args, "compute"),
        .kv_dtype = section != NULL ? config_str(b->cfg, section, "kv_dtype") : "auto",
        .progress = isatty(STDERR_FILENO) ? show_progress : NULL,
    };
    if (args_str(b->args, "compute") != NULL)
        ec.compute = args_str(b->args, "compute");
    if (args_str(b->args, "kv-dtype") != NULL)
        ec.kv_dtype = args_str(b->args, "kv-dtype");
    int r = engine_open(out, &ec, b->backend->ops, b->backend->ctx, 0, b->model->ops, b->model->ctx, &err);
    return r < 0 ? fail(b, &err) : 0;
}

json_object *bench_line(const struct bench *b, const char *what)
{
    json_object *o = json_object_new_object();
    json_object_object_add(o, "bench", json_object_new_string(what));
    json_object_object_add(o, "commit", json_object_new_string(ARLE_COMMIT));
    if (b->backend != NULL) {
        json_object_object_add(o, "device", json_object_new_string(b->info.name));
        json_object_object_add(o, "backend", json_object_new_string(b->backend->name));
    }
    if (b->model != NULL)
        json_object_object_add(o, "model", json_object_new_string(b->model->name));
    if (b->label[0] != '\0')
        json_object_object_add(o, "shape", json_object_new_string(b->label));
    json_object_object_add(o, "random_weights", json_object_new_boolean(b->random));
    return o;
}

void bench_add(json_object *o, const char *key, double value)
{
    if (value == floor(value) && fabs(value) < 9e15)
        json_object_object_add(o, key, json_object_new_int64((int64_t)value));
    else {
        char text[40];
        snprintf(text, sizeof text, "%.6g", value);
        json_object_object_add(o, key, json_object_new_double_s(value, text));
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_times(json_object *o, double *us, size_t n)
{
    if (n == 0)
        return 0;
    qsort(us, n, sizeof *us, by_value);
    bench_add(o, "runs", (double)n);
    bench_add(o, "median_us", us[n / 2]);
    bench_add(o, "p99_us", us[n * 99 / 100]);
    return us[n / 2];
}

void bench_print(const struct bench *b, json_object *o)
{
    if (b->json)
        puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
    else {
        json_object_object_foreach(o, key, value)
            if (strcmp(key, "commit") != 0 && strcmp(key, "model") != 0 && strcmp(key, "random_weights") != 0)
                printf("%s%s=%s", strcmp(key, "bench") == 0 ? "" : " ", key, json_object_get_string(value));
        putchar('\n');
    }
    fflush(stdout);
    json_object_put(o);
}

void bench_prompt(int32_t *out, uint32_t n, uint64_t seed, uint32_t n_valid)
{
    uint64_t x = seed * 0x9E3779B97F4A7C15ull + 1;
    for (uint32_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        out[i] = (int32_t)(x % n_valid);
    }
}

struct request *bench_submit(struct engine *e, const int32_t *tokens, uint32_t n, uint32_t max_new, const uint32_t *marks,
                             uint32_t n_marks)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct request *rq = NULL;
    struct request_args a = { .tokens = tokens, .n_tokens = n, .max_new = max_new, .n = 1, .ignore_eos = true, .marks = marks,
                              .n_marks = n_marks, .sampling = { .top_p = 1, .repetition = 1 } };
    if (engine_submit(e, &a, &rq, NULL, &err) < 0)
        fprintf(stderr, "arle bench: %s\n", err.msg);
    return rq;
}
