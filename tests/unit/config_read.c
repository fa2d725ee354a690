/* arle.ini and --set: what is read, and that everything wrong is refused with place, field and the nearest name. */
#include "config/config.h"
#include "tap.h"

#include <unistd.h>

static char path[] = "/tmp/arle-config-XXXXXX";

static int open_bytes(const char *bytes, size_t len, const char *const *sets, size_t n_sets, struct config **cfg, struct arle_err *err)
{
    FILE *f = fopen(path, "w");
    if (f == NULL)
        return -EIO;
    fwrite(bytes, 1, len, f);
    fclose(f);
    *cfg = NULL;
    *err = (struct arle_err)ARLE_ERR_INIT;
    return config_open(cfg, path, sets, n_sets, err);
}

static int open_text(const char *text, struct config **cfg, struct arle_err *err)
{
    return open_bytes(text, strlen(text), NULL, 0, cfg, err);
}

/* The text is refused and the message holds every one of the words. */
static void refused(const char *text, const char *const *words)
{
    struct config *cfg;
    struct arle_err err;
    int r = open_text(text, &cfg, &err);
    if (r >= 0) {
        TAP_FAIL("accepted: %s", text);
        config_close(cfg);
        return;
    }
    for (; *words != NULL; words++) {
        if (strstr(err.msg, *words) == NULL)
            TAP_FAIL("\"%s\" does not say \"%s\"", err.msg, *words);
    }
}
#define REFUSED(text, ...) refused(text, (const char *const[]){ __VA_ARGS__, NULL })

static void defaults_are_those_of_the_table(void)
{
    struct config *cfg;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(config_open(&cfg, NULL, NULL, 0, &err), 0);
    EXPECT_STR(config_str(cfg, "server", "listen"), "127.0.0.1:8080");
    EXPECT_EQ(config_i64(cfg, "kv", "disk_bytes"), 20ll << 30);
    EXPECT_EQ(config_i64(cfg, "server", "drain_deadline"), 20000);
    EXPECT(config_bool(cfg, "kv", "prefix_cache"));
    EXPECT(!config_is_set(cfg, "server", "listen"));
    EXPECT_EQ(config_n_models(cfg), 0);
    config_close(cfg);
}

static void a_file_is_read(void)
{
    struct config *cfg;
    struct arle_err err;
    EXPECT_EQ(open_text("\xEF\xBB\xBF# comment\n[server]\n  listen = 0.0.0.0:80 ; inline\nmax_body=1MiB\r\n\n[kv]\n\tpage_tokens = 32\n"
                        "[model qwen3.5-0.8b]\npath = /m/a\nrequired = no\n[model b]\npath=/m/b\nkv_dtype = int8\n"
                        "[plugin backend-cpu]\nthreads = 3", &cfg, &err), 0);
    REQUIRE(cfg != NULL);
    EXPECT_STR(config_str(cfg, "server", "listen"), "0.0.0.0:80");
    EXPECT(config_is_set(cfg, "server", "listen"));
    EXPECT_EQ(config_i64(cfg, "server", "max_body"), 1 << 20);
    EXPECT_EQ(config_i64(cfg, "kv", "page_tokens"), 32);
    EXPECT_EQ(config_n_models(cfg), 2);
    EXPECT_STR(config_model_name(cfg, 0), "qwen3.5-0.8b");
    EXPECT(!config_bool(cfg, config_model_section(cfg, 0), "required"));
    EXPECT_STR(config_str(cfg, "model b", "kv_dtype"), "int8");
    EXPECT_EQ(config_n_plugin_sections(cfg), 1);
    EXPECT_STR(config_plugin_text(cfg, "backend-cpu", "threads"), "3");
    config_close(cfg);
}

static void unknown_names_are_refused_with_the_nearest(void)
{
    REFUSED("[server]\n\nlistn = x:1\n", ":3:", "listn", "did you mean \"listen\"");
    REFUSED("[sever]\n", ":1:", "[sever]", "did you mean [server]");
    REFUSED("[quux]\nx = 1\n", ":1:", "unknown section [quux]");
    REFUSED("[model a]\npth = /x\n", ":2:", "\"pth\"", "[model a]", "\"path\"");
    REFUSED("[model]\npath = /x\n", ":1:", "[model NAME]");
    REFUSED("[model a b]\npath = /x\n", ":1:", "[model NAME]");
    REFUSED("[server main]\n", ":1:", "takes no name");
}

