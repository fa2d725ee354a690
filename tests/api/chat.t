#!/usr/bin/env python3
"""Every endpoint: answers, streaming that equals the whole, stop strings, tools, logprobs, usage, keys."""
import os, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *

need_model()
server = Arled()
CHAT, COMP = "/v1/chat/completions", "/v1/completions"
GOLDEN = json.load(open(os.path.join(TINY, "golden.json")))
SHELL = [{"type": "function", "function": {"name": "shell", "description": "Run a command",
          "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}}]


def user(text, **kw):
    return dict({"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": text}]}, **kw)


def first(body):
    return body["choices"][0]


def models_and_health():
    status, body = server.get("/v1/models")
    ok(status == 200 and body["object"] == "list" and body["data"][0]["id"] == "tiny", "models", body)
    equal((body["has_more"], body["first_id"], body["last_id"], body["data"][0]["type"], body["data"][0]["display_name"]),
          (False, "tiny", "tiny", "model", "tiny"), "models in Anthropic's dialect")
    equal(body["data"][0]["created_at"], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(body["data"][0]["created"])), "both dates are one")
    status, body = server.get("/v1/models/tiny")
    ok(status == 200 and body["object"] == "model" and body["max_model_len"] == 8192, "one model", body)
    equal(server.get("/health"), (200, {"status": "ok"}), "health")
    equal(server.get("/ready"), (200, {"status": "ready"}), "ready")
    equal(server.raw("HEAD", "/health")[0], 200, "HEAD")


