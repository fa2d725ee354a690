/* A verdict as bytes: what the child read from a descriptor, copied out. Same program on both ends, so no byte order. */
#include "plugin/judge.h"

#include <stdlib.h>
#include <string.h>

enum { STRING_MAX_BYTES = 4096, KEYS_MAX = 256 };

static void put(struct packet *pk, const void *data, size_t n)
{
    if (pk->bad)
        return;
    if (pk->len + n > pk->cap) {
        size_t cap = (pk->len + n) * 2 + 1024;
        char *p = realloc(pk->data, cap);
        if (p == NULL) {
            pk->bad = true;
            return;
        }
        pk->data = p;
        pk->cap = cap;
    }
    memcpy(pk->data + pk->len, data, n);
    pk->len += n;
}

static void put_u64(struct packet *pk, uint64_t v)
{
    put(pk, &v, sizeof v);
}

static void put_f64(struct packet *pk, double v)
{
    put(pk, &v, sizeof v);
}

static void put_text(struct packet *pk, const char *s, size_t n)
{
    put_u64(pk, n);
    put(pk, s, n);
}

static void put_str(struct packet *pk, const char *s)
{
    put_text(pk, s != NULL ? s : "", s != NULL ? strnlen(s, STRING_MAX_BYTES) : 0);
}

static void get(struct packet *pk, void *out, size_t n)
{
    if (pk->bad || n > pk->len - pk->at) {
        pk->bad = true;
        memset(out, 0, n);
        return;
    }
    memcpy(out, pk->data + pk->at, n);
    pk->at += n;
}

static uint64_t get_u64(struct packet *pk)
{
    uint64_t v;
    get(pk, &v, sizeof v);
    return v;
}

static double get_f64(struct packet *pk)
{
    double v;
    get(pk, &v, sizeof v);
    return v;
}

/* Copied into the plugin's strings, control characters made harmless: the text goes to terminals and logs. */
static const char *get_str(struct packet *pk, struct plugin *p)
{
    char buf[STRING_MAX_BYTES + 1];
    uint64_t n = get_u64(pk);
    if (n > STRING_MAX_BYTES) {
        pk->bad = true;
        return "";
    }
    get(pk, buf, (size_t)n);
    buf[n] = '\0';
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)buf[i] < 0x20 || buf[i] == 0x7f)
            buf[i] = '?';
    }
    return plugin_keep(p, buf);
}

static void pack_keys(struct packet *pk, const struct arle_conf_key *keys)
{
    uint64_t n = 0;
    while (keys != NULL && n < KEYS_MAX && keys[n].name != NULL)
        n++;
    put_u64(pk, n);
    for (uint64_t i = 0; i < n; i++) {
        put_str(pk, keys[i].name);
        put_u64(pk, keys[i].type);
        put_u64(pk, keys[i].flags);
        put_str(pk, keys[i].def);
        put_f64(pk, keys[i].min);
        put_f64(pk, keys[i].max);
        put_str(pk, keys[i].choices);
        put_str(pk, keys[i].unit);
        put_str(pk, keys[i].help);
    }
}

static void unpack_keys(struct packet *pk, struct plugin *p)
{
    uint64_t n = get_u64(pk);
    if (n > KEYS_MAX)
        pk->bad = true;
    p->own_keys = pk->bad ? NULL : calloc((size_t)n + 1, sizeof *p->own_keys);
    for (uint64_t i = 0; p->own_keys != NULL && i < n && !pk->bad; i++) {
        struct arle_conf_key *k = &p->own_keys[i];
        k->name = get_str(pk, p);
        k->type = (uint32_t)get_u64(pk);
        k->flags = (uint32_t)get_u64(pk);
        k->def = get_str(pk, p);
        k->min = get_f64(pk);
        k->max = get_f64(pk);
        k->choices = get_str(pk, p);
        k->unit = get_str(pk, p);
        k->help = get_str(pk, p);
    }
}

void verdict_pack(struct packet *pk, const struct arle_plugin *d, const struct arle_probe *probe, const char *refusal)
{
    put_str(pk, refusal);
    put_u64(pk, d != NULL);
    if (d == NULL)
        return;
    put_u64(pk, d->kind);
    put_u64(pk, d->abi_major);
    put_u64(pk, d->abi_minor);
    put_u64(pk, d->caps);
    put_str(pk, d->name);
    put_str(pk, d->version);
    put_str(pk, d->license);
    put_str(pk, d->summary);
    put_text(pk, probe->detail, strnlen(probe->detail, sizeof probe->detail));
    pack_keys(pk, d->keys);
}

int verdict_unpack(struct packet *pk, struct plugin *p)
{
    struct plugin_info *info = &p->info;
    const char *refusal = get_str(pk, p);
    if (get_u64(pk) == 1) {
        info->kind = (uint32_t)get_u64(pk);
        info->abi_major = (uint16_t)get_u64(pk);
        info->abi_minor = (uint16_t)get_u64(pk);
        info->caps = get_u64(pk);
        info->name = get_str(pk, p);
        info->version = get_str(pk, p);
        info->license = get_str(pk, p);
        info->summary = get_str(pk, p);
        info->detail = get_str(pk, p);
        unpack_keys(pk, p);
    }
    if (pk->bad || pk->at != pk->len)
        return -EBADMSG;
    info->keys = p->own_keys;
    info->state = refusal[0] != '\0' ? PLUGIN_REFUSED : PLUGIN_READY;
    info->reason = refusal;
    return 0;
}
