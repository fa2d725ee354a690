/* `arle kv`: what a disk tier holds, and whether it is sound, without an engine. */
#include <inttypes.h>
#include <string.h>

#include "arle/cmd.h"
#include "kv/kv_admin.h"

struct report { bool verify; uint64_t bad; };

static void print_folder(void *arg, const struct kv_admin_folder *f)
{
    struct report *r = arg;
    printf("%s pages=%" PRIu64 " states=%" PRIu64 " segments=%" PRIu64 " bytes=%" PRIu64 " live_bytes=%" PRIu64, f->name, f->st.pages,
           f->st.states, f->st.segments, f->st.file_bytes, f->st.live_bytes);
    if (r->verify)
        printf(" damaged=%" PRIu64 " skipped_manifest_bytes=%" PRIu64, f->bad + f->st.bad_objects, f->st.skipped_bytes);
    printf(" identity=\"%s\"\n", f->identity);
    r->bad += f->bad + f->st.bad_objects + (f->st.skipped_bytes > 0);
}

static int run_kv(const struct args *a)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct report r = { 0 };
    if (a->n_rest != 2 || (strcmp(a->rest[0], "stat") != 0 && strcmp(a->rest[0], "verify") != 0)) {
        fprintf(stderr, "arle kv: give stat or verify and a directory\n");
        return EXIT_USAGE;
    }
    r.verify = strcmp(a->rest[0], "verify") == 0;
    int n = kv_admin_each(a->rest[1], r.verify, print_folder, &r, &err);
    if (n < 0)
        return cmd_fail(a, &err);
    if (n == 0)
        fprintf(stderr, "arle kv: nothing is stored in %s\n", a->rest[1]);
    return r.verify && r.bad > 0 ? EXIT_FAILED : EXIT_OK;
}

static const struct option_row options[] = { { NULL, 0, NULL, NULL } };

const struct command cmd_kv = {
    .name = "kv", .args = "stat|verify DIR", .max_args = 2,
    .summary = "Looks into the disk tier of the prefix cache.",
    .help = "stat lists what each model's folder holds; verify reads every byte of it and compares checksums and content\n"
            "hashes. Both change nothing and may run beside a daemon. verify fails when something is damaged; the daemon itself\n"
            "drops damaged entries and recomputes them, so that nothing has to be repaired.\n",
    .options = options, .run = run_kv,
};
