/*
 * Weights: what a checkpoint holds becomes bf16 rows on the device. Plain bf16 streams from the mapped file through pinned
 * buffers, copied by all cores; other formats are converted on the device. gate_up weights interleave gate and up rows in
 * blocks of eight, so that both products of one output meet in one thread of gemm_stream.
 */
#include "common.cuh"
#include <errno.h>
#include <math.h>
#include <unistd.h>

enum { kBuffers = 4, kMaxCopiers = 16 };
static const size_t kChunk = 16u << 20;

/* Copies from the page cache with several threads; one per device, made at the first weight. */
struct cuda_loader {
    cudaStream_t st;
    char *buf[kBuffers];
    cudaEvent_t done[kBuffers];     /* buffer has left for the device */
    unsigned next;
    bool pending;                   /* something was enqueued since the last loader_settle() */

    pthread_mutex_t mu;             /* guards everything below */
    pthread_cond_t work, idle;
    pthread_t thread[kMaxCopiers];
    int n_threads, n_busy;
    uint64_t round;
    bool quit;
    char *dst;
    const char *src;
    size_t bytes;
};

namespace {

void copy_slice(cuda_loader *ld, int i, int n)
{
    size_t step = (ld->bytes / n + 4095) & ~(size_t)4095, from = step * i;
    if (from < ld->bytes)
        memcpy(ld->dst + from, ld->src + from, from + step < ld->bytes ? step : ld->bytes - from);
}

struct copier { cuda_loader *ld; int index; };

void *copier_main(void *arg)
{
    copier c = *(copier *)arg;
    free(arg);
    uint64_t seen = 0;
    pthread_mutex_lock(&c.ld->mu);
    for (;;) {
        while (c.ld->round == seen && !c.ld->quit)
            pthread_cond_wait(&c.ld->work, &c.ld->mu);
        if (c.ld->quit)
            break;
        seen = c.ld->round;
        int n = c.ld->n_threads + 1;
        pthread_mutex_unlock(&c.ld->mu);
        copy_slice(c.ld, c.index, n);
        pthread_mutex_lock(&c.ld->mu);
        if (--c.ld->n_busy == 0)
            pthread_cond_signal(&c.ld->idle);
    }
    pthread_mutex_unlock(&c.ld->mu);
    return NULL;
}

void copy_parallel(cuda_loader *ld, char *dst, const char *src, size_t bytes)
{
    if (ld->n_threads == 0 || bytes < (1u << 20)) {
        memcpy(dst, src, bytes);
        return;
    }
    pthread_mutex_lock(&ld->mu);
    ld->dst = dst;
    ld->src = src;
    ld->bytes = bytes;
    ld->n_busy = ld->n_threads;
    ld->round++;
    pthread_cond_broadcast(&ld->work);
    pthread_mutex_unlock(&ld->mu);
    copy_slice(ld, ld->n_threads, ld->n_threads + 1);
    pthread_mutex_lock(&ld->mu);
    while (ld->n_busy > 0)
        pthread_cond_wait(&ld->idle, &ld->mu);
    pthread_mutex_unlock(&ld->mu);
}

void start_copiers(cuda_loader *ld)
{
    pthread_mutex_init(&ld->mu, NULL);
    pthread_cond_init(&ld->work, NULL);
    pthread_cond_init(&ld->idle, NULL);
    long n = sysconf(_SC_NPROCESSORS_ONLN) - 1;
    n = n < 0 ? 0 : n > kMaxCopiers ? kMaxCopiers : n;
    for (long i = 0; i < n; i++) {
        copier *c = (copier *)malloc(sizeof *c);
        if (c == NULL)
            break;
        c->ld = ld;
        c->index = (int)i;
        if (pthread_create(&ld->thread[i], NULL, copier_main, c) != 0) {
            free(c);
            break;
        }
        ld->n_threads++;
    }
}

int loader_get(arle_device *dev, cuda_loader **out, struct arle_err *err)
{
    if (dev->loader == NULL) {
        cuda_loader *ld = (cuda_loader *)calloc(1, sizeof *ld);
        if (ld == NULL)
            return arle_err_set(err, -ENOMEM, "no memory for the weight loader");
        start_copiers(ld);
        dev->loader = ld;
        cudaError_t e = cudaStreamCreateWithFlags(&ld->st, cudaStreamNonBlocking);
        for (int i = 0; i < kBuffers && e == cudaSuccess; i++) {
            e = cudaEventCreateWithFlags(&ld->done[i], cudaEventDisableTiming);
            if (e == cudaSuccess)
                e = cudaHostAlloc((void **)&ld->buf[i], kChunk, cudaHostAllocDefault);
        }
        if (e != cudaSuccess) {
            loader_free(dev);
            return arle_err_set(err, cuda_fail(dev, e, "weight loader", __FILE__, __LINE__), "GPU %d: no staging memory for weights",
                                dev->ordinal);
        }
    }
    *out = dev->loader;
    return 0;
}

/* ---- conversion on the device --------------------------------------------------------------------------------------- */

struct convert_args {
    const void *src;            /* raw tensor rows, starting at absolute row row0; NULL: random */
    const void *scale;
    void *dst;                  /* bf16, or f32 when to_f32 */
    int64_t rows, k, row0;
    int interleave;             /* 0 plain; 1 gate rows, 2 up rows of a gate_up weight */
    uint32_t dtype, format, bn, bk, scale_dtype;
    int64_t scale_ld;
    float scale2;
    uint64_t seed;
    double mean, std;
    int to_f32;
};

__device__ __forceinline__ float e4m3(uint8_t v)
{
    __nv_fp8_e4m3 x;
    x.__x = v;
    return (float)x;
}

__device__ __forceinline__ float scalar_at(const void *p, uint32_t dtype, int64_t i)
{
    switch (dtype) {
    case ARLE_F32: return ((const float *)p)[i];
    case ARLE_BF16: return __bfloat162float(((const bf16 *)p)[i]);
    case ARLE_F16: return __half2float(((const __half *)p)[i]);
    case ARLE_F8E4M3: return e4m3(((const uint8_t *)p)[i]);
    case ARLE_F8E8M0: return exp2f((float)((const uint8_t *)p)[i] - 127.f);
    default: return 0.f;
    }
}

/* Value i of the random stream of <arle/backend.h>, rounded to the tensor's own type. */
__device__ __forceinline__ float random_at(uint64_t seed, uint64_t i, double mean, double std, uint32_t dtype)
{
    uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    float v = (float)(mean + std * 1.7320508075688772 * (2 * ((double)(z >> 40) * (1.0 / 16777216.0)) - 1));
    return dtype == ARLE_BF16 ? round_bf(v) : dtype == ARLE_F16 ? __half2float(__float2half_rn(v)) : v;
}

__device__ float value_at(const convert_args &a, int64_t r, int64_t c)
{
    if (a.src == NULL)
        return random_at(a.seed, (uint64_t)((a.row0 + r) * a.k + c), a.mean, a.std, a.dtype);
    int64_t i = r * a.k + c;
    if (a.format == ARLE_FMT_FP8_BLOCK)
        return e4m3(((const uint8_t *)a.src)[i]) * scalar_at(a.scale, a.scale_dtype, (a.row0 + r) / a.bn * a.scale_ld + c / a.bk);
    if (a.format == ARLE_FMT_FP4_GROUP) {
        const float mag[8] = { 0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f };
        uint8_t b = ((const uint8_t *)a.src)[i >> 1], code = i & 1 ? b >> 4 : b & 15;
        float v = mag[code & 7] * scalar_at(a.scale, a.scale_dtype, (a.row0 + r) * a.scale_ld + c / a.bk) * a.scale2;
        return code & 8 ? -v : v;
    }
    return scalar_at(a.src, a.dtype, i);
}

__host__ __device__ inline int64_t packed_row(int64_t r, int interleave)
{
    return interleave == 0 ? r : (r >> 3) * 16 + (r & 7) + (interleave == 2 ? 8 : 0);
}

__global__ void convert_kernel(convert_args a)
{
    int64_t n = a.rows * a.k;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        int64_t r = i / a.k, c = i % a.k;
        float v = value_at(a, r, c);
        if (a.to_f32)
            ((float *)a.dst)[i] = v;
        else
            ((bf16 *)a.dst)[packed_row(r, a.interleave) * a.k + c] = __float2bfloat16_rn(v);
    }
}

