/* Replies: headers that all have, errors in OpenAI's shape, and the request log line. */
#include <string.h>

#include "http/internal.h"
#include "util/clock.h"
#include "util/jfield.h"
#include "util/log.h"

/* What an errno means to a client. The first row that matches counts. */
static const struct {
    int code, status;
    const char *type, *name;
} errors[] = {
    { -EPROTO, 400, "invalid_request_error", "invalid_type" },
    { -ERANGE, 400, "invalid_request_error", "invalid_value" },
    { -EINVAL, 400, "invalid_request_error", "invalid_value" },
    { -ENODATA, 400, "invalid_request_error", "missing_required_parameter" },
    { -ENOKEY, 400, "invalid_request_error", "unknown_parameter" },
    { -ENOTSUP, 400, "invalid_request_error", "unsupported_value" },
    { -EBADMSG, 400, "invalid_request_error", "invalid_json" },
    { -EILSEQ, 400, "invalid_request_error", "invalid_utf8" },
    { -E2BIG, 400, "invalid_request_error", "context_length_exceeded" },
    { -EACCES, 401, "authentication_error", "invalid_api_key" },
    { -ENOENT, 404, "invalid_request_error", "model_not_found" },
    { -ENOSYS, 404, "invalid_request_error", "unknown_url" },
    { -EPERM, 405, "invalid_request_error", "method_not_allowed" },
    { -EMSGSIZE, 413, "invalid_request_error", "request_too_large" },
    { -EAGAIN, 429, "rate_limit_error", "queue_full" },
    { -ESHUTDOWN, 503, "server_error", "draining" },
    { -EIO, 503, "server_error", "device_dead" },
    { -ECANCELED, 503, "server_error", "cancelled" },
    { -ETIME, 504, "server_error", "deadline_exceeded" },
    { -ENOMEM, 500, "server_error", "out_of_memory" },
};

static size_t error_row(const struct arle_err *err)
{
    size_t n = sizeof errors / sizeof errors[0];
    for (size_t i = 0; i < n; i++)
        if (errors[i].code == err->code)
            return i;
    return n;
}

int error_status(const struct arle_err *err)
{
    size_t row = error_row(err);
    return row < sizeof errors / sizeof errors[0] ? errors[row].status : 500;
}

/* Reasons quote what clients sent, and are cut at their buffer's end: both may leave bytes that are not UTF-8. */
void reply_error_text(struct sbuf *out, const char *text)
{
    size_t len = text != NULL ? strlen(text) : 0, good;
    if (text == NULL) {
        sbuf_str(out, "null");
        return;
    }
    sbuf_char(out, '"');
    for (; (good = utf8_invalid_at(text, len)) < len; text += good + 1, len -= good + 1) {
        sbuf_json_chars(out, text, good);
        sbuf_str(out, "\xef\xbf\xbd");
    }
    sbuf_json_chars(out, text, len);
    sbuf_char(out, '"');
}

void error_json(struct sbuf *out, const struct arle_err *err)
{
    size_t row = error_row(err);
    bool known = row < sizeof errors / sizeof errors[0];
    sbuf_str(out, "{\"error\":{\"message\":");
    reply_error_text(out, err->msg);
    sbuf_str(out, ",\"type\":");
    sbuf_json_cstr(out, known ? errors[row].type : "server_error");
    sbuf_str(out, ",\"param\":");
    reply_error_text(out, err->param[0] ? err->param : err->code == -ENOENT ? "model" : NULL);
    sbuf_str(out, ",\"code\":");
    sbuf_json_cstr(out, known ? errors[row].name : "internal_error");
    sbuf_str(out, "}}");
}

/* Origin headers are answered only when the configuration lists them. */
static const char *allowed_origin(const struct conn *cn)
{
    const char *origin = MHD_lookup_connection_value(cn->c, MHD_HEADER_KIND, "Origin");
    const char *list = cn->set->cors;
    if (origin == NULL || *origin == '\0')
        return NULL;
    for (size_t len; *list != '\0'; list += len + (list[len] == ' ')) {
        len = strcspn(list, " ");
        if (len == 1 && *list == '*')
            return "*";
        if (len == strlen(origin) && strncmp(list, origin, len) == 0)
            return origin;
    }
    return NULL;
}

