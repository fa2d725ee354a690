/*
 * What a generation looks like on the wire: OpenAI chat completions and completions, whole and as server-sent events.
 * Streamed pieces carry the token ids and logprobs that arrived since the last piece of their choice.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "http/gen.h"
#include "util/clock.h"
#include "util/jfield.h"

#define LOGPROB_FLOOR (-9999.0)     /* stands for minus infinity, which JSON cannot say */

/* ---- logprobs ---- */

void lp_fini(struct lp_lists *lp)
{
    sbuf_fini(&lp->entries);
    sbuf_fini(&lp->tokens);
    sbuf_fini(&lp->values);
    sbuf_fini(&lp->tops);
    sbuf_fini(&lp->offsets);
}

static void lp_reset(struct lp_lists *lp)
{
    sbuf_reset(&lp->entries);
    sbuf_reset(&lp->tokens);
    sbuf_reset(&lp->values);
    sbuf_reset(&lp->tops);
    sbuf_reset(&lp->offsets);
}

static void comma(struct sbuf *b)
{
    if (b->n > 0)
        sbuf_char(b, ',');
}

static void put_logprob(struct sbuf *b, float lp)
{
    sbuf_json_num(b, lp < LOGPROB_FLOOR ? LOGPROB_FLOOR : (double)lp);
}

static void token_bytes(const struct gen *g, int32_t id, const char **p, size_t *n)
{
    if (tokenizer_token_bytes(g->m->tok, id, p, n) < 0) {
        *p = "";
        *n = 0;
    }
}

/* The text of one token as a JSON string. Parts of characters are not text: completions spell their bytes, as OpenAI does. */
static void put_token(const struct gen *g, struct sbuf *b, int32_t id)
{
    const char *p;
    size_t n;
    token_bytes(g, id, &p, &n);
    if (g->p.tokens_as_ids) {
        sbuf_fmt(b, "\"token_id:%d\"", id);
    } else if (utf8_invalid_at(p, n) == n) {
        sbuf_json_str(b, p, n);
    } else if (g->dialect == DIALECT_COMPLETIONS) {
        sbuf_str(b, "\"bytes:");
        for (size_t i = 0; i < n; i++)
            sbuf_fmt(b, "\\\\x%02x", (unsigned char)p[i]);
        sbuf_char(b, '"');
    } else {
        sbuf_str(b, "\"\xef\xbf\xbd\"");
    }
}

static void put_chat_token(const struct gen *g, struct sbuf *b, int32_t id, float logprob)
{
    const char *p;
    size_t n;
    token_bytes(g, id, &p, &n);
    sbuf_str(b, "{\"token\":");
    put_token(g, b, id);
    sbuf_str(b, ",\"logprob\":");
    put_logprob(b, logprob);
    sbuf_str(b, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++)
        sbuf_fmt(b, i ? ",%u" : "%u", (unsigned char)p[i]);
    sbuf_char(b, ']');
}

static void chat_logprob(const struct gen *g, struct lp_lists *lp, const struct token_event *ev)
{
    comma(&lp->entries);
    put_chat_token(g, &lp->entries, ev->id, ev->logprob);
    sbuf_str(&lp->entries, ",\"top_logprobs\":[");
    for (unsigned i = 0; i < ev->n_top && i < g->p.sampling.n_top; i++) {
        if (i > 0)
            sbuf_char(&lp->entries, ',');
        put_chat_token(g, &lp->entries, ev->top_ids[i], ev->top_logprobs[i]);
        sbuf_char(&lp->entries, '}');
    }
    sbuf_str(&lp->entries, "]}");
}

static size_t count_chars(const char *p, size_t n)
{
    size_t chars = 0;
    for (size_t i = 0; i < n; i++)
        chars += ((unsigned char)p[i] & 0xc0) != 0x80;
    return chars;
}

static void completion_top(const struct gen *g, struct sbuf *b, const struct token_event *ev)
{
    bool listed = false, first = true;
    sbuf_char(b, '{');
    for (unsigned i = 0; i < ev->n_top && i < g->p.sampling.n_top; i++) {
        if (!first)
            sbuf_char(b, ',');
        first = false;
        put_token(g, b, ev->top_ids[i]);
        sbuf_char(b, ':');
        put_logprob(b, ev->top_logprobs[i]);
        listed |= ev->top_ids[i] == ev->id;
    }
    if (!listed) {          /* the chosen token is always there */
        if (!first)
            sbuf_char(b, ',');
        put_token(g, b, ev->id);
        sbuf_char(b, ':');
        put_logprob(b, ev->logprob);
    }
    sbuf_char(b, '}');
}

