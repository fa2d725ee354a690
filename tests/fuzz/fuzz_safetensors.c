/* safetensors headers, and (inputs that start with 'I') the index of shards. Every byte that is accepted is read. */
#include "weights/index.h"
#include "weights/weights.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void index_target(const char *text, size_t len)
{
    struct weights_index ix;
    struct arle_err err = ARLE_ERR_INIT;
    if (weights_index_parse("index", text, len, &ix, &err) < 0)
        return;
    for (size_t i = 0; i < ix.n_places; i++)
        if (ix.place[i].shard >= ix.n_shards || strchr(ix.shard[ix.place[i].shard], '/') != NULL)
            abort();
    weights_index_fini(&ix);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size > 0 && data[0] == 'I') {
        index_target((const char *)data + 1, size - 1);
        return 0;
    }
    struct arle_weights *w;
    struct arle_err err = ARLE_ERR_INIT;
    int r = weights_from_memory("input", data, size, &w, &err);
    if (r < 0) {
        if (err.code != r || err.msg[0] == '\0')
            abort();        /* a refusal without a reason */
        return 0;
    }
    volatile unsigned sum = 0;
    for (size_t i = 0; i < weights_count(w, NULL); i++) {
        const struct arle_tensor *t = w->at(w, i);
        if (w->find(w, t->name) != t)
            abort();
        for (size_t j = 0; j < t->bytes; j++)
            sum += ((const unsigned char *)t->data)[j];
        w->done(w, t);
    }
    if (weights_unclaimed(w, &err) != 0)
        abort();
    weights_close(w);
    return 0;
}
