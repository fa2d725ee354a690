/*
 * Hashes of the KV plane: BLAKE2b (RFC 7693) for keys, salts and chunk identity, CRC32C (Castagnoli) for what is stored, and a
 * quick 64-bit hash for tables in memory (tokens are compared on every hit, so that one only has to spread well). Pure.
 */
#ifndef CORE_KV_HASH_H
#define CORE_KV_HASH_H

#include <stddef.h>
#include <stdint.h>

struct kv_blake {
    uint64_t h[8], t;
    uint8_t buf[128];
    size_t fill, out_len;
};

/** out_len 1..64; key may be NULL (key_len 0), at most 64 bytes. */
void kv_blake_init(struct kv_blake *b, size_t out_len, const void *key, size_t key_len);
void kv_blake_update(struct kv_blake *b, const void *data, size_t len);
void kv_blake_final(struct kv_blake *b, void *out);
void kv_blake(void *out, size_t out_len, const void *data, size_t len);

/** CRC32C of data, continuing from crc (0 to start). Uses the CPU's instruction when present. */
uint32_t kv_crc32c(uint32_t crc, const void *data, size_t len);
/** The same by table, for CPUs without it and for the test that compares the two. */
uint32_t kv_crc32c_table(uint32_t crc, const void *data, size_t len);

uint64_t kv_hash64(uint64_t seed, const void *data, size_t len);

#endif
