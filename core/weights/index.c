/* Finds the files of a checkpoint. See index.h; weights.h says which files count. */
#include "weights/index.h"
#include "weights/safetensors.h"
#include "weights/scan.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define INDEX_NAME "model.safetensors.index.json"
#define SINGLE_NAME "model.safetensors"
#define MAX_INDEX_BYTES ((size_t)256 << 20)
#define MAX_SHARDS 4096

static int no_memory(struct arle_err *err)
{
    return arle_err_set(err, -ENOMEM, "no memory for the list of checkpoint files");
}

/* The number of a shard, which is added when it is new. Negative errno on failure. */
static int shard_number(struct weights_index *ix, const char *name, struct arle_err *err)
{
    /* The entries of one shard usually come in a row: look from the end. */
    for (uint32_t i = ix->n_shards; i-- > 0;)
        if (strcmp(ix->shard[i], name) == 0)
            return (int)i;
    if (ix->n_shards == MAX_SHARDS)
        return arle_err_set(err, -EINVAL, "%s names more than %d files", INDEX_NAME, MAX_SHARDS);
    char **list = reallocarray(ix->shard, ix->n_shards + 1, sizeof *list);
    if (list == NULL)
        return no_memory(err);
    ix->shard = list;
    list[ix->n_shards] = strdup(name);
    if (list[ix->n_shards] == NULL)
        return no_memory(err);
    return (int)ix->n_shards++;
}

/* A shard is a file of the same folder: nothing that climbs out of it, and nothing hidden. */
static bool plain_file_name(const char *name)
{
    size_t n = strlen(name);
    const char *tail = ".safetensors";
    return name[0] != '.' && strchr(name, '/') == NULL && n > strlen(tail) && n <= 255
           && strcmp(name + n - strlen(tail), tail) == 0;
}

static int add_place(struct weights_index *ix, const char *file, const char *tensor, const char *shard, size_t *cap,
                     struct arle_err *err)
{
    if (!plain_file_name(shard))
        return arle_err_param(err, -EINVAL, tensor, "%s: tensor %s: \"%s\" is not the name of a .safetensors file of this folder",
                              file, tensor, shard);
    int number = shard_number(ix, shard, err);
    if (number < 0)
        return number;
    if (ix->n_places == *cap) {
        *cap = *cap ? *cap * 2 : 256;
        struct index_place *p = reallocarray(ix->place, *cap, sizeof *p);
        if (p == NULL)
            return no_memory(err);
        ix->place = p;
    }
    char *copy = strdup(tensor);
    if (copy == NULL)
        return no_memory(err);
    ix->place[ix->n_places++] = (struct index_place){ copy, (uint32_t)number };
    return 0;
}

static int fault(const char *file, const struct scan *s, struct arle_err *err)
{
    return arle_err_set(err, -EINVAL, "%s: %s at byte %zu", file, s->fault ? s->fault : "malformed", scan_offset(s));
}

static int read_weight_map(struct scan *s, const char *file, struct weights_index *ix, struct arle_err *err)
{
    size_t cap = ix->n_places, n;
    if (!scan_take(s, '{'))
        return fault(file, s, err);
    if (scan_try(s, '}'))
        return 0;
    do {
        char tensor[SAFETENSORS_MAX_NAME], shard[SAFETENSORS_MAX_NAME];
        if (!scan_string(s, tensor, sizeof tensor, &n) || !scan_take(s, ':') || !scan_string(s, shard, sizeof shard, &n))
            return fault(file, s, err);
        int r = add_place(ix, file, tensor, shard, &cap, err);
        if (r < 0)
            return r;
    } while (scan_try(s, ','));
    return scan_take(s, '}') ? 0 : fault(file, s, err);
}

static int by_tensor(const void *a, const void *b)
{
    return strcmp(((const struct index_place *)a)->tensor, ((const struct index_place *)b)->tensor);
}

static int parse(struct scan *s, const char *file, struct weights_index *ix, struct arle_err *err)
{
    bool seen = false;
    if (!scan_take(s, '{'))
        return fault(file, s, err);
    if (!scan_try(s, '}')) {
        do {
            char key[64];
            size_t n;
            if (!scan_string(s, key, sizeof key, &n) || !scan_take(s, ':'))
                return fault(file, s, err);
            if (strcmp(key, "weight_map") != 0) {
                if (!scan_skip(s))
                    return fault(file, s, err);
                continue;
            }
            if (seen)
                return arle_err_param(err, -EINVAL, "weight_map", "%s: weight_map appears twice", file);
            seen = true;
            int r = read_weight_map(s, file, ix, err);
            if (r < 0)
                return r;
        } while (scan_try(s, ','));
        if (!scan_take(s, '}'))
            return fault(file, s, err);
    }
    if (!scan_at_end(s))
        return scan_fail(s, "something after the closing }"), fault(file, s, err);
    if (ix->n_places == 0)
        return arle_err_param(err, -EINVAL, "weight_map", "%s: weight_map is %s", file, seen ? "empty" : "missing");
    return 0;
}

