/* Opening: what is refused and how it is named, the two files together, and the cache. */
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chat/tok_int.h"
#include "tok_make.h"

static void refused_doc(const char *json, int code, const char *param, int line)
{
    struct tokenizer *tok = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = tokenizer_open_mem(&tok, json, strlen(json), NULL, 0, &err);
    if (r != code || strcmp(err.param, param) != 0 || tok != NULL || err.msg[0] == '\0')
        TAP_FAIL("line %d: %d \"%s\" (%s), expected %d \"%s\"", line, r, err.param, err.msg, code, param);
    tokenizer_close(tok);
}

#define REFUSED(code, param, ...) do { char *json = doc_make(&(struct doc_opts){ __VA_ARGS__ }); \
    refused_doc(json, code, param, __LINE__); free(json); } while (0)

#define SPLIT(pattern, behavior, invert) \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" pattern \
    "\"},\"behavior\":\"" behavior "\",\"invert\":" invert "}," DOC_BYTES "]}"
#define ADDED(id, text, more) "{\"id\":" #id ",\"content\":\"" text "\"" more "}"

static void unsupported_features_are_named(void)
{
    REFUSED(-ENOTSUP, "model.byte_fallback", .model = "\"byte_fallback\":true,");
    REFUSED(-ENOTSUP, "model.dropout", .model = "\"dropout\":0.1,");
    REFUSED(-ENOTSUP, "model.continuing_subword_prefix", .model = "\"continuing_subword_prefix\":\"##\",");
    REFUSED(-ENOTSUP, "model.end_of_word_suffix", .model = "\"end_of_word_suffix\":\"</w>\",");
    REFUSED(-ENOTSUP, "normalizer.type", .normalizer = "{\"type\":\"NFKC\"}");
    REFUSED(-ENOTSUP, "normalizer.type",
            .normalizer = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Lowercase\"}]}");
    REFUSED(-ENOTSUP, "pre_tokenizer.type", .pre = "{\"type\":\"Metaspace\"}");
    REFUSED(-ENOTSUP, "pre_tokenizer.type", .pre = "null");
    REFUSED(-ENOTSUP, "pre_tokenizer", .pre = "{\"type\":\"Sequence\",\"pretokenizers\":[]}");
    REFUSED(-ENOTSUP, "pre_tokenizer",
            .pre = "{\"type\":\"Sequence\",\"pretokenizers\":[" DOC_BYTES "," DOC_BYTES "]}");
    REFUSED(-ENOTSUP, "pre_tokenizer.add_prefix_space", .pre = "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}");
    REFUSED(-ENOTSUP, "pre_tokenizer.behavior", .pre = SPLIT("a", "Removed", "false"));
    REFUSED(-ENOTSUP, "pre_tokenizer.invert", .pre = SPLIT("a", "Isolated", "true"));
    REFUSED(-ENOTSUP, "pre_tokenizer.pattern", .pre = SPLIT("(a", "Isolated", "false"));
    REFUSED(-ENOTSUP, "pre_tokenizer.pattern", .pre = SPLIT("a*", "Isolated", "false"));
    REFUSED(-ENOTSUP, "decoder.type", .decoder = "{\"type\":\"WordPiece\"}");
    REFUSED(-ENOTSUP, "decoder.type", .decoder = "null");
    REFUSED(-ENOTSUP, "post_processor.type",
            .post =
                "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"}},{\"Sequence\":{}}]}");
    REFUSED(-ENOTSUP, "added_tokens.single_word", .added = ADDED(256, "<x>", ",\"single_word\":true"));
    REFUSED(-ENOTSUP, "added_tokens.normalized", .added = ADDED(256, "e\xCC\x81", ",\"normalized\":true"));
    refused_doc("{\"model\":{\"type\":\"Unigram\",\"vocab\":[]},\"normalizer\":null}", -ENOTSUP, "model.type",
                __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}", -ENOTSUP, "model.vocab", __LINE__);
}

