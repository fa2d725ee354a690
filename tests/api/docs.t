#!/usr/bin/env python3
"""docs/http-api.md says what the program does: every route, field and code on the page exists, and the other way round."""
import os, re, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *

page = open(os.path.join(SOURCE, "docs/http-api.md")).read()
source = lambda p: open(os.path.join(SOURCE, p)).read()


def section(title):
    return page.split("\n## " + title + "\n")[1].split("\n## ")[0]


def first_cells(text):
    cells = set()
    for line in text.split("\n"):
        if line.startswith("| `"):
            cells |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return cells


def strings_of(text, name):
    """String literals of a C table or macro called name."""
    body = re.search(r"%s(?:\[\])?\s*(?:=\s*\{|\\\n)(.*?)(?:\};|\n\n)" % re.escape(name), text, re.S).group(1)
    return set(re.findall(r'"([^"]+)"', body))


def routes():
    table = source("core/http/handlers.c")
    code = {m + " " + p.replace("/*", "/{id}") for m, p in re.findall(r'\{ "([A-Z]+)", "([^"]+)", handle_', table)}
    equal(first_cells(section("Routes")), code, "routes")


def fields():
    text = source("core/http/json_in.c")
    common = strings_of(text, "COMMON_FIELDS")
    both = first_cells(section("Fields of both generation endpoints"))
    equal(both, common, "fields of both endpoints")
    equal(first_cells(section("Fields of chat completions")), strings_of(text, "chat_fields"), "fields of chats")
    equal(first_cells(section("Fields of messages")), strings_of(source("core/http/messages_in.c"), "message_fields"), "fields of messages")
    equal(first_cells(section("Fields of completions")), strings_of(text, "completion_fields"), "fields of completions")


def codes():
    text = source("core/http/reply.c")
    code = {(n, int(s)) for s, n in re.findall(r'\{ -E[A-Z0-9]+, (\d+), "[a-z_]+", "([a-z0-9_]+)" \}', text)}
    said = {(m[0], int(m[1])) for m in re.findall(r"^\| `([a-z0-9_]+)` \| (\d+) \|", section("Errors"), re.M)}
    equal(said, code, "error codes and their status")


def keys():
    known = set(re.findall(r'(?:STR|BOOL|INT|BYTES|TIME|ENUM)\("([a-z_]+)"|\.name = "([a-z_]+)"', source("core/config/keys.c")))
    known = {a or b for a, b in known}
    used = {k for s, k in re.findall(r"`(server|auth|kv|log|scheduler)\.([a-z_]+)`", page)}
    ok(used and used <= known, "configuration keys exist", used - known)


def live():
    """Each documented field is accepted or refused for its value, never as unknown."""
    with Arled() as s:
        for path, extra, names in (("/v1/chat/completions", {"messages": []}, ("both generation endpoints", "chat completions")),
                                   ("/v1/completions", {"prompt": ""}, ("both generation endpoints", "completions"))):
            for name in names:
                for field in sorted(first_cells(section("Fields of " + name))):
                    status, body = s.post(path, dict(extra, **{field: {"x": 1}}))
                    if status != 400 or body["error"]["code"] == "unknown_parameter":
                        ok(False, "%s knows %s" % (path, field), body)
            ok(True, "%s knows its fields" % path)
        for route in first_cells(section("Routes")):
            method, path = route.split(" ")
            status = s.raw(method, path.replace("{id}", "tiny"), "{" if method == "POST" else None)[0]
            ok(status == (400 if method == "POST" else 200), "%s answers" % route, status)


def metrics_exist():
    with Arled() as s:
        text = s.get("/metrics")[1]
        ok("arle_http_requests_total" in text and "arle_kv_pages" in text, "metrics answer")


for fn in (routes, fields, codes, keys):
    case(fn)
if os.path.exists(os.path.join(TINY, "config.json")):
    case(live)
    case(metrics_exist)
done()