void write_logprob(const struct gen *g, struct lp_lists *lp, const struct token_event *ev)
{
    if (g->dialect == DIALECT_CHAT) {
        chat_logprob(g, lp, ev);
        return;
    }
    const char *p;
    size_t n;
    token_bytes(g, ev->id, &p, &n);
    comma(&lp->tokens);
    put_token(g, &lp->tokens, ev->id);
    comma(&lp->values);
    put_logprob(&lp->values, ev->logprob);
    comma(&lp->tops);
    if (ev->logprob != ev->logprob)         /* the first token of a prompt has no distribution before it */
        sbuf_str(&lp->tops, "null");
    else
        completion_top(g, &lp->tops, ev);
    comma(&lp->offsets);
    sbuf_fmt(&lp->offsets, "%zu", lp->chars);
    lp->chars += count_chars(p, n);
}

static void put_logprobs(const struct gen *g, struct sbuf *b, const struct lp_lists *lp)
{
    if (!g->p.sampling.want_logprobs) {
        sbuf_str(b, ",\"logprobs\":null");
        return;
    }
    if (g->dialect == DIALECT_CHAT) {
        sbuf_str(b, ",\"logprobs\":{\"content\":[");
        sbuf_add(b, sbuf_text(&lp->entries), lp->entries.n);
        sbuf_str(b, "],\"refusal\":null}");
        return;
    }
    static const char *const names[] = { "tokens", "token_logprobs", "top_logprobs", "text_offset" };
    const struct sbuf *lists[] = { &lp->tokens, &lp->values, &lp->tops, &lp->offsets };
    sbuf_str(b, ",\"logprobs\":{");
    for (int i = 0; i < 4; i++) {
        sbuf_fmt(b, "%s\"%s\":[", i ? "," : "", names[i]);
        sbuf_add(b, sbuf_text(lists[i]), lists[i]->n);
        sbuf_char(b, ']');
    }
    sbuf_char(b, '}');
}

/* ---- common pieces ---- */

static void put_ids(struct sbuf *b, const int32_t *ids, size_t n)
{
    sbuf_char(b, '[');
    for (size_t i = 0; i < n; i++)
        sbuf_fmt(b, i ? ",%d" : "%d", ids[i]);
    sbuf_char(b, ']');
}

static void put_prompt_ids(const struct gen *g, struct sbuf *b, uint32_t prompt)
{
    if (!g->p.return_token_ids)
        return;
    sbuf_str(b, ",\"prompt_token_ids\":");
    put_ids(b, g->subs[prompt].prompt.ids.ids, g->subs[prompt].prompt.ids.n);
}

/* [i] is the drafted id for position i + 2; null where the drafter said nothing. */
static void put_drafts(struct sbuf *b, const struct choice *ch)
{
    const struct sub *s = &ch->g->subs[ch->prompt];
    uint32_t n = ch->n_drafts > s->n_drafts ? ch->n_drafts : s->n_drafts;
    if (!ch->g->p.return_drafts)
        return;
    sbuf_str(b, ",\"draft_token_ids\":[");
    for (uint32_t i = 0; i < n; i++) {
        int32_t id = i < ch->n_drafts && ch->drafts[i] >= 0 ? ch->drafts[i] : i < s->n_drafts ? s->drafts[i] : -1;
        if (i > 0)
            sbuf_char(b, ',');
        if (id < 0)
            sbuf_str(b, "null");
        else
            sbuf_fmt(b, "%d", id);
    }
    sbuf_char(b, ']');
}

/* Cached tokens by tier, and why the least cached prompt was not reused further. */
static void put_cache_detail(const struct gen *g, struct sbuf *b)
{
    uint64_t device = 0, host = 0, disk = 0, store = 0;
    const struct request_usage *least = &g->subs[0].usage;
    for (uint32_t i = 0; i < g->n_subs; i++) {
        const struct request_usage *u = &g->subs[i].usage;
        device += u->from_device;
        host += u->from_host;
        disk += u->from_disk;
        store += u->from_store;
        if (u->cached_tokens < least->cached_tokens)
            least = u;
    }
    sbuf_fmt(b, ",\"device_tokens\":%llu,\"host_tokens\":%llu,\"disk_tokens\":%llu,\"store_tokens\":%llu,\"miss\":",
             (unsigned long long)device, (unsigned long long)host, (unsigned long long)disk, (unsigned long long)store);
    sbuf_json_cstr(b, least->miss != NULL ? least->miss : "");
}

