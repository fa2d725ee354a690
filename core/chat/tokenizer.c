/*
 * The tokenizer as its callers see it, except encoding (tok_encode.c): opening from the cache or by parsing, decoding,
 * and questions about ids.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chat/tok_int.h"

void tok_ids_fini(struct tok_ids *ids)
{
    free(ids->ids);
    *ids = (struct tok_ids)TOK_IDS_INIT;
}

/* ---- open ---- */

#define MAX_FILE ((off_t)512 << 20)

static int read_file(const char *dir, const char *name, char **out, size_t *out_len, struct arle_err *err)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        return arle_err_set(err, -ENAMETOOLONG, "%.64s...: path too long", dir);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size > MAX_FILE) {
        int e = fd < 0 ? errno : EINVAL;
        if (fd >= 0)
            close(fd);
        return arle_err_set(err, -e, "%s: %s", path, fd < 0 ? strerror(e) : "not a regular file of sensible size");
    }
    size_t n = (size_t)st.st_size, done = 0;
    char *p = malloc(n + 1);
    int r = p ? 0 : -ENOMEM;
    while (r == 0 && done < n) {
        ssize_t k = read(fd, p + done, n - done);
        if (k <= 0 && !(k < 0 && errno == EINTR))
            r = k < 0 ? -errno : -EIO;
        done += k > 0 ? (size_t)k : 0;
    }
    close(fd);
    if (r < 0) {
        free(p);
        return arle_err_set(err, r, "%s: %s", path, strerror(-r));
    }
    p[n] = '\0';
    *out = p;
    *out_len = n;
    return 0;
}

static int open_text(struct tokenizer *tok, const char *json, size_t json_len, const char *config, size_t config_len,
                     const char *cache_dir, struct arle_err *err)
{
    struct tok_hash key = tok_hash_bytes(tok_hash_bytes((struct tok_hash){ 1, 2 }, json, json_len), config, config_len);
    int r = -ENOENT;
    if (cache_dir[0] != '\0')
        r = tok_cache_load(&tok->t, cache_dir, key);
    tok->from_cache = r == 0;
    if (r < 0) {
        r = tok_load_json(&tok->t, json, json_len, config, config_len, err);
        if (r == 0 && cache_dir[0] != '\0')
            (void)tok_cache_store(&tok->t, cache_dir, key);     /* no cache is no failure */
    }
    if (r < 0)
        return r;
    tok_literals_index(&tok->t, &tok->t.raw);
    tok_literals_index(&tok->t, &tok->t.normal);
    return tok_stages_compile(&tok->t, err);
}

static struct tokenizer *tokenizer_new(struct arle_err *err)
{
    struct tokenizer *tok = calloc(1, sizeof *tok);
    if (tok == NULL)
        arle_err_set(err, -ENOMEM, "no memory for a tokenizer");
    else
        pthread_mutex_init(&tok->mu, NULL);
    return tok;
}

int tokenizer_open_mem(struct tokenizer **out_tok, const char *json, size_t json_len, const char *config_json,
                       size_t config_len, struct arle_err *err)
{
    struct tokenizer *tok = tokenizer_new(err);
    if (tok == NULL)
        return -ENOMEM;
    int r = open_text(tok, json, json_len, config_json, config_json ? config_len : 0, "", err);
    if (r < 0) {
        tokenizer_close(tok);
        return r;
    }
    *out_tok = tok;
    return 0;
}

/*
 * Parsing is worth avoiding only when it takes long: about 10 ms per MB (Zen 5, 2026-11: 260 kB 2.5 ms parsed, 0.1 ms
 * cached; 10.6 MB and 150,000 ids 195 ms parsed, 6 ms cached). Small vocabularies leave no file behind.
 */
#define CACHE_FROM ((size_t)1 << 20)

int tokenizer_open_opts(struct tokenizer **out_tok, const struct tokenizer_opts *opts, struct arle_err *err)
{
    char cache[4096], *json = NULL, *config = NULL;
    size_t json_len = 0, config_len = 0;
    struct tokenizer *tok = tokenizer_new(err);
    if (tok == NULL)
        return -ENOMEM;
    int r = read_file(opts->model_dir, "tokenizer.json", &json, &json_len, err);
    if (r < 0)
        goto done;
    r = read_file(opts->model_dir, "tokenizer_config.json", &config, &config_len, err);
    if (r < 0 && r != -ENOENT)
        goto done;
    cache[0] = '\0';
    if (opts->cache_dir != NULL)
        r = snprintf(cache, sizeof cache, "%s", opts->cache_dir);
    else if (json_len >= CACHE_FROM)
        tok_cache_dir(cache, sizeof cache);
    r = open_text(tok, json, json_len, config, config_len, cache, err);
done:
    free(json);
    free(config);
    if (r < 0) {
        tokenizer_close(tok);
        return r;
    }
    if (err != NULL)
        *err = (struct arle_err)ARLE_ERR_INIT;      /* a missing tokenizer_config.json left its text there */
    *out_tok = tok;
    return 0;
}

int tokenizer_open(struct tokenizer **out_tok, const char *model_dir, struct arle_err *err)
{
    return tokenizer_open_opts(out_tok, &(struct tokenizer_opts){ .model_dir = model_dir }, err);
}

void tokenizer_close(struct tokenizer *tok)
{
    if (tok == NULL)
        return;
    while (tok->idle != NULL) {
        struct tok_scratch *s = tok->idle;
        tok->idle = s->next;
        tok_scratch_free(s);
    }
    tok_tables_fini(&tok->t);
    pthread_mutex_destroy(&tok->mu);
    free(tok);
}

