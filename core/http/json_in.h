/*
 * Request bodies of the generation endpoints -> checked parameters. Pure: no connection, no engine; everything that can be
 * refused without tokenising is refused here, with the field's name. One table per dialect lists the fields it knows;
 * others are refused, as OpenAI does.
 */
#ifndef ARLE_HTTP_JSON_IN_H
#define ARLE_HTTP_JSON_IN_H

#include <stdbool.h>
#include <stdint.h>

#include "chat/served.h"
#include "chat/stopstr.h"

struct json_object;

enum dialect { DIALECT_CHAT = 1, DIALECT_COMPLETIONS };

#define MAX_STOPS 16            /* stop strings of one request */
#define MAX_PROMPTS 64          /* prompts of one completions request */
#define MAX_ANSWERS 128         /* n */

struct gen_params {
    struct sampling sampling;           /* bias points into `bias` */
    struct arle_bias *bias;
    int64_t max_new;                    /* -1: not said */
    uint32_t n;
    struct stop_set *stops;             /* NULL: none */
    int32_t *stop_ids; uint32_t n_stop_ids;     /* the client's own */
    bool ignore_eos, stream, include_usage, echo, keep_special;
    bool return_token_ids, return_drafts, tokens_as_ids, cache_detail;
    bool parse_calls, use_tools;        /* tools were given and not forbidden; tools go into the prompt */
    int32_t priority;
    const char *cache_salt;             /* borrowed from the body; "" if none */
};

/** Fills everything but the prompt. Refusals as in util/jfield.h. gen_params_fini also after a failure. */
int gen_params_read(struct gen_params *p, enum dialect dialect, struct json_object *body, const struct gen_defaults *defaults,
                    uint32_t vocab, struct arle_err *err);
void gen_params_fini(struct gen_params *p);

/** `model` of the body, or NULL when it is absent. */
int gen_model_name(struct json_object *body, const char **out, struct arle_err *err);

/**
 * One prompt of /v1/completions. `prompt` may be text, a list of texts, a list of ids, or a list of lists of ids; it is split
 * into count prompts. Borrowed from the body.
 */
struct raw_prompt {
    const char *text; size_t len;       /* text, when ids is NULL */
    struct json_object *ids;            /* array of ids, each checked against vocab */
};
int completion_prompts(struct json_object *body, uint32_t vocab, struct raw_prompt out[MAX_PROMPTS], uint32_t *count,
                       struct arle_err *err);

/** Checks an array of token ids: integers in [0, vocab). `key` names it. */
int check_token_ids(struct json_object *ids, const char *key, uint32_t vocab, struct arle_err *err);

/** Names of the fields a dialect knows, for the documentation's test. Ends with NULL. */
const char *const *dialect_fields(enum dialect dialect);

#endif
