/* Children that judge. The parent only ever reads bytes from them, so nothing in a bad file can harm it. */
#include "plugin/judge.h"
#include "util/clock.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { AT_ONCE = 16, VERDICT_MAX_BYTES = 1 << 20 };

/* What the child was doing: one byte down the pipe before each part, so that the parent can say where it ended. */
enum stage { STAGE_NONE = 0, STAGE_LOAD = 'L', STAGE_PROBE = 'P', STAGE_VERDICT = 'V' };

struct child {
    struct plugin *plugin;      /* NULL: free */
    pid_t pid;
    int fd;
    char stage;
    int64_t start_us;
    struct packet in;           /* bytes after STAGE_VERDICT */
};

/* ---- in the child ---- */

static void send_all(int fd, const void *data, size_t n)
{
    const char *p = data;
    while (n > 0) {
        ssize_t w = write(fd, p, n);
        if (w < 0 && errno != EINTR)
            _exit(1);
        p += w > 0 ? w : 0;
        n -= w > 0 ? (size_t)w : 0;
    }
}

static void send_stage(int fd, char stage)
{
    send_all(fd, &stage, 1);
}

/* A quiet room: no inherited files or handlers, no core dump, gone when the parent goes. */
static void isolate(int *fd)
{
    const struct rlimit no_core = { 0, 0 };
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setrlimit(RLIMIT_CORE, &no_core);
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int null = open("/dev/null", O_RDWR);
    if (null >= 0) {
        dup2(null, 0);
        dup2(null, 1);
        dup2(null, 2);
    }
    if (*fd != 3) {
        dup2(*fd, 3);
        *fd = 3;
    }
    syscall(SYS_close_range, 4u, ~0u, 0u);
}

static void terminate(struct arle_err *err)
{
    err->msg[sizeof err->msg - 1] = '\0';
    err->param[sizeof err->param - 1] = '\0';
}

static int probe(const char *path, const struct arle_plugin *d, struct arle_probe *out, struct arle_err *err)
{
    struct arle_err why = ARLE_ERR_INIT;
    out->struct_size = sizeof *out;
    out->usable = 1;
    if (d->probe == NULL)
        return 0;
    int r = d->probe(plugin_host(), out, &why);
    terminate(&why);
    out->detail[sizeof out->detail - 1] = '\0';
    if (r < 0)
        return arle_err_set(err, r, "%.200s: probe failed: %.280s", path, why.msg[0] != '\0' ? why.msg : strerror(-r));
    if (out->usable == 0)
        return arle_err_set(err, -ENODEV, "%.200s: not usable on this machine: %s", path,
                            out->detail[0] != '\0' ? out->detail : why.msg[0] != '\0' ? why.msg : "the plugin does not say why");
    return 0;
}

static void run_child(const char *path, int fd)
{
    const struct arle_plugin *d = NULL;
    struct arle_probe found = { 0 };
    struct arle_err err = ARLE_ERR_INIT;
    struct packet pk = { 0 };
    isolate(&fd);
    send_stage(fd, STAGE_LOAD);
    if (load_descriptor(path, &d, &err) == 0) {
        send_stage(fd, STAGE_PROBE);
        probe(path, d, &found, &err);
    }
    verdict_pack(&pk, d, &found, err.code < 0 ? err.msg : "");
    uint64_t len = pk.len;
    send_stage(fd, STAGE_VERDICT);
    send_all(fd, &len, sizeof len);
    send_all(fd, pk.data, pk.len);
    _exit(0);       /* exit handlers of the plugin are not our business */
}

/* ---- in the parent ---- */

static bool start(struct child *c, struct plugin *p)
{
    int fds[2];
    memset(c, 0, sizeof *c);
    c->fd = -1;
    if (pipe2(fds, O_CLOEXEC) < 0) {
        plugin_refuse(p, "%s: cannot be judged: %s; raise the limit of open files", p->info.path, strerror(errno));
        return false;
    }
    c->start_us = clock_mono_us();
    c->pid = fork();
    if (c->pid == 0)
        run_child(p->info.path, fds[1]);
    close(fds[1]);
    if (c->pid < 0) {
        plugin_refuse(p, "%s: cannot be judged: %s; raise the limit of processes", p->info.path, strerror(errno));
        close(fds[0]);
        return false;
    }
    c->plugin = p;
    c->fd = fds[0];
    return true;
}

static bool complete(const struct child *c)
{
    uint64_t len;
    if (c->stage != STAGE_VERDICT || c->in.len < sizeof len)
        return false;
    memcpy(&len, c->in.data, sizeof len);
    return c->in.len - sizeof len >= len;
}

