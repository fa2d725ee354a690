/*
 * Packing of weights. A matrix [n, k] becomes blocks of 16 rows; inside a block the k-pairs follow each other, and a pair holds
 * 16 rows x 2 values (bf16: [16][2], the operand order of the bf16 dot instructions; f32: [2][16]). One block is one stream in
 * memory, read from end to end by whoever computes its 16 outputs. Gate and up rows alternate by block, so that a tile that
 * covers two blocks has both halves of the product.
 *
 * Experts in E2M1 with power-of-two scales per 32 columns stay packed: a block holds [k2][16] bytes, one pair of columns of a
 * row each, then [k / 32][16] scale bytes. A tile widens its blocks to bf16 before it multiplies (weight_widen).
 *
 * Values are exact: bf16 stays bf16, and so do formats whose values all fit bf16 (E4M3 and E2M1 with power-of-two scales);
 * f32, f16 and the rest become f32.
 */
#include "cpu.h"

#include <stdlib.h>

struct packer {
    struct arle_weight *w;
    const struct arle_weight_desc *d;
    struct arle_device *dev;
};

/* Value i of the random stream of a tensor, as <arle/backend.h> defines it, rounded to the tensor's type. */
static float random_value(const struct arle_tensor *t, uint64_t i)
{
    uint64_t z = t->rand_seed + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    double u = (double)(z >> 40) * 0x1p-24;
    float v = (float)(t->rand_mean + t->rand_std * 1.7320508075688772 * (2 * u - 1));
    return t->dtype == ARLE_BF16 ? bf16_to_f32(f32_to_bf16(v)) : t->dtype == ARLE_F16 ? f16_to_f32(f32_to_f16(v)) : v;
}

static float plain_value(const struct arle_tensor *t, uint64_t i)
{
    switch (t->dtype) {
    case ARLE_F32: { float v; memcpy(&v, (const char *)t->data + i * 4, 4); return v; }
    case ARLE_BF16: { uint16_t v; memcpy(&v, (const char *)t->data + i * 2, 2); return bf16_to_f32(v); }
    default: { uint16_t v; memcpy(&v, (const char *)t->data + i * 2, 2); return f16_to_f32(v); }
    }
}

static float scale_value(const struct arle_tensor *t, uint64_t i)
{
    switch (t->dtype) {
    case ARLE_F8E8M0: return e8m0_to_f32(((const uint8_t *)t->data)[i]);
    case ARLE_F8E4M3: return e4m3_to_f32(((const uint8_t *)t->data)[i]);
    default: return plain_value(t, i);
    }
}

/* One row of a part as f32; row counts from the part's first row. */
static void part_row(const struct arle_weight_part *p, int64_t row, int64_t k, float *out)
{
    uint64_t r = (uint64_t)(p->row0 + row), base = r * (uint64_t)k;
    if (p->t->data == NULL) {
        for (int64_t i = 0; i < k; i++)
            out[i] = p->format == ARLE_FMT_PLAIN ? random_value(p->t, base + (uint64_t)i)
                                                 : bf16_to_f32(f32_to_bf16(random_value(p->t, base + (uint64_t)i)));
        return;
    }
    switch (p->format) {
    case ARLE_FMT_PLAIN:
        for (int64_t i = 0; i < k; i++)
            out[i] = plain_value(p->t, base + (uint64_t)i);
        break;
    case ARLE_FMT_FP8_BLOCK: {
        uint64_t per_row = ((uint64_t)k + p->bk - 1) / p->bk;
        for (int64_t i = 0; i < k; i++)
            out[i] = e4m3_to_f32(((const uint8_t *)p->t->data)[base + (uint64_t)i])
                   * scale_value(p->scale, r / p->bn * per_row + (uint64_t)i / p->bk);
        break;
    }
    default: {
        uint64_t per_row = (uint64_t)k / p->bk;
        for (int64_t i = 0; i < k; i++) {
            uint8_t b = ((const uint8_t *)p->t->data)[(base + (uint64_t)i) / 2];
            out[i] = e2m1_to_f32(i & 1 ? b >> 4 : b & 15) * scale_value(p->scale, r * per_row + (uint64_t)i / p->bk) * p->scale2;
        }
    }
    }
}

/* Whether every value of the part is a bf16 number. */
static bool fits_bf16(const struct arle_weight_part *p)
{
    if (p->format == ARLE_FMT_PLAIN)
        return p->t->dtype == ARLE_BF16;
    return p->scale->dtype == ARLE_F8E8M0 && (p->format == ARLE_FMT_FP8_BLOCK || p->scale2 == 1.0f);
}

