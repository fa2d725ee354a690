/*
 * Matrix products: mm_run() packs activations, cuts the work and hands it to a kernel set's tiles, or to its panels when there are
 * rows enough to pay for widening weights once for all of them. Serves linear, gate_up and the experts.
 */
#include "cpu.h"
#include "latent_math.h"

/* Work of one matrix product: packed tiles of activations times ranges of column blocks. */
struct mm_job {
    const struct mm *m;
    struct arle_device *dev;
    const struct kernels *k;
    enum x_kind x_kind;
    uint32_t row0, n_rows;          /* rows of this pass */
    unsigned tile_rows;             /* of a full tile */
    bool row_tiles;                 /* x packed as amx.h says */
    const char *packed;             /* tiles of tile_rows rows, the last one shorter */
    size_t row_bytes;               /* packed bytes of one row */
    void (*gemm)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);

    unsigned group;                 /* tiles: blocks of a pass, */
    uint32_t take;                  /* what a thread takes at a time, in blocks or, MM_GATE, pairs of blocks: whole groups */
    unsigned item_blocks;           /* panels: columns and rows of an item, */
    int64_t item_tiles, n_cols, n_items;    /* items side by side, items in all */
    _Atomic int64_t next;           /* the first that nobody has taken; counts only, so relaxed */
};

static const void *mm_x_row(const struct mm *m, uint32_t row)
{
    return act_at(m->x, m->dtype, m->x_rows ? m->x_rows[row] : (int64_t)row, m->ld_x, 0);
}

/* Row `row` as it will be multiplied, k values: where it lies, or a copy in `area` (k + 1 floats) of the right type. */
static const void *pack_source(const struct mm_job *j, uint32_t row, float *area)
{
    const void *x = mm_x_row(j->m, row);
    int64_t k = j->m->w->k;
    bool quant = j->m->w->act_quant != 0;
    if (!quant && (j->x_kind == X_BF16 || j->m->dtype == ARLE_F32))
        return x;
    j->k->to_f32(x, j->m->dtype, k, area);
    if (quant)
        lat_quant_fp8(area, (size_t)k, 128);        /* exact in bf16 */
    if (j->x_kind == X_F32)
        return area;
    uint16_t *h = (uint16_t *)(void *)area;         /* in place: a value is read before its half is written over */
    for (int64_t i = 0; i < k; i++)
        h[i] = f32_to_bf16(area[i]);
    return h;
}

/* Packs one tile as [ceil(k2 / 16)][rows][16][2] bf16, zeros behind the last k. */
static void pack_row_tile(const char *const *src, unsigned rows, int64_t k, char *out)
{
    for (int64_t at = 0; at < k; at += 32)
        for (unsigned r = 0; r < rows; r++, out += 64) {
            size_t n = k - at < 32 ? (size_t)(k - at) * 2 : 64;
            memcpy(out, src[r] + at * 2, n);
            memset(out + n, 0, 64 - n);
        }
}

/* Packs one tile as [k2][rows][2]; a missing last k is zero. tmp holds rows * (k + 1) floats. */
static void pack_tile(const struct mm_job *j, uint32_t row0, unsigned rows, char *out, float *tmp)
{
    int64_t k = j->m->w->k;
    size_t elem = j->x_kind == X_BF16 ? 2 : 4;
    const char *src[CPU_MAX_ROWS];
    for (unsigned r = 0; r < rows; r++)
        src[r] = pack_source(j, row0 + r, tmp + r * (k + 1));
    if (j->row_tiles) {
        pack_row_tile(src, rows, k, out);
        return;
    }
    if (elem == 2)
        for (int64_t i = 0; i < k / 2; i++)
            for (unsigned r = 0; r < rows; r++)
                memcpy(out + (i * rows + r) * 4, src[r] + i * 4, 4);
    else
        for (int64_t i = 0; i < k / 2; i++)
            for (unsigned r = 0; r < rows; r++)
                memcpy(out + (i * rows + r) * 8, src[r] + i * 8, 8);
    for (unsigned r = 0; r < rows && k % 2; r++) {
        char *last = out + (k / 2 * rows + r) * 2 * (int64_t)elem;
        memset(last, 0, 2 * elem);
        memcpy(last, src[r] + (k - 1) * (int64_t)elem, elem);
    }
}