int weights_index_parse(const char *file, const char *text, size_t len, struct weights_index *out, struct arle_err *err)
{
    struct weights_index ix = { 0 };
    struct scan s;
    scan_init(&s, text, len);
    int r = parse(&s, file, &ix, err);
    if (r < 0)
        goto fail;
    qsort(ix.place, ix.n_places, sizeof *ix.place, by_tensor);
    for (size_t i = 1; i < ix.n_places; i++)
        if (strcmp(ix.place[i - 1].tensor, ix.place[i].tensor) == 0) {
            r = arle_err_param(err, -EINVAL, ix.place[i].tensor, "%s: tensor %s appears twice", file, ix.place[i].tensor);
            goto fail;
        }
    ix.n_listed = ix.n_shards;
    *out = ix;
    return 0;
fail:
    weights_index_fini(&ix);
    return r;
}

void weights_index_fini(struct weights_index *ix)
{
    for (uint32_t i = 0; i < ix->n_shards; i++)
        free(ix->shard[i]);
    for (size_t i = 0; i < ix->n_places; i++)
        free(ix->place[i].tensor);
    free(ix->shard);
    free(ix->place);
    *ix = (struct weights_index){ 0 };
}

static int read_all(int fd, const char *file, char **out, size_t *out_len, struct arle_err *err)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return arle_err_set(err, -errno, "%s: %s", file, strerror(errno));
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > MAX_INDEX_BYTES)
        return arle_err_set(err, -EINVAL, "%s: not a plain file below 256 MiB", file);
    size_t len = (size_t)st.st_size, got = 0;
    char *text = malloc(len + 1);
    if (text == NULL)
        return no_memory(err);
    while (got < len) {
        ssize_t n = read(fd, text + got, len - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            int code = n < 0 ? -errno : -EINVAL;
            free(text);
            return arle_err_set(err, code, "%s: cannot be read to its end", file);
        }
        got += (size_t)n;
    }
    *out = text;
    *out_len = len;
    return 0;
}

/* Files that loaders of this format read although older indexes do not list them. */
static bool extra_name(const char *name)
{
    return plain_file_name(name) && (strstr(name, "mtp") != NULL || strcmp(name, "model_extra_tensors.safetensors") == 0);
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int add_extras(const char *dir, struct weights_index *ix, struct arle_err *err)
{
    DIR *d = opendir(dir);
    if (d == NULL)
        return arle_err_set(err, -errno, "%s: %s", dir, strerror(errno));
    int r = 0;
    for (struct dirent *e; r >= 0 && (e = readdir(d)) != NULL;)
        if (extra_name(e->d_name))
            r = shard_number(ix, e->d_name, err);
    closedir(d);
    if (r < 0)
        return r;
    qsort(ix->shard + ix->n_listed, ix->n_shards - ix->n_listed, sizeof *ix->shard, by_text);
    return 0;
}

int weights_index_read(const char *dir, struct weights_index *out, struct arle_err *err)
{
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s/%s", dir, INDEX_NAME) >= sizeof path)
        return arle_err_set(err, -ENAMETOOLONG, "%s: path too long", dir);

    struct weights_index ix = { 0 };
    int r, fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        char *text = NULL;
        size_t len = 0;
        r = read_all(fd, path, &text, &len, err);
        close(fd);
        if (r == 0)
            r = weights_index_parse(path, text, len, &ix, err);
        free(text);
    } else if (errno != ENOENT) {
        r = arle_err_set(err, -errno, "%s: %s", path, strerror(errno));
    } else {
        snprintf(path, sizeof path, "%s/%s", dir, SINGLE_NAME);
        if (access(path, F_OK) < 0)
            r = arle_err_set(err, -ENOENT, "%s: no %s and no %s in this folder", dir, INDEX_NAME, SINGLE_NAME);
        else
            r = shard_number(&ix, SINGLE_NAME, err);
        ix.n_listed = ix.n_shards;
    }
    if (r >= 0)
        r = add_extras(dir, &ix, err);
    if (r < 0) {
        weights_index_fini(&ix);
        return r;
    }
    *out = ix;
    return 0;
}
