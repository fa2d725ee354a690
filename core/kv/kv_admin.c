/* Folders of a disk tier, for tools; see kv_admin.h. */
#include "kv/kv_admin.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The identity that the newest manifest of a folder names; "" when there is none. Only its head is read. */
static void read_identity(const char *path, char *out, size_t cap)
{
    DIR *d = opendir(path);
    struct dirent *e;
    unsigned num, best = 0;
    out[0] = '\0';
    while (d != NULL && (e = readdir(d)) != NULL)
        if (sscanf(e->d_name, "manifest-%8u.kvm", &num) == 1 && strstr(e->d_name, ".tmp") == NULL && num > best)
            best = num;
    if (d != NULL)
        closedir(d);
    char file[4200];
    uint8_t head[16];
    uint32_t len = 0;
    snprintf(file, sizeof file, "%s/manifest-%08u.kvm", path, best);
    FILE *f = best > 0 ? fopen(file, "rb") : NULL;
    if (f == NULL)
        return;
    if (fread(head, 1, sizeof head, f) == sizeof head && memcmp(head, "ARLEKVM1", 8) == 0)
        memcpy(&len, head + 12, 4);
    if (len >= cap)
        len = (uint32_t)cap - 1;
    out[fread(out, 1, len, f)] = '\0';
    fclose(f);
}

int kv_admin_each(const char *dir, bool verify, void (*fn)(void *arg, const struct kv_admin_folder *f), void *arg,
                  struct arle_err *err)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    int n = 0;
    if (d == NULL)
        return arle_err_param(err, -errno, "dir", "cannot read %s: %s", dir, strerror(errno));
    while ((e = readdir(d)) != NULL) {
        char path[4096], identity[1300];
        if (strlen(e->d_name) != 16 || strspn(e->d_name, "0123456789abcdef") != 16)
            continue;
        int len = snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        struct kv_disk_config cfg = { .dir = path, .read_only = true };
        struct kv_admin_folder f = { .name = e->d_name, .identity = identity };
        struct kv_disk *disk;
        struct arle_err why = ARLE_ERR_INIT;
        if (len < 0 || (size_t)len >= sizeof path || kv_disk_open(&disk, &cfg, &why) < 0)
            continue;
        read_identity(path, identity, sizeof identity);
        f.bad = verify ? kv_disk_verify(disk) : 0;
        kv_disk_stat(disk, &f.st);
        fn(arg, &f);
        kv_disk_close(disk);
        n++;
    }
    closedir(d);
    return n;
}
