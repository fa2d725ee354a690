/*
 * The disk tier: objects (the bytes of one page or one state record, with the tokens they belong to) in a directory of sequential
 * segment files and one manifest log. docs/kv-plane.md describes the files byte by byte.
 *
 * An object is committed when its manifest record is written; from then on a process that is killed at any byte loses nothing of
 * it. With KV_FSYNC_COMMIT the mover syncs data, then records, after each batch, so that power loss costs at most the last batch.
 * Nothing is believed that does not match its checksum: what does not is dropped.
 *
 * Thread: one thread at a time (the disk mover; before it starts, the engine thread).
 */
#ifndef CORE_KV_DISK_H
#define CORE_KV_DISK_H

#include <arle/err.h>
#include <stdbool.h>
#include <stdint.h>

#define KV_CHUNK_BYTES 65536u
#define KV_DISK_SALT 32

enum kv_disk_kind { KV_DISK_PAGE = 1, KV_DISK_STATE = 2 };

struct kv_disk;

struct kv_disk_config {
    const char *dir;            /* made when missing; entries of one identity live in a folder of their own below it */
    const char *identity;       /* stored in the manifest and compared as text; NULL with read_only: any, and dir is its folder */
    uint64_t budget;            /* bytes of all files */
    uint32_t fsync;             /* enum kv_fsync */
    bool read_only;             /* for stat and verify: takes no lock, changes nothing */
};

/* One object as the tree sees it. Pages: tokens [start, start + n_tokens) of one page; states: n_tokens = 0 and start = position. */
struct kv_disk_object {
    uint64_t id, parent;        /* chosen by the caller, ascending; parent is the page before, or 0 below a root */
    uint32_t kind, start, n_tokens;
    const int32_t *tokens;
    const uint8_t *salt;        /* [32], parent == 0 only */
    uint64_t bytes;             /* payload */
    int32_t handle;             /* whatever the caller wants back when the object is evicted; not stored */
};

/** -EINVAL: another identity's manifest; -EBUSY: another process has it; -EIO, -ENOMEM, -ENOSPC. Reads the manifest. */
int kv_disk_open(struct kv_disk **out, const struct kv_disk_config *cfg, struct arle_err *err);
void kv_disk_close(struct kv_disk *d);

/** Calls fn for every object, parents before children, ascending ids. fn sets o->handle. */
void kv_disk_each(struct kv_disk *d, void (*fn)(void *arg, struct kv_disk_object *o), void *arg);
uint64_t kv_disk_max_id(const struct kv_disk *d);

/** Writes and commits. -ENOENT: the parent is not there; -ENOSPC: no room even after eviction; -EEXIST; -EIO. */
int kv_disk_put(struct kv_disk *d, const struct kv_disk_object *o, const void *data, struct arle_err *err);
/** Makes what was put durable, when fsync is KV_FSYNC_COMMIT: data before records. The mover calls it after each batch. */
int kv_disk_sync(struct kv_disk *d);
/** Reads all `bytes` of the object. -ENOENT; -EBADMSG: damaged, and now dropped. */
int kv_disk_get(struct kv_disk *d, uint64_t id, void *data, uint64_t bytes, struct arle_err *err);
/** Drops an object and everything below it. */
void kv_disk_remove(struct kv_disk *d, uint64_t id);

/**
 * While an object is pinned, the segments that hold bytes of it are dropped after all segments that hold nothing pinned. An order,
 * no promise: when each segment holds something pinned, the one used least recently goes. Not stored. No effect when it is absent.
 */
void kv_disk_pin(struct kv_disk *d, uint64_t id, bool pinned);

/** Next object that was dropped by the disk itself (budget, damage), with its handle; false when there is none. */
bool kv_disk_next_lost(struct kv_disk *d, uint64_t *id, uint32_t *kind, int32_t *handle);

struct kv_disk_stats {
    uint64_t objects, pages, states, segments, file_bytes, live_bytes, budget;
    uint64_t user_bytes, written_bytes, dedup_bytes;    /* since open; their quotient is the write amplification */
    uint64_t skipped_bytes;                             /* of a damaged manifest, at open */
    uint64_t bad_objects, evicted, compacted_bytes;
};
void kv_disk_stat(const struct kv_disk *d, struct kv_disk_stats *out);
/** Reads every object and compares checksums and content hashes. Returns the damaged ones. */
uint64_t kv_disk_verify(struct kv_disk *d);

/* ---- the manifest, by itself: for the reader, the fuzzer and tools -------------------------------------------------- */

struct kv_chunk_ref { uint32_t seg, len; uint64_t off; uint32_t crc; uint8_t hash[16]; };

struct kv_manifest_sink {
    void *arg;
    void (*put)(void *arg, const struct kv_disk_object *o, const struct kv_chunk_ref *refs, uint32_t n_refs);
    void (*del)(void *arg, uint64_t id);
};
/**
 * Parses a manifest. Returns the end of the last whole record (the log goes on from there), 0 when there is no whole header, or
 * -EINVAL when the identity differs. Damaged stretches are skipped and counted. identity NULL: any.
 */
int64_t kv_manifest_parse(const uint8_t *data, size_t len, const char *identity, const struct kv_manifest_sink *sink,
                          uint64_t *skipped);

#endif
