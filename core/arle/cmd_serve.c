/* `arle serve`: arled in the foreground, from flags. */
#include "arle/session.h"
#include "daemon/serve.h"

static int run_serve(const struct args *a)
{
    struct config *cfg = NULL;
    const char *listen = args_str(a, "listen");
    if (listen != NULL)
        args_preset((struct args *)(uintptr_t)a, "server.listen=%s", listen);      /* main()'s own variable */
    int status = session_config(a, true, args_str(a, "served-name"), &cfg);
    if (status != 0)
        return status;
    struct serve_opts o = { .program = "arle serve", .sets = a->sets, .n_sets = a->n_sets, .banner = true };
    status = serve(&cfg, &o);
    config_close(cfg);
    return status;
}

static const struct option_row options[] = {
    MODEL_OPTIONS,
    { "listen", 'l', "HOST:PORT", "Address of the server; port 0 takes a free one. Short for --set server.listen=HOST:PORT." },
    { "served-name", 0, "NAME", "Name of the model in requests and replies; otherwise the folder's." },
    { NULL, 0, NULL, NULL },
};

const struct command cmd_serve = {
    .name = "serve", .args = "", .max_args = 0,
    .summary = "Serves a model over HTTP, in the foreground.",
    .help = "No configuration file is needed; --config FILE adds one. Ctrl-C or SIGTERM ends it after the running answers.\n",
    .options = options, .run = run_serve,
};
