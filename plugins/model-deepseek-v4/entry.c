/* The descriptor of the DeepSeek-V4 plugin and its function table. Sees no formula. */
#include "model.h"

struct ds_ctx { int unused; };

static struct ds_ctx the_ctx;           /* the plugin keeps no state of its own */

static int open_plugin(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
    *out_ctx = &the_ctx;
    return 0;
}

static void close_plugin(void *ctx)
{
}

static int recognise(void *ctx, const char *json, size_t len, struct arle_err *err)
{
    return ds_config_recognise(json, len, err);
}

static int load(void *ctx, const struct arle_model_load *args, struct arle_model **out, struct arle_err *err)
{
    return ds_load(args, out, err);
}

static int predict(void *ctx, const struct arle_model_load *args, struct arle_model_desc *out, struct arle_err *err)
{
    return ds_predict(args, out, err);
}

static const struct arle_model_desc *describe(const struct arle_model *m)
{
    return &m->desc;
}

static const struct arle_model_api api = {
    .struct_size = sizeof api,
    .recognise = recognise,
    .load = load,
    .destroy = ds_destroy,
    .describe = describe,
    .bind = ds_bind,
    .step = ds_step,
    .predict = predict,
    .chat_render = ds_chat_render,
    .chat_syntax = ds_chat_syntax,
};

ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_MODEL),
    .name = "model-deepseek-v4",
    .version = "0.1.0",
    .license = "MIT",
    .summary = "DeepSeek-V4 (Flash, Pro): windowed, compressed and indexed attention, hyper-connections, hash-routed experts",
    .open = open_plugin,
    .close = close_plugin,
    .ops = &api,
};
