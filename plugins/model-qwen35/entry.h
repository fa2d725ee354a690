/* The plugin's own state behind the pointer that open() returns. */
#ifndef MODEL_QWEN35_ENTRY_H
#define MODEL_QWEN35_ENTRY_H

#include "config.h"
#include <arle/host.h>

enum qwen35_template { QWEN35_TEMPLATE_AUTO, QWEN35_TEMPLATE_35, QWEN35_TEMPLATE_36 };
enum qwen35_thinking { QWEN35_THINKING_AUTO, QWEN35_THINKING_ON, QWEN35_THINKING_OFF };

struct qwen35_ctx {
    const struct arle_log_service *log;         /* NULL: no log */
    enum qwen35_template template_conf;         /* keys of [plugin model-qwen35] */
    enum qwen35_thinking thinking_conf;
    /* Defaults of the checkpoint that was loaded last, for hosts that do not pass desc.chat_options on. Atomic: load() writes,
     * chat_render() of any thread reads; nothing else hangs on the order. */
    int thinks, json_arguments;
};

/** Notes a loaded checkpoint's chat defaults, and logs what its config asked for and did not get. */
void qwen35_loaded(struct qwen35_ctx *ctx, const struct qwen35_config *cfg);
/** Whether a checkpoint of that size thinks unless told not to. */
bool qwen35_thinks(const struct qwen35_config *cfg);

#endif
