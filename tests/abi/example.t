#!/bin/sh
# The worked example builds outside the tree against installed headers, passes the kit, and generates through the engine.
src=${top_srcdir:-$PWD} bld=${top_builddir:-.}
n=0 failed=0
ok() {
    n=$((n + 1))
    if [ "$1" = 0 ]; then echo "ok $n - $2"; else failed=1; echo "not ok $n - $2"; [ -z "$3" ] || sed 's/^/# /' "$3" | tail -n 15; fi
}
skip() { n=$((n + 1)); echo "ok $n - $1 # SKIP $2"; }
for tool in make pkg-config python3; do
    command -v $tool >/dev/null 2>&1 || { echo "1..0 # SKIP $tool is missing"; exit 0; }
done
tmp=$(mktemp -d) || exit 99
trap 'rm -rf "$tmp"' EXIT
umask 022

# Only what `make install` puts there: the sources of this tree are out of sight.
MAKEFLAGS= make -C "$bld" install-arleincludeHEADERS install-pkgconfigDATA DESTDIR="$tmp/root" >"$tmp/log" 2>&1
ok $? "headers and arle.pc install into a DESTDIR" "$tmp/log"
PKG_CONFIG_PATH=$(dirname "$(find "$tmp/root" -name arle.pc)")
PKG_CONFIG_SYSROOT_DIR=$tmp/root
export PKG_CONFIG_PATH PKG_CONFIG_SYSROOT_DIR
mkdir "$tmp/ext" && cp "$src"/examples/plugin-tiny/* "$tmp/ext" && chmod u+w "$tmp/ext"/*
# shellcheck disable=SC2086
MAKEFLAGS= make -C "$tmp/ext" CFLAGS="-O1 -Werror ${ARLE_EXAMPLE_CFLAGS:-}" >"$tmp/log" 2>&1
ok $? "the example builds outside the tree" "$tmp/log"
MAKEFLAGS= make -C "$tmp/ext" install DESTDIR="$tmp/root" PLUGIN_DIR=/plugins >"$tmp/log" 2>&1 && [ -f "$tmp/root/plugins/model-tiny-trigram.so" ]
ok $? "it installs" "$tmp/log"
"$bld/arle" plugins check "$tmp/ext/model-tiny-trigram.so" --plugin-dir "$bld/.plugins" >"$tmp/log" 2>&1
ok $? "it passes the conformance kit" "$tmp/log"

dirs=$tmp/root/plugins:$bld/.plugins
python3 "$tmp/ext/make_checkpoint.py" "$tmp/tiny" "$src/models/qwen35-tiny/tokenizer.json" >"$tmp/log" 2>&1
ok $? "its checkpoint is written" "$tmp/log"
if ! ls "$bld"/.plugins/backend-cpu.so >/dev/null 2>&1; then
    skip "doctor finds the model served by the example" "no backend is built"
else
    "$bld/arle" doctor --plugin-dir "$dirs" --set model.tiny.path="$tmp/tiny" >"$tmp/log" 2>&1
    grep -q "tiny: $tmp/tiny, served by model-tiny-trigram" "$tmp/log"
    ok $? "doctor finds the model served by the example" "$tmp/log"
fi
if "$bld/arle" help run >/dev/null 2>&1; then
    for compute in f32 bf16; do
        # Tokens 300, 301 and what follows: the model counts.
        "$bld/arle" run --model "$tmp/tiny" --plugin-dir "$dirs" --set backend-cpu.compute=$compute --prompt-ids 300,301 \
            --max-tokens 5 --temperature 0 --json >"$tmp/out" 2>"$tmp/log"
        ids=$(python3 -c 'import json,sys; print(*json.load(open(sys.argv[1]))["token_ids"])' "$tmp/out" 2>>"$tmp/log")
        echo "# ids: $ids" >>"$tmp/log"
        [ "$ids" = "302 303 304 305 306" ]
        ok $? "it generates in $compute" "$tmp/log"
    done
else
    skip "it generates" "arle run is not built"
fi
echo "1..$n"
exit $failed