static void pack_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct mm_job *j = arg;
    unsigned mr = j->tile_rows;
    int64_t tiles = (j->n_rows + mr - 1) / mr;
    for (int64_t t = part_begin(tiles, part, n_parts); t < part_begin(tiles, part + 1, n_parts); t++) {
        uint32_t first = (uint32_t)t * mr, rows = j->n_rows - first < mr ? j->n_rows - first : mr;
        pack_tile(j, j->row0 + first, rows, (char *)(uintptr_t)j->packed + first * j->row_bytes, thread_scratch(j->dev, part));
    }
}

static void store_plain(const struct mm_job *j, uint32_t row, int64_t block, unsigned blocks, const float *acc)
{
    const struct mm *m = j->m;
    int64_t c = block * CPU_BLOCK, n = m->w->n - c < blocks * CPU_BLOCK ? m->w->n - c : blocks * CPU_BLOCK;
    void *y = act_at_w(m->y, m->out_dtype, m->y_rows ? m->y_rows[row] : (int64_t)row, m->ld_y, c);
    j->k->store_row(acc, n, y, m->out_dtype, m->accumulate);
}

static void store_gate(const struct mm_job *j, uint32_t row, int64_t block, unsigned blocks, const float *acc)
{
    const struct mm *m = j->m;
    for (unsigned b = 0; b < blocks; b += 2) {
        int64_t c = (block + b) / 2 * CPU_BLOCK, n = m->w->n / 2 - c < CPU_BLOCK ? m->w->n / 2 - c : CPU_BLOCK;
        void *y = act_at_w(m->y, m->out_dtype, m->y_rows ? m->y_rows[row] : (int64_t)row, m->ld_y, c);
        j->k->silu_mul(acc + b * CPU_BLOCK, acc + (b + 1) * CPU_BLOCK, n, m->limit, m->row_weight ? m->row_weight[row] : 1.0f, y,
                       m->out_dtype, m->dtype);
    }
}

#define WIDEN_BYTES ((size_t)512 << 10)     /* of widened blocks at a time: what the second cache level keeps beside its other users */

/* The blocks of one group as bf16, in the thread's scratch: widened once for all rows. */
static const char *widen_blocks(struct arle_device *dev, const struct arle_weight *w, const char *packed, unsigned blocks, unsigned part)
{
    uint16_t *out = thread_scratch(dev, part);
    for (unsigned i = 0; i < blocks; i++) {
        const uint8_t *codes = (const uint8_t *)packed + i * w->block_bytes;
        dev->k->widen(codes, codes + (size_t)w->k2 * CPU_BLOCK, w->k / 32, out + (size_t)i * (size_t)w->k2 * CPU_BLOCK * 2);
    }
    return (const char *)out;
}

/* Blocks that one pass over the rows takes. */
static unsigned group_blocks(const struct mm_job *j)
{
    const struct arle_weight *w = j->m->w;
    unsigned mr = j->tile_rows, unit = j->m->form == MM_GATE ? 2 : 1;
    unsigned group = j->row_tiles ? j->k->bf16_blocks : j->k->tile_blocks[j->n_rows < mr ? j->n_rows : mr];
    if (group < unit)
        group = unit;
    while (w->dtype == CPU_FP4 && group > unit && group * (size_t)w->k2 * CPU_BLOCK * 4 > WIDEN_BYTES)
        group /= 2;
    return group;
}

