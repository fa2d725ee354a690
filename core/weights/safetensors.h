/*
 * One safetensors image: u64 length of the header, a JSON header, the bytes of the tensors. Called by weights.c, which owns
 * the mapping; this file owns the judgement.
 */
#ifndef CORE_WEIGHTS_SAFETENSORS_H
#define CORE_WEIGHTS_SAFETENSORS_H

#include <arle/err.h>
#include <arle/tensor.h>

#define SAFETENSORS_MAX_HEADER (100u << 20)     /* the format's own limit */
#define SAFETENSORS_MAX_NAME 512

/* A tensor of the view. */
struct weights_entry {
    struct arle_tensor t;
    uint32_t shard;             /* index of the file it lies in */
    uint32_t taken;             /* atomic: found or ignored */
    void *copy;                 /* aligned copy when the file's place was not, else NULL */
    char name[];                /* t.name */
};

/* Growing list of entries. Owns them. */
struct weights_list {
    struct weights_entry **e;
    size_t n, cap;
};

/** Appends an entry of that name; NULL without memory. */
struct weights_entry *weights_list_add(struct weights_list *list, const char *name);
void weights_list_free(struct weights_list *list);

/**
 * Judges the image of `file` (a name for messages) and appends its tensors to `list`, with `shard` noted and data pointing
 * into the image, where all ranges were checked. -EINVAL with file, tensor and reason; -ENOMEM. What was appended stays.
 */
int safetensors_read(const char *file, const void *data, size_t len, uint32_t shard, struct weights_list *list,
                     struct arle_err *err);

#endif
