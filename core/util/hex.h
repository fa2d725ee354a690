/* One hexadecimal digit. */
#ifndef ARLE_UTIL_HEX_H
#define ARLE_UTIL_HEX_H

/** Its value, or -1 when it is none. */
static inline int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

#endif
