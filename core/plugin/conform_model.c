/* What every model architecture must do without a checkpoint: refuse strangers, survive garbage, render a conversation. */
#include "plugin/conform.h"

#include <string.h>

static void garbage(struct conform *c)
{
    static const char *const texts[] = { "", "{", "{}", "null", "[]", "\"x\"", "{\"architectures\": 7}", "{\"architectures\": []}",
        "{\"model_type\": null}", "{\"architectures\": [\"NoSuchModelForCausalLM\"], \"model_type\": \"no_such_model\"}",
        "{\"text_config\": {\"hidden_size\": -1}}", "\xff\xfe{}" };
    const struct arle_model_api *api = c->self->ops;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        struct arle_err err = ARLE_ERR_INIT;
        char name[128];
        snprintf(name, sizeof name, "recognise() turns garbage %zu away", i + 1);
        int r = api->recognise(c->self->ctx, texts[i], strlen(texts[i]), &err);
        conform_case(c, r == 0 || (r == -EINVAL && err.msg[0] != '\0'), name, r > 0 ? "it claims to know it" : "an error without a reason");
    }
}

struct text_sink { size_t n_text, n_marks; bool bad; };

static int take_text(void *ctx, const char *text, size_t len, uint32_t flags)
{
    struct text_sink *s = ctx;
    s->n_text += len;
    s->bad |= (text == NULL && len > 0) || flags == 0;
    return 0;
}

static int take_mark(void *ctx, uint32_t mark)
{
    struct text_sink *s = ctx;
    s->n_marks++;
    s->bad |= mark < ARLE_MARK_SYSTEM_END || mark > ARLE_MARK_STABLE;
    return 0;
}

static int refuse_text(void *ctx, const char *text, size_t len, uint32_t flags)
{
    return -ENOSPC;
}

static void chat(struct conform *c)
{
    static const char good[] = "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":\"Hello\"}],"
                               "\"add_generation_prompt\":true}";
    static const char raw[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b c\","
                              "\"raw_content\":\"b\",\"tool_calls\":[{\"id\":\"1\",\"name\":\"f\",\"arguments\":{},\"raw\":{\"lead\":\" \","
                              "\"text\":[\"x\",\"<y>\",\"c\"]}},{\"id\":\"2\",\"name\":\"g\",\"arguments\":{},\"raw\":{\"lead\":\"\","
                              "\"text\":[]}}]}]}";
    static const char bad[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"martian\",\"content\":\"b\"}]}";
    const struct arle_model_api *api = c->self->ops;
    if (!ARLE_HAS(api, struct arle_model_api, chat_render)) {
        conform_skip(c, "chat_render()", "it has none: completions only");
        return;
    }
    struct text_sink sink = { 0 };
    struct arle_chat_sink out = { &sink, take_text, take_mark };
    struct arle_chat_result res = { .struct_size = sizeof res };
    struct arle_err err = ARLE_ERR_INIT;
    int r = api->chat_render(c->self->ctx, good, sizeof good - 1, &out, &res, &err);
    conform_case(c, r == 0 && sink.n_text > strlen("Be brief.Hello") && !sink.bad, "chat_render() writes a conversation", err.msg);
    err = (struct arle_err)ARLE_ERR_INIT;
    r = api->chat_render(c->self->ctx, raw, sizeof raw - 1, &out, &res, &err);
    conform_case(c, r == 0 && !sink.bad, "chat_render() takes tool calls as they were sampled", err.msg);
    r = api->chat_render(c->self->ctx, bad, sizeof bad - 1, &out, &res, &err);
    conform_case(c, r == -EINVAL && err.msg[0] != '\0', "chat_render() refuses an unknown role with -EINVAL and a reason", err.msg);
    out.text = refuse_text;
    r = api->chat_render(c->self->ctx, good, sizeof good - 1, &out, &res, &err);
    conform_case(c, r == -ENOSPC, "chat_render() passes an error of the sink on", "");
    if (conform_case(c, ARLE_HAS(api, struct arle_model_api, chat_syntax), "chat_render() comes with chat_syntax()", "")) {
        const struct arle_output_syntax *syn = api->chat_syntax(c->self->ctx);
        conform_case(c, syn != NULL && syn->struct_size >= offsetof(struct arle_output_syntax, calls_in_reasoning),
                     "chat_syntax() returns a table", "");
    }
}

void conform_model(struct conform *c)
{
    garbage(c);
    chat(c);
    if (c->model_dir != NULL)
        conform_checkpoint(c, c->model_dir);
    else
        conform_skip(c, "loading a checkpoint", "none was given (--model DIR)");
}
