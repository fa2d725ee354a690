/*
 * What the DeepSeek-V4 plugin reads from outside, chosen by the first byte. C: config.json, whatever is accepted must be
 * predictable. L: a safetensors file with this architecture's names, loaded with a small configuration onto the CPU backend (left
 * out where that was not built). R: a conversation of arbitrary JSON. D: output of the model through the one automaton with this
 * plugin's syntax, whole and in pieces cut by the second byte.
 */
#include "model.h"

#include <json-c/json.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "chat/automaton.h"
#include "chat/coerce.h"
#include "plugin_util.h"
#include "util/sbuf.h"
#include "weights/weights.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char small_config[] =
    "{\"model_type\":\"deepseek_v4\",\"architectures\":[\"DeepseekV4ForCausalLM\"],\"vocab_size\":16,\"hidden_size\":32,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":16,\"qk_rope_head_dim\":8,"
    "\"q_lora_rank\":8,\"o_groups\":1,\"o_lora_rank\":8,\"sliding_window\":8,\"index_n_heads\":2,\"index_head_dim\":8,"
    "\"index_topk\":2,\"hc_mult\":2,\"hc_sinkhorn_iters\":2,\"hc_eps\":1e-6,\"rms_norm_eps\":1e-6,\"n_routed_experts\":2,"
    "\"num_experts_per_tok\":1,\"n_shared_experts\":1,\"moe_intermediate_size\":32,\"max_position_embeddings\":64,"
    "\"routed_scaling_factor\":1.5,\"swiglu_limit\":10.0,\"rope_theta\":10000,\"compress_rope_theta\":160000,"
    "\"compress_ratios\":[4,128,0],\"num_hash_layers\":1,\"num_nextn_predict_layers\":1,\"hidden_act\":\"silu\","
    "\"scoring_func\":\"sqrtsoftplus\",\"topk_method\":\"noaux_tc\",\"norm_topk_prob\":true,\"tie_word_embeddings\":false,"
    "\"quantization_config\":{\"quant_method\":\"fp8\",\"scale_fmt\":\"ue8m0\",\"weight_block_size\":[128,128]}}";

static struct arle_model_load load_args(const char *json, size_t len)
{
    return (struct arle_model_load){ .struct_size = sizeof(struct arle_model_load), .compute = ARLE_BF16, .kv_dtype = ARLE_BF16,
                                     .page_tokens = 128, .max_tokens = 16, .max_seqs = 2, .max_rows = 2, .drafts = 1,
                                     .config_json = json, .config_len = len };
}

static const void *no_service(const struct arle_host *host, const char *name, uint32_t version)
{
    return NULL;            /* defaults for everything */
}

static const struct arle_backend_api *cpu_backend(struct arle_device **dev)
{
    static const struct arle_backend_api *be;
    static struct arle_device *the_device;
    static bool tried;
    if (!tried) {
        static const struct arle_host host = { .struct_size = sizeof host, .service = no_service };
        const struct arle_plugin *p = plugin_descriptor("backend-cpu");
        struct arle_err err = ARLE_ERR_INIT;
        void *ctx;
        tried = true;
        if (p != NULL && p->open(&host, NULL, &ctx, &err) == 0) {
            be = p->ops;
            if (be->open_device(ctx, 0, &the_device, &err) < 0)
                be = NULL;
        }
    }
    *dev = the_device;
    return be;
}

static void config(const char *json, size_t len)
{
    struct ds_config c;
    struct arle_model_desc d;
    struct arle_err err = ARLE_ERR_INIT;
    int ours = ds_config_recognise(json, len, &err);
    if (ours < 0 && (err.code != ours || err.msg[0] == '\0'))
        abort();
    if (ours != 1 || ds_config_parse(json, len, &c, &err) < 0)
        return;
    if (c.L > DS_MAX_LAYERS || c.H % c.G != 0 || c.K > c.E || c.rot > c.d)
        abort();
    struct arle_model_load a = load_args(json, len);
    a.backend = cpu_backend(&a.device);
    if (a.backend == NULL)
        return;
    if (ds_predict(&a, &d, &err) == 0 ? d.n_params == 0 || d.weight_bytes == 0 : err.msg[0] == '\0')
        abort();
}