static void damage_is_named(void)
{
    refused_doc("", -EINVAL, "", __LINE__);
    refused_doc("[1]", -EINVAL, "", __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\",", -EINVAL, "", __LINE__);
    refused_doc("{} {}", -EINVAL, "", __LINE__);
    refused_doc("{}", -EINVAL, "model", __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\"}}", -EINVAL, "model.vocab", __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1}}}", -EINVAL, "model.vocab", __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":99999999}}}", -EINVAL, "model.vocab", __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1.5}}}", -EINVAL, "model.vocab", __LINE__);
    refused_doc("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1,\"b\":1}}}", -EINVAL, "model.vocab", __LINE__);
    refused_doc("{\"added_tokens\":3}", -EINVAL, "added_tokens", __LINE__);
    refused_doc("{\"added_tokens\":[3]}", -EINVAL, "added_tokens", __LINE__);
    REFUSED(-EINVAL, "added_tokens", .added = "{\"id\":256}");
    REFUSED(-EINVAL, "added_tokens", .added = ADDED(256, "", ""));
    REFUSED(-EINVAL, "added_tokens", .added = ADDED(7, "<x>", ""));                     /* a byte's id */
    REFUSED(-EINVAL, "added_tokens", .added = ADDED(256, "<x>", "") "," ADDED(256, "<y>", ""));
    REFUSED(-EINVAL, "added_tokens", .added = ADDED(256, "<x>", "") "," ADDED(257, "<x>", ""));
    char *json = doc_make(&(struct doc_opts){ 0 });
    static const char *const merges[] = { "[\"a\"]", "[\"a\",1]", "\"ab\"", "\"a b c\"", "\"a zz\"", "7", "\"e r\"" };
    for (size_t i = 0; i < sizeof merges / sizeof merges[0]; i++) {
        struct doc d = { 0 };
        doc_add(&d, "%.*s%s]}}", (int)(strlen(json) - 3), json, merges[i]);
        refused_doc(d.p, -EINVAL, "model.merges", __LINE__);
        free(d.p);
    }
    free(json);
}

static void accepts_what_changes_nothing(void)
{
    static const struct doc_opts fine[] = {
        { .normalizer = "null" },
        { .normalizer = "{\"type\":\"Sequence\",\"normalizers\":[]}" },
        { .model = "\"dropout\":null,\"byte_fallback\":false,\"continuing_subword_prefix\":\"\",\"unk_token\":null," },
        { .post = "{\"type\":\"ByteLevel\",\"trim_offsets\":false}" },
        { .post = "{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"A\"}}]}" },
        { .decoder = "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteLevel\"}]}" },
        { .pre = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}" },
    };
    for (size_t i = 0; i < sizeof fine / sizeof fine[0]; i++) {
        struct tokenizer *tok = doc_open(&fine[i]);
        EXPECT(tok != NULL);
        tokenizer_close(tok);
    }
}

static void config_adds_tokens_and_overrides_none(void)
{
    char *json = doc_make(&(struct doc_opts){ .added = ADDED(256, "<one>", ",\"special\":true") });
    static const char config[] = "{\"added_tokens_decoder\":{\"256\":{\"content\":\"<other>\"},"
                                 "\"258\":{\"content\":\"<two>\",\"special\":false}}}";
    struct tokenizer *tok = NULL;
    EXPECT_EQ(tokenizer_open_mem(&tok, json, strlen(json), config, strlen(config), NULL), 0);
    REQUIRE(tok != NULL);
    EXPECT_EQ(tokenizer_added_id(tok, "<one>"), 256);
    EXPECT_EQ(tokenizer_added_id(tok, "<two>"), 258);
    EXPECT_EQ(tokenizer_added_id(tok, "<other>"), -1);
    EXPECT_EQ(tokenizer_added_id(tok, ""), -1);
    EXPECT_EQ(tokenizer_added_id(tok, "<o"), -1);
    EXPECT_EQ(tokenizer_vocab_size(tok), 259);
    EXPECT(tokenizer_is_special(tok, 256) && !tokenizer_is_special(tok, 258) && !tokenizer_is_special(tok, 257));
    EXPECT(tokenizer_is_added(tok, 256) && tokenizer_is_added(tok, 258) && !tokenizer_is_added(tok, 'a'));
    EXPECT(!tokenizer_is_added(tok, -1) && !tokenizer_is_added(tok, 1 << 30));
    tokenizer_close(tok);
    struct arle_err err = ARLE_ERR_INIT;
    static const char *const bad[] = { "{\"added_tokens_decoder\":[]}",
                                       "{\"added_tokens_decoder\":{\"x\":{\"content\":\"y\"}}}",
                                       "{\"added_tokens_decoder\":{\"-1\":{\"content\":\"y\"}}}",
                                       "{\"added_tokens_decoder\":{\"999\":{}}}" };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        EXPECT_EQ(tokenizer_open_mem(&tok, json, strlen(json), bad[i], strlen(bad[i]), &err), -EINVAL);
        EXPECT_STR(err.param, "added_tokens_decoder");
    }
    free(json);
}

/* ---- folders and the cache ---- */

static char dir[] = "/tmp/arle-tok-XXXXXX", cache[64], model[64];