/* Whether the part can stay packed: E2M1 with one E8M0 scale per 32 columns. */
static bool is_packed_fp4(const struct arle_weight_desc *d, const struct arle_weight_part *p)
{
    return p->format == ARLE_FMT_FP4_GROUP && p->bk == 32 && p->scale2 == 1.0f && p->scale->dtype == ARLE_F8E8M0 && d->k % 32 == 0;
}

static int check_part(const struct arle_weight_desc *d, uint32_t i, struct arle_err *err)
{
    const struct arle_weight_part *p = &d->parts[i];
    const char *name = d->name ? d->name : "weight";
    size_t elems, need;
    if (p->t == NULL || p->row0 < 0 || p->n_rows <= 0)
        return arle_err_set(err, -EINVAL, "%s: part %u has no rows", name, i);
    if (arle_mul_size(&elems, (size_t)(p->row0 + p->n_rows), (size_t)d->k) < 0)
        return arle_err_set(err, -EINVAL, "%s: part %u is too large", name, i);
    if (p->format == ARLE_FMT_PLAIN) {
        if (p->t->dtype != ARLE_F32 && p->t->dtype != ARLE_BF16 && p->t->dtype != ARLE_F16)
            return arle_err_set(err, -EINVAL, "%s: dtype %u of part %u is not handled (f32, bf16, f16 are)", name, p->t->dtype, i);
        need = elems * arle_dtype_size(p->t->dtype);
    } else if (p->format == ARLE_FMT_FP8_BLOCK) {
        if (p->scale == NULL || p->bn == 0 || p->bk == 0)
            return arle_err_set(err, -EINVAL, "%s: part %u has no scale", name, i);
        need = elems;
    } else if (p->format == ARLE_FMT_FP4_GROUP) {
        if (p->scale == NULL || p->bk == 0 || d->k % p->bk != 0 || d->k % 2 != 0)
            return arle_err_set(err, -EINVAL, "%s: part %u has no scale that fits", name, i);
        need = elems / 2;
    } else {
        return arle_err_set(err, -EINVAL, "%s: format %u of part %u is not handled", name, p->format, i);
    }
    if (p->t->data != NULL && p->t->bytes < need)
        return arle_err_set(err, -EINVAL, "%s: part %u holds %zu bytes, its shape needs %zu", name, i, p->t->bytes, need);
    if (p->format != ARLE_FMT_PLAIN && p->t->data != NULL) {
        size_t rows = (size_t)(p->row0 + p->n_rows), per_row = ((size_t)d->k + p->bk - 1) / p->bk;
        size_t n = p->format == ARLE_FMT_FP8_BLOCK ? (rows + p->bn - 1) / p->bn * per_row : rows * per_row;
        if (arle_dtype_size(p->scale->dtype) == 0 || p->scale->bytes < n * arle_dtype_size(p->scale->dtype))
            return arle_err_set(err, -EINVAL, "%s: the scale of part %u holds %zu bytes, too few for %zu blocks", name, i,
                                p->scale->bytes, n);
    }
    return 0;
}

