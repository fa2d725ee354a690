/* Log lines: form, levels, and that repeats are counted instead of written. */
#include "util/log.h"
#include "tap.h"

static char lines[8192];
static int n_lines;
static int64_t t_ms = 1763844067000;

static int64_t fake_now(void)
{
    return t_ms;
}

static void collect(void *arg, const char *line, size_t len)
{
    size_t have = strlen(lines);
    if (have + len < sizeof lines)
        memcpy(lines + have, line, len + 1);
    n_lines++;
}

static void start(void)
{
    lines[0] = '\0';
    n_lines = 0;
    log_set_level(ARLE_LOG_INFO);
    log_redirect(collect, NULL, fake_now);
}

static void a_line_has_time_level_subsystem_event_fields(void)
{
    start();
    log_info("kv", "evicted", "pages=%d tier=device->host", 412);
    EXPECT_STR(lines, "2025-11-22T20:41:07Z info kv evicted pages=412 tier=device->host\n");
}

static void lower_levels_are_left_out(void)
{
    start();
    log_debug("kv", "hidden", "%s", "");
    EXPECT_EQ(n_lines, 0);
    log_set_level(ARLE_LOG_DEBUG);
    log_debug("kv", "shown", "%s", "");
    EXPECT_EQ(n_lines, 1);
    enum arle_log_level level = ARLE_LOG_INFO;
    EXPECT_EQ(log_level_parse("warn", &level), 0);
    EXPECT_EQ(level, ARLE_LOG_WARN);
    EXPECT_EQ(log_level_parse("warning", &level), -EINVAL);
}

static void fields_cannot_forge_lines(void)
{
    start();
    log_info("http", "done", "path=%s", "/x\n2025-11-22T20:41:07Z error kv lost");
    EXPECT_EQ(n_lines, 1);
    EXPECT(strchr(lines, '\n') == lines + strlen(lines) - 1);
}

static void warnings_beyond_the_burst_are_counted(void)
{
    start();
    for (int i = 0; i < 317; i++)
        log_warn("http", "slow", "req=%d", i);
    EXPECT_EQ(n_lines, LOG_BURST);
    t_ms += LOG_WINDOW_MS;
    log_info("kv", "evicted", "pages=1");
    EXPECT_EQ(n_lines, LOG_BURST + 2);
    EXPECT(strstr(lines, "warn http slow ... 312 more in 10 s\n") != NULL);
}

static void equal_info_lines_are_counted_and_others_are_not(void)
{
    start();
    for (int i = 0; i < 10; i++)
        log_info("kv", "same", "pages=1");
    for (int i = 0; i < 10; i++)
        log_info("kv", "other", "pages=%d", i);
    EXPECT_EQ(n_lines, 11);
    log_flush();
    EXPECT_EQ(n_lines, 12);
    EXPECT(strstr(lines, "info kv same ... 9 more in 1 s\n") != NULL);
}

int main(void)
{
    RUN(a_line_has_time_level_subsystem_event_fields);
    RUN(lower_levels_are_left_out);
    RUN(fields_cannot_forge_lines);
    RUN(warnings_beyond_the_burst_are_counted);
    RUN(equal_info_lines_are_counted_and_others_are_not);
    return tap_done();
}
