/*
 * The plugin's descriptor, its configuration, and the choice of the kernels for this machine.
 */
#include "cpu.h"

#include <sched.h>
#include <stdlib.h>
#include <stdio.h>
#include <unistd.h>

static const struct arle_conf_key keys[] = {
    { .name = "threads", .type = ARLE_CONF_I64, .def = "0", .min = 0, .max = 1024, .unit = "threads",
      .help = "Worker threads, the engine's own included; 0 takes one per CPU that the process may run on." },
    { .name = "pin", .type = ARLE_CONF_BOOL, .def = "no", .unit = "",
      .help = "Bind each worker and the engine thread to a CPU of its own." },
    { .name = "isa", .type = ARLE_CONF_ENUM, .def = "auto", .choices = "auto|reference|avx2|avx512|avx512bf16|amx",
      .unit = "",
      .help = "Instruction set of the kernels; auto takes the best that this machine has, reference is plain C, "
              "amx is avx512bf16 with matrix tiles, and avx512bf16 leaves these alone." },
    { .name = "compute", .type = ARLE_CONF_ENUM, .def = "auto", .choices = "auto|f32|bf16", .unit = "",
      .help = "Type of activations; auto is bf16 where the machine multiplies bf16 directly, else f32." },
    { .name = NULL },
};

static unsigned allowed_cpus(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return (unsigned)CPU_COUNT(&set);
    return 1;
}

/* The best set of the machine. *why: the better one that was passed over, for the log. */
static const struct kernels *best_kernels(const char **why)
{
    const struct kernels *k = kernels_amx(why);
    if (k == NULL)
        k = kernels_avx512bf16();
    if (k == NULL)
        k = kernels_avx512();
    if (k == NULL)
        k = kernels_avx2();
    return k != NULL ? k : &kernels_ref;
}

static int choose_kernels(const struct arle_host *host, const char *isa, const struct kernels **out, struct arle_err *err)
{
    const struct kernels *k = NULL;
    const char *why = NULL;
    if (strcmp(isa, "reference") == 0)
        k = &kernels_ref;
    else if (strcmp(isa, "avx2") == 0)
        k = kernels_avx2();
    else if (strcmp(isa, "avx512") == 0)
        k = kernels_avx512();
    else if (strcmp(isa, "avx512bf16") == 0)
        k = kernels_avx512bf16();
    else if (strcmp(isa, "amx") == 0)
        k = kernels_amx(&why);
    else
        k = best_kernels(&why);
    if (k == NULL)
        return arle_err_param(err, -ENOTSUP, "isa", "isa = %s: %s; use auto", isa,
                              why ? why : "this machine or this build lacks the instructions");
    const struct arle_log_service *log = why != NULL && host != NULL ? arle_host_log(host) : NULL;
    if (log != NULL) {
        char fields[160];
        snprintf(fields, sizeof fields, "using=%s reason=\"%s\"", k->name, why);
        log->write(ARLE_LOG_WARN, "cpu", "AMX left alone", fields);
    }
    *out = k;
    return 0;
}

static int cpu_probe(const struct arle_host *host, struct arle_probe *out, struct arle_err *err)
{
    const struct kernels *k = NULL;
    int r = choose_kernels(NULL, "auto", &k, err);
    if (r < 0)
        return r;
    out->usable = 1;
    snprintf(out->detail, sizeof out->detail, "%s kernels, %u CPUs", k->name, allowed_cpus());
    return 0;
}

static int cpu_open(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
    const struct arle_conf_service *cs = arle_host_conf(host);
    struct cpu_ctx *cx = calloc(1, sizeof *cx);
    if (cx == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for backend-cpu");
    const char *isa = "auto", *compute = "auto";
    int64_t threads = 0;
    bool pin = false;
    if (cs != NULL) {
        isa = cs->str(conf, "isa") ? cs->str(conf, "isa") : isa;
        compute = cs->str(conf, "compute") ? cs->str(conf, "compute") : compute;
        threads = cs->i64(conf, "threads");
        pin = cs->i64(conf, "pin") != 0;
    }
    cx->host = host;
    cx->compute = strcmp(compute, "f32") == 0 ? ARLE_F32 : strcmp(compute, "bf16") == 0 ? ARLE_BF16 : 0;
    int r = choose_kernels(host, isa, &cx->k, err);
    if (r == 0)
        r = pool_create(threads > 0 ? (unsigned)threads : allowed_cpus(), pin, &cx->pool, err);
    if (r < 0) {
        free(cx);
        return r;
    }
    cx->n_threads = pool_threads(cx->pool);
    *out_ctx = cx;
    return 0;
}

static void cpu_close(void *ctx)
{
    struct cpu_ctx *cx = ctx;
    if (cx == NULL)
        return;
    pool_destroy(cx->pool);
    free(cx);
}

uint32_t cpu_n_devices(void *ctx)
{
    return 1;
}

/* The model name line of /proc/cpuinfo, or the word CPU. */
static void cpu_model_name(char *out, size_t cap)
{
    FILE *f = fopen("/proc/cpuinfo", "re");
    char line[256];
    snprintf(out, cap, "CPU");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            colon[strcspn(colon, "\n")] = '\0';
            snprintf(out, cap, "%s", colon + 2);
            break;
        }
    }
    if (f != NULL)
        fclose(f);
}

int cpu_device_info(void *ctx, uint32_t index, struct arle_device_info *out, struct arle_err *err)
{
    struct cpu_ctx *cx = ctx;
    struct arle_device_info info = { .struct_size = sizeof info };
    char model[64];
    if (index != 0)
        return arle_err_set(err, -EINVAL, "backend-cpu has one device, asked for number %u", index);
    cpu_model_name(model, sizeof model);
    snprintf(info.name, sizeof info.name, "%s, %s", model, cx->k->name);
    info.threads = cx->n_threads;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    info.mem_total = (uint64_t)sysconf(_SC_PHYS_PAGES) * page;
    info.mem_free = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * page;
    info.default_compute = cx->compute ? cx->compute : cx->k->bf16_dot ? ARLE_BF16 : ARLE_F32;
    uint32_t size = out->struct_size != 0 && out->struct_size < sizeof info ? out->struct_size : (uint32_t)sizeof info;
    memcpy(out, &info, size);
    out->struct_size = size;
    return 0;
}

#define CPU_OP_ENTRY_(name) .name = cpu_##name,
const struct arle_ops cpu_ops = { .struct_size = sizeof cpu_ops, CPU_OPS(CPU_OP_ENTRY_) };

ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_BACKEND),
    .name = "backend-cpu", .version = "0.1.0", .license = "MIT",
    .summary = "Runs models on the CPU: plain C reference, AVX2, AVX-512, AVX-512 BF16 and AMX kernels.",
    .keys = keys,
    .probe = cpu_probe, .open = cpu_open, .close = cpu_close,
    .ops = &cpu_api,
};