/* Bytes of one row of a part as the file stores it. */
size_t row_bytes(const arle_weight_part *p, int64_t k)
{
    if (p->format == ARLE_FMT_FP4_GROUP)
        return (size_t)k / 2;
    return (size_t)k * arle_dtype_size(p->t->dtype);
}

int check_part(const arle_weight_desc *d, const arle_weight_part *p, int64_t k, struct arle_err *err)
{
    if (p->t == NULL)
        return arle_err_param(err, -EINVAL, d->name, "%s: a part without a tensor", d->name);
    if (p->format == ARLE_FMT_PLAIN && p->t->dtype != ARLE_F32 && p->t->dtype != ARLE_BF16 && p->t->dtype != ARLE_F16)
        return arle_err_param(err, -EINVAL, d->name, "%s: element type %u; this backend packs f32, bf16 and f16", d->name, p->t->dtype);
    if (p->format != ARLE_FMT_PLAIN && (p->scale == NULL || p->bk == 0 || (p->bn == 0 && p->format == ARLE_FMT_FP8_BLOCK)))
        return arle_err_param(err, -EINVAL, d->name, "%s: quantised part without scales", d->name);
    if (p->format > ARLE_FMT_FP4_GROUP)
        return arle_err_param(err, -EINVAL, d->name, "%s: storage format %u is not handled", d->name, p->format);
    if (p->t->data != NULL && p->t->bytes < (size_t)(p->row0 + p->n_rows) * row_bytes(p, k))
        return arle_err_param(err, -EINVAL, d->name, "%s: the tensor has fewer bytes than its rows need", d->name);
    return 0;
}

