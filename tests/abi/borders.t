#!/bin/sh
# The borders that the layout promises: include lines go one way, plugins see <arle/*.h> and their own folder only, a plugin
# exports one symbol, the core names no model and no backend, and the public headers are C11 and C++17.
src=${top_srcdir:-.} bld=${top_builddir:-.}
n=0 failed=0
# check NAME FILE-WITH-FINDINGS: passes when the file is empty.
check() {
    n=$((n + 1))
    if [ -s "$2" ]; then
        failed=1
        echo "not ok $n - $1"
        sed 's/^/# /' "$2" | head -n 20
    else
        echo "ok $n - $1"
    fi
}
tmp=$(mktemp -d) || exit 99
trap 'rm -rf "$tmp"' EXIT

# Rank of a folder of core/: a file may include files of its own rank's folder and of lower ranks.
rank() {
    case $1 in
        util) echo 0 ;; config|kv|weights) echo 1 ;; plugin) echo 2 ;; sched) echo 3 ;; chat) echo 4 ;; http|ctl) echo 5 ;;
        daemon|arlectl) echo 6 ;; arle) echo 7 ;; include) echo -1 ;; *) echo "unknown folder core/$1" >>"$tmp/layers"; echo 9 ;;
    esac
}
: >"$tmp/layers"
cd "$src" || exit 99
grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' core --include='*.c' --include='*.h' |
while IFS=: read -r file line text; do
    from=${file#core/}; from=${from%%/*}
    what=$(printf '%s' "$text" | sed 's/.*"\(.*\)".*/\1/')
    what=${what#core/}      # a header that was made in the build folder
    case $what in
        */*) to=${what%%/*} ;;
        config.h) continue ;;
        *) echo "$file:$line: \"$what\" is not relative to core/" ; continue ;;
    esac
    [ "$from" = "$to" ] && continue
    [ "$(rank "$to")" -lt "$(rank "$from")" ] || echo "$file:$line: $from includes $to, which is not below it"
done >>"$tmp/layers"
check "lower layers do not include upper ones" "$tmp/layers"

: >"$tmp/plugins"
for dir in plugins/*/ examples/*/; do
    grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' "$dir" 2>/dev/null | while IFS=: read -r file line text; do
        what=$(printf '%s' "$text" | sed 's/.*"\(.*\)".*/\1/')
        [ "$what" = config.h ] || [ -f "$dir/$what" ] || [ -f "$(dirname "$file")/$what" ] || echo "$file:$line: \"$what\" is not in $dir"
    done
done >"$tmp/plugins"
check "plugins include <arle/*.h> and their own folder only" "$tmp/plugins"

grep -rniE 'qwen|deepseek|cuda|metal' core --include='*.c' --include='*.h' |
    grep -viE '^[^:]*:[0-9]*:[[:space:]]*(/\*|\*|//)' >"$tmp/names" || :
check "the core names no model and no backend" "$tmp/names"

: >"$tmp/symbols"
found=0
for so in "$bld"/.plugins/*.so; do
    [ -f "$so" ] || continue
    found=1
    nm -D --defined-only "$so" | awk '{print $NF}' | grep -vE '^(arle_plugin_v1|_init|_fini|_edata|_end|__bss_start)$' |
        grep -vE '^(__asan|__ubsan|__tsan|__odr_asan|___asan|__start_|__stop_)' |
        sed "s|^|$(basename "$so"): |" >>"$tmp/symbols"
    nm -D --defined-only "$so" | grep -q ' arle_plugin_v1$' || echo "$(basename "$so"): does not export arle_plugin_v1" >>"$tmp/symbols"
done
if [ $found = 1 ]; then
    check "plugins export arle_plugin_v1 and nothing else" "$tmp/symbols"
else
    n=$((n + 1)); echo "ok $n - plugins export arle_plugin_v1 and nothing else # SKIP none is built"
fi

for h in core/include/arle/*.h; do
    h=$(basename "$h")
    printf '#include <arle/%s>\nint main(void) { return 0; }\n' "$h" >"$tmp/h.c"
    cp "$tmp/h.c" "$tmp/h.cc"
    : >"$tmp/err"
    ${CC:-cc} -std=c11 -Wall -Wextra -Wpedantic -Werror -Icore/include -fsyntax-only "$tmp/h.c" 2>>"$tmp/err"
    check "<arle/$h> is C11" "$tmp/err"
    if command -v c++ >/dev/null 2>&1; then
        : >"$tmp/err"
        c++ -std=c++17 -Wall -Wextra -Werror -Icore/include -fsyntax-only "$tmp/h.cc" 2>>"$tmp/err"
        check "<arle/$h> is C++17" "$tmp/err"
    fi
done
echo "1..$n"
exit $failed
