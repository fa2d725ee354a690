/*
 * The output automaton of automaton.h. Unread text waits in `buf`; step() consumes from its front until it would have to
 * guess, and returns false. At the end of output step() runs once more with `eof` set and guesses: a tag that was cut off
 * before it could be recognised is text, a recognised call that was cut off is a truncated call.
 */
#include "chat/automaton.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "chat/coerce.h"
#include "util/sbuf.h"

#define MAX_GAP 64u         /* whitespace looked through between section_open and call_open */
#define MAX_WORD 256u       /* bytes of a tool's or parameter's name */
#define MAX_KEYS 256u       /* remembered parameter names of one call */

enum state { START, REASON_START, REASON, AFTER_REASON, CONTENT, IN_CALL, IN_VALUE, AFTER_CALL };
enum match { NO, MAYBE, YES };

/* A recognised call or parameter head: all bytes up to its value, and where the word in it lies. */
struct head {
    size_t len, word_at, word_len;
    bool opened;            /* section_open was seen whole: a cut head is a truncated call, not text */
    bool raw;               /* typed syntax: value is raw text */
};

struct automaton {
    struct automaton_opts o;
    struct arle_output_syntax syn;
    enum state state;
    struct sbuf buf;
    size_t at;              /* consumed part of buf */
    size_t dropped;         /* bytes of the output before buf */
    struct sbuf ws;         /* whitespace after the last text event, not emitted yet */
    bool skip_ws;           /* whitespace before the next text is dropped: the text follows a call */
    bool any_text;          /* a text event of the current kind was emitted or is held */
    char last;              /* last byte of content, for "at line start" */
    unsigned newlines;      /* newlines skipped after reasoning */
    bool truncated, oom;

    int64_t reasoning_end;

    uint32_t n_calls, n_done;
    struct call_span *spans; uint32_t cap_spans;        /* [n_calls] */
    char *name, *key;
    char **keys;            /* [n_keys] parameter names of the open call */
    uint32_t n_keys;
    struct coerce_plan plan;
    bool first_param, drop_value, raw_value, json_value, value_begun, string_open;
    struct sbuf val, json;
};

/* ---- matching ---- */

static bool blank(const char *tag)
{
    return tag == NULL || *tag == '\0';
}

static enum match tag_at(const char *p, size_t n, const char *tag)
{
    if (blank(tag))
        return NO;
    size_t len = strlen(tag), k = n < len ? n : len;
    if (memcmp(p, tag, k) != 0)
        return NO;
    return n >= len ? YES : MAYBE;
}

/* A name up to `end`; names have no control characters, quotes or '<', which keeps prose from looking like a head. */
static enum match word_at(const char *p, size_t n, const char *end, size_t *out_len)
{
    for (size_t i = 0; i < n && i <= MAX_WORD; i++) {
        enum match m = tag_at(p + i, n - i, end);
        if (m == YES) {
            *out_len = i;
            return i > 0 ? YES : NO;
        }
        if (m == MAYBE)
            return MAYBE;
        if ((unsigned char)p[i] < 0x20 || p[i] == '<' || p[i] == '"')
            return NO;
    }
    return n <= MAX_WORD ? MAYBE : NO;
}

/* [section_open gap] call_open NAME name_end at p. */
static enum match call_head(const struct automaton *a, const char *p, size_t n, bool section, struct head *h)
{
    size_t i = 0;
    *h = (struct head){ 0 };
    if (section && !blank(a->syn.section_open)) {
        enum match m = tag_at(p, n, a->syn.section_open);
        if (m != YES)
            return m;
        h->opened = true;
        i = strlen(a->syn.section_open);
        size_t gap = i;
        while (i < n && automaton_is_ws(p[i]))
            i++;
        if (i - gap > MAX_GAP)
            return NO;
    }
    enum match m = tag_at(p + i, n - i, a->syn.call_open);
    if (m != YES)
        return m;
    h->opened = true;
    h->word_at = i + strlen(a->syn.call_open);
    m = word_at(p + h->word_at, n - h->word_at, a->syn.name_end, &h->word_len);
    if (m == YES)
        h->len = h->word_at + h->word_len + strlen(a->syn.name_end);
    return m;
}