static void wrong_values_name_the_field_and_what_it_wants(void)
{
    REFUSED("[kv]\npage_tokens = many\n", ":2:", "kv.page_tokens", "whole number", "8 to 256");
    REFUSED("[kv]\npage_tokens = 4\n", "kv.page_tokens", "out of range", "8 to 256");
    REFUSED("[kv]\npage_tokens = 24\n", "kv.page_tokens", "power of two");
    REFUSED("[kv]\nsnapshot_cadence = 100\n", "kv.snapshot_cadence", "multiple of 64");
    REFUSED("[server]\nmax_body = 5 parsecs\n", "server.max_body", "bytes", "1KiB to 1GiB");
    REFUSED("[server]\nmax_body = 0x400\n", "server.max_body");
    REFUSED("[server]\nmax_body = -5\n", "server.max_body");
    REFUSED("[server]\nmax_body = 99999999999999999999999TiB\n", "server.max_body");
    REFUSED("[server]\ndeadline = 10\n", "server.deadline", "time", "10s");
    REFUSED("[server]\nforce_open = maybe\n", "server.force_open", "yes or no");
    REFUSED("[log]\nlevel = loud\n", "log.level", "error|warn|info|debug");
    REFUSED("[log]\nlevel = err\n", "log.level");
    REFUSED("[server]\nthreads = 99999999999999999999\n", "server.threads");
    REFUSED("[server]\nlisten = a:1\nlisten = b:2\n", ":3:", "set twice", "line 2");
    REFUSED("[model a]\n", "[model a]", "path is missing");
}

static void what_inih_would_garble_is_refused(void)
{
    struct config *cfg;
    struct arle_err err;
    char text[600];
    snprintf(text, sizeof text, "[server]\n\nlisten = %0300d\n", 1);
    REFUSED(text, ":3:", "longer than");
    snprintf(text, sizeof text, "[model %060d]\n", 1);
    REFUSED(text, ":1:", "section name is longer");
    REFUSED("[server]\njust words\n", ":2:", "KEY = VALUE");
    REFUSED("listen = x\n", ":1:", "before the first [section]");
    REFUSED("[server\n", ":1:", "without \"]\"");
    REFUSED("[server] listen = x\n", ":1:", "after \"]\"");
    EXPECT_EQ(open_bytes("[server]\nlisten = a\0b\n", 22, NULL, 0, &cfg, &err), -EINVAL);
    EXPECT(strstr(err.msg, ":2: NUL byte") != NULL);
    EXPECT_EQ(config_open(&cfg, "/nonexistent/arle.ini", NULL, 0, &err), -ENOENT);
    EXPECT(strstr(err.msg, "/nonexistent/arle.ini") != NULL);
    EXPECT_EQ(config_open(&cfg, "/tmp", NULL, 0, &err), -EISDIR);
}

static void sets_come_on_top(void)
{
    const char *sets[] = { "server.listen=[::1]:99", "model.kv_dtype=fp8", "model.q3.5.path=/x=y", "backend-cpu.compute=f32",
        "plugin.model-x.a=b", "kv.page_tokens=64", "kv.page_tokens=128" };
    struct config *cfg;
    struct arle_err err;
    /* model.KEY is only clear while there is one model: it comes before the second is made. */
    EXPECT_EQ(open_bytes("[server]\nlisten=a:1\n[model one]\npath=/one\n", 42, sets, 7, &cfg, &err), 0);
    REQUIRE(cfg != NULL);
    EXPECT_STR(config_str(cfg, "server", "listen"), "[::1]:99");
    EXPECT_STR(config_str(cfg, "model one", "kv_dtype"), "fp8");
    EXPECT_STR(config_str(cfg, "model q3.5", "path"), "/x=y");
    EXPECT_EQ(config_i64(cfg, "kv", "page_tokens"), 128);
    EXPECT_STR(config_plugin_text(cfg, "backend-cpu", "compute"), "f32");
    EXPECT_STR(config_plugin_text(cfg, "model-x", "a"), "b");
    EXPECT_STR(config_compute(cfg, 0, "cpu"), "f32");
    EXPECT_STR(config_compute(cfg, 0, "backend-cpu"), "f32");
    EXPECT_STR(config_compute(cfg, 0, "backend-other"), "auto");
    config_close(cfg);
}

