/*
 * Inside of the tokenizer, shared by the tok_*.c files only: the constant tables, the scratch of one call, and the
 * steps from text to ids (split out added tokens, normalise, pre-tokenise, merge).
 */
#ifndef ARLE_CHAT_TOK_INT_H
#define ARLE_CHAT_TOK_INT_H

#include <pthread.h>

#include "chat/tok_unicode.h"
#include "chat/tokenizer.h"

#define TOK_NONE UINT32_MAX

/* Growing byte buffer; 64 bytes beyond `n` are always readable after tok_buf_reserve. */
struct tok_buf {
    uint8_t *p;
    size_t n, cap;
};
#define TOK_BUF_SLACK 64
/** Makes room for `more` bytes after n. 0 or -ENOMEM. */
int tok_buf_reserve(struct tok_buf *b, size_t more);
void tok_buf_fini(struct tok_buf *b);

/* Room for `more` ids. 0 or -ENOMEM. */
int tok_ids_grow(struct tok_ids *ids, size_t more);
static inline int tok_ids_reserve(struct tok_ids *ids, size_t more)
{
    return more <= ids->cap - ids->n ? 0 : tok_ids_grow(ids, more);
}

/* One merge: the pair (left, right) becomes id. Open addressing, linear probing; empty slots have left == TOK_NONE. */
struct tok_merge {
    uint32_t left, right, rank, id;
};

/* One literal to split out of the text. Sorted by bytes. */
struct tok_added {
    uint32_t id;
    uint32_t flags;             /* TOK_ADDED_* */
};
enum { TOK_ADDED_LSTRIP = 1, TOK_ADDED_RSTRIP = 2 };

/* A set of literals searched together: range[b] = [first, last) of those that start with byte b. */
struct tok_literals {
    const struct tok_added *list;
    uint32_t n, first[257];
    int only_byte;              /* the byte all of them start with, or -1 */
};

enum tok_kind { TOK_KIND_HOLE = 0, TOK_KIND_PLAIN = 1, TOK_KIND_ADDED = 2, TOK_KIND_SPECIAL = 3 };

/* Known pre-tokeniser stages; the order is part of the cache format. */
enum tok_stage_kind {
    TOK_STAGE_SPLIT_LM = 0,     /* contractions, letters with marks, single digits */
    TOK_STAGE_SPLIT_L,          /* contractions, letters, single digits */
    TOK_STAGE_SPLIT_L_N3,       /* contractions, letters, up to three digits */
    TOK_STAGE_BYTELEVEL,        /* the byte-level pre-tokeniser's own pattern */
    TOK_STAGE_DIGITS3,          /* \p{N}{1,3} */
    TOK_STAGE_CJK,              /* runs of CJK ideographs and kana */
    TOK_STAGE_SPLIT_PS,         /* ASCII punctuation with letters, letters with marks, punctuation and symbols */
    TOK_STAGE_PCRE2,            /* any other pattern */
};
#define TOK_MAX_STAGES 8

struct tok_stage {
    uint32_t kind;
    uint32_t pattern_off, pattern_len;  /* TOK_STAGE_PCRE2: the pattern, in the blob */
    void *code;                         /* TOK_STAGE_PCRE2: pcre2_code, compiled at open */
};

/*
 * Everything constant. The arrays lie in one block (`image`), which is also the cache file's body: tok_image.c writes
 * and checks it, so that a cached open does no parsing.
 */
struct tok_tables {
    uint32_t n_ids;                     /* largest id + 1 */
    uint32_t nfc, ignore_merges;
    uint32_t n_stages;
    struct tok_stage stage[TOK_MAX_STAGES];
    uint32_t byte_id[256];
    const uint32_t *text_off;           /* [n_ids + 1] into blob */
    const uint8_t *kind;                /* [n_ids] enum tok_kind */
    const struct tok_merge *merge;      /* [1 << merge_bits] */
    uint32_t merge_bits;
    const uint32_t *whole;              /* [1 << whole_bits] ids by bytes; only with ignore_merges */
    uint32_t whole_bits;
    struct tok_literals raw, normal;    /* matched before and after normalisation */
    const uint8_t *blob;                /* token bytes, then patterns */
    uint32_t blob_len;
    void *image;
    size_t image_len;
};

static inline uint32_t tok_merge_hash(uint32_t left, uint32_t right, uint32_t bits)
{
    uint64_t k = ((uint64_t)left * UINT64_C(0x9E3779B1) ^ right) * UINT64_C(0xD6E8FEB86659FD93);
    return (uint32_t)(k >> (64 - bits));
}

/* Slot of a merge, or NULL. */
static inline const struct tok_merge *tok_merge_find(const struct tok_tables *t, uint32_t left, uint32_t right)
{
    uint32_t mask = (1u << t->merge_bits) - 1;
    for (uint32_t i = tok_merge_hash(left, right, t->merge_bits);; i = (i + 1) & mask) {
        const struct tok_merge *m = &t->merge[i];
        if (m->left == left && m->right == right)
            return m;
        if (m->left == TOK_NONE)
            return NULL;
    }
}

