/* Command lines from tables. */
#include "util/options.h"
#include "tap.h"

#include <fcntl.h>
#include <unistd.h>

static const struct option_row rows[] = {
    { "model", 'm', "DIR", "Model." }, { "json", 0, NULL, "JSON." }, { "count", 'n', "N", "Count." }, { NULL, 0, NULL, NULL },
};
static const struct command cmd = { .name = "test", .args = "[FILE]", .max_args = 1, .summary = "Tests.", .help = "", .options = rows };

static enum args_outcome parse(struct args *a, int argc, const char **argv)
{
    /* Messages of refusals are not what these tests look at. */
    int keep = dup(STDERR_FILENO), null = open("/dev/null", O_WRONLY);
    dup2(null, STDERR_FILENO);
    enum args_outcome o = args_parse(a, "arle", &cmd, argc, (char **)(uintptr_t)argv);
    dup2(keep, STDERR_FILENO);
    close(keep);
    close(null);
    return o;
}
#define PARSE(a, ...) parse(a, (int)(sizeof((const char *[]){ "x", __VA_ARGS__ }) / sizeof(char *)), (const char *[]){ "x", __VA_ARGS__ })

static void values_come_in_all_forms(void)
{
    struct args a;
    EXPECT_EQ(PARSE(&a, "--model=/a", "--json", "file", "-n5", "-c", "f.ini"), ARGS_RUN);
    EXPECT_STR(args_str(&a, "model"), "/a");
    EXPECT_STR(args_str(&a, "count"), "5");
    EXPECT_STR(args_str(&a, "config"), "f.ini");
    EXPECT(args_flag(&a, "json"));
    EXPECT_EQ(a.n_rest, 1);
    long long n = 0;
    EXPECT(args_int(&a, "count", 1, 9, 3, &n));
    EXPECT_EQ(n, 5);
    args_fini(&a);
    EXPECT_EQ(PARSE(&a, "--", "--json"), ARGS_RUN);
    EXPECT(!args_flag(&a, "json"));
    EXPECT_STR(a.rest[0], "--json");
    EXPECT(args_int(&a, "count", 1, 9, 3, &n));
    EXPECT_EQ(n, 3);
    args_fini(&a);
}

static void sets_keep_their_order(void)
{
    struct args a;
    EXPECT_EQ(PARSE(&a, "--set", "a.b=1", "--plugin-dir", "/p", "--set=a.b=2"), ARGS_RUN);
    args_preset(&a, "model.%s.path=%s", "m", "/x");
    EXPECT_EQ(a.n_sets, 4);
    EXPECT_STR(a.sets[0], "model.m.path=/x");
    EXPECT_STR(a.sets[1], "a.b=1");
    EXPECT_STR(a.sets[2], "plugins.dir=/p");
    EXPECT_STR(a.sets[3], "a.b=2");
    args_fini(&a);
}

static void wrong_lines_are_usage_errors(void)
{
    struct args a;
    EXPECT_EQ(PARSE(&a, "--modle", "/a"), ARGS_USAGE);
    args_fini(&a);
    EXPECT_EQ(PARSE(&a, "--model"), ARGS_USAGE);
    args_fini(&a);
    EXPECT_EQ(PARSE(&a, "--json=yes"), ARGS_USAGE);
    args_fini(&a);
    EXPECT_EQ(PARSE(&a, "one", "two"), ARGS_USAGE);
    args_fini(&a);
    EXPECT_EQ(PARSE(&a, "-x"), ARGS_USAGE);
    args_fini(&a);
    static const char *const numbers[] = { "0", "10", "3x", "", "99999999999999999999" };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        long long n;
        EXPECT_EQ(PARSE(&a, "--count", numbers[i]), ARGS_RUN);
        int keep = dup(STDERR_FILENO), null = open("/dev/null", O_WRONLY);
        dup2(null, STDERR_FILENO);
        EXPECT(!args_int(&a, "count", 1, 9, 3, &n));
        dup2(keep, STDERR_FILENO);
        close(keep);
        close(null);
        args_fini(&a);
    }
}

int main(void)
{
    RUN(values_come_in_all_forms);
    RUN(sets_keep_their_order);
    RUN(wrong_lines_are_usage_errors);
    return tap_done();
}
