/*
 * A small TAP producer for C tests. RUN(fn) runs one case; EXPECT_* record failures and go on; SKIP(why) and
 * BAIL_IF end the case. One process, one thread reports; no allocation, no longjmp (a live device context stays sane).
 */
#ifndef ARLE_TESTS_TAP_H
#define ARLE_TESTS_TAP_H

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tap_n, tap_failed, tap_case_failed;
static const char *tap_skip;

#define RUN(fn) tap_run(#fn, (fn))
static inline void tap_run(const char *name, void (*fn)(void))
{
    tap_case_failed = 0;
    tap_skip = NULL;
    fn();
    tap_n++;
    if (tap_skip != NULL && !tap_case_failed)
        printf("ok %d - %s # SKIP %s\n", tap_n, name, tap_skip);
    else
        printf("%sok %d - %s\n", tap_case_failed ? "not " : "", tap_n, name);
    tap_failed += tap_case_failed != 0;
    fflush(stdout);
}

static inline int tap_done(void)
{
    printf("1..%d\n", tap_n);
    fflush(stdout);         /* a leak found at exit ends the process before it flushes: the report should keep its plan */
    return tap_failed ? 1 : 0;
}

#define TAP_FAIL(...) (tap_case_failed = 1, printf("# %s:%d: ", __FILE__, __LINE__), printf(__VA_ARGS__), printf("\n"))
#define EXPECT(cond) do { if (!(cond)) TAP_FAIL("expected %s", #cond); } while (0)
#define EXPECT_EQ(a, b) do { long long tap_a = (long long)(a), tap_b = (long long)(b); \
    if (tap_a != tap_b) TAP_FAIL("%s is %lld, expected %s = %lld", #a, tap_a, #b, tap_b); } while (0)
#define EXPECT_STR(a, b) do { const char *tap_a = (a), *tap_b = (b); \
    if (tap_a == NULL || tap_b == NULL || strcmp(tap_a, tap_b) != 0) \
        TAP_FAIL("%s is \"%s\", expected \"%s\"", #a, tap_a ? tap_a : "(null)", tap_b ? tap_b : "(null)"); } while (0)
#define EXPECT_NEAR(a, b, tol) do { double tap_a = (a), tap_b = (b); \
    if (!(fabs(tap_a - tap_b) <= (tol))) TAP_FAIL("%s is %.9g, expected %.9g +- %g", #a, tap_a, tap_b, (double)(tol)); } while (0)
/* Leaves the case at once; for a failed precondition without which the rest would crash. */
#define REQUIRE(cond) do { if (!(cond)) { TAP_FAIL("required %s", #cond); return; } } while (0)
#define SKIP(why) do { tap_skip = (why); return; } while (0)

#endif
