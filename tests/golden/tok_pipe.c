/*
 * Encodes texts from stdin for tokenizer_hf.t: frames of a 4-byte native length and that many bytes in, frames of a
 * count and that many 4-byte ids out. Usage: tok_pipe MODEL_DIR FLAGS
 */
#include <stdio.h>
#include <stdlib.h>

#include "chat/tokenizer.h"

int main(int argc, char **argv)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct tokenizer *tok;
    if (argc != 3 || tokenizer_open_opts(&tok, &(struct tokenizer_opts){ argv[1], "" }, &err) < 0) {
        fprintf(stderr, "tok_pipe: %s\n", argc != 3 ? "usage: tok_pipe MODEL_DIR FLAGS" : err.msg);
        return 1;
    }
    fprintf(stderr, "# pre-tokeniser %s\n", tokenizer_pretok_name(tok));
    struct tok_ids ids = TOK_IDS_INIT;
    uint32_t len;
    int rc = 0;
    while (rc == 0 && fread(&len, sizeof len, 1, stdin) == 1) {
        char *text = malloc((size_t)len + 1);
        ids.n = 0;
        if (text == NULL || fread(text, 1, len, stdin) != len ||
            tokenizer_encode(tok, text, len, (unsigned)atoi(argv[2]), &ids, &err) < 0) {
            fprintf(stderr, "tok_pipe: %s\n", err.msg);
            rc = 1;
        }
        uint32_t n = (uint32_t)ids.n;
        fwrite(&n, sizeof n, 1, stdout);
        fwrite(ids.ids, sizeof ids.ids[0], ids.n, stdout);
        free(text);
    }
    tok_ids_fini(&ids);
    tokenizer_close(tok);
    return rc;
}
