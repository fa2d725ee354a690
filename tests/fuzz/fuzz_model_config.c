/* config.json as the Qwen3.5 plugin reads it: whatever is accepted must also be predictable without overflow or crash. */
#include "model.h"

#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct qwen35_config c;
    struct arle_model_desc d = { .struct_size = sizeof d };
    struct arle_err err = ARLE_ERR_INIT;
    const char *json = (const char *)data;
    int r = qwen35_config_parse(json, size, &c, &err);
    if (r < 0) {
        if (err.code != r || err.msg[0] == '\0')
            abort();
        return 0;
    }
    if (!qwen35_config_is_ours(json, size) || c.n_heads % c.n_kv != 0 || c.rot_dim > c.head_dim || c.n_layers > QWEN35_MAX_LAYERS)
        abort();
    struct arle_model_load a = { .struct_size = sizeof a, .compute = ARLE_BF16, .kv_dtype = ARLE_BF16, .page_tokens = 16,
                                 .max_tokens = 64, .max_seqs = 4, .max_rows = 4, .drafts = 1, .config_json = json, .config_len = size };
    if (qwen35_predict(NULL, &a, &d, &err) == 0 && (d.n_params == 0 || d.groups[0].page_bytes == 0))
        abort();
    return 0;
}
