/*
 * From a canonical conversation (messages.h) to the prompt: the model plugin writes the text, the tokenizer makes ids of it,
 * and the places worth a state snapshot become token positions.
 */
#ifndef ARLE_CHAT_RENDER_H
#define ARLE_CHAT_RENDER_H

#include "chat/served.h"
#include "util/sbuf.h"

/* A prompt ready for the engine. Start zeroed; free with prompt_fini. */
struct prompt {
    struct sbuf text;
    struct tok_ids ids;
    uint32_t *marks; uint32_t n_marks;      /* ascending token positions */
    bool starts_in_reasoning;
};

void prompt_fini(struct prompt *p);

/**
 * Renders and tokenises. The whole text is tokenised as one string, so that borders between template and content change
 * nothing; literals of special tokens inside client text count only if the model's special_in_content says so. Tool calls of
 * the conversation that this model generated for this tenant become what it sampled (calls.h).
 * -ENOTSUP: the model has no chat format; -EINVAL: the template refuses the conversation (err->param names the message).
 */
int prompt_render(struct prompt *p, const struct served_model *m, const char *tenant, struct json_object *conversation,
                  struct arle_err *err);

/** Tokenises plain text with special tokens allowed. */
int prompt_from_text(struct prompt *p, const struct served_model *m, const char *text, size_t len, struct arle_err *err);

#endif