static void write_file(const char *folder, const char *name, const char *text, size_t n)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(text, 1, n, f) != n || fclose(f) != 0)
        TAP_FAIL("cannot write %s", path);
}

/* Path of the only file in the cache; false if there is none or more than one. */
static int only_cache_file(char *out, size_t cap)
{
    DIR *d = opendir(cache);
    struct dirent *e;
    int n = 0;
    while (d != NULL && (e = readdir(d)) != NULL)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            snprintf(out, cap, "%s/%s", cache, e->d_name);
            n++;
        }
    if (d != NULL)
        closedir(d);
    return n == 1;
}

/* Opens the model with the cache and checks that it works; returns whether the cache was used. */
static int open_cached(void)
{
    struct tokenizer *tok = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    if (tokenizer_open_opts(&tok, &(struct tokenizer_opts){ model, cache }, &err) < 0) {
        TAP_FAIL("open: %s", err.msg);
        return -1;
    }
    struct tok_ids ids = doc_encode(tok, "x ab<one>12", 11, TOK_ALLOW_SPECIAL);
    doc_expect(&ids, (const int32_t[]){ 'x', 257, 'b', 300, '1', '2', -1 }, "through the cache or not");
    tok_ids_fini(&ids);
    EXPECT_STR(tokenizer_pretok_name(tok), "pcre2");
    int used = tokenizer_from_cache(tok);
    tokenizer_close(tok);
    return used;
}

static void make_model(const char *more)
{
    static const char *const merges[] = { "x", "y", " ", "a", NULL };
    char added[256];
    snprintf(added, sizeof added, "%s%s", ADDED(300, "<one>", ""), more);
    char *json = doc_make(
        &(struct doc_opts){ .merges = merges, .added = added, .pre = SPLIT(" ?[a-z]+|[0-9]", "Isolated", "false") });
    write_file(model, "tokenizer.json", json, strlen(json));
    free(json);
}

static void cache_is_written_and_used(void)
{
    char path[512];
    EXPECT_EQ(open_cached(), 0);
    REQUIRE(only_cache_file(path, sizeof path));
    struct stat st;
    EXPECT(stat(path, &st) == 0 && (st.st_mode & 0777) == 0600);
    EXPECT_EQ(open_cached(), 1);
    write_file(model, "tokenizer_config.json", "{}", 2);        /* another key */
    EXPECT_EQ(open_cached(), 0);
    EXPECT(!only_cache_file(path, sizeof path));
    snprintf(path, sizeof path, "%s/tokenizer_config.json", model);
    unlink(path);
    EXPECT_EQ(open_cached(), 1);
}

