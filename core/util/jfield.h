/*
 * Typed reading of JSON that came from outside: a whole text with limits, and members of an object with the member's path in
 * every refusal. The errno says what kind of refusal it is:
 *   -EBADMSG not JSON, -EILSEQ not UTF-8, -EPROTO wrong type, -ERANGE out of range, -ENODATA missing, -EINVAL otherwise bad,
 *   -ENOTSUP well-formed but not supported.
 */
#ifndef ARLE_UTIL_JFIELD_H
#define ARLE_UTIL_JFIELD_H

#include <arle/err.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct json_object;

#define JSON_TEXT_DEPTH 64      /* arrays and objects within each other */

/** Parses exactly one JSON value. *out is the caller's (json_object_put). A lone null is refused. */
int json_text_parse(const char *text, size_t len, struct json_object **out, struct arle_err *err);

/** Parses one JSON object. `what` names it in refusals. */
int json_text_parse_object(const char *text, size_t len, const char *what, struct json_object **out, struct arle_err *err);

/** Offset of the first byte that is not UTF-8 (surrogates, overlong forms and > U+10FFFF included), or len. */
size_t utf8_invalid_at(const char *text, size_t len);

/** "a string", "an object" ... for messages. NULL is null. */
const char *json_kind(struct json_object *v);

/* Members. `at` is the path of the object with its dot ("" at the top, "messages[3]."). Absent and null are the same.
 * All return 1 and set the output, 0 and leave it when absent, or a negative errno. Strings are borrowed from the object.
 * jfield_str without out_len refuses strings with a NUL: -EINVAL. */
int jfield_get(struct json_object *obj, const char *key, struct json_object **out);
int jfield_bool(struct json_object *obj, const char *at, const char *key, bool *out, struct arle_err *err);
int jfield_i64(struct json_object *obj, const char *at, const char *key, int64_t min, int64_t max, int64_t *out,
               struct arle_err *err);
int jfield_f64(struct json_object *obj, const char *at, const char *key, double min, double max, double *out,
               struct arle_err *err);
int jfield_str(struct json_object *obj, const char *at, const char *key, const char **out, size_t *out_len,
               struct arle_err *err);
int jfield_array(struct json_object *obj, const char *at, const char *key, struct json_object **out, struct arle_err *err);
int jfield_object(struct json_object *obj, const char *at, const char *key, struct json_object **out, struct arle_err *err);

/** "path.key must be KIND, not ...", -EPROTO. */
int jfield_wrong_type(const char *at, const char *key, const char *wanted, struct json_object *got, struct arle_err *err);

#endif
