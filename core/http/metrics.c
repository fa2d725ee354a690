/* GET /metrics in Prometheus' text format: counters of the server, and of each engine and its KV plane. */
#include <string.h>

#include "chat/calls.h"
#include "http/internal.h"
#include "kv/kv.h"
#include "util/clock.h"

const double latency_buckets[N_BUCKETS] = { 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60 };

void histogram_add(struct histogram *h, int64_t us)
{
    int i = 0;
    while (i < N_BUCKETS && (double)us > latency_buckets[i] * 1e6)
        i++;
    atomic_fetch_add(&h->counts[i], 1);
    atomic_fetch_add(&h->sum_us, us > 0 ? (uint64_t)us : 0);
}

static void put_histogram(struct sbuf *b, const char *name, const char *help, struct histogram *h)
{
    uint64_t sum = 0;
    sbuf_fmt(b, "# HELP %s %s\n# TYPE %s histogram\n", name, help, name);
    for (int i = 0; i < N_BUCKETS; i++) {
        sum += atomic_load(&h->counts[i]);
        sbuf_fmt(b, "%s_bucket{le=\"%g\"} %llu\n", name, latency_buckets[i], (unsigned long long)sum);
    }
    sum += atomic_load(&h->counts[N_BUCKETS]);
    sbuf_fmt(b, "%s_bucket{le=\"+Inf\"} %llu\n%s_sum %.6f\n%s_count %llu\n", name, (unsigned long long)sum, name,
             (double)atomic_load(&h->sum_us) / 1e6, name, (unsigned long long)sum);
}

