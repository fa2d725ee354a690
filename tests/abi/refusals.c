/*
 * Bad plugins of every kind: each is refused with a text that names the file, the reason and a cure, the registry lives, and
 * the good ones beside them work.
 */
#include "config/config.h"
#include "plugin/conform.h"
#include "plugin/registry.h"
#include "tap.h"
#include "util/clock.h"
#include "util/log.h"

#include <arle/tool.h>
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[] = "/tmp/arle-abi-XXXXXX";

static void clean(void)
{
    DIR *d = opendir(dir);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        unlinkat(dirfd(d), e->d_name, 0);
    if (d != NULL)
        closedir(d);
}

/* Copies a built plugin into the directory under a name of its own. */
static bool put(const char *built, const char *as)
{
    char from[512], to[512], buf[65536];
    const char *top = getenv("top_builddir");
    snprintf(from, sizeof from, "%s/tests/abi/.libs/%s.so", top != NULL ? top : ".", built);
    snprintf(to, sizeof to, "%s/%s.so", dir, as);
    int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0755);
    ssize_t n = -1;
    while (in >= 0 && out >= 0 && (n = read(in, buf, sizeof buf)) > 0 && write(out, buf, (size_t)n) == n)
        ;
    close(in);
    close(out);
    chmod(to, 0755);
    return n == 0;
}

static struct config *config_of(const char *extra)
{
    char set[128];
    struct config *cfg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    snprintf(set, sizeof set, "plugins.dir=%s", dir);
    const char *sets[] = { set, "plugins.probe_timeout=1500ms", extra };
    if (config_open(&cfg, NULL, sets, extra != NULL ? 3 : 2, &err) < 0)
        TAP_FAIL("%s", err.msg);
    return cfg;
}

/* Puts `built` beside a good plugin and expects a refusal whose reason holds file and words. */
static void refused(const char *built, const char *reason, const char *cure)
{
    clean();
    REQUIRE(put(built, "a-bad") && put("good", "b-good"));
    struct config *cfg = config_of(NULL);
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = registry_open(&reg, cfg, 0, &err);
    if (r < 0)
        TAP_FAIL("%s: %s", built, err.msg);
    REQUIRE(r == 0);
    EXPECT_EQ(registry_count(reg), 2);
    const struct plugin_info *bad = registry_at(reg, 0), *good = NULL;
    EXPECT_EQ(bad->state, PLUGIN_REFUSED);
    if (strstr(bad->reason, "a-bad.so") == NULL || strstr(bad->reason, reason) == NULL || strstr(bad->reason, cure) == NULL)
        TAP_FAIL("%s: \"%s\" does not name a-bad.so, \"%s\" and \"%s\"", built, bad->reason, reason, cure);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_TOOL, "probe", &good, &err), 0);
    EXPECT(good != NULL && good->state == PLUGIN_OPEN && *(int64_t *)good->ctx == 3);
    registry_close(reg);
    config_close(cfg);
}
#define REFUSED(built, reason, cure) static void built##_is_refused(void) { refused(#built, reason, cure); }

REFUSED(magic, "0x12345678", "build it with ARLE_PLUGIN_HEAD")
REFUSED(older_major, "built for plugin ABI 0.9, this program speaks 1.", "install the plugin's version for 1.x")
REFUSED(newer_major, "built for plugin ABI 2.1, this program speaks 1.", "update ARLE")
REFUSED(short_struct, "descriptor is 24 bytes", "rebuild it")
REFUSED(long_struct, "claims 4096 bytes", "ARLE_PLUGIN_HEAD")
REFUSED(needs, "needs 0x10000000000", "update ARLE")
REFUSED(kind, "kind 99", "update ARLE")
REFUSED(no_name, "no proper name", "[a-z0-9-]+")
REFUSED(no_ops, "no ops table", "fill it")
REFUSED(table, "lacks call", "every tool needs it")
REFUSED(no_descriptor, "does not export arle_plugin_v1", "remove it")
REFUSED(function, "is a function", "constant struct arle_plugin")
REFUSED(undefined, "a_symbol_that_nobody_defines", "rebuild it")
REFUSED(library, "libarle-gone.so", "install the package")
REFUSED(ctor_crash, "crashed while loading", "remove it or install")
REFUSED(ctor_exit, "exit status 7 while loading", "remove it or install")
REFUSED(ctor_endless, "did not end loading within 1500 ms", "plugins.probe_timeout")
REFUSED(probe_crash, "crashed in probe()", "remove it or install")
REFUSED(probe_exit, "exit status 0 in probe()", "remove it or install")
REFUSED(probe_endless, "did not end probe() within 1500 ms", "plugins.probe_timeout")
REFUSED(probe_error, "probe failed: the driver is older than 12", "update it")
REFUSED(unusable, "no flux capacitor", "install libflux")

