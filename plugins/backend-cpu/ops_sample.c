/*
 * sample: one row of logits per work item. The whole vocabulary is passed over a fixed number of times; only candidates that may
 * survive top_k, top_p and min_p are ever sorted, and of these only the ones that share a bucket with the border.
 *
 * Order of the draw: survivors in order of their ids. u in [0, 1) from Philox; the answer is the first id at which the running
 * sum of probabilities exceeds u times their total.
 */
#include "cpu.h"

#include <float.h>
#include <stdlib.h>

#define N_BUCKETS 4096
#define DRAW_BLOCK 4096u
#define FEW 512                         /* a top_k up to this is taken directly */
#define BUCKETS_PER_NAT 128.0f          /* the last bucket takes everything below e^-32 of the best */

struct candidate { float value; int32_t id; };

struct sample_area {
    float *raw;                         /* copy of the row before edits */
    uint32_t *seen;                     /* per id: occurrences in the output << 1 | occurs at all; zero between rows */
    struct candidate *cand;
    float *w;                           /* e^((x - top) / temperature) of every id; zero once it is out */
    double *weight;                     /* [N_BUCKETS] */
    uint32_t *count;                    /* [N_BUCKETS] */
};

struct sample_job {
    struct arle_device *dev;
    const struct arle_sample_args *a;
};

