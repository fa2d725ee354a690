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
dirs=$tmp/root/plugins:$bld/.plugins
python3 "$tmp/ext/make_checkpoint.py" "$tmp/tiny" "$src/models/qwen35-tiny/tokenizer.json" >"$tmp/log" 2>&1
ok $? "its checkpoint is written" "$tmp/log"
with=
[ ! -f "$bld/.plugins/backend-cpu.so" ] || with="--model $tmp/tiny"
"$bld/arle" plugins check "$tmp/ext/model-tiny-trigram.so" --plugin-dir "$bld/.plugins" $with >"$tmp/log" 2>&1
ok $? "it passes the conformance kit" "$tmp/log"
if ! ls "$bld"/.plugins/backend-cpu.so >/dev/null 2>&1; then
    skip "doctor finds the model served by the example" "no backend is built"
else
    "$bld/arle" doctor --plugin-dir "$dirs" --set model.tiny.path="$tmp/tiny" >"$tmp/log" 2>&1
    grep -q "tiny: $tmp/tiny, served by model-tiny-trigram" "$tmp/log"
    ok $? "doctor finds the model served by the example" "$tmp/log"
fi
# The model counts: after 300, 301 come 302, 303 ... A chat format it has none, so it is asked over HTTP.
generate() {
    printf '[server]\nlisten = unix:%s/socket\ncontrol = %s/control\n[plugins]\ndir = %s\n[model tiny]\npath = %s/tiny\n' \
        "$tmp" "$tmp" "$tmp/dirs" "$tmp" >"$tmp/arle.ini"
    rm -f "$tmp/socket"
    "$bld/arled" --config "$tmp/arle.ini" --set plugins.dir="$dirs" --set backend-cpu.compute="$1" >"$tmp/log" 2>&1 &
    pid=$!
    i=0
    while [ $i -lt 300 ] && kill -0 $pid 2>/dev/null && ! curl -fs --unix-socket "$tmp/socket" http://x/ready >/dev/null 2>&1; do
        sleep 0.1
        i=$((i + 1))
    done
    curl -s --unix-socket "$tmp/socket" http://x/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "tiny", "prompt": [300, 301], "max_tokens": 5, "temperature": 0, "return_token_ids": true}' >"$tmp/out"
    kill $pid
    wait $pid
    cat "$tmp/out" >>"$tmp/log"
    python3 -c 'import json,sys; print(*json.load(open(sys.argv[1]))["choices"][0]["token_ids"])' "$tmp/out" 2>>"$tmp/log"
}
for compute in f32 bf16; do
    if [ ! -x "$bld/arled" ] || ! command -v curl >/dev/null 2>&1 || [ ! -f "$bld/.plugins/backend-cpu.so" ]; then
        skip "it generates in $compute" "no arled, no curl or no backend"
        continue
    fi
    [ "$(generate $compute)" = "302 303 304 305 306" ]
    ok $? "it generates in $compute" "$tmp/log"
done
echo "1..$n"
exit $failed
