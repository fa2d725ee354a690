/* Both ends of the control socket of ctl.h. One thread answers one client at a time: commands are short and rare. */
#include "ctl/ctl.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "util/log.h"

#define CLIENT_SECONDS 5        /* a client that says nothing for so long is dropped */

struct ctl_server {
    int fd, stop[2];
    char path[sizeof ((struct sockaddr_un *)0)->sun_path];
    pthread_t thread;
    ctl_handler_fn handler;
    void *arg;
};

static int address(struct sockaddr_un *sa, const char *path, struct arle_err *err)
{
    *sa = (struct sockaddr_un){ .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof sa->sun_path)
        return arle_err_param(err, -EINVAL, "server.control", "the path %.60s... is too long for a socket", path);
    memcpy(sa->sun_path, path, strlen(path) + 1);
    return 0;
}

static int send_all(int fd, const char *p, size_t n)
{
    while (n > 0) {
        ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
        if (k <= 0)
            return -errno;
        p += k;
        n -= (size_t)k;
    }
    return 0;
}

int ctl_parse(char *line, const char **command, const char **argument, struct arle_err *err)
{
    char *end;
    long version = strtol(line, &end, 10);
    if (end == line || *end != ' ')
        return arle_err_set(err, -EPROTO, "expected: %d COMMAND [ARGUMENT]", CTL_VERSION);
    if (version != CTL_VERSION)
        return arle_err_set(err, -EPROTO, "this daemon speaks version %d of the control protocol, not %ld", CTL_VERSION, version);
    char *word = end + strspn(end, " ");
    char *rest = word + strcspn(word, " ");
    if (*word == '\0')
        return arle_err_set(err, -EINVAL, "no command");
    if (*rest != '\0') {
        *rest++ = '\0';
        rest += strspn(rest, " ");
    }
    *command = word;
    *argument = rest;
    return 0;
}

/* ---- server ---- */

static int answer(struct ctl_server *ctl, int fd, char *line)
{
    const char *command, *argument;
    struct arle_err err = ARLE_ERR_INIT;
    struct sbuf out = SBUF_INIT, reply = SBUF_INIT;
    int r = ctl_parse(line, &command, &argument, &err);
    if (r == 0)
        r = ctl->handler(ctl->arg, command, argument, &out, &err);
    if (r < 0) {
        sbuf_fmt(&reply, "%d error %s\n", CTL_VERSION, err.msg);
    } else {
        sbuf_fmt(&reply, "%d ok %zu\n", CTL_VERSION, out.n);
        sbuf_add(&reply, sbuf_text(&out), out.n);
    }
    r = reply.failed || out.failed ? -ENOMEM : send_all(fd, reply.p, reply.n);
    sbuf_fini(&out);
    sbuf_fini(&reply);
    return r;
}

static void serve_client(struct ctl_server *ctl, int fd)
{
    struct timeval limit = { .tv_sec = CLIENT_SECONDS };
    struct ucred who;
    socklen_t len = sizeof who;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) < 0 || (who.uid != 0 && who.uid != geteuid()))
        return;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    char line[CTL_MAX_LINE + 1];
    size_t n = 0;
    for (;;) {
        ssize_t k = recv(fd, line + n, CTL_MAX_LINE - n, 0);
        if (k <= 0)
            return;
        n += (size_t)k;
        line[n] = '\0';
        for (char *nl; (nl = memchr(line, '\n', n)) != NULL;) {
            size_t used = (size_t)(nl - line) + 1;
            *nl = '\0';
            if (answer(ctl, fd, line) < 0)
                return;
            memmove(line, line + used, n - used);
            n -= used;
        }
        if (n == CTL_MAX_LINE)
            return;
    }
}

