/* One plugin with one fault, chosen when it is compiled (-DFAULT_x). Without a fault it is a good one. */
#include <arle/tool.h>

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *declaration(void *ctx)
{
    return "{\"name\": \"probe\", \"description\": \"Does nothing.\", \"parameters\": {\"type\": \"object\", \"properties\": {}}}";
}

static int call(void *ctx, const char *args_json, char *out, size_t cap, size_t *out_len, int64_t deadline_ms, struct arle_err *err)
{
    if (strstr(args_json, "no_such_argument") != NULL)
        return arle_err_param(err, -EINVAL, "no_such_argument", "probe: unknown argument");
    *out_len = 2;
    strncpy(out, "ok", cap);
    return 0;
}

static const struct arle_tool_api api = {
    .struct_size = sizeof api,
    .declaration = declaration,
#ifdef FAULT_TABLE
    .struct_size = offsetof(struct arle_tool_api, call),
#endif
    .call = call,
};

static int probe(const struct arle_host *host, struct arle_probe *out, struct arle_err *err)
{
#ifdef FAULT_PROBE_CRASH
    raise(SIGSEGV);
#endif
#ifdef FAULT_PROBE_ENDLESS
    for (;;)
        pause();
#endif
#ifdef FAULT_PROBE_EXIT
    exit(0);
#endif
#ifdef FAULT_UNUSABLE
    out->usable = 0;
    strcpy(out->detail, "no flux capacitor; install libflux");
    return 0;
#endif
#ifdef FAULT_PROBE_ERROR
    return arle_err_set(err, -EIO, "the driver is older than 12; update it");
#endif
    strcpy(out->detail, host->service(host, "log", 1) != NULL ? "log service found" : "no log service");
    return 0;
}

static int open_it(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
#ifdef FAULT_OPEN
    return arle_err_set(err, -ENODEV, "device 7 is gone; plug it in again");
#endif
#ifdef FAULT_UNDEFINED
    extern int a_symbol_that_nobody_defines(void);
    return a_symbol_that_nobody_defines();
#endif
#ifdef FAULT_LIBRARY
    extern int arle_test_gone(void);
    return arle_test_gone();
#endif
    const struct arle_conf_service *cs = arle_host_conf(host);
    *out_ctx = calloc(1, sizeof(int64_t));
    if (*out_ctx == NULL)
        return -ENOMEM;
    *(int64_t *)*out_ctx = cs->i64(conf, "depth");
    return 0;
}

static void close_it(void *ctx)
{
    free(ctx);
}

#if defined FAULT_CTOR_CRASH || defined FAULT_CTOR_ENDLESS || defined FAULT_CTOR_EXIT
__attribute__((constructor)) static void on_load(void)
{
#if defined FAULT_CTOR_CRASH
    abort();
#elif defined FAULT_CTOR_ENDLESS
    for (;;)
        pause();
#else
    _exit(7);
#endif
}
#endif

static const struct arle_conf_key keys[] = {
    { .name = "depth", .type = ARLE_CONF_I64, .def = "3", .min = 1, .max = 9, .unit = "levels", .help = "How deep." },
    { .name = NULL },
};

#if defined FAULT_NO_DESCRIPTOR
ARLE_EXPORT extern const int arle_something_else;
const int arle_something_else = 1;
int arle_unused(const struct arle_host *host);
int arle_unused(const struct arle_host *host)
{
    return keys[0].type == 0 && probe(host, NULL, NULL) && open_it(host, NULL, NULL, NULL) && api.struct_size && (close_it(NULL), 1);
}
#elif defined FAULT_FUNCTION
ARLE_EXPORT int arle_plugin_v1(void);
int arle_plugin_v1(void)
{
    return keys[0].type == 0 && probe(NULL, NULL, NULL) && open_it(NULL, NULL, NULL, NULL) && api.struct_size && (close_it(NULL), 1);
}
#else
ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_TOOL),
#ifdef NAME
    .name = NAME,
#else
    .name = "tool-probe",
#endif
    .version = "1.0",
    .license = "MIT",
    .summary = "A tool that does nothing.",
    .keys = keys,
    .probe = probe,
    .open = open_it,
    .close = close_it,
    .ops = &api,
    OVERRIDES
};
#endif