/* Takes what is in the pipe. False once the child has nothing more to say. */
static bool receive(struct child *c)
{
    char buf[4096];
    ssize_t n = read(c->fd, buf, sizeof buf);
    if (n < 0 && errno == EINTR)
        return true;
    ssize_t i = 0;
    while (i < n && c->stage != STAGE_VERDICT)
        c->stage = buf[i++];
    if (n - i > 0) {
        size_t add = (size_t)(n - i);
        char *p = c->in.len + add <= VERDICT_MAX_BYTES ? realloc(c->in.data, c->in.len + add) : NULL;
        if (p == NULL)
            return false;
        memcpy(p + c->in.len, buf + i, add);
        c->in.data = p;
        c->in.len += add;
    }
    return n > 0 && !complete(c);
}

static void describe_death(struct child *c, int status)
{
    struct plugin *p = c->plugin;
    const char *where = c->stage == STAGE_PROBE ? "in probe()" : c->stage == STAGE_LOAD ? "while loading, in a constructor or its descriptor"
                                                                                           : "while being judged";
    if (WIFSIGNALED(status))
        plugin_refuse(p, "%s: crashed %s (%s); remove it or install a version that works here", p->info.path, where,
                      strsignal(WTERMSIG(status)));
    else
        plugin_refuse(p, "%s: ended the process with exit status %d %s; remove it or install a version that works here", p->info.path,
                      WEXITSTATUS(status), where);
}

static void finish(struct child *c, bool timed_out, int64_t timeout_ms)
{
    struct plugin *p = c->plugin;
    int status = 0;
    bool done = complete(c);
    if (done || timed_out) {        /* the group too: what a plugin started must not outlive its judging */
        kill(-c->pid, SIGKILL);
        kill(c->pid, SIGKILL);
    }
    while (waitpid(c->pid, &status, 0) < 0 && errno == EINTR)
        ;
    kill(-c->pid, SIGKILL);
    close(c->fd);
    c->in.at = sizeof(uint64_t);
    if (done) {
        if (verdict_unpack(&c->in, p) < 0)
            plugin_refuse(p, "%s: wrote into the pipe of its judge; remove it", p->info.path);
    } else if (timed_out) {
        plugin_refuse(p, "%s: did not end %s within %lld ms; remove it, or raise plugins.probe_timeout if it is only slow", p->info.path,
                      c->stage == STAGE_PROBE ? "probe()" : "loading", (long long)timeout_ms);
    } else {
        describe_death(c, status);
    }
    p->info.judge_us = clock_mono_us() - c->start_us;
    free(c->in.data);
    c->plugin = NULL;
}

static int64_t remaining_ms(const struct child *c, int64_t timeout_ms)
{
    return timeout_ms - (clock_mono_us() - c->start_us) / 1000;
}

/* Waits for the first news or deadline among the running children and acts on all that are due. */
static void attend(struct child *kids, int64_t timeout_ms)
{
    struct pollfd fds[AT_ONCE];
    int64_t wait_ms = timeout_ms;
    for (int i = 0; i < AT_ONCE; i++) {
        fds[i] = (struct pollfd){ .fd = kids[i].plugin != NULL ? kids[i].fd : -1, .events = POLLIN };
        if (kids[i].plugin != NULL && remaining_ms(&kids[i], timeout_ms) < wait_ms)
            wait_ms = remaining_ms(&kids[i], timeout_ms);
    }
    if (poll(fds, AT_ONCE, wait_ms > 0 ? (int)wait_ms : 0) < 0)
        for (int i = 0; i < AT_ONCE; i++)
            fds[i].revents = 0;
    for (int i = 0; i < AT_ONCE; i++) {
        if (kids[i].plugin == NULL)
            continue;
        if (fds[i].revents != 0 && !receive(&kids[i]))
            finish(&kids[i], false, timeout_ms);
        else if (remaining_ms(&kids[i], timeout_ms) <= 0)
            finish(&kids[i], true, timeout_ms);
    }
}

void judge_all(struct plugin **list, size_t n, int64_t timeout_ms)
{
    struct child kids[AT_ONCE];
    size_t next = 0, running = 0;
    memset(kids, 0, sizeof kids);
    do {
        running = 0;
        for (int i = 0; i < AT_ONCE; i++) {
            while (kids[i].plugin == NULL && next < n) {
                struct plugin *p = list[next++];
                if (p->info.state != PLUGIN_REFUSED && start(&kids[i], p))
                    break;
            }
            running += kids[i].plugin != NULL;
        }
        if (running > 0)
            attend(kids, timeout_ms);
    } while (running > 0 || next < n);
}
