/* Manifest reader: no crash, no claim beyond the file, and what it hands out is sound. */
#include "kv/kv_disk.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void put(void *arg, const struct kv_disk_object *o, const struct kv_chunk_ref *refs, uint32_t n)
{
    uint64_t *sum = arg, bytes = 0;
    for (uint32_t i = 0; i < n; i++)
        bytes += refs[i].len;
    for (uint32_t i = 0; i < o->n_tokens; i++)
        *sum += (uint32_t)o->tokens[i];
    if (bytes != o->bytes || o->parent >= o->id || (o->parent == 0) != (o->salt != NULL))
        abort();
    for (uint32_t i = 0; o->salt != NULL && i < KV_DISK_SALT; i++)
        *sum += o->salt[i];
}

static void del(void *arg, uint64_t id)
{
    *(uint64_t *)arg += id;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint64_t sum = 0, skipped = 0;
    struct kv_manifest_sink sink = { .arg = &sum, .put = put, .del = del };
    int64_t end = kv_manifest_parse(data, size, NULL, &sink, &skipped);
    if (end < 0 || (uint64_t)end > size || skipped > size)
        abort();
    kv_manifest_parse(data, size, "some identity", &sink, &skipped);
    return 0;
}