static void put_head(struct sbuf *b, const char *name, const char *type, const char *help)
{
    sbuf_fmt(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void put_one(struct sbuf *b, const char *name, const char *type, const char *help, double v)
{
    put_head(b, name, type, help);
    sbuf_fmt(b, "%s %.15g\n", name, v);
}

static void put_status_counts(struct sbuf *b, struct http_server *srv)
{
    static const char *const words[N_STATUS] = { "200", "400", "401", "404", "413", "429", "503", "other" };
    put_head(b, "arle_http_requests_total", "counter", "HTTP requests by route and status.");
    for (size_t r = 0;; r++) {
        const struct route *route = &http_routes[r];
        for (int s = 0; s < N_STATUS; s++) {
            unsigned long long n = atomic_load(&srv->status_counts[r * N_STATUS + (size_t)s]);
            if (n > 0)
                sbuf_fmt(b, "arle_http_requests_total{route=\"%s\",status=\"%s\"} %llu\n",
                         route->path != NULL ? route->path : "none", words[s], n);
        }
        if (route->path == NULL)
            break;
    }
}

/* One row per figure of an engine: name, type, help, and where it lies. */
#define ENGINE_ROWS(X) \
    X("arle_engine_steps_total", "counter", "Steps of the engine.", st.steps) \
    X("arle_engine_step_tokens_total", "counter", "Tokens computed in steps.", st.step_tokens) \
    X("arle_engine_decode_rows_total", "counter", "Decode rows computed.", st.decode_rows) \
    X("arle_engine_prefill_tokens_total", "counter", "Prompt tokens computed.", st.prefill_tokens) \
    X("arle_engine_requests_total", "counter", "Requests that entered the queue.", st.requests) \
    X("arle_engine_finished_total", "counter", "Requests that ended on their own.", st.finished) \
    X("arle_engine_cancelled_total", "counter", "Requests cancelled.", st.cancelled) \
    X("arle_engine_rejected_total", "counter", "Requests refused because the queue was full.", st.rejected) \
    X("arle_engine_errors_total", "counter", "Requests that ended with an error.", st.errors) \
    X("arle_engine_preempted_total", "counter", "Sequences preempted.", st.preempted) \
    X("arle_engine_resumed_total", "counter", "Parked sequences that came back.", st.resumed) \
    X("arle_engine_recomputed_tokens_total", "counter", "Tokens computed again after a preemption.", st.recomputed_tokens) \
    X("arle_engine_slow_steps_total", "counter", "Steps longer than the watchdog allows.", st.slow_steps) \
    X("arle_engine_stalled", "gauge", "1 while a step is longer than the watchdog allows.", st.stalled) \
    X("arle_engine_longest_gap_seconds", "gauge", "Longest time between two tokens of an answer.", (double)st.longest_gap_us / 1e6) \
    X("arle_engine_ahead_steps_total", "counter", "Steps launched while another one ran.", st.ahead_steps) \
    X("arle_engine_graph_captures_total", "counter", "Step shapes captured.", st.graph_captures) \
    X("arle_engine_graph_launches_total", "counter", "Step graphs launched.", st.graph_launches) \
    X("arle_engine_step_seconds_total", "counter", "Time in steps.", (double)st.step_us_sum / 1e6) \
    X("arle_engine_plan_seconds_total", "counter", "Time planning steps.", (double)st.plan_us_sum / 1e6) \
    X("arle_engine_running", "gauge", "Requests that run.", st.running) \
    X("arle_engine_waiting", "gauge", "Requests that wait.", st.waiting) \
    X("arle_engine_parked", "gauge", "Sequences parked.", st.parked) \
    X("arle_engine_dead", "gauge", "1 after a fatal device error.", st.dead) \
    X("arle_kv_pages", "gauge", "Device pages.", kv.pages_total) \
    X("arle_kv_pages_free", "gauge", "Device pages that nobody uses.", kv.pages_free) \
    X("arle_kv_pages_cached", "gauge", "Device pages kept for reuse only.", kv.pages_cached) \
    X("arle_kv_slots", "gauge", "State slots.", kv.slots_total) \
    X("arle_kv_slots_free", "gauge", "State slots that nobody uses.", kv.slots_free) \
    X("arle_kv_hits_total", "counter", "Prompts with a cached prefix.", kv.hits) \
    X("arle_kv_hit_tokens_total", "counter", "Prompt tokens taken from the cache.", kv.hit_tokens) \
    X("arle_kv_lookups_total", "counter", "Prompts looked up.", kv.lookups) \
    X("arle_kv_lookup_tokens_total", "counter", "Prompt tokens looked up.", kv.lookup_tokens) \
    X("arle_kv_snapshots", "gauge", "State snapshots kept.", kv.snapshots) \
    X("arle_kv_snapshot_bytes", "gauge", "Bytes of state snapshots.", kv.snapshot_bytes) \
    X("arle_kv_pages_evicted_total", "counter", "Pages evicted.", kv.pages_evicted) \
    X("arle_kv_snapshots_taken_total", "counter", "State snapshots taken.", kv.snapshots_taken) \
    X("arle_kv_snapshots_inside_total", "counter", "States kept from the midst of a step.", kv.snapshots_inside) \
    X("arle_kv_snapshots_evicted_total", "counter", "State snapshots evicted.", kv.snapshots_evicted) \
    X("arle_kv_snapshots_restored_total", "counter", "State snapshots that a prompt went on from.", kv.snapshots_restored) \
    X("arle_kv_pins", "gauge", "Prompts that are pinned.", kv.pins) \
    X("arle_kv_pinned_pages", "gauge", "Pages that pins hold, in any tier.", kv.pinned_pages) \
    X("arle_kv_pinned_states", "gauge", "State snapshots that pins hold, in any tier.", kv.pinned_states) \
    X("arle_kv_pins_yielded_total", "counter", "Pinned pages that left the device because a sequence could not run otherwise.", \
      kv.pins_yielded) \
    X("arle_kv_parked_total", "counter", "Sequences moved away whole.", kv.parked) \
    X("arle_kv_store_gets_total", "counter", "Objects asked of the cluster tier.", kv.store_gets) \
    X("arle_kv_store_puts_total", "counter", "Objects given to the cluster tier.", kv.store_puts) \
    X("arle_kv_store_errors_total", "counter", "Failed, late or damaged exchanges with the cluster tier.", kv.store_errors) \
    X("arle_kv_disk_user_bytes_total", "counter", "Bytes given to the disk tier.", kv.disk_user_bytes) \
    X("arle_kv_disk_written_bytes_total", "counter", "Bytes that the disk tier wrote for them.", kv.disk_written_bytes) \
    X("arle_kv_host_bytes", "gauge", "Bytes in the host tier.", kv.host_bytes) \
    X("arle_kv_disk_bytes", "gauge", "Bytes in the disk tier.", kv.disk_bytes) \
    X("arle_calls_kept", "gauge", "Tool calls whose sampled text is kept.", calls.calls) \
    X("arle_calls_kept_bytes", "gauge", "Memory of kept tool calls.", calls.bytes) \
    X("arle_calls_recalled_total", "counter", "Tool calls of histories that rendered as sampled.", calls.recalled) \
    X("arle_calls_unknown_total", "counter", "Tool calls of histories that rendered in the regular form.", calls.unknown)

static void put_engines(struct sbuf *b, struct http_server *srv)
{
#define ROW(metric, type, help, value) \
    put_head(b, metric, type, help); \
    for (size_t i = 0; i < srv->n_models; i++) { \
        struct engine_stats st = { 0 }; \
        struct kv_stats kv = { 0 }; \
        engine_stat(srv->models[i]->engine, &st); \
        engine_kv_stat(srv->models[i]->engine, &kv); \
        struct call_memory_stats calls; \
        call_memory_stat(srv->models[i]->calls, &calls); \
        sbuf_str(b, metric "{model="); \
        sbuf_json_cstr(b, srv->models[i]->name); \
        sbuf_fmt(b, "} %.15g\n", (double)(value)); \
    }
    ENGINE_ROWS(ROW)
#undef ROW
}

/* Bytes moved between tiers: `demoted` into a tier below the device, `promoted` back out of it. */
static void put_moves(struct sbuf *b, struct http_server *srv)
{
    static const char *const tiers[4] = { "device", "host", "disk", "store" };
    for (int up = 0; up < 2; up++) {
        const char *name = up ? "arle_kv_promoted_bytes_total" : "arle_kv_demoted_bytes_total";
        put_head(b, name, "counter", up ? "Bytes promoted, by tier." : "Bytes demoted, by tier.");
        for (size_t i = 0; i < srv->n_models; i++) {
            struct kv_stats kv = { 0 };
            engine_kv_stat(srv->models[i]->engine, &kv);
            for (int t = 0; t < 4; t++) {
                sbuf_fmt(b, "%s{model=", name);
                sbuf_json_cstr(b, srv->models[i]->name);
                sbuf_fmt(b, ",tier=\"%s\"} %llu\n", tiers[t],
                         (unsigned long long)(up ? kv.promoted_bytes[t] : kv.demoted_bytes[t]));
            }
        }
    }
}

static void put_buckets(struct sbuf *b, const char *name, const char *model, const struct hist *h)
{
    uint64_t sum = 0;
    for (int i = 0; i < HIST_BUCKETS; i++) {
        sum += h->bucket[i];
        sbuf_fmt(b, "%s_bucket{model=", name);
        sbuf_json_cstr(b, model);
        if (i < HIST_BUCKETS - 1)
            sbuf_fmt(b, ",le=\"%g\"} %llu\n", (double)hist_bounds_us[i] / 1e6, (unsigned long long)sum);
        else
            sbuf_fmt(b, ",le=\"+Inf\"} %llu\n", (unsigned long long)sum);
    }
    sbuf_fmt(b, "%s_sum{model=", name);
    sbuf_json_cstr(b, model);
    sbuf_fmt(b, "} %.6f\n%s_count{model=", (double)h->sum_us / 1e6, name);
    sbuf_json_cstr(b, model);
    sbuf_fmt(b, "} %llu\n", (unsigned long long)h->count);
}

static void put_engine_hists(struct sbuf *b, struct http_server *srv)
{
#define HIST(field, metric, help) \
    put_head(b, metric, "histogram", help); \
    for (size_t i = 0; i < srv->n_models; i++) { \
        struct engine_hists hs; \
        engine_hist(srv->models[i]->engine, &hs); \
        put_buckets(b, metric, srv->models[i]->name, &hs.field); \
    }
    HIST(first_token, "arle_engine_first_token_seconds", "From submission to the first token.")
    HIST(inter_token, "arle_engine_inter_token_seconds", "Between two tokens of one answer.")
    HIST(queue, "arle_engine_queue_seconds", "From submission to admission.")
    HIST(step, "arle_engine_step_latency_seconds", "From the launch of a step to its results.")
#undef HIST
}

enum MHD_Result handle_metrics(struct conn *cn)
{
    struct http_server *srv = cn->srv;
    struct sbuf b = SBUF_INIT;
    put_one(&b, "arle_uptime_seconds", "gauge", "Time since the server started.", (double)(clock_mono_us() - srv->start_us) / 1e6);
    put_one(&b, "arle_http_running", "gauge", "Generation requests in progress.", atomic_load(&srv->running));
    put_one(&b, "arle_http_disconnects_total", "counter", "Generations cut off by the client.",
            (double)atomic_load(&srv->disconnects));
    put_one(&b, "arle_prompt_tokens_total", "counter", "Prompt tokens of ended requests.", (double)atomic_load(&srv->prompt_tokens));
    put_one(&b, "arle_cached_tokens_total", "counter", "Prompt tokens of ended requests that were cached.",
            (double)atomic_load(&srv->cached_tokens));
    put_one(&b, "arle_completion_tokens_total", "counter", "Generated tokens of ended requests.",
            (double)atomic_load(&srv->completion_tokens));
    put_histogram(&b, "arle_first_token_seconds", "From the request's arrival to its first token.", &srv->first_token);
    put_histogram(&b, "arle_request_seconds", "From the request's arrival to its end.", &srv->total);
    put_status_counts(&b, srv);
    put_engines(&b, srv);
    put_moves(&b, srv);
    put_engine_hists(&b, srv);
    return reply_text(cn, 200, "text/plain; version=0.0.4; charset=utf-8", &b);
}
