/* config.json of the Qwen3.5 family: every spelling, every refusal by its key, rope and YaRN figures, published sizes. */
#include "tap.h"
#include "config.h"
#include "model.h"

static int parse(const char *json, struct qwen35_config *c, struct arle_err *err)
{
    return qwen35_config_parse(json, strlen(json), c, err);
}

static void refuse(const char *json, const char *param)
{
    struct qwen35_config c;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(qwen35_config_is_ours(json, strlen(json)), 1);
    EXPECT_EQ(parse(json, &c, &err), -EINVAL);
    EXPECT_STR(err.param, param);
    if (strstr(err.msg, param) == NULL)
        TAP_FAIL("message \"%s\" does not name %s", err.msg, param);
}

static void all_spellings_are_recognised(void)
{
    static const char *const ours[] = {
        "{\"model_type\":\"qwen3_5\",\"text_config\":{}}", "{\"model_type\":\"qwen3_5_moe\",\"text_config\":{}}",
        "{\"model_type\":\"qwen3_5_text\"}", "{\"model_type\":\"qwen3_5_moe_text\"}",
        "{\"architectures\":[\"Qwen3_5ForConditionalGeneration\"]}", "{\"architectures\":[\"Qwen3_5MoeForConditionalGeneration\"]}",
        "{\"architectures\":[\"Qwen3_5ForCausalLM\"]}", "{\"architectures\":[\"Qwen3_5MoeForCausalLM\"]}",
    };
    static const char *const others[] = { "{\"model_type\":\"qwen3_next\"}", "{\"model_type\":7}", "{}", "[]", "", "{\"model_type\":",
                                          "{\"architectures\":[]}" };
    for (size_t i = 0; i < sizeof ours / sizeof ours[0]; i++) {
        struct qwen35_config c;
        struct arle_err err = ARLE_ERR_INIT;
        EXPECT_EQ(qwen35_config_is_ours(ours[i], strlen(ours[i])), 1);
        EXPECT_EQ(parse(ours[i], &c, &err), 0);
        EXPECT_EQ(c.n_experts > 0, strstr(ours[i], "oe") != NULL);
    }
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        EXPECT_EQ(qwen35_config_is_ours(others[i], strlen(others[i])), 0);
}

#define FLAT "{\"model_type\":\"qwen3_5_text\","
#define MOE "{\"model_type\":\"qwen3_5_moe_text\","
#define NEST "{\"model_type\":\"qwen3_5\",\"text_config\":{"

static void defaults_and_precedence(void)
{
    struct qwen35_config c;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(parse(FLAT "\"x\":1}", &c, &err) == 0);
    EXPECT_EQ(c.hidden, 4096);
    EXPECT_EQ(c.inter, 12288);
    EXPECT_EQ(c.n_valid, 248077);
    EXPECT_EQ(c.full[3] + c.full[7] + c.full[2], 2);
    EXPECT(!c.tied && !c.json_arguments && c.state_f32);
    EXPECT_EQ(c.rot_dim, 64);
    REQUIRE(parse(NEST "\"tie_word_embeddings\":false,\"output_gate_type\":\"swish\",\"mamba_ssm_dtype\":\"bfloat16\"},"
                  "\"tie_word_embeddings\":true}", &c, &err) == 0);
    EXPECT(c.tied && c.json_arguments && !c.state_f32);
    REQUIRE(parse(FLAT "\"num_hidden_layers\":3,\"full_attention_interval\":2}", &c, &err) == 0);
    EXPECT(!c.full[0] && c.full[1] && !c.full[2]);
    REQUIRE(parse(FLAT "\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}", &c, &err) == 0);
    EXPECT(c.fp8);
}

