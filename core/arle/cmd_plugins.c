/* `arle plugins`: what was found and why something was refused; `arle plugins check FILE.so`: the conformance kit. */
#include "arle/cmd.h"
#include "plugin/conform.h"

#include <json-c/json.h>
#include <string.h>

static const char *state_name(enum plugin_state s)
{
    return s == PLUGIN_OPEN ? "open" : s == PLUGIN_READY ? "ready" : "refused";
}

static struct json_object *key_json(const struct arle_conf_key *k)
{
    char type[160];
    struct json_object *o = json_object_new_object();
    json_object_object_add(o, "name", json_object_new_string(k->name));
    json_object_object_add(o, "type", json_object_new_string(config_key_type(k, type, sizeof type)));
    json_object_object_add(o, "default", json_object_new_string(k->def));
    json_object_object_add(o, "help", json_object_new_string(k->help));
    return o;
}

static struct json_object *plugin_json(const struct plugin_info *p)
{
    struct json_object *o = json_object_new_object(), *keys = json_object_new_array();
    char abi[32];
    snprintf(abi, sizeof abi, "%u.%u", p->abi_major, p->abi_minor);
    json_object_object_add(o, "file", json_object_new_string(p->path));
    json_object_object_add(o, "state", json_object_new_string(state_name(p->state)));
    json_object_object_add(o, "reason", json_object_new_string(p->reason));
    json_object_object_add(o, "name", json_object_new_string(p->name));
    json_object_object_add(o, "kind", json_object_new_string(plugin_kind_name(p->kind)));
    json_object_object_add(o, "version", json_object_new_string(p->version));
    json_object_object_add(o, "license", json_object_new_string(p->license));
    json_object_object_add(o, "summary", json_object_new_string(p->summary));
    json_object_object_add(o, "detail", json_object_new_string(p->detail));
    json_object_object_add(o, "abi", json_object_new_string(abi));
    json_object_object_add(o, "judged_ms", json_object_new_double((double)p->judge_us / 1000));
    for (const struct arle_conf_key *k = p->keys; k != NULL && k->name != NULL; k++)
        json_object_array_add(keys, key_json(k));
    json_object_object_add(o, "keys", keys);
    return o;
}

static void print_json(const struct registry *reg)
{
    struct json_object *a = json_object_new_array();
    for (size_t i = 0; i < registry_count(reg); i++)
        json_object_array_add(a, plugin_json(registry_at(reg, i)));
    puts(json_object_to_json_string_ext(a, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(a);
}

static void print_keys(const struct plugin_info *p)
{
    for (const struct arle_conf_key *k = p->keys; k != NULL && k->name != NULL; k++) {
        char type[160];
        printf("    %-16s %s\n    %-16s %s; default %s\n", k->name, k->help, "", config_key_type(k, type, sizeof type),
               k->def[0] != '\0' ? k->def : "empty");
    }
}

static void print_list(const struct registry *reg, bool with_keys)
{
    for (size_t i = 0; i < registry_count(reg); i++) {
        const struct plugin_info *p = registry_at(reg, i);
        if (p->state == PLUGIN_REFUSED) {
            printf("refused  %s\n", p->reason);
            continue;
        }
        printf("%-8s %-20s %-8s %-8s %s\n", state_name(p->state), p->name, plugin_kind_name(p->kind), p->version,
               p->detail[0] != '\0' ? p->detail : p->summary);
        if (with_keys)
            print_keys(p);
    }
}

static int list(const struct args *args, const struct config *cfg)
{
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    if (registry_open(&reg, cfg, REGISTRY_LENIENT, &err) < 0)
        return cmd_fail(args, &err);
    registry_load_all(reg, 0);
    if (args_flag(args, "json"))
        print_json(reg);
    else if (registry_count(reg) == 0)
        printf("no plugins in %s\n", config_str(cfg, "plugins", "dir"));
    else
        print_list(reg, args_flag(args, "keys"));
    registry_close(reg);
    return EXIT_OK;
}

static int run_plugins(const struct args *args)
{
    struct config *cfg = NULL;
    bool check = args->n_rest > 0 && strcmp(args->rest[0], "check") == 0;
    if ((args->n_rest > 0 && !check) || (check && args->n_rest != 2)) {
        fprintf(stderr, "arle plugins: wants nothing or check FILE.so\n");
        return EXIT_USAGE;
    }
    int status = cmd_config(args, true, &cfg);
    if (status != 0)
        return status;
    status = check ? (conform_file(args->rest[1], cfg, args_str(args, "model"), stdout) == 0 ? EXIT_OK : EXIT_FAILED) : list(args, cfg);
    config_close(cfg);
    return status;
}

static const struct option_row options[] = {
    { "json", 0, NULL, "Prints everything that is known, as a JSON array." },
    { "model", 'm', "DIR", "With check: a checkpoint that the model plugin must load." },
    { "keys", 0, NULL, "Lists the configuration keys of each plugin, too." },
    { NULL, 0, NULL, NULL },
};

const struct command cmd_plugins = {
    .name = "plugins", .args = "[check FILE.so]", .max_args = 2,
    .summary = "Lists plugins with the reasons of refusals, or checks one.",
    .help = "Without arguments, every file in the plugin directories is judged and opened; a line says what it offers or why it is\n"
            "refused and what to do. With check FILE.so, the conformance kit runs the contract tests of its kind and prints TAP.",
    .options = options, .run = run_plugins,
};
