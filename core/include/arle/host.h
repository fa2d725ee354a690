/*
 * What the host offers to plugins. Services are looked up by name and version, so that an old plugin meets a new host
 * and the other way round; NULL means "not here" and must be handled.
 */
#ifndef ARLE_HOST_H
#define ARLE_HOST_H

#include <arle/abi.h>
#include <arle/err.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A plugin's own configuration, already checked against its key table. Opaque; read through the functions in the host. */
struct arle_conf;

struct arle_host {
    uint32_t struct_size;
    uint16_t abi_major, abi_minor;
    void *ctx;
    /** Returns the named service's table (which begins with its struct_size), or NULL. Valid until exit. Any thread. */
    const void *(*service)(const struct arle_host *host, const char *name, uint32_t version);
};

/* Service "log" 1. Any thread. One event is one line; fields are key=value text with units, never prompts or keys. */
enum arle_log_level { ARLE_LOG_ERROR = 0, ARLE_LOG_WARN, ARLE_LOG_INFO, ARLE_LOG_DEBUG };
struct arle_log_service {
    uint32_t struct_size;
    void (*write)(enum arle_log_level level, const char *subsystem, const char *event, const char *fields);
};

/* Service "conf" 1. Values of the plugin's own section by key name; asking for an undeclared key is a bug and returns the
 * type's zero. Strings live as long as the conf. Any thread. */
struct arle_conf_service {
    uint32_t struct_size;
    const char *(*str)(const struct arle_conf *conf, const char *key);
    int64_t (*i64)(const struct arle_conf *conf, const char *key);       /* I64, BYTES, DURATION (ms), BOOL (0/1) */
    double (*f64)(const struct arle_conf *conf, const char *key);
};

/* Service "weights" 1: the tensors of the checkpoint that is being loaded. See struct arle_weights in <arle/tensor.h>. */

static inline const struct arle_log_service *arle_host_log(const struct arle_host *host)
{
    return (const struct arle_log_service *)host->service(host, "log", 1);
}

static inline const struct arle_conf_service *arle_host_conf(const struct arle_host *host)
{
    return (const struct arle_conf_service *)host->service(host, "conf", 1);
}

#ifdef __cplusplus
}
#endif
#endif