static void garbage_files_are_refused(void)
{
    char path[256];
    clean();
    REQUIRE(put("good", "z-good"));
    snprintf(path, sizeof path, "%s/a-text.so", dir);
    FILE *f = fopen(path, "w");
    fputs("this is no shared object", f);
    fclose(f);
    snprintf(path, sizeof path, "%s/b-empty.so", dir);
    fclose(fopen(path, "w"));
    snprintf(path, sizeof path, "%s/c-link.so", dir);
    EXPECT_EQ(symlink("/nonexistent/x.so", path), 0);
    snprintf(path, sizeof path, "%s/d-dir.so", dir);
    EXPECT_EQ(mkdir(path, 0755), 0);
    struct config *cfg = config_of(NULL);
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(registry_open(&reg, cfg, 0, &err) == 0);
    EXPECT_EQ(registry_count(reg), 5);
    static const char *const words[] = { "damaged or no plugin", "damaged or no plugin", "repair the link", "no regular file" };
    for (size_t i = 0; i < 4; i++) {
        EXPECT_EQ(registry_at(reg, i)->state, PLUGIN_REFUSED);
        if (strstr(registry_at(reg, i)->reason, words[i]) == NULL)
            TAP_FAIL("\"%s\" does not say \"%s\"", registry_at(reg, i)->reason, words[i]);
    }
    EXPECT_EQ(registry_at(reg, 4)->state, PLUGIN_READY);
    registry_close(reg);
    config_close(cfg);
    rmdir(path);
}

static void expect_untrusted(const char *word)
{
    struct config *cfg = config_of(NULL);
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(registry_open(&reg, cfg, 0, &err) == 0);
    EXPECT_EQ(registry_count(reg), 1);
    const struct plugin_info *p = registry_at(reg, 0);
    EXPECT_EQ(p->state, PLUGIN_REFUSED);
    if (strstr(p->reason, dir) == NULL || strstr(p->reason, word) == NULL)
        TAP_FAIL("\"%s\" does not say \"%s\"", p->reason, word);
    registry_close(reg);
    config_close(cfg);
}

static void wrong_modes_are_refused(void)
{
    char path[256];
    clean();
    REQUIRE(put("good", "good"));
    snprintf(path, sizeof path, "%s/good.so", dir);
    chmod(path, 0775);
    expect_untrusted("0775 lets others write to it; chmod go-w it");
    chmod(path, 0757);
    expect_untrusted("0757 lets others write");
    chmod(path, 0755);
    chmod(dir, 0777);
    expect_untrusted("0777 lets others write");
    chmod(dir, 0755);
}

static void wrong_owners_are_refused(void)
{
    char path[256];
    if (geteuid() != 0)
        SKIP("only root can give files away");
    clean();
    REQUIRE(put("good", "good"));
    snprintf(path, sizeof path, "%s/good.so", dir);
    REQUIRE(chown(path, 12345, 12345) == 0);
    expect_untrusted("belongs to user 12345, neither to root nor to user 0 who runs this; chown root it");
    REQUIRE(chown(path, 0, 0) == 0);
    REQUIRE(chown(dir, 12345, 12345) == 0);
    expect_untrusted("belongs to user 12345");
    REQUIRE(chown(dir, 0, 0) == 0);
}