/* Columns outside, row tiles inside: a group of weight blocks is read from memory once and stays in cache for all rows. */
static void mm_blocks(const struct mm_job *j, int64_t b, int64_t end, unsigned part)
{
    const struct mm *m = j->m;
    const struct arle_weight *w = m->w;
    unsigned mr = j->tile_rows;
    _Alignas(64) float acc[CPU_MAX_ROWS * CPU_TILE_COLS];
    size_t block_bytes = w->dtype == CPU_FP4 ? (size_t)w->k2 * CPU_BLOCK * 4 : w->block_bytes;
    for (; b < end; b += j->group) {
        unsigned blocks = end - b < j->group ? (unsigned)(end - b) : j->group;
        const char *wb = w->data + m->expert * w->expert_bytes + (size_t)b * w->block_bytes;
        if (w->dtype == CPU_FP4)
            wb = widen_blocks(j->dev, w, wb, blocks, part);
        for (uint32_t r = 0; r < j->n_rows; r += mr) {
            unsigned rows = j->n_rows - r < mr ? j->n_rows - r : mr;
            j->gemm(j->packed + r * j->row_bytes, rows, w->k2, wb, block_bytes, blocks, acc);
            for (unsigned i = 0; i < rows; i++)
                (m->form == MM_GATE ? store_gate : store_plain)(j, j->row0 + r + i, b, blocks, acc + i * blocks * CPU_BLOCK);
        }
    }
}

/*
 * Every part begins with its own share of the blocks, from the front, so that a thread reads on and on; who is done takes from the
 * back of what others have left. So nobody waits for a thread whose processor is slower or somebody else's for a while.
 */
#define TAKE_BYTES ((size_t)192 << 10)      /* of weights at a time: some microseconds */

static void shares_fill(struct arle_device *dev, int64_t units, unsigned n_parts)
{
    for (unsigned p = 0; p < n_parts; p++)
        atomic_store_explicit(&dev->shares[p].span, (uint64_t)part_begin(units, p, n_parts) |
                              (uint64_t)part_begin(units, p + 1, n_parts) << 32, memory_order_relaxed);
}

static bool share_take(struct share *s, uint32_t most, bool back, uint32_t *from, uint32_t *end)
{
    uint64_t was = atomic_load_explicit(&s->span, memory_order_relaxed), now;
    do {
        uint32_t b = (uint32_t)was, e = (uint32_t)(was >> 32), n = e - b < most ? e - b : most;
        if (n == 0)
            return false;
        *from = back ? e - n : b;
        *end = *from + n;
        now = back ? b | (uint64_t)(e - n) << 32 : (b + n) | (uint64_t)e << 32;
    } while (!atomic_compare_exchange_weak_explicit(&s->span, &was, now, memory_order_relaxed, memory_order_relaxed));
    return true;
}

static void mm_job(void *arg, unsigned part, unsigned n_parts)
{
    const struct mm_job *j = arg;
    unsigned unit = j->m->form == MM_GATE ? 2 : 1;
    uint32_t from, end;
    for (unsigned i = 0; i < n_parts; i++)
        while (share_take(&j->dev->shares[(part + i) % n_parts], j->take, i > 0, &from, &end)) {
            mm_blocks(j, (int64_t)from * unit, (int64_t)end * unit, part);
            if (i > 0)
                count(j->dev, N_linear_helped, 1);
        }
}

/* ---- panels --------------------------------------------------------------------------------------------------------- */

/*
 * A panel is some weight blocks over some k, in f32, in the thread's scratch: 256 k x 64 columns take 64 KiB, which the second
 * cache level keeps while all row tiles pass over it, and a row tile's own 256 k stay in the first level for all its blocks. Sums wait
 * between panels in scratch, as the f32 numbers that they are in registers, so the chain of every element is that of the tiles.
 */
#define PANEL_K2 128
#define PANEL_BLOCKS 4
#define PANEL_ROWS 512          /* rows of an item, about: their sums lie beside the panel */
#define PANEL_MIN_ROWS 16       /* from here widening once pays, on 2 cores of a Zen 3 server, 2026-11 */