/* param_open KEY key_end, or param_open KEY typed_open true|false typed_end. */
static enum match param_head(const struct automaton *a, const char *p, size_t n, struct head *h)
{
    *h = (struct head){ 0 };
    enum match m = tag_at(p, n, a->syn.param_open);
    if (m != YES)
        return m;
    bool typed = !blank(a->syn.typed_open);
    const char *end = typed ? a->syn.typed_open : a->syn.key_end;
    h->word_at = strlen(a->syn.param_open);
    m = word_at(p + h->word_at, n - h->word_at, end, &h->word_len);
    if (m != YES)
        return m;
    h->len = h->word_at + h->word_len + strlen(end);
    if (!typed)
        return YES;
    size_t type_len;
    m = word_at(p + h->len, n - h->len, a->syn.typed_end, &type_len);
    if (m != YES)
        return m;
    h->raw = type_len == 4 && memcmp(p + h->len, "true", 4) == 0;
    h->len += type_len + strlen(a->syn.typed_end);
    return YES;
}

static enum match best(enum match x, enum match y)
{
    return x > y ? x : y;
}

/* ---- events ---- */

static void emit(struct automaton *a, enum chat_event_kind kind, const char *text, size_t len)
{
    if (len == 0 && (kind == CHAT_REASONING || kind == CHAT_CONTENT || kind == CHAT_CALL_ARGS))
        return;
    struct chat_event ev = { .kind = kind, .text = text, .len = len };
    ev.call = a->n_calls > 0 ? a->n_calls - 1 : 0;
    a->o.fn(a->o.arg, &ev);
}

static enum chat_event_kind text_kind(const struct automaton *a)
{
    return a->state == REASON ? CHAT_REASONING : CHAT_CONTENT;
}

/* Text of the current kind. Whitespace at its end stays in `ws` until more text or the end decides about it. */
static void emit_text(struct automaton *a, const char *p, size_t n)
{
    if (n == 0)
        return;
    a->last = p[n - 1];
    size_t solid = n;
    while (solid > 0 && automaton_is_ws(p[solid - 1]))
        solid--;
    if (solid > 0 && a->ws.n > 0) {
        sbuf_add(&a->ws, p, solid);
        emit(a, text_kind(a), a->ws.p, a->ws.n);
        sbuf_reset(&a->ws);
    } else if (solid > 0) {
        size_t from = 0;
        while (a->skip_ws && automaton_is_ws(p[from]))
            from++;
        emit(a, text_kind(a), p + from, solid - from);
    }
    if (solid > 0)
        a->skip_ws = false;
    if (!a->skip_ws)
        sbuf_add(&a->ws, p + solid, n - solid);
}

static void flush_ws(struct automaton *a)
{
    emit(a, text_kind(a), a->ws.p, a->ws.n);
    sbuf_reset(&a->ws);
}

static void emit_args(struct automaton *a)
{
    if (a->json.failed)
        a->oom = true;
    emit(a, CHAT_CALL_ARGS, a->json.p, a->json.n);
    sbuf_reset(&a->json);
}

/* ---- reasoning ---- */

static void leave_reasoning(struct automaton *a, enum state next)
{
    while (a->ws.n > 0 && a->ws.p[a->ws.n - 1] == '\n')
        a->ws.n--;
    flush_ws(a);
    a->state = next;
    a->newlines = 0;
    a->last = '\n';
    a->reasoning_end = (int64_t)(a->dropped + a->at);
}

/* Output may repeat the opening tag, or bring it when the prompt did not. */
static bool step_start(struct automaton *a, const char *p, size_t n, bool eof)
{
    size_t gap = 0;
    while (gap < n && gap < MAX_GAP && automaton_is_ws(p[gap]))
        gap++;
    enum match m = gap < n ? tag_at(p + gap, n - gap, a->syn.reason_open) : blank(a->syn.reason_open) ? NO : MAYBE;
    if (m == MAYBE && !eof)
        return false;
    bool reasoning = a->state == REASON_START || m == YES;
    if (m == YES)
        a->at += gap + strlen(a->syn.reason_open);
    a->state = reasoning ? REASON : CONTENT;
    a->any_text = false;
    return true;
}