static void empty_cache(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -f %s/*", cache);
    EXPECT_EQ(system(cmd), 0);
}

/* One damaged byte anywhere, or a cut anywhere, and the file is ignored and replaced. */
static void damaged_cache_is_ignored(void)
{
    char path[512];
    empty_cache();
    EXPECT_EQ(open_cached(), 0);
    REQUIRE(only_cache_file(path, sizeof path));
    for (int i = 0; i < 60; i++) {
        FILE *f = fopen(path, "r+b");
        REQUIRE(f != NULL);
        fseek(f, 0, SEEK_END);
        long size = ftell(f), at = i < 30 ? i * 2 : (long)doc_rnd((uint32_t)size);
        if (i % 5 == 4) {
            EXPECT_EQ(ftruncate(fileno(f), at), 0);
        } else {
            fseek(f, at, SEEK_SET);
            int c = fgetc(f);
            fseek(f, at, SEEK_SET);
            fputc(c ^ (1 << i % 8), f);
        }
        fclose(f);
        int used = open_cached();
        if (used && !(i % 5 != 4 && at >= 12 && at < 16) && !(at >= 56 && at < 64))     /* unused bytes of the head */
            TAP_FAIL("a cache damaged at %ld was used", at);
        EXPECT_EQ(open_cached(), 1);
    }
}

/*
 * With a right checksum, contents are still checked: an image with one wrong word must never be adopted and then crash.
 */
static void images_are_checked_without_the_checksum(void)
{
    struct tok_tables t = { 0 };
    char *json = doc_make(&(struct doc_opts){ .added = ADDED(300, "<one>", "") "," ADDED(301, "<two>", ""),
                                              .model = "\"ignore_merges\":true," });
    REQUIRE(tok_load_json(&t, json, strlen(json), NULL, 0, NULL) == 0);
    unsigned n_refused = 0;
    for (int i = 0; i < 4000; i++) {
        uint32_t *copy = malloc(t.image_len);
        memcpy(copy, t.image, t.image_len);
        size_t words = t.image_len / 4;
        copy[i < 400 ? (size_t)i % words : doc_rnd((uint32_t)words)] = doc_rnd(2) ? doc_rnd(1u << 31) : doc_rnd(400);
        struct tok_tables u = { 0 };
        if (tok_image_adopt(&u, copy, t.image_len) < 0) {
            n_refused++;
            free(copy);
            continue;
        }
        struct tokenizer tok = { .t = u };
        pthread_mutex_init(&tok.mu, NULL);
        tok_literals_index(&tok.t, &tok.t.raw);
        tok_literals_index(&tok.t, &tok.t.normal);
        struct tok_ids ids = TOK_IDS_INIT;
        EXPECT_EQ(tokenizer_encode(&tok, "some <one> text<", 16, TOK_ALLOW_SPECIAL, &ids, NULL), 0);
        tok_ids_fini(&ids);
        struct tokenizer *heap = malloc(sizeof *heap);
        *heap = tok;
        tokenizer_close(heap);
    }
    EXPECT(n_refused > 100);
    for (size_t n = 0; n < 200; n++) {
        void *copy = malloc(t.image_len);
        memcpy(copy, t.image, t.image_len);
        struct tok_tables u = { 0 };
        EXPECT(tok_image_adopt(&u, copy, n) < 0);
        free(copy);
    }
    tok_tables_fini(&t);
    free(json);
}

static void cache_of_others_is_ignored(void)
{
    char path[512];
    empty_cache();
    EXPECT_EQ(open_cached(), 0);
    REQUIRE(only_cache_file(path, sizeof path));
    EXPECT_EQ(chmod(path, 0666), 0);
    EXPECT_EQ(open_cached(), 0);        /* replaced by our own */
    EXPECT_EQ(open_cached(), 1);
    EXPECT_EQ(chmod(cache, 0777), 0);
    EXPECT_EQ(open_cached(), 0);
    EXPECT_EQ(chmod(cache, 0700), 0);
    EXPECT_EQ(open_cached(), 1);
    if (geteuid() == 0 && chown(path, 12345, 12345) == 0)
        EXPECT_EQ(open_cached(), 0);
    empty_cache();
    EXPECT_EQ(symlink("/etc/passwd", path), 0);
    EXPECT_EQ(open_cached(), 0);
}

static void default_cache_follows_the_environment(void)
{
    char out[4096], want[256], base[128];
    snprintf(base, sizeof base, "%s/xdg", dir);
    setenv("XDG_CACHE_HOME", base, 1);
    tok_cache_dir(out, sizeof out);
    snprintf(want, sizeof want, "%s/xdg/arle", dir);
    EXPECT_STR(out, want);
    setenv("XDG_CACHE_HOME", "relative", 1);
    snprintf(base, sizeof base, "%s/home", dir);
    EXPECT_EQ(mkdir(base, 0700), 0);
    setenv("HOME", base, 1);
    tok_cache_dir(out, sizeof out);
    snprintf(want, sizeof want, "%s/home/.cache/arle", dir);
    EXPECT_STR(out, want);
    /* A small file leaves nothing there. */
    struct tokenizer *tok = NULL;
    EXPECT_EQ(tokenizer_open(&tok, model, NULL), 0);
    EXPECT(!tokenizer_from_cache(tok));
    tokenizer_close(tok);
    EXPECT_EQ(rmdir(want), 0);
}

static void missing_files_have_reasons(void)
{
    struct tokenizer *tok = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(tokenizer_open(&tok, "/nonexistent/model", &err), -ENOENT);
    EXPECT(strstr(err.msg, "/nonexistent/model/tokenizer.json") != NULL);
    EXPECT_EQ(tokenizer_open(&tok, "/dev", &err), -ENOENT);
    EXPECT(tok == NULL);
}

int main(void)
{
    RUN(unsupported_features_are_named);
    RUN(damage_is_named);
    RUN(accepts_what_changes_nothing);
    RUN(config_adds_tokens_and_overrides_none);
    RUN(images_are_checked_without_the_checksum);
    RUN(missing_files_have_reasons);
    if (mkdtemp(dir) == NULL)
        return 1;
    snprintf(model, sizeof model, "%s/model", dir);
    snprintf(cache, sizeof cache, "%s/cache", dir);
    mkdir(model, 0700);
    mkdir(cache, 0700);
    make_model("");
    RUN(cache_is_written_and_used);
    RUN(damaged_cache_is_ignored);
    RUN(cache_of_others_is_ignored);
    RUN(default_cache_follows_the_environment);
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    if (system(cmd) != 0)
        printf("# %s left behind\n", dir);
    return tap_done();
}
