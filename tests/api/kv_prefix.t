#!/usr/bin/env python3
"""Prefix cache as a client sees it: what each turn of a chat computes, the same bits from every tier, tenants and salts."""
import os, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *
import shutil

need_model()
CHAT = "/v1/chat/completions"
CHUNK = 64
SYSTEM = "You are a careful assistant who answers in short and plain sentences. " * 8
RULES = "".join("Rule %d: the %s of house %d is %s. " % (i, ["colour", "door", "garden", "roof"][i % 4], i * 7 % 31,
                                                       ["red", "blue", "green", "old"][i * 3 % 4]) for i in range(60))
QUESTIONS = ["What is the capital of Japan?", "And what is the capital of France? Say it in one short sentence.", "What is 3 + 4?",
             "My name is Rosa. What is my name?", "What sound does a cow make?", "Tell me a story about a fox.",
             "What is the capital of Italy?", "Thank you. Say goodbye."]
SHELL = [{"type": "function", "function": {"name": "shell", "description": "Run a command",
          "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}}]


def ask(server, messages, headers=None, **kw):
    """(choice without random ids, prompt ids, details of the cached tokens)"""
    body = dict({"model": "tiny", "temperature": 0, "max_tokens": 48, "messages": messages, "return_token_ids": True, "logprobs": True,
                 "top_logprobs": 3, "include_cache_detail": True}, **kw)
    status, reply = server.post(CHAT, body, headers=headers)
    if status != 200:
        raise RuntimeError(reply)
    choice = reply["choices"][0]
    prompt = choice.pop("prompt_token_ids", None) or reply["prompt_token_ids"]
    for call in choice["message"].get("tool_calls") or []:
        call["id"] = ""
    detail = reply["usage"]["prompt_tokens_details"]
    tiers = [detail[t + "_tokens"] for t in ("device", "host", "disk", "store")]
    if sum(tiers) != detail["cached_tokens"] or not detail["miss"]:
        raise RuntimeError("tiers do not add up: %r" % detail)
    return choice, prompt, detail


def talk(server, system=SYSTEM, questions=QUESTIONS, tools=False, headers=None, **kw):
    """A conversation whose client re-sends content and tool calls, never the reasoning. Returns what ask() returned, per turn."""
    messages, turns = [{"role": "system", "content": system}], []
    if tools:
        kw["tools"] = SHELL
    for q in questions:
        messages.append({"role": "user", "content": q})
        turns.append(ask(server, messages, headers=headers, **kw))
        said = turns[-1][0]["message"]
        messages.append({k: said[k] for k in ("role", "content", "tool_calls") if k in said})
        if said.get("tool_calls"):
            messages.append({"role": "tool", "tool_call_id": "", "content": "total 3\nREADME main.c notes.txt"})
            turns.append(ask(server, messages, headers=headers, **kw))
            said = turns[-1][0]["message"]
            messages.append({k: said[k] for k in ("role", "content", "tool_calls") if k in said})
    return turns


def answers(turns):
    return [t[0] for t in turns]


def tier(turns, name):
    return sum(t[2][name + "_tokens"] for t in turns)


def common(a, b):
    n = 0
    while n < len(a) and n < len(b) and a[n] == b[n]:
        n += 1
    return n


MODES = (("plain", {"chat_template_kwargs": {"enable_thinking": False}}), ("thinking", {"chat_template_kwargs": {"enable_thinking": True}}),
         ("tools", {"tools": True}), ("tools and thinking", {"tools": True, "chat_template_kwargs": {"enable_thinking": True}}))
TOOL_QUESTIONS = ["How many files are in /tmp?", "What is 3 + 4?", "How many files are in /var?", "Hello"]
solo = {}


def questions_of(mode):
    return TOOL_QUESTIONS if "tools" in mode else QUESTIONS


def without_cache():
    with Arled(settings={"kv.prefix_cache": "no"}) as s:
        for mode, kw in MODES:
            solo[mode] = talk(s, SYSTEM + mode, questions_of(mode), **kw)
            ok(all(t[2]["cached_tokens"] == 0 and t[2]["miss"] == "prefix cache is off" for t in solo[mode]),
               "%s: nothing cached with the cache off" % mode, [t[2] for t in solo[mode]])
        solo["rules"] = talk(s, "A" + RULES, QUESTIONS[:3])
        equal(s.metric("arle_kv_hits_total"), 0, "no hits with the cache off")
    ok(any(t[0]["message"].get("reasoning_content") for t in solo["thinking"]), "the model thinks when asked to")
    ok(any(t[0]["message"].get("tool_calls") for t in solo["tools"]), "the model calls a tool")


def turns():
    """What a turn shares with the one before, counted in tokens, is computed again only up to one chunk."""
    with Arled() as s:
        for mode, kw in MODES:
            for again in ("cold", "warm"):
                seen, worst, got, bad = [], 0, talk(s, SYSTEM + mode, questions_of(mode), **kw), []
                for k, (choice, prompt, detail) in enumerate(got):
                    shared = max([common(prompt, p) for p in seen] or [0])
                    # Behind the last token there must be something to compute: a prompt seen whole counts without its last token.
                    over = min(shared, len(prompt) - 1) - detail["cached_tokens"]
                    worst = max(worst, over)
                    if over > CHUNK:
                        bad.append((k + 1, shared, detail))
                    seen.append(prompt + choice["token_ids"])
                ok(not bad, "%s, %s: each of %d turns recomputes at most one chunk of what it shares" % (mode, again, len(got)), bad)
                note("%s, %s: at most %d shared tokens computed again; cached %s of %s" % (
                    mode, again, worst, [t[2]["cached_tokens"] for t in got], [len(t[1]) for t in got]))
                ok(answers(got) == answers(solo[mode]), "%s, %s: text and log-probabilities as without the cache" % (mode, again),
                   [(g["message"], w["message"]) for g, w in zip(answers(got), answers(solo[mode])) if g != w][:1])
        ok(s.metric("arle_kv_snapshots_restored_total") > 20, "state snapshots were restored")
        ok(s.metric("arle_kv_snapshots_inside_total") > 3, "states were kept from the midst of steps")


def system_prompt():
    """A 100-token system prompt hits for a first message of a new conversation."""
    with Arled() as s:
        text = "You are a careful assistant who answers in short and plain sentences. " * 5
        _, one, first = ask(s, [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}])
        _, two, second = ask(s, [{"role": "system", "content": text}, {"role": "user", "content": "What is the capital of Japan?"}])
        shared = common(one, two)
        ok(90 <= shared <= 130, "the prompts share about 100 tokens", shared)
        ok(first["cached_tokens"] == 0 and second["cached_tokens"] >= shared - CHUNK and second["cached_tokens"] > 0,
           "a %d-token system prompt hits: %d tokens" % (shared, second["cached_tokens"]), (first, second))


def secret():
    f = tempfile.NamedTemporaryFile()
    f.write(bytes(range(32)))
    f.flush()
    os.chmod(f.name, 0o600)
    return f


def from_device():
    with Arled() as s:
        for name in ("cold", "warm"):
            got = talk(s, "A" + RULES, QUESTIONS[:3])
            ok(answers(got) == answers(solo["rules"]), "device, %s: the same bits" % name)
        ok(tier(got, "device") > 2500, "and they came from the device", [t[2] for t in got])


def from_host():
    with Arled(settings={"scheduler.max_seqs": "2", "kv.device_bytes": "23700KiB", "kv.snapshot_bytes": "8MiB", "kv.host_bytes": "256MiB"}) as s:
        talk(s, "A" + RULES, QUESTIONS[:3])
        for other in "BCDEFG":
            talk(s, other + RULES, QUESTIONS[:3])
        ok(s.metric("arle_kv_demoted_bytes_total") > 0, "pages went to the host tier")
        got = talk(s, "A" + RULES, QUESTIONS[:3])
        ok(answers(got) == answers(solo["rules"]), "host: the same bits")
        ok(tier(got, "host") > 0, "and they came from the host", [t[2] for t in got])


def from_disk():
    with secret() as key, tempfile.TemporaryDirectory() as folder:
        settings = {"kv.disk_dir": folder, "kv.secret_file": key.name, "kv.host_bytes": "64MiB"}
        with Arled(settings=settings) as s:
            got = talk(s, "A" + RULES, QUESTIONS[:3])
            ok(answers(got) == answers(solo["rules"]), "disk, written: the same bits")
            equal(s.stop(), 0, "ends cleanly")
        with Arled(settings=settings) as s:
            got = talk(s, "A" + RULES, QUESTIONS[:3])
            ok(answers(got) == answers(solo["rules"]), "disk, after a restart: the same bits")
            ok(tier(got, "disk") >= 1024 - CHUNK, "and they came from the disk", [t[2] for t in got])


def from_store():
    if shutil.which("redis-server") is None or not os.path.exists(os.path.join(PLUGINS, "kv-redis.so")):
        skip("cluster: the same bits", "no redis-server, or built without kv-redis")
        return
    with secret() as key, Redis() as r:
        settings = {"kv.store": "kv-redis", "plugin kv-redis.address": r.address, "kv.secret_file": key.name, "kv.host_bytes": "64MiB"}
        for name in ("written", "read by another server"):
            with Arled(settings=settings) as s:
                got = talk(s, "A" + RULES, QUESTIONS[:3])
                ok(answers(got) == answers(solo["rules"]), "cluster, %s: the same bits" % name)
                end = time.monotonic() + 20         # what is on its way to the server when arled ends does not get there
                while s.metric("arle_kv_store_puts_total") < 60 and name == "written" and time.monotonic() < end:
                    time.sleep(0.05)
                equal(s.metric("arle_kv_store_errors_total"), 0, "no errors")
                equal(s.stop(), 0, "ends cleanly")
        ok(tier(got, "store") >= 1024 - CHUNK, "and they came from the cluster", [t[2] for t in got])


def tenants():
    """Nothing is shared between tenants; the keys of one tenant share; a salt narrows within it."""
    with Arled(settings={"auth.keys": "red:r1 red:r2 blue:b1"}) as s:
        says = lambda key, **kw: ask(s, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello"}],
                                     headers={"Authorization": "Bearer " + key}, **kw)
        first, prompt, detail = says("r1")
        equal(detail["cached_tokens"], 0, "the first one is cold")
        equal(detail["miss"], "prompt not seen before", "and says so")
        choice, _, detail = says("r2")
        ok(detail["cached_tokens"] >= len(prompt) - 1 - CHUNK and choice == first, "another key of the tenant shares", detail)
        choice, _, detail = says("b1")
        equal((detail["cached_tokens"], detail["miss"]), (0, "prompt not seen before"), "another tenant does not")
        ok(choice == first, "and gets the same answer")
        equal(says("b1")[2]["cached_tokens"] > 0, True, "it has its own")
        equal(says("r1", cache_salt="x")[2]["cached_tokens"], 0, "a salt narrows")
        ok(says("r2", cache_salt="x")[2]["cached_tokens"] > 0, "the same salt in the same tenant shares")
        equal(says("b1", cache_salt="x")[2]["cached_tokens"], 0, "the same salt in another tenant does not")
        equal(says("r1", cache_salt="y")[2]["cached_tokens"], 0, "another salt does not")
        ok(says("r1")[2]["cached_tokens"] > 0, "without a salt it is as before")
        # What one tenant computes can only be told apart by its own use of it.
        status, body = s.post(CHAT, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
                              headers={"Authorization": "Bearer r1"})
        ok(status == 200 and set(body["usage"]["prompt_tokens_details"]) == {"cached_tokens"}, "detail only on request", body["usage"])


def pinned():
    """A pinned prompt outlives a flood that takes everything else; once unpinned it goes too; a pin too large is refused."""
    settings = {"scheduler.max_seqs": "2", "kv.device_bytes": "23700KiB", "kv.snapshot_bytes": "32MiB"}
    with Arled(settings=settings) as s:
        ctl = lambda *a: subprocess.run([program("arlectl"), "--socket", s.control, "--json"] + list(a), capture_output=True, text=True)
        prompt = lambda start: [{"role": "system", "content": start + SYSTEM}, {"role": "user", "content": QUESTIONS[0]}]
        cached = lambda start: ask(s, prompt(start), max_tokens=2)[2]["cached_tokens"]
        path = os.path.join(s.dir.name, "body.json")

        def write(messages):
            with open(path, "w") as f:
                json.dump({"messages": messages}, f)

        def flood():
            for other in range(30):
                ask(s, [{"role": "system", "content": chr(65 + other) + RULES}, {"role": "user", "content": "Hello"}], max_tokens=2)

        write(prompt("kept "))
        said = ctl("kv", "pin", path)
        equal(said.returncode, 0, "pinned")
        full = json.loads(said.stdout)["pinned_tokens"]
        ok(full >= 128, "its whole prefix", said)
        cached("control ")
        equal((cached("kept "), cached("control ") > 0), (full, True), "both hit")
        evicted = s.metric("arle_kv_pages_evicted_total")
        flood()
        ok(s.metric("arle_kv_pages_evicted_total") - evicted > s.metric("arle_kv_pages"), "the flood was larger than the pool")
        equal(cached("control "), 0, "after the flood the other prompt is gone")
        equal(cached("kept "), full, "and the pinned one hits in full")
        other = ask(s, [{"role": "system", "content": "kept " + SYSTEM}, {"role": "user", "content": "Say goodbye."}], max_tokens=2)[2]
        ok(other["cached_tokens"] > 0, "another question behind the pinned system prompt starts there", other)
        equal(s.metric("arle_kv_pins_yielded_total"), 0, "without giving way")
        equal(ctl("kv", "unpin", path).returncode, 0, "unpinned")
        flood()
        equal(cached("kept "), 0, "then it goes like the others")

        write([{"role": "system", "content": RULES * 2}, {"role": "user", "content": "Hello"}])
        said = ctl("kv", "pin", path)
        ok(said.returncode == 1 and "kv.pin_pct" in said.stderr, "a pin beyond kv.pin_pct is refused and names the key", said)
        equal(s.metric("arle_kv_pins"), 0, "and nothing is pinned")


def quotas():
    """A tenant with a quota pushes out its own entries; without one it pushes out everybody's."""
    for pct, kept in (("100", False), ("40", True)):
        settings = {"scheduler.max_seqs": "2", "kv.device_bytes": "23700KiB", "kv.snapshot_bytes": "8MiB", "kv.tenant_quota_pct": pct,
                    "auth.keys": "red:r blue:b"}
        with Arled(settings=settings) as s:
            says = lambda key, text: ask(s, [{"role": "system", "content": text}, {"role": "user", "content": QUESTIONS[0]}],
                                         headers={"Authorization": "Bearer " + key}, max_tokens=2)[2]["cached_tokens"]
            says("r", SYSTEM)
            full = says("r", SYSTEM)
            for other in range(12):
                says("b", chr(65 + other) + RULES)
            ok(full > 0, "%s %%: its prompt hits" % pct, full)
            equal(says("r", SYSTEM), full if kept else 0, "%s %%: after the other tenant's flood it %s" % (pct, "still does" if kept else "is gone"))


def strict():
    """Prompts alone are remembered: who continues an answer computes it again, and gets the same."""
    got = {}
    for word in ("no", "yes"):
        with Arled(settings={"kv.strict": word}) as s:
            def complete(ids):
                status, reply = s.post("/v1/completions", {"model": "tiny", "prompt": ids, "max_tokens": 40, "temperature": 0, "ignore_eos": True,
                                                           "return_token_ids": True})
                equal(status, 200, "strict = %s: completed" % word)
                return reply["choices"][0]["token_ids"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]

            prompt = s.post("/tokenize", {"model": "tiny", "prompt": SYSTEM})[1]["tokens"]
            answer, _ = complete(prompt)
            got[word], cached = complete(prompt + answer + prompt[:5])
            inside = cached <= len(prompt)
            ok(cached > 0 and inside == (word == "yes"), "strict = %s: %d of %d + %d cached" % (word, cached, len(prompt), len(answer)))
    equal(got["yes"], got["no"], "and the answers are the same")


for fn in (without_cache, turns, system_prompt, from_device, from_host, from_disk, from_store, tenants, quotas, strict, pinned):
    case(fn)
done()
