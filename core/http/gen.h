/*
 * A generation in progress behind one HTTP request: one engine request per prompt, n choices each, and the reply that grows
 * from their events. gen.c runs it, gen_write.c writes it. Not for others.
 */
#ifndef ARLE_HTTP_GEN_H
#define ARLE_HTTP_GEN_H

#include "chat/answer.h"
#include "chat/render.h"
#include "http/internal.h"
#include "http/json_in.h"

/* Logprobs of a choice as JSON text: one list of objects (chat) or four parallel lists (completions), without brackets. */
struct lp_lists {
    struct sbuf entries;                            /* chat */
    struct sbuf tokens, values, tops, offsets;      /* completions */
    size_t chars;                                   /* characters of the token texts so far */
};

struct choice {
    struct gen *g;
    uint32_t index, prompt;             /* its number in the reply; which prompt it answers */
    struct answer answer;
    bool begun;                         /* streamed: the first chunk is out */
    bool ended;
    enum finish_reason finish;
    struct sbuf content, reasoning;     /* collected (not streamed) */
    struct given_call *calls; uint32_t n_calls;
    struct lp_lists lp;                 /* since the last chunk when streamed */
    struct sbuf token_ids;              /* likewise, "1,2,3" */
    int32_t *drafts; uint32_t n_drafts; /* drafts[i] is for position i + 2 */
    uint32_t n_tokens, n_reasoning;
    int block; uint32_t n_blocks;       /* streamed messages: the open block (enum chat_event_kind, 0 none), and how many began */
};

struct sub {
    struct prompt prompt;
    struct request *rq;                 /* NULL before it is queued */
    bool over;                          /* every answer ended and usage is final */
    struct request_usage usage;
    struct lp_lists lp;                 /* of the prompt, for echo */
    int32_t *drafts; uint32_t n_drafts; /* of the prompt */
};

struct gen {
    struct conn *cn;
    struct waker *waker;
    struct served_model *m;
    enum dialect dialect;
    struct json_object *body, *tools;   /* tools is borrowed from body */
    struct gen_params p;
    int32_t *stop_ids; uint32_t n_stop_ids;         /* what ends an answer: end tokens and the client's */
    struct sub *subs; uint32_t n_subs;
    struct choice *choices; uint32_t n_choices;     /* [n_subs * p.n] */
    char id[64];
    int64_t created_s;
    bool counted;                       /* in srv->running and srv->gens */
    struct gen *next, **link;           /* guarded by srv->gens_mu */
    bool over;                          /* everything ended, or failed */
    struct arle_err failed;             /* why it failed */
    struct sbuf out;                    /* streamed bytes that wait for the socket */
    size_t out_at;
    bool out_closed;                    /* the last streamed byte is in `out` */
    int64_t first_us;
};

/** Anthropic's message dialect; everything else is OpenAI's. */
static inline bool gen_is_messages(const struct gen *g)
{
    return g->cn->route->messages;
}

/* gen_messages.c: what gen_write.c does, in the other dialect */
void messages_begin(struct choice *ch);
void messages_event(struct choice *ch, const struct chat_event *ev);
void messages_choice_end(struct choice *ch);
void messages_stream_end(struct gen *g);
void messages_reply(struct gen *g, struct sbuf *out);

/* gen_write.c */
/** Chat events of a choice: collects them, or streams them. */
void write_event(void *choice, const struct chat_event *ev);
/** A sampled or prompt token with its logprobs, into `lp`. */
void write_logprob(const struct gen *g, struct lp_lists *lp, const struct token_event *ev);
void lp_fini(struct lp_lists *lp);
/** Streams the end of a choice. */
void write_choice_end(struct choice *ch);
/** Streams what must stand before the first event of a choice; does nothing the second time. */
void write_choice_begin(struct choice *ch);
/** Streams token ids and logprobs that no text event carried yet. */
void write_choice_rest(struct choice *ch);
/** Streams usage, an error, [DONE]. */
void write_stream_end(struct gen *g);
/** The whole reply, not streamed. */
void write_reply(struct gen *g, struct sbuf *out);

#endif
