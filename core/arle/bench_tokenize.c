/* `arle bench tokenize`: one thread, a file or made-up English. */
#include "arle/bench.h"
#include "chat/tokenizer.h"
#include "util/clock.h"
#include <stdlib.h>
#include <string.h>

#define MADE_UP_BYTES ((size_t)8 << 20)

/* Words drawn by a Zipf-like rule, with punctuation, capitals, numbers and line breaks: the mix that splitting sees in prose. */
static char *made_up_text(size_t *out_n)
{
    static const char *const words[] = {
        "the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "was", "on", "are", "with", "as", "be", "at", "by", "this",
        "have", "from", "or", "had", "not", "but", "what", "some", "when", "there", "their", "which", "would", "people", "water",
        "through", "because", "different", "language", "government", "understanding", "measurement", "it's", "don't", "1984", "42",
        "however", "sentence", "machine", "station", "Tokyo", "England", "Monday", "remember", "conversation", "development",
    };
    size_t n = 0, count = sizeof words / sizeof words[0];
    char *text = malloc(MADE_UP_BYTES + 64);
    uint64_t x = 88172645463325252ull;
    if (text == NULL)
        return NULL;
    while (n < MADE_UP_BYTES) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        size_t pick = (size_t)(x >> 40) % count * ((size_t)(x >> 20) % count) / count;
        const char *end = x % 97 == 0 ? ".\n\n" : x % 13 == 0 ? ". " : x % 11 == 0 ? ", " : " ";
        n += (size_t)sprintf(text + n, "%s%s", words[pick], end);
    }
    *out_n = n;
    return text;
}

static char *read_text(const char *path, size_t *out_n)
{
    FILE *f = fopen(path, "re");
    char *text = NULL;
    if (f != NULL && fseek(f, 0, SEEK_END) == 0) {
        long size = ftell(f);
        rewind(f);
        text = size < 0 ? NULL : malloc((size_t)size + 1);
        *out_n = text == NULL ? 0 : fread(text, 1, (size_t)size, f);
    }
    if (f != NULL)
        fclose(f);
    return text;
}

int bench_tokenize(struct bench *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    const char *dir = args_str(b->args, "model"), *file = args_str(b->args, "file");
    struct tokenizer *tok = NULL;
    struct tok_ids ids = TOK_IDS_INIT;
    size_t n = 0;
    if (dir == NULL) {
        fprintf(stderr, "arle bench: tokenize wants --model DIR\n");
        return EXIT_USAGE;
    }
    snprintf(b->label, sizeof b->label, "%.120s", strrchr(dir, '/') && strrchr(dir, '/')[1] ? strrchr(dir, '/') + 1 : dir);
    char *text = file != NULL ? read_text(file, &n) : made_up_text(&n);
    double *us = calloc((size_t)b->runs, sizeof *us);
    int r = text == NULL || us == NULL ? arle_err_set(&err, -ENOENT, "%s cannot be read", file ? file : "text")
                                       : tokenizer_open(&tok, dir, &err);
    for (long long i = -b->warmups; r == 0 && i < b->runs; i++) {
        ids.n = 0;
        int64_t t0 = clock_mono_us();
        r = tokenizer_encode(tok, text, n, 0, &ids, &err);
        if (i >= 0)
            us[i] = (double)(clock_mono_us() - t0);
    }
    if (r == 0) {
        json_object *o = bench_line(b, "tokenize");
        bench_add(o, "bytes", (double)n);
        bench_add(o, "ids", (double)ids.n);
        bench_add(o, "threads", 1);
        bench_add(o, "warmups", (double)b->warmups);
        double s = bench_times(o, us, (size_t)b->runs) / 1e6;
        bench_add(o, "mb_s", (double)n / 1e6 / s);
        bench_print(b, o);
    }
    tok_ids_fini(&ids);
    tokenizer_close(tok);
    free(text);
    free(us);
    return r < 0 ? cmd_fail(b->args, &err) : 0;
}
