/*
 * tokenizer.json and tokenizer_config.json -> tables. Everything that would change an id is either done or refused by
 * the name of its field; fields that cannot change an id (truncation and padding defaults, offsets) are ignored.
 */
#include <json-c/json.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "chat/tok_int.h"

#define MAX_IDS (1u << 22)      /* far above any published vocabulary; bounds what a broken file can make us allocate */

struct tok_added_full;

struct loader {
    struct tok_parts parts;
    struct json_object *vocab;      /* borrowed from the document */
    struct tok_added_full *added;
    uint32_t n_added;
    uint32_t *len;                  /* [n_ids] token lengths while the blob is not yet in id order */
    struct arle_err *err;
};

/* An added token as the file has it. */
struct tok_added_full {
    const char *text;               /* borrowed from the document */
    size_t len;
    uint32_t id, flags;
    bool special, normalized;
};

static int bad(struct loader *ld, const char *field, const char *why)
{
    return arle_err_param(ld->err, -EINVAL, field, "tokenizer.json: %s %s", field, why);
}

static int unsupported(struct loader *ld, const char *field, const char *what)
{
    return arle_err_param(ld->err, -ENOTSUP, field, "tokenizer.json: %s = %s is not supported", field, what);
}

static int no_memory(struct loader *ld)
{
    return arle_err_set(ld->err, -ENOMEM, "no memory for the tokenizer");
}

static struct json_object *get(struct json_object *o, const char *name)
{
    struct json_object *v = NULL;
    return json_object_object_get_ex(o, name, &v) ? v : NULL;
}

static const char *get_str(struct json_object *o, const char *name)
{
    struct json_object *v = get(o, name);
    return json_object_is_type(v, json_type_string) ? json_object_get_string(v) : NULL;
}

/* A flag that must be off (absent, null, false, 0, ""). */
static int must_be_off(struct loader *ld, struct json_object *o, const char *name, const char *field)
{
    struct json_object *v = get(o, name);
    bool off = v == NULL || (json_object_is_type(v, json_type_string) ? json_object_get_string_len(v) == 0
                                                                       : json_object_get_double(v) == 0.0);
    return off ? 0 : unsupported(ld, field, json_object_to_json_string(v));
}

/* ---- vocabulary ---- */

/* The byte that a character of the byte alphabet stands for, or -1. */
static int byte_of(uint32_t cp)
{
    if ((cp >= '!' && cp <= '~') || (cp >= 0xA1 && cp <= 0xFF && cp != 0xAD))
        return (int)cp;
    if (cp >= 0x100 && cp <= 0x120)
        return (int)(cp - 0x100);               /* 0x00..0x20 */
    if (cp >= 0x121 && cp <= 0x142)
        return (int)(cp - 0x121 + 0x7F);        /* 0x7F..0xA0 */
    return cp == 0x143 ? 0xAD : -1;
}

/* Bytes of a vocabulary entry; an entry with a character outside the byte alphabet stands for its own UTF-8. */
static size_t entry_bytes(const char *key, size_t len, uint8_t *out, bool *plain)
{
    const uint8_t *p = (const uint8_t *)key, *end = p + len;
    size_t n = 0;
    *plain = true;
    while (p < end) {
        unsigned part, clen;
        int cut, b = -1;
        if (tok_utf8_check(p, end, &part, &cut) != 0)
            b = byte_of(tok_utf8(p, &clen));
        if (b < 0) {
            *plain = false;
            memcpy(out, key, len);
            return len;
        }
        out[n++] = (uint8_t)b;
        p += clen;
    }
    return n;
}

static int check_id(struct loader *ld, struct json_object *v, const char *field, uint32_t *out_id)
{
    if (!json_object_is_type(v, json_type_int))
        return bad(ld, field, "has an id that is not an integer");
    int64_t id = json_object_get_int64(v);
    if (id < 0 || id >= MAX_IDS)
        return bad(ld, field, "has an id out of range");
    *out_id = (uint32_t)id;
    return 0;
}

