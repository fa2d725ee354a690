/* Every op that a backend offers, in both arithmetics, against plain loops in double precision (ops_cases.c). */
#include "plugin/conform.h"
#include "plugin/ops_cases.h"

#include <string.h>

#define OP_ROW(name) { #name, offsetof(struct arle_ops, name) },
static const struct { const char *name; size_t at; } op_rows[] = { ARLE_OPS_V1(OP_ROW) };
enum { N_OPS = sizeof op_rows / sizeof op_rows[0] };

static size_t count_offered(const struct arle_ops *ops)
{
    size_t n = 0;
    for (size_t i = 0; i < N_OPS; i++) {
        void *fn = NULL;
        if (ops->struct_size >= op_rows[i].at + sizeof fn)
            memcpy(&fn, (const char *)ops + op_rows[i].at, sizeof fn);
        n += fn != NULL;
    }
    return n;
}

/* The worst part of a result, or a refusal of the backend. */
static void run_case(struct conform *c, struct ops_backend *b, const struct ops_case *oc, uint32_t dtype)
{
    char name[160], why[300] = "";
    struct ops_result res = { 0 };
    snprintf(name, sizeof name, "%s in %s", oc->name, dtype == ARLE_F32 ? "f32" : "bf16");
    int r = ops_run(b, oc, dtype, &res);
    if (r == -ENOTSUP) {
        conform_skip(c, name, "the backend lacks an op of it");
        ops_result_free(&res);
        return;
    }
    if (r < 0)
        snprintf(why, sizeof why, "%s", b->why);
    for (unsigned i = 0; r == 0 && i < res.n_parts; i++) {
        double tol = dtype == ARLE_F32 ? res.part[i].tol_f32 : res.part[i].tol_bf16, e = ops_error(&res.part[i]);
        if (!(e <= tol) && why[0] == '\0')
            snprintf(why, sizeof why, "%s: error %.3g, allowed %.3g", res.part[i].what, e, tol);
    }
    conform_case(c, why[0] == '\0' && res.n_parts > 0, name, why[0] != '\0' ? why : "the case compared nothing");
    ops_result_free(&res);
}

void conform_ops(struct conform *c, struct arle_device *dev)
{
    const struct arle_backend_api *api = c->self->ops;
    char name[80];
    size_t n = count_offered(api->ops);
    struct arle_err err = ARLE_ERR_INIT;
    struct ops_backend b = { .api = api, .ctx = c->self->ctx, .dev = dev };
    conform_case(c, ARLE_HAS(api->ops, struct arle_ops, embed) && ARLE_HAS(api->ops, struct arle_ops, linear)
                        && ARLE_HAS(api->ops, struct arle_ops, rmsnorm) && ARLE_HAS(api->ops, struct arle_ops, sample),
                 "it has embed, linear, rmsnorm and sample", "no model runs without these");
    snprintf(name, sizeof name, "%zu of %d ops are offered", n, (int)N_OPS);
    conform_case(c, n > 0, name, "");
    int r = api->mem.stream_create(dev, &b.st, &err);
    if (!conform_case(c, r == 0, "a stream for the ops can be made", err.msg))
        return;
    for (unsigned i = 0; i < ops_n_cases; i++) {
        run_case(c, &b, &ops_cases[i], ARLE_F32);
        run_case(c, &b, &ops_cases[i], ARLE_BF16);
    }
    api->mem.stream_destroy(dev, b.st);
}