static void of_two_with_one_name_the_first_is_used(void)
{
    clean();
    REQUIRE(put("good", "a") && put("twin", "b"));
    struct config *cfg = config_of(NULL);
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(registry_open(&reg, cfg, 0, &err) == 0);
    EXPECT_EQ(registry_at(reg, 0)->state, PLUGIN_READY);
    EXPECT_EQ(registry_at(reg, 1)->state, PLUGIN_REFUSED);
    EXPECT(strstr(registry_at(reg, 1)->reason, "/b.so: is called tool-probe like ") != NULL);
    EXPECT(strstr(registry_at(reg, 1)->reason, "/a.so, which is used; remove one") != NULL);
    registry_close(reg);
    config_close(cfg);
}

static void open_that_fails_is_a_refusal(void)
{
    clean();
    REQUIRE(put("open_fails", "x"));
    struct config *cfg = config_of(NULL);
    struct registry *reg = NULL;
    const struct plugin_info *p = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(registry_open(&reg, cfg, 0, &err) == 0);
    EXPECT_EQ(registry_at(reg, 0)->state, PLUGIN_READY);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_TOOL, "probe", &p, &err), -ENODEV);
    EXPECT(strstr(err.msg, "/x.so: open failed: device 7 is gone; plug it in again") != NULL);
    EXPECT_EQ(registry_at(reg, 0)->state, PLUGIN_REFUSED);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_TOOL, "probe", &p, &err), -ENOEXEC);
    registry_close(reg);
    config_close(cfg);
}

static void newer_minors_and_unknown_caps_are_accepted(void)
{
    clean();
    REQUIRE(put("newer_minor", "a") && put("caps", "b") && put("good", "c"));
    struct config *cfg = config_of("tool-probe.depth=5");
    struct registry *reg = NULL;
    const struct plugin_info *p = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(registry_open(&reg, cfg, 0, &err) == 0);
    EXPECT_EQ(registry_load_all(reg, 0), 3);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_TOOL, "tool-newer", &p, &err), 0);
    EXPECT_EQ(p->abi_minor, 7);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_TOOL, "tool-probe", &p, &err), 0);
    EXPECT_STR(p->detail, "log service found");
    EXPECT_STR(p->version, "1.0");
    EXPECT_EQ(*(int64_t *)p->ctx, 5);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_BACKEND, "tool-probe", &p, &err), -ENOENT);
    EXPECT_EQ(registry_find(reg, ARLE_KIND_TOOL, "other", &p, &err), -ENOENT);
    EXPECT(strstr(err.msg, "tool-newer, tool-caps, tool-probe") != NULL);
    registry_close(reg);
    config_close(cfg);
}

static void start_fails(const char *set, int code, const char *word)
{
    struct config *cfg = config_of(set);
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(registry_open(&reg, cfg, 0, &err), code);
    EXPECT(reg == NULL);
    if (strstr(err.msg, word) == NULL)
        TAP_FAIL("--set %s: \"%s\" does not say \"%s\"", set, err.msg, word);
    EXPECT_EQ(registry_open(&reg, cfg, REGISTRY_LENIENT, &err), 0);
    registry_close(reg);
    config_close(cfg);
}

static void what_the_configuration_requires_must_load(void)
{
    clean();
    REQUIRE(put("good", "good") && put("probe_crash", "tool-crash"));
    start_fails("tool-crash.required=yes", -ENOEXEC, "needs plugin tool-crash, which was refused: ");
    start_fails("tool-crash.required=yes", -ENOEXEC, "crashed in probe()");
    start_fails("tool-gone.required=yes", -ENOENT, "there is no plugin tool-gone");
    start_fails("tool-prob.depth=3", -ENOENT, "did you mean tool-probe?");
    start_fails("tool-probe.dept=3", -EINVAL, "did you mean \"depth\"?");
    start_fails("tool-probe.depth=10", -EINVAL, "1 to 9");
    clean();
    REQUIRE(put("good", "good"));
    const char *sets[] = { "", "model.m.path=/m", "model.m.backend=warp" };
    char set[128];
    struct config *cfg = NULL;
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    snprintf(set, sizeof set, "plugins.dir=%s", dir);
    sets[0] = set;
    REQUIRE(config_open(&cfg, NULL, sets, 3, &err) == 0);
    EXPECT_EQ(registry_open(&reg, cfg, 0, &err), -ENOENT);
    EXPECT(strstr(err.msg, "[model m] backend = warp") != NULL && strstr(err.msg, "backend-warp") != NULL);
    config_close(cfg);
}