static void *serve(void *arg)
{
    struct ctl_server *ctl = arg;
    struct pollfd p[2] = { { .fd = ctl->fd, .events = POLLIN }, { .fd = ctl->stop[0], .events = POLLIN } };
    while (poll(p, 2, -1) >= 0 || errno == EINTR) {
        if (p[1].revents != 0)
            break;
        int fd = accept4(ctl->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        serve_client(ctl, fd);
        close(fd);
    }
    return NULL;
}

int ctl_start(struct ctl_server **out, const char *path, ctl_handler_fn handler, void *arg, struct arle_err *err)
{
    struct sockaddr_un sa;
    struct stat st;
    int r = address(&sa, path, err);
    if (r < 0)
        return r;
    struct ctl_server *ctl = calloc(1, sizeof *ctl);
    if (ctl == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the control socket");
    ctl->handler = handler;
    ctl->arg = arg;
    ctl->stop[0] = ctl->stop[1] = -1;
    if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode))
        unlink(path);
    ctl->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177);
    int bound = ctl->fd < 0 ? -1 : bind(ctl->fd, (struct sockaddr *)&sa, sizeof sa);
    int bind_errno = errno;
    umask(mask);
    if (bound < 0 || listen(ctl->fd, 16) < 0 || pipe2(ctl->stop, O_CLOEXEC) < 0) {
        r = arle_err_param(err, -(bound < 0 ? bind_errno : errno), "server.control", "cannot listen on %s: %s", path,
                           strerror(bound < 0 ? bind_errno : errno));
        ctl_stop(ctl);
        return r;
    }
    memcpy(ctl->path, sa.sun_path, sizeof ctl->path);
    if (pthread_create(&ctl->thread, NULL, serve, ctl) != 0) {
        close(ctl->stop[1]);
        ctl->stop[1] = -1;
        ctl_stop(ctl);
        return arle_err_set(err, -EAGAIN, "cannot start the control thread");
    }
    *out = ctl;
    return 0;
}

void ctl_stop(struct ctl_server *ctl)
{
    if (ctl == NULL)
        return;
    if (ctl->stop[1] >= 0) {
        close(ctl->stop[1]);            /* the other end becomes readable */
        pthread_join(ctl->thread, NULL);
    }
    if (ctl->stop[0] >= 0)
        close(ctl->stop[0]);
    if (ctl->fd >= 0)
        close(ctl->fd);
    if (ctl->path[0] != '\0')
        unlink(ctl->path);
    free(ctl);
}

/* ---- client ---- */

static int read_reply(int fd, struct sbuf *out, struct arle_err *err)
{
    struct sbuf in = SBUF_INIT;
    char buf[4096];
    ssize_t k;
    int r = -EPROTO;
    while ((k = recv(fd, buf, sizeof buf, 0)) > 0) {
        sbuf_add(&in, buf, (size_t)k);
        char *nl = memchr(in.p, '\n', in.n);
        unsigned long length;
        char word[8];
        if (nl == NULL)
            continue;
        if (sscanf(in.p, "%*d %7s", word) == 1 && strcmp(word, "error") == 0) {
            *nl = '\0';
            char *text = strstr(in.p, "error ");
            r = arle_err_set(err, -EREMOTEIO, "%s", text != NULL ? text + 6 : "refused");
            break;
        }
        if (sscanf(in.p, "%*d ok %lu", &length) != 1)
            break;
        size_t head = (size_t)(nl - in.p) + 1;
        if (in.n - head < length)
            continue;
        sbuf_add(out, in.p + head, length);
        r = 0;
        break;
    }
    if (r == -EPROTO)
        arle_err_set(err, r, "the daemon's answer cannot be read");
    sbuf_fini(&in);
    return r;
}

int ctl_ask(const char *path, const char *command, struct sbuf *out, struct arle_err *err)
{
    struct sockaddr_un sa;
    struct sbuf line = SBUF_INIT;
    int r = address(&sa, path, err);
    if (r < 0)
        return r;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof sa) < 0) {
        r = arle_err_set(err, -errno, "%s: %s; is arled running?", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return r;
    }
    sbuf_fmt(&line, "%d %s\n", CTL_VERSION, command);
    r = line.failed ? -ENOMEM : send_all(fd, line.p, line.n);
    sbuf_fini(&line);
    r = r < 0 ? arle_err_set(err, r, "%s: %s", path, strerror(-r)) : read_reply(fd, out, err);
    close(fd);
    return r;
}

void ctl_default_path(char *out, size_t cap, bool client)
{
    const char *run = getenv("RUNTIME_DIRECTORY"), *xdg = getenv("XDG_RUNTIME_DIR"), *own = getenv("ARLE_CONTROL");
    out[0] = '\0';
    if (client && own != NULL)
        snprintf(out, cap, "%s", own);
    else if (!client && run != NULL)
        snprintf(out, cap, "%.*s/control.sock", (int)strcspn(run, ":"), run);
    else if (client && access("/run/arle/control.sock", F_OK) == 0)
        snprintf(out, cap, "/run/arle/control.sock");
    else if (xdg != NULL)
        snprintf(out, cap, "%s/arle-control.sock", xdg);
}