static void bad_sets_are_refused(void)
{
    static const struct { const char *set, *word; } bad[] = {
        { "server.listen", "SECTION.KEY=VALUE" }, { "listen=x", "SECTION.KEY=VALUE" }, { ".x=1", "SECTION.KEY=VALUE" },
        { "server.=1", "SECTION.KEY=VALUE" }, { "=", "SECTION.KEY=VALUE" }, { "", "SECTION.KEY=VALUE" },
        { "server.lisen=x", "did you mean \"listen\"" }, { "sever.listen=x", "did you mean [server]" },
        { "tool-x.a b=1", "no key of a plugin" }, { "foo.bar=1", "unknown section [foo]" }, { "model.path=/x", "there are 0 models" },
        { "model.a b.path=/x", "letters, digits" }, { "kv.page_tokens=9999", "8 to 256" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct config *cfg = NULL;
        struct arle_err err = ARLE_ERR_INIT;
        EXPECT_EQ(config_open(&cfg, NULL, &bad[i].set, 1, &err), -EINVAL);
        EXPECT(cfg == NULL);
        if (strstr(err.msg, bad[i].word) == NULL)
            TAP_FAIL("--set %s: \"%s\" does not say \"%s\"", bad[i].set, err.msg, bad[i].word);
    }
}

static const struct arle_conf_key tiny_keys[] = {
    { .name = "threads", .type = ARLE_CONF_I64, .def = "2", .min = 0, .max = 64, .unit = "threads", .help = "Workers." },
    { .name = "ratio", .type = ARLE_CONF_F64, .def = "0.5", .min = 0, .max = 1, .unit = "", .help = "A ratio." },
    { .name = NULL },
};

static void plugin_sections_are_checked_against_the_plugins_keys(void)
{
    struct config *cfg;
    struct arle_err err;
    struct arle_conf *conf = NULL;
    EXPECT_EQ(open_text("[plugin backend-cpu]\nthreads = 3\nratio = 0.25\nrequired = yes\n", &cfg, &err), 0);
    REQUIRE(cfg != NULL);
    EXPECT_EQ(config_plugin(cfg, "backend-cpu", ARLE_KIND_BACKEND, tiny_keys, &conf, &err), 0);
    EXPECT_EQ(conf_i64(conf, "threads"), 3);
    EXPECT_NEAR(conf_f64(conf, "ratio"), 0.25, 0);
    EXPECT_EQ(conf_i64(conf, "required"), 1);
    EXPECT_STR(conf_str(conf, "compute"), "auto");
    EXPECT_STR(conf_str(conf, "undeclared"), "");
    conf_close(conf);
    EXPECT_EQ(config_plugin(cfg, "other", ARLE_KIND_MODEL, NULL, &conf, &err), 0);
    EXPECT_EQ(conf_i64(conf, "required"), 0);
    conf_close(conf);
    config_close(cfg);

    EXPECT_EQ(open_text("[plugin backend-cpu]\n\nthread = 3\n", &cfg, &err), 0);
    EXPECT_EQ(config_plugin(cfg, "backend-cpu", ARLE_KIND_BACKEND, tiny_keys, &conf, &err), -EINVAL);
    EXPECT(strstr(err.msg, ":3:") != NULL && strstr(err.msg, "did you mean \"threads\"") != NULL);
    config_close(cfg);
    EXPECT_EQ(open_text("[plugin backend-cpu]\nratio = 1.5\n", &cfg, &err), 0);
    EXPECT_EQ(config_plugin(cfg, "backend-cpu", ARLE_KIND_BACKEND, tiny_keys, &conf, &err), -EINVAL);
    EXPECT(strstr(err.msg, "out of range: wants number, 0 to 1") != NULL);
    config_close(cfg);
}

static void a_dump_reads_back_and_hides_secrets(void)
{
    struct config *cfg, *again;
    struct arle_err err;
    char *text = NULL;
    size_t len = 0;
    EXPECT_EQ(open_text("[server]\nlisten = unix:/run/x\n[auth]\nkeys = hush-hush\n[model m]\npath = /m\n[plugin p-q]\nk = v\n", &cfg, &err), 0);
    REQUIRE(cfg != NULL);
    FILE *f = open_memstream(&text, &len);
    config_dump(cfg, f, true);
    fclose(f);
    EXPECT(strstr(text, "hush") == NULL);
    EXPECT_EQ(open_text(text, &again, &err), 0);
    REQUIRE(again != NULL);
    EXPECT_STR(config_str(again, "server", "listen"), "unix:/run/x");
    EXPECT_STR(config_str(again, "model m", "path"), "/m");
    EXPECT_STR(config_plugin_text(again, "p-q", "k"), "v");
    free(text);
    config_close(again);
    config_close(cfg);
}

static void note(void *arg, const char *section, const struct arle_conf_key *key, const char *was, const char *is)
{
    char *s = arg;
    snprintf(s + strlen(s), 400 - strlen(s), "%s.%s:%s>%s%s ", section, key->name, was, is, key->flags & ARLE_CONF_RELOAD ? " live" : "");
}

static void differences_are_listed(void)
{
    struct config *a, *b;
    struct arle_err err;
    char seen[400] = "";
    EXPECT_EQ(open_text("[server]\nmax_body = 1MiB\nthreads = 2\n[model m]\npath=/m\n[plugin x-y]\nk = 1\n", &a, &err), 0);
    EXPECT_EQ(open_text("[server]\nmax_body = 2MiB\nthreads = 3\n[model n]\npath=/m\n[plugin x-y]\nk = 2\n", &b, &err), 0);
    config_diff(a, b, note, seen);
    EXPECT_STR(seen, "server.max_body:1MiB>2MiB live server.threads:2>3 model n.:>present model m.:present> plugin x-y.k:1>2 ");
    config_close(a);
    config_close(b);
}

int main(void)
{
    int fd = mkstemp(path);
    if (fd < 0)
        return 1;
    close(fd);
    RUN(defaults_are_those_of_the_table);
    RUN(a_file_is_read);
    RUN(unknown_names_are_refused_with_the_nearest);
    RUN(wrong_values_name_the_field_and_what_it_wants);
    RUN(what_inih_would_garble_is_refused);
    RUN(sets_come_on_top);
    RUN(bad_sets_are_refused);
    RUN(plugin_sections_are_checked_against_the_plugins_keys);
    RUN(a_dump_reads_back_and_hides_secrets);
    RUN(differences_are_listed);
    unlink(path);
    return tap_done();
}