static void what_cannot_be_served_is_named(void)
{
    refuse(FLAT "\"attention_bias\":true}", "attention_bias");
    refuse(NEST "\"attention_bias\":true}}", "text_config.attention_bias");
    refuse(FLAT "\"attn_output_gate\":false}", "attn_output_gate");
    refuse(FLAT "\"mtp_use_dedicated_embeddings\":true}", "mtp_use_dedicated_embeddings");
    refuse(FLAT "\"mtp_num_hidden_layers\":2}", "mtp_num_hidden_layers");
    refuse(FLAT "\"hidden_act\":\"gelu\"}", "hidden_act");
    refuse(FLAT "\"output_gate_type\":\"sigmoid\"}", "output_gate_type");
    refuse(FLAT "\"linear_conv_kernel_dim\":3}", "linear_conv_kernel_dim");
    refuse(MOE "\"mlp_only_layers\":[1]}", "mlp_only_layers");
    refuse(MOE "\"num_experts\":0}", "num_experts");
    refuse(FLAT "\"num_experts\":8}", "num_experts");
    refuse(MOE "\"num_experts\":8,\"num_experts_per_tok\":9}", "num_experts_per_tok");
    refuse(FLAT "\"layer_types\":[\"full_attention\"]}", "layer_types");
    refuse(FLAT "\"num_hidden_layers\":1,\"layer_types\":[\"sliding_attention\"]}", "layer_types");
    refuse(FLAT "\"hidden_size\":\"4096\"}", "hidden_size");
    refuse(FLAT "\"hidden_size\":-8}", "hidden_size");
    refuse(FLAT "\"hidden_size\":4097}", "hidden_size");
    refuse(FLAT "\"num_key_value_heads\":3}", "num_key_value_heads");
    refuse(FLAT "\"linear_num_key_heads\":5}", "linear_num_key_heads");
    refuse(FLAT "\"rms_norm_eps\":0}", "rms_norm_eps");
    refuse(FLAT "\"vocab_size\":99999999999}", "vocab_size");
    refuse(FLAT "\"rope_parameters\":{\"rope_type\":\"longrope\"}}", "rope_parameters.rope_type");
    refuse(FLAT "\"rope_parameters\":7}", "rope_parameters");
    refuse(FLAT "\"rope_parameters\":{\"rope_type\":\"yarn\"}}", "rope_parameters.factor");
    refuse(FLAT "\"partial_rotary_factor\":0}", "partial_rotary_factor");
    refuse("{\"model_type\":\"qwen3_5\",\"text_config\":[]}", "text_config");
    refuse(FLAT "\"quantization\":{\"bits\":4}}", "quantization");
    refuse(FLAT "\"quantization_config\":{\"quant_method\":\"compressed-tensors\"}}", "quantization_config.quant_method");
    refuse(FLAT "\"quantization_config\":{\"quant_method\":\"modelopt\"}}", "quantization_config.quant_method");
    refuse(FLAT "\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[64,64]}}",
           "quantization_config.weight_block_size");
}

static void rope_has_the_published_frequencies(void)
{
    struct qwen35_config c;
    struct arle_err err = ARLE_ERR_INIT;
    REQUIRE(parse(FLAT "\"rope_parameters\":{\"rope_type\":\"mrope\",\"rope_theta\":10000000}}", &c, &err) == 0);
    EXPECT_NEAR(c.inv_freq[0], 1, 0);
    EXPECT_NEAR(c.inv_freq[1], 0.60429639, 1e-7);
    EXPECT_NEAR(c.inv_freq[2], 0.365174127, 1e-7);
    EXPECT_NEAR(c.inv_freq[15], 5.23299115e-4, 1e-9);
    EXPECT_NEAR(c.inv_freq[31], 1.6548171e-7, 1e-13);
    EXPECT_NEAR(c.rope_scale, 1, 0);
    struct qwen35_config old;
    REQUIRE(parse(FLAT "\"rope_theta\":10000000,\"partial_rotary_factor\":0.25}", &old, &err) == 0);
    EXPECT(memcmp(old.inv_freq, c.inv_freq, sizeof c.inv_freq) == 0);

    REQUIRE(parse(FLAT "\"max_position_embeddings\":262144,\"rope_parameters\":{\"rope_type\":\"yarn\",\"rope_theta\":1e7,"
                  "\"factor\":4.0,\"original_max_position_embeddings\":262144}}", &c, &err) == 0);
    EXPECT_NEAR(c.inv_freq[14], 8.65964323e-4, 1e-9);
    EXPECT_NEAR(c.inv_freq[18], 7.2173874e-5, 1e-10);
    EXPECT_NEAR(c.inv_freq[22], 3.84981632e-6, 1e-11);
    EXPECT_NEAR(c.inv_freq[31], 4.13704275e-8, 1e-13);
    EXPECT_NEAR(c.rope_scale, 1.138629436, 1e-6);
    EXPECT_EQ(c.context, 1048576);
}