static int size_tables(struct loader *ld)
{
    uint32_t n = 0, id;
    json_object_object_foreach(ld->vocab, key, v) {
        (void)key;
        int r = check_id(ld, v, "model.vocab", &id);
        if (r < 0)
            return r;
        n = id >= n ? id + 1 : n;
    }
    for (uint32_t i = 0; i < ld->n_added; i++)
        n = ld->added[i].id >= n ? ld->added[i].id + 1 : n;
    if (n == 0)
        return bad(ld, "model.vocab", "is empty");
    struct tok_parts *ps = &ld->parts;
    ps->n_ids = n;
    ps->text_off = calloc((size_t)n + 1, sizeof *ps->text_off);
    ps->kind = calloc(n, 1);
    ld->len = calloc(n, sizeof *ld->len);
    return ps->text_off && ps->kind && ld->len ? 0 : no_memory(ld);
}

static int put_token(struct loader *ld, uint32_t id, const uint8_t *bytes, size_t n, enum tok_kind kind)
{
    struct tok_parts *ps = &ld->parts;
    if (ps->blob.n + n > INT32_MAX || tok_buf_reserve(&ps->blob, n) < 0)
        return no_memory(ld);
    memcpy(ps->blob.p + ps->blob.n, bytes, n);
    ps->text_off[id] = (uint32_t)ps->blob.n;
    ld->len[id] = (uint32_t)n;
    ps->blob.n += n;
    ps->kind[id] = (uint8_t)kind;
    return 0;
}

static int load_vocab(struct loader *ld)
{
    struct tok_parts *ps = &ld->parts;
    struct tok_buf tmp = { 0 };
    int r = 0;
    for (int b = 0; b < 256; b++)
        ps->byte_id[b] = TOK_NONE;
    json_object_object_foreach(ld->vocab, key, v) {
        size_t len = strlen(key);
        uint32_t id = (uint32_t)json_object_get_int64(v);
        bool plain;
        tmp.n = 0;
        if (tok_buf_reserve(&tmp, len) < 0) {
            r = no_memory(ld);
            break;
        }
        size_t n = entry_bytes(key, len, tmp.p, &plain);
        if (ps->kind[id] != TOK_KIND_HOLE) {
            r = bad(ld, "model.vocab", "gives one id to two entries");
            break;
        }
        r = put_token(ld, id, tmp.p, n, TOK_KIND_PLAIN);
        if (r < 0)
            break;
        if (plain && n == 1)
            ps->byte_id[tmp.p[0]] = id;
    }
    tok_buf_fini(&tmp);
    for (int b = 0; b < 256 && r == 0; b++)
        if (ps->byte_id[b] == TOK_NONE)
            r = arle_err_param(
                ld->err, -ENOTSUP, "model.vocab",
                "tokenizer.json: model.vocab has no entry for byte 0x%02X; only byte-level vocabularies work", b);
    return r;
}

static bool vocab_id(struct loader *ld, const char *key, uint32_t *out_id)
{
    struct json_object *v = get(ld->vocab, key);
    if (v == NULL)
        return false;
    *out_id = (uint32_t)json_object_get_int64(v);
    return true;
}

