/*
 * Stop strings by the automaton of Aho and Corasick (CACM 18(6), 1975): a trie of the stops with failure links. The
 * depth of the current node is exactly the longest suffix of the stream that could still become a stop, so that is what
 * is held back.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "chat/stopstr.h"

#define MAX_BYTES ((size_t)1 << 20)

/* Children are a list: stops are few and short, and most input bytes fail at the root, which has a table. */
struct node {
    uint32_t child, sibling, fail, depth;
    int32_t stop;               /* the longest stop that ends here, or -1 */
    uint32_t owner;             /* a stop whose first `depth` bytes lead here */
    uint8_t byte;
};

struct stop_set {
    struct node *nodes;
    uint32_t n_nodes;
    uint32_t root[256];
    char *bytes;                /* all stops, one after the other */
    size_t *off;                /* [n_stops + 1] */
};

static uint32_t child_of(const struct stop_set *s, uint32_t v, uint8_t b)
{
    if (v == 0)
        return s->root[b];
    uint32_t c = s->nodes[v].child;
    while (c != 0 && s->nodes[c].byte != b)
        c = s->nodes[c].sibling;
    return c;
}

static uint32_t step(const struct stop_set *s, uint32_t v, uint8_t b)
{
    uint32_t c;
    while ((c = child_of(s, v, b)) == 0 && v != 0)
        v = s->nodes[v].fail;
    return c;
}

static void insert(struct stop_set *s, uint32_t index)
{
    uint32_t v = 0;
    for (size_t i = s->off[index]; i < s->off[index + 1]; i++) {
        uint8_t b = (uint8_t)s->bytes[i];
        uint32_t c = child_of(s, v, b);
        if (c == 0) {
            c = s->n_nodes++;
            s->nodes[c] = (struct node){ .sibling = s->nodes[v].child, .depth = s->nodes[v].depth + 1, .stop = -1,
                                         .owner = index, .byte = b };
            s->nodes[v].child = c;
            if (v == 0)
                s->root[b] = c;
        }
        v = c;
    }
    if (s->nodes[v].stop < 0)           /* of equal stops the first is reported */
        s->nodes[v].stop = (int32_t)index;
}

/* Failure links, breadth first. A node without a stop of its own inherits the (shorter) one of its failure node. */
static int link_failures(struct stop_set *s)
{
    uint32_t *queue = malloc(s->n_nodes * sizeof *queue);
    if (queue == NULL)
        return -ENOMEM;
    size_t head = 0, tail = 0;
    for (uint32_t c = s->nodes[0].child; c != 0; c = s->nodes[c].sibling)
        queue[tail++] = c;
    while (head < tail) {
        uint32_t v = queue[head++];
        struct node *n = &s->nodes[v];
        if (n->stop < 0)
            n->stop = s->nodes[n->fail].stop;
        for (uint32_t c = n->child; c != 0; c = s->nodes[c].sibling) {
            s->nodes[c].fail = step(s, n->fail, s->nodes[c].byte);
            queue[tail++] = c;
        }
    }
    free(queue);
    return 0;
}

int stop_set_create(struct stop_set **out_set, const char *const *stops, const size_t *lens, size_t n_stops,
                    struct arle_err *err)
{
    size_t total = 0;
    for (size_t i = 0; i < n_stops; i++) {
        if (lens[i] == 0)
            return arle_err_param(err, -EINVAL, "stop", "stop string %zu is empty", i);
        if (lens[i] > MAX_BYTES - total)
            return arle_err_param(err, -E2BIG, "stop", "stop strings exceed %zu bytes in all", MAX_BYTES);
        total += lens[i];
    }
    struct stop_set *s = calloc(1, sizeof *s);
    if (s == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for stop strings");
    s->nodes = calloc(total + 1, sizeof *s->nodes);
    s->bytes = malloc(total + 1);
    s->off = calloc(n_stops + 1, sizeof *s->off);
    if (s->nodes == NULL || s->bytes == NULL || s->off == NULL)
        goto no_memory;
    for (size_t i = 0; i < n_stops; i++) {
        memcpy(s->bytes + s->off[i], stops[i], lens[i]);
        s->off[i + 1] = s->off[i] + lens[i];
    }
    s->nodes[0].stop = -1;
    s->n_nodes = 1;
    for (size_t i = 0; i < n_stops; i++)
        insert(s, (uint32_t)i);
    if (link_failures(s) < 0)
        goto no_memory;
    *out_set = s;
    return 0;
no_memory:
    stop_set_destroy(s);
    return arle_err_set(err, -ENOMEM, "no memory for stop strings");
}

void stop_set_destroy(struct stop_set *s)
{
    if (s == NULL)
        return;
    free(s->nodes);
    free(s->bytes);
    free(s->off);
    free(s);
}

void stop_matcher_init(struct stop_matcher *m, const struct stop_set *set)
{
    *m = (struct stop_matcher){ .set = set, .matched = -1 };
}

void stop_matcher_fini(struct stop_matcher *m)
{
    free(m->buf);
    stop_matcher_init(m, NULL);
}

static int reserve(struct stop_matcher *m, size_t need)
{
    if (need <= m->cap)
        return 0;
    char *p = realloc(m->buf, 2 * need + 64);
    if (p == NULL)
        return -ENOMEM;
    m->buf = p;
    m->cap = 2 * need + 64;
    return 0;
}

/* Bytes held back: the path to the current node. */
static size_t held(const struct stop_matcher *m, const char **out)
{
    if (m->set == NULL || m->state == 0)
        return 0;
    const struct node *n = &m->set->nodes[m->state];
    *out = m->set->bytes + m->set->off[n->owner];
    return n->depth;
}

static int give(struct stop_matcher *m, const char *prefix, size_t n_prefix, const char *text, size_t len, size_t keep,
                const char **out_text, size_t *out_len)
{
    size_t a = keep < n_prefix ? keep : n_prefix;
    if (reserve(m, n_prefix + len + 1) < 0)
        return -ENOMEM;
    if (a > 0)
        memcpy(m->buf, prefix, a);
    if (keep > a)
        memcpy(m->buf + a, text, keep - a);
    m->buf[keep] = '\0';
    *out_text = m->buf;
    *out_len = keep;
    return 0;
}

int stop_matcher_push(struct stop_matcher *m, const char *text, size_t len, const char **out_text, size_t *out_len,
                      int *out_matched)
{
    const char *prefix = NULL;
    size_t n_prefix = held(m, &prefix), keep;
    const struct stop_set *s = m->set;
    int matched = m->matched;
    uint32_t v = m->state;
    if (matched >= 0) {
        keep = 0;
        len = 0;
    } else if (s == NULL) {
        keep = len;
    } else {
        size_t i = 0;
        while (i < len && matched < 0) {
            v = step(s, v, (uint8_t)text[i++]);
            matched = s->nodes[v].stop;
        }
        size_t cut = matched >= 0 ? s->off[matched + 1] - s->off[matched] : s->nodes[v].depth;
        keep = n_prefix + i - cut;
        if (matched >= 0)
            v = 0;
    }
    if (give(m, prefix, n_prefix, text, len, keep, out_text, out_len) < 0)
        return -ENOMEM;
    m->state = v;
    m->matched = matched;
    *out_matched = matched;
    return 0;
}

int stop_matcher_flush(struct stop_matcher *m, const char **out_text, size_t *out_len)
{
    const char *prefix = NULL;
    size_t n = m->matched >= 0 ? 0 : held(m, &prefix);
    if (give(m, prefix, n, "", 0, n, out_text, out_len) < 0)
        return -ENOMEM;
    m->state = 0;
    m->matched = -1;
    return 0;
}
