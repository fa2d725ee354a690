/*
 * Layouts that plugins were compiled with. Op arguments, the batch inside a step and the memory table inside a backend's have nothing
 * behind which they could grow: a model built with older headers would hand a newer backend fewer bytes than it reads. So their sizes
 * are held here, for machines with 64-bit pointers, and so is where the last member of version 1.0 lies in what does grow.
 */
#include "tap.h"

#include <arle/model.h>
#include <arle/ops.h>

#define ARGS(name) { #name, sizeof(struct arle_##name##_args), offsetof(struct arle_ops, name) },
static const struct { const char *name; size_t bytes, at; } op[] = { ARLE_OPS_V1(ARGS) };

static const struct { const char *name; size_t bytes; } frozen_op[] = {
    { "embed", 48 },        { "rmsnorm", 72 },      { "linear", 56 },       { "norm_linear", 80 },   { "silu_mul", 48 },
    { "gate_up", 80 },      { "attn_prepare", 176 }, { "attn_paged", 136 }, { "gdn", 200 },          { "moe_route", 104 },
    { "moe_experts", 136 }, { "seq_shift", 72 },    { "sample", 112 },      { "hc_expand", 40 },     { "hc_pre", 80 },
    { "hc_post", 40 },      { "hc_head", 72 },      { "head_rope", 80 },    { "window_store", 64 },  { "compress", 144 },
    { "index_select", 128 }, { "attn_latent", 192 }, { "norm_moe", 272 },   { "gdn_keep", 216 },     { "seq_shift_keep", 88 },
};

static void op_arguments_keep_their_size_and_place(void)
{
    if (sizeof(void *) != 8)
        SKIP("held for 64-bit pointers");
    REQUIRE(sizeof op / sizeof op[0] == sizeof frozen_op / sizeof frozen_op[0]);
    for (size_t i = 0; i < sizeof op / sizeof op[0]; i++) {
        EXPECT_STR(op[i].name, frozen_op[i].name);
        EXPECT_EQ(op[i].bytes, frozen_op[i].bytes);
        EXPECT_EQ(op[i].at, 8 * (i + 1));
    }
}

static void what_lies_inside_others_keeps_its_size(void)
{
    if (sizeof(void *) != 8)
        SKIP("held for 64-bit pointers");
    EXPECT_EQ(sizeof(struct arle_batch), 96);
    EXPECT_EQ(sizeof(struct arle_paged), 40);
    EXPECT_EQ(sizeof(struct arle_state), 24);
    EXPECT_EQ(sizeof(struct arle_save), 12);
    EXPECT_EQ(sizeof(struct arle_bias), 8);
    EXPECT_EQ(sizeof(struct arle_sample_row), 88);
    EXPECT_EQ(sizeof(struct arle_mem_ops), 112);
    EXPECT_EQ(sizeof(struct arle_weight_part), 48);
    EXPECT_EQ(sizeof(struct arle_counter), 16);
}

static void what_grows_grows_at_its_end(void)
{
    if (sizeof(void *) != 8)
        SKIP("held for 64-bit pointers");
    EXPECT_EQ(offsetof(struct arle_step, drafts), 136);
    EXPECT_EQ(offsetof(struct arle_model_desc, chat_options), 80);
    EXPECT_EQ(offsetof(struct arle_backend_api, ceiling), 248);
    EXPECT_EQ(offsetof(struct arle_ops, attn_latent), 176);
}

int main(void)
{
    RUN(op_arguments_keep_their_size_and_place);
    RUN(what_lies_inside_others_keeps_its_size);
    RUN(what_grows_grows_at_its_end);
    return tap_done();
}
