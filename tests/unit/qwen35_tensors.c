/* The walk over a checkpoint's tensors: all layouts are accepted, and each fault is refused by the tensor's name, unpacked. */
#include "tap.h"
#include "model.h"
#include "weights/weights.h"

/* A checkpoint made of shapes: what a random view declares, under other names, stored otherwise, or with one fault. */
struct fake {
    struct arle_weights api;
    struct arle_weights *shapes;
    const char *prefix;             /* stands for "model." */
    bool single_experts, fp8;
    const char *missing, *misshapen, *retyped;     /* the one fault */
    const char *extra;              /* a foreign tensor that at() shows */
    struct arle_tensor made[8192];
    char names[8192][160];
    unsigned n_made, found;
};

static const char DENSE[] = "{\"model_type\":\"qwen3_5_text\",\"vocab_size\":512,\"hidden_size\":256,\"intermediate_size\":256,"
    "\"num_hidden_layers\":4,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"linear_num_key_heads\":1,"
    "\"linear_num_value_heads\":2,\"mtp_num_hidden_layers\":1}";
static const char MIXED[] = "{\"model_type\":\"qwen3_5_moe_text\",\"vocab_size\":512,\"hidden_size\":256,\"num_experts\":4,"
    "\"num_experts_per_tok\":2,\"moe_intermediate_size\":128,\"shared_expert_intermediate_size\":128,\"num_hidden_layers\":4,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"linear_num_key_heads\":1,\"linear_num_value_heads\":2}";

static struct fake fake;

static const struct arle_tensor *make(struct fake *f, const char *name, uint32_t dtype, uint32_t n_dims, const int64_t *dim)
{
    if (f->n_made == 8192)
        return NULL;
    struct arle_tensor *t = &f->made[f->n_made];
    snprintf(f->names[f->n_made], sizeof f->names[0], "%s", name);
    *t = (struct arle_tensor){ .name = f->names[f->n_made++], .dtype = dtype, .n_dims = n_dims };
    memcpy(t->dim, dim, n_dims * sizeof *dim);
    return t;
}

/* Tensors that an FP8 pack quantises: matrices but for embedding, head, router, gates and fc. */
static bool quantised(const char *name, const struct arle_tensor *t)
{
    return t->n_dims == 2 && strstr(name, "_proj.weight") != NULL ? true
           : t->n_dims == 2 && (strstr(name, "in_proj_qkv") != NULL || strstr(name, "in_proj_z") != NULL);
}

static const struct arle_tensor *lookup(struct fake *f, const char *name)
{
    char plain[256];
    size_t n = strlen(f->prefix);
    if (strncmp(name, f->prefix, n) == 0)
        snprintf(plain, sizeof plain, "model.%s", name + n);
    else if (strncmp(name, "model.", 6) == 0)
        return NULL;                /* only the other prefix exists */
    else
        snprintf(plain, sizeof plain, "%s", name);
    char *expert = strstr(plain, "mlp.experts.");
    if (expert != NULL && f->single_experts) {
        unsigned e;
        char which[32];
        if (sscanf(expert, "mlp.experts.%u.%31[a-z_].weight", &e, which) != 2 || e >= 4)
            return NULL;
        bool down = strcmp(which, "down_proj") == 0;
        return make(f, name, ARLE_BF16, 2, down ? (int64_t[]){ 256, 128 } : (int64_t[]){ 128, 256 });
    }
    return f->shapes->find(f->shapes, plain);
}

static const struct arle_tensor *fake_find(const struct arle_weights *w, const char *name)
{
    struct fake *f = w->ctx;
    char base[256];
    snprintf(base, sizeof base, "%s", name);
    char *scale = strstr(base, "_scale_inv");
    if (f->missing != NULL && strstr(name, f->missing) != NULL)
        return NULL;
    if (scale != NULL) {
        *scale = '\0';
        const struct arle_tensor *of = f->fp8 ? lookup(f, base) : NULL;
        return of != NULL && quantised(base, of)
               ? make(f, name, ARLE_BF16, 2, (int64_t[]){ (of->dim[0] + 127) / 128, (of->dim[1] + 127) / 128 }) : NULL;
    }
    const struct arle_tensor *t = lookup(f, name);
    if (t == NULL)
        return NULL;
    f->found++;
    if (f->misshapen != NULL && strstr(name, f->misshapen) != NULL) {
        int64_t dim[ARLE_MAX_DIMS];
        memcpy(dim, t->dim, sizeof dim);
        dim[0]++;
        return make(f, name, t->dtype, t->n_dims, dim);
    }
    if (f->retyped != NULL && strstr(name, f->retyped) != NULL)
        return make(f, name, ARLE_I8, t->n_dims, t->dim);
    if (f->fp8 && quantised(name, t))
        return make(f, name, ARLE_F8E4M3, t->n_dims, t->dim);
    return t;
}

static size_t fake_ignore(const struct arle_weights *w, const char *prefix)
{
    return 0;
}