def plain_answer():
    status, body = server.chat("What is the capital of Japan?")
    equal(status, 200, "chat answers")
    equal(first(body)["message"]["content"], "The capital of Japan is Tokyo.", "the answer")
    equal(first(body)["finish_reason"], "stop", "finish_reason stop")
    u = body["usage"]
    ok(u["prompt_tokens"] == 19 and u["completion_tokens"] == 10 and u["total_tokens"] == 29, "usage is true", u)
    ok("cached_tokens" in u["prompt_tokens_details"], "usage tells cached tokens", u)
    status, body = server.post(CHAT, {"messages": [{"role": "user", "content": "What is the capital of Japan?"}],
                                      "temperature": 0, "max_tokens": 3})
    ok(status == 200 and first(body)["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 3,
       "max_tokens ends with length; one served model needs no name", body)


def streaming_equals_whole():
    for name, body in (("plain", user("What is the capital of France?")), ("reasoning", user("What is 48 + 37?",
                        chat_template_kwargs={"enable_thinking": True})), ("tool", user("How many files are in /tmp?", tools=SHELL)),
                       ("two answers", user("Tell me a story about a fox.", n=2, seed=5, temperature=0.8, max_tokens=24))):
        status, whole = server.post(CHAT, body)
        chunks, finished = server.stream(CHAT, dict(body, stream_options={"include_usage": True}))
        joined = join_chunks(chunks)
        ok(status == 200 and finished, "stream of %s ends with [DONE]" % name, chunks[-1:])
        for ch in whole["choices"]:
            m, j = ch["message"], joined[ch["index"]]
            equal((j["content"], j["reasoning_content"], j["finish_reason"]),
                  (m["content"] or "", m.get("reasoning_content", ""), ch["finish_reason"]), "%s: streamed equals whole" % name)
            equal([(c["name"], c["arguments"]) for c in j["tool_calls"]],
                  [(c["function"]["name"], c["function"]["arguments"]) for c in m.get("tool_calls", [])], "%s: calls equal" % name)
        usage = [c["usage"] for c in chunks if c.get("usage")]
        ok(len(usage) == 1 and usage[0]["completion_tokens"] == whole["usage"]["completion_tokens"]
           and usage[0]["prompt_tokens"] == whole["usage"]["prompt_tokens"], "%s: usage equals" % name, (usage, whole["usage"]))
        equal(chunks[0]["choices"][0]["delta"].get("role"), "assistant", "%s: the first chunk has the role" % name)


def tools():
    status, body = server.post(CHAT, user("How many files are in /tmp?", tools=SHELL))
    m = first(body)["message"]
    equal(first(body)["finish_reason"], "tool_calls", "finish_reason tool_calls")
    call = m["tool_calls"][0]
    ok(call["type"] == "function" and call["id"].startswith("call_") and call["function"]["name"] == "shell", "a tool call", m)
    ok("command" in json.loads(call["function"]["arguments"]), "its arguments are JSON", call)
    equal(m["content"], None, "content is null beside a call")
    follow = user("x", tools=SHELL)
    follow["messages"] = [{"role": "user", "content": "How many files are in /tmp?"}, dict(m, content=""),
                          {"role": "tool", "tool_call_id": call["id"], "content": "7"}]
    status, body = server.post(CHAT, follow)
    ok(status == 200 and first(body)["message"]["content"], "the result of a tool is answered", body)
    status, body = server.post(CHAT, user("How many files are in /tmp?", tools=SHELL, tool_choice="none"))
    ok(status == 200 and "tool_calls" not in first(body)["message"], "tool_choice none", body)


def ids_in(ids, part):
    return any(ids[i:i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def answer(body, streamed):
    """(message to send back, prompt ids, answer ids, usage)"""
    body = dict(body, return_token_ids=True)
    if not streamed:
        status, whole = server.post(CHAT, body)
        return first(whole)["message"], whole["prompt_token_ids"], first(whole)["token_ids"], whole["usage"]
    chunks, finished = server.stream(CHAT, dict(body, stream_options={"include_usage": True}))
    m = join_chunks(chunks)[0]
    message = {"role": "assistant", "content": m["content"], "reasoning_content": m["reasoning_content"], "tool_calls": [
        {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in m["tool_calls"]]}
    return message, chunks[0]["choices"][0]["prompt_token_ids"], m["token_ids"], chunks[-1]["usage"]


def histories():
    """A call that comes back renders to the tokens that were sampled, also where the model did not keep to its format."""
    odd = {"logit_bias": {"4093": -100}}        # without its closing tag, the model ends calls in a way of its own
    for name, extra in (("regular", {}), ("irregular", odd), ("reasoning", {"reasoning_effort": "high"}),
                        ("irregular reasoning", dict(odd, reasoning_effort="high"))):
        for streamed in (False, True):
            title = "history, %s%s: " % (name, ", streamed" if streamed else "")
            ask = user("How many files are in /tmp?", tools=SHELL, max_tokens=60, cache_salt=title, **extra)
            message, prompt, said, usage = answer(ask, streamed)
            if not ok(message.get("tool_calls"), title + "there is a call", message):
                continue
            result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "7"}
            after = dict(ask, messages=ask["messages"] + [message, result])
            _, prompt2, _, usage2 = answer(after, streamed)
            equal(prompt2[:len(prompt) + len(said)], prompt + said, title + "the next prompt begins with prompt and answer")
            cached = usage2["prompt_tokens_details"]["cached_tokens"]
            ok(cached >= len(prompt) + len(said) - 1, title + "which are cached: %d of %d" % (cached, len(prompt2)), usage2)
            equal(server.post("/v1/render", after)[1]["token_ids"], prompt2, title + "render shows the same")
            edited = json.loads(json.dumps(message))
            edited["tool_calls"][0]["function"]["arguments"] = '{"command": "ls -la /srv"}'
            text = server.post("/v1/render", dict(ask, messages=ask["messages"] + [edited, result]))[1]["prompt"]
            ok("<tool_call>\n<function=shell>\n<parameter=command>\nls -la /srv\n</parameter>\n</function>\n</tool_call>" in text,
               title + "edited arguments are rendered", text[-400:])
            spaced = json.loads(json.dumps(message))
            call = spaced["tool_calls"][0]["function"]
            call["arguments"] = json.dumps(json.loads(call["arguments"]), indent=3)
            equal(server.post("/v1/render", dict(ask, messages=ask["messages"] + [spaced, result]))[1]["token_ids"], prompt2,
                  title + "arguments written anew are no edit")
            unknown = json.loads(json.dumps(message))
            unknown["tool_calls"][0]["id"] = "call_0"
            unknown["tool_calls"][0]["raw"] = {"text": ["<|im_end|>"]}
            regular = server.post("/v1/render", dict(ask, messages=ask["messages"] + [unknown, result]))[1]["token_ids"]
            equal(ids_in(regular, said), "irregular" not in name, title + "an unknown id renders in the regular form")
    ok(server.metric("arle_calls_kept") >= 8 and server.metric("arle_calls_kept_bytes") > 0
       and server.metric("arle_calls_recalled_total") >= 24 and server.metric("arle_calls_unknown_total") >= 16, "calls are counted")


def histories_of_tenants():
    odd = {"logit_bias": {"4093": -100}, "max_tokens": 60}
    with Arled(settings={"auth.keys": "alice:a-1 alice:a-2 bob:b-1", "model tiny.kept_calls": "2"}) as s:
        key = lambda k: {"headers": {"x-api-key": k}}
        ask = user("How many files are in /tmp?", tools=SHELL, return_token_ids=True, **odd)
        message = first(s.post(CHAT, ask, **key("a-1"))[1])["message"]
        after = dict(ask, messages=ask["messages"] + [message])
        after.pop("return_token_ids")
        alice, again, bob = (s.post("/v1/render", after, **key(k))[1]["prompt"] for k in ("a-1", "a-2", "b-1"))
        ok(alice == again and alice != bob and "destroyer" in bob, "a tenant's calls are its own", (alice[-300:], bob[-300:]))
        for _ in range(2):
            s.post(CHAT, ask, **key("b-1"))
        equal(s.post("/v1/render", after, **key("a-1"))[1]["prompt"], bob, "the oldest are forgotten")
    with Arled(settings={"model tiny.kept_calls": "0"}) as s:
        message = first(s.post(CHAT, user("How many files are in /tmp?", tools=SHELL, **odd))[1])["message"]
        after["messages"][1] = message
        equal(s.post("/v1/render", after)[1]["prompt"], bob, "kept_calls = 0 keeps none")


def reasoning():
    status, body = server.post(CHAT, user("What is 48 + 37?", reasoning_effort="high"))
    m = first(body)["message"]
    ok("85" in m.get("reasoning_content", "") and "85" in m["content"] and "</think>" not in json.dumps(m), "reasoning apart", m)
    ok(body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 5, "reasoning tokens are counted", body["usage"])


def stop_strings():
    full = first(server.chat("What is the capital of Japan?")[1])["message"]["content"]
    for stop in (" is T", "Tok", "yo.", "l of Jap", "T"):     # within a token, across borders, at the end
        want = full[:full.index(stop)]
        status, body = server.chat("What is the capital of Japan?", stop=["zzz", stop])
        equal((first(body)["message"]["content"], first(body)["finish_reason"]), (want, "stop"), "stop %r" % stop)
        chunks, finished = server.stream(CHAT, user("What is the capital of Japan?", stop=stop))
        equal((join_chunks(chunks)[0]["content"], finished), (want, True), "stop %r streamed" % stop)
    status, body = server.post(COMP, {"model": "tiny", "prompt": GOLDEN["chat_capital"]["ids"], "temperature": 0, "max_tokens": 20,
                                      "stop": "pan"})
    equal(first(body)["text"], "The capital of Ja", "stop in completions")
    status, body = server.post(COMP, {"model": "tiny", "prompt": GOLDEN["chat_capital"]["ids"], "temperature": 0, "max_tokens": 20,
                                      "stop_token_ids": [472], "return_token_ids": True})
    equal((first(body)["text"], first(body)["token_ids"][-1]), ("The capital of Japan is", 472), "stop_token_ids")
    status, body = server.post(COMP, {"model": "tiny", "prompt": GOLDEN["chat_capital"]["ids"], "temperature": 0, "max_tokens": 20,
                                      "ignore_eos": True})
    equal(body["usage"]["completion_tokens"], 20, "ignore_eos goes on")
    ok(server.wait_idle(), "stopped answers end in the engine, too")


def streams_of_many():
    """Several sampled answers at once: no piece holds half a character or a part of a stop string, and usage counts all tokens."""
    for seed in range(4):
        body = user("Tell me a story about a fox.", n=4, seed=seed, temperature=1.7, max_tokens=40, stop=["he", "\n\n", "a s"],
                    return_token_ids=True)
        status, whole = server.post(CHAT, body)
        chunks, finished = server.stream(CHAT, dict(body, stream_options={"include_usage": True}))
        joined = join_chunks(chunks)
        want = {c["index"]: (c["message"]["content"] or "", c["finish_reason"], c["token_ids"]) for c in whole["choices"]}
        equal({i: (m["content"], m["finish_reason"], m["token_ids"]) for i, m in joined.items()}, want, "seed %d: streamed equals whole" % seed)
        ok(not any(s in text for text, _, _ in want.values() for s in body["stop"]), "seed %d: no stop string" % seed, want)
        ok({r for _, r, _ in want.values()} <= {"stop", "length"} and all((r == "length") <= (len(ids) == 40) for _, r, ids in want.values()),
           "seed %d: finish_reason" % seed, want)
        n = sum(len(ids) for _, _, ids in want.values())
        ok(whole["usage"]["completion_tokens"] >= n and chunks[-1]["usage"]["completion_tokens"] >= n, "seed %d: usage" % seed, (n, whole["usage"]))
    text = "\U0001f98a\u00e9\u6f22"
    ids = server.post("/tokenize", {"prompt": text, "allow_special": False})[1]["tokens"]
    ok(len(ids) > 3, "characters of several tokens", ids)
    chunks, finished = server.stream(COMP, {"prompt": "x", "max_tokens": 30, "temperature": 2.0, "seed": 1, "logit_bias": {str(i): 30 for i in ids}})
    got = join_chunks(chunks)[0]["text"]
    whole = first(server.post(COMP, {"prompt": "x", "max_tokens": 30, "temperature": 2.0, "seed": 1, "logit_bias": {str(i): 30 for i in ids}})[1])["text"]
    equal(got, whole, "pieces of characters: streamed equals whole")


def hang_ups():
    body = user("Tell me a story about a fox.", n=3, ignore_eos=True, max_tokens=4000)
    for streamed in (True, False):
        for wait in (0, 0.3):
            s = server.open_stream(CHAT, dict(body)) if streamed else socket.create_connection((server.host, server.port))
            if not streamed:
                data = json.dumps(body).encode()
                s.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data)
            time.sleep(wait)
            s.close()
            ok(server.wait_idle(10), "a client that hangs up after %.1f s, %s, leaves nothing running" % (wait, "streamed" if streamed else "whole"))


def completions():
    g = GOLDEN["chat_capital"]
    base = {"model": "tiny", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    status, by_ids = server.post(COMP, dict(base, prompt=g["ids"]))
    equal(first(by_ids)["token_ids"], g["greedy_ids"], "token ids out")
    ok(first(by_ids)["prompt_token_ids"] == g["ids"] and by_ids["prompt_token_ids"] == g["ids"], "prompt ids back", by_ids)
    status, by_text = server.post(COMP, dict(base, prompt=g["text"]))
    equal((first(by_text)["token_ids"], first(by_text)["prompt_token_ids"]), (g["greedy_ids"], g["ids"]), "text prompt is the same")
    status, batch = server.post(COMP, dict(base, prompt=[g["ids"], GOLDEN["system"]["ids"]], n=2))
    equal([c["token_ids"] for c in sorted(batch["choices"], key=lambda c: c["index"])],
          [g["greedy_ids"]] * 2 + [GOLDEN["system"]["greedy_ids"][:12]] * 2, "a batch of prompts, two answers each")
    equal(batch["usage"]["prompt_tokens"], len(g["ids"]) + len(GOLDEN["system"]["ids"]), "usage of a batch")
    status, echo = server.post(COMP, dict(base, prompt=g["ids"], echo=True, logprobs=2))
    lp = first(echo)["logprobs"]
    n = len(g["ids"]) + len(g["greedy_ids"])
    ok(len(lp["tokens"]) == n == len(lp["token_logprobs"]) == len(lp["text_offset"]) == len(lp["top_logprobs"]), "echo's lists", lp)
    ok(lp["token_logprobs"][0] is None and all(x is not None for x in lp["token_logprobs"][1:]), "the first has no logprob", lp)
    text = first(echo)["text"]
    ok(text.startswith(g["text"]) and all(text[o:].startswith(t) for o, t in zip(lp["text_offset"][:-1], lp["tokens"][:-1])),
       "text_offset finds its tokens", lp)
    status, only = server.post(COMP, dict(base, prompt=g["ids"], echo=True, max_tokens=0))
    ok(status == 200 and first(only)["text"] == g["text"] and only["usage"]["completion_tokens"] == 0, "echo alone", only)
    chunks, finished = server.stream(COMP, dict(base, prompt=g["ids"], logprobs=1, echo=True))
    j = join_chunks(chunks)[0]
    equal((j["text"], j["token_ids"]), (text, g["greedy_ids"]), "streamed completion with echo")
    equal(sum(len(c["choices"][0]["logprobs"]["tokens"]) for c in chunks if c["choices"]), n, "streamed logprobs are complete")


def logprobs():
    status, body = server.chat("What is the capital of Japan?", logprobs=True, top_logprobs=3)
    lp = first(body)["logprobs"]["content"]
    ok(len(lp) == 10 and all(len(t["top_logprobs"]) == 3 for t in lp), "one entry per token", lp[:2])
    ok(all(t["top_logprobs"][0]["token"] == t["token"] and t["logprob"] <= 0 for t in lp), "greedy takes the best", lp[:2])
    ok(all(bytes(t["bytes"]).decode() == t["token"] for t in lp), "bytes spell the token", lp[:2])


def sampling():
    a = [first(server.chat("Tell me a story about a fox.", temperature=1.0, seed=11, max_tokens=20)[1])["message"]["content"]
         for _ in range(2)]
    b = first(server.chat("Tell me a story about a fox.", temperature=1.0, seed=12, max_tokens=20)[1])["message"]["content"]
    equal(a[0], a[1], "a seed repeats")
    ok(a[0] != b, "another seed differs", b)
    forced = first(server.chat("What is the capital of Japan?", logit_bias={"695": 100}, max_tokens=3, temperature=0)[1])
    equal(forced["message"]["content"], " capital" * 3, "logit_bias forces a token")
    status, body = server.chat("hi", temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.5,
                               repetition_penalty=1.1, user="u", max_completion_tokens=5, priority=1, cache_salt="s")
    equal(status, 200, "all sampling fields together")


def tokens():
    status, body = server.post("/tokenize", {"model": "tiny", "prompt": GOLDEN["chat_capital"]["text"]})
    ok(status == 200 and body["tokens"] == GOLDEN["chat_capital"]["ids"] and body["count"] == 19, "tokenize", body)
    status, body = server.post("/detokenize", {"model": "tiny", "tokens": GOLDEN["chat_capital"]["ids"]})
    equal(body, {"prompt": GOLDEN["chat_capital"]["text"], "text": GOLDEN["chat_capital"]["text"]}, "detokenize")
    status, body = server.post("/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of Japan?"}]})
    equal(body["tokens"], GOLDEN["chat_capital"]["ids"], "tokenize messages")
    status, body = server.post("/v1/render", {"model": "tiny", "messages": [
        {"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What sound does a cow make?"}]})
    equal((body["prompt"], body["token_ids"]), (GOLDEN["system"]["text"], GOLDEN["system"]["ids"]), "render")
    ok(body["marks"] and all(0 < m <= len(body["token_ids"]) for m in body["marks"]), "render tells the snapshot places", body["marks"])


