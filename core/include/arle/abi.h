/*
 * Version and layout rules of the plugin border. Every struct that crosses begins with its own size and only grows at
 * its end, or it has no size and never changes (arguments of ops, what lies inside other structs: tests/abi/layout.c). Adding
 * fields or ops raises the minor version, changing a meaning raises the major.
 */
#ifndef ARLE_ABI_H
#define ARLE_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ARLE_PLUGIN_MAGIC 0x454C5241u      /* "ARLE" in memory on little-endian machines */
#define ARLE_ABI_MAJOR 1
#define ARLE_ABI_MINOR 1

#define ARLE_EXPORT __attribute__((visibility("default")))

/** True if `obj` is new enough to hold member `fn` and holds it. `obj` must begin with `uint32_t struct_size`. */
#define ARLE_HAS(obj, type, fn) \
    ((obj)->struct_size >= offsetof(type, fn) + sizeof((obj)->fn) && (obj)->fn != NULL)

#endif
