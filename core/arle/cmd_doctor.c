/* `arle doctor`: what this machine has, what is missing, and the cure. Each check adds findings; printing comes last. */
#include "arle/cmd.h"
#include "plugin/registry.h"

#include <ctype.h>
#include <dirent.h>
#include <json-c/json.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum verdict { FINE, NOTE, WRONG };
static const char *const verdict_words[] = { "ok", "note", "wrong" };

struct finding { enum verdict verdict; char topic[24]; char text[700]; char cure[300]; };
struct doctor { struct finding *list; size_t n; };

static void __attribute__((format(printf, 5, 6)))
find(struct doctor *d, enum verdict v, const char *topic, const char *cure, const char *fmt, ...)
{
    struct finding *l = realloc(d->list, (d->n + 1) * sizeof *l);
    if (l == NULL)
        return;
    d->list = l;
    struct finding *f = &l[d->n++];
    va_list ap;
    f->verdict = v;
    snprintf(f->topic, sizeof f->topic, "%s", topic);
    snprintf(f->cure, sizeof f->cure, "%s", cure);
    va_start(ap, fmt);
    vsnprintf(f->text, sizeof f->text, fmt, ap);
    va_end(ap);
}

/* First line of a small file; false when it cannot be read. */
static bool first_line(const char *path, char *buf, size_t cap)
{
    FILE *f = fopen(path, "re");
    bool ok = f != NULL && fgets(buf, (int)cap, f) != NULL;
    if (f != NULL)
        fclose(f);
    if (ok)
        buf[strcspn(buf, "\n")] = '\0';
    return ok;
}

/* ---- machine ---- */

static void look_at_cpu(struct doctor *d)
{
    static const char *const wanted[] = { "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm" };
    char model[128] = "unknown processor", have[128] = "", *line = NULL;
    size_t cap = 0;
    FILE *f = fopen("/proc/cpuinfo", "re");
    while (f != NULL && getline(&line, &cap, f) > 0) {
        char *colon = strchr(line, ':');
        if (colon == NULL)
            continue;
        colon[strcspn(colon, "\n")] = '\0';
        if (strncmp(line, "model name", 10) == 0)
            snprintf(model, sizeof model, "%s", colon + 2);
        if (strncmp(line, "flags", 5) != 0 && strncmp(line, "Features", 8) != 0)
            continue;
        char *rest = colon + 1;
        for (char *w; (w = strsep(&rest, " ")) != NULL;) {
            for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
                if (strcmp(w, wanted[i]) == 0)
                    snprintf(have + strlen(have), sizeof have - strlen(have), " %s", w);
            }
        }
        break;
    }
    free(line);
    if (f != NULL)
        fclose(f);
    find(d, have[0] != '\0' ? FINE : NOTE, "processor", have[0] != '\0' ? "" : "only the portable code paths can run; expect them to be slow",
         "%s, %ld online, vector units:%s", model, sysconf(_SC_NPROCESSORS_ONLN), have[0] != '\0' ? have : " none of those we use");
}

static void look_at_memory(struct doctor *d)
{
    char line[128], limit[64];
    double total = 0, avail = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        unsigned long long kib;
        if (sscanf(line, "MemTotal: %llu", &kib) == 1)
            total = (double)kib / 1048576;
        else if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            avail = (double)kib / 1048576;
    }
    if (f != NULL)
        fclose(f);
    if (first_line("/sys/fs/cgroup/memory.max", limit, sizeof limit) && isdigit((unsigned char)limit[0]))
        find(d, NOTE, "memory", "raise the limit of the container or slice if models do not fit", "the control group allows %.1f GiB",
             strtod(limit, NULL) / 1073741824);
    find(d, avail >= 1 ? FINE : NOTE, "memory", avail >= 1 ? "" : "close other programs: weights and caches need room",
         "%.1f GiB, %.1f GiB available", total, avail);
}

