/*
 * Agent tools: a tool declares its JSON schema and runs one call. The host confines it and bounds time and output.
 */
#ifndef ARLE_TOOL_H
#define ARLE_TOOL_H

#include <arle/plugin.h>

#ifdef __cplusplus
extern "C" {
#endif

struct arle_tool_api {
    uint32_t struct_size;
    /** OpenAI function declaration as JSON text ({"name":...,"description":...,"parameters":{...}}). Static. */
    const char *(*declaration)(void *ctx);
    /**
     * Runs one call. args_json is an object that was checked against the declaration. Writes at most cap - 1 bytes of UTF-8
     * to out and ends them with NUL; *out_len is the whole length, so that truncation shows. Blocks up to deadline_ms.
     * 0, or -EINVAL (bad arguments), -ETIMEDOUT, -EIO with the reason in err; the text in out may be partial then.
     */
    int (*call)(void *ctx, const char *args_json, char *out, size_t cap, size_t *out_len, int64_t deadline_ms,
                struct arle_err *err);
};

#ifdef __cplusplus
}
#endif
#endif