def metrics():
    status, text = server.get("/metrics")
    names = [l.split(" ")[2] for l in text.split("\n") if l.startswith("# TYPE")]
    ok(status == 200 and len(names) == len(set(names)) and len(names) > 30, "metrics", names)
    ok(all(re.match(r'^(#.*|[a-z_]+(\{[^}]*\})? [-0-9.e+naif]+)?$', l) for l in text.split("\n")), "in Prometheus' format")
    ok(server.metric("arle_completion_tokens_total") > 100, "tokens are counted")
    equal(server.metric("arle_engine_errors_total"), 0, "no errors")


def concurrent_mix():
    """Answers do not mix: each of many at once equals the one alone."""
    import concurrent.futures as f
    cases = [n for n in GOLDEN if n not in ("long_needle", "tool_shell", "tool_python")] * 3
    body = lambda n: {"model": "tiny", "prompt": GOLDEN[n]["ids"], "temperature": 0, "max_tokens": 10, "return_token_ids": True}
    with f.ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda n: first(server.post(COMP, body(n))[1])["token_ids"], cases))
    ok(all(g == GOLDEN[n]["greedy_ids"][:10] for g, n in zip(got, cases)), "%d answers at once, each its own" % len(cases),
       [(n, g) for g, n in zip(got, cases) if g != GOLDEN[n]["greedy_ids"][:10]])