/* A display or 3D controller whose driver did not make its device file. */
static void look_at_pci(struct doctor *d)
{
    static const struct { unsigned vendor; const char *name, *device_file, *cure; } vendors[] = {
        { 0x10de, "NVIDIA", "/dev/nvidiactl", "install the driver (Debian: nvidia-driver), load it with modprobe nvidia, or pass the "
          "device into the container" },
        { 0x1002, "AMD", "/dev/kfd", "load the amdgpu driver, or pass /dev/kfd into the container" },
    };
    DIR *dir = opendir("/sys/bus/pci/devices");
    for (struct dirent *e; dir != NULL && (e = readdir(dir)) != NULL;) {
        char path[PATH_MAX], vendor[32], class[32];
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/vendor", e->d_name);
        if (!first_line(path, vendor, sizeof vendor))
            continue;
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/class", e->d_name);
        if (!first_line(path, class, sizeof class) || strncmp(class, "0x03", 4) != 0)
            continue;
        for (size_t i = 0; i < sizeof vendors / sizeof vendors[0]; i++) {
            if (strtoul(vendor, NULL, 16) != vendors[i].vendor)
                continue;
            bool there = access(vendors[i].device_file, F_OK) == 0;
            find(d, there ? FINE : NOTE, "gpu", there ? "" : vendors[i].cure, "%s device at %s%s%s", vendors[i].name, e->d_name,
                 there ? "" : ", but its driver has not made ", there ? "" : vendors[i].device_file);
        }
    }
    if (dir != NULL)
        closedir(dir);
}

/* ---- plugins ---- */

static void look_at_devices(struct doctor *d, const struct plugin_info *p)
{
    const struct arle_backend_api *api = p->ops;
    uint32_t n = api->n_devices(p->ctx);
    for (uint32_t i = 0; i < n; i++) {
        struct arle_device_info info = { .struct_size = sizeof info };
        struct arle_err err = ARLE_ERR_INIT;
        if (api->device_info(p->ctx, i, &info, &err) < 0)
            find(d, WRONG, "device", "see the message; the driver may need a restart", "%s device %u: %s", p->name, i, err.msg);
        else
            find(d, FINE, "device", "", "%s device %u: %s, %.1f of %.1f GiB free, computes in %s", p->name, i, info.name,
                 (double)info.mem_free / 1073741824, (double)info.mem_total / 1073741824,
                 info.default_compute == ARLE_BF16 ? "bf16" : "f32");
    }
}

static void look_at_plugins(struct doctor *d, struct registry *reg, const struct config *cfg)
{
    uint32_t kinds = 0;
    registry_load_all(reg, 0);
    for (size_t i = 0; i < registry_count(reg); i++) {
        const struct plugin_info *p = registry_at(reg, i);
        if (p->state == PLUGIN_REFUSED) {
            find(d, NOTE, "plugin", "", "refused: %s", p->reason);
            continue;
        }
        find(d, FINE, "plugin", "", "%s %s (%s), judged in %.0f ms%s%s", p->name, p->version, plugin_kind_name(p->kind),
             (double)p->judge_us / 1000, p->detail[0] != '\0' ? ": " : "", p->detail);
        if (p->state == PLUGIN_OPEN && p->kind == ARLE_KIND_BACKEND)
            look_at_devices(d, p);
        kinds |= 1u << p->kind;
    }
    const char *dirs = config_str(cfg, "plugins", "dir");
    if ((kinds & 1u << ARLE_KIND_BACKEND) == 0)
        find(d, WRONG, "plugin", "install a backend plugin, or correct plugins.dir", "no backend works in %s", dirs);
    if ((kinds & 1u << ARLE_KIND_MODEL) == 0)
        find(d, WRONG, "plugin", "install a model plugin, or correct plugins.dir", "no model architecture works in %s", dirs);
}

/* ---- models and directories ---- */

static char *read_small(const char *path, size_t *len)
{
    enum { LIMIT = 1 << 20 };
    FILE *f = fopen(path, "re");
    char *buf = f != NULL ? malloc(LIMIT) : NULL;
    *len = buf != NULL ? fread(buf, 1, LIMIT, f) : 0;
    if (f != NULL)
        fclose(f);
    return buf;
}

