/*
 * Every key of the configuration, once. The reader, --help, the manual page, completion and `config dump` print from here.
 * A new key is one row; nothing else has to know it.
 */
#include "config/config.h"

#define STR(n, d, h) { .name = n, .type = ARLE_CONF_STR, .def = d, .unit = "", .help = h }
#define BOOL(n, d, h) { .name = n, .type = ARLE_CONF_BOOL, .def = d, .unit = "", .help = h }
#define INT(n, d, lo, hi, u, h) { .name = n, .type = ARLE_CONF_I64, .def = d, .min = lo, .max = hi, .unit = u, .help = h }
#define BYTES(n, d, lo, hi, h) \
    { .name = n, .type = ARLE_CONF_BYTES, .def = d, .min = lo, .max = hi, .unit = "bytes", .help = h }
#define TIME(n, d, lo, hi, h) \
    { .name = n, .type = ARLE_CONF_DURATION, .def = d, .min = lo, .max = hi, .unit = "time", .help = h }
#define ENUM(n, d, c, h) { .name = n, .type = ARLE_CONF_ENUM, .def = d, .choices = c, .unit = "", .help = h }
#define END { .name = NULL }

#define KI 1024.0
#define MI (1024.0 * KI)
#define GI (1024.0 * MI)
#define TI (1024.0 * GI)
#define SEC 1000.0
#define HOUR (3600.0 * SEC)

static const struct arle_conf_key server_keys[] = {
    STR("listen", "127.0.0.1:8080", "Address of the HTTP server: HOST:PORT, [IPV6]:PORT, or unix:PATH. Port 0 takes a free one."),
    STR("control", "", "Path of the control socket for arlectl; empty takes RUNTIME_DIRECTORY, then XDG_RUNTIME_DIR, else none."),
    BOOL("force_open", "no", "Allows listening beyond loopback without keys. Everybody who reaches the port can use the models."),
    { .name = "max_body", .type = ARLE_CONF_BYTES, .flags = ARLE_CONF_RELOAD, .def = "16MiB", .min = KI, .max = GI,
      .unit = "bytes", .help = "Largest accepted request body; longer ones get 413." },
    INT("threads", "0", 0, 256, "threads", "HTTP threads; 0 takes one per two processors, at least one."),
    INT("max_connections", "512", 1, 65536, "connections", "Open connections at once; more wait in the kernel's queue."),
    { .name = "deadline", .type = ARLE_CONF_DURATION, .flags = ARLE_CONF_RELOAD, .def = "10m", .min = SEC, .max = 24 * HOUR,
      .unit = "time", .help = "Time a request may take from arrival to its last token; then it ends with what it has." },
    TIME("idle_timeout", "60s", SEC, HOUR, "Quiet connections are closed after this."),
    { .name = "drain_deadline", .type = ARLE_CONF_DURATION, .flags = ARLE_CONF_RELOAD, .def = "20s", .min = 0, .max = HOUR,
      .unit = "time", .help = "Time that running requests get to finish on SIGTERM before they are cancelled." },
    { .name = "keepalive", .type = ARLE_CONF_DURATION, .flags = ARLE_CONF_RELOAD, .def = "15s", .min = SEC, .max = HOUR,
      .unit = "time", .help = "A stream that is silent this long gets a comment line, so that proxies keep it open." },
    { .name = "cors", .type = ARLE_CONF_STR, .flags = ARLE_CONF_RELOAD, .def = "", .unit = "",
      .help = "Origins that browsers may call from, separated by spaces, or *; empty answers no cross-origin request." },
    END
};

static const struct arle_conf_key auth_keys[] = {
    { .name = "keys", .type = ARLE_CONF_STR, .flags = ARLE_CONF_RELOAD | ARLE_CONF_SECRET, .def = "", .unit = "",
      .help = "API keys, separated by spaces, each KEY or TENANT:KEY. Prefer keys_file: this file is often world-readable." },
    { .name = "keys_file", .type = ARLE_CONF_STR, .flags = ARLE_CONF_RELOAD, .def = "", .unit = "",
      .help = "File with one key per line, KEY or TENANT:KEY, # starts a comment. Must not be readable by others." },
    END
};