/* Work items are blocks x rows; threads take the next one, so that a thread without a CPU holds up one item and not a half. */
static void plan_panels(struct mm_job *j)
{
    const struct arle_weight *w = j->m->w;
    unsigned mr = j->tile_rows, unit = j->m->form == MM_GATE ? 2 : 1;
    int64_t tiles = (j->n_rows + mr - 1) / mr, want = 12 * (int64_t)j->dev->n_threads;
    j->item_blocks = PANEL_BLOCKS;
    while (j->item_blocks > unit && w->n_blocks / j->item_blocks < want)
        j->item_blocks /= 2;
    j->n_cols = (w->n_blocks + j->item_blocks - 1) / j->item_blocks;
    int64_t cuts = (j->n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    while (j->n_cols * cuts < want / 4 && tiles / (cuts + 1) >= 8)
        cuts++;
    j->item_tiles = (tiles + cuts - 1) / cuts;
    j->n_items = j->n_cols * ((tiles + j->item_tiles - 1) / j->item_tiles);
    atomic_store_explicit(&j->next, 0, memory_order_relaxed);
}

/* k pairs [k0, k0 + n) of a block as f32: the weight itself, or widened to `panel`; fp4 takes two steps. */
static const float *panel_block(const struct mm_job *j, int64_t block, int64_t k0, int64_t n, float *panel, uint16_t *half)
{
    const struct arle_weight *w = j->m->w;
    const char *b = w->data + j->m->expert * w->expert_bytes + (size_t)block * w->block_bytes;
    if (w->dtype == ARLE_F32)
        return (const float *)(const void *)b + k0 * 2 * CPU_BLOCK;
    if (w->dtype == CPU_FP4) {
        const uint8_t *codes = (const uint8_t *)b, *scales = codes + w->k2 * CPU_BLOCK;
        j->k->widen(codes + k0 * CPU_BLOCK, scales + k0 / 16 * CPU_BLOCK, n / 16, half);
        b = (const char *)half;
    } else {
        b += k0 * CPU_BLOCK * 4;
    }
    j->k->to_panel(b, n, panel);
    return panel;
}

static void panel_item(const struct mm_job *j, int64_t item, char *scratch)
{
    const struct arle_weight *w = j->m->w;
    unsigned mr = j->tile_rows;
    int64_t block = item % j->n_cols * j->item_blocks;
    unsigned blocks = w->n_blocks - block < j->item_blocks ? (unsigned)(w->n_blocks - block) : j->item_blocks;
    uint32_t r0 = (uint32_t)(item / j->n_cols * j->item_tiles) * mr, r1 = r0 + (uint32_t)j->item_tiles * mr;
    r1 = r1 < j->n_rows ? r1 : j->n_rows;
    float *panel = (float *)(void *)scratch, *sums = panel + PANEL_BLOCKS * PANEL_K2 * 2 * CPU_BLOCK;
    uint16_t *half = (uint16_t *)(void *)(sums + (size_t)(r1 - r0) * blocks * CPU_BLOCK);
    const float *wb[PANEL_BLOCKS];
    for (int64_t k0 = 0; k0 < w->k2; k0 += PANEL_K2) {
        int64_t n = w->k2 - k0 < PANEL_K2 ? w->k2 - k0 : PANEL_K2;
        for (unsigned b = 0; b < blocks; b++)
            wb[b] = panel_block(j, block + b, k0, n, panel + b * PANEL_K2 * 2 * CPU_BLOCK, half);
        for (uint32_t r = r0; r < r1; r += mr) {
            unsigned rows = r1 - r < mr ? r1 - r : mr;
            const float *x = (const float *)(const void *)(j->packed + r * j->row_bytes) + k0 * rows * 2;
            j->k->gemm_panel(x, rows, n, wb, blocks, k0 != 0, rows * j->row_bytes, sums + (size_t)(r - r0) * blocks * CPU_BLOCK);
        }
    }
    for (uint32_t r = r0; r < r1; r++)
        (j->m->form == MM_GATE ? store_gate : store_plain)(j, j->row0 + r, block, blocks, sums + (size_t)(r - r0) * blocks * CPU_BLOCK);
}

static void panel_job(void *arg, unsigned part, unsigned n_parts)
{
    struct mm_job *j = arg;
    for (int64_t i; (i = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed)) < j->n_items;)
        panel_item(j, i, thread_scratch(j->dev, part));
}

