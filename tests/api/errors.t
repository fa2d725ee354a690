#!/usr/bin/env python3
"""Bad requests: each gets its status, its field and its code before any work, and the server lives."""
import os, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *

need_model()
server = Arled(settings={"server.max_body": "1MiB"})
CHAT, COMP = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def refused(name, path, body, status, code, param, **kw):
    got, headers, data = server.raw("POST", path, body, **kw)
    try:
        e = json.loads(data)["error"]
    except Exception:
        ok(False, name, "%s %r" % (got, data[:300]))
        return
    good = got == status and e["code"] == code and e["param"] == param and e["type"] and e["message"]
    ok(good, name, "got %s %r\nexpected %s code %s param %s" % (got, e, status, code, param))


def chat(name, status, code, param, **fields):
    refused("chat: " + name, CHAT, dict({"model": "tiny", "messages": USER}, **fields), status, code, param)


def comp(name, status, code, param, **fields):
    refused("completions: " + name, COMP, dict({"model": "tiny", "prompt": "hi"}, **fields), status, code, param)


def rows():
    chat("unknown model", 404, "model_not_found", "model", model="other")
    chat("model of a wrong type", 400, "invalid_type", "model", model=5)
    chat("empty messages", 400, "invalid_value", "messages", messages=[])
    chat("messages missing", 400, "missing_required_parameter", "messages", messages=None)
    chat("messages of a wrong type", 400, "invalid_type", "messages", messages="hi")
    chat("message without role", 400, "missing_required_parameter", "messages[0].role", messages=[{"content": "x"}])
    chat("unknown role", 400, "invalid_value", "messages[0].role", messages=[{"role": "king", "content": "x"}])
    chat("content of a wrong type", 400, "invalid_type", "messages[0].content", messages=[{"role": "user", "content": 7}])
    chat("image part", 400, "unsupported_value", "messages[0].content[0].type",
         messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    chat("system message in the middle", 400, "invalid_value", "messages[1].role",
         messages=USER + [{"role": "system", "content": "x"}])
    chat("temperature of a wrong type", 400, "invalid_type", "temperature", temperature="hot")
    chat("temperature too high", 400, "invalid_value", "temperature", temperature=2.5)
    chat("top_p out of range", 400, "invalid_value", "top_p", top_p=1.01)
    chat("n of zero", 400, "invalid_value", "n", n=0)
    chat("n not whole", 400, "invalid_type", "n", n=1.5)
    chat("max_tokens negative", 400, "invalid_value", "max_tokens", max_tokens=-1)
    chat("max_tokens beyond the context", 400, "context_length_exceeded", "max_tokens", max_tokens=100000)
    chat("stop with an empty string", 400, "invalid_value", "stop", stop=[""])
    chat("logit_bias of no token", 400, "invalid_value", "logit_bias", logit_bias={"99999": 1})
    chat("top_logprobs without logprobs", 400, "invalid_value", "top_logprobs", top_logprobs=3)
    chat("top_logprobs too many", 400, "invalid_value", "top_logprobs", top_logprobs=21, logprobs=True)
    chat("stream of a wrong type", 400, "invalid_type", "stream", stream="yes")
    chat("stream_options without stream", 400, "invalid_value", "stream_options", stream_options={"include_usage": True})
    chat("tool_choice required", 400, "unsupported_value", "tool_choice", tool_choice="required")
    chat("response_format json_object", 400, "unsupported_value", "response_format.type", response_format={"type": "json_object"})
    chat("unknown field", 400, "unknown_parameter", "temprature", temprature=1)
    chat("tool without a name", 400, "missing_required_parameter", "tools[0].function.name",
         tools=[{"type": "function", "function": {}}])
    chat("over-long prompt", 400, "context_length_exceeded", "messages",
         messages=[{"role": "user", "content": "a b c d e f g h " * 4000}])
    comp("prompt missing", 400, "missing_required_parameter", "prompt", prompt=None)
    comp("prompt empty", 400, "invalid_value", "prompt", prompt="")
    comp("prompt of a wrong type", 400, "invalid_type", "prompt", prompt={"a": 1})
    comp("token id out of range", 400, "invalid_value", "prompt", prompt=[1, 2, 4096])
    comp("token id negative", 400, "invalid_value", "prompt", prompt=[-1])
    comp("mixed prompt", 400, "invalid_type", "prompt", prompt=[1, "a"])
    comp("logprobs too many", 400, "invalid_value", "logprobs", logprobs=100)
    comp("over-long prompt", 400, "context_length_exceeded", "prompt", prompt=[5] * 9000)
    comp("best_of", 400, "unsupported_value", "best_of", best_of=3)
    refused("tokenize: prompt missing", "/tokenize", {"model": "tiny"}, 400, "missing_required_parameter", "prompt")
    refused("detokenize: bad id", "/detokenize", {"model": "tiny", "tokens": [99999]}, 400, "invalid_value", "tokens")
    refused("render: no messages", "/v1/render", {"model": "tiny"}, 400, "missing_required_parameter", "messages")


def broken_bodies():
    refused("empty body", CHAT, "", 400, "invalid_json", None)
    refused("not JSON", CHAT, "{", 400, "invalid_json", None)
    refused("JSON of another kind", CHAT, "[1]", 400, "invalid_type", None)
    refused("trailing text", CHAT, '{"model":"tiny"} x', 400, "invalid_json", None)
    refused("deep JSON", CHAT, '{"messages":' + "[" * 100000 + "]" * 100000 + "}", 400, "invalid_json", None)
    refused("invalid UTF-8", CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"\xff\xfe"}]}', 400, "invalid_utf8", None)
    refused("surrogates in UTF-8", CHAT, b'{"messages":"\xed\xa0\x80"}', 400, "invalid_utf8", None)
    refused("body over the limit", CHAT, b" " * (2 << 20), 413, "request_too_large", None)
    refused("64 MiB body", CHAT, b" " * (64 << 20), 413, "request_too_large", None)


def chunked_body():
    """Without a Content-Length the limit holds while the body arrives."""
    c = http.client.HTTPConnection(server.host, server.port, timeout=60)
    c.request("POST", CHAT, (b" " * 65536 for _ in range(64)), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    equal(c.getresponse().status, 413, "chunked body over the limit")
    c.close()


def expect_continue():
    s = socket.create_connection((server.host, server.port), timeout=20)
    s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
    equal(s.recv(100)[:12], b"HTTP/1.1 413", "a client that waits for 100 Continue is refused before it sends")
    s.close()


def routes():
    equal(server.raw("GET", "/nowhere")[0], 404, "unknown path")
    equal(server.raw("GET", CHAT)[0], 405, "wrong method")
    equal(server.raw("DELETE", "/v1/models")[0], 405, "wrong method of a list")
    status, body = server.get("/v1/models/other")
    ok(status == 404 and body["error"]["code"] == "model_not_found", "unknown model by path", body)
    s = socket.create_connection((server.host, server.port), timeout=20)
    s.sendall(b"GARBAGE\r\n\r\n")
    ok(not s.recv(100).startswith(b"HTTP/1.1 200"), "not HTTP at all")
    s.close()


def no_work_was_done():
    equal(server.metric("arle_engine_requests_total"), 0, "no refused request reached the engine")
    status, body = server.chat("What is the capital of Japan?")
    ok(status == 200 and "Tokyo" in body["choices"][0]["message"]["content"], "and the server still answers", body)
    equal(server.process.poll(), None, "it never crashed")


for fn in (rows, broken_bodies, chunked_body, expect_continue, routes, no_work_was_done):
    case(fn)
equal(server.stop(), 0, "ends cleanly")
done()