/* The two halves of a merge: "a b" or ["a", "b"]. `joined` receives a, NUL, b, NUL. */
static int merge_halves(struct loader *ld, struct json_object *v, struct tok_buf *joined, const char **a,
                        const char **b)
{
    const char *left, *right;
    size_t n_left, n_right;
    if (json_object_is_type(v, json_type_array) && json_object_array_length(v) == 2 &&
        json_object_is_type(json_object_array_get_idx(v, 0), json_type_string) &&
        json_object_is_type(json_object_array_get_idx(v, 1), json_type_string)) {
        left = json_object_get_string(json_object_array_get_idx(v, 0));
        right = json_object_get_string(json_object_array_get_idx(v, 1));
        n_left = strlen(left);
    } else if (json_object_is_type(v, json_type_string)) {
        left = json_object_get_string(v);
        const char *space = strchr(left, ' ');
        if (space == NULL || strchr(space + 1, ' ') != NULL)
            return bad(ld, "model.merges", "has an entry that is not two symbols");
        n_left = (size_t)(space - left);
        right = space + 1;
    } else {
        return bad(ld, "model.merges", "has an entry that is neither a string nor a pair of strings");
    }
    n_right = strlen(right);
    joined->n = 0;
    if (tok_buf_reserve(joined, n_left + n_right + 2) < 0)
        return no_memory(ld);
    memcpy(joined->p, left, n_left);
    joined->p[n_left] = '\0';
    memcpy(joined->p + n_left + 1, right, n_right + 1);
    *a = (const char *)joined->p;
    *b = (const char *)joined->p + n_left + 1;
    return 0;
}

static int load_merge(struct loader *ld, struct json_object *v, uint32_t rank, struct tok_buf *tmp,
                      struct tok_merge *out)
{
    const char *a = NULL, *b = NULL;
    int r = merge_halves(ld, v, tmp, &a, &b);
    if (r < 0)
        return r;
    out->rank = rank;
    const char *missing = !vocab_id(ld, a, &out->left) ? a : !vocab_id(ld, b, &out->right) ? b : NULL;
    if (missing == NULL) {
        size_t n_left = strlen(a);
        memmove(tmp->p + n_left, b, strlen(b) + 1);
        if (!vocab_id(ld, a, &out->id))
            missing = a;
    }
    if (missing != NULL)
        return arle_err_param(ld->err, -EINVAL, "model.merges",
                              "tokenizer.json: model.merges[%u] needs \"%.40s\", which "
                              "model.vocab lacks",
                              rank, missing);
    return 0;
}

static int load_merges(struct loader *ld, struct json_object *model)
{
    struct json_object *merges = get(model, "merges");
    if (!json_object_is_type(merges, json_type_array))
        return bad(ld, "model.merges", "is missing or not an array");
    size_t n = json_object_array_length(merges);
    if (n > MAX_IDS)
        return bad(ld, "model.merges", "is too long");
    struct tok_parts *ps = &ld->parts;
    ps->merges = calloc(n + 1, sizeof *ps->merges);
    if (ps->merges == NULL)
        return no_memory(ld);
    struct tok_buf tmp = { 0 };
    int r = 0;
    for (size_t i = 0; i < n && r == 0; i++)
        r = load_merge(ld, json_object_array_get_idx(merges, i), (uint32_t)i, &tmp, &ps->merges[i]);
    ps->n_merges = (uint32_t)n;
    tok_buf_fini(&tmp);
    return r;
}

static int load_model(struct loader *ld, struct json_object *model)
{
    if (!json_object_is_type(model, json_type_object))
        return bad(ld, "model", "is missing or not an object");
    const char *type = get_str(model, "type");
    if (type != NULL ? strcmp(type, "BPE") != 0 : get(model, "merges") == NULL)
        return unsupported(ld, "model.type", type ? type : "null");
    static const char *const off[][2] = {
        { "dropout", "model.dropout" }, { "byte_fallback", "model.byte_fallback" },
        { "continuing_subword_prefix", "model.continuing_subword_prefix" },
        { "end_of_word_suffix", "model.end_of_word_suffix" },
    };
    for (size_t i = 0; i < sizeof off / sizeof off[0]; i++) {
        int r = must_be_off(ld, model, off[i][0], off[i][1]);
        if (r < 0)
            return r;
    }
    ld->parts.ignore_merges = json_object_get_boolean(get(model, "ignore_merges"));
    ld->vocab = get(model, "vocab");
    if (!json_object_is_type(ld->vocab, json_type_object))
        return bad(ld, "model.vocab", "is missing or not an object");
    int r = size_tables(ld);
    if (r == 0)
        r = load_vocab(ld);
    if (r == 0)
        r = load_merges(ld, model);
    return r;
}

