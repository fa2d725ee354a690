/*
 * arle.ini through inih. inih cuts long lines and names silently, takes an indented key for the rest of the value above it
 * and stops at NUL bytes; so lines come to it one by one through our own reader, which counts them, refuses what inih would
 * garble, and strips indentation.
 */
#include "config/config_impl.h"

#include <ini.h>
#include <stdlib.h>
#include <string.h>

/* inih's own limits as Debian builds it: a line of 200 bytes with its end, names of 50. */
enum { LINE_LIMIT = 190, NAME_LIMIT = 48 };

struct reader {
    struct config *cfg;
    FILE *file;
    const char *path;
    char header[LINE_LIMIT + 1];    /* section we are in; "" before the first */
    int line;
    int failed;                     /* negative errno of the first failure, which err describes */
    struct arle_err *err;
};

static const char *place(const struct reader *rd, char *buf, size_t cap)
{
    const char *base = strrchr(rd->path, '/');
    snprintf(buf, cap, "%s:%d", base != NULL && strlen(rd->path) > 120 ? base + 1 : rd->path, rd->line);
    return buf;
}

/* Reads a line without its end into buf. Returns its length, -1 at the end of the file, -EINVAL with err. */
static int next_line(struct reader *rd, char *buf, size_t cap)
{
    char where[160];
    size_t n = 0;
    int c = fgetc(rd->file);
    if (c == EOF)
        return -1;
    rd->line++;
    for (; c != EOF && c != '\n'; c = fgetc(rd->file)) {
        if (c == '\0')
            return arle_err_set(rd->err, -EINVAL, "%s: NUL byte; the file is not text", place(rd, where, sizeof where));
        if ((c < 0x20 && c != '\t' && c != '\r') || c == 0x7f)
            return arle_err_set(rd->err, -EINVAL, "%s: control character 0x%02x", place(rd, where, sizeof where), c);
        if (n + 1 >= cap)
            return arle_err_set(rd->err, -EINVAL, "%s: line is longer than %d bytes; give the value with --set instead",
                                place(rd, where, sizeof where), LINE_LIMIT);
        buf[n++] = (char)c;
    }
    while (n > 0 && strchr(" \t\r", buf[n - 1]) != NULL)
        n--;
    buf[n] = '\0';
    if (strchr(buf, '\r') != NULL)
        return arle_err_set(rd->err, -EINVAL, "%s: carriage return inside the line", place(rd, where, sizeof where));
    return (int)n;
}

/* Takes "[name]" apart, since inih cuts long names and keeps silent about empty sections. */
static int take_header(struct reader *rd, char *line)
{
    char where[160];
    char *end = strchr(line, ']');
    place(rd, where, sizeof where);
    if (end == NULL)
        return arle_err_set(rd->err, -EINVAL, "%s: section header without \"]\"", where);
    const char *rest = end + 1 + strspn(end + 1, " \t");
    if (*rest != '\0' && *rest != ';' && *rest != '#')
        return arle_err_set(rd->err, -EINVAL, "%s: text after \"]\"", where);
    *end = '\0';
    if (end - line - 1 > NAME_LIMIT)
        return arle_err_set(rd->err, -EINVAL, "%s: section name is longer than %d bytes", where, NAME_LIMIT);
    snprintf(rd->header, sizeof rd->header, "%s", line + 1);
    *end = ']';
    return config_enter(rd->cfg, rd->header, where, rd->line, rd->err);
}

static char *feed(char *out, int num, void *arg)
{
    struct reader *rd = arg;
    char buf[LINE_LIMIT + 1];
    if (rd->failed < 0)
        return NULL;
    int n = next_line(rd, buf, sizeof buf);
    if (n == -1)
        return NULL;
    char *text = buf;
    if (n >= 0) {
        if (rd->line == 1 && strncmp(text, "\xEF\xBB\xBF", 3) == 0)
            text += 3;
        text += strspn(text, " \t");
        if (*text == '[')
            n = take_header(rd, text);
    }
    if (n < 0) {
        rd->failed = n;
        return NULL;
    }
    snprintf(out, (size_t)num, "%s\n", text);
    return out;
}

static int on_value(void *arg, const char *section, const char *name, const char *value)
{
    struct reader *rd = arg;
    char where[160];
    if (rd->failed < 0)
        return 0;
    place(rd, where, sizeof where);
    if (rd->header[0] == '\0')
        rd->failed = arle_err_param(rd->err, -EINVAL, name, "%s: key \"%.48s\" before the first [section]", where, name);
    else
        rd->failed = config_put(rd->cfg, rd->header, name, value, where, rd->line, rd->err);
    return rd->failed == 0;
}

int config_read(struct config *cfg, FILE *file, const char *path, struct arle_err *err)
{
    struct reader rd = { .cfg = cfg, .file = file, .path = path, .err = err };
    int line = ini_parse_stream(feed, &rd, on_value, &rd);
    if (rd.failed < 0)
        return rd.failed;
    if (ferror(file))
        return arle_err_set(err, -EIO, "%s: read error", path);
    if (line > 0) {
        rd.line = line;
        char where[160];
        return arle_err_set(err, -EINVAL, "%s: neither a [section], nor KEY = VALUE, nor a comment", place(&rd, where, sizeof where));
    }
    return line < 0 ? arle_err_set(err, -ENOMEM, "%s: no memory", path) : 0;
}
