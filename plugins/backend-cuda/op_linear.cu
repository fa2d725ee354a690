/*
 * linear, norm_linear, gate_up. Where the GPU has a copy engine that gemm_tma can use, 1 and 2 rows go through gemv, 3 to tma_rows (64)
 * through gemm_tma; elsewhere up to 4 through gemv and up to stream_rows (8) through gemm_stream. More rows go to cuBLASLt, and gate_up
 * of many rows to gemm_wide. In deterministic mode everything goes through gemm_stream, 64 rows at a time.
 */
#include "gemm_tma.cuh"
#include "gemm_wide.cuh"
#include "gemv.cuh"
#include <errno.h>

/* One matmul shape with the algorithm cuBLASLt's heuristic chose for it. */
struct lt_plan {
    int64_t n, k, rows, ld_x, ld_y;
    bool f32_out, accumulate;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
    lt_plan *next;
};

namespace {

const int kPlanSlots = 256, kStreamRows = 64;

unsigned plan_slot(int64_t n, int64_t k, int64_t rows)
{
    return (unsigned)((n * 31 + k) * 31 + rows) % kPlanSlots;
}

int lt_fail(arle_device *dev, const char *what, cublasStatus_t s)
{
    char text[128];
    snprintf(text, sizeof text, "%s: %s", what, cublasLtGetStatusString(s));
    return cuda_fail(dev, cudaErrorUnknown, text, __FILE__, __LINE__);
}

#define LT_TRY(dev, call) do { \
        cublasStatus_t s_ = (call); \
        if (s_ != CUBLAS_STATUS_SUCCESS) \
            return lt_fail((dev), #call, s_); \
    } while (0)

int plan_fill(arle_device *dev, lt_plan *p)
{
    cublasOperation_t yes = CUBLAS_OP_T, no = CUBLAS_OP_N;
    cudaDataType_t out = p->f32_out ? CUDA_R_32F : CUDA_R_16BF;
    LT_TRY(dev, cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT_TRY(dev, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof yes));
    LT_TRY(dev, cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &no, sizeof no));
    /* Column-major in cuBLAS' eyes: y^T [n, rows] = W [n, k] x^T [k, rows]. */
    LT_TRY(dev, cublasLtMatrixLayoutCreate(&p->a, CUDA_R_16BF, p->k, p->n, p->k));
    LT_TRY(dev, cublasLtMatrixLayoutCreate(&p->b, CUDA_R_16BF, p->k, p->rows, p->ld_x));
    LT_TRY(dev, cublasLtMatrixLayoutCreate(&p->c, out, p->n, p->rows, p->ld_y));
    cublasLtMatmulPreference_t pref;
    LT_TRY(dev, cublasLtMatmulPreferenceCreate(&pref));
    LT_TRY(dev, cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &dev->lt_work_bytes,
                                                     sizeof dev->lt_work_bytes));
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(dev->lt, p->op, p->a, p->b, p->c, p->c, pref, 1, &best, &found);
    cublasLtMatmulPreferenceDestroy(pref);
    if (s != CUBLAS_STATUS_SUCCESS || found == 0)
        return lt_fail(dev, "cublasLtMatmulAlgoGetHeuristic", s);
    p->algo = best.algo;
    return 0;
}

void plan_free(lt_plan *p)
{
    if (p->op != NULL)
        cublasLtMatmulDescDestroy(p->op);
    cublasLtMatrixLayout_t all[] = { p->a, p->b, p->c };
    for (cublasLtMatrixLayout_t l : all)
        if (l != NULL)
            cublasLtMatrixLayoutDestroy(l);
    free(p);
}

int plan_get(arle_device *dev, const lt_plan *want, lt_plan **out)
{
    if (dev->plans == NULL && (dev->plans = (lt_plan *)calloc(kPlanSlots, sizeof *dev->plans)) == NULL)
        return -ENOMEM;
    lt_plan *head = &dev->plans[plan_slot(want->n, want->k, want->rows)];
    for (lt_plan *p = head->next; p != NULL; p = p->next) {
        if (p->n == want->n && p->k == want->k && p->rows == want->rows && p->ld_x == want->ld_x && p->ld_y == want->ld_y
            && p->f32_out == want->f32_out && p->accumulate == want->accumulate) {
            *out = p;
            return 0;
        }
    }
    lt_plan *p = (lt_plan *)calloc(1, sizeof *p);
    if (p == NULL)
        return -ENOMEM;
    *p = *want;
    int r = plan_fill(dev, p);
    if (r < 0) {
        plan_free(p);
        return r;
    }
    p->next = head->next;
    head->next = p;
    *out = p;
    return 0;
}