static bool has_weights(const char *dir)
{
    DIR *dp = opendir(dir);
    bool found = false;
    for (struct dirent *e; dp != NULL && (e = readdir(dp)) != NULL;)
        found |= strlen(e->d_name) > 12 && strcmp(e->d_name + strlen(e->d_name) - 12, ".safetensors") == 0;
    if (dp != NULL)
        closedir(dp);
    return found;
}

static void look_at_model(struct doctor *d, struct registry *reg, const char *name, const char *dir, bool needs_weights)
{
    char path[PATH_MAX];
    size_t len;
    snprintf(path, sizeof path, "%s/config.json", dir);
    char *json = read_small(path, &len);
    if (json == NULL) {
        find(d, WRONG, "model", "correct the model's path; it must hold config.json, tokenizer.json and *.safetensors", "%s: %s: %s", name, path,
             strerror(errno));
        return;
    }
    struct arle_err err = ARLE_ERR_INIT;
    const struct plugin_info *p = NULL;
    int r = reg != NULL ? registry_model(reg, json, len, &p, &err) : -ENOENT;
    free(json);
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (reg != NULL && r < 0)
        find(d, WRONG, "model", "install the plugin of this architecture", "%s: %s", name, err.msg);
    else if (access(path, R_OK) != 0)
        find(d, WRONG, "model", "copy the tokenizer.json of the checkpoint", "%s: %s: %s", name, path, strerror(errno));
    else if (needs_weights && !has_weights(dir))
        find(d, WRONG, "model", "copy the weights, or set random_weights = yes", "%s: no *.safetensors in %s", name, dir);
    else
        find(d, FINE, "model", "", "%s: %s%s%s", name, dir, p != NULL ? ", served by " : "", p != NULL ? p->name : "");
}

static void look_at_models(struct doctor *d, struct registry *reg, const struct config *cfg)
{
    for (size_t i = 0; i < config_n_models(cfg); i++) {
        const char *s = config_model_section(cfg, i);
        look_at_model(d, reg, config_model_name(cfg, i), config_str(cfg, s, "path"), !config_bool(cfg, s, "random_weights"));
    }
    if (config_n_models(cfg) == 0)
        find(d, NOTE, "model", "name one in arle.ini ([model NAME] path = DIR) or with arle serve --model DIR", "none is configured");
}

/* The nearest directory on the way to `dir` that exists. */
static void existing_parent(const char *dir, char *out, size_t cap)
{
    struct stat st;
    snprintf(out, cap, "%s", dir);
    while (out[0] != '\0' && stat(out, &st) < 0) {
        char *slash = strrchr(out, '/');
        if (slash == NULL || slash == out) {
            snprintf(out, cap, "%s", slash == NULL ? "." : "/");
            return;
        }
        *slash = '\0';
    }
}

static void look_at_dir(struct doctor *d, const char *what, const char *dir, const char *cure)
{
    char parent[PATH_MAX];
    struct statvfs vfs;
    existing_parent(dir, parent, sizeof parent);
    bool ok = access(parent, W_OK | X_OK) == 0;
    double free_gib = statvfs(parent, &vfs) == 0 ? (double)vfs.f_bavail * (double)vfs.f_frsize / 1073741824 : 0;
    find(d, ok ? FINE : WRONG, "directory", ok ? "" : cure, "%s %s: %s, %.1f GiB free", what, dir, ok ? "writable" : "not writable", free_gib);
}

static void look_at_dirs(struct doctor *d, const struct config *cfg)
{
    char dir[PATH_MAX];
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME"), *systemd = getenv("CACHE_DIRECTORY");
    if (systemd != NULL)
        snprintf(dir, sizeof dir, "%s", systemd);
    else
        snprintf(dir, sizeof dir, "%s%s/arle", xdg != NULL ? xdg : home != NULL ? home : "/tmp", xdg != NULL ? "" : home != NULL ? "/.cache" : "");
    look_at_dir(d, "cache of tokenizers", dir, "make it writable, or set XDG_CACHE_HOME; starts are slower without");
    if (config_str(cfg, "kv", "disk_dir")[0] != '\0')
        look_at_dir(d, "kv.disk_dir", config_str(cfg, "kv", "disk_dir"), "make it writable for the user of arled");
}

