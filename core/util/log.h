/*
 * Log lines for the person on call:
 *   2026-11-22T20:41:07Z info kv evicted pages=412 tier=device->host bytes=27.0MB req=8f3a
 * One event is one line: level, subsystem, event, then key=value fields with units. Prompts and keys never appear.
 * Under journald (JOURNAL_STREAM names our stderr) the time stamp gives way to a priority prefix.
 * Any thread; lines never mix. Not for the decode hot path.
 */
#ifndef CORE_UTIL_LOG_H
#define CORE_UTIL_LOG_H

#include <arle/host.h>
#include <stdbool.h>
#include <stdint.h>

/** Starts at info on stderr without a call to this. May be called again (reload). */
void log_set_level(enum arle_log_level level);
/** error, warn, info, debug; -EINVAL for other words (out_level is untouched). */
int log_level_parse(const char *word, enum arle_log_level *out_level);
bool log_enabled(enum arle_log_level level);

/**
 * Writes one line: fmt makes the fields ("" for none). Control characters become '?', so that a field cannot forge a line.
 * Repeats are counted: warnings and errors of one subsystem and event beyond LOG_BURST in LOG_WINDOW_MS, and other lines
 * that are identical to an earlier one of the window, are held back and reported as "... N more in 10 s".
 */
void log_write(enum arle_log_level level, const char *subsystem, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
#define LOG_BURST 5
#define LOG_WINDOW_MS 10000

#define log_error(subsystem, event, ...) log_write(ARLE_LOG_ERROR, subsystem, event, __VA_ARGS__)
#define log_warn(subsystem, event, ...) log_write(ARLE_LOG_WARN, subsystem, event, __VA_ARGS__)
#define log_info(subsystem, event, ...) log_write(ARLE_LOG_INFO, subsystem, event, __VA_ARGS__)
#define log_debug(subsystem, event, ...) log_write(ARLE_LOG_DEBUG, subsystem, event, __VA_ARGS__)

/** Reports what is still held back. Before exit, and from any idle loop. */
void log_flush(void);

/* For tests: where lines go (NULL: stderr) and the clock in milliseconds since the epoch (NULL: the real one). */
typedef void (*log_sink_fn)(void *arg, const char *line, size_t len);
void log_redirect(log_sink_fn sink, void *arg, int64_t (*now_ms)(void));

#endif