/* Fills the shape of a packed weight without its data. */
static int plan(const struct arle_weight_desc *d, struct arle_weight *w, struct arle_err *err)
{
    const char *name = d->name ? d->name : "weight";
    bool experts = d->role == ARLE_W_EXPERTS || d->role == ARLE_W_EXPERTS_GATE_UP;
    bool gate = d->role == ARLE_W_GATE_UP || d->role == ARLE_W_EXPERTS_GATE_UP;
    uint32_t per_expert = gate ? 2 : 1;
    if (d->k <= 0 || d->n_parts == 0 || d->parts == NULL)
        return arle_err_set(err, -EINVAL, "%s: empty weight", name);
    *w = (struct arle_weight) { .role = d->role, .k = d->k, .n_experts = experts ? d->n_experts : 1, .act_quant = d->act_quant };
    if (d->role < ARLE_W_VECTOR || d->role > ARLE_W_EXPERTS_GATE_UP)
        return arle_err_set(err, -EINVAL, "%s: role %u is not handled", name, d->role);
    if (d->act_quant > 1)
        return arle_err_set(err, -EINVAL, "%s: act_quant %u is not handled", name, d->act_quant);
    if ((gate || experts) && d->n_parts != w->n_experts * per_expert)
        return arle_err_set(err, -EINVAL, "%s: %u parts, expected %u", name, d->n_parts, w->n_experts * per_expert);
    w->dtype = ARLE_BF16;
    uint32_t n_fp4 = 0;
    for (uint32_t i = 0; i < d->n_parts; i++) {
        if (d->role == ARLE_W_VECTOR)
            break;
        int r = check_part(d, i, err);
        if (r < 0)
            return r;
        if ((gate || experts) && d->parts[i].n_rows != d->parts[0].n_rows)
            return arle_err_set(err, -EINVAL, "%s: part %u has %lld rows, part 0 has %lld", name, i,
                                (long long)d->parts[i].n_rows, (long long)d->parts[0].n_rows);
        n_fp4 += experts && is_packed_fp4(d, &d->parts[i]);
        if (!fits_bf16(&d->parts[i]))
            w->dtype = ARLE_F32;
        w->n += d->parts[i].n_rows;
    }
    if (experts && n_fp4 == d->n_parts)
        w->dtype = CPU_FP4;
    if (d->role == ARLE_W_VECTOR) {
        const struct arle_weight_part *p = &d->parts[0];
        if (d->n_parts != 1 || p->t == NULL || p->format != ARLE_FMT_PLAIN
            || (p->t->dtype != ARLE_F32 && p->t->dtype != ARLE_BF16 && p->t->dtype != ARLE_F16))
            return arle_err_set(err, -EINVAL, "%s: a vector is one plain part of f32, bf16 or f16", name);
        if (p->t->data != NULL && p->t->bytes / arle_dtype_size(p->t->dtype) < (size_t)(p->row0 + d->k))
            return arle_err_set(err, -EINVAL, "%s: holds %zu bytes, too few for %lld values", name, p->t->bytes, (long long)d->k);
        w->dtype = ARLE_F32;
        w->n = 1;
        return arle_mul_size(&w->bytes, (size_t)d->k, 4);
    }
    w->n /= w->n_experts;
    w->k2 = (w->k + 1) / 2;
    int64_t per_part = (w->n / per_expert + CPU_BLOCK - 1) / CPU_BLOCK;
    w->n_blocks = gate ? 2 * per_part : (w->n + CPU_BLOCK - 1) / CPU_BLOCK;
    w->block_bytes = w->dtype == CPU_FP4 ? (size_t)w->k2 * CPU_BLOCK + (size_t)w->k / 32 * CPU_BLOCK
                                         : (size_t)w->k2 * 2 * CPU_BLOCK * act_size(w->dtype);
    if (w->dtype == CPU_FP4 && (size_t)w->k2 * CPU_BLOCK * 4 * (CPU_TILE_COLS / CPU_BLOCK) > CPU_THREAD_SCRATCH)
        return arle_err_set(err, -EINVAL, "%s: %lld columns of packed 4-bit values are more than this backend handles", name, (long long)w->k);
    if (arle_mul_size(&w->expert_bytes, (size_t)w->n_blocks, w->block_bytes) < 0
        || arle_mul_size(&w->bytes, w->expert_bytes, w->n_experts) < 0)
        return arle_err_set(err, -EINVAL, "%s: too large", name);
    return 0;
}

/* The part and row in it that packed row `row` of an expert comes from; false for padding. */
static bool source_row(const struct packer *pk, uint32_t expert, int64_t row, const struct arle_weight_part **part, int64_t *out_row)
{
    const struct arle_weight_desc *d = pk->d;
    const struct arle_weight *w = pk->w;
    if (w->role == ARLE_W_GATE_UP || w->role == ARLE_W_EXPERTS_GATE_UP) {
        int64_t block = row / CPU_BLOCK, r = block / 2 * CPU_BLOCK + row % CPU_BLOCK;
        *part = &d->parts[expert * 2 + block % 2];
        *out_row = r;
        return r < (*part)->n_rows;
    }
    if (w->role == ARLE_W_EXPERTS) {
        *part = &d->parts[expert];
        *out_row = row;
        return row < (*part)->n_rows;
    }
    for (uint32_t i = 0; i < d->n_parts; row -= d->parts[i].n_rows, i++) {
        if (row < d->parts[i].n_rows) {
            *part = &d->parts[i];
            *out_row = row;
            return true;
        }
    }
    return false;
}

static void pack_block(const struct arle_weight *w, char *block, const float *row, int64_t c)
{
    if (w->dtype == ARLE_BF16) {
        uint16_t *out = (uint16_t *)(void *)block;
        for (int64_t i = 0; i < w->k; i++)
            out[(i / 2 * CPU_BLOCK + c) * 2 + i % 2] = f32_to_bf16(row[i]);
    } else {
        float *out = (float *)(void *)block;
        for (int64_t i = 0; i < w->k; i++)
            out[i * CPU_BLOCK + c] = row[i];
    }
}

/* Row `row` of a part as it lies in the file: k / 2 code bytes, k / 32 scale bytes. Random: uniform codes, scales that give
 * the tensor's standard deviation within a factor of two. */
