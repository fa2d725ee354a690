/*
 * What a model architecture offers: recognise a config.json, check and load the weights, describe its cache groups, run
 * steps, and say how chats are written in its tongue.
 */
#ifndef ARLE_MODEL_H
#define ARLE_MODEL_H

#include <arle/backend.h>
#include <arle/kv.h>
#include <arle/ops.h>
#include <arle/plugin.h>

#ifdef __cplusplus
extern "C" {
#endif

struct arle_model;

/* What the host asks of a load. Pointers are borrowed for the life of the model unless said otherwise. */
struct arle_model_load {
    uint32_t struct_size;
    uint32_t compute;               /* activation dtype: ARLE_F32 or ARLE_BF16 */
    uint32_t kv_dtype;              /* dtype of paged attention entries; see <arle/kv.h> */
    uint32_t page_tokens;
    uint32_t max_tokens;            /* largest n_tokens of a step */
    uint32_t max_seqs;              /* largest n_seqs of a step */
    uint32_t max_rows;              /* largest number of logit rows of a step */
    uint32_t context;               /* wanted context length, 0 = the model's own */
    uint32_t drafts;                /* 1: load the drafter when the checkpoint has one */
    uint32_t parity;                /* 1: leave out simulated quantisation of activations where the architecture defines it */
    const char *config_json; size_t config_len;         /* borrowed during load */
    const struct arle_weights *weights;                 /* borrowed during load */
    const struct arle_backend_api *backend;
    struct arle_device *device;
    /** Called as weights are packed: done of total bytes. May be NULL. */
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *progress_arg;
};

struct arle_model_desc {
    uint32_t struct_size;
    uint32_t vocab;                 /* columns of logits */
    uint32_t n_valid;               /* ids >= n_valid are padding and never produced */
    uint32_t context;               /* positions */
    uint32_t n_groups;
    uint32_t page_multiple;         /* page_tokens must be a multiple of this */
    uint32_t has_drafter;
    uint32_t hidden;                /* width of the residual stream */
    const struct arle_cache_group *groups;
    uint64_t weight_bytes;          /* device bytes of packed weights */
    uint64_t scratch_bytes;         /* device bytes of step buffers */
    uint64_t step_weight_bytes;     /* weight bytes that one decode row must read (active experts only), for roofline figures */
    uint64_t n_params;
    const char *arch;               /* architecture name for people */
    const char *chat_options;       /* JSON object of this checkpoint's chat defaults: the host fills absent keys of "options" from it */
    uint32_t max_saves;             /* states a step can keep from its midst, <= ARLE_MAX_SAVES; 0: a step ends where one is wanted */
};

#define ARLE_STEP_DRAFTS 1u         /* run the drafter over the step's tokens */

/* One step. All arrays are device memory that the host owns. */
struct arle_step {
    uint32_t struct_size;
    uint32_t flags;
    struct arle_batch batch;
    uint32_t n_rows;
    const int32_t *rows;            /* [n_rows] token indices whose logits are wanted */
    float *logits; int64_t ld_logits;       /* [n_rows, vocab] f32 out */
    /* ARLE_STEP_DRAFTS: for the token at position p >= 1, draft[t] is the drafted id of position p + 1, made from the final
     * hidden state at p - 1 and the token at p. -1 for position 0. */
    int32_t *drafts;                /* [n_tokens] out */
    const struct arle_save *saves;  /* [n_saves] for all state ops of the step; n_saves <= the description's max_saves */
    uint32_t n_saves;
};

/* ---- chat ---------------------------------------------------------------------------------------------------------- */

#define ARLE_TEXT_TEMPLATE 1u       /* made by the template: literals of special tokens count */
#define ARLE_TEXT_CONTENT 2u        /* came from a client: literals of special tokens count only if the server allows it */
#define ARLE_TEXT_LITERAL 4u        /* sampled as ordinary tokens: literals of special tokens never count */

enum arle_chat_mark {
    ARLE_MARK_SYSTEM_END = 1,       /* end of system prompt and tools */
    ARLE_MARK_TURN_END = 2,         /* end of a message of the history */
    ARLE_MARK_STABLE = 3,           /* everything before this point renders the same in the next turn */
};

struct arle_chat_sink {
    void *ctx;
    int (*text)(void *ctx, const char *text, size_t len, uint32_t flags);
    int (*mark)(void *ctx, uint32_t mark);
};

/*
 * How output is written, as a table that the host's automaton follows. NULL or "" means that the part does not exist.
 *   output    = [ reasoning reason_close ] content { section }
 *   section   = section_open { call } section_close
 *   call      = call_open NAME name_end { param } call_close
 *   param     = param_open KEY key_end [ typed ] VALUE param_close
 * Whitespace between the tags of a section is skipped.
 */
struct arle_output_syntax {
    uint32_t struct_size;
    const char *reason_open, *reason_close;             /* "<think>", "</think>" */
    const char *section_open, *section_close;
    const char *call_open, *name_end, *call_close;
    const char *param_open, *key_end, *param_close;
    /* Set: after KEY comes typed_open, then true (VALUE is raw text) or false (VALUE is JSON), then typed_end; key_end is unused. */
    const char *typed_open, *typed_end;
    uint32_t value_newlines;        /* 1: one newline after key_end and one before param_close are not part of VALUE */
    uint32_t calls_in_reasoning;    /* 1: section_open followed by call_open ends reasoning implicitly */
    uint32_t many_sections;         /* 1: sections may repeat; 0: only the end follows a section */
};

struct arle_chat_result {
    uint32_t struct_size;
    uint32_t starts_in_reasoning;   /* the prompt left a reasoning block open */
};

/* ---- the table ------------------------------------------------------------------------------------------------------ */

struct arle_model_api {
    uint32_t struct_size;

    /** 1 when config.json is of this architecture, 0 when not; -EINVAL with err when it is, but cannot be served (err says
     *  which field, and why). Any thread. */
    int (*recognise)(void *ctx, const char *config_json, size_t len, struct arle_err *err);

    /** Checks every tensor and packs the weights. Missing ops and tensors are reported by name before memory is spent.
     *  Engine thread or the thread that starts it. */
    int (*load)(void *ctx, const struct arle_model_load *args, struct arle_model **out, struct arle_err *err);
    void (*destroy)(struct arle_model *m);
    const struct arle_model_desc *(*describe)(const struct arle_model *m);      /* lives with the model */
    int (*bind)(struct arle_model *m, const struct arle_cache_binding *caches, struct arle_err *err);

    /** Enqueues one step. No waiting, no allocation, capturable. Engine thread. */
    int (*step)(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err);

    /** Fills `out` as describe() would after a load with these arguments (weights may be NULL), without spending memory. */
    int (*predict)(void *ctx, const struct arle_model_load *args, struct arle_model_desc *out, struct arle_err *err);

    /**
     * Renders a conversation. request_json (UTF-8):
     *   { "messages": [ { "role": "system|developer|user|assistant|tool", "content": "text", "reasoning_content": "text",
     *       "tool_calls": [ { "id": "...", "name": "...", "arguments": {...}, "raw": {...} } ], "tool_call_id": "..." } ],
     *     "tools": [ as the client sent them ], "options": { "enable_thinking": bool, "reasoning_effort": "...", ... },
     *     "add_generation_prompt": bool, "continue_final": bool }
     * Absent keys are absent; `content` of parts was joined by the host. -EINVAL names the message ("messages[3].role").
     *
     * "raw" says how this model wrote the call, and is to be written in place of name and arguments:
     *   { "lead": "white space", "text": [ "ordinary", "added", "ordinary", ... ] }
     * `text` runs from section_open (or call_open) through the last closing tag and whatever was sampled behind it. Its
     * pieces are alternately sampled as ordinary tokens (ARLE_TEXT_LITERAL) and as one added token (ARLE_TEXT_TEMPLATE); the
     * first one is ordinary and may be empty. `lead` stands between it and what the message has before it; without it the
     * template's own separator does. Calls of one section come together: the first has the text of all, the others have an
     * empty lead and no pieces. A message with raw calls may have "raw_content": the part of `content` that was written before
     * the calls, where the rest was written after them and stands in their text. Only the host sets these, never a client. A
     * plugin may ignore both: then histories render in the template's regular form.
     * Any thread, reentrant.
     */
    int (*chat_render)(void *ctx, const char *request_json, size_t len, const struct arle_chat_sink *sink,
                       struct arle_chat_result *out, struct arle_err *err);
    const struct arle_output_syntax *(*chat_syntax)(void *ctx);
};

#ifdef __cplusplus
}
#endif
#endif
