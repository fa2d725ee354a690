/* The table of commands, and what several of them share. */
#include "arle/cmd.h"
#include "util/log.h"

#include <unistd.h>

const struct command *const commands[] = {
    &cmd_chat,
    &cmd_run,
    &cmd_serve,
    &cmd_tokenize,
    &cmd_bench,
    &cmd_kv,
    &cmd_plugins,
    &cmd_doctor,
    &cmd_help,
    NULL,
};

int cmd_fail(const struct args *a, const struct arle_err *err)
{
    fprintf(stderr, "arle %s: %s\n", a->cmd->name, err->msg);
    return EXIT_FAILED;
}

int cmd_config(const struct args *a, bool with_default, struct config **out)
{
    struct arle_err err = ARLE_ERR_INIT;
    const char *path = args_str(a, "config");
    if (path == NULL && with_default && access(ARLE_SYSCONF_DIR "/arle.ini", R_OK) == 0)
        path = ARLE_SYSCONF_DIR "/arle.ini";
    int r = config_open(out, path, a->sets, a->n_sets, &err);
    if (r < 0)
        return cmd_fail(a, &err);
    enum arle_log_level level;
    if (log_level_parse(config_str(*out, "log", "level"), &level) == 0)
        log_set_level(level);
    return 0;
}
