/* Request lines of the control socket: split without reading past the end, and refused with a reason. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ctl/ctl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct arle_err err = ARLE_ERR_INIT;
    const char *command, *argument;
    char *line = malloc(size + 1);
    if (line == NULL)
        return 0;
    memcpy(line, data, size);
    line[size] = '\0';
    const char *end = line + strlen(line);
    if (ctl_parse(line, &command, &argument, &err) < 0) {
        if (err.msg[0] == '\0')
            abort();
    } else if (command < line || command >= end || argument < command || argument > end || strchr(command, ' ') != NULL) {
        abort();
    }
    free(line);
    return 0;
}