int convert_part(arle_device *dev, cuda_loader *ld, const arle_weight_part *p, int64_t k, void *dst, int interleave, int to_f32,
                 struct arle_err *err)
{
    convert_args a = {};
    a.dst = dst;
    a.rows = p->n_rows;
    a.k = k;
    a.row0 = p->row0;
    a.interleave = interleave;
    a.dtype = p->t->dtype;
    a.format = p->format;
    a.bn = p->bn;
    a.bk = p->bk;
    a.scale2 = p->scale2;
    a.seed = p->t->rand_seed;
    a.mean = p->t->rand_mean;
    a.std = p->t->rand_std;
    a.to_f32 = to_f32;
    void *raw = NULL, *scale = NULL;
    cudaError_t e = cudaSuccess;
    if (p->t->data != NULL) {
        size_t bytes = (size_t)p->n_rows * row_bytes(p, k);
        e = cudaMalloc(&raw, bytes);
        if (e == cudaSuccess)
            e = cudaMemcpy(raw, (const char *)p->t->data + (size_t)p->row0 * row_bytes(p, k), bytes, cudaMemcpyHostToDevice);
        a.src = raw;
        if (e == cudaSuccess && p->scale != NULL && p->scale->data != NULL) {
            e = cudaMalloc(&scale, p->scale->bytes);
            if (e == cudaSuccess)
                e = cudaMemcpy(scale, p->scale->data, p->scale->bytes, cudaMemcpyHostToDevice);
            a.scale = scale;
            a.scale_dtype = p->scale->dtype;
            a.scale_ld = p->scale->dim[p->scale->n_dims - 1];
        }
    }
    if (e == cudaSuccess && p->n_rows * k > 0) {
        int64_t blocks = ceil_div(p->n_rows * k, 1024);
        convert_kernel<<<(unsigned)(blocks < 65535 ? blocks : 65535), 256, 0, ld->st>>>(a);
        e = cudaGetLastError();
    }
    if (e == cudaSuccess && p->t->data != NULL)
        e = cudaStreamSynchronize(ld->st);
    ld->pending = true;
    cudaFree(raw);
    cudaFree(scale);
    if (e != cudaSuccess)
        return arle_err_set(err, cuda_fail(dev, e, "weight conversion", __FILE__, __LINE__), "GPU %d: converting %s failed: %s",
                            dev->ordinal, p->t->name != NULL ? p->t->name : "a weight", cudaGetErrorString(e));
    return 0;
}

/* One staged chunk of bf16 rows to its place. rows start at a multiple of 8 within the part. */
cudaError_t send_rows(cuda_loader *ld, bf16 *dst, int64_t r0, int64_t rows, int64_t k, int interleave, const char *src)
{
    size_t row = (size_t)k * 2;
    if (interleave == 0)
        return cudaMemcpyAsync(dst + r0 * k, src, rows * row, cudaMemcpyHostToDevice, ld->st);
    cudaError_t e = cudaSuccess;
    if (rows >= 8)
        e = cudaMemcpy2DAsync(dst + packed_row(r0, interleave) * k, 16 * row, src, 8 * row, 8 * row, rows / 8,
                              cudaMemcpyHostToDevice, ld->st);
    if (e == cudaSuccess && rows % 8 != 0) {
        int64_t done = rows & ~(int64_t)7;
        e = cudaMemcpyAsync(dst + packed_row(r0 + done, interleave) * k, src + done * row, rows % 8 * row, cudaMemcpyHostToDevice,
                            ld->st);
    }
    return e;
}