/* ---- report ---- */

static void print_text(const struct doctor *d)
{
    for (size_t i = 0; i < d->n; i++) {
        const struct finding *f = &d->list[i];
        printf("%-6s %-10s %s\n", verdict_words[f->verdict], f->topic, f->text);
        if (f->cure[0] != '\0')
            printf("%17s -> %s\n", "", f->cure);
    }
}

static void print_json(const struct doctor *d, bool well)
{
    struct json_object *root = json_object_new_object(), *a = json_object_new_array();
    for (size_t i = 0; i < d->n; i++) {
        struct json_object *o = json_object_new_object();
        json_object_object_add(o, "verdict", json_object_new_string(verdict_words[d->list[i].verdict]));
        json_object_object_add(o, "topic", json_object_new_string(d->list[i].topic));
        json_object_object_add(o, "text", json_object_new_string(d->list[i].text));
        json_object_object_add(o, "cure", json_object_new_string(d->list[i].cure));
        json_object_array_add(a, o);
    }
    json_object_object_add(root, "version", json_object_new_string(ARLE_VERSION));
    json_object_object_add(root, "well", json_object_new_boolean(well));
    json_object_object_add(root, "findings", a);
    puts(json_object_to_json_string_ext(root, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(root);
}

static void look_at_configured(struct doctor *d, const struct args *args)
{
    struct config *cfg = NULL;
    struct registry *reg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    const char *path = args_str(args, "config");
    if (path == NULL && access(ARLE_SYSCONF_DIR "/arle.ini", R_OK) == 0)
        path = ARLE_SYSCONF_DIR "/arle.ini";
    if (config_open(&cfg, path, args->sets, args->n_sets, &err) < 0) {
        find(d, WRONG, "config", "correct the line; arle help keys lists all keys", "%s", err.msg);
        return;
    }
    find(d, FINE, "config", "", "%s", path != NULL ? path : "no file; defaults and the command line");
    /* Strictly first, to hear what a start would say; then leniently, to look at the rest all the same. */
    if (registry_open(&reg, cfg, 0, &err) < 0) {
        find(d, WRONG, "config", "", "arled would not start: %s", err.msg);
        if (registry_open(&reg, cfg, REGISTRY_LENIENT, &err) < 0)
            find(d, WRONG, "plugin", "", "%s", err.msg);
    }
    if (reg != NULL)
        look_at_plugins(d, reg, cfg);
    look_at_models(d, reg, cfg);
    look_at_dirs(d, cfg);
    registry_close(reg);
    config_close(cfg);
}

static int run_doctor(const struct args *args)
{
    struct doctor d = { 0 };
    bool well = true;
    look_at_cpu(&d);
    look_at_memory(&d);
    look_at_pci(&d);
    look_at_configured(&d, args);
    for (size_t i = 0; i < d.n; i++)
        well &= d.list[i].verdict != WRONG;
    if (args_flag(args, "json"))
        print_json(&d, well);
    else
        print_text(&d);
    free(d.list);
    return well ? EXIT_OK : EXIT_FAILED;
}

static const struct option_row options[] = {
    { "json", 0, NULL, "Prints the findings as JSON." },
    { NULL, 0, NULL, NULL },
};

const struct command cmd_doctor = {
    .name = "doctor", .args = "", .max_args = 0, .summary = "Says what this machine has, what is missing, and the cure.",
    .help = "Looks at processor, memory, GPU drivers, plugins and their devices, the configuration, its models and directories.\n"
            "Exit status 1 when something is wrong enough that a start would fail.",
    .options = options, .run = run_doctor,
};