/* ---- added tokens ---- */

static int added_one(struct loader *ld, struct json_object *o, uint32_t id, const char *field)
{
    struct json_object *content = get(o, "content");
    if (!json_object_is_type(content, json_type_string) || json_object_get_string_len(content) == 0)
        return bad(ld, field, "has an entry without content");
    char where[64];
    snprintf(where, sizeof where, "%s.single_word", field);
    int r = must_be_off(ld, o, "single_word", where);
    if (r < 0)
        return r;
    struct tok_added_full a = {
        .text = json_object_get_string(content),
        .len = (size_t)json_object_get_string_len(content),
        .id = id,
        .flags = (json_object_get_boolean(get(o, "lstrip")) ? TOK_ADDED_LSTRIP : 0u) |
                 (json_object_get_boolean(get(o, "rstrip")) ? TOK_ADDED_RSTRIP : 0u),
        .special = json_object_get_boolean(get(o, "special")),
    };
    struct json_object *norm = get(o, "normalized");
    a.normalized = norm != NULL ? json_object_get_boolean(norm) : !a.special;
    if (strlen(a.text) != a.len)
        return bad(ld, field, "has content with a NUL character");
    struct tok_added_full *list = realloc(ld->added, ((size_t)ld->n_added + 1) * sizeof *list);
    if (list == NULL)
        return no_memory(ld);
    ld->added = list;
    ld->added[ld->n_added++] = a;
    return 0;
}

static int added_from_json(struct loader *ld, struct json_object *root)
{
    struct json_object *list = get(root, "added_tokens");
    if (list == NULL)
        return 0;
    if (!json_object_is_type(list, json_type_array))
        return bad(ld, "added_tokens", "is not an array");
    for (size_t i = 0; i < json_object_array_length(list); i++) {
        struct json_object *o = json_object_array_get_idx(list, i);
        uint32_t id;
        int r = check_id(ld, get(o, "id"), "added_tokens", &id);
        if (r == 0)
            r = added_one(ld, o, id, "added_tokens");
        if (r < 0)
            return r;
    }
    return 0;
}

static bool added_known(const struct loader *ld, uint32_t n, uint32_t id)
{
    for (uint32_t i = 0; i < n; i++)
        if (ld->added[i].id == id)
            return true;
    return false;
}

/* tokenizer_config.json may list more tokens than tokenizer.json; those the latter has are kept as it has them. */
static int added_from_config(struct loader *ld, struct json_object *config)
{
    struct json_object *dec = get(config, "added_tokens_decoder");
    if (dec == NULL)
        return 0;
    if (!json_object_is_type(dec, json_type_object))
        return bad(ld, "added_tokens_decoder", "is not an object");
    uint32_t n_first = ld->n_added;
    json_object_object_foreach(dec, key, o) {
        char *end;
        errno = 0;
        unsigned long id = strtoul(key, &end, 10);
        if (key[0] < '0' || key[0] > '9' || *end != '\0' || errno != 0 || id >= MAX_IDS)
            return bad(ld, "added_tokens_decoder", "has a key that is not an id");
        if (added_known(ld, n_first, (uint32_t)id))
            continue;
        int r = added_one(ld, o, (uint32_t)id, "added_tokens_decoder");
        if (r < 0)
            return r;
    }
    return 0;
}

