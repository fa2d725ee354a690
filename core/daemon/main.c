/* arled: the daemon. Reads a configuration, checks it, and serves until it is told to stop. */
#include <string.h>

#include "daemon/serve.h"
#include "plugin/registry.h"
#include "util/log.h"
#include "util/options.h"

static const struct option_row options[] = {
    { "check-config", 0, NULL, "Reads the configuration and judges the plugins, says what is wrong, and exits." },
    { "version", 'V', NULL, "Prints the version." },
    { NULL, 0, NULL, NULL },
};

static int check(const struct config *cfg)
{
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    if (registry_open(&reg, cfg, 0, &err) < 0) {
        fprintf(stderr, "arled: %s\n", err.msg);
        return 1;
    }
    registry_close(reg);
    printf("configuration ok: %zu model%s\n", config_n_models(cfg), config_n_models(cfg) == 1 ? "" : "s");
    return 0;
}

static int run(const struct args *a)
{
    struct config *cfg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    enum arle_log_level level;
    if (args_flag(a, "version")) {
        puts("arled " ARLE_VERSION);
        return 0;
    }
    const char *path = args_str(a, "config");
    if (config_open(&cfg, path != NULL ? path : ARLE_SYSCONF_DIR "/arle.ini", a->sets, a->n_sets, &err) < 0) {
        fprintf(stderr, "arled: %s\n", err.msg);
        return 1;
    }
    if (log_level_parse(config_str(cfg, "log", "level"), &level) == 0)
        log_set_level(level);
    struct serve_opts o = { .program = "arled", .sets = a->sets, .n_sets = a->n_sets };
    int status = args_flag(a, "check-config") ? check(cfg) : serve(&cfg, &o);
    config_close(cfg);
    return status;
}


static const struct command arled_command = {
    .name = "arled", .args = "", .max_args = 0,
    .summary = "Serves large language models over HTTP.",
    .help = "Without --config it reads arle.ini of the system. SIGTERM drains and ends it, SIGHUP reloads what may change live.\n"
            "Exit status: 0 ended on request, 1 could not start, 2 usage, 75 a device died and the service should be restarted.\n",
    .options = options, .run = run,
};

int main(int argc, char **argv)
{
    struct args args;
    enum args_outcome o = args_parse(&args, "arled", &arled_command, argc, argv);
    int status = o == ARGS_RUN ? run(&args) : o == ARGS_DONE ? 0 : 2;
    args_fini(&args);
    log_flush();
    return status;
}
