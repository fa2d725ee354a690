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


def every_field_refuses_nonsense():
    """Any JSON where it does not belong: 400 with the field's path, or an answer where the value is one of the field's own."""
    nonsense = [-1, 1.5, 1e308, -1e308, 2**63, -2**63 - 1, 10**40, "", "x\0y", "\x7f", [], [[]], [None], {}, {"x": {}}, True]
    fine = {"seed": [-1], "stop": [[], "\x7f", "x\0y"], "stop_token_ids": [[]], "tools": [[]], "modalities": [[]], "logit_bias": [{}],
            "temperature": [1.5, True], "top_k": [-1], "priority": [-1], "presence_penalty": [-1, 1.5], "frequency_penalty": [-1, 1.5],
            "repetition_penalty": [1.5], "metadata": [{}], "suffix": [""], "cache_salt": ["", "\x7f"], "user": ["", "\x7f"],
            "safety_identifier": ["", "\x7f", "x\0y"], "prompt_cache_key": ["", "\x7f", "x\0y"], "chat_template_kwargs": [{}, {"x": {}}],
            "prompt": ["\x7f", "x\0y"], "system": ["", "\x7f", "x\0y", []], "stop_sequences": [[]], "logprobs": [True]}
    flags = ("stream", "add_generation_prompt", "include_reasoning", "store", "parallel_tool_calls", "ignore_eos",
             "include_cache_detail", "return_token_ids", "return_drafts", "skip_special_tokens", "return_tokens_as_token_ids", "echo",
             "add_special_tokens")
    page = open(os.path.join(SOURCE, "docs/http-api.md")).read()
    fields = lambda title: sorted(set(re.findall(r"`([a-z_]+)`", " ".join(l.split("|")[1] for l in
                                  page.split("## " + title + "\n")[1].split("\n## ")[0].split("\n") if l.startswith("| `")))))
    both = fields("Fields of both generation endpoints")
    for path, base, names in ((CHAT, {"messages": USER}, both + fields("Fields of chat completions")),
                              (COMP, {"prompt": "hi"}, both + fields("Fields of completions")),
                              ("/v1/messages", {"messages": USER}, fields("Fields of messages"))):
        wrong = []
        for name in names:
            for value in nonsense:
                status, headers, data = server.raw("POST", path, dict(base, **dict({"max_tokens": 1}, **{name: value})))
                known = any(value == v and type(value) is type(v) for v in fine.get(name, [])) or (value is True and name in flags)
                e = {} if status == 200 else json.loads(data)["error"]
                if status == 200 and not known or status != 200 and (status not in (400, 404) or not e["message"]
                                                                       or not str(e["param"]).startswith("messages" if name == "continue_final_message" and value is True else name)):
                    wrong.append((name, value, status, data[:200]))
        ok(not wrong, "%s: nonsense in every one of %d fields" % (path, len(names)), "\n".join(map(str, wrong)))


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
    said = lambda **k: USER + [dict({"role": "assistant", "content": "a"}, **k)] + USER
    called = lambda **k: said(tool_calls=[dict({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}, **k)])
    tool = lambda **k: [{"type": "function", "function": dict({"name": "f"}, **k)}]
    chat("name of a wrong type", 400, "invalid_type", "messages[0].name", messages=[dict(USER[0], name=5)])
    chat("refusal of a wrong type", 400, "invalid_type", "messages[1].refusal", messages=said(refusal=[]))
    chat("function_call", 400, "unsupported_value", "messages[1].function_call", messages=said(function_call={"name": "f"}))
    chat("tool_calls of a user", 400, "invalid_value", "messages[0].tool_calls", messages=[dict(USER[0], tool_calls=[{}])])
    chat("call of another type", 400, "unsupported_value", "messages[1].tool_calls[0].type", messages=called(type="custom"))
    chat("call with arguments that are no JSON", 400, "invalid_value", "messages[1].tool_calls[0].function.arguments",
         messages=called(function={"name": "f", "arguments": "{"}))
    chat("description of a wrong type", 400, "invalid_type", "tools[0].function.description", tools=tool(description=5))
    chat("strict of a wrong type", 400, "invalid_type", "tools[0].function.strict", tools=tool(strict="yes"))
    chat("parameters of a wrong type", 400, "invalid_type", "tools[0].function.parameters", tools=tool(parameters=[]))
    chat("unknown stream option", 400, "unknown_parameter", "stream_options", stream=True, stream_options={"usage": True})
    for key in (" 1", "+1", "1.0", "-1", ""):
        chat("logit_bias of %r" % key, 400, "invalid_value", "logit_bias", logit_bias={key: 1})
    chat("seed beyond 64 bits", 400, "invalid_value", "seed", seed=2**63)
    chat("a NUL in the model's name", 400, "invalid_value", "model", model="tiny\0x")
    chat("a NUL in a role", 400, "invalid_value", "messages[0].role", messages=[{"role": "user\0x", "content": "x"}])
    chat("a NUL in cache_salt", 400, "invalid_value", "cache_salt", cache_salt="a\0b")
    chat("metadata of a wrong type", 400, "invalid_type", "metadata", metadata="x")
    chat("service_tier unknown", 400, "invalid_value", "service_tier", service_tier="gold")
    chat("stop list too long", 400, "invalid_value", "stop", stop=["a"] * 17)
    chat("name of a call with a bracket", 400, "invalid_value", "messages[1].tool_calls[0].function.name", messages=USER + [
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "a>b", "arguments": "{}"}}]}])
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
    user = lambda text: ('{"model":"tiny","messages":[{"role":"user","content":"%s"}],"max_tokens":1}' % text).encode()
    for name, text in (("half of a surrogate pair", "a\\ud83e"), ("surrogates in the wrong order", "\\udd8a\\ud83e"),
                       ("a control character", "a\nb"), ("a bad escape", "\\x41")):
        refused("string with " + name, CHAT, user(text), 400, "invalid_json", None)
    for number in ("01", "-01", "1.", ".5", "1e", "+1", "0x1", "--1"):
        refused("the number " + number, CHAT, '{"messages":[],"seed":%s}' % number, 400, "invalid_json", None)
    refused("NaN", CHAT, '{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "invalid_value", "temperature")
    refused("Infinity", CHAT, '{"messages":[{"role":"user","content":"x"}],"top_p":-Infinity}', 400, "invalid_value", "top_p")
    refused("a name with a NUL", CHAT, '{"messages":[],"seed\\u0000":1}', 400, "invalid_json", None)
    refused("of two equal names the last counts", CHAT, '{"model":"tiny","model":"other","messages":[]}', 404, "model_not_found", "model")
    refused("body over the limit", CHAT, b" " * (2 << 20), 413, "request_too_large", None)
    refused("64 MiB body", CHAT, b" " * (64 << 20), 413, "request_too_large", None)


def chunked_body():
    """Without a Content-Length the limit holds while the body arrives."""
    c = http.client.HTTPConnection(server.host, server.port, timeout=60)
    c.request("POST", CHAT, (b" " * 65536 for _ in range(64)), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    equal(c.getresponse().status, 413, "chunked body over the limit")
    c.close()


def whole_reply(data, shut=False):
    s = socket.create_connection((server.host, server.port), timeout=20)
    out = b""
    try:
        s.sendall(data)
        if shut:
            s.shutdown(socket.SHUT_WR)
        while True:
            part = s.recv(65536)
            if not part:
                break
            out += part
    except OSError:
        pass
    s.close()
    return out


def framing():
    """What is wrong with the message around the body."""
    post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    body = json.dumps({"model": "tiny", "messages": []}).encode()
    whole = post + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for name, head, rest, status in (
            ("negative length", b"Content-Length: -5\r\n", b"", b"400"), ("length that is no number", b"Content-Length: 5x\r\n", b"abcde", b"400"),
            ("length beyond all numbers", b"Content-Length: 99999999999999999999999\r\n", b"", b"413"),
            ("two lengths", b"Content-Length: 2\r\nContent-Length: 3\r\n", b"{}x", b"400"),
            ("length and chunks", b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"400"),
            ("chunk size that is no number", b"Transfer-Encoding: chunked\r\n", b"zz\r\n{}\r\n0\r\n\r\n", b"400"),
            ("chunked body", b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), b"400")):
        out = whole_reply(post + head + b"\r\n" + rest)
        ok(out.startswith(b"HTTP/1.1 " + status) and (b"length of the body" in out) == (name in ("two lengths", "length and chunks")),
           "framing: " + name, out[:400])
    ok(b"messages" in whole_reply(whole, shut=True), "framing: a half-closed connection still gets its refusal")
    equal(whole_reply(whole[:-5], shut=True), b"", "framing: a body that ends too early is no request")
    ok(whole_reply(whole.replace(b"Connection: close\r\n", b"") * 2 + whole).count(b"invalid_value") == 3, "framing: three requests in one packet")
    ok(whole_reply(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 400"), "framing: no Host")
    ok(whole_reply(b"GET /" + b"a" * 200000 + b" HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 414"), "framing: a long path")


def slow_body():
    s = socket.create_connection((server.host, server.port), timeout=20)
    body = json.dumps({"model": "tiny", "messages": []}).encode()
    s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
    for i in range(len(body)):
        s.sendall(body[i:i + 1])
        time.sleep(0.005)
    ok(s.recv(1000).startswith(b"HTTP/1.1 400"), "a body that comes byte by byte")
    s.close()


def expect_continue():
    s = socket.create_connection((server.host, server.port), timeout=20)
    s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
    equal(s.recv(100)[:12], b"HTTP/1.1 413", "a client that waits for 100 Continue is refused before it sends")
    s.close()


def routes():
    equal(server.raw("GET", "/nowhere")[0], 404, "unknown path")
    equal(server.raw("GET", CHAT)[0], 405, "wrong method")
    equal(server.raw("DELETE", "/v1/models")[0], 405, "wrong method of a list")
    equal([server.raw(m, p)[1].get("allow") for m, p in (("PUT", CHAT), ("POST", "/v1/models"), ("HEAD", COMP))],
          ["POST", "GET, HEAD", "POST"], "Allow says which would be right")
    equal([server.raw("HEAD", p)[0] for p in ("/v1/models", "/nowhere", CHAT)], [200, 404, 405], "HEAD")
    for path in ("/", "/v1/", "/v1/models/", CHAT + "/", "//v1/models", "/v1/models/%00", "/%2e%2e/etc/passwd"):
        equal(server.raw("GET", path)[0], 404, "unknown path " + path)
    status, headers, data = server.raw("GET", "/v1/models/%ff%c3")
    ok(status == 404 and "\ufffd" in json.loads(data.decode())["error"]["message"], "bytes that are no text do not come back", data)
    long = "\u00e9" * 400
    status, headers, data = server.raw("POST", CHAT, {"x" + long: 1, "messages": USER})
    ok(status == 400 and json.loads(data.decode())["error"]["code"] == "unknown_parameter", "a message that is cut stays text", data)
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


for fn in (rows, broken_bodies, chunked_body, framing, slow_body, expect_continue, routes, no_work_was_done, every_field_refuses_nonsense):
    case(fn)
equal(server.process.poll(), None, "nothing of this ended it")
equal(server.stop(), 0, "ends cleanly")
done()