/* ---- the whole product ---------------------------------------------------------------------------------------------- */

static void count_path(struct mm_job *j)
{
    static const struct { const char *name; enum counter_id id; } paths[] = {
        { "reference", N_linear_ref }, { "avx2", N_linear_avx2 }, { "avx512", N_linear_avx512 },
    };
    if (j->x_kind == X_BF16)
        count(j->dev, j->row_tiles ? N_linear_amx : N_linear_avx512bf16, 1);
    else
        for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
            if (strncmp(paths[i].name, j->k->name, strlen(paths[i].name)) == 0 && strlen(j->k->name) == strlen(paths[i].name))
                count(j->dev, paths[i].id, 1);
    count(j->dev, j->m->n_rows == 1 ? N_linear_gemv : N_linear_gemm, 1);
    if (j->m->w->dtype == ARLE_F32)
        count(j->dev, N_linear_f32_weight, 1);
    if (j->m->w->dtype == CPU_FP4)
        count(j->dev, N_linear_fp4, 1);
}

void mm_run(struct arle_device *dev, const struct mm *m)
{
    const struct kernels *k = dev->k;
    struct mm_job j = { .m = m, .dev = dev, .k = k };
    bool bf16_weight = m->w->dtype != ARLE_F32;
    if (m->n_rows == 0)
        return;
    j.x_kind = bf16_weight && m->dtype == ARLE_BF16 && k->bf16_dot ? X_BF16 : X_F32;
    j.gemm = j.x_kind == X_BF16 ? k->gemm_bf16_wbf16 : bf16_weight ? k->gemm_f32_wbf16 : k->gemm_f32_wf32;
    j.row_tiles = j.x_kind == X_BF16 && k->bf16_rows != 0;
    j.tile_rows = j.row_tiles ? k->bf16_rows : k->max_rows;
    int64_t packed_k2 = j.row_tiles ? (m->w->k2 + 15) / 16 * 16 : m->w->k2;
    j.row_bytes = (size_t)packed_k2 * 2 * (j.x_kind == X_BF16 ? 2 : 4);
    count_path(&j);
    size_t fit = CPU_PACK_BYTES / j.row_bytes / j.tile_rows * j.tile_rows;     /* one tile at least: see weight.c */
    uint32_t most = fit > 1024 ? 1024 / j.tile_rows * j.tile_rows : (uint32_t)fit;
    for (j.row0 = 0; j.row0 < m->n_rows; j.row0 += j.n_rows) {
        const char *x = mm_x_row(m, j.row0);
        j.n_rows = m->n_rows - j.row0 < most ? m->n_rows - j.row0 : most;
        double elems = (double)m->w->n_blocks * CPU_BLOCK * (double)m->w->k;
        bool panels = k->gemm_panel != NULL && j.x_kind == X_F32 && j.n_rows >= PANEL_MIN_ROWS;
        j.packed = dev->pack;
        if (m->n_rows == 1 && m->w->k == packed_k2 * 2 && !m->w->act_quant && (j.x_kind == X_BF16 || m->dtype == ARLE_F32))
            j.packed = x;               /* a single row is packed as it is */
        else
            run_parts(dev, j.n_rows < 2 * j.tile_rows ? 0 : j.n_rows * (double)m->w->k * 0.3, pack_job, &j);
        double cost_ns = elems * (0.05 + 0.01 * j.n_rows);
        if (panels) {
            plan_panels(&j);
            count(dev, N_linear_panel, 1);
        } else {
            j.group = group_blocks(&j);
            unsigned unit = m->form == MM_GATE ? 2 : 1;
            j.take = ((uint32_t)(TAKE_BYTES / (j.group * m->w->block_bytes)) + 1) * (j.group / unit);
            shares_fill(dev, m->w->n_blocks / unit, parts_for(dev, cost_ns));
        }
        run_parts(dev, cost_ns, panels ? panel_job : mm_job, &j);
    }
}
