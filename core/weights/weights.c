/*
 * The view of a checkpoint (weights.h): maps the files that index.c lists, has safetensors.c judge them, and answers by name.
 * Random views share everything but the files.
 */
#include "weights/weights.h"
#include "weights/index.h"
#include "weights/safetensors.h"

#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct mapping { char *path; void *addr; size_t len; };

struct view {
    struct arle_weights api;        /* first: api.ctx points to the view */
    struct weights_list list;       /* by name, unless unsorted */
    struct mapping *map; uint32_t n_maps;
    char *what;                     /* folder, for messages */
    uint64_t seed;                  /* random views */
    bool unsorted;                  /* random views: want() appended since the last search */
    pthread_mutex_t mu;             /* random views: guards list and unsorted. Views of files never change. */
};

static struct view *view_of(const struct arle_weights *w)
{
    return w->ctx;
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(struct weights_entry *const *)a)->name, (*(struct weights_entry *const *)b)->name);
}

static void sort_entries(struct view *v)
{
    if (v->list.n > 1)
        qsort(v->list.e, v->list.n, sizeof *v->list.e, by_name);
    v->unsorted = false;
}

static void lock(struct view *v)
{
    if (!v->api.random)
        return;
    pthread_mutex_lock(&v->mu);
    if (v->unsorted)
        sort_entries(v);
}

static void unlock(struct view *v)
{
    if (v->api.random)
        pthread_mutex_unlock(&v->mu);
}

/* Index of the first entry whose name is not before `name`. */
static size_t lower_bound(const struct view *v, const char *name)
{
    size_t lo = 0, hi = v->list.n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (strcmp(v->list.e[mid]->name, name) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static struct weights_entry *lookup(const struct view *v, const char *name)
{
    size_t i = lower_bound(v, name);
    return i < v->list.n && strcmp(v->list.e[i]->name, name) == 0 ? v->list.e[i] : NULL;
}

static void take(struct weights_entry *e)
{
    __atomic_store_n(&e->taken, 1, __ATOMIC_RELAXED);      /* read by weights_unclaimed, after the load */
}

/* ---- the functions of struct arle_weights --------------------------------------------------------------------------- */

static const struct arle_tensor *view_find(const struct arle_weights *w, const char *name)
{
    struct view *v = view_of(w);
    lock(v);
    struct weights_entry *e = lookup(v, name);
    if (e != NULL)
        take(e);
    unlock(v);
    return e != NULL ? &e->t : NULL;
}

static size_t view_ignore(const struct arle_weights *w, const char *prefix)
{
    struct view *v = view_of(w);
    size_t len = strlen(prefix), count = 0;
    lock(v);
    for (size_t i = lower_bound(v, prefix); i < v->list.n && strncmp(v->list.e[i]->name, prefix, len) == 0; i++, count++)
        take(v->list.e[i]);
    unlock(v);
    return count;
}

static const struct arle_tensor *view_at(const struct arle_weights *w, size_t i)
{
    struct view *v = view_of(w);
    lock(v);
    const struct arle_tensor *t = i < v->list.n ? &v->list.e[i]->t : NULL;
    unlock(v);
    return t;
}

/* FNV-1a of the name, so that a tensor's values do not depend on the order of the calls. */
static uint64_t name_seed(uint64_t seed, const char *name)
{
    uint64_t h = 0xCBF29CE484222325u ^ seed;
    for (; *name != '\0'; name++)
        h = (h ^ (unsigned char)*name) * 0x100000001B3u;
    return h;
}

static int want_same(const struct arle_tensor *t, uint32_t dtype, uint32_t n_dims, const int64_t *dim, struct arle_err *err)
{
    if (t->dtype == dtype && t->n_dims == n_dims && memcmp(t->dim, dim, n_dims * sizeof *dim) == 0)
        return 0;
    return arle_err_param(err, -EINVAL, t->name, "tensor %s: declared twice with different shapes", t->name);
}

static int view_want(const struct arle_weights *w, const char *name, uint32_t dtype, uint32_t n_dims, const int64_t *dim,
                     double mean, double scale, struct arle_err *err)
{
    struct view *v = view_of(w);
    if (!w->random)
        return 0;
    size_t bytes = arle_dtype_size(dtype);
    if (bytes == 0 || n_dims > ARLE_MAX_DIMS)
        return arle_err_param(err, -EINVAL, name, "tensor %s: no random values of this type or rank", name);
    for (uint32_t i = 0; i < n_dims; i++)
        if (dim[i] < 0 || arle_mul_size(&bytes, bytes, (size_t)dim[i]) < 0)
            return arle_err_param(err, -EINVAL, name, "tensor %s: its shape overflows", name);

    int r = 0;
    lock(v);
    struct weights_entry *e = lookup(v, name);
    if (e != NULL) {
        r = want_same(&e->t, dtype, n_dims, dim, err);
    } else if ((e = weights_list_add(&v->list, name)) == NULL) {
        r = arle_err_set(err, -ENOMEM, "no memory for the list of tensors");
    } else {
        e->t.dtype = dtype;
        e->t.n_dims = n_dims;
        memcpy(e->t.dim, dim, n_dims * sizeof *dim);
        e->t.bytes = bytes;
        e->t.rand_seed = name_seed(v->seed, name);
        e->t.rand_mean = mean;
        e->t.rand_std = scale;
        v->unsorted = true;
    }
    unlock(v);
    return r;
}

/* Packed weights are a second copy: let go of the file's pages, or the peak would be twice the model. */
static void view_done(const struct arle_weights *w, const struct arle_tensor *t)
{
    struct view *v = view_of(w);
    if (t == NULL || t->data == NULL || v->n_maps == 0)
        return;
    struct weights_entry *e = lookup(v, t->name);
    if (e == NULL || e->copy != NULL)
        return;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)t->data + page - 1) / page * page;     /* whole pages only: neighbours share the rest */
    uintptr_t to = ((uintptr_t)t->data + t->bytes) / page * page;
    if (from < to)
        madvise((void *)from, to - from, MADV_DONTNEED);
}