/* One line of the piece cache: a piece of up to 24 bytes and the ids it became. */
#define TOK_PIECE_MAX 24
#define TOK_PIECE_IDS 9
struct tok_piece {
    uint64_t key[3];
    uint32_t len_n;             /* length | n_ids << 8; 0 is empty */
    int32_t ids[TOK_PIECE_IDS];
};
#define TOK_PIECE_BITS 14

/* What one call needs and the next may reuse. */
struct tok_scratch {
    struct tok_scratch *next;
    struct tok_piece *pieces;           /* [1 << TOK_PIECE_BITS], 64-byte aligned */
    struct tok_buf norm;                /* normalised text */
    struct tok_buf work;                /* code points while normalising, nodes while merging a long piece */
    void *match[TOK_MAX_STAGES];        /* pcre2_match_data of the stages */
};

/** Frees one; NULL is fine. */
void tok_scratch_free(struct tok_scratch *s);

struct tokenizer {
    struct tok_tables t;
    bool from_cache;
    pthread_mutex_t mu;                 /* guards idle */
    struct tok_scratch *idle;
};

/* A run of text between added tokens on its way to ids. */
struct tok_run {
    const struct tok_tables *t;
    struct tok_scratch *s;
    struct tok_ids *out;
    const uint8_t *readable;            /* end of the memory that may be read (not used) past a piece */
    struct arle_err *err;
};

/** Appends the ids of one piece (n >= 1 bytes). 0 or -ENOMEM. */
int tok_bpe_piece(struct tok_run *run, const uint8_t *p, size_t n);
/** As tok_bpe_piece, without the piece cache. */
int tok_bpe_merge(struct tok_run *run, const uint8_t *p, size_t n);
/** Id of the token that is exactly these bytes (ignore_merges only), or TOK_NONE. */
uint32_t tok_whole_find(const struct tok_tables *t, const uint8_t *p, size_t n);
uint32_t tok_bytes_hash(const uint8_t *p, size_t n, uint32_t bits);

/** Splits text into pieces by the stages and appends the ids of each. */
int tok_pretok(struct tok_run *run, const uint8_t *p, const uint8_t *end);
/** End of the piece that starts at p for one built-in stage; p < end, valid UTF-8. For tests too. */
const uint8_t *tok_stage_next(enum tok_stage_kind kind, const uint8_t *p, const uint8_t *end);
/** The stage that matches exactly this pattern, or TOK_STAGE_PCRE2. */
enum tok_stage_kind tok_stage_known(const char *pattern, size_t len);
/** Compiles the stages that need it. */
int tok_stages_compile(struct tok_tables *t, struct arle_err *err);
void tok_stages_free(struct tok_tables *t);

/** Appends the NFC form of valid UTF-8 to out. 0 or -ENOMEM. */
int tok_nfc(struct tok_buf *out, struct tok_buf *work, const uint8_t *p, size_t n);
/** True if the text holds no code point that NFC could touch. */
bool tok_nfc_is_plain(const uint8_t *p, size_t n);

/** Checks UTF-8: the offset of the first byte that is not, or n. *plain tells whether NFC leaves the text alone. */
size_t tok_scan(const uint8_t *p, size_t n, bool *plain);

/** Parses the files into tables. On failure nothing is left behind. */
int tok_load_json(struct tok_tables *t, const char *json, size_t json_len, const char *config, size_t config_len,
                  struct arle_err *err);

/* What the loader collects; tok_image_build copies it into one block. */
struct tok_parts {
    uint32_t n_ids, nfc, ignore_merges, n_stages;
    struct tok_stage stage[TOK_MAX_STAGES];
    uint32_t byte_id[256];
    uint32_t *text_off;
    uint8_t *kind;
    struct tok_buf blob;
    struct tok_merge *merges;           /* [n_merges] in file order, ranks set */
    uint32_t n_merges;
    struct tok_added *raw, *normal;
    uint32_t n_raw, n_normal;
};
int tok_image_build(struct tok_tables *t, const struct tok_parts *parts, struct arle_err *err);
/** Points t into an image (which it owns from then on, on success) after checking every offset and id in it. */
int tok_image_adopt(struct tok_tables *t, void *image, size_t len);
void tok_tables_fini(struct tok_tables *t);

/* The cache: key is a hash of both files. */
struct tok_hash {
    uint64_t a, b;
};
struct tok_hash tok_hash_bytes(struct tok_hash seed, const void *p, size_t n);
/** Loads the image of `key` from dir; -ENOENT or another reason when there is none to trust. */
int tok_cache_load(struct tok_tables *t, const char *dir, struct tok_hash key);
/** Writes it atomically; failure only means there is no cache next time. */
int tok_cache_store(const struct tok_tables *t, const char *dir, struct tok_hash key);
/** The default cache folder, made if it was missing; "" if none is usable. */
void tok_cache_dir(char *out, size_t cap);

/* Finds the next literal at or after p within [p, end). base..limit is the text that strip flags may reach over. */
struct tok_hit {
    const uint8_t *begin, *end;
    const struct tok_added *tok;
};
bool tok_literals_next(const struct tok_tables *t, const struct tok_literals *set, const uint8_t *p, const uint8_t *end,
                       struct tok_hit *out);
void tok_literals_index(const struct tok_tables *t, struct tok_literals *set);

#endif
