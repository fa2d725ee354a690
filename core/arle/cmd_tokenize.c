/* `arle tokenize`: text on standard input, a JSON array of ids on standard output. */
#include <limits.h>

#include "arle/cmd.h"
#include "chat/tokenizer.h"
#include "daemon/host.h"
#include "util/sbuf.h"

static int print_ids(const struct args *a, const struct tokenizer *tok, const struct sbuf *text)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct tok_ids ids = TOK_IDS_INIT;
    if (tokenizer_encode(tok, sbuf_text(text), text->n, args_flag(a, "no-special") ? 0 : TOK_ALLOW_SPECIAL, &ids, &err) < 0)
        return cmd_fail(a, &err);
    putchar('[');
    for (size_t i = 0; i < ids.n; i++)
        printf(i ? ", %d" : "%d", ids.ids[i]);
    puts("]");
    tok_ids_fini(&ids);
    return EXIT_OK;
}

static int run_tokenize(const struct args *a)
{
    char path[PATH_MAX], buf[65536];
    struct arle_err err = ARLE_ERR_INIT;
    struct tokenizer *tok;
    struct sbuf text = SBUF_INIT;
    const char *dir = args_str(a, "model");
    size_t n;
    if (dir == NULL && host_default_model(path, sizeof path, &err) < 0)
        return cmd_fail(a, &err);
    if (tokenizer_open(&tok, dir != NULL ? dir : path, &err) < 0)
        return cmd_fail(a, &err);
    while ((n = fread(buf, 1, sizeof buf, stdin)) > 0)
        sbuf_add(&text, buf, n);
    int status = text.failed || ferror(stdin) ? EXIT_FAILED : print_ids(a, tok, &text);
    sbuf_fini(&text);
    tokenizer_close(tok);
    return status;
}

static const struct option_row options[] = {
    { "model", 'm', "DIR", "Folder with tokenizer.json. Without it, the shipped model." },
    { "no-special", 0, NULL, "Takes literals of special tokens as ordinary text." },
    { NULL, 0, NULL, NULL },
};

const struct command cmd_tokenize = {
    .name = "tokenize", .args = "", .max_args = 0,
    .summary = "Turns text into token ids.",
    .help = "Reads standard input as it is, its last newline included, and prints one JSON array.\n",
    .options = options, .run = run_tokenize,
};