static bool step_reason(struct automaton *a, const char *p, size_t n, bool eof)
{
    size_t i = 0;
    struct head h;
    if (!a->any_text) {
        while (i < n && p[i] == '\n')
            i++;
        a->at += i;
        p += i;
        n -= i;
        a->any_text = n > 0;
    }
    for (i = 0; i < n; i++) {
        enum match close = tag_at(p + i, n - i, a->syn.reason_close);
        enum match call = a->syn.calls_in_reasoning && a->o.parse_calls ? call_head(a, p + i, n - i, true, &h) : NO;
        if (close == NO && call == NO)
            continue;
        if (close != YES && call != YES && eof)
            continue;
        emit_text(a, p, i);
        a->at += i;
        if (close == YES) {
            a->at += strlen(a->syn.reason_close);
            leave_reasoning(a, AFTER_REASON);
            return true;
        }
        if (call == YES)
            leave_reasoning(a, CONTENT);
        return call == YES;
    }
    emit_text(a, p, n);
    a->at += n;
    return false;
}

static bool step_after_reason(struct automaton *a, const char *p, size_t n)
{
    for (; n > 0 && a->newlines < 2 && *p == '\n'; p++, n--) {
        a->newlines++;
        a->at++;
        a->reasoning_end++;
    }
    if (n == 0 && a->newlines < 2)
        return false;
    a->state = CONTENT;
    return true;
}

/* ---- calls ---- */

static void forget_keys(struct automaton *a)
{
    for (uint32_t i = 0; i < a->n_keys; i++)
        free(a->keys[i]);
    a->n_keys = 0;
}

static bool add_span(struct automaton *a, bool opens)
{
    if (a->n_calls == a->cap_spans) {
        uint32_t cap = a->cap_spans ? 2 * a->cap_spans : 4;
        struct call_span *p = realloc(a->spans, cap * sizeof *p);
        if (p == NULL)
            return false;
        a->spans = p;
        a->cap_spans = cap;
    }
    a->spans[a->n_calls] = (struct call_span){ .from = a->dropped + a->at, .opens = opens };
    return true;
}

static void begin_call(struct automaton *a, const char *p, const struct head *h, bool opens)
{
    if (!add_span(a, opens)) {
        a->oom = true;
        return;
    }
    sbuf_reset(&a->ws);
    a->at += h->len;
    free(a->name);
    a->name = strndup(p + h->word_at, h->word_len);
    a->oom |= a->name == NULL;
    forget_keys(a);
    a->n_calls++;
    a->first_param = true;
    a->state = IN_CALL;
    emit(a, CHAT_CALL_START, p + h->word_at, h->word_len);
    emit(a, CHAT_CALL_ARGS, "{", 1);
}

static void end_call(struct automaton *a, bool complete)
{
    emit(a, CHAT_CALL_ARGS, "}", 1);
    emit(a, CHAT_CALL_END, "", 0);
    a->spans[a->n_calls - 1].to = a->dropped + a->at;
    a->spans[a->n_calls - 1].complete = complete;
    a->n_done += complete;
    a->truncated |= !complete;
    a->state = AFTER_CALL;
}

static void enter_content(struct automaton *a)
{
    a->state = CONTENT;
    a->skip_ws = true;
    a->last = '\n';
    if (!a->syn.many_sections && !blank(a->syn.section_open))
        a->o.parse_calls = false;
}

/* A model that repeats a parameter would make an object with a key twice; the first one counts. */
static bool key_is_new(struct automaton *a)
{
    for (uint32_t i = 0; i < a->n_keys; i++)
        if (strcmp(a->keys[i], a->key) == 0)
            return false;
    if (a->n_keys < MAX_KEYS && (a->keys[a->n_keys] = strdup(a->key)) != NULL)
        a->n_keys++;
    return true;
}

static void begin_value(struct automaton *a, const char *p, const struct head *h)
{
    a->at += h->len;
    free(a->key);
    a->key = strndup(p + h->word_at, h->word_len);
    if (a->key == NULL || a->name == NULL) {
        a->oom = true;
        return;
    }
    bool typed = !blank(a->syn.typed_open);
    a->raw_value = typed && h->raw;
    a->json_value = typed && !h->raw;
    a->plan = coerce_plan_for(a->o.tools, a->name, a->key);
    a->drop_value = !key_is_new(a);
    a->value_begun = !a->syn.value_newlines;
    a->string_open = false;
    sbuf_reset(&a->val);
    a->state = IN_VALUE;
    if (a->drop_value)
        return;
    if (!a->first_param)
        sbuf_str(&a->json, ", ");
    a->first_param = false;
    sbuf_json_str(&a->json, a->key, h->word_len);
    sbuf_str(&a->json, ": ");
    emit_args(a);
}

static bool streams(const struct automaton *a)
{
    return a->raw_value || (!a->json_value && coerce_is_string(&a->plan));
}

