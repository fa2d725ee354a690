/* Which files make up the checkpoint of a folder, and which file the index says each tensor is in. Called by weights.c. */
#ifndef CORE_WEIGHTS_INDEX_H
#define CORE_WEIGHTS_INDEX_H

#include <arle/err.h>
#include <stdbool.h>
#include <stdint.h>

struct index_place { char *tensor; uint32_t shard; };

struct weights_index {
    char **shard; uint32_t n_shards;        /* file names without a folder, in the order they were met */
    uint32_t n_listed;                      /* shards from here on are extra files that no index lists */
    struct index_place *place; size_t n_places;
};

/** Reads the folder. -ENOENT: no checkpoint in it; -EINVAL: names the index, and the shard or tensor at fault. */
int weights_index_read(const char *dir, struct weights_index *out, struct arle_err *err);
/** As above from the text of an index, without looking for extra files. For tests. */
int weights_index_parse(const char *file, const char *text, size_t len, struct weights_index *out, struct arle_err *err);
void weights_index_fini(struct weights_index *ix);

#endif
