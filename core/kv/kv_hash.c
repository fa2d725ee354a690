/* BLAKE2b after RFC 7693, CRC32C (polynomial 0x1EDC6F41, reflected), and a multiply-and-fold table hash; see kv_hash.h. */
#include "kv/kv_hash.h"

#include <pthread.h>
#include <string.h>

static const uint64_t IV[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

static const uint8_t SIGMA[12][16] = {
    { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }, { 14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3 },
    { 11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4 }, { 7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8 },
    { 9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13 }, { 2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9 },
    { 12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11 }, { 13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10 },
    { 6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5 }, { 10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0 },
    { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }, { 14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3 },
};

static inline uint64_t rotr(uint64_t x, int n)
{
    return x >> n | x << (64 - n);
}

#define MIX(a, b, c, d, x, y) do { \
    v[a] += v[b] + (x); v[d] = rotr(v[d] ^ v[a], 32); v[c] += v[d]; v[b] = rotr(v[b] ^ v[c], 24); \
    v[a] += v[b] + (y); v[d] = rotr(v[d] ^ v[a], 16); v[c] += v[d]; v[b] = rotr(v[b] ^ v[c], 63); } while (0)

static void blake_block(struct kv_blake *b, const uint8_t *in, uint64_t last)
{
    uint64_t v[16], m[16];
    memcpy(m, in, sizeof m);
    for (int i = 0; i < 8; i++) {
        v[i] = b->h[i];
        v[i + 8] = IV[i];
    }
    v[12] ^= b->t;              /* inputs stay far below 2^64 bytes: the high counter word is zero */
    v[14] ^= last;
    for (int r = 0; r < 12; r++) {
        const uint8_t *s = SIGMA[r];
        MIX(0, 4, 8, 12, m[s[0]], m[s[1]]);
        MIX(1, 5, 9, 13, m[s[2]], m[s[3]]);
        MIX(2, 6, 10, 14, m[s[4]], m[s[5]]);
        MIX(3, 7, 11, 15, m[s[6]], m[s[7]]);
        MIX(0, 5, 10, 15, m[s[8]], m[s[9]]);
        MIX(1, 6, 11, 12, m[s[10]], m[s[11]]);
        MIX(2, 7, 8, 13, m[s[12]], m[s[13]]);
        MIX(3, 4, 9, 14, m[s[14]], m[s[15]]);
    }
    for (int i = 0; i < 8; i++)
        b->h[i] ^= v[i] ^ v[i + 8];
}

void kv_blake_init(struct kv_blake *b, size_t out_len, const void *key, size_t key_len)
{
    memset(b, 0, sizeof *b);
    memcpy(b->h, IV, sizeof IV);
    b->h[0] ^= 0x01010000 ^ (uint64_t)key_len << 8 ^ out_len;
    b->out_len = out_len;
    if (key_len > 0) {
        memcpy(b->buf, key, key_len);
        b->fill = sizeof b->buf;
    }
}

void kv_blake_update(struct kv_blake *b, const void *data, size_t len)
{
    const uint8_t *p = data;
    while (len > 0) {
        if (b->fill == sizeof b->buf) {         /* only when more follows: the last block is marked in final */
            b->t += sizeof b->buf;
            blake_block(b, b->buf, 0);
            b->fill = 0;
        }
        size_t take = sizeof b->buf - b->fill < len ? sizeof b->buf - b->fill : len;
        memcpy(b->buf + b->fill, p, take);
        b->fill += take;
        p += take;
        len -= take;
    }
}

void kv_blake_final(struct kv_blake *b, void *out)
{
    b->t += b->fill;
    memset(b->buf + b->fill, 0, sizeof b->buf - b->fill);
    blake_block(b, b->buf, ~0ull);
    memcpy(out, b->h, b->out_len);
}

void kv_blake(void *out, size_t out_len, const void *data, size_t len)
{
    struct kv_blake b;
    kv_blake_init(&b, out_len, NULL, 0);
    kv_blake_update(&b, data, len);
    kv_blake_final(&b, out);
}

static uint32_t crc_table[8][256];

static void crc_table_make(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c >> 1 ^ (0x82F63B78u & (0u - (c & 1)));
        crc_table[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
        for (uint32_t i = 0; i < 256; i++)
            crc_table[t][i] = crc_table[t - 1][i] >> 8 ^ crc_table[0][crc_table[t - 1][i] & 255];
}

uint32_t kv_crc32c_table(uint32_t crc, const void *data, size_t len)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, crc_table_make);
    const uint8_t *p = data;
    crc = ~crc;
    for (; len >= 8; p += 8, len -= 8) {
        uint64_t x;
        memcpy(&x, p, 8);
        x ^= crc;
        crc = 0;
        for (int t = 0; t < 8; t++)
            crc ^= crc_table[7 - t][x >> 8 * t & 255];
    }
    for (; len > 0; p++, len--)
        crc = crc >> 8 ^ crc_table[0][(crc ^ *p) & 255];
    return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_sse42(uint32_t crc, const uint8_t *p, size_t len)
{
    uint64_t c = ~crc;
    for (; len >= 8; p += 8, len -= 8) {
        uint64_t x;
        memcpy(&x, p, 8);
        c = __builtin_ia32_crc32di(c, x);
    }
    for (; len > 0; p++, len--)
        c = __builtin_ia32_crc32qi((uint32_t)c, *p);
    return ~(uint32_t)c;
}
#endif

uint32_t kv_crc32c(uint32_t crc, const void *data, size_t len)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return crc_sse42(crc, data, len);
#endif
    return kv_crc32c_table(crc, data, len);
}

uint64_t kv_hash64(uint64_t seed, const void *data, size_t len)
{
    const uint8_t *p = data;
    uint64_t h = seed ^ 0x9e3779b97f4a7c15u ^ len;
    while (len > 0) {
        uint64_t x = 0;
        size_t take = len < 8 ? len : 8;
        memcpy(&x, p, take);
        __uint128_t m = (__uint128_t)(h ^ x) * 0xd6e8feb86659fd93u;
        h = (uint64_t)m ^ (uint64_t)(m >> 64);
        h += 0x9e3779b97f4a7c15u;
        p += take;
        len -= take;
    }
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 29;
}