/* Added tokens whose content is also a vocabulary entry keep that entry's id, as in the reference. */
static int place_added(struct loader *ld)
{
    struct tok_parts *ps = &ld->parts;
    for (uint32_t i = 0; i < ld->n_added; i++) {
        struct tok_added_full *a = &ld->added[i];
        uint32_t in_vocab;
        bool known = vocab_id(ld, a->text, &in_vocab);
        bool taken = ps->kind[a->id] != TOK_KIND_HOLE && !(known && in_vocab == a->id);
        if (taken || (known && in_vocab != a->id))
            return arle_err_param(ld->err, -EINVAL, "added_tokens",
                                  "tokenizer.json: added token \"%.40s\" has id %u, which "
                                  "clashes with another token",
                                  a->text, a->id);
        int r = put_token(ld, a->id, (const uint8_t *)a->text, a->len, a->special ? TOK_KIND_SPECIAL : TOK_KIND_ADDED);
        if (r < 0)
            return r;
        if (a->normalized && ps->nfc && !tok_nfc_is_plain((const uint8_t *)a->text, a->len))
            return unsupported(ld, "added_tokens.normalized", "true, for content that NFC changes,");
    }
    return 0;
}

static int by_text(const void *x, const void *y)
{
    const struct tok_added_full *a = x, *b = y;
    int c = strcmp(a->text, b->text);       /* unsigned bytes, shorter first: the order the matcher needs */
    return c != 0 ? c : (a->id > b->id) - (a->id < b->id);
}

static int index_added(struct loader *ld)
{
    struct tok_parts *ps = &ld->parts;
    ps->raw = calloc((size_t)ld->n_added + 1, sizeof *ps->raw);
    ps->normal = calloc((size_t)ld->n_added + 1, sizeof *ps->normal);
    if (ps->raw == NULL || ps->normal == NULL)
        return no_memory(ld);
    if (ld->n_added > 1)
        qsort(ld->added, ld->n_added, sizeof *ld->added, by_text);
    for (uint32_t i = 0; i < ld->n_added; i++) {
        const struct tok_added_full *a = &ld->added[i];
        if (i > 0 && strcmp(a->text, a[-1].text) == 0)
            return bad(ld, "added_tokens", "has one content twice");
        struct tok_added e = { a->id, a->flags };
        if (a->normalized)
            ps->normal[ps->n_normal++] = e;
        else
            ps->raw[ps->n_raw++] = e;
    }
    return 0;
}

/* ---- normaliser, pre-tokeniser, decoder ---- */

static int load_normalizer(struct loader *ld, struct json_object *o, int depth)
{
    if (o == NULL)
        return 0;
    const char *type = get_str(o, "type");
    if (type != NULL && strcmp(type, "NFC") == 0) {
        ld->parts.nfc = 1;
        return 0;
    }
    struct json_object *list = get(o, "normalizers");
    if (type == NULL || strcmp(type, "Sequence") != 0 || !json_object_is_type(list, json_type_array) || depth > 4)
        return unsupported(ld, "normalizer.type", type ? type : "null");
    int r = 0;
    for (size_t i = 0; i < json_object_array_length(list) && r == 0; i++)
        r = load_normalizer(ld, json_object_array_get_idx(list, i), depth + 1);
    return r;
}

static int add_stage(struct loader *ld, const char *pattern, size_t len)
{
    struct tok_parts *ps = &ld->parts;
    if (ps->n_stages == TOK_MAX_STAGES)
        return unsupported(ld, "pre_tokenizer", "a sequence of more than 8 splits");
    struct tok_stage *st = &ps->stage[ps->n_stages++];
    st->kind = tok_stage_known(pattern, len);
    if (st->kind != TOK_STAGE_PCRE2)
        return 0;
    if (tok_buf_reserve(&ps->blob, len) < 0)
        return no_memory(ld);
    st->pattern_off = (uint32_t)ps->blob.n;
    st->pattern_len = (uint32_t)len;
    memcpy(ps->blob.p + ps->blob.n, pattern, len);
    ps->blob.n += len;
    return 0;
}

