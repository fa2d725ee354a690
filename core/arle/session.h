/*
 * What `run` and `chat` share: a model in this process, and one answer streamed to the terminal. Ctrl-C stops the answer
 * and not the program.
 */
#ifndef CORE_ARLE_SESSION_H
#define CORE_ARLE_SESSION_H

#include "arle/cmd.h"
#include "chat/automaton.h"
#include "daemon/host.h"
#include "util/sbuf.h"

struct json_object;

struct session {
    struct config *cfg;
    struct host *host;
    struct served_model *m;
};

/** Rows that commands with a model have. */
#define MODEL_OPTIONS \
    { "model", 'm', "DIR", "Folder of the model: config.json, tokenizer.json and *.safetensors. Without it, the shipped model." }, \
    { "backend", 0, "NAME", "Backend plugin: cpu, or another one; auto takes an accelerator where one works." }

/** Adds --model and --backend to the configuration of the command line. 0, or the exit status after a line on stderr. */
int session_config(const struct args *a, bool with_default, const char *served_name, struct config **out);

/** Opens the first model of the command line's configuration. 0, or the exit status after a line on stderr. */
int session_open(struct session *s, const struct args *a);
void session_close(struct session *s);

struct answer_text {
    struct sbuf content, reasoning;
    struct sbuf calls;              /* JSON of tool calls, comma-separated, for --json */
    const char *finish;
    uint32_t prompt_tokens, completion_tokens, cached_tokens;
    int64_t first_us, total_us;
    bool interrupted;
};
void answer_text_fini(struct answer_text *t);

/**
 * One answer. body is an OpenAI chat body (messages and sampling fields); on_text is called for reasoning and content as
 * they come (may be NULL). Returns 0, or a negative errno with err.
 */
int session_answer(struct session *s, struct json_object *body, chat_event_fn on_text, void *arg, struct answer_text *out,
                   struct arle_err *err);

/** Sampling fields of the command line (--max-tokens, --temperature, --seed, --think) into a body. False: usage error. */
bool session_sampling(const struct args *a, struct json_object *body);
#define SAMPLING_OPTIONS \
    { "max-tokens", 'n', "N", "Longest answer in tokens." }, \
    { "temperature", 't', "T", "0 takes the most likely token; otherwise the model's own advice." }, \
    { "seed", 0, "N", "Makes the answer repeatable." }, \
    { "think", 0, NULL, "Lets the model reason first, where it can." }

#endif
