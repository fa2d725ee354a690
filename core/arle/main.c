/* The front door: finds the command and runs it. */
#include "arle/cmd.h"
#include "util/log.h"

#include <string.h>

static const struct command *find(const char *name)
{
    for (size_t i = 0; commands[i] != NULL; i++) {
        if (strcmp(commands[i]->name, name) == 0)
            return commands[i];
    }
    return NULL;
}

static int unknown(const char *name)
{
    const char *words[64];
    size_t n = 0;
    while (n < 64 && commands[n] != NULL) {
        words[n] = commands[n]->name;
        n++;
    }
    const char *near = nearest_word(name, words, n);
    fprintf(stderr, "arle: unknown command %s%s%s%s (see arle help)\n", name, near != NULL ? "; did you mean " : "",
            near != NULL ? near : "", near != NULL ? "?" : "");
    return EXIT_USAGE;
}

int main(int argc, char **argv)
{
    struct args args;
    /* Alone, or with options only, it is a conversation. */
    const char *first = argc > 1 ? argv[1] : "";
    int skip = first[0] != '\0' && first[0] != '-';
    const char *name = skip ? first : "chat";
    if (strcmp(first, "--help") == 0 || strcmp(first, "-h") == 0) {
        name = "help";
        skip = 1;
    }
    if (strcmp(first, "--version") == 0 || strcmp(first, "-V") == 0) {
        puts("arle " ARLE_VERSION);
        return EXIT_OK;
    }
    const struct command *cmd = find(name);
    if (cmd == NULL)
        return unknown(name);
    enum args_outcome o = args_parse(&args, "arle", cmd, argc - skip, argv + skip);
    int status = o == ARGS_RUN ? cmd->run(&args) : o == ARGS_DONE ? EXIT_OK : EXIT_USAGE;
    args_fini(&args);
    log_flush();
    if (fflush(stdout) != 0 && status == EXIT_OK)
        status = EXIT_FAILED;
    return status;
}