static void all_are_judged_at_once_and_soon(void)
{
    clean();
    for (int i = 0; i < 40; i++) {
        char name[16];
        snprintf(name, sizeof name, "p%02d", i);
        REQUIRE(put("good", name));
    }
    struct config *cfg = config_of(NULL);
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int64_t t0 = clock_mono_us();
    REQUIRE(registry_open(&reg, cfg, 0, &err) == 0);
    double ms = (double)(clock_mono_us() - t0) / 1000;
    printf("# 40 plugins judged in %.1f ms\n", ms);
    EXPECT(ms < 2000);
    EXPECT_EQ(registry_count(reg), 40);
    EXPECT_EQ(registry_at(reg, 0)->state, PLUGIN_READY);
    registry_close(reg);
    config_close(cfg);
}

static int kit(const char *built, char *out, size_t cap)
{
    char path[256];
    struct config *cfg = config_of(NULL);
    clean();
    if (!put(built, built))
        return -1;
    snprintf(path, sizeof path, "%s/%s.so", dir, built);
    FILE *f = tmpfile();
    int failed = conform_file(path, cfg, NULL, f);
    rewind(f);
    size_t n = fread(out, 1, cap - 1, f);
    out[n] = '\0';
    fclose(f);
    config_close(cfg);
    return failed;
}

static void the_kit_passes_good_and_fails_bad_plugins(void)
{
    char out[8192];
    EXPECT_EQ(kit("good", out, sizeof out), 0);
    EXPECT(strstr(out, "declaration() is JSON") != NULL && strstr(out, "# tool-probe 1.0: ") != NULL);
    EXPECT(kit("probe_crash", out, sizeof out) > 0);
    EXPECT(strstr(out, "not ok 1 - ") != NULL && strstr(out, "crashed in probe()") != NULL);
    EXPECT(kit("open_fails", out, sizeof out) > 0);
    EXPECT(strstr(out, "device 7 is gone") != NULL);
}

int main(void)
{
    if (mkdtemp(dir) == NULL)
        return 1;
    chmod(dir, 0755);
    log_set_level(ARLE_LOG_ERROR);
    RUN(magic_is_refused);
    RUN(older_major_is_refused);
    RUN(newer_major_is_refused);
    RUN(short_struct_is_refused);
    RUN(long_struct_is_refused);
    RUN(needs_is_refused);
    RUN(kind_is_refused);
    RUN(no_name_is_refused);
    RUN(no_ops_is_refused);
    RUN(table_is_refused);
    RUN(no_descriptor_is_refused);
    RUN(function_is_refused);
    RUN(undefined_is_refused);
    RUN(library_is_refused);
    RUN(ctor_crash_is_refused);
    RUN(ctor_exit_is_refused);
    RUN(ctor_endless_is_refused);
    RUN(probe_crash_is_refused);
    RUN(probe_exit_is_refused);
    RUN(probe_endless_is_refused);
    RUN(probe_error_is_refused);
    RUN(unusable_is_refused);
    RUN(garbage_files_are_refused);
    RUN(wrong_modes_are_refused);
    RUN(wrong_owners_are_refused);
    RUN(of_two_with_one_name_the_first_is_used);
    RUN(open_that_fails_is_a_refusal);
    RUN(newer_minors_and_unknown_caps_are_accepted);
    RUN(what_the_configuration_requires_must_load);
    RUN(all_are_judged_at_once_and_soon);
    RUN(the_kit_passes_good_and_fails_bad_plugins);
    clean();
    rmdir(dir);
    return tap_done();
}
