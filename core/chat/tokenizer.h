/*
 * Text <-> token ids, exactly as the reference library does it for the tokenizer.json of a model.
 *
 * What is read: tokenizer.json (byte-level BPE) and, when present, `added_tokens_decoder` of tokenizer_config.json.
 * What is not supported is refused by name at open, never approximated. http and chat call this; nothing below does.
 * One open tokenizer serves any number of threads at once: it is constant after open, apart from a pool of scratch
 * buffers behind a mutex, which a call takes and returns once.
 */
#ifndef ARLE_CHAT_TOKENIZER_H
#define ARLE_CHAT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <arle/err.h>

struct tokenizer;

/* A growing array of token ids in the caller's hands. Start with TOK_IDS_INIT; free with tok_ids_fini. */
struct tok_ids {
    int32_t *ids;
    size_t n, cap;
};
#define TOK_IDS_INIT { NULL, 0, 0 }

/** Frees the array and makes it empty again. */
void tok_ids_fini(struct tok_ids *ids);

/* Byte positions [begin, end) of a text. */
struct tok_range {
    size_t begin, end;
};

enum tok_flags {
    TOK_ALLOW_SPECIAL = 1u << 0, /* encode: literals of added tokens (special or not) in the text become their ids */
    TOK_SKIP_SPECIAL = 1u << 1,  /* decode: tokens marked special yield nothing; other added tokens stay */
    TOK_LOSSY_UTF8 = 1u << 2,    /* decode: bytes that are not UTF-8 become U+FFFD, one per maximal broken part */
};

struct tokenizer_opts {
    const char *model_dir;  /* folder with tokenizer.json, and perhaps tokenizer_config.json */
    const char *cache_dir;  /* where the parsed form is kept, of any size; NULL: the default place; "": keep none */
};

/**
 * Opens the tokenizer of a model folder, with the default cache place.
 *
 * The parsed form of a large file (1 MiB or more) is kept in $XDG_CACHE_HOME/arle, or $HOME/.cache/arle, or
 * /var/cache/arle, the first that is usable; a cache that is missing, damaged, of another version, or not owned by this
 * user is ignored, and none is needed.
 *
 * Returns 0; -ENOENT or another errno of the file; -EINVAL when tokenizer.json is damaged; -ENOTSUP when it asks for
 * something this tokenizer does not do (err->param names the field, as "model.byte_fallback"); -ENOMEM.
 * Thread: any. The caller owns *out_tok and ends it with tokenizer_close.
 */
int tokenizer_open(struct tokenizer **out_tok, const char *model_dir, struct arle_err *err);

/** As tokenizer_open, with options. */
int tokenizer_open_opts(struct tokenizer **out_tok, const struct tokenizer_opts *opts, struct arle_err *err);

/**
 * As tokenizer_open, from file contents. config_json may be NULL. Nothing is read from or written to disk.
 * Borrows both texts for the call only.
 */
int tokenizer_open_mem(struct tokenizer **out_tok, const char *json, size_t json_len, const char *config_json,
                       size_t config_len, struct arle_err *err);

/** Frees it. NULL is fine. No other thread may be using it. */
void tokenizer_close(struct tokenizer *tok);

/**
 * Appends the ids of `text` to `out`.
 *
 * text   [len] bytes of UTF-8; NUL bytes are text like any other
 * flags  0 or TOK_ALLOW_SPECIAL. Without it "<|im_end|>" is ordinary text and yields ordinary ids. With it every
 *        literal of an added token yields that token, as the reference library does by default.
 * Encoding never adds tokens of its own (no BOS).
 *
 * Returns 0; -EILSEQ if text is not valid UTF-8 (surrogates and overlong forms included; err->msg gives the byte
 * offset); -E2BIG if an unusual pre-tokeniser pattern ran out of its match limit; -ENOMEM. `out` is unchanged on
 * failure. Time is linear in len for known patterns (n log n inside one piece, a run of letters say). Thread: any,
 * concurrently.
 */
int tokenizer_encode(const struct tokenizer *tok, const char *text, size_t len, unsigned flags, struct tok_ids *out,
                     struct arle_err *err);

/**
 * As tokenizer_encode, but added tokens are matched only inside the given byte ranges (a literal must lie wholly in
 * one). Everything between two matched tokens is still encoded as one string: a range border alone changes nothing.
 * Chat rendering uses this so that a literal inside a user's text cannot become a control token while the template's
 * own can.
 *
 * allowed  [n_allowed] ascending, not overlapping, within [0, len]; ranges that touch are separate; may be NULL if 0
 *
 * Returns as tokenizer_encode, and -EINVAL if the ranges are not ascending or leave the text.
 */
int tokenizer_encode_ranges(const struct tokenizer *tok, const char *text, size_t len, const struct tok_range *allowed,
                            size_t n_allowed, struct tok_ids *out, struct arle_err *err);

/**
 * Bytes of a sequence of ids, concatenated.
 *
 * ids       [n_ids]; ids without a token (padding rows of the head) yield nothing, as in the reference library
 * flags     0, TOK_SKIP_SPECIAL, TOK_LOSSY_UTF8 in any combination
 * *out_text the bytes, with a NUL after them that *out_len does not count; malloc'ed, the caller frees it
 *
 * Returns 0 or -ENOMEM. Thread: any. An added token yields its literal.
 */
int tokenizer_decode(const struct tokenizer *tok, const int32_t *ids, size_t n_ids, unsigned flags, char **out_text,
                     size_t *out_len, struct arle_err *err);

/** The bytes of one token; they live as long as the tokenizer and have no NUL. -ENOENT if id names no token. */
int tokenizer_token_bytes(const struct tokenizer *tok, int32_t id, const char **out_bytes, size_t *out_len);

/** Id of the added token whose literal is exactly `text` ("<think>", "<|im_end|>"), or -1. */
int32_t tokenizer_added_id(const struct tokenizer *tok, const char *text);

/** One more than the largest id that names a token. A model's head may have more rows than this. */
int32_t tokenizer_vocab_size(const struct tokenizer *tok);

/** True if id is an added token marked special (dropped by TOK_SKIP_SPECIAL). */
bool tokenizer_is_special(const struct tokenizer *tok, int32_t id);

/** True if id is an added token, special or not. */
bool tokenizer_is_added(const struct tokenizer *tok, int32_t id);

/** True if open took the parsed form from the cache. For tests and for the start-up log line. */
bool tokenizer_from_cache(const struct tokenizer *tok);

/** Name of the pre-tokeniser in use, for logs: "split-lm", "split-l", "digits3-cjk-ps", "bytelevel", "pcre2", ... */
const char *tokenizer_pretok_name(const struct tokenizer *tok);

#endif
