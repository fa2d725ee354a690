/* Which ops a backend offers, and each of them against the reference. */
#include "plugin/conform.h"

#define COUNT_OP(name) { #name, offsetof(struct arle_ops, name) },
static const struct { const char *name; size_t at; } op_rows[] = { ARLE_OPS_V1(COUNT_OP) };

void conform_ops(struct conform *c, struct arle_device *dev)
{
    const struct arle_backend_api *api = c->self->ops;
    const struct arle_ops *ops = api->ops;
    size_t n = 0;
    for (size_t i = 0; i < sizeof op_rows / sizeof op_rows[0]; i++) {
        void *fn = NULL;
        if (ops->struct_size >= op_rows[i].at + sizeof fn)
            fn = *(void *const *)((const char *)ops + op_rows[i].at);
        n += fn != NULL;
    }
    conform_case(c, ARLE_HAS(ops, struct arle_ops, embed) && ARLE_HAS(ops, struct arle_ops, linear)
                        && ARLE_HAS(ops, struct arle_ops, rmsnorm) && ARLE_HAS(ops, struct arle_ops, sample),
                 "it has embed, linear, rmsnorm and sample", "no model runs without these");
    char name[80];
    snprintf(name, sizeof name, "%zu of %zu ops are offered", n, sizeof op_rows / sizeof op_rows[0]);
    conform_case(c, n > 0, name, "");
}
