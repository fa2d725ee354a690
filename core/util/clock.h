/* The two clocks: wall time for people, monotonic time for everything that is measured. */
#ifndef CORE_UTIL_CLOCK_H
#define CORE_UTIL_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t clock_wall_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/** Wall time as people and JSON write it: 2026-01-31T23:59:59Z. */
#define CLOCK_STAMP_BYTES 32
static inline const char *clock_stamp(char out[CLOCK_STAMP_BYTES], int64_t wall_s)
{
    time_t sec = (time_t)wall_s;
    struct tm tm;
    gmtime_r(&sec, &tm);
    strftime(out, CLOCK_STAMP_BYTES, "%Y-%m-%dT%H:%M:%SZ", &tm);
    return out;
}

static inline int64_t clock_mono_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static inline int64_t clock_mono_ms(void)
{
    return clock_mono_us() / 1000;
}

#endif