int stream_part(arle_device *dev, cuda_loader *ld, const arle_weight_part *p, int64_t k, bf16 *dst, int interleave,
                struct arle_err *err)
{
    size_t row = (size_t)k * 2;
    int64_t per = (int64_t)(kChunk / row) & ~(int64_t)7;
    const char *src = (const char *)p->t->data + (size_t)p->row0 * row;
    for (int64_t r = 0; r < p->n_rows; r += per) {
        int64_t rows = p->n_rows - r < per ? p->n_rows - r : per;
        unsigned b = ld->next++ % kBuffers;
        cudaError_t e = cudaEventSynchronize(ld->done[b]);
        if (e == cudaSuccess) {
            copy_parallel(ld, ld->buf[b], src + r * row, rows * row);
            e = send_rows(ld, dst, r, rows, k, interleave, ld->buf[b]);
        }
        if (e == cudaSuccess)
            e = cudaEventRecord(ld->done[b], ld->st);
        if (e != cudaSuccess)
            return arle_err_set(err, cuda_fail(dev, e, "weight upload", __FILE__, __LINE__), "GPU %d: uploading weights: %s",
                                dev->ordinal, cudaGetErrorString(e));
    }
    ld->pending = true;
    bump(dev, COUNT_COPY_BYTES, (uint64_t)p->n_rows * row);
    return 0;
}

int64_t total_rows(const arle_weight_desc *d)
{
    int64_t n = 0;
    for (uint32_t i = 0; i < d->n_parts; i++)
        n += d->parts[i].n_rows;
    return n;
}

bool is_gate_up(uint32_t role) { return role == ARLE_W_GATE_UP || role == ARLE_W_EXPERTS_GATE_UP; }

/* Rows that the packed form has per expert, and the real result rows. */
void shape_of(const arle_weight_desc *d, int64_t *n, int64_t *n_real)
{
    int64_t experts = d->n_experts > 1 ? d->n_experts : 1;
    int64_t rows = total_rows(d) / experts;
    *n_real = is_gate_up(d->role) ? rows / 2 : rows;
    *n = is_gate_up(d->role) ? ceil_div(*n_real, 8) * 16 : rows;
}

int check_desc(const arle_weight_desc *d, struct arle_err *err)
{
    int64_t experts = d->n_experts > 1 ? d->n_experts : 1;
    if (d->role < ARLE_W_VECTOR || d->role > ARLE_W_EXPERTS_GATE_UP || d->n_parts == 0 || d->k <= 0)
        return arle_err_param(err, -EINVAL, d->name, "%s: role %u with %u parts is not a weight", d->name, d->role, d->n_parts);
    if (d->act_quant != 0)
        return arle_err_param(err, -EINVAL, d->name, "%s: simulated quantisation of activations is not in this backend", d->name);
    if (d->role != ARLE_W_VECTOR && d->k % 8 != 0)
        return arle_err_param(err, -EINVAL, d->name, "%s: inner dimension %lld is not a multiple of 8", d->name, (long long)d->k);
    if ((d->role == ARLE_W_GATE_UP && (d->n_parts != 2 || d->parts[0].n_rows != d->parts[1].n_rows))
        || (d->role == ARLE_W_EXPERTS && d->n_parts != experts) || (d->role == ARLE_W_EXPERTS_GATE_UP && d->n_parts != 2 * experts))
        return arle_err_param(err, -EINVAL, d->name, "%s: %u parts do not fit its role", d->name, d->n_parts);
    for (uint32_t i = 0; i < d->n_parts; i++) {
        int r = d->role == ARLE_W_VECTOR ? 0 : check_part(d, &d->parts[i], d->k, err);
        if (r < 0)
            return r;
    }
    return 0;
}

int fill_vector(arle_device *dev, cuda_loader *ld, const arle_weight_desc *d, float *dst, struct arle_err *err)
{
    int64_t at = 0;
    for (uint32_t i = 0; i < d->n_parts; i++) {
        arle_weight_part p = d->parts[i];
        int64_t n = 1;
        for (uint32_t j = 0; j < p.t->n_dims; j++)
            n *= p.t->dim[j];
        if (d->n_parts > 1 || n > d->k - at)
            n = p.n_rows > 0 && p.n_rows <= n && d->n_parts > 1 ? p.n_rows : (n > d->k - at ? d->k - at : n);
        int64_t from = d->n_parts > 1 ? p.row0 : 0;
        p.row0 = from;
        p.n_rows = n;
        p.format = ARLE_FMT_PLAIN;
        arle_weight_desc one = *d;
        int r = check_part(&one, &p, 1, err);
        if (r == 0)
            r = convert_part(dev, ld, &p, 1, dst + at, 0, 1, err);
        if (r < 0)
            return r;
        at += n;
    }
    if (at != d->k)
        return arle_err_param(err, -EINVAL, d->name, "%s: %lld elements, %lld wanted", d->name, (long long)at, (long long)d->k);
    return 0;
}

