/* The gated delta net: arguments of its kernels, and where the state of a sequence lies. */
#ifndef BACKEND_CUDA_GDN_CUH
#define BACKEND_CUDA_GDN_CUH

#include "wgmma.cuh"

namespace {

const int kDim = 128, kChunk = 64, kStepLimit = 16;
const int kTickets = 65536;     /* of sequences and key heads; behind them the count of decode pairs taken */

struct gdn_args {
    int n_k, n_v, ratio, n_conv, seq0, n_seqs;
    float eps;
    const bf16 *proj; int64_t ld_proj, u_off, z_off, a_off, b_off;
    const float *conv_w, *A_log, *dt_bias, *norm_w;
    char *conv_base; size_t conv_stride, conv_offset;
    char *s_base; size_t s_stride, s_offset;
    const int32_t *cu, *slot;
    bf16 *out; int64_t ld_out;
    unsigned *tickets;
    int n_saves;
    arle_save saves[ARLE_MAX_SAVES];
    /* chunked form */
    int tok0;                   /* first token of the chunked part of the batch */
    bf16 *qkv;                  /* [tokens][n_conv], from tok0 */
    bf16 *ut;                   /* [chunks][n_v][128][64] */
    bf16 *w;                    /* [chunks][n_v][64][128] */
    bf16 *p;                    /* [chunks][n_v][64][64] */
    float *decay;               /* [chunks][n_v][2][64]: e^gamma, e^(Gamma - gamma) */
    unsigned char *kq;          /* [chunks][n_k][kKQ] */
    unsigned char *rec;         /* [chunks][n_v][kRec] */
    unsigned char *sums;        /* [n_seqs][n_v][kSums]: where helpers of two column halves exchange sums of squares; NULL: they do not */
};

__device__ __forceinline__ bf16 *conv_state(const gdn_args &a, int s)
{
    return (bf16 *)(a.conv_base + (size_t)a.slot[s] * a.conv_stride + a.conv_offset);
}

__device__ __forceinline__ float *s_of_slot(const gdn_args &a, int slot, int h)
{
    return (float *)(a.s_base + (size_t)slot * a.s_stride + a.s_offset) + (int64_t)h * kDim * kDim;
}

__device__ __forceinline__ float *s_state(const gdn_args &a, int s, int h) { return s_of_slot(a, a.slot[s], h); }

/* The next state of sequence s to keep: after how many of its new tokens (more than n; INT_MAX: none), and in which slot. */
struct gdn_due { int n, slot; };

__device__ __forceinline__ gdn_due next_save(const gdn_args &a, int s, int n)
{
    gdn_due due = { 0x7FFFFFFF, 0 };
    for (int i = 0; i < a.n_saves; i++)
        if (a.saves[i].seq == (uint32_t)s && (int)a.saves[i].n_tokens > n && (int)a.saves[i].n_tokens < due.n)
            due = { (int)a.saves[i].n_tokens, (int)a.saves[i].slot };
    return due;
}

__device__ __forceinline__ float decay_log(float A_log, float x)
{
    float sp = x > 20.f ? x : log1pf(expf(x));
    return -expf(A_log) * sp;
}

/* Input channel c of the token `back` places before the piece's token i; earlier ones are in the state. */
__device__ __forceinline__ float conv_in(const gdn_args &a, const bf16 *rec, int t0, int i, int c)
{
    return i >= 0 ? __bfloat162float(a.proj[(int64_t)(t0 + i) * a.ld_proj + a.u_off + c])
                  : __bfloat162float(rec[(int64_t)(3 + i) * a.n_conv + c]);
}

} // namespace

#endif