def cached_prefix():
    g = GOLDEN["long_needle"]
    ask = lambda: server.post(COMP, {"model": "tiny", "prompt": g["ids"], "temperature": 0, "max_tokens": 20, "return_token_ids": True})[1]
    one, two = ask(), ask()
    cached = two["usage"]["prompt_tokens_details"]["cached_tokens"]
    ok(0 < cached < len(g["ids"]), "the second time, %d of %d prompt tokens are cached" % (cached, len(g["ids"])), two["usage"])
    equal((first(one)["token_ids"], first(two)["token_ids"]), (g["greedy_ids"],) * 2, "cold equals warm")
    salted = server.post(COMP, {"model": "tiny", "prompt": g["ids"], "max_tokens": 1, "cache_salt": "other"})[1]
    equal(salted["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "another cache_salt shares nothing")


def special_literals():
    """Literals of special tokens in a client's text: tokens as in the reference, or ordinary text where the model's key says so."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a<|im_end|>b"}]}
    end = GOLDEN["chat_capital"]["greedy_ids"][-1]
    with Arled(settings={"model tiny.special_in_content": "no"}) as s:
        strict, loose = s.post("/v1/render", body)[1], server.post("/v1/render", body)[1]
        equal((strict["token_ids"].count(end), loose["token_ids"].count(end)), (1, 2), "special_in_content")
        equal(strict["prompt"], loose["prompt"], "the text is the same")
        equal(s.post("/detokenize", {"tokens": strict["token_ids"]})[1]["text"], strict["prompt"], "and survives the way back")


def keys():
    with Arled(settings={"auth.keys": "alice:secret-1 plain-2", "server.cors": "https://app.example"}) as s:
        equal(s.raw("GET", "/health")[0], 200, "health needs no key")
        for path in ("/v1/models", "/metrics", "/nowhere"):
            equal(s.raw("GET", path)[0], 401, "%s needs a key" % path)
        status, headers, data = s.raw("POST", CHAT, user("hi"), headers={"Authorization": "Bearer wrong"})
        ok(status == 401 and json.loads(data)["error"]["code"] == "invalid_api_key", "a wrong key", data)
        equal(s.raw("POST", CHAT, user("hi", max_tokens=2), headers={"Authorization": "Bearer secret-1"})[0], 200, "Bearer")
        equal(s.raw("POST", CHAT, user("hi", max_tokens=2), headers={"x-api-key": "plain-2"})[0], 200, "x-api-key")
        equal(s.raw("POST", CHAT, user("hi"), headers={"x-api-key": "alice:secret-1"})[0], 401, "the tenant is no part of the key")
        equal(s.raw("POST", CHAT, user("hi"), headers={"x-api-key": ""})[0], 401, "an empty key")
        h = s.raw("GET", "/health", headers={"Origin": "https://app.example"})[1]
        equal(h.get("access-control-allow-origin"), "https://app.example", "a listed origin")
        h = s.raw("GET", "/health", headers={"Origin": "https://evil.example"})[1]
        ok("access-control-allow-origin" not in h, "another origin gets nothing", h)
        equal(s.raw("OPTIONS", CHAT, headers={"Origin": "https://app.example"})[0], 204, "preflight")
    h = server.raw("GET", "/health", headers={"Origin": "https://app.example"})[1]
    ok("access-control-allow-origin" not in h, "CORS is closed by default", h)
    r = subprocess.run([program("arled"), "--config", server.ini, "--set", "server.listen=0.0.0.0:0", "--set", "server.control="],
                       capture_output=True, text=True, timeout=60)
    ok(r.returncode == 1 and "no API key" in r.stderr, "beyond loopback without a key is refused", r)


def openai_package():
    try:
        import openai
    except ImportError:
        skip("OpenAI's package", "it is not installed")
        return
    c = openai.OpenAI(base_url="http://%s:%d/v1" % (server.host, server.port), api_key="none")
    r = c.chat.completions.create(model="tiny", temperature=0, messages=[{"role": "user", "content": "What is the capital of Japan?"}])
    equal(r.choices[0].message.content, "The capital of Japan is Tokyo.", "openai: chat")
    text = "".join(p.choices[0].delta.content or "" for p in c.chat.completions.create(model="tiny", temperature=0, stream=True,
                   messages=[{"role": "user", "content": "What is the capital of Japan?"}]) if p.choices)
    equal(text, "The capital of Japan is Tokyo.", "openai: streamed chat")
    r = c.chat.completions.create(model="tiny", temperature=0, tools=SHELL, messages=[{"role": "user", "content": "How many files are in /tmp?"}])
    equal(r.choices[0].message.tool_calls[0].function.name, "shell", "openai: tool call")
    r = c.completions.create(model="tiny", prompt=GOLDEN["chat_capital"]["ids"], temperature=0, max_tokens=3, logprobs=2)
    ok(len(r.choices[0].logprobs.tokens) == 3, "openai: completion", r)
    ok([m.id for m in c.models.list()] == ["tiny"], "openai: models")
    try:
        c.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
        ok(False, "openai: unknown model raises")
    except openai.NotFoundError as e:
        equal((e.code, e.param), ("model_not_found", "model"), "openai: unknown model raises")
    try:
        c.chat.completions.create(model="tiny", temperature=9, messages=[{"role": "user", "content": "x"}])
        ok(False, "openai: bad range raises")
    except openai.BadRequestError as e:
        equal(e.param, "temperature", "openai: bad range raises")


for fn in (models_and_health, plain_answer, streaming_equals_whole, tools, histories, histories_of_tenants, reasoning,
           stop_strings, streams_of_many, hang_ups, completions, logprobs, sampling,
           tokens, metrics, concurrent_mix, cached_prefix,
           special_literals, keys, openai_package):
    case(fn)
equal(server.stop(), 0, "ends cleanly")
done()