int stream_rows(arle_device *dev, cudaStream_t st, gemm_args a, int out)
{
    int rows = a.rows;
    size_t item = out == GEMM_F32 || out == GEMM_F32_ADD ? 4 : 2;
    for (int t = 0; t < rows; t += kStreamRows) {
        gemm_args b = a;
        b.rows = rows - t < kStreamRows ? rows - t : kStreamRows;
        b.x = a.x + t * a.ld_x;
        b.y = (char *)a.y + t * a.ld_y * item;
        int r = gemm_stream<false>(dev, st, b, out, b.rows);
        if (r < 0)
            return r;
    }
    return 0;
}

gemm_args product(const arle_weight *w, const bf16 *x, int64_t ld_x, int64_t rows, void *y, int64_t ld_y)
{
    gemm_args a = {};
    a.w = w->data;
    a.x = x;
    a.ld_x = ld_x;
    a.y = y;
    a.ld_y = ld_y;
    a.n = (int)w->n;
    a.n_out = (int)w->n_real;
    a.k = (int)w->k;
    a.rows = (int)rows;
    return a;
}

int matmul(arle_device *dev, cudaStream_t st, const arle_weight *w, const bf16 *x, int64_t ld_x, int64_t rows, void *y, int64_t ld_y,
           bool f32_out, bool accumulate)
{
    gemm_args a = product(w, x, ld_x, rows, y, ld_y);
    int out = f32_out ? (accumulate ? GEMM_F32_ADD : GEMM_F32) : (accumulate ? GEMM_BF16_ADD : GEMM_BF16);
    a.out = out;
    if (gemm_tma_fits(dev, a, false))
        return gemm_tma(dev, st, tma_args{ a });
    if (rows > dev->stream_rows && !dev->deterministic)
        return lt_matmul(dev, st, w->data, w->n, w->k, x, ld_x, rows, y, ld_y, f32_out, accumulate);
    gemv_args v = {};
    v.g = a;
    if (!dev->deterministic && gemv_fits(v))
        return gemv(dev, st, v);
    return stream_rows(dev, st, a, out);
}

/* The same product as a gemv with its norm, for more rows; false where that is not to be had. */
bool normed_tma(arle_device *dev, cudaStream_t st, const gemv_args &v, int *out_r)
{
    if (!gemm_tma_fits(dev, v.g, v.norm_w != NULL))
        return false;
    tma_args a = {};
    a.g = v.g;
    a.norm_w = v.norm_w;
    a.eps = v.eps;
    a.w_offset = v.w_offset;
    *out_r = gemm_tma(dev, st, a);
    return true;
}

bool aligned_rows(const void *p, int64_t ld) { return ((uintptr_t)p & 15) == 0 && ld % 8 == 0; }

bool is_matrix(const arle_weight *w) { return w != NULL && w->data != NULL && w->n_experts == 1; }

} // namespace

void lt_plans_free(arle_device *dev)
{
    if (dev->plans == NULL)
        return;
    for (int i = 0; i < kPlanSlots; i++) {
        for (lt_plan *p = dev->plans[i].next, *next; p != NULL; p = next) {
            next = p->next;
            plan_free(p);
        }
    }
    free(dev->plans);
    dev->plans = NULL;
}

int lt_matmul(arle_device *dev, cudaStream_t st, const bf16 *w, int64_t n, int64_t k, const bf16 *x, int64_t ld_x, int64_t rows,
              void *y, int64_t ld_y, bool f32_out, bool accumulate)
{
    lt_plan want = {};
    want.n = n;
    want.k = k;
    want.rows = rows;
    want.ld_x = ld_x;
    want.ld_y = ld_y;
    want.f32_out = f32_out;
    want.accumulate = accumulate;
    lt_plan *p = NULL;
    int r = plan_get(dev, &want, &p);
    if (r < 0)
        return r;
    float one = 1.f, beta = accumulate ? 1.f : 0.f;
    LT_TRY(dev, cublasLtMatmul(dev->lt, p->op, &one, w, p->a, x, p->b, &beta, y, p->c, y, p->c, &p->algo, dev->lt_work,
                               dev->lt_work_bytes, st));
    bump(dev, COUNT_GEMM_LT);
    return 0;
}

extern "C" int cuda_linear(struct arle_device *dev, struct arle_stream *st, const struct arle_linear_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || (a->out_dtype != ARLE_BF16 && a->out_dtype != ARLE_F32) || !is_matrix(a->w)
        || !aligned_rows(a->x, a->ld_x))
        return -EINVAL;
    return matmul(dev, cs(st), a->w, (const bf16 *)a->x, a->ld_x, a->n_tokens, a->y, a->ld_y, a->out_dtype == ARLE_F32,
                  a->accumulate != 0);
}