/* The text so far may still turn out to be the word null, which is not a string. */
static bool may_be_null(const struct automaton *a)
{
    return !a->raw_value && a->val.n <= 5 && strncasecmp(sbuf_text(&a->val), "null\n", a->val.n) == 0;
}

static void value_text(struct automaton *a, const char *p, size_t n)
{
    if (n > 0 && !a->value_begun) {
        a->value_begun = true;
        if (*p == '\n')
            p++, n--;
    }
    if (n == 0 || a->drop_value)
        return;
    sbuf_add(&a->val, p, n);
    if (!streams(a) || (!a->string_open && may_be_null(a)))
        return;
    if (!a->string_open)
        sbuf_char(&a->json, '"');
    a->string_open = true;
    size_t keep = a->syn.value_newlines && a->val.n > 0 && a->val.p[a->val.n - 1] == '\n';
    sbuf_json_chars(&a->json, sbuf_text(&a->val), a->val.n - keep);
    sbuf_drop(&a->val, a->val.n - keep);
    emit_args(a);
}

static void end_value(struct automaton *a)
{
    a->state = IN_CALL;
    if (a->drop_value)
        return;
    size_t n = a->val.n;
    const char *p = sbuf_text(&a->val);
    if (a->syn.value_newlines && n > 0 && p[n - 1] == '\n')
        n--;
    if (a->string_open) {
        sbuf_json_chars(&a->json, p, n);
        sbuf_char(&a->json, '"');
    } else if (a->raw_value) {
        sbuf_json_str(&a->json, p, n);
    } else if (a->json_value) {
        if (!coerce_literal(p, n, &a->json))
            sbuf_json_str(&a->json, p, n);
    } else {
        coerce_value(&a->plan, p, n, &a->json);
    }
    emit_args(a);
}

static bool step_value(struct automaton *a, const char *p, size_t n, bool eof)
{
    for (size_t i = 0; i < n; i++) {
        enum match m = tag_at(p + i, n - i, a->syn.param_close);
        size_t eat = m == YES ? strlen(a->syn.param_close) : 0;
        m = best(m, best(tag_at(p + i, n - i, a->syn.param_open), tag_at(p + i, n - i, a->syn.call_close)));
        if (m == NO || (m == MAYBE && eof))
            continue;
        value_text(a, p, i);
        a->at += i;
        if (m == MAYBE)
            return false;
        a->at += eat;
        end_value(a);
        return true;
    }
    value_text(a, p, n);
    a->at += n;
    if (eof) {
        end_value(a);
        end_call(a, false);
    }
    return false;
}

/* Between parameters: whitespace and anything unexpected is skipped up to the next tag. */
static bool step_call(struct automaton *a, const char *p, size_t n, bool eof)
{
    struct head h;
    for (size_t i = 0; i < n; i++) {
        enum match param = param_head(a, p + i, n - i, &h);
        enum match close = tag_at(p + i, n - i, a->syn.call_close);
        enum match next = best(tag_at(p + i, n - i, a->syn.section_close),
                               best(tag_at(p + i, n - i, a->syn.section_open), tag_at(p + i, n - i, a->syn.call_open)));
        enum match m = best(param, best(close, next));
        if (m == NO || (m == MAYBE && eof))
            continue;
        a->at += i;
        if (m == MAYBE)
            return false;
        if (param == YES) {
            begin_value(a, p + i, &h);
        } else {
            a->at += close == YES ? strlen(a->syn.call_close) : 0;
            end_call(a, true);
        }
        return true;
    }
    a->at += n;
    if (eof)
        end_call(a, false);
    return false;
}

static bool step_after_call(struct automaton *a, const char *p, size_t n, bool eof)
{
    struct head h, bare;
    while (n > 0 && automaton_is_ws(*p))
        p++, n--, a->at++;
    if (n == 0)
        return false;
    enum match close = tag_at(p, n, a->syn.section_close);
    enum match here = call_head(a, p, n, false, &bare);
    enum match next = a->syn.many_sections ? call_head(a, p, n, true, &h) : NO;
    if (close == YES) {
        a->at += strlen(a->syn.section_close);
        a->spans[a->n_calls - 1].to = a->dropped + a->at;
        enter_content(a);
        return true;
    }
    if (here == YES || next == YES) {
        begin_call(a, p, here == YES ? &bare : &h, here != YES || blank(a->syn.section_open));
        return true;
    }
    if ((close == MAYBE || here == MAYBE || next == MAYBE) && !eof)
        return false;
    enter_content(a);
    return true;
}

