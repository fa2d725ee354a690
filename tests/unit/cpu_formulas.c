/*
 * The published number examples of the formulas, on every kernel set, and the error bounds that the kernels state.
 * Links the plugin's own objects, so that single kernels can be called.
 */
#include "../../plugins/backend-cpu/cpu.h"
#include "tap.h"

static const struct kernels *k;

static void rms_norms(void)
{
    float x[] = { 1, -2, 3, 0.5f }, w[] = { 1, 0.5f, 2, 1.5f }, z[] = { 0.5f, -1, 2, 0 }, out[4];
    double want[] = { 1.05962574, -1.58943861, 4.76831582, 0.66226609 }, gated[] = { 0.16489348, 0.14248863, 5.59989152, 0 };
    k->rmsnorm(x, 4, 1e-6f, 1, w, out, ARLE_F32);
    for (int i = 0; i < 4; i++)
        EXPECT_NEAR(out[i], want[i], 1e-6);
    k->gated_norm(4, x, z, w, 1e-6f, out, ARLE_F32);
    for (int i = 0; i < 4; i++)
        EXPECT_NEAR(out[i], gated[i], 2e-6);
}

/* Seventeen equal channels, so that vector and tail are both seen. */
static void convolution(void)
{
    enum { C = 17 };
    double want[] = { 0.23947506, 0.82528612, 1.76159416, 2.85772238, 3.92805516 };
    float w[C * 4], u[8][C], y[C];
    for (int c = 0; c < C; c++)
        for (int i = 0; i < 8; i++) {
            u[i][c] = i < 3 ? 0 : (float)(i - 2);
            w[c * 4 + i % 4] = 0.1f * (float)(i % 4 + 1);
        }
    for (int t = 0; t < 5; t++) {
        const void *rows[4] = { u[t], u[t + 1], u[t + 2], u[t + 3] };
        k->conv(rows, w, C, ARLE_F32, y);
        for (int c = 0; c < C; c++)
            EXPECT_NEAR(y[c], want[t], 1e-6);
    }
}

/* dk = dv = 2, scale 2^-1/2, from the normalisation on. */
static void delta_rule(void)
{
    float q[3][2] = { { 1, 0.5f }, { -0.5f, 1 }, { 0.25f, -1 } }, key[3][2] = { { 0.5f, -1 }, { 1, 1 }, { -0.25f, 0.75f } };
    float v[3][2] = { { 1, 2 }, { -1, 0.5f }, { 0.5f, -0.5f } }, a[3] = { 0.1f, -0.3f, 0.7f }, b[3] = { 0.2f, -0.4f, 1 };
    double g[3] = { -1.02378509, -0.75098014, -1.55515460 }, beta[3] = { 0.54983400, 0.40131234, 0.73105858 };
    double want_o[3][2] = { { 0, 0 }, { -0.26584512, -0.30734997 }, { -0.23747344, 0.26993258 } };
    double want_s[4] = { -0.16667270, 0.18512855, 0.30450604, -0.34720902 };
    float gates[3][4], s[4] = { 0 }, o[3][2];
    for (int t = 0; t < 3; t++) {
        k->l2norm(2, 1e-6f, 1 / sqrtf(2), q[t]);
        k->l2norm(2, 1e-6f, 1, key[t]);
        double gt = -exp(0.5) * softplus_f32(a[t] - 0.25f);
        EXPECT_NEAR(gt, g[t], 1e-6);
        gates[t][0] = (float)exp(gt);
        gates[t][1] = sigmoid_f32(b[t]);
        EXPECT_NEAR(gates[t][1], beta[t], 1e-6);
        gates[t][2] = k->dot(2, q[t], key[t]);
    }
    struct gdn_slice sl = { .dk = 2, .cols = 2, .n_tokens = 3, .s = s, .ld_s = 2, .q = q[0], .k = key[0], .v = v[0], .ld_qkv = 2,
                            .gates = gates[0], .ld_gates = 4, .o = o[0], .ld_o = 2 };
    k->gdn(&sl);
    for (int i = 0; i < 6; i++)
        EXPECT_NEAR(o[i / 2][i % 2], want_o[i / 2][i % 2], 1e-6);
    for (int i = 0; i < 4; i++)
        EXPECT_NEAR(s[i], want_s[i], 1e-6);
}

static void exponentials(void)
{
    double worst = 0;
    float in[64], out[64];
    for (int i = 0; i < 400000; i += 64) {
        for (int j = 0; j < 64; j++)
            in[j] = -103.0f + (float)(i + j) * (103.0f + 88.5f) / 400064;
        k->exps(64, in, 0, 1, out);
        for (int j = 0; j < 64; j++) {
            double e = exp((double)in[j]), err = fabs(out[j] - e) / (e > 0x1p-126 ? e * 0x1p-23 : 0x1p-149);
            worst = err > worst ? err : worst;
        }
    }
    if (!(worst <= 2))
        TAP_FAIL("%s: exp is off by %.2f units in the last place", k->name, worst);
    float edge[16] = { -INFINITY, INFINITY, NAN, 0, -1000, 1000, -104.5f };
    k->exps(16, edge, 0, 1, out);
    EXPECT(out[0] == 0 && out[1] == INFINITY && isnan(out[2]) && out[3] == 1 && out[4] == 0 && out[5] == INFINITY && out[6] == 0);
}