void reply_headers(struct conn *cn, struct MHD_Response *resp)
{
    MHD_add_response_header(resp, "X-Request-Id", cn->id);
    const char *origin = allowed_origin(cn);
    if (origin == NULL)
        return;
    MHD_add_response_header(resp, "Access-Control-Allow-Origin", origin);
    MHD_add_response_header(resp, "Vary", "Origin");
    if (strcmp(cn->method, "OPTIONS") == 0) {
        MHD_add_response_header(resp, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
        MHD_add_response_header(resp, "Access-Control-Allow-Headers", "authorization, content-type, x-api-key");
        MHD_add_response_header(resp, "Access-Control-Max-Age", "600");
    }
}

/* The methods of a path that knows others than the one that was asked for. */
static void add_allow(const struct conn *cn, struct MHD_Response *resp)
{
    char allow[64] = "";
    for (const struct route *r = http_routes; r->path != NULL; r++) {
        size_t n = strlen(allow);
        if (route_matches(r, cn->url))
            snprintf(allow + n, sizeof allow - n, "%s%s", n ? ", " : "", strcmp(r->method, "GET") == 0 ? "GET, HEAD" : r->method);
    }
    MHD_add_response_header(resp, "Allow", allow);
}

static enum MHD_Result queue(struct conn *cn, int status, const char *type, struct sbuf *text, int retry_after_s)
{
    struct MHD_Response *resp = text->failed ? NULL
        : MHD_create_response_from_buffer(text->n, (void *)(uintptr_t)sbuf_text(text), MHD_RESPMEM_MUST_COPY);
    sbuf_fini(text);
    if (resp == NULL)
        return MHD_NO;
    char number[16];
    MHD_add_response_header(resp, "Content-Type", type);
    reply_headers(cn, resp);
    if (retry_after_s > 0) {
        snprintf(number, sizeof number, "%d", retry_after_s);
        MHD_add_response_header(resp, "Retry-After", number);
    }
    if (status == 405)
        add_allow(cn, resp);
    if (status == 401)
        MHD_add_response_header(resp, "WWW-Authenticate", "Bearer");
    cn->status = status;
    enum MHD_Result r = MHD_queue_response(cn->c, (unsigned)status, resp);
    MHD_destroy_response(resp);
    return r;
}

enum MHD_Result reply_json(struct conn *cn, int status, struct sbuf *json)
{
    return queue(cn, status, "application/json", json, 0);
}

enum MHD_Result reply_text(struct conn *cn, int status, const char *type, struct sbuf *text)
{
    return queue(cn, status, type, text, 0);
}

enum MHD_Result reply_error(struct conn *cn, const struct arle_err *err, int retry_after_s)
{
    struct sbuf out = SBUF_INIT;
    if (cn->route != NULL && cn->route->messages)
        messages_error(&out, err);
    else
        error_json(&out, err);
    return queue(cn, error_status(err), "application/json", &out, retry_after_s);
}

static int status_slot(int status)
{
    static const int slots[N_STATUS - 1] = { 200, 400, 401, 404, 413, 429, 503 };
    for (int i = 0; i < N_STATUS - 1; i++)
        if (slots[i] == status)
            return i;
    return N_STATUS - 1;
}

void conn_done(struct conn *cn)
{
    if (cn->log_done)
        return;
    cn->log_done = true;
    size_t n = 0;
    while (http_routes[n].path != NULL)
        n++;
    size_t row = cn->route != NULL ? (size_t)(cn->route - http_routes) : n;
    atomic_fetch_add(&cn->srv->status_counts[row * N_STATUS + (size_t)status_slot(cn->status)], 1);
    if (cn->gen == NULL && cn->set->log_requests && (cn->route == NULL || !cn->route->open))
        log_write(cn->status >= 500 ? ARLE_LOG_WARN : ARLE_LOG_DEBUG, "http", "request", "req=%s method=%s path=%.80s status=%d ms=%.1f",
                  cn->id, cn->method, cn->url, cn->status, (double)(clock_mono_us() - cn->start_us) / 1000);
}
