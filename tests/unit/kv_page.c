/* Pools of pages and the hashes of the KV plane. */
#include "tap.h"
#include "kv/kv_hash.h"
#include "kv/page.h"

static void last_unref_returns_the_page(void)
{
    struct page_pool pool;
    REQUIRE(page_pool_init(&pool, 1, 2) == 0);
    int32_t a = page_alloc(&pool), b = page_alloc(&pool);
    EXPECT(a > 0 && b > 0 && a != b);           /* number 0 is reserved */
    EXPECT_EQ(page_alloc(&pool), -1);
    page_ref(&pool, a);
    EXPECT(!page_unref(&pool, a));
    EXPECT_EQ(pool.n_free, 0);
    EXPECT(page_unref(&pool, a));
    EXPECT_EQ(pool.n_free, 1);
    EXPECT_EQ(page_alloc(&pool), a);
    page_pool_fini(&pool);
}

static void blake2b_of_abc(void)
{
    static const uint8_t want[64] = {      /* RFC 7693, appendix A */
        0xba, 0x80, 0xa5, 0x3f, 0x98, 0x1c, 0x4d, 0x0d, 0x6a, 0x27, 0x97, 0xb6, 0x9f, 0x12, 0xf6, 0xe9, 0x4c, 0x21, 0x2f, 0x14,
        0x68, 0x5a, 0xc4, 0xb7, 0x4b, 0x12, 0xbb, 0x6f, 0xdb, 0xff, 0xa2, 0xd1, 0x7d, 0x87, 0xc5, 0x39, 0x2a, 0xab, 0x79, 0x2d,
        0xc2, 0x52, 0xd5, 0xde, 0x45, 0x33, 0xcc, 0x95, 0x18, 0xd3, 0x8a, 0xa8, 0xdb, 0xf1, 0x92, 0x5a, 0xb9, 0x23, 0x86, 0xed,
        0xd4, 0x00, 0x99, 0x23,
    };
    uint8_t got[64];
    kv_blake(got, 64, "abc", 3);
    EXPECT(memcmp(got, want, 64) == 0);
}

static void blake2b_in_pieces(void)
{
    uint8_t data[1000], one[32], two[32];
    for (int i = 0; i < 1000; i++)
        data[i] = (uint8_t)(i * 7);
    for (size_t cut = 0; cut <= 1000; cut += 61) {
        struct kv_blake b;
        kv_blake_init(&b, 32, "key", 3);
        kv_blake_update(&b, data, cut);
        kv_blake_update(&b, data + cut, 1000 - cut);
        kv_blake_final(&b, two);
        if (cut == 0)
            memcpy(one, two, 32);
        EXPECT(memcmp(one, two, 32) == 0);
    }
    kv_blake(two, 32, data, 1000);
    EXPECT(memcmp(one, two, 32) != 0);          /* the key counts */
}

static void crc32c_known_and_by_table(void)
{
    EXPECT_EQ(kv_crc32c(0, "123456789", 9), 0xE3069283u);
    EXPECT_EQ(kv_crc32c_table(0, "123456789", 9), 0xE3069283u);
    uint8_t data[300];
    for (int i = 0; i < 300; i++)
        data[i] = (uint8_t)(i * i);
    for (size_t n = 0; n < 300; n++) {
        EXPECT_EQ(kv_crc32c(0, data, n), kv_crc32c_table(0, data, n));
        EXPECT_EQ(kv_crc32c(kv_crc32c(0, data, n / 3), data + n / 3, n - n / 3), kv_crc32c(0, data, n));
    }
}

int main(void)
{
    RUN(last_unref_returns_the_page);
    RUN(blake2b_of_abc);
    RUN(blake2b_in_pieces);
    RUN(crc32c_known_and_by_table);
    return tap_done();
}