static const struct arle_conf_key kv_keys[] = {
    INT("page_tokens", "16", 8, 256, "tokens",
        "Positions per KV page, a power of two. Larger pages shorten block tables and waste more of each tail."),
    BYTES("device_bytes", "0", 0, 16 * TI, "Device memory for pages and state of one model; 0 takes a share of what is free."),
    BOOL("prefix_cache", "yes", "Reuses the computed prefix of earlier prompts."),
    BYTES("snapshot_bytes", "256MiB", 0, 16 * TI, "Device memory for snapshots of recurrent state, per model."),
    INT("snapshot_cadence", "1024", 64, 1048576, "tokens", "Longest stretch of a prompt without a state snapshot, in multiples of 64."),
    INT("pin_pct", "50", 1, 100, "%", "Share of the cache pages, and of the snapshots, that arlectl kv pin may hold."),
    INT("tenant_quota_pct", "100", 1, 100, "%",
        "Share of the cache pages, and of the snapshots, that the memory of one tenant may take; its own go first."),
    BOOL("strict", "no", "Remembers prompts and no answers, so that warm equals cold bit for bit also where decoding rounds differently."),
    BYTES("host_bytes", "0", 0, 16 * TI, "Pinned host memory for pages that leave the device; 0 turns the tier off."),
    INT("host_state_pct", "50", 1, 99, "%", "Share of host_bytes for snapshots of recurrent state; the rest is for pages."),
    STR("disk_dir", "", "Directory of the disk tier; empty turns it off."),
    BYTES("disk_bytes", "20GiB", 64 * MI, 1024 * TI, "Budget of the disk tier."),
    ENUM("disk_fsync", "commit", "commit|never",
         "When the disk tier is synced: at each commit, which survives power loss, or never, which survives kill -9 only."),
    STR("secret_file", "", "32 random bytes that salt cache keys; empty makes a new secret at each start, so that disk entries are not reused."),
    STR("store", "", "Plugin of the cluster tier, e.g. kv-redis; empty turns it off."),
    TIME("store_deadline", "250ms", 1, 60 * SEC, "Time that one batch to the cluster tier may take."),
    BYTES("store_min_bytes_s", "1MiB", KI, TI, "The cluster tier is left alone for a while when it moves fewer bytes per second than this."),
    END
};

static const struct arle_conf_key scheduler_keys[] = {
    INT("max_seqs", "64", 1, 4096, "sequences", "Sequences that run at once, per model."),
    INT("max_tokens", "0", 0, 65536, "tokens", "Tokens of one step, decode rows and prefill chunks together; 0 takes 512 on a processor, 2048 on an accelerator."),
    INT("max_queue", "256", 1, 1048576, "requests", "Requests that wait, per model; more get 429 with Retry-After."),
    TIME("max_wait", "0", 0, 24 * HOUR, "Longest wait of a request before it runs; 0 leaves it to the request's own deadline."),
    BOOL("step_graphs", "yes", "Captures decode steps as device graphs where the backend can."),
    BOOL("run_ahead", "yes", "Plans the next step while the device runs this one, where the backend can."),
    END
};

static const struct arle_conf_key log_keys[] = {
    { .name = "level", .type = ARLE_CONF_ENUM, .flags = ARLE_CONF_RELOAD, .def = "info", .choices = "error|warn|info|debug",
      .unit = "", .help = "Least important lines that are written." },
    { .name = "requests", .type = ARLE_CONF_BOOL, .flags = ARLE_CONF_RELOAD, .def = "yes", .unit = "",
      .help = "One line per finished request, with token counts and times, never with text." },
    END
};

