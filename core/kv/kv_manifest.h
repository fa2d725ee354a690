/* Records of the manifest log, for kv_disk.c only; reading is in kv_disk.h. */
#ifndef CORE_KV_MANIFEST_H
#define CORE_KV_MANIFEST_H

#include "kv/kv_disk.h"

#include <stddef.h>

#define MANIFEST_RECORD_HEAD 16u
#define MANIFEST_REF_BYTES 36u
#define MANIFEST_DEL_SIZE (MANIFEST_RECORD_HEAD + 8)
enum { MANIFEST_PUT = 1, MANIFEST_DEL = 2 };

size_t manifest_header_size(const char *identity);
void manifest_header(uint8_t *out, const char *identity);
size_t manifest_put_size(const struct kv_disk_object *o, uint32_t n_refs);
void manifest_put(uint8_t *out, const struct kv_disk_object *o, const struct kv_chunk_ref *refs, uint32_t n_refs);
void manifest_del(uint8_t out[MANIFEST_DEL_SIZE], uint64_t id);

#endif
