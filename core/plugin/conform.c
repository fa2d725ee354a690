/* Order of the kit: the file, its verdict, then opening and the kind's tests in a child. */
#include "plugin/conform.h"
#include "plugin/judge.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KIT_TIMEOUT_S = 300 };

bool conform_case(struct conform *c, bool ok, const char *name, const char *why)
{
    c->n++;
    c->failed += !ok;
    fprintf(c->out, "%sok %d - %s\n", ok ? "" : "not ", c->n, name);
    if (!ok && why != NULL && why[0] != '\0')
        fprintf(c->out, "# %s\n", why);
    fflush(c->out);
    return ok;
}

void conform_skip(struct conform *c, const char *name, const char *why)
{
    c->n++;
    c->skipped++;
    fprintf(c->out, "ok %d - %s # SKIP %s\n", c->n, name, why);
    fflush(c->out);
}

static void check_services(struct conform *c)
{
    const struct arle_host *h = plugin_host();
    conform_case(c, h->service(h, "no-such-service", 1) == NULL && h->service(h, "log", 99) == NULL,
                 "the host answers NULL for unknown services", "");
}

static void check_texts(struct conform *c, const struct plugin_info *info)
{
    conform_case(c, info->version[0] != '\0', "it has a version", "fill `version` in the descriptor");
    conform_case(c, info->license[0] != '\0', "it has a licence", "fill `license` in the descriptor");
    conform_case(c, info->summary[0] != '\0', "it has a summary", "fill `summary` in the descriptor: one sentence for lists");
    for (const struct arle_conf_key *k = info->keys; k != NULL && k->name != NULL; k++) {
        char name[160];
        snprintf(name, sizeof name, "key %.64s has help", k->name);
        conform_case(c, k->help[0] != '\0', name, "every key says in one sentence what it does");
    }
}

/* In the child: a registry that holds this file, and the configured directories for references. */
static int run_kind(struct conform *c, const char *path)
{
    struct arle_err err = ARLE_ERR_INIT;
    char *real = realpath(path, NULL), *dirs = NULL, *set = NULL;
    struct config *cfg = NULL;
    if (real == NULL)
        return -errno;
    char *slash = strrchr(real, '/');
    *slash = '\0';
    if (asprintf(&dirs, "%s:%s", real, config_str(c->cfg, "plugins", "dir")) < 0 || asprintf(&set, "plugins.dir=%s", dirs) < 0)
        return -ENOMEM;
    *slash = '/';
    const char *sets[] = { set };
    int r = config_open(&cfg, config_path(c->cfg)[0] != '\0' ? config_path(c->cfg) : NULL, sets, 1, &err);
    if (r == 0)
        r = registry_open(&c->reg, cfg, REGISTRY_LENIENT, &err);
    const char *name = NULL;
    uint32_t kind = 0;
    for (size_t i = 0; r == 0 && i < registry_count(c->reg); i++) {
        const struct plugin_info *info = registry_at(c->reg, i);
        if (strcmp(info->path, real) == 0 && info->state != PLUGIN_REFUSED) {
            name = info->name;
            kind = info->kind;
        }
    }
    if (r == 0 && name == NULL)
        r = arle_err_set(&err, -ENOEXEC, "it is refused beside the other plugins of its directory");
    if (r == 0)
        r = registry_find(c->reg, kind, name, &c->self, &err);
    if (!conform_case(c, r == 0, "open() succeeds with default keys", err.msg))
        return 0;
    switch (kind) {
    case ARLE_KIND_BACKEND: conform_backend(c); break;
    case ARLE_KIND_MODEL: conform_model(c); break;
    case ARLE_KIND_TOOL: conform_tool(c); break;
    case ARLE_KIND_KV_STORE: conform_store(c); break;
    default: conform_skip(c, "contract tests of this kind", "this program has none"); break;
    }
    registry_close(c->reg);
    conform_case(c, true, "close() returns", "");
    config_close(cfg);
    free(set);
    free(dirs);
    free(real);
    return 0;
}

static void run_child(struct conform *c, const char *path)
{
    int fds[2], counts[3] = { 0, 1, 0 }, status = 0;
    fflush(c->out);
    pid_t pid = pipe(fds) == 0 ? fork() : -1;
    if (pid < 0) {
        conform_case(c, false, "contract tests", "cannot start a process");
        return;
    }
    if (pid == 0) {
        alarm(KIT_TIMEOUT_S);
        run_kind(c, path);
        counts[0] = c->n;
        counts[1] = c->failed;
        counts[2] = c->skipped;
        fflush(c->out);
        _exit(write(fds[1], counts, sizeof counts) == sizeof counts ? 0 : 1);
    }
    close(fds[1]);
    bool told = read(fds[0], counts, sizeof counts) == sizeof counts;
    close(fds[0]);
    waitpid(pid, &status, 0);
    if (told) {
        c->n = counts[0];
        c->failed = counts[1];
        c->skipped = counts[2];
        return;
    }
    char why[160];
    snprintf(why, sizeof why, "the process %s after the line above",
             !WIFSIGNALED(status) ? "ended" : WTERMSIG(status) == SIGALRM ? "took too long" : strsignal(WTERMSIG(status)));
    c->n = 999;     /* how far the child counted is lost */
    conform_case(c, false, "contract tests run to their end", why);
}

int conform_file(const char *path, const struct config *cfg, const char *model_dir, FILE *out)
{
    struct conform c = { .out = out, .cfg = cfg, .model_dir = model_dir };
    struct plugin *p = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    if (plugin_judge_file(path, config_i64(cfg, "plugins", "probe_timeout"), &p, &err) < 0) {
        conform_case(&c, false, "it can be judged", err.msg);
        return 1;
    }
    bool fine = conform_case(&c, p->info.state == PLUGIN_READY, "it loads, its descriptor is right and probe() finds what it needs",
                             p->info.reason);
    check_services(&c);
    if (fine) {
        check_texts(&c, &p->info);
        run_child(&c, path);
    }
    fprintf(out, "1..%d\n# %s %s: %d passed, %d failed, %d skipped\n", c.n, p->info.name[0] != '\0' ? p->info.name : path,
            p->info.version, c.n - c.failed - c.skipped, c.failed, c.skipped);
    plugin_free(p);
    return c.failed;
}