/* ---- content ---- */

static bool step_content(struct automaton *a, const char *p, size_t n, bool eof)
{
    struct head h, bare;
    if (!a->o.parse_calls) {
        flush_ws(a);
        a->at += n;
        while (a->skip_ws && n > 0 && automaton_is_ws(*p))
            p++, n--;
        a->skip_ws &= n == 0;
        emit(a, CHAT_CONTENT, p, n);
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        enum match m = call_head(a, p + i, n - i, true, &h);
        if (m == NO && (i > 0 ? p[i - 1] : a->last) == '\n') {
            m = call_head(a, p + i, n - i, false, &bare);       /* lenient: section_open left out, at a line start */
            h = bare;
        }
        if (m == NO || (m == MAYBE && eof && !h.opened))
            continue;
        emit_text(a, p, i);
        a->at += i;
        if (m == YES) {
            begin_call(a, p + i, &h, true);
            return true;
        }
        if (eof) {
            a->at += n - i;
            a->truncated = true;
            sbuf_reset(&a->ws);
        }
        return false;
    }
    emit_text(a, p, n);
    a->at += n;
    return false;
}

static bool step(struct automaton *a, bool eof)
{
    const char *p = sbuf_text(&a->buf) + a->at;
    size_t n = a->buf.n - a->at;
    switch (a->state) {
    case START:
    case REASON_START: return step_start(a, p, n, eof);
    case REASON: return step_reason(a, p, n, eof);
    case AFTER_REASON: return step_after_reason(a, p, n);
    case CONTENT: return step_content(a, p, n, eof);
    case IN_CALL: return step_call(a, p, n, eof);
    case IN_VALUE: return step_value(a, p, n, eof);
    default: return step_after_call(a, p, n, eof);
    }
}

/* ---- interface ---- */

struct automaton *automaton_create(const struct automaton_opts *opts)
{
    struct automaton *a = calloc(1, sizeof *a);
    if (a == NULL || (a->keys = calloc(MAX_KEYS, sizeof *a->keys)) == NULL) {
        free(a);
        return NULL;
    }
    a->o = *opts;
    if (opts->syntax != NULL)       /* an older plugin may know fewer members */
        memcpy(&a->syn, opts->syntax, opts->syntax->struct_size < sizeof a->syn ? opts->syntax->struct_size : sizeof a->syn);
    if (blank(a->syn.call_open) || blank(a->syn.name_end) || blank(a->syn.call_close))
        a->o.parse_calls = false;
    a->last = '\n';
    a->reasoning_end = -1;
    a->state = opts->starts_in_reasoning ? REASON_START : blank(a->syn.reason_open) ? CONTENT : START;
    return a;
}

void automaton_destroy(struct automaton *a)
{
    if (a == NULL)
        return;
    forget_keys(a);
    free(a->keys);
    free(a->spans);
    free(a->name);
    free(a->key);
    sbuf_fini(&a->buf);
    sbuf_fini(&a->ws);
    sbuf_fini(&a->val);
    sbuf_fini(&a->json);
    free(a);
}

static int run(struct automaton *a, bool eof)
{
    while (!a->oom && step(a, eof))
        ;
    sbuf_drop(&a->buf, a->at);
    a->dropped += a->at;
    a->at = 0;
    a->oom |= a->buf.failed || a->ws.failed || a->val.failed || a->json.failed;
    return a->oom ? -ENOMEM : 0;
}

int automaton_push(struct automaton *a, const char *text, size_t len)
{
    sbuf_add(&a->buf, text, len);
    if (a->buf.failed)
        a->oom = true;
    return run(a, false);
}

int automaton_finish(struct automaton *a)
{
    int r = run(a, true);
    if (!a->oom && (a->state == REASON || a->state == CONTENT))
        flush_ws(a);
    return r;
}

uint32_t automaton_calls(const struct automaton *a)
{
    return a->n_done;
}

bool automaton_in_reasoning(const struct automaton *a)
{
    return a->state == REASON || a->state == REASON_START;
}

bool automaton_truncated(const struct automaton *a)
{
    return a->truncated;
}

const struct call_span *automaton_spans(const struct automaton *a, uint32_t *n)
{
    *n = a->n_calls;
    return a->spans;
}

int64_t automaton_reasoning_end(const struct automaton *a)
{
    return a->reasoning_end;
}
