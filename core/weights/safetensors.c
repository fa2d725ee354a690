/* Judges safetensors headers: every size is checked before it is used. See safetensors.h. */
#include "weights/safetensors.h"
#include "weights/scan.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct weights_entry *weights_list_add(struct weights_list *list, const char *name)
{
    if (list->n == list->cap) {
        size_t cap = list->cap ? list->cap * 2 : 64;
        struct weights_entry **e = reallocarray(list->e, cap, sizeof *e);
        if (e == NULL)
            return NULL;
        list->e = e;
        list->cap = cap;
    }
    size_t len = strlen(name);
    struct weights_entry *x = calloc(1, sizeof *x + len + 1);
    if (x == NULL)
        return NULL;
    memcpy(x->name, name, len);
    x->t.name = x->name;
    list->e[list->n++] = x;
    return x;
}

void weights_list_free(struct weights_list *list)
{
    for (size_t i = 0; i < list->n; i++) {
        free(list->e[i]->copy);
        free(list->e[i]);
    }
    free(list->e);
    *list = (struct weights_list){ 0 };
}

static uint32_t dtype_of(const char *word)
{
    static const struct { const char *word; uint32_t dtype; } table[] = {
        { "F32", ARLE_F32 }, { "BF16", ARLE_BF16 }, { "F16", ARLE_F16 }, { "F8_E4M3", ARLE_F8E4M3 }, { "F8_E8M0", ARLE_F8E8M0 },
        { "I8", ARLE_I8 }, { "U8", ARLE_U8 }, { "I16", ARLE_I16 }, { "U16", ARLE_U16 }, { "I32", ARLE_I32 },
        { "U32", ARLE_U32 }, { "I64", ARLE_I64 }, { "U64", ARLE_U64 }, { "F64", ARLE_F64 }, { "BOOL", ARLE_BOOL },
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(word, table[i].word) == 0)
            return table[i].dtype;
    return 0;
}

struct header {
    const char *file;
    struct scan s;
    const char *body;           /* first byte of the tensors */
    size_t body_len;
    struct arle_err *err;
};

static int fault(struct header *h)
{
    return arle_err_set(h->err, -EINVAL, "%s: header: %s at byte %zu", h->file, h->s.fault ? h->s.fault : "malformed",
                        8 + scan_offset(&h->s));
}

static int bad_tensor(struct header *h, const char *name, const char *why)
{
    return arle_err_param(h->err, -EINVAL, name, "%s: tensor %s: %s", h->file, name, why);
}

static int read_dtype(struct header *h, const char *name, struct arle_tensor *t)
{
    char word[32];
    size_t n;
    if (!scan_string(&h->s, word, sizeof word, &n))
        return fault(h);
    t->dtype = dtype_of(word);
    if (t->dtype == 0)
        return arle_err_param(h->err, -EINVAL, name, "%s: tensor %s: unknown dtype %s", h->file, name, word);
    return 0;
}

static int read_shape(struct header *h, const char *name, struct arle_tensor *t)
{
    if (!scan_take(&h->s, '['))
        return fault(h);
    if (scan_try(&h->s, ']'))
        return 0;
    do {
        uint64_t d;
        if (!scan_size(&h->s, &d))
            return fault(h);
        if (t->n_dims == ARLE_MAX_DIMS)
            return bad_tensor(h, name, "more dimensions than supported");
        t->dim[t->n_dims++] = (int64_t)d;
    } while (scan_try(&h->s, ','));
    return scan_take(&h->s, ']') ? 0 : fault(h);
}

static int read_offsets(struct header *h, uint64_t *begin, uint64_t *end)
{
    bool ok = scan_take(&h->s, '[') && scan_size(&h->s, begin) && scan_take(&h->s, ',') && scan_size(&h->s, end)
              && scan_take(&h->s, ']');
    return ok ? 0 : fault(h);
}

/* Elements times their size, or a reason. A dimension of 0 makes an empty tensor, which is legal. */
static int tensor_bytes(const struct arle_tensor *t, size_t *out)
{
    size_t bytes = arle_dtype_size(t->dtype);
    for (uint32_t i = 0; i < t->n_dims; i++)
        if (arle_mul_size(&bytes, bytes, (size_t)t->dim[i]) < 0)
            return -EOVERFLOW;
    *out = bytes;
    return 0;
}

static int check_range(struct header *h, const char *name, struct arle_tensor *t, uint64_t begin, uint64_t end)
{
    size_t bytes;
    if (tensor_bytes(t, &bytes) < 0)
        return bad_tensor(h, name, "its shape overflows");
    if (begin > end)
        return bad_tensor(h, name, "data_offsets run backwards");
    if (end > h->body_len)
        return arle_err_param(h->err, -EINVAL, name, "%s: tensor %s: truncated: ends at byte %" PRIu64 " of %zu", h->file,
                              name, end, h->body_len);
    if (end - begin != bytes)
        return arle_err_param(h->err, -EINVAL, name, "%s: tensor %s: shape needs %zu bytes, data_offsets span %" PRIu64,
                              h->file, name, bytes, end - begin);
    t->data = h->body + begin;
    t->bytes = bytes;
    return 0;
}