static char *read_text(const char *path)
{
    FILE *f = fopen(path, "rb");
    char *text = f ? calloc(1, 1 << 16) : NULL;
    if (text != NULL && fread(text, 1, (1 << 16) - 1, f) == 0)
        text[0] = '\0';
    if (f != NULL)
        fclose(f);
    return text;
}

/* Parameter counts are known for all published sizes: a wrong shape anywhere would show. */
static void published_sizes_have_their_parameters(void)
{
    static const struct { const char *name; double params; bool thinks; double kv_bytes, state; } sizes[] = {
        { "0.8b", 0.7524e9, false, 12288, 0.633 + 18 }, { "2b", 1.8818e9, false, 12288, 0.633 + 18 },
        { "4b", 4.2058e9, true, 32768, 1.125 + 48 }, { "9b", 8.9538e9, true, 32768, 1.125 + 48 },
        { "27b", 26.896e9, true, 65536, 2.812 + 144 }, { "35b-a3b", 34.661e9, true, 20480, 1.406 + 60 },
        { "122b-a10b", 122.11e9, true, 24576, 2.531 + 144 },
    };
    const char *root = getenv("ARLE_TEST_MODELS");
    if (root == NULL)
        SKIP("ARLE_TEST_MODELS is not set");
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        char path[1024];
        struct arle_model_desc d = { .struct_size = sizeof d };
        struct arle_err err = ARLE_ERR_INIT;
        snprintf(path, sizeof path, "%s/shapes/qwen3.5-%s.json", root, sizes[i].name);
        char *json = read_text(path);
        REQUIRE(json != NULL);
        struct arle_model_load a = { .struct_size = sizeof a, .compute = ARLE_BF16, .kv_dtype = ARLE_BF16, .page_tokens = 16,
                                     .max_tokens = 64, .max_seqs = 4, .max_rows = 4, .config_json = json,
                                     .config_len = strlen(json) };
        if (qwen35_predict(NULL, &a, &d, &err) < 0)
            TAP_FAIL("%s: %s", sizes[i].name, err.msg);
        EXPECT_NEAR((double)d.n_params / sizes[i].params, 1, 2e-4);
        EXPECT_NEAR((double)d.groups[0].page_bytes, 16 * sizes[i].kv_bytes, 0);
        EXPECT_NEAR((double)d.groups[1].record_bytes / (1 << 20), sizes[i].state, 0.002);
        EXPECT_EQ(strstr(d.chat_options, "\"enable_thinking\": true") != NULL, sizes[i].thinks);
        EXPECT(d.step_weight_bytes <= d.weight_bytes && d.step_weight_bytes > 0);
        a.drafts = 1;
        uint64_t without = d.n_params;
        EXPECT_EQ(qwen35_predict(NULL, &a, &d, &err), 0);
        EXPECT(d.has_drafter && d.n_params > without);
        free(json);
    }
}

int main(void)
{
    RUN(all_spellings_are_recognised);
    RUN(defaults_and_precedence);
    RUN(what_cannot_be_served_is_named);
    RUN(rope_has_the_published_frequencies);
    RUN(published_sizes_have_their_parameters);
    return tap_done();
}