static void pack_fp4(const struct arle_weight *w, char *block, const struct arle_weight_part *p, int64_t row, int64_t c)
{
    uint64_t r = (uint64_t)(p->row0 + row), at = r * (uint64_t)w->k2, groups = (uint64_t)w->k / 32;
    uint8_t *codes = (uint8_t *)block, *scales = codes + (size_t)w->k2 * CPU_BLOCK;
    for (int64_t i = 0; i < w->k2; i++) {
        uint64_t z = (p->t->rand_seed ^ (at + (uint64_t)i + 1)) * 0x9E3779B97F4A7C15u;
        codes[i * CPU_BLOCK + c] = p->t->data ? ((const uint8_t *)p->t->data)[at + (uint64_t)i] : (uint8_t)(z >> 56);
    }
    int random_scale = p->t->data ? 0 : 127 + (int)floor(log2(p->t->rand_std > 0 ? p->t->rand_std / 2.9 : 0x1p-7));
    for (uint64_t g = 0; g < groups; g++)
        scales[g * CPU_BLOCK + (uint64_t)c] = p->t->data ? ((const uint8_t *)p->scale->data)[r * groups + g] : (uint8_t)random_scale;
}

static void pack_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct packer *pk = arg;
    const struct arle_weight *w = pk->w;
    int64_t total = w->n_blocks * w->n_experts;
    float *row = thread_scratch(pk->dev, part);
    for (int64_t b = part_begin(total, part, n_parts); b < part_begin(total, part + 1, n_parts); b++) {
        uint32_t expert = (uint32_t)(b / w->n_blocks);
        for (int64_t c = 0; c < CPU_BLOCK; c++) {
            const struct arle_weight_part *src;
            int64_t r;
            if (!source_row(pk, expert, b % w->n_blocks * CPU_BLOCK + c, &src, &r))
                continue;
            if (w->dtype == CPU_FP4) {
                pack_fp4(w, w->data + (size_t)b * w->block_bytes, src, r, c);
            } else {
                part_row(src, r, w->k, row);
                pack_block(w, w->data + (size_t)b * w->block_bytes, row, c);
            }
        }
    }
}

int cpu_weight_create(struct arle_device *dev, const struct arle_weight_desc *d, struct arle_weight **out, struct arle_err *err)
{
    struct arle_weight shape;
    int r = plan(d, &shape, err);
    if (r < 0)
        return r;
    if (d->role != ARLE_W_VECTOR && d->k >= CPU_MAX_K)
        return arle_err_set(err, -EINVAL, "%s: %lld columns are more than this backend handles", d->name ? d->name : "weight",
                            (long long)d->k);
    struct arle_weight *w = malloc(sizeof *w);
    char *data = pages_alloc(shape.bytes);
    if (w == NULL || data == NULL) {
        pages_free(data, shape.bytes);
        free(w);
        return arle_err_set(err, -ENOMEM, "no memory for %zu bytes of %s", shape.bytes, d->name ? d->name : "a weight");
    }
    *w = shape;
    w->data = data;
    if (d->role == ARLE_W_VECTOR) {
        struct arle_weight_part p = d->parts[0];
        for (int64_t i = 0; i < d->k; i++)
            ((float *)(void *)data)[i] = p.t->data ? plain_value(p.t, (uint64_t)(p.row0 + i)) : random_value(p.t, (uint64_t)(p.row0 + i));
    } else {
        struct packer pk = { .w = w, .d = d, .dev = dev };
        pool_run(dev->pool, dev->n_threads, pack_part, &pk);
    }
    *out = w;
    return 0;
}

void cpu_weight_destroy(struct arle_device *dev, struct arle_weight *w)
{
    if (w == NULL)
        return;
    pages_free(w->data, w->bytes);
    free(w);
}

const float *cpu_weight_data(const struct arle_weight *w)
{
    return w->role == ARLE_W_VECTOR ? (const float *)(const void *)w->data : NULL;
}

uint64_t cpu_weight_bytes(const struct arle_weight *w)
{
    return w->bytes;
}

uint64_t cpu_weight_predict(struct arle_device *dev, const struct arle_weight_desc *d)
{
    struct arle_weight w;
    return plan(d, &w, NULL) < 0 ? 0 : w.bytes;
}

void weight_row(const struct arle_weight *w, int64_t row, void *out, uint32_t dtype)
{
    const char *block = w->data + (size_t)(row / CPU_BLOCK) * w->block_bytes;
    int64_t c = row % CPU_BLOCK;
    for (int64_t i = 0; i < w->k; i++) {
        if (w->dtype == ARLE_BF16) {
            uint16_t h = ((const uint16_t *)(const void *)block)[(i / 2 * CPU_BLOCK + c) * 2 + i % 2];
            if (dtype == ARLE_BF16)
                ((uint16_t *)out)[i] = h;
            else
                ((float *)out)[i] = bf16_to_f32(h);
        } else {
            act_set(out, dtype, i, ((const float *)(const void *)block)[i * CPU_BLOCK + c]);
        }
    }
}