/* Philox4x32-10 (Salmon et al. 2011): counter {c, 0}, key seed; the first word gives 24 bits. */
static float uniform(uint64_t seed, uint64_t counter)
{
    uint32_t c[4] = { (uint32_t)counter, (uint32_t)(counter >> 32), 0, 0 }, k[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t n[4] = { (uint32_t)(p1 >> 32) ^ c[1] ^ k[0], (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c[3] ^ k[1], (uint32_t)p0 };
        memcpy(c, n, sizeof c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return (float)(c[0] >> 8) * 0x1p-24f;
}

/* ---- edits: bias, mask, penalties ----------------------------------------------------------------------------------- */

static void penalise(const struct arle_sample_row *row, float *x, uint32_t n_valid, uint32_t *seen)
{
    for (uint32_t i = 0; i < row->n_history; i++) {
        int32_t id = row->history[i];
        if (id >= 0 && (uint32_t)id < n_valid)
            seen[id] = (seen[id] + (i >= row->n_prompt ? 2u : 0u)) | 1u;
    }
    for (uint32_t i = 0; i < row->n_history; i++) {
        int32_t id = row->history[i];
        if (id < 0 || (uint32_t)id >= n_valid || seen[id] == 0)
            continue;
        uint32_t in_output = seen[id] >> 1;
        seen[id] = 0;                   /* each id once, and clean for the next row */
        if (row->repetition != 1.0f && row->repetition > 0)
            x[id] = x[id] > 0 ? x[id] / row->repetition : x[id] * row->repetition;
        if (in_output > 0)
            x[id] -= row->presence + row->frequency * (float)in_output;
    }
}

static bool has_penalty(const struct arle_sample_row *row)
{
    return row->history != NULL && row->n_history > 0
        && ((row->repetition != 1.0f && row->repetition > 0) || row->presence != 0 || row->frequency != 0);
}

static void edit(const struct arle_sample_row *row, float *x, uint32_t n_valid, uint32_t *seen)
{
    for (uint32_t i = 0; i < row->n_bias; i++)
        if (row->bias[i].id >= 0 && (uint32_t)row->bias[i].id < n_valid)
            x[row->bias[i].id] += row->bias[i].value;
    for (uint32_t i = 0; row->mask != NULL && i < n_valid; i++)
        if (!(row->mask[i / 32] >> (i % 32) & 1))
            x[i] = -INFINITY;
    if (has_penalty(row))
        penalise(row, x, n_valid, seen);
}

/* ---- choosing ------------------------------------------------------------------------------------------------------- */

/* First index of the largest value; NaN never wins. */
static int32_t argmax(const struct kernels *k, const float *x, uint32_t n, float *out_max)
{
    float top = k->max(n, x);
    *out_max = top;
    for (uint32_t i = 0; i < n; i++)
        if (x[i] == top)
            return (int32_t)i;
    return 0;
}

static int better(const void *pa, const void *pb)
{
    const struct candidate *a = pa, *b = pb;
    if (a->value != b->value)
        return a->value > b->value ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* Bottom-up merge sort, best first; runs that are in order already are left alone. tmp holds n. */
static void sort_candidates(struct candidate *c, uint32_t n, struct candidate *tmp)
{
    for (uint32_t w = 1; w < n; w *= 2)
        for (uint32_t i = 0; i + w < n; i += 2 * w) {
            uint32_t mid = i + w, end = mid + w < n ? mid + w : n;
            if (better(&c[mid - 1], &c[mid]) < 0)
                continue;
            memcpy(tmp, c + i, (mid - i) * sizeof *tmp);
            uint32_t l = 0, r = mid, o = i, nl = mid - i;
            while (l < nl)
                c[o++] = r < end && better(&c[r], &tmp[l]) < 0 ? c[r++] : tmp[l++];
        }
}

static unsigned bucket_of(float value, float top, float inv_t)
{
    float d = (top - value) * inv_t * BUCKETS_PER_NAT;
    return d < N_BUCKETS - 1 ? (unsigned)d : N_BUCKETS - 1;         /* -inf and NaN fall into the last one */
}

/* The border of the survivors: an id survives if its value is above `value`, or equal and its id is at most `id`. */
struct border { float value; int32_t id; };

static bool survives(const struct border *b, float value, int32_t id)
{
    return value > b->value || (value == b->value && id <= b->id);
}

/*
 * The last of the best `most` candidates, or the last one needed to reach weight `mass`, whichever comes first; candidates are the
 * ids of weight above zero.
 */
static struct border cut(const struct sample_area *ar, const float *x, uint32_t n, float top, float inv_t, uint64_t most, double mass)
{
    memset(ar->weight, 0, N_BUCKETS * sizeof *ar->weight);
    memset(ar->count, 0, N_BUCKETS * sizeof *ar->count);
    for (uint32_t i = 0; i < n; i++)
        if (ar->w[i] > 0) {
            unsigned b = bucket_of(x[i], top, inv_t);
            ar->count[b]++;
            ar->weight[b] += ar->w[i];
        }
    uint64_t have = 0;
    double sum = 0;
    unsigned b = 0;
    while (b < N_BUCKETS - 1 && have + ar->count[b] < most && sum + ar->weight[b] < mass) {
        have += ar->count[b];
        sum += ar->weight[b++];
    }
    uint32_t n_cand = 0;
    for (uint32_t i = 0; i < n; i++)
        if (ar->w[i] > 0 && bucket_of(x[i], top, inv_t) == b)
            ar->cand[n_cand++] = (struct candidate) { x[i], (int32_t)i };
    sort_candidates(ar->cand, n_cand, ar->cand + n_cand);
    struct border out = { -FLT_MAX, INT32_MAX };
    for (uint32_t i = 0; i < n_cand; i++) {
        out = (struct border) { ar->cand[i].value, ar->cand[i].id };
        sum += ar->w[out.id];
        if (++have >= most || sum >= mass)
            break;
    }
    return out;
}

static void drop_beyond(const struct sample_area *ar, const float *x, uint32_t n, struct border b)
{
    for (uint32_t i = 0; i < n; i++)
        if (!survives(&b, x[i], (int32_t)i))
            ar->w[i] = 0;
}

/* Four chains, added in order: the same for every caller, and four times as fast as one. */
static double sum_of(const float *w, uint32_t n)
{
    double s[4] = { 0 };
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (uint32_t j = 0; j < 4; j++)
            s[j] += w[i + j];
    for (; i < n; i++)
        s[0] += w[i];
    return s[0] + s[1] + s[2] + s[3];
}

/* First id at which the running sum exceeds goal: by blocks, then inside one. */
static int32_t id_at(const float *w, uint32_t n, double goal)
{
    double sum = 0;
    int32_t last = -1;
    for (uint32_t b = 0; b < n; b += DRAW_BLOCK) {
        uint32_t len = n - b < DRAW_BLOCK ? n - b : DRAW_BLOCK;
        double block = sum_of(w + b, len), inside = sum;
        sum += block;
        if (block == 0)
            continue;
        for (uint32_t i = b; i < b + len && sum > goal; i++) {
            inside += w[i];
            last = w[i] > 0 ? (int32_t)i : last;
            if (inside > goal)
                return last;
        }
        if (sum > goal)
            return last;            /* the two ways of adding differ in the last bits: the block's last id */
    }
    for (uint32_t i = n; i > 0 && last < 0; i--)
        last = w[i - 1] > 0 ? (int32_t)(i - 1) : -1;
    return last;
}

static double total_of(const float *w, uint32_t n)
{
    double sum = 0;
    for (uint32_t b = 0; b < n; b += DRAW_BLOCK)
        sum += sum_of(w + b, n - b < DRAW_BLOCK ? n - b : DRAW_BLOCK);
    return sum;
}

/* The best n_best ids, best first: values beyond the worst kept one wait in a buffer that is sorted when it is full. */
static uint32_t best_of(const float *x, uint32_t n, uint32_t n_best, struct candidate *c)
{
    uint32_t have = 0, cap = 4 * n_best;
    float worst = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        if (!(x[i] > worst))
            continue;
        c[have++] = (struct candidate) { x[i], (int32_t)i };
        if (have == cap) {
            sort_candidates(c, have, c + cap);
            have = n_best;
            worst = c[have - 1].value;
        }
    }
    sort_candidates(c, have, c + cap);
    return have < n_best ? have : n_best;
}

static int by_id(const void *pa, const void *pb)
{
    return ((const struct candidate *)pa)->id - ((const struct candidate *)pb)->id;
}

/* The draw after a small top_k: only its members are weighed. */
static int32_t draw_of_few(const struct sample_area *ar, const struct arle_sample_row *row, const float *x, uint32_t n, float top)
{
    struct candidate *c = ar->cand;
    uint32_t n_cand = best_of(x, n, (uint32_t)row->top_k, c), kept = 0;
    float inv_t = 1.0f / row->temperature;
    double total = 0, sum = 0;
    for (uint32_t i = 0; i < n_cand; i++)
        total += c[i].value = expf((c[i].value - top) * inv_t);         /* from here on the value is the weight */
    bool nucleus = row->top_p < 1.0f && row->top_p > 0;
    double mass = nucleus ? (double)row->top_p * total : INFINITY;
    while (kept < n_cand && (kept == 0 || (sum < mass && c[kept].value >= row->min_p && c[kept].value > 0)))
        sum += c[kept++].value;
    qsort(c, kept, sizeof *c, by_id);
    double goal = (double)uniform(row->seed, row->counter) * sum, run = 0;
    for (uint32_t i = 0; i < kept; i++) {
        run += c[i].value;
        if (run > goal)
            return c[i].id;
    }
    return kept > 0 ? c[kept - 1].id : -1;
}

static int32_t draw(const struct kernels *k, const struct sample_area *ar, const struct arle_sample_row *row, const float *x, uint32_t n,
                    float top)
{
    if (row->top_k > 0 && row->top_k <= FEW && (uint32_t)row->top_k < n)
        return draw_of_few(ar, row, x, n, top);
    float inv_t = 1.0f / row->temperature;
    k->exps(n, x, top, inv_t, ar->w);
    if (row->top_k > 0 && (uint32_t)row->top_k < n)
        drop_beyond(ar, x, n, cut(ar, x, n, top, inv_t, (uint64_t)row->top_k, INFINITY));
    if (row->top_p < 1.0f && row->top_p > 0)
        drop_beyond(ar, x, n, cut(ar, x, n, top, inv_t, n, (double)row->top_p * total_of(ar->w, n)));
    if (row->min_p > 0)
        for (uint32_t i = 0; i < n; i++)        /* the best has weight 1 */
            if (ar->w[i] < row->min_p)
                ar->w[i] = 0;
    return id_at(ar->w, n, (double)uniform(row->seed, row->counter) * total_of(ar->w, n));
}

/* ---- one row -------------------------------------------------------------------------------------------------------- */

/* Best ids of the raw row by insertion: most values fail the first comparison. */
static void report_top(const struct arle_sample_args *a, uint32_t r, const float *x, uint32_t n_top, double lse)
{
    struct candidate best[ARLE_MAX_TOP];
    uint32_t n = 0;
    for (uint32_t i = 0; i < a->n_valid; i++) {
        struct candidate c = { x[i], (int32_t)i };
        if (n == n_top && !(c.value > best[n - 1].value))
            continue;
        uint32_t at = n < n_top ? n++ : n - 1;
        for (; at > 0 && c.value > best[at - 1].value; at--)
            best[at] = best[at - 1];
        best[at] = c;
    }
    for (uint32_t i = 0; i < n; i++) {
        a->top_ids[r * ARLE_MAX_TOP + i] = best[i].id;
        a->top_logprobs[r * ARLE_MAX_TOP + i] = (float)(best[i].value - lse);
    }
}

static struct sample_area area_of(struct arle_device *dev, unsigned part, uint32_t n)
{
    struct sample_area ar;
    char *p = thread_scratch(dev, part);
    ar.weight = (double *)(void *)p;
    ar.count = (uint32_t *)(void *)(p + N_BUCKETS * sizeof *ar.weight);
    ar.raw = (float *)(void *)(ar.count + N_BUCKETS);
    ar.w = ar.raw + n;
    ar.seen = (uint32_t *)(void *)ar.w;                     /* done with before weights and candidates are made */
    ar.cand = (struct candidate *)(void *)(ar.w + (n + 1) / 2 * 2);
    return ar;
}

static void sample_row(struct arle_device *dev, const struct arle_sample_args *a, uint32_t r, unsigned part)
{
    const struct arle_sample_row *row = &a->rows[r];
    struct sample_area ar = area_of(dev, part, a->n_valid);
    float *x = a->logits + (int64_t)r * a->ld, top;
    const float *raw = x;
    int32_t id = argmax(dev->k, x, a->n_valid, &top);
    double lse = top + log(dev->k->sum_exp(a->n_valid, x, top, 1.0f));
    a->top_logits[r] = top;
    a->target_logprob[r] = row->target >= 0 && (uint32_t)row->target < a->n_valid ? (float)(x[row->target] - lse) : NAN;
    if (row->n_top > 0)
        report_top(a, r, x, row->n_top < ARLE_MAX_TOP ? row->n_top : ARLE_MAX_TOP, lse);
    bool edits = row->n_bias > 0 || row->mask != NULL || has_penalty(row);
    if (edits) {
        memcpy(ar.raw, x, a->n_valid * sizeof *x);
        raw = ar.raw;
        if (has_penalty(row))
            memset(ar.seen, 0, a->n_valid * sizeof *ar.seen);
        edit(row, x, a->n_valid, ar.seen);
        id = argmax(dev->k, x, a->n_valid, &top);
        count(dev, N_sample_edit, 1);
    }
    if (row->temperature > 1e-6f && isfinite(top)) {
        int32_t drawn = draw(dev->k, &ar, row, x, a->n_valid, top);
        id = drawn >= 0 ? drawn : id;
        count(dev, N_sample_draw, 1);
    } else {
        count(dev, N_sample_argmax, 1);
    }
    a->ids[r] = a->pos != NULL && a->pos[r] <= 0 ? -1 : id;
    a->logprob[r] = (float)(raw[id] - lse);
}

static void sample_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct sample_job *j = arg;
    for (uint32_t r = part; r < j->a->n_rows; r += n_parts)
        sample_row(j->dev, j->a, r, part);
}

int cpu_sample(struct arle_device *dev, struct arle_stream *st, const struct arle_sample_args *a)
{
    struct sample_job j = { dev, a };
    if (a->n_valid == 0 || a->n_valid > a->vocab || a->n_valid > CPU_MAX_VOCAB)
        return -EINVAL;
    run_parts(dev, a->n_rows < 2 ? 0 : a->n_rows * (double)a->n_valid, sample_part, &j);
    return 0;
}