/* ---- opening -------------------------------------------------------------------------------------------------------- */

static struct view *view_create(const char *what, struct arle_err *err)
{
    struct view *v = calloc(1, sizeof *v);
    if (v == NULL || (v->what = strdup(what)) == NULL) {
        free(v);
        arle_err_set(err, -ENOMEM, "no memory for the view of a checkpoint");
        return NULL;
    }
    pthread_mutex_init(&v->mu, NULL);
    v->api = (struct arle_weights){ .struct_size = sizeof v->api, .ctx = v, .find = view_find, .ignore = view_ignore,
                                    .at = view_at, .want = view_want, .done = view_done };
    return v;
}

static int map_file(struct view *v, uint32_t i, struct arle_err *err)
{
    struct mapping *m = &v->map[i];
    struct stat st;
    int r = 0, fd = open(m->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return arle_err_set(err, -errno, "%s: %s", m->path, strerror(errno));
    if (fstat(fd, &st) < 0)
        r = arle_err_set(err, -errno, "%s: %s", m->path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        r = arle_err_set(err, -EINVAL, "%s: not a plain file", m->path);
    else if (st.st_size < 8 || (uint64_t)st.st_size > SIZE_MAX / 2)
        r = arle_err_set(err, -EINVAL, "%s: truncated: %lld bytes are no safetensors file", m->path, (long long)st.st_size);
    if (r == 0) {
        void *addr = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (addr == MAP_FAILED) {
            r = arle_err_set(err, -errno, "%s: mmap: %s", m->path, strerror(errno));
        } else {
            m->addr = addr;
            m->len = (size_t)st.st_size;
            madvise(addr, m->len, MADV_SEQUENTIAL);     /* tensors are packed once, front to back */
        }
    }
    close(fd);
    return r;
}

/* Readers use elements by their own type: data at odd places is copied once. Writers align, so this is rare. */
static int align_entries(struct view *v, struct arle_err *err)
{
    for (size_t i = 0; i < v->list.n; i++) {
        struct weights_entry *e = v->list.e[i];
        if (e->t.bytes == 0 || (uintptr_t)e->t.data % arle_dtype_size(e->t.dtype) == 0)
            continue;
        e->copy = malloc(e->t.bytes);
        if (e->copy == NULL)
            return arle_err_set(err, -ENOMEM, "no memory to align tensor %s", e->name);
        memcpy(e->copy, e->t.data, e->t.bytes);
        e->t.data = e->copy;
    }
    return 0;
}

static int check_across_files(struct view *v, struct arle_err *err)
{
    for (size_t i = 1; i < v->list.n; i++) {
        const struct weights_entry *a = v->list.e[i - 1], *b = v->list.e[i];
        if (strcmp(a->name, b->name) == 0)
            return arle_err_param(err, -EINVAL, a->name, "tensor %s is in two files: %s and %s", a->name,
                                  v->map[a->shard].path, v->map[b->shard].path);
    }
    return 0;
}

static int check_index(const struct view *v, const struct weights_index *ix, struct arle_err *err)
{
    for (size_t i = 0; i < ix->n_places; i++) {
        const struct index_place *p = &ix->place[i];
        const struct weights_entry *e = lookup(v, p->tensor);
        if (e == NULL || e->shard != p->shard)
            return arle_err_param(err, -EINVAL, p->tensor, "%s: the index says tensor %s is in %s, but it is %s%s", v->what,
                                  p->tensor, ix->shard[p->shard], e == NULL ? "missing" : "in ",
                                  e == NULL ? "" : ix->shard[e->shard]);
    }
    return 0;
}

static int open_files(struct view *v, const char *dir, const struct weights_index *ix, struct arle_err *err)
{
    v->map = calloc(ix->n_shards, sizeof *v->map);
    if (v->map == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the list of checkpoint files");
    v->n_maps = ix->n_shards;
    for (uint32_t i = 0; i < ix->n_shards; i++) {
        size_t len = strlen(dir) + 1 + strlen(ix->shard[i]) + 1;
        v->map[i].path = malloc(len);
        if (v->map[i].path == NULL)
            return arle_err_set(err, -ENOMEM, "no memory for the list of checkpoint files");
        snprintf(v->map[i].path, len, "%s/%s", dir, ix->shard[i]);
        int r = map_file(v, i, err);
        if (r == 0)
            r = safetensors_read(v->map[i].path, v->map[i].addr, v->map[i].len, i, &v->list, err);
        if (r < 0)
            return r;
    }
    sort_entries(v);
    int r = check_across_files(v, err);
    if (r == 0)
        r = check_index(v, ix, err);
    return r < 0 ? r : align_entries(v, err);
}

int weights_open(const char *dir, struct arle_weights **out, struct arle_err *err)
{
    struct weights_index ix;
    int r = weights_index_read(dir, &ix, err);
    if (r < 0)
        return r;
    struct view *v = view_create(dir, err);
    r = v == NULL ? -ENOMEM : open_files(v, dir, &ix, err);
    weights_index_fini(&ix);
    if (r < 0) {
        weights_close(v != NULL ? &v->api : NULL);
        return r;
    }
    *out = &v->api;
    return 0;
}

int weights_from_memory(const char *file, const void *data, size_t len, struct arle_weights **out, struct arle_err *err)
{
    struct view *v = view_create(file, err);
    if (v == NULL)
        return -ENOMEM;
    int r = safetensors_read(file, data, len, 0, &v->list, err);
    if (r == 0) {
        sort_entries(v);
        r = align_entries(v, err);
    }
    if (r < 0) {
        weights_close(&v->api);
        return r;
    }
    *out = &v->api;
    return 0;
}

int weights_random(struct arle_weights **out, uint64_t seed, struct arle_err *err)
{
    struct view *v = view_create("random weights", err);
    if (v == NULL)
        return -ENOMEM;
    v->api.random = 1;
    v->seed = seed;
    *out = &v->api;
    return 0;
}

int weights_unclaimed(const struct arle_weights *w, struct arle_err *err)
{
    const struct view *v = view_of(w);
    char names[360] = "";
    size_t at = 0, count = 0;
    const char *first = NULL;
    for (size_t i = 0; i < v->list.n; i++) {
        const struct weights_entry *e = v->list.e[i];
        if (__atomic_load_n(&e->taken, __ATOMIC_RELAXED))
            continue;
        if (first == NULL)
            first = e->name;
        count++;
        if (at + strlen(e->name) + 8 < sizeof names)
            at += (size_t)snprintf(names + at, sizeof names - at, "%s%s", at ? ", " : "", e->name);
        else if (at > 0 && names[at - 1] != '.')
            at += (size_t)snprintf(names + at, sizeof names - at, ", ...");
    }
    if (count == 0)
        return 0;
    return arle_err_param(err, -EINVAL, first, "%s: the model does not know %zu of its tensors: %s", v->what, count,
                          at ? names : first);
}

size_t weights_count(const struct arle_weights *w, uint64_t *out_bytes)
{
    const struct view *v = view_of(w);
    if (out_bytes != NULL) {
        *out_bytes = 0;
        for (size_t i = 0; i < v->list.n; i++)
            *out_bytes += v->list.e[i]->t.bytes;
    }
    return v->list.n;
}

void weights_close(struct arle_weights *w)
{
    if (w == NULL)
        return;
    struct view *v = view_of(w);
    weights_list_free(&v->list);
    for (uint32_t i = 0; i < v->n_maps; i++) {
        if (v->map[i].addr != NULL)
            munmap(v->map[i].addr, v->map[i].len);
        free(v->map[i].path);
    }
    free(v->map);
    free(v->what);
    pthread_mutex_destroy(&v->mu);
    free(v);
}
