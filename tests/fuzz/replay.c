/*
 * main() for fuzz targets without a fuzzer: feeds every file of tests/fuzz/corpus/TARGET, and of the folders or files given
 * as arguments, to LLVMFuzzerTestOneInput. TARGET is the program's name without "fuzz_". Speaks TAP.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int n_files;

static void replay_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        return;
    size_t cap = 1 << 16, n = 0, got;
    uint8_t *data = malloc(cap);
    while (data != NULL && (got = fread(data + n, 1, cap - n, f)) > 0) {
        n += got;
        if (n == cap)
            data = realloc(data, cap *= 2);
    }
    fclose(f);
    /* An exact-size copy, so that the address sanitizer sees reads past the end. */
    uint8_t *exact = malloc(n ? n : 1);
    if (data != NULL && exact != NULL) {
        memcpy(exact, data, n);
        LLVMFuzzerTestOneInput(exact, n);
        n_files++;
    }
    free(exact);
    free(data);
}

static void replay(const char *path)
{
    struct stat st;
    if (stat(path, &st) < 0)
        return;
    if (!S_ISDIR(st.st_mode)) {
        replay_file(path);
        return;
    }
    DIR *d = opendir(path);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        char file[4096];
        if (e->d_name[0] == '.' || snprintf(file, sizeof file, "%s/%s", path, e->d_name) >= (int)sizeof file)
            continue;
        replay_file(file);
    }
    if (d != NULL)
        closedir(d);
}

int main(int argc, char **argv)
{
    const char *top = getenv("top_srcdir"), *name = strrchr(argv[0], '/');
    name = name != NULL ? name + 1 : argv[0];
    if (strncmp(name, "lt-", 3) == 0)
        name += 3;
    if (strncmp(name, "fuzz_", 5) == 0)
        name += 5;
    char corpus[4096];
    snprintf(corpus, sizeof corpus, "%s/tests/fuzz/corpus/%s", top != NULL ? top : ".", name);
    replay(corpus);
    for (int i = 1; i < argc; i++)
        replay(argv[i]);
    printf("%sok 1 - %s: %d corpus files replayed\n1..1\n", n_files > 0 ? "" : "not ", name, n_files);
    return n_files > 0 ? 0 : 1;
}