static void put_usage(const struct gen *g, struct sbuf *b)
{
    uint64_t prompt = 0, completion = 0, cached = 0, reasoning = 0;
    for (uint32_t i = 0; i < g->n_subs; i++) {
        prompt += g->subs[i].usage.prompt_tokens;
        completion += g->subs[i].usage.completion_tokens;
        cached += g->subs[i].usage.cached_tokens;
    }
    for (uint32_t i = 0; i < g->n_choices; i++)
        reasoning += g->choices[i].n_reasoning;
    sbuf_fmt(b, "{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,\"total_tokens\":%llu,"
                "\"prompt_tokens_details\":{\"cached_tokens\":%llu",
             (unsigned long long)prompt, (unsigned long long)completion, (unsigned long long)(prompt + completion),
             (unsigned long long)cached);
    if (g->p.cache_detail)
        put_cache_detail(g, b);
    sbuf_char(b, '}');
    if (g->dialect == DIALECT_CHAT)
        sbuf_fmt(b, ",\"completion_tokens_details\":{\"reasoning_tokens\":%llu}", (unsigned long long)reasoning);
    sbuf_char(b, '}');
}

static void put_head(const struct gen *g, struct sbuf *b, bool chunk)
{
    const char *object = g->dialect == DIALECT_COMPLETIONS ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion";
    sbuf_fmt(b, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", g->id, object, (long long)g->created_s);
    sbuf_json_cstr(b, g->m->name);
}

static const char *finish_name(const struct choice *ch)
{
    return answer_finish_name(&ch->answer, ch->finish);
}

/* ---- tool calls ---- */

/* Calls come in order: each one is new. */
static void begin_call(struct choice *ch, const struct chat_event *ev)
{
    struct given_call *p = realloc(ch->calls, (ch->n_calls + 1) * sizeof *p);
    if (p == NULL)
        return;
    ch->calls = p;
    struct given_call *c = &p[ch->n_calls++];
    *c = (struct given_call){ .id = "" };
    sbuf_add(&c->name, ev->text, ev->len);
    unsigned char r[10] = { 0 };
    if (getrandom(r, sizeof r, 0) < 0)
        r[0] = (unsigned char)clock_mono_us();
    int n = snprintf(c->id, sizeof c->id, "call_");
    for (size_t i = 0; i < sizeof r; i++)
        n += snprintf(c->id + n, sizeof c->id - (size_t)n, "%02x", r[i]);
}

static void put_call_head(struct sbuf *b, const struct given_call *c)
{
    sbuf_fmt(b, "\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":", c->id);
    sbuf_json_str(b, sbuf_text(&c->name), c->name.n);
    sbuf_str(b, ",\"arguments\":");
}

/* ---- streamed ---- */

/* Opens `data: {... "choices":[{"index":N`; chunk_close writes what every chunk ends with. */
static struct sbuf *chunk_open(struct choice *ch)
{
    struct sbuf *b = &ch->g->out;
    sbuf_str(b, "data: ");
    put_head(ch->g, b, true);
    sbuf_fmt(b, ",\"choices\":[{\"index\":%u", ch->index);
    return b;
}

static void chunk_close(struct choice *ch, const char *finish, bool with_ids)
{
    struct gen *g = ch->g;
    struct sbuf *b = &g->out;
    put_logprobs(g, b, &ch->lp);
    sbuf_str(b, ",\"finish_reason\":");
    sbuf_json_cstr(b, finish);
    if (with_ids && g->p.return_token_ids) {
        sbuf_fmt(b, ",\"token_ids\":[%s]", sbuf_text(&ch->token_ids));
        sbuf_reset(&ch->token_ids);
    }
    if (finish != NULL)
        put_drafts(b, ch);
    sbuf_str(b, "}]");
    if (g->p.include_usage)
        sbuf_str(b, ",\"usage\":null");
    sbuf_str(b, "}\n\n");
    lp_reset(&ch->lp);
}

void write_choice_begin(struct choice *ch)
{
    struct gen *g = ch->g;
    if (gen_is_messages(g)) {
        messages_begin(ch);
        return;
    }
    if (ch->begun)
        return;
    ch->begun = true;
    bool echo = g->p.echo;
    if (g->dialect == DIALECT_COMPLETIONS && !echo && !g->p.return_token_ids)
        return;
    struct sbuf *b = chunk_open(ch);
    if (g->dialect == DIALECT_CHAT) {
        sbuf_str(b, ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
    } else {
        const struct sbuf *text = &g->subs[ch->prompt].prompt.text;
        sbuf_str(b, ",\"text\":");
        sbuf_json_str(b, sbuf_text(text), echo ? text->n : 0);
    }
    put_prompt_ids(g, b, ch->prompt);
    struct lp_lists own = ch->lp;           /* the prompt's logprobs go with the prompt's text */
    if (echo) {
        ch->lp = g->subs[ch->prompt].lp;
        own.chars += ch->lp.chars;
    } else {
        ch->lp = (struct lp_lists){ 0 };
    }
    put_logprobs(g, b, &ch->lp);
    ch->lp = own;
    sbuf_str(b, ",\"finish_reason\":null}]");
    if (g->p.include_usage)
        sbuf_str(b, ",\"usage\":null");
    sbuf_str(b, "}\n\n");
}

static void stream_event(struct choice *ch, const struct chat_event *ev)
{
    struct gen *g = ch->g;
    if (gen_is_messages(g)) {
        messages_event(ch, ev);
        return;
    }
    write_choice_begin(ch);
    if (ev->kind == CHAT_CALL_END)
        return;
    struct sbuf *b = chunk_open(ch);
    switch (ev->kind) {
    case CHAT_CALL_START:
        sbuf_fmt(b, ",\"delta\":{\"tool_calls\":[{\"index\":%u,", ev->call);
        if (ev->call < ch->n_calls)
            put_call_head(b, &ch->calls[ev->call]);
        sbuf_str(b, "\"\"}}]}");
        break;
    case CHAT_CALL_ARGS:
        sbuf_fmt(b, ",\"delta\":{\"tool_calls\":[{\"index\":%u,\"function\":{\"arguments\":", ev->call);
        sbuf_json_str(b, ev->text, ev->len);
        sbuf_str(b, "}}]}");
        break;
    default:
        sbuf_str(b, g->dialect == DIALECT_COMPLETIONS ? ",\"text\":"
                    : ev->kind == CHAT_CONTENT ? ",\"delta\":{\"content\":" : ",\"delta\":{\"reasoning_content\":");
        sbuf_json_str(b, ev->text, ev->len);
        if (g->dialect == DIALECT_CHAT)
            sbuf_char(b, '}');
    }
    chunk_close(ch, NULL, true);
}

void write_choice_rest(struct choice *ch)
{
    if (ch->ended || (ch->token_ids.n == 0 && ch->lp.entries.n == 0 && ch->lp.tokens.n == 0))
        return;
    struct sbuf *b = chunk_open(ch);
    sbuf_str(b, ch->g->dialect == DIALECT_CHAT ? ",\"delta\":{}" : ",\"text\":\"\"");
    chunk_close(ch, NULL, true);
}

void write_choice_end(struct choice *ch)
{
    if (gen_is_messages(ch->g)) {
        messages_choice_end(ch);
        return;
    }
    write_choice_begin(ch);
    struct sbuf *b = chunk_open(ch);
    sbuf_str(b, ch->g->dialect == DIALECT_CHAT ? ",\"delta\":{}" : ",\"text\":\"\"");
    chunk_close(ch, finish_name(ch), true);
}

void write_stream_end(struct gen *g)
{
    if (gen_is_messages(g)) {
        messages_stream_end(g);
        return;
    }
    if (g->failed.code != 0) {
        sbuf_str(&g->out, "data: ");
        error_json(&g->out, &g->failed);
        sbuf_str(&g->out, "\n\n");
    } else if (g->p.include_usage) {
        sbuf_str(&g->out, "data: ");
        put_head(g, &g->out, true);
        sbuf_str(&g->out, ",\"choices\":[],\"usage\":");
        put_usage(g, &g->out);
        sbuf_str(&g->out, "}\n\n");
    }
    sbuf_str(&g->out, "data: [DONE]\n\n");
}

/* ---- whole ---- */

void write_event(void *choice, const struct chat_event *ev)
{
    struct choice *ch = choice;
    if (ev->kind == CHAT_CALL_START)
        begin_call(ch, ev);
    else if (ev->kind == CHAT_CALL_ARGS && ev->call < ch->n_calls)
        sbuf_add(&ch->calls[ev->call].args, ev->text, ev->len);
    if (ch->g->p.stream) {
        stream_event(ch, ev);
        return;
    }
    if (ev->kind == CHAT_REASONING)
        sbuf_add(&ch->reasoning, ev->text, ev->len);
    else if (ev->kind == CHAT_CONTENT)
        sbuf_add(&ch->content, ev->text, ev->len);
}

static void put_message(struct sbuf *b, const struct choice *ch)
{
    sbuf_str(b, ",\"message\":{\"role\":\"assistant\",\"content\":");
    if (ch->content.n == 0 && ch->n_calls > 0)
        sbuf_str(b, "null");
    else
        sbuf_json_str(b, sbuf_text(&ch->content), ch->content.n);
    sbuf_str(b, ",\"refusal\":null");
    if (ch->reasoning.n > 0) {
        sbuf_str(b, ",\"reasoning_content\":");
        sbuf_json_str(b, ch->reasoning.p, ch->reasoning.n);
    }
    for (uint32_t i = 0; i < ch->n_calls; i++) {
        sbuf_str(b, i ? ",{" : ",\"tool_calls\":[{");
        put_call_head(b, &ch->calls[i]);
        sbuf_json_str(b, sbuf_text(&ch->calls[i].args), ch->calls[i].args.n);
        sbuf_str(b, i + 1 == ch->n_calls ? "}}]" : "}}");
    }
    sbuf_char(b, '}');
}

/* Echoed logprobs: the prompt's lists, then the answer's, whose offsets start where the prompt ends. */
static void put_echo_logprobs(struct gen *g, struct sbuf *b, struct choice *ch)
{
    const struct lp_lists *p = &g->subs[ch->prompt].lp;
    struct lp_lists both = { 0 };
    struct sbuf *to[] = { &both.tokens, &both.values, &both.tops };
    const struct sbuf *head[] = { &p->tokens, &p->values, &p->tops };
    const struct sbuf *tail[] = { &ch->lp.tokens, &ch->lp.values, &ch->lp.tops };
    for (int i = 0; i < 3; i++) {
        sbuf_add(to[i], sbuf_text(head[i]), head[i]->n);
        if (head[i]->n > 0 && tail[i]->n > 0)
            sbuf_char(to[i], ',');
        sbuf_add(to[i], sbuf_text(tail[i]), tail[i]->n);
    }
    sbuf_add(&both.offsets, sbuf_text(&p->offsets), p->offsets.n);
    for (const char *at = sbuf_text(&ch->lp.offsets); *at != '\0'; at += strcspn(at, ","), at += *at == ',') {
        comma(&both.offsets);
        sbuf_fmt(&both.offsets, "%zu", (size_t)strtoull(at, NULL, 10) + p->chars);
    }
    put_logprobs(g, b, &both);
    lp_fini(&both);
}

static void put_choice(struct gen *g, struct sbuf *b, struct choice *ch)
{
    sbuf_fmt(b, "%s{\"index\":%u", ch->index ? "," : "", ch->index);
    if (g->dialect == DIALECT_CHAT) {
        put_message(b, ch);
    } else {
        const struct sbuf *prompt = &g->subs[ch->prompt].prompt.text;
        sbuf_str(b, ",\"text\":\"");
        if (g->p.echo)
            sbuf_json_chars(b, sbuf_text(prompt), prompt->n);
        sbuf_json_chars(b, sbuf_text(&ch->content), ch->content.n);
        sbuf_char(b, '"');
    }
    if (g->p.echo && g->p.sampling.want_logprobs)
        put_echo_logprobs(g, b, ch);
    else
        put_logprobs(g, b, &ch->lp);
    sbuf_str(b, ",\"finish_reason\":");
    sbuf_json_cstr(b, finish_name(ch));
    if (g->p.return_token_ids)
        sbuf_fmt(b, ",\"token_ids\":[%s]", sbuf_text(&ch->token_ids));
    put_prompt_ids(g, b, ch->prompt);
    put_drafts(b, ch);
    sbuf_char(b, '}');
}

void write_reply(struct gen *g, struct sbuf *out)
{
    if (gen_is_messages(g)) {
        messages_reply(g, out);
        return;
    }
    put_head(g, out, false);
    sbuf_str(out, ",\"choices\":[");
    for (uint32_t i = 0; i < g->n_choices; i++)
        put_choice(g, out, &g->choices[i]);
    sbuf_str(out, "],\"usage\":");
    put_usage(g, out);
    if (g->n_subs == 1)
        put_prompt_ids(g, out, 0);
    sbuf_char(out, '}');
    for (uint32_t i = 0; i < g->n_choices; i++)
        if (g->choices[i].content.failed || g->choices[i].reasoning.failed || g->choices[i].lp.entries.failed)
            out->failed = true;
}
