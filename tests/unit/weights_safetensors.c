/* One safetensors image: what is read, and every way in which it can be wrong, each refused by name. */
#include "tap.h"
#include "weights/weights.h"

static unsigned char image[4096];

/* Puts header and `body` zero bytes together; header_len < 0 means its true length. */
static size_t build(const char *header, long header_len, size_t body)
{
    size_t n = strlen(header);
    uint64_t said = header_len < 0 ? n : (uint64_t)header_len;
    for (int i = 0; i < 8; i++)
        image[i] = (unsigned char)(said >> (8 * i));
    memcpy(image + 8, header, n);
    for (size_t i = 0; i < body; i++)
        image[8 + n + i] = (unsigned char)i;
    return 8 + n + body;
}

static int read_image(const char *header, long header_len, size_t body, struct arle_weights **out, struct arle_err *err)
{
    return weights_from_memory("t.safetensors", image, build(header, header_len, body), out, err);
}

/* Expects a refusal whose text holds `why`, and whose parameter is `param` when that is not NULL. */
static void refuse(const char *header, long header_len, size_t body, const char *why, const char *param)
{
    struct arle_weights *w = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = read_image(header, header_len, body, &w, &err);
    EXPECT_EQ(r, -EINVAL);
    EXPECT(w == NULL);
    if (strstr(err.msg, why) == NULL || strstr(err.msg, "t.safetensors") == NULL)
        TAP_FAIL("message \"%s\" lacks \"%s\" or the file", err.msg, why);
    if (param != NULL) {
        EXPECT_STR(err.param, param);
        EXPECT(strstr(err.msg, param) != NULL);
    }
    weights_close(r == 0 ? w : NULL);
}

static void reads_types_shapes_and_bytes(void)
{
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(read_image("{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"
                       " \"a\" : {\"shape\":[],\"data_offsets\":[0,4],\"dtype\":\"F32\"},"
                       "\"e\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[16,16]}}  ", -1, 16, &w, &err) == 0);
    const struct arle_tensor *a = w->find(w, "a"), *b = w->find(w, "b"), *e = w->find(w, "e");
    REQUIRE(a != NULL && b != NULL && e != NULL);
    EXPECT_EQ(a->dtype, ARLE_F32);
    EXPECT_EQ(a->n_dims, 0);
    EXPECT_EQ(a->bytes, 4);
    EXPECT_EQ(b->n_dims, 2);
    EXPECT_EQ(b->dim[1], 3);
    EXPECT_EQ(((const unsigned char *)b->data)[0], 4);
    EXPECT_EQ(e->bytes, 0);
    EXPECT(w->find(w, "c") == NULL);
    EXPECT_STR(w->at(w, 0)->name, "a");
    EXPECT(w->at(w, 3) == NULL);
    uint64_t bytes;
    EXPECT_EQ(weights_count(w, &bytes), 3);
    EXPECT_EQ(bytes, 16);
    weights_close(w);
}

static void elements_are_aligned_whatever_the_file_says(void)
{
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(read_image("{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                       "\"y\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[1,9]}}", -1, 9, &w, &err) == 0);
    const struct arle_tensor *y = w->find(w, "y");
    EXPECT_EQ((uintptr_t)y->data % 4, 0);
    EXPECT_EQ(((const unsigned char *)y->data)[0], 1);
    w->done(w, y);
    weights_close(w);
}

static void sizes_are_checked_before_use(void)
{
    refuse("{", 1 << 20, 0, "truncated: header", NULL);
    refuse("{", (100l << 20) + 1, 0, "100 MB", NULL);
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", -1, 8, "truncated", "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,12]}}", -1, 12, "needs 16 bytes", "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", -1, 0, "overflows", "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", -1, 4, "backwards", "a");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", -1, 1, "dimensions", "a");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,1]}}", -1, 1, "whole number", NULL);
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1.0],\"data_offsets\":[0,1]}}", -1, 1, "whole number", NULL);
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[99999999999999999999],\"data_offsets\":[0,1]}}", -1, 1, "too large", NULL);
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(weights_from_memory("t.safetensors", image, 7, &w, &err), -EINVAL);
}

static void bytes_belong_to_one_tensor(void)
{
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
           "\"data_offsets\":[3,7]}}", -1, 7, "overlaps", "b");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
           "\"data_offsets\":[5,9]}}", -1, 9, "unused bytes", "b");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", -1, 5, "belong to none", NULL);
    refuse("{}", -1, 1, "belong to none", NULL);
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],"
           "\"data_offsets\":[1,2]}}", -1, 2, "twice", "a");
}