extern "C" int cuda_norm_linear(struct arle_device *dev, struct arle_stream *st, const struct arle_norm_linear_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || (a->out_dtype != ARLE_BF16 && a->out_dtype != ARLE_F32) || !is_matrix(a->w) || a->scratch == NULL)
        return -EINVAL;
    gemv_args v = {};
    v.g = product(a->w, (const bf16 *)a->x, a->ld_x, a->n_tokens, a->y, a->ld_y);
    v.g.out = a->out_dtype == ARLE_F32 ? GEMM_F32 : GEMM_BF16;
    v.norm_w = a->norm_w;
    v.eps = a->eps;
    v.w_offset = a->w_offset;
    int r;
    if (normed_tma(dev, cs(st), v, &r))
        return r;
    if (!dev->deterministic && gemv_fits(v) && aligned_rows(a->x, a->ld_x))
        return gemv(dev, cs(st), v);
    arle_rmsnorm_args n = {};
    n.dtype = a->dtype;
    n.n_tokens = a->n_tokens;
    n.dim = (uint32_t)a->w->k;
    n.eps = a->eps;
    n.w_offset = a->w_offset;
    n.x = a->x;
    n.ld_x = a->ld_x;
    n.w = a->norm_w;
    n.out = a->scratch;
    n.ld_out = a->w->k;
    r = launch_rmsnorm(dev, cs(st), &n);
    if (r < 0)
        return r;
    return matmul(dev, cs(st), a->w, (const bf16 *)a->scratch, a->w->k, a->n_tokens, a->y, a->ld_y, a->out_dtype == ARLE_F32, false);
}

extern "C" int cuda_gate_up(struct arle_device *dev, struct arle_stream *st, const struct arle_gate_up_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || !is_matrix(a->w) || a->w->role != ARLE_W_GATE_UP || a->scratch == NULL)
        return -EINVAL;
    const bf16 *x = (const bf16 *)a->x;
    int64_t ld_x = a->ld_x;
    const arle_weight *w = a->w;
    gemv_args v = {};
    v.g = product(w, x, ld_x, a->n_tokens, a->out, a->ld_out);
    v.g.out = GEMM_SILU;
    v.g.limit = a->limit;
    v.norm_w = a->norm_w;
    v.eps = a->eps;
    v.w_offset = a->w_offset;
    int r;
    if (normed_tma(dev, cs(st), v, &r))
        return r;
    if (!dev->deterministic && gemv_fits(v) && aligned_rows(x, ld_x))
        return gemv(dev, cs(st), v);
    if (a->norm_w != NULL) {
        arle_rmsnorm_args n = {};
        n.dtype = a->dtype;
        n.n_tokens = a->n_tokens;
        n.dim = (uint32_t)w->k;
        n.eps = a->eps;
        n.w_offset = a->w_offset;
        n.x = x;
        n.ld_x = ld_x;
        n.w = a->norm_w;
        n.out = a->scratch;
        n.ld_out = w->k;
        r = launch_rmsnorm(dev, cs(st), &n);
        if (r < 0)
            return r;
        x = (const bf16 *)a->scratch;
        ld_x = w->k;
    }
    if (!aligned_rows(x, ld_x))
        return -EINVAL;
    gemm_args g = product(w, x, ld_x, a->n_tokens, a->out, a->ld_out);
    g.limit = a->limit;
    g.out = GEMM_SILU;
    if (gemm_tma_fits(dev, g, false))
        return gemm_tma(dev, cs(st), tma_args{ g });
    /* Padded rows of w (I not a multiple of 8) do not fit the scratch, so such shapes stay on the streaming path. */
    if (a->n_tokens > (uint32_t)dev->stream_rows && !dev->deterministic && w->n == 2 * w->n_real) {
        if (gemm_wide_fits(dev, g, GEMM_SILU))
            return gemm_wide(dev, cs(st), g, GEMM_SILU);
        bf16 *gu = (bf16 *)a->scratch + (int64_t)a->n_tokens * w->k;
        r = lt_matmul(dev, cs(st), w->data, w->n, w->k, x, ld_x, a->n_tokens, gu, w->n, false, false);
        if (r < 0)
            return r;
        return launch_silu_interleaved(dev, cs(st), gu, w->n, (bf16 *)a->out, a->ld_out, a->n_tokens, w->n_real, a->limit);
    }
    return stream_rows(dev, cs(st), g, GEMM_SILU);
}
