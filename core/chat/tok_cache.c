/*
 * The cache of parsed tokenizers: one file per tokenizer.json (with its tokenizer_config.json), named by the hash of
 * their contents. Nothing depends on it; whatever looks wrong is treated as absent. A file is trusted only if it and
 * its folder belong to this user and nobody else may write them, since whoever writes it decides what text becomes.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chat/tok_int.h"

/*
 * File: this head, then the image. Bump the version with any change of meaning in the tables or the matchers'
 * numbering.
 */
struct cache_head {
    char magic[8];
    uint32_t version, reserved;
    struct tok_hash key, sum;
    uint64_t bytes;
    uint64_t pad;
};
static const char cache_magic[8] = "ARLEtok";
#define CACHE_VERSION 1u

/* Two 64-bit lanes of multiply and fold: finds damage, does not stop an attacker (ownership does). */
struct tok_hash tok_hash_bytes(struct tok_hash h, const void *data, size_t n)
{
    const uint8_t *p = data;
    uint64_t a = h.a ^ (n * UINT64_C(0x9E3779B97F4A7C15)), b = h.b ^ UINT64_C(0xC2B2AE3D27D4EB4F);
    while (n > 0) {
        uint64_t w[2] = { 0, 0 };
        size_t k = n < sizeof w ? n : sizeof w;
        memcpy(w, p, k);
        a = (a ^ w[0]) * UINT64_C(0xD6E8FEB86659FD93);
        b = (b ^ w[1]) * UINT64_C(0xA0761D6478BD642F);
        a ^= a >> 32;
        b ^= b >> 29;
        p += k;
        n -= k;
    }
    h.a = (a ^ (b << 17 | b >> 47)) * UINT64_C(0x9E3779B97F4A7C15);
    h.b = (b ^ (a << 41 | a >> 23)) * UINT64_C(0xE7037ED1A0B428DB);
    h.a ^= h.a >> 31;
    h.b ^= h.b >> 33;
    return h;
}

static bool same_hash(struct tok_hash x, struct tok_hash y)
{
    return x.a == y.a && x.b == y.b;
}

static bool ours(int fd, mode_t type)
{
    struct stat st;
    return fstat(fd, &st) == 0 && (st.st_mode & S_IFMT) == type && st.st_uid == geteuid() && (st.st_mode & 022) == 0;
}

static int open_dir(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0 && !ours(fd, S_IFDIR)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static void file_name(char out[64], struct tok_hash key)
{
    snprintf(out, 64, "tok-%016llx%016llx.bin", (unsigned long long)key.a, (unsigned long long)key.b);
}

static int read_all(int fd, void *p, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t r = read(fd, (char *)p + done, n - done);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return -EIO;
        done += (size_t)r;
    }
    return 0;
}

static int write_all(int fd, const void *p, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t r = write(fd, (const char *)p + done, n - done);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return -EIO;
        done += (size_t)r;
    }
    return 0;
}

static int load_fd(struct tok_tables *t, int fd, struct tok_hash key)
{
    struct cache_head head;
    struct stat st;
    if (!ours(fd, S_IFREG) || fstat(fd, &st) < 0)
        return -EPERM;
    if (read_all(fd, &head, sizeof head) < 0 || memcmp(head.magic, cache_magic, sizeof head.magic) != 0 ||
        head.version != CACHE_VERSION || !same_hash(head.key, key) || head.bytes == 0 ||
        head.bytes != (uint64_t)st.st_size - sizeof head)
        return -EINVAL;
    void *image = malloc(head.bytes);
    if (image == NULL)
        return -ENOMEM;
    int r = read_all(fd, image, head.bytes);
    if (r == 0 && !same_hash(tok_hash_bytes(key, image, head.bytes), head.sum))
        r = -EINVAL;
    if (r == 0)
        r = tok_image_adopt(t, image, head.bytes);
    if (r < 0)
        free(image);
    return r;
}

int tok_cache_load(struct tok_tables *t, const char *dir, struct tok_hash key)
{
    char name[64];
    int dfd = open_dir(dir);
    if (dfd < 0)
        return -ENOENT;
    file_name(name, key);
    int fd = openat(dfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    close(dfd);
    if (fd < 0)
        return -ENOENT;
    int r = load_fd(t, fd, key);
    close(fd);
    return r;
}

int tok_cache_store(const struct tok_tables *t, const char *dir, struct tok_hash key)
{
    char name[64], tmp[96];
    int dfd = open_dir(dir);
    if (dfd < 0)
        return -ENOENT;
    file_name(name, key);
    snprintf(tmp, sizeof tmp, ".%s.%ld.%p", name, (long)getpid(), (const void *)t);
    int fd = openat(dfd, tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) {
        int r = -errno;
        close(dfd);
        return r;
    }
    struct cache_head head = {
        .version = CACHE_VERSION, .key = key, .sum = tok_hash_bytes(key, t->image, t->image_len), .bytes = t->image_len,
    };
    memcpy(head.magic, cache_magic, sizeof head.magic);
    int r = write_all(fd, &head, sizeof head);
    if (r == 0)
        r = write_all(fd, t->image, t->image_len);
    if (close(fd) < 0 && r == 0)
        r = -EIO;
    /* No fsync: a file torn by a power cut fails its checksum and is written again. */
    if (r == 0 && renameat(dfd, tmp, dfd, name) < 0)
        r = -errno;
    if (r < 0)
        unlinkat(dfd, tmp, 0);
    close(dfd);
    return r;
}

/* Makes dir below a parent that exists; true if it may be used. */
static bool usable(const char *parent, char *out, size_t cap)
{
    int n = snprintf(out, cap, "%s/arle", parent);
    if (n < 0 || (size_t)n >= cap || parent[0] != '/')
        return false;
    if (mkdir(parent, 0700) < 0 && errno != EEXIST)
        return false;
    if (mkdir(out, 0700) < 0 && errno != EEXIST)
        return false;
    int fd = open_dir(out);
    if (fd < 0)
        return false;
    close(fd);
    return access(out, W_OK | X_OK) == 0;
}

void tok_cache_dir(char *out, size_t cap)
{
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char in_home[4096];
    if (xdg != NULL && xdg[0] != '\0' && usable(xdg, out, cap))
        return;
    if (home != NULL && home[0] != '\0' && snprintf(in_home, sizeof in_home, "%s/.cache", home) < (int)sizeof in_home &&
        usable(in_home, out, cap))
        return;
    int fd = open_dir("/var/cache/arle");   /* made by the package or the service manager, never by us */
    if (fd >= 0 && access("/var/cache/arle", W_OK | X_OK) == 0)
        snprintf(out, cap, "/var/cache/arle");
    else
        out[0] = '\0';
    if (fd >= 0)
        close(fd);
}
