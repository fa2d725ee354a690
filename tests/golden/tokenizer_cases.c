/* Every text of tokenizer_cases.json (ids and decoded text by the reference library) through the shipped tokenizer. */
#include <json-c/json.h>

#include "chat/detok.h"
#include "chat/tokenizer.h"
#include "tap.h"

static struct json_object *member(struct json_object *o, const char *name)
{
    struct json_object *v = NULL;
    json_object_object_get_ex(o, name, &v);
    return v;
}

static void same_ids(const struct tok_ids *got, struct json_object *want, const char *text)
{
    int equal = got->n == json_object_array_length(want);
    for (size_t i = 0; equal && i < got->n; i++)
        equal = got->ids[i] == json_object_get_int(json_object_array_get_idx(want, i));
    if (!equal)
        TAP_FAIL("ids of %s differ: %zu, expected %zu", text, got->n, json_object_array_length(want));
}

static void same_text(const char *got, size_t len, struct json_object *want, const char *how)
{
    if (len != (size_t)json_object_get_string_len(want) || memcmp(got, json_object_get_string(want), len) != 0)
        TAP_FAIL("%s gives %.*s, expected %s", how, (int)len, got, json_object_to_json_string(want));
}

/* The whole ids one by one through the streaming detokeniser. */
static void streams_alike(const struct tokenizer *tok, const struct tok_ids *ids, struct json_object *want)
{
    struct detok d;
    const char *piece;
    char *all = calloc(1, 16 + 4 * (size_t)json_object_get_string_len(want));
    size_t n = 0, len;
    detok_init(&d, tok, 0);
    for (size_t i = 0; i <= ids->n; i++) {
        EXPECT_EQ(i < ids->n ? detok_push(&d, ids->ids[i], &piece, &len) : detok_flush(&d, &piece, &len), 0);
        memcpy(all + n, piece, len);
        n += len;
    }
    same_text(all, n, want, "detokeniser");
    detok_fini(&d);
    free(all);
}

static void one_case(const struct tokenizer *tok, struct json_object *c)
{
    struct json_object *text = member(c, "text");
    struct tok_ids ids = TOK_IDS_INIT;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(tokenizer_encode(tok, json_object_get_string(text), (size_t)json_object_get_string_len(text),
                               TOK_ALLOW_SPECIAL, &ids, &err), 0);
    same_ids(&ids, member(c, "ids"), json_object_to_json_string(text));
    char *back;
    size_t len;
    EXPECT_EQ(tokenizer_decode(tok, ids.ids, ids.n, TOK_LOSSY_UTF8, &back, &len, &err), 0);
    same_text(back, len, member(c, "decoded"), "decode");
    streams_alike(tok, &ids, member(c, "decoded"));
    free(back);
    tok_ids_fini(&ids);
}

static void all_cases(void)
{
    char path[4096];
    const char *src = getenv("top_srcdir");
    snprintf(path, sizeof path, "%s/tests/golden/tokenizer_cases.json", src ? src : ".");
    struct json_object *root = json_object_from_file(path);
    REQUIRE(root != NULL);
    snprintf(path, sizeof path, "%s/models/qwen35-tiny", src ? src : ".");
    struct tokenizer *tok = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(tokenizer_open_opts(&tok, &(struct tokenizer_opts){ path, "" }, &err), 0);
    REQUIRE(tok != NULL);
    size_t n = json_object_array_length(root);
    EXPECT(n >= 20);
    for (size_t i = 0; i < n; i++)
        one_case(tok, json_object_array_get_idx(root, i));
    printf("# %zu cases\n", n);
    tokenizer_close(tok);
    json_object_put(root);
}

int main(void)
{
    RUN(all_cases);
    return tap_done();
}