static int load_split(struct loader *ld, struct json_object *o)
{
    struct json_object *pattern = get(get(o, "pattern"), "Regex");
    if (!json_object_is_type(pattern, json_type_string))
        return unsupported(ld, "pre_tokenizer.pattern", "anything but Regex");
    const char *behavior = get_str(o, "behavior");
    if (behavior == NULL || strcmp(behavior, "Isolated") != 0)
        return unsupported(ld, "pre_tokenizer.behavior", behavior ? behavior : "null");
    int r = must_be_off(ld, o, "invert", "pre_tokenizer.invert");
    if (r < 0)
        return r;
    return add_stage(ld, json_object_get_string(pattern), (size_t)json_object_get_string_len(pattern));
}

/* *bytes is set once the byte-level step was seen: it must come, and be the last. */
static int load_pretok(struct loader *ld, struct json_object *o, bool *bytes, int depth)
{
    const char *type = get_str(o, "type");
    if (type == NULL || depth > 4)
        return unsupported(ld, "pre_tokenizer.type", "null");
    if (*bytes)
        return unsupported(ld, "pre_tokenizer", "a step after ByteLevel");
    if (strcmp(type, "Split") == 0)
        return load_split(ld, o);
    if (strcmp(type, "ByteLevel") == 0) {
        *bytes = true;
        int r = must_be_off(ld, o, "add_prefix_space", "pre_tokenizer.add_prefix_space");
        struct json_object *use = get(o, "use_regex");
        if (r < 0 || (use != NULL && !json_object_get_boolean(use)))
            return r;
        static const char own[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
        return add_stage(ld, own, sizeof own - 1);
    }
    struct json_object *list = get(o, "pretokenizers");
    if (strcmp(type, "Sequence") != 0 || !json_object_is_type(list, json_type_array))
        return unsupported(ld, "pre_tokenizer.type", type);
    int r = 0;
    for (size_t i = 0; i < json_object_array_length(list) && r == 0; i++)
        r = load_pretok(ld, json_object_array_get_idx(list, i), bytes, depth + 1);
    return r;
}

/* Post-processors that only move offsets, or a template of nothing but the text itself. */
static int check_post(struct loader *ld, struct json_object *o, int depth)
{
    if (o == NULL)
        return 0;
    const char *type = get_str(o, "type");
    if (type != NULL && strcmp(type, "ByteLevel") == 0)
        return 0;
    struct json_object *list = get(o, "processors");
    bool sequence = type != NULL && strcmp(type, "Sequence") == 0 && json_object_is_type(list, json_type_array);
    struct json_object *single = get(o, "single");
    if (type != NULL && strcmp(type, "TemplateProcessing") == 0 && json_object_is_type(single, json_type_array) &&
        json_object_array_length(single) == 1 && get(json_object_array_get_idx(single, 0), "Sequence") != NULL)
        return 0;
    if (!sequence || depth > 4)
        return unsupported(ld, "post_processor.type", type ? type : "null");
    int r = 0;
    for (size_t i = 0; i < json_object_array_length(list) && r == 0; i++)
        r = check_post(ld, json_object_array_get_idx(list, i), depth + 1);
    return r;
}

static int check_decoder(struct loader *ld, struct json_object *o)
{
    const char *type = get_str(o, "type");
    struct json_object *list = get(o, "decoders");
    if (type != NULL && strcmp(type, "Sequence") == 0 && json_object_is_type(list, json_type_array) &&
        json_object_array_length(list) == 1)
        type = get_str(json_object_array_get_idx(list, 0), "type");
    return type != NULL && strcmp(type, "ByteLevel") == 0 ? 0 : unsupported(ld, "decoder.type", type ? type : "null");
}

/* ---- the whole ---- */

/* Token bytes into id order, patterns after them. */
static int sort_blob(struct loader *ld)
{
    struct tok_parts *ps = &ld->parts;
    struct tok_buf sorted = { 0 };
    if (tok_buf_reserve(&sorted, ps->blob.n) < 0)
        return no_memory(ld);
    for (uint32_t id = 0; id < ps->n_ids; id++) {
        uint32_t from = ps->text_off[id];
        ps->text_off[id] = (uint32_t)sorted.n;
        memcpy(sorted.p + sorted.n, ps->blob.p + from, ld->len[id]);
        sorted.n += ld->len[id];
    }
    ps->text_off[ps->n_ids] = (uint32_t)sorted.n;
    for (uint32_t i = 0; i < ps->n_stages; i++) {
        struct tok_stage *st = &ps->stage[i];
        memcpy(sorted.p + sorted.n, ps->blob.p + st->pattern_off, st->pattern_len);
        st->pattern_off = (uint32_t)sorted.n;
        sorted.n += st->pattern_len;
    }
    tok_buf_fini(&ps->blob);
    ps->blob = sorted;
    return 0;
}

static int load_root(struct loader *ld, struct json_object *root, struct json_object *config)
{
    bool bytes = false;
    int r = added_from_json(ld, root);
    if (r == 0 && config != NULL)
        r = added_from_config(ld, config);
    if (r == 0)
        r = load_normalizer(ld, get(root, "normalizer"), 0);
    if (r == 0)
        r = load_model(ld, get(root, "model"));
    if (r == 0)
        r = place_added(ld);
    if (r == 0)
        r = load_pretok(ld, get(root, "pre_tokenizer"), &bytes, 0);
    if (r == 0 && !bytes)
        r = unsupported(ld, "pre_tokenizer", "anything without a ByteLevel step");
    if (r == 0)
        r = check_post(ld, get(root, "post_processor"), 0);
    if (r == 0)
        r = check_decoder(ld, get(root, "decoder"));
    if (r == 0)
        r = index_added(ld);
    return r == 0 ? sort_blob(ld) : r;
}

static int parse_json(struct json_object **out, const char *text, size_t len, const char *what, struct arle_err *err)
{
    if (len > INT_MAX - 1)
        return arle_err_set(err, -EINVAL, "%s: too large", what);
    bool plain;
    size_t good = tok_scan((const uint8_t *)text, len, &plain);
    if (good != len)
        return arle_err_set(err, -EINVAL, "%s: not valid UTF-8 at byte %zu", what, good);
    struct json_tokener *tk = json_tokener_new_ex(64);
    if (tk == NULL)
        return arle_err_set(err, -ENOMEM, "no memory to read %s", what);
    struct json_object *o = json_tokener_parse_ex(tk, text, (int)len);
    enum json_tokener_error e = json_tokener_get_error(tk);
    size_t at = json_tokener_get_parse_end(tk);
    json_tokener_free(tk);
    while (at < len && strchr(" \t\r\n", text[at]) != NULL && text[at] != '\0')
        at++;
    if (e == json_tokener_success && at == len && json_object_is_type(o, json_type_object)) {
        *out = o;
        return 0;
    }
    json_object_put(o);
    return arle_err_set(err, -EINVAL, "%s: %s at byte %zu", what,
                        e == json_tokener_success ? "not one JSON object" : json_tokener_error_desc(e), at);
}

int tok_load_json(struct tok_tables *t, const char *json, size_t json_len, const char *config, size_t config_len,
                  struct arle_err *err)
{
    struct loader ld = { .err = err };
    struct json_object *root = NULL, *conf = NULL;
    int r = parse_json(&root, json, json_len, "tokenizer.json", err);
    if (r == 0 && config != NULL)
        r = parse_json(&conf, config, config_len, "tokenizer_config.json", err);
    if (r == 0)
        r = load_root(&ld, root, conf);
    if (r == 0)
        r = tok_image_build(t, &ld.parts, err);
    json_object_put(root);
    json_object_put(conf);
    tok_buf_fini(&ld.parts.blob);
    free(ld.parts.text_off);
    free(ld.parts.kind);
    free(ld.parts.merges);
    free(ld.parts.raw);
    free(ld.parts.normal);
    free(ld.len);
    free(ld.added);
    return r;
}