/* "name": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]} */
static int read_tensor(struct header *h, const char *name, struct arle_tensor *t)
{
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4, ALL = 7 };
    unsigned seen = 0;
    uint64_t begin = 0, end = 0;

    if (!scan_take(&h->s, '{'))
        return fault(h);
    do {
        char key[32];
        size_t n;
        if (!scan_string(&h->s, key, sizeof key, &n) || !scan_take(&h->s, ':'))
            return fault(h);
        unsigned bit = strcmp(key, "dtype") == 0 ? DTYPE : strcmp(key, "shape") == 0 ? SHAPE
                     : strcmp(key, "data_offsets") == 0 ? OFFSETS : 0;
        if (bit == 0)
            return arle_err_param(h->err, -EINVAL, name, "%s: tensor %s: unknown key %s", h->file, name, key);
        if (seen & bit)
            return bad_tensor(h, name, "a key appears twice");
        seen |= bit;
        int r = bit == DTYPE ? read_dtype(h, name, t) : bit == SHAPE ? read_shape(h, name, t) : read_offsets(h, &begin, &end);
        if (r < 0)
            return r;
    } while (scan_try(&h->s, ','));
    if (!scan_take(&h->s, '}'))
        return fault(h);
    if (seen != ALL)
        return bad_tensor(h, name, "needs dtype, shape and data_offsets");
    return check_range(h, name, t, begin, end);
}

static int by_place(const void *a, const void *b)
{
    const struct weights_entry *x = *(struct weights_entry *const *)a, *y = *(struct weights_entry *const *)b;
    uintptr_t px = (uintptr_t)x->t.data, py = (uintptr_t)y->t.data;
    if (px != py)
        return px < py ? -1 : 1;
    return x->t.bytes < y->t.bytes ? -1 : x->t.bytes > y->t.bytes;      /* empty tensors before the one that starts there */
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(struct weights_entry *const *)a)->name, (*(struct weights_entry *const *)b)->name);
}

static int check_names(struct header *h, struct weights_entry *const *e, size_t n)
{
    for (size_t i = 1; i < n; i++)
        if (strcmp(e[i - 1]->name, e[i]->name) == 0)
            return bad_tensor(h, e[i]->name, "appears twice");
    return 0;
}

/* The format wants the tensors to cover the body exactly: a gap can hide bytes, an overlap two meanings of one. */
static int check_cover(struct header *h, struct weights_entry *const *e, size_t n)
{
    const char *at = h->body;
    for (size_t i = 0; i < n; i++) {
        const char *p = e[i]->t.data;
        if (p < at)
            return bad_tensor(h, e[i]->name, "overlaps another tensor");
        if (p > at)
            return bad_tensor(h, e[i]->name, "unused bytes lie before it");
        at = p + e[i]->t.bytes;
    }
    size_t rest = h->body_len - (size_t)(at - h->body);
    if (rest > 0)
        return arle_err_set(h->err, -EINVAL, "%s: %zu bytes after the last tensor belong to none", h->file, rest);
    return 0;
}

static int read_header(struct header *h, uint32_t shard, struct weights_list *list)
{
    if (h->s.p == h->s.end || *h->s.p != '{')
        return arle_err_set(h->err, -EINVAL, "%s: header: does not begin with {: not a safetensors file?", h->file);
    if (!scan_take(&h->s, '{'))
        return fault(h);
    if (!scan_try(&h->s, '}')) {
        do {
            char name[SAFETENSORS_MAX_NAME];
            size_t n;
            if (!scan_string(&h->s, name, sizeof name, &n) || !scan_take(&h->s, ':'))
                return fault(h);
            if (strcmp(name, "__metadata__") == 0) {
                if (!scan_skip(&h->s))
                    return fault(h);
                continue;
            }
            if (n == 0)
                return arle_err_set(h->err, -EINVAL, "%s: a tensor without a name", h->file);
            struct weights_entry *e = weights_list_add(list, name);
            if (e == NULL)
                return arle_err_set(h->err, -ENOMEM, "%s: no memory for its list of tensors", h->file);
            e->shard = shard;
            int r = read_tensor(h, name, &e->t);
            if (r < 0)
                return r;
        } while (scan_try(&h->s, ','));
        if (!scan_take(&h->s, '}'))
            return fault(h);
    }
    return scan_at_end(&h->s) ? 0 : (scan_fail(&h->s, "something after the closing }"), fault(h));
}

int safetensors_read(const char *file, const void *data, size_t len, uint32_t shard, struct weights_list *list,
                     struct arle_err *err)
{
    if (len < 8)
        return arle_err_set(err, -EINVAL, "%s: truncated: %zu bytes are no safetensors file", file, len);
    const unsigned char *b = data;
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--)
        n = n << 8 | b[i];
    if (n > SAFETENSORS_MAX_HEADER)
        return arle_err_set(err, -EINVAL, "%s: header of %" PRIu64 " bytes, more than 100 MB: not a safetensors file?", file, n);
    if (n > len - 8)
        return arle_err_set(err, -EINVAL, "%s: truncated: header of %" PRIu64 " bytes in a file of %zu", file, n, len);

    struct header h = { .file = file, .err = err, .body = (const char *)data + 8 + n, .body_len = len - 8 - (size_t)n };
    scan_init(&h.s, (const char *)data + 8, (size_t)n);
    size_t first = list->n;
    int r = read_header(&h, shard, list);
    if (r < 0)
        return r;

    size_t count = list->n - first;
    if (count == 0)
        return h.body_len == 0 ? 0 : check_cover(&h, NULL, 0);
    struct weights_entry **order = reallocarray(NULL, count, sizeof *order);
    if (order == NULL)
        return arle_err_set(err, -ENOMEM, "%s: no memory for its list of tensors", file);
    memcpy(order, list->e + first, count * sizeof *order);
    qsort(order, count, sizeof *order, by_name);
    r = check_names(&h, order, count);
    if (r == 0) {
        qsort(order, count, sizeof *order, by_place);
        r = check_cover(&h, order, count);
    }
    free(order);
    return r;
}
