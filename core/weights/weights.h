/*
 * Checkpoint folders seen as struct arle_weights: one safetensors file, or several named by an index, mapped into memory and
 * checked whole before anyone reads a value; or no file at all, for benchmarks with random weights.
 *
 * Which files: the shards of model.safetensors.index.json when there is one, else model.safetensors. Beside them, files that
 * the index does not list but that loaders of this format read too: *mtp*.safetensors and model_extra_tensors.safetensors.
 * Other *.safetensors files of the folder are not part of the checkpoint.
 *
 * A view lives until weights_close(); its functions may be called from any thread.
 */
#ifndef CORE_WEIGHTS_WEIGHTS_H
#define CORE_WEIGHTS_WEIGHTS_H

#include <arle/tensor.h>

/**
 * Opens the checkpoint in `dir`. Every header is read and checked: dtype known, bytes = elements x size, ranges inside the
 * file, without overlap and without holes, no name twice in all files, every name of the index where the index says.
 * -ENOENT: no checkpoint there, or a shard is missing; -EINVAL: refused, err names file and tensor (err->param is the
 * tensor, if one is at fault); -ENOMEM, or what open() and mmap() say.
 */
int weights_open(const char *dir, struct arle_weights **out, struct arle_err *err);

/** A view without files: want() declares tensors, find() returns them with data NULL and a seed of their own. */
int weights_random(struct arle_weights **out, uint64_t seed, struct arle_err *err);

/**
 * Judges one safetensors image in memory, for tests and fuzzing: the same checks as weights_open. `data` is borrowed.
 * The tensors point into `data`, or into copies where their address is not a multiple of their element size.
 */
int weights_from_memory(const char *file, const void *data, size_t len, struct arle_weights **out, struct arle_err *err);

/** 0 when every tensor was found or ignored; else -EINVAL, and err counts the others and names the first ones. */
int weights_unclaimed(const struct arle_weights *w, struct arle_err *err);

/** Number of tensors and the sum of their bytes. */
size_t weights_count(const struct arle_weights *w, uint64_t *out_bytes);

/** Unmaps everything. NULL is fine. */
void weights_close(struct arle_weights *w);

#endif