/* ---- decode ---- */

int tokenizer_token_bytes(const struct tokenizer *tok, int32_t id, const char **out_bytes, size_t *out_len)
{
    const struct tok_tables *t = &tok->t;
    if (id < 0 || (uint32_t)id >= t->n_ids || t->kind[id] == TOK_KIND_HOLE)
        return -ENOENT;
    *out_bytes = (const char *)t->blob + t->text_off[id];
    *out_len = t->text_off[id + 1] - t->text_off[id];
    return 0;
}

/* Copies bytes with broken UTF-8 replaced; out NULL only counts. */
static size_t copy_lossy(const uint8_t *p, size_t n, uint8_t *out)
{
    const uint8_t *end = p + n;
    size_t done = 0;
    while (p < end) {
        unsigned part, len;
        int cut;
        len = tok_utf8_check(p, end, &part, &cut);
        if (out != NULL)
            memcpy(out + done, len ? (const char *)p : "\xEF\xBF\xBD", len ? len : 3);
        done += len ? len : 3;
        p += len ? len : part;
    }
    return done;
}

static int make_lossy(char **text, size_t *len)
{
    size_t n = copy_lossy((const uint8_t *)*text, *len, NULL);
    uint8_t *p = malloc(n + 1);
    if (p == NULL)
        return -ENOMEM;
    copy_lossy((const uint8_t *)*text, *len, p);
    p[n] = '\0';
    free(*text);
    *text = (char *)p;
    *len = n;
    return 0;
}

int tokenizer_decode(const struct tokenizer *tok, const int32_t *ids, size_t n_ids, unsigned flags, char **out_text,
                     size_t *out_len, struct arle_err *err)
{
    const char *bytes;
    size_t len, total = 0, at = 0;
    bool skip = (flags & TOK_SKIP_SPECIAL) != 0;
    for (size_t i = 0; i < n_ids; i++)
        if (!(skip && tokenizer_is_special(tok, ids[i])) && tokenizer_token_bytes(tok, ids[i], &bytes, &len) == 0)
            total += len;
    char *text = malloc(total + 1);
    if (text == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for %zu bytes of text", total);
    for (size_t i = 0; i < n_ids; i++) {
        if ((skip && tokenizer_is_special(tok, ids[i])) || tokenizer_token_bytes(tok, ids[i], &bytes, &len) < 0)
            continue;
        memcpy(text + at, bytes, len);
        at += len;
    }
    text[total] = '\0';
    if ((flags & TOK_LOSSY_UTF8) != 0 && make_lossy(&text, &total) < 0) {
        free(text);
        return arle_err_set(err, -ENOMEM, "no memory for decoded text");
    }
    *out_text = text;
    *out_len = total;
    return 0;
}

/* ---- questions ---- */

static int32_t find_literal(const struct tok_tables *t, const struct tok_literals *set, const char *text, size_t len)
{
    for (uint32_t i = set->first[(uint8_t)text[0]]; i < set->first[(uint8_t)text[0] + 1]; i++) {
        uint32_t id = set->list[i].id, off = t->text_off[id];
        if (t->text_off[id + 1] - off == len && memcmp(t->blob + off, text, len) == 0)
            return (int32_t)id;
    }
    return -1;
}

int32_t tokenizer_added_id(const struct tokenizer *tok, const char *text)
{
    size_t len = strlen(text);
    if (len == 0)
        return -1;
    int32_t id = find_literal(&tok->t, &tok->t.raw, text, len);
    return id >= 0 ? id : find_literal(&tok->t, &tok->t.normal, text, len);
}

int32_t tokenizer_vocab_size(const struct tokenizer *tok)
{
    return (int32_t)tok->t.n_ids;
}

static unsigned kind_of(const struct tokenizer *tok, int32_t id)
{
    return id >= 0 && (uint32_t)id < tok->t.n_ids ? tok->t.kind[id] : TOK_KIND_HOLE;
}

bool tokenizer_is_special(const struct tokenizer *tok, int32_t id)
{
    return kind_of(tok, id) == TOK_KIND_SPECIAL;
}

bool tokenizer_is_added(const struct tokenizer *tok, int32_t id)
{
    return kind_of(tok, id) >= TOK_KIND_ADDED;
}

bool tokenizer_from_cache(const struct tokenizer *tok)
{
    return tok->from_cache;
}

const char *tokenizer_pretok_name(const struct tokenizer *tok)
{
    static const char *const name[] = {
        [TOK_STAGE_SPLIT_LM] = "split-lm",  [TOK_STAGE_SPLIT_L] = "split-l", [TOK_STAGE_SPLIT_L_N3] = "split-l-n3",
        [TOK_STAGE_BYTELEVEL] = "bytelevel", [TOK_STAGE_DIGITS3] = "digits3", [TOK_STAGE_CJK] = "cjk",
        [TOK_STAGE_SPLIT_PS] = "split-ps",  [TOK_STAGE_PCRE2] = "pcre2",
    };
    const struct tok_tables *t = &tok->t;
    if (t->n_stages == 0)
        return "none";
    for (uint32_t i = 0; i < t->n_stages; i++)
        if (t->stage[i].kind == TOK_STAGE_PCRE2)
            return "pcre2";
    if (t->n_stages == 3 && t->stage[0].kind == TOK_STAGE_DIGITS3 && t->stage[1].kind == TOK_STAGE_CJK &&
        t->stage[2].kind == TOK_STAGE_SPLIT_PS)
        return "digits3-cjk-ps";
    return t->n_stages == 1 ? name[t->stage[0].kind] : "stages";
}