static void loader(const uint8_t *data, size_t len)
{
    struct arle_weights *w = NULL;
    struct arle_model *m = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    struct arle_model_load a = load_args(small_config, sizeof small_config - 1);
    a.backend = cpu_backend(&a.device);
    if (a.backend == NULL || weights_from_memory("input", data, len, &w, &err) < 0)
        return;
    a.weights = w;
    int r = ds_load(&a, &m, &err);
    if (r < 0 ? m != NULL || err.code != r || err.msg[0] == '\0' : m == NULL)
        abort();
    ds_destroy(m);
    weights_close(w);
}

static int on_text(void *ctx, const char *s, size_t n, uint32_t flags)
{
    sbuf_add(ctx, s, n);
    return 0;
}

static int on_mark(void *ctx, uint32_t mark)
{
    return 0;
}

static void chat(const char *json, size_t len)
{
    struct sbuf out = SBUF_INIT;
    const struct arle_chat_sink sink = { &out, on_text, on_mark };
    struct arle_chat_result res = { .struct_size = sizeof res };
    struct arle_err err = ARLE_ERR_INIT;
    int r = ds_chat_render(NULL, json, len, &sink, &res, &err);
    if (r < 0 ? err.code != r || err.msg[0] == '\0' : out.n == 0)
        abort();
    sbuf_fini(&out);
}

struct trace { struct sbuf all, args; int kind; };

static void on_event(void *arg, const struct chat_event *ev)
{
    struct trace *t = arg;
    if (ev->kind == CHAT_CALL_ARGS)
        sbuf_add(&t->args, ev->text, ev->len);
    if (ev->kind == CHAT_CALL_END) {
        if (!coerce_is_json(t->args.p, t->args.n) && t->args.n < 512)
            abort();
        sbuf_reset(&t->args);
    }
    if ((int)ev->kind != t->kind || ev->kind == CHAT_CALL_START)
        sbuf_fmt(&t->all, "\x01%d:", (int)ev->kind);
    t->kind = ev->kind;
    sbuf_add(&t->all, ev->text, ev->len);
}

/* The second byte: bit 0 starts in reasoning, the rest is the length of pieces, 0 for one. */
static void follow(struct trace *t, const char *p, size_t n, bool reasoning, size_t piece)
{
    struct automaton_opts o = { .syntax = ds_chat_syntax(NULL), .starts_in_reasoning = reasoning, .parse_calls = true, .fn = on_event,
                                .arg = t };
    struct automaton *a = automaton_create(&o);
    for (size_t at = 0; a != NULL && at < n; at += piece)
        automaton_push(a, p + at, n - at < piece ? n - at : piece);
    automaton_finish(a);
    automaton_destroy(a);
}

static void output(const uint8_t *data, size_t len)
{
    if (len < 2)
        return;
    struct trace whole = { .all = SBUF_INIT }, cut = { .all = SBUF_INIT };
    const char *p = (const char *)data + 1;
    follow(&whole, p, len - 1, data[0] & 1, len);
    follow(&cut, p, len - 1, data[0] & 1, 1 + data[0] / 2 % 32);
    if (whole.all.n != cut.all.n || memcmp(sbuf_text(&whole.all), sbuf_text(&cut.all), cut.all.n) != 0)
        abort();
    sbuf_fini(&whole.all);
    sbuf_fini(&whole.args);
    sbuf_fini(&cut.all);
    sbuf_fini(&cut.args);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    switch (data[0]) {
    case 'C': config((const char *)data + 1, size - 1); break;
    case 'L': loader(data + 1, size - 1); break;
    case 'R': chat((const char *)data + 1, size - 1); break;
    case 'D': output(data + 1, size - 1); break;
    }
    return 0;
}
