/*
 * What tools ask of the KV plane from outside an engine: the folders of a disk tier, read without a lock and without changing
 * anything. A running engine may write meanwhile; its last objects may then be missing from the figures.
 */
#ifndef CORE_KV_ADMIN_H
#define CORE_KV_ADMIN_H

#include "kv/kv_disk.h"

struct kv_admin_folder {
    const char *name;           /* folder below the directory */
    const char *identity;       /* model, dtypes and layout it was written for; "" when the manifest cannot be read */
    struct kv_disk_stats st;
    uint64_t bad;               /* verify: objects whose bytes are not what was put */
};

/**
 * Calls fn for each folder of a disk tier, in no order; verify reads every byte. Returns the number of folders; -ENOENT and others
 * when dir cannot be read (param "dir"). fn's pointers live during the call.
 */
int kv_admin_each(const char *dir, bool verify, void (*fn)(void *arg, const struct kv_admin_folder *f), void *arg,
                  struct arle_err *err);

#endif
