/* How one row becomes a token: a request's sampling options as the sample op wants them. */
#include "sched/sched.h"

void sample_row(const struct engine *e, const struct row *row, struct arle_sample_row *out)
{
    const struct seq *sq = row->seq;
    const struct request *rq = sq->rq;
    const struct sampling *p = &rq->sampling;
    *out = (struct arle_sample_row){ .top_p = 1, .repetition = 1, .target = -1, .n_top = p->n_top };
    if (!row->sample) {
        out->target = sq->tokens[row->pos + 1];
        return;
    }
    out->temperature = p->temperature;
    out->top_p = p->top_p;
    out->min_p = p->min_p;
    out->top_k = p->top_k;
    out->n_bias = p->n_bias;
    out->seed = sq->seed;
    /* The position, not a count of calls: an answer that is computed again after it lost its pages draws the same. */
    out->counter = row->pos + 1;
    if (rq->penalties) {
        out->repetition = p->repetition;
        out->presence = p->presence;
        out->frequency = p->frequency;
        out->history = e->d_hist + (size_t)sq->hist * e->hist_stride;
        out->n_history = row->pos + 1;
        out->n_prompt = sq->n_prompt;
    }
}