static void angles(void)
{
    double worst = 0;
    float freq[16], cs[32];
    for (int pos = 0; pos < 1000000; pos += pos < 2000 ? 1 : 211) {
        for (int j = 0; j < 16; j++)
            freq[j] = (float)pow(1e7, -j / 16.0);
        k->sincos(16, (float)pos, freq, 1, cs);
        for (int j = 0; j < 16; j++) {
            double a = (float)pos * freq[j], e = fmax(fabs(cs[j] - cos(a)), fabs(cs[16 + j] - sin(a)));
            worst = e > worst ? e : worst;
        }
    }
    if (!(worst <= 1.5e-7))
        TAP_FAIL("%s: sine or cosine is off by %.3g", k->name, worst);
    freq[0] = 1;
    k->sincos(1, 3e8f, freq, 1, cs);
    EXPECT_NEAR(cs[0], cos(3e8), 1e-6);
    EXPECT_NEAR(cs[1], sin(3e8), 1e-6);
}

static void silu_and_sigmoid(void)
{
    double worst = 0;
    float g[16], u[16], out[16];
    for (int i = 0; i < 16; i++)
        u[i] = 1;
    for (int i = 0; i < 200000; i += 16) {
        for (int j = 0; j < 16; j++)
            g[j] = -80 + (float)(i + j) * 160 / 200000;
        k->silu_mul(g, u, 16, 0, 1, out, ARLE_F32, ARLE_F32);
        for (int j = 0; j < 16; j++) {
            double e = g[j] / (1 + exp(-(double)g[j])), err = fabs(out[j] - e) / (fabs(e) * 0x1p-23 + 1e-45);
            worst = err > worst ? err : worst;
        }
    }
    if (!(worst <= 4))
        TAP_FAIL("%s: silu is off by %.2f units in the last place", k->name, worst);
}

static void bf16_rounding_agrees_with_the_scalar_form(void)
{
    float x[32];
    uint16_t h[32];
    uint64_t z = 1;
    for (int i = 0; i < 100000; i += 32) {
        for (int j = 0; j < 32; j++) {
            z = z * 6364136223846793005u + 1442695040888963407u;
            x[j] = bits_f32((uint32_t)(z >> 32));               /* all kinds, NaN and infinity among them */
        }
        k->store_row(x, 29, h, ARLE_BF16, false);
        for (int j = 0; j < 29; j++)
            if (h[j] != f32_to_bf16(x[j]))
                TAP_FAIL("%s: %08x became %04x, expected %04x", k->name, f32_bits(x[j]), h[j], f32_to_bf16(x[j]));
    }
}

static void small_formats_round_trip(void)
{
    for (unsigned c = 0; c < 256; c++)
        if ((c & 0x7f) != 0x7f)
            EXPECT_EQ(f32_to_e4m3(e4m3_to_f32((uint8_t)c)), c);
    for (unsigned h = 0; h < 0x10000; h++)
        if ((h & 0x7fff) <= 0x7c00)
            EXPECT_EQ(f32_to_f16(f16_to_f32((uint16_t)h)), h);
    EXPECT_EQ(f32_to_e4m3(1000), 0x7e);
    EXPECT_EQ(f32_to_e4m3(464), 0x7e);
    EXPECT_EQ(f32_to_e4m3(0x1p-10f), 0);            /* half of the smallest: to even */
    EXPECT_EQ(f32_to_e4m3(0x1.8p-10f), 1);
    EXPECT_EQ(f32_to_e4m3(17), 0x58);               /* between 16 and 18: to even */
    EXPECT_EQ(f32_to_f16(65519.99f), 0x7bff);
    EXPECT_EQ(f32_to_f16(65520), 0x7c00);
    float s, out[16];
    uint8_t codes[16];
    for (unsigned c = 0; c < 256; c += 16) {        /* the vector decoder over all codes */
        s = 1;
        for (unsigned i = 0; i < 16; i++)
            codes[i] = (uint8_t)(c + i);
        k->dequant(codes, &s, ARLE_F8E4M3, 16, out);
        for (unsigned i = 0; i < 16; i++)
            EXPECT(out[i] == e4m3_to_f32(codes[i]) || (isnan(out[i]) && (codes[i] & 0x7f) == 0x7f));
    }
}

struct tally { _Atomic unsigned runs[8]; _Atomic unsigned calls; };

static void tally_part(void *arg, unsigned part, unsigned n_parts)
{
    struct tally *t = arg;
    atomic_fetch_add(&t->runs[part], 1);
    atomic_fetch_add(&t->calls, n_parts);
}

static void every_part_runs_once(void)
{
    struct pool *p;
    struct tally t = { 0 };
    REQUIRE(pool_create(5, false, &p, NULL) == 0);
    for (int i = 0; i < 20000; i++)
        pool_run(p, 1 + (unsigned)i % 7, tally_part, &t);
    unsigned want[5] = { 0 };
    for (int i = 0; i < 20000; i++)
        for (unsigned j = 0; j < (1 + (unsigned)i % 7 < 5 ? 1 + (unsigned)i % 7 : 5); j++)
            want[j]++;
    for (int j = 0; j < 5; j++)
        EXPECT_EQ(t.runs[j], want[j]);
    pool_destroy(p);
}

int main(void)
{
    const struct kernels *sets[] = { &kernels_ref, kernels_avx2(), kernels_avx512(), kernels_avx512bf16() };
    for (unsigned i = 0; i < sizeof sets / sizeof *sets; i++) {
        k = sets[i];
        if (k == NULL)
            continue;
        RUN(rms_norms);
        RUN(convolution);
        RUN(delta_rule);
        RUN(exponentials);
        RUN(angles);
        RUN(silu_and_sigmoid);
        RUN(bf16_rounding_agrees_with_the_scalar_form);
        RUN(small_formats_round_trip);
    }
    RUN(every_part_runs_once);
    return tap_done();
}
