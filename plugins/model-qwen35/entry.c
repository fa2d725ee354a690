/* The plugin's descriptor and its table. Everything else is behind it: config, tensors, load, forward, chat_render. */
#include "entry.h"
#include "chat.h"
#include "model.h"
#include <arle/plugin.h>

#include <stdlib.h>
#include <string.h>

static int recognise(void *ctx, const char *json, size_t len, struct arle_err *err)
{
    struct qwen35_config cfg;
    if (!qwen35_config_is_ours(json, len))
        return 0;
    int r = qwen35_config_parse(json, len, &cfg, err);
    return r < 0 ? r : 1;
}

void qwen35_loaded(struct qwen35_ctx *ctx, const struct qwen35_config *cfg)
{
    if (ctx == NULL)
        return;
    __atomic_store_n(&ctx->thinks, qwen35_thinks(cfg), __ATOMIC_RELAXED);
    __atomic_store_n(&ctx->json_arguments, cfg->json_arguments, __ATOMIC_RELAXED);
    if (!cfg->state_f32 && ctx->log != NULL)
        ctx->log->write(ARLE_LOG_WARN, "model-qwen35", "state-dtype", "key=mamba_ssm_dtype used=float32");
}

static int open_plugin(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
    struct qwen35_ctx *ctx = calloc(1, sizeof *ctx);
    if (ctx == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for model-qwen35");
    const struct arle_conf_service *cs = host != NULL ? arle_host_conf(host) : NULL;
    ctx->log = host != NULL ? arle_host_log(host) : NULL;
    if (cs != NULL && conf != NULL) {
        const char *version = cs->str(conf, "template"), *thinking = cs->str(conf, "thinking");
        if (version != NULL && strcmp(version, "auto") != 0)
            ctx->template_conf = strcmp(version, "3.6") == 0 ? QWEN35_TEMPLATE_36 : QWEN35_TEMPLATE_35;
        if (thinking != NULL && strcmp(thinking, "auto") != 0)
            ctx->thinking_conf = strcmp(thinking, "on") == 0 ? QWEN35_THINKING_ON : QWEN35_THINKING_OFF;
    }
    *out_ctx = ctx;
    return 0;
}

static void close_plugin(void *ctx)
{
    free(ctx);
}

static int load(void *ctx, const struct arle_model_load *args, struct arle_model **out, struct arle_err *err)
{
    return qwen35_load(ctx, args, out, err);
}

static const struct arle_conf_key keys[] = {
    { .name = "template", .type = ARLE_CONF_ENUM, .def = "auto", .choices = "auto|3.5|3.6", .unit = "",
      .help = "Version of the chat template: 3.5 writes tool arguments as Python prints them, 3.6 as JSON; auto goes by config.json." },
    { .name = "thinking", .type = ARLE_CONF_ENUM, .def = "auto", .choices = "auto|on|off", .unit = "",
      .help = "Whether answers begin with reasoning when a request does not say; auto: off for models of up to 24 layers." },
    { 0 },
};

static const struct arle_model_api api = {
    .struct_size = sizeof api,
    .recognise = recognise,
    .load = load,
    .destroy = qwen35_destroy,
    .describe = qwen35_describe,
    .bind = qwen35_bind,
    .step = qwen35_step,
    .predict = qwen35_predict,
    .chat_render = qwen35_chat_render,
    .chat_syntax = qwen35_chat_syntax,
};

ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_MODEL),
    .name = "model-qwen35", .version = "0.1.0", .license = "MIT",
    .summary = "Qwen3.5, 3.6 and 3.8: gated delta net and gated attention, dense or mixture of experts, with drafting head.",
    .keys = keys,
    .open = open_plugin,
    .close = close_plugin,
    .ops = &api,
};