int fill_matrix(arle_device *dev, cuda_loader *ld, const arle_weight_desc *d, arle_weight *w, struct arle_err *err)
{
    int64_t row = 0;
    for (uint32_t i = 0; i < d->n_parts; i++) {
        const arle_weight_part *p = &d->parts[i];
        int interleave = 0;
        bf16 *dst = w->data + row * d->k;
        if (is_gate_up(d->role)) {
            interleave = 1 + (int)(i & 1);
            dst = w->data + (int64_t)(i >> 1) * w->n * d->k;
        } else {
            row += p->n_rows;
        }
        int r = p->t->data != NULL && p->format == ARLE_FMT_PLAIN && p->t->dtype == ARLE_BF16
                    ? stream_part(dev, ld, p, d->k, dst, interleave, err)
                    : convert_part(dev, ld, p, d->k, dst, interleave, 0, err);
        if (r < 0)
            return r;
    }
    return 0;
}

} // namespace

void loader_free(arle_device *dev)
{
    cuda_loader *ld = dev->loader;
    if (ld == NULL)
        return;
    pthread_mutex_lock(&ld->mu);
    ld->quit = true;
    pthread_cond_broadcast(&ld->work);
    pthread_mutex_unlock(&ld->mu);
    for (int i = 0; i < ld->n_threads; i++)
        pthread_join(ld->thread[i], NULL);
    if (ld->st != NULL)
        cudaStreamSynchronize(ld->st);
    for (int i = 0; i < kBuffers; i++) {
        if (ld->done[i] != NULL)
            cudaEventDestroy(ld->done[i]);
        if (ld->buf[i] != NULL)
            cudaFreeHost(ld->buf[i]);
    }
    if (ld->st != NULL)
        cudaStreamDestroy(ld->st);
    pthread_cond_destroy(&ld->work);
    pthread_cond_destroy(&ld->idle);
    pthread_mutex_destroy(&ld->mu);
    free(ld);
    dev->loader = NULL;
}

int loader_settle(arle_device *dev)
{
    cuda_loader *ld = dev->loader;
    if (ld == NULL || !ld->pending)
        return 0;
    ld->pending = false;
    CUDA_TRY(dev, cudaStreamSynchronize(ld->st));
    return 0;
}

extern "C" uint64_t cuda_weight_predict(struct arle_device *dev, const struct arle_weight_desc *desc)
{
    (void)dev;
    if (desc->role == ARLE_W_VECTOR)
        return (uint64_t)desc->k * 4;
    int64_t n, n_real, experts = desc->n_experts > 1 ? desc->n_experts : 1;
    shape_of(desc, &n, &n_real);
    return (uint64_t)experts * n * desc->k * 2;
}

extern "C" int cuda_weight_create(struct arle_device *dev, const struct arle_weight_desc *desc, struct arle_weight **out,
                                  struct arle_err *err)
{
    int r = check_desc(desc, err);
    if (r < 0)
        return r;
    cudaSetDevice(dev->ordinal);
    cuda_loader *ld = NULL;
    r = loader_get(dev, &ld, err);
    if (r < 0)
        return r;
    arle_weight *w = (arle_weight *)calloc(1, sizeof *w);
    if (w == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the record of %s", desc->name);
    w->role = desc->role;
    w->n_experts = desc->n_experts > 1 ? desc->n_experts : 1;
    w->k = desc->k;
    shape_of(desc, &w->n, &w->n_real);
    w->bytes = cuda_weight_predict(dev, desc);
    void *mem = NULL;
    r = cuda_alloc(dev, ARLE_MEM_DEVICE, w->bytes, &mem, err);
    if (r == 0) {
        if (desc->role == ARLE_W_VECTOR) {
            w->vec = (float *)mem;
            r = fill_vector(dev, ld, desc, w->vec, err);
        } else {
            w->data = (bf16 *)mem;
            r = fill_matrix(dev, ld, desc, w, err);
        }
    }
    if (r < 0) {
        cuda_weight_destroy(dev, w);
        return r;
    }
    *out = w;
    return 0;
}

extern "C" void cuda_weight_destroy(struct arle_device *dev, struct arle_weight *w)
{
    if (w == NULL)
        return;
    loader_settle(dev);
    cuda_free(dev, ARLE_MEM_DEVICE, w->vec != NULL ? (void *)w->vec : (void *)w->data);
    free(w);
}

extern "C" const float *cuda_weight_data(const struct arle_weight *w) { return w->vec; }

extern "C" uint64_t cuda_weight_bytes(const struct arle_weight *w) { return w->bytes; }