static const struct arle_conf_key plugins_keys[] = {
    STR("dir", ARLE_PLUGIN_DIR, "Directories of plugins, separated by colons. They and their files must belong to root or to "
        "the user of the program, and must not be writable by others."),
    TIME("probe_timeout", "10s", 100, 600 * SEC, "Time that a plugin gets to load and to say what it found."),
    END
};

static const struct arle_conf_key model_keys[] = {
    STR("path", "", "Directory with config.json, tokenizer.json and *.safetensors."),
    STR("served_name", "", "Name in requests and replies; empty takes the section's."),
    BOOL("required", "yes", "Without this model the program does not start; with no it serves the others."),
    STR("backend", "auto", "Backend plugin, with or without \"backend-\"; auto takes an accelerator where one works, else the processor."),
    INT("device", "0", 0, 1023, "", "Index of the backend's device."),
    ENUM("compute", "auto", "auto|f32|bf16", "Arithmetic of activations; auto takes what the backend's section says, then what is fastest."),
    ENUM("kv_dtype", "auto", "auto|f32|bf16|int8|fp8|int4", "Storage of attention keys and values; auto follows compute."),
    INT("context", "0", 0, 16777216, "tokens", "Longest sequence; 0 takes the model's own length."),
    INT("max_seqs", "0", 0, 4096, "sequences", "As in [scheduler], for this model; 0 takes that one."),
    INT("max_tokens", "0", 0, 65536, "tokens", "As in [scheduler], for this model; 0 takes that one."),
    INT("max_queue", "0", 0, 1048576, "requests", "As in [scheduler], for this model; 0 takes that one."),
    BYTES("device_bytes", "0", 0, 16 * TI, "As in [kv], for this model; 0 takes that one."),
    BOOL("drafts", "yes", "Loads the drafter of a checkpoint that has one."),
    BOOL("random_weights", "no", "Makes weights up from config.json alone, for benchmarks."),
    BOOL("parity", "no", "Leaves out simulated quantisation of activations, to compare with a float reference."),
    BOOL("special_in_content", "yes", "Text of clients may spell special tokens such as end-of-turn marks, as the reference does; "
         "no makes them ordinary text."),
    INT("kept_calls", "65536", 0, 16777216, "calls", "Tool calls whose sampled text is kept, so that histories which bring them back "
        "render to the same tokens; the least recently used go first. 0 keeps none."),
    BYTES("kept_call_bytes", "64MiB", 0, TI, "Memory for them; 0 keeps none."),
    END
};

static const struct arle_conf_key every_plugin_keys[] = {
    BOOL("required", "no", "Without this plugin the program does not start."),
    END
};

static const struct arle_conf_key every_backend_keys[] = {
    BOOL("required", "no", "Without this plugin the program does not start."),
    ENUM("compute", "auto", "auto|f32|bf16", "Arithmetic of models on this backend whose own compute is auto."),
    END
};

static const struct config_section table[] = {
    { "server", false, "The HTTP server.", server_keys },
    { "auth", false, "Who may use it. Without keys everybody who reaches the port may.", auth_keys },
    { "kv", false, "Memory of computed tokens.", kv_keys },
    { "scheduler", false, "Who runs next.", scheduler_keys },
    { "log", false, "Lines on stderr, which journald keeps under systemd.", log_keys },
    { "plugins", false, "Where plugins are.", plugins_keys },
    { "model", true, "One section per served model.", model_keys },
    { "plugin", true, "One section per plugin that has keys; `arle plugins` lists them. These exist for every plugin:",
      every_plugin_keys },
};

const struct config_section *config_table(size_t *n)
{
    *n = sizeof table / sizeof table[0];
    return table;
}

const struct arle_conf_key *config_plugin_keys(uint32_t kind)
{
    return kind == ARLE_KIND_BACKEND ? every_backend_keys : every_plugin_keys;
}
