/*
 * A model as the text plane sees it: its engine, tokenizer, chat format and the defaults of its generation_config.json.
 * Constant once open; any thread may use it. The daemon makes one per [model] section.
 */
#ifndef ARLE_CHAT_SERVED_H
#define ARLE_CHAT_SERVED_H

#include <stdbool.h>
#include <stdint.h>

#include "chat/tokenizer.h"
#include "sched/engine.h"

struct call_memory;
struct json_object;

/* What generation_config.json says; what it does not say has the neutral value. */
struct gen_defaults {
    float temperature, top_p, min_p, repetition;
    int32_t top_k;
};

struct served_model {
    char *name;                     /* as in requests and replies */
    char *dir;
    int64_t created_s;              /* seconds since the epoch */
    struct engine *engine;          /* owned by whoever opened it */
    struct tokenizer *tok;
    const struct arle_model_api *api;
    void *api_ctx;
    const struct arle_output_syntax *syntax;        /* NULL: output is plain content */
    struct json_object *chat_options;               /* defaults of template options, or NULL */
    struct gen_defaults defaults;
    int32_t *eos; uint32_t n_eos;   /* end tokens */
    bool special_in_content;
    struct call_memory *calls;      /* what this model sampled for its tool calls; NULL: nothing is kept */
};

/**
 * Opens the text side of a model folder: tokenizer, generation_config.json (may be absent), end tokens. The engine, the
 * api and chat_options are set by served_attach. End tokens are those of generation_config.json and of config.json, and
 * the eos_token of tokenizer_config.json.
 */
int served_open(struct served_model **out, const char *name, const char *dir, bool special_in_content, struct arle_err *err);
int served_attach(struct served_model *m, struct engine *engine, const struct arle_model_api *api, void *api_ctx,
                  struct arle_err *err);
/** From now on tool calls are kept, within these bounds (calls.h); 0 of either keeps none. Once, before it is shared. */
int served_keep_calls(struct served_model *m, uint32_t max_calls, size_t max_bytes, struct arle_err *err);
/** Frees the text side; NULL is fine. */
void served_close(struct served_model *m);

/** Positions a sequence may have. */
uint32_t served_context(const struct served_model *m);
/** Ids >= this name no token. */
uint32_t served_vocab(const struct served_model *m);
bool served_is_eos(const struct served_model *m, int32_t id);

#endif