static void headers_must_be_well_formed(void)
{
    refuse("{\"a\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4, "unknown dtype F31", "a");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", -1, 1, "needs dtype", "a");
    refuse("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", -1, 1, "twice", "a");
    refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", -1, 1, "unknown key", "a");
    refuse("{\"a\xC3\xA9\":{}}", -1, 0, "ASCII", NULL);
    refuse("{\"a\\u00e9\":{}}", -1, 0, "ASCII", NULL);
    refuse("{\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", -1, 1, "without a name", NULL);
    refuse("[]", -1, 0, "does not begin with {", NULL);
    refuse("", 0, 0, "does not begin with {", NULL);
    refuse("{} x", -1, 0, "after the closing", NULL);
    refuse("{\"a\"", -1, 0, "expected :", NULL);
    refuse("{\"a", -1, 0, "without end", NULL);
    char deep[200] = "{\"__metadata__\":";
    for (int i = 0; i < 60; i++)
        strcat(deep, "[");
    refuse(deep, -1, 0, "too deep", NULL);
}

static void unknown_tensors_are_reported(void)
{
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(read_image("{\"v.a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"v.b\":{\"dtype\":\"U8\",\"shape\":[1],"
                       "\"data_offsets\":[1,2]},\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]},\"y\":"
                       "{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[3,4]}}", -1, 4, &w, &err) == 0);
    EXPECT_EQ(weights_unclaimed(w, &err), -EINVAL);
    EXPECT_EQ(w->ignore(w, "v."), 2);
    EXPECT_EQ(w->ignore(w, "z"), 0);
    EXPECT(w->find(w, "x") != NULL);
    EXPECT_EQ(weights_unclaimed(w, &err), -EINVAL);
    EXPECT_STR(err.param, "y");
    EXPECT(strstr(err.msg, "1 of its tensors: y") != NULL);
    w->find(w, "y");
    EXPECT_EQ(weights_unclaimed(w, &err), 0);
    weights_close(w);
}

static void random_views_hold_what_was_declared(void)
{
    struct arle_weights *w, *w2;
    struct arle_err err = ARLE_ERR_INIT;
    int64_t d[2] = { 3, 5 };
    REQUIRE(weights_random(&w, 7, &err) == 0 && weights_random(&w2, 8, &err) == 0);
    EXPECT_EQ(w->random, 1);
    EXPECT(w->find(w, "q") == NULL);
    EXPECT_EQ(w->want(w, "q", ARLE_BF16, 2, d, 0, 0.02, &err), 0);
    EXPECT_EQ(w->want(w, "a", ARLE_F32, 1, d, 1, 0.5, &err), 0);
    EXPECT_EQ(w->want(w, "q", ARLE_BF16, 2, d, 0, 0.02, &err), 0);
    EXPECT_EQ(w->want(w, "q", ARLE_BF16, 1, d, 0, 0.02, &err), -EINVAL);
    const struct arle_tensor *q = w->find(w, "q"), *a = w->find(w, "a");
    REQUIRE(q != NULL && a != NULL);
    EXPECT(q->data == NULL);
    EXPECT_EQ(q->bytes, 30);
    EXPECT(q->rand_seed != a->rand_seed);
    EXPECT_NEAR(a->rand_mean, 1, 0);
    w2->want(w2, "q", ARLE_BF16, 2, d, 0, 0.02, &err);
    EXPECT(w2->find(w2, "q")->rand_seed != q->rand_seed);
    int64_t big[2] = { INT64_MAX, 4 };
    EXPECT_EQ(w->want(w, "r", ARLE_F32, 2, big, 0, 1, &err), -EINVAL);
    EXPECT_STR(w->at(w, 0)->name, "a");
    EXPECT_EQ(weights_unclaimed(w, &err), 0);
    w->done(w, q);
    weights_close(w);
    weights_close(w2);
}

int main(void)
{
    RUN(reads_types_shapes_and_bytes);
    RUN(elements_are_aligned_whatever_the_file_says);
    RUN(sizes_are_checked_before_use);
    RUN(bytes_belong_to_one_tensor);
    RUN(headers_must_be_well_formed);
    RUN(unknown_tensors_are_reported);
    RUN(random_views_hold_what_was_declared);
    return tap_done();
}
