/* API keys: reading the list, and the comparison, which takes the same time wherever two keys differ. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "http/internal.h"

int settings_create(struct settings **out, const struct http_options *opts, struct arle_err *err)
{
    struct settings *s = calloc(1, sizeof *s);
    if (s == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for settings");
    atomic_init(&s->refs, 1);
    s->max_body = opts->max_body;
    s->deadline_ms = opts->deadline_ms;
    s->keepalive_ms = opts->keepalive_ms;
    s->log_requests = opts->log_requests;
    s->cors = strdup(opts->cors ? opts->cors : "");
    s->keys_text = strdup(opts->keys ? opts->keys : "");
    s->keys = s->keys_text ? calloc(strlen(s->keys_text) / 2 + 1, sizeof *s->keys) : NULL;
    if (s->cors == NULL || s->keys == NULL) {
        settings_unref(s);
        return arle_err_set(err, -ENOMEM, "no memory for settings");
    }
    char *save = NULL;
    for (char *word = strtok_r(s->keys_text, " \t\r\n", &save); word != NULL; word = strtok_r(NULL, " \t\r\n", &save)) {
        char *colon = strchr(word, ':');
        if (colon != NULL)
            *colon = '\0';
        struct api_key key = { .tenant = colon ? word : (char *)"", .key = colon ? colon + 1 : word };
        if (*key.key == '\0') {
            settings_unref(s);
            return arle_err_param(err, -EINVAL, "auth.keys", "a key of tenant \"%s\" is empty", key.tenant);
        }
        s->keys[s->n_keys++] = key;
    }
    *out = s;
    return 0;
}

struct settings *settings_ref(struct http_server *srv)
{
    pthread_mutex_lock(&srv->settings_mu);
    struct settings *s = srv->settings;
    atomic_fetch_add(&s->refs, 1);
    pthread_mutex_unlock(&srv->settings_mu);
    return s;
}

void settings_unref(struct settings *s)
{
    if (s == NULL || atomic_fetch_sub(&s->refs, 1) > 1)
        return;
    if (s->keys_text != NULL)
        explicit_bzero(s->keys_text, strlen(s->keys_text));
    free(s->keys);
    free(s->keys_text);
    free(s->cors);
    free(s);
}

/* Every byte of the given key is looked at, whatever the stored one is like. */
static bool same_key(const char *stored, const char *given, size_t given_len)
{
    size_t stored_len = strlen(stored);
    volatile unsigned diff = stored_len != given_len;
    for (size_t i = 0; i < given_len; i++)
        diff |= (unsigned char)given[i] ^ (unsigned char)stored[stored_len ? i % stored_len : 0];
    return diff == 0;
}

int auth_check(const struct settings *s, struct MHD_Connection *c, const char **tenant, struct arle_err *err)
{
    *tenant = "";
    if (s->n_keys == 0)
        return 0;
    const char *given = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "Authorization");
    if (given != NULL && strncasecmp(given, "Bearer ", 7) == 0) {
        given += 7;
        while (*given == ' ')
            given++;
    } else {
        given = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "x-api-key");
    }
    if (given == NULL)
        return arle_err_set(err, -EACCES, "no API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'");
    size_t len = strlen(given);
    while (len > 0 && isspace((unsigned char)given[len - 1]))
        len--;
    const struct api_key *found = NULL;
    for (size_t i = 0; i < s->n_keys; i++)
        if (same_key(s->keys[i].key, given, len))
            found = &s->keys[i];
    if (found == NULL)
        return arle_err_set(err, -EACCES, "the API key is not valid here");
    *tenant = found->tenant;
    return 0;
}