static const struct arle_tensor *fake_at(const struct arle_weights *w, size_t i)
{
    struct fake *f = w->ctx;
    return f->extra != NULL && i == 0 ? make(f, f->extra, ARLE_U8, 1, (int64_t[]){ 1 }) : NULL;
}

static int walk(const char *json, struct qwen35_totals *sum, struct arle_err *err)
{
    struct qwen35_config c;
    struct arle_model_load a = { .struct_size = sizeof a, .drafts = 1 };
    if (qwen35_config_parse(json, strlen(json), &c, err) < 0 || weights_random(&fake.shapes, 1, err) < 0)
        return -1;
    a.weights = fake.shapes;
    int r = qwen35_tensors(&a, &c, NULL, 0, sum, err);     /* declares all shapes */
    fake.api = (struct arle_weights){ .struct_size = sizeof fake.api, .ctx = &fake, .find = fake_find, .ignore = fake_ignore, .at = fake_at };
    a.weights = &fake.api;
    fake.n_made = fake.found = 0;
    if (fake.prefix == NULL)
        fake.prefix = "model.";
    if (r == 0)
        r = qwen35_tensors(&a, &c, NULL, 0, sum, err);
    weights_close(fake.shapes);
    return r;
}

static void all_layouts_have_the_same_parameters(void)
{
    struct qwen35_totals flat, nested, single, fp8;
    struct arle_err err = ARLE_ERR_INIT;
    fake = (struct fake){ .prefix = "model." };
    EXPECT_EQ(walk(MIXED, &flat, &err), 0);
    fake = (struct fake){ .prefix = "model.language_model." };
    EXPECT_EQ(walk(MIXED, &nested, &err), 0);
    fake = (struct fake){ .single_experts = true };
    EXPECT_EQ(walk(MIXED, &single, &err), 0);
    EXPECT_EQ(flat.n_params, nested.n_params);
    EXPECT_EQ(flat.n_params, single.n_params);
    EXPECT(flat.step_bytes < flat.device_bytes);
    fake = (struct fake){ .single_experts = true, .fp8 = true };
    EXPECT_EQ(walk(MIXED, &fp8, &err), 0);
    EXPECT_EQ(flat.n_params, fp8.n_params);
    fake = (struct fake){ .fp8 = true };
    EXPECT_EQ(walk(DENSE, &fp8, &err), 0);
    EXPECT(fp8.has_drafter);
}

static void refuse(const char *json, const char *param, const char *why)
{
    struct qwen35_totals t;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(walk(json, &t, &err), -EINVAL);
    EXPECT_STR(err.param, param);
    if (strstr(err.msg, why) == NULL)
        TAP_FAIL("message \"%s\" lacks \"%s\"", err.msg, why);
}

static void faults_are_named(void)
{
    fake = (struct fake){ .missing = "layers.2.linear_attn.dt_bias" };
    refuse(DENSE, "model.layers.2.linear_attn.dt_bias", "missing");
    fake = (struct fake){ .misshapen = "layers.3.self_attn.k_proj" };
    refuse(DENSE, "model.layers.3.self_attn.k_proj.weight", "shape [257, 256], expected [256, 256]");
    fake = (struct fake){ .retyped = "model.norm.weight" };
    refuse(DENSE, "model.norm.weight", "only BF16");
    fake = (struct fake){ .missing = "lm_head" };
    refuse(DENSE, "lm_head.weight", "missing");
    fake = (struct fake){ .missing = "mtp.norm" };
    refuse(DENSE, "mtp.norm.weight", "missing");
    fake = (struct fake){ .missing = "experts.down_proj" };
    refuse(MIXED, "model.layers.0.mlp.experts.down_proj", "missing");
    fake = (struct fake){ .fp8 = true, .missing = "layers.0.mlp.up_proj.weight_scale_inv" };
    refuse(DENSE, "model.layers.0.mlp.up_proj.weight", "without");
    fake = (struct fake){ .prefix = "blk." };
    refuse(DENSE, "model.embed_tokens.weight", "neither");
}

static void foreign_packs_are_refused_with_a_reason(void)
{
    fake = (struct fake){ .extra = "model.layers.0.mlp.up_proj.weight_packed" };
    refuse(DENSE, fake.extra, "NVFP4");
    fake = (struct fake){ .extra = "model.layers.0.mlp.up_proj.qweight" };
    refuse(DENSE, fake.extra, "GPTQ");
}

static void no_drafter_in_the_checkpoint_is_fine(void)
{
    struct qwen35_totals t;
    struct arle_err err = ARLE_ERR_INIT;
    fake = (struct fake){ .missing = "mtp." };
    EXPECT_EQ(walk(DENSE, &t, &err), 0);
    EXPECT(!t.has_drafter);
}

int main(void)
{
    RUN(all_layouts_have_the_same_parameters);
    RUN(faults_are_named);
    RUN(foreign_packs_are_refused_with_a_reason);
    RUN(no_drafter_in_the_checkpoint_is_fine);
    return tap_done();
}
