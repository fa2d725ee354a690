/* What plugins get from us: services by name and version. */
#include "config/config.h"
#include "plugin/registry.h"
#include "util/log.h"

#include <string.h>

static void write_line(enum arle_log_level level, const char *subsystem, const char *event, const char *fields)
{
    if (level < ARLE_LOG_ERROR || level > ARLE_LOG_DEBUG)
        level = ARLE_LOG_DEBUG;
    log_write(level, subsystem != NULL ? subsystem : "plugin", event != NULL ? event : "?", "%s", fields != NULL ? fields : "");
}

static const struct arle_log_service log_service = { sizeof log_service, write_line };
static const struct arle_conf_service conf_service = { sizeof conf_service, conf_str, conf_i64, conf_f64 };

static const struct { const char *name; uint32_t version; const void *table; } services[] = {
    { "log", 1, &log_service },
    { "conf", 1, &conf_service },
};

static const void *service(const struct arle_host *host, const char *name, uint32_t version)
{
    for (size_t i = 0; i < sizeof services / sizeof services[0]; i++) {
        if (name != NULL && strcmp(services[i].name, name) == 0 && services[i].version == version)
            return services[i].table;
    }
    return NULL;
}

const struct arle_host *plugin_host(void)
{
    static const struct arle_host host = {
        .struct_size = sizeof host, .abi_major = ARLE_ABI_MAJOR, .abi_minor = ARLE_ABI_MINOR, .service = service,
    };
    return &host;
}

const char *plugin_kind_name(uint32_t kind)
{
    static const char *const names[] = { "unknown", "backend", "model", "tool", "kv-store", "trainer" };
    return kind < sizeof names / sizeof names[0] ? names[kind] : names[0];
}
