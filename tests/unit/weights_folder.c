/* Checkpoint folders: which files count, the index, and the errors that name file and tensor. */
#include "tap.h"
#include "weights/weights.h"

#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[64];

static void put(const char *name, const void *data, size_t len)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(data, 1, len, f) != len)
        TAP_FAIL("cannot write %s", path);
    if (f != NULL)
        fclose(f);
}

static void put_text(const char *name, const char *text)
{
    put(name, text, strlen(text));
}

/* A shard whose tensors are single bytes, named in `names` (comma separated). */
static void put_shard(const char *file, const char *names)
{
    char header[1024] = "{", list[256];
    int n = 0;
    snprintf(list, sizeof list, "%s", names);
    for (char *p = strtok(list, ","); p != NULL; p = strtok(NULL, ","), n++)
        snprintf(header + strlen(header), sizeof header - strlen(header),
                 "%s\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}", n ? "," : "", p, n, n + 1);
    strcat(header, "}");
    unsigned char image[2048] = { 0 };
    size_t len = strlen(header);
    for (int i = 0; i < 8; i++)
        image[i] = (unsigned char)(len >> (8 * i));
    memcpy(image + 8, header, len);
    put(file, image, 8 + len + (size_t)n);
}

static void clear_dir(void)
{
    DIR *d = opendir(dir);
    if (d == NULL)
        return;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        unlink(path);
    }
    closedir(d);
}

static void refuse(int code, const char *why)
{
    struct arle_weights *w = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = weights_open(dir, &w, &err);
    EXPECT_EQ(r, code);
    if (strstr(err.msg, why) == NULL)
        TAP_FAIL("message \"%s\" lacks \"%s\"", err.msg, why);
    if (r == 0)
        weights_close(w);
}

static void an_empty_folder_has_no_checkpoint(void)
{
    clear_dir();
    refuse(-ENOENT, "no model.safetensors");
    put("model.safetensors", "abc", 3);
    refuse(-EINVAL, "truncated");
}

static void one_file_and_its_extras(void)
{
    clear_dir();
    put_shard("model.safetensors", "a,b");
    put_shard("mtp.safetensors", "m");
    put_shard("golden.safetensors", "not.part.of.it");
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(weights_open(dir, &w, &err) == 0);
    EXPECT_EQ(weights_count(w, NULL), 3);
    EXPECT(w->find(w, "m") != NULL);
    EXPECT(w->find(w, "not.part.of.it") == NULL);
    weights_close(w);
    put_shard("mtp.safetensors", "m,a");
    refuse(-EINVAL, "tensor a is in two files");
}

static void the_index_is_held_to_its_word(void)
{
    clear_dir();
    put_shard("s1.safetensors", "a,b");
    put_shard("s2.safetensors", "c");
    put_shard("model-mtp.safetensors", "m");
    put_shard("model.safetensors", "old");
    const char *ix = "model.safetensors.index.json";
    put_text(ix, "{\"metadata\":{\"total_size\":3},\"weight_map\":{\"a\":\"s1.safetensors\",\"c\":\"s2.safetensors\"}}");
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(weights_open(dir, &w, &err) == 0);
    EXPECT_EQ(weights_count(w, NULL), 4);      /* b is in a listed shard, m in an extra one */
    EXPECT(w->find(w, "old") == NULL);
    weights_close(w);

    put_text(ix, "{\"weight_map\":{\"a\":\"s1.safetensors\",\"z\":\"s2.safetensors\"}}");
    refuse(-EINVAL, "tensor z is in s2.safetensors, but it is missing");
    put_text(ix, "{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}}");
    refuse(-EINVAL, "tensor b is in s2.safetensors, but it is in s1.safetensors");
    put_text(ix, "{\"weight_map\":{\"a\":\"s3.safetensors\"}}");
    refuse(-ENOENT, "s3.safetensors");
    put_text(ix, "{\"weight_map\":{\"a\":\"s1.safetensors\",\"a\":\"s1.safetensors\"}}");
    refuse(-EINVAL, "tensor a appears twice");
    put_text(ix, "{\"weight_map\":{\"a\":7}}");
    refuse(-EINVAL, "expected a string");
    put_text(ix, "{}");
    refuse(-EINVAL, "weight_map is missing");
    put_text(ix, "{\"weight_map\":{}} {");
    refuse(-EINVAL, "after the closing");
}

static void shards_stay_in_their_folder(void)
{
    clear_dir();
    const char *ix = "model.safetensors.index.json";
    const char *names[] = { "../s.safetensors", "/etc/s.safetensors", "x/../s.safetensors", ".s.safetensors", "passwd", "",
                            ".safetensors", "..\\u002fs.safetensors" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char text[200];
        snprintf(text, sizeof text, "{\"weight_map\":{\"a\":\"%s\"}}", names[i]);
        put_text(ix, text);
        refuse(-EINVAL, "is not the name of a .safetensors file");
    }
}

static void the_shipped_models_open(void)
{
    const char *root = getenv("ARLE_TEST_MODELS");
    const struct { const char *name; size_t tensors; } models[] = { { "qwen35-tiny", 123 }, { "qwen35-micro", 55 },
                                                                    { "qwen35-moe-tiny", 72 } };
    if (root == NULL)
        SKIP("ARLE_TEST_MODELS is not set");
    for (size_t i = 0; i < 3; i++) {
        char path[1024];
        struct arle_weights *w;
        struct arle_err err = ARLE_ERR_INIT;
        snprintf(path, sizeof path, "%s/%s", root, models[i].name);
        if (weights_open(path, &w, &err) < 0) {
            TAP_FAIL("%s: %s", models[i].name, err.msg);
            continue;
        }
        EXPECT_EQ(weights_count(w, NULL), models[i].tensors);
        const struct arle_tensor *t = w->at(w, 0);
        unsigned sum = 0;
        for (size_t j = 0; j < t->bytes; j++)
            sum += ((const unsigned char *)t->data)[j];
        w->done(w, t);
        for (size_t j = 0; j < t->bytes; j++)
            sum -= ((const unsigned char *)t->data)[j];         /* done() drops pages, not data */
        EXPECT_EQ(sum, 0);
        weights_close(w);
    }
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/arle-weights-XXXXXX");
    if (mkdtemp(dir) == NULL)
        return 1;
    RUN(an_empty_folder_has_no_checkpoint);
    RUN(one_file_and_its_extras);
    RUN(the_index_is_held_to_its_word);
    RUN(shards_stay_in_their_folder);
    RUN(the_shipped_models_open);
    clear_dir();
    rmdir(dir);
    return tap_done();
}
