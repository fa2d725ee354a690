/* Asserts of the KV plane: bugs only, on in release builds. A wrong byte served is worse than a process that ends. */
#ifndef CORE_KV_CHECK_H
#define CORE_KV_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define KV_CHECK(cond) do { if (__builtin_expect(!(cond), 0)) { \
    fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #cond); abort(); } } while (0)

#endif
