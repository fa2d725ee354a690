#!/usr/bin/env python3
"""Oversubscription, and tiers that fail: a cluster server that is killed, stopped, full or lies; kill -9 of arled while it writes its
disk tier; flipped bytes in its files. Every request must succeed with the answer it has alone.
ARLE_KV_KILLS sets how often arled is killed (default 4)."""
import os, random, sys, threading
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *
import glob, shutil

need_model()
CHAT = "/v1/chat/completions"
RULES = "".join("Rule %d: the %s of house %d is %s. " % (i, ["colour", "door", "garden", "roof"][i % 4], i * 7 % 31,
                                                       ["red", "blue", "green", "old"][i * 3 % 4]) for i in range(40))
QUESTIONS = ["What is the capital of Japan?", "What is 3 + 4?", "What sound does a cow make?"]
TALKERS = 4
truth = {}


def body_of(messages, **kw):
    return dict({"model": "tiny", "temperature": 0, "max_tokens": 24, "messages": messages, "logprobs": True, "top_logprobs": 2,
                 "include_cache_detail": True}, **kw)


def talk(server, name, timeout=120):
    """Three turns behind a long system prompt. Returns (choices, cached tokens by tier, slowest request in seconds)."""
    messages, choices, tiers, slowest = [{"role": "system", "content": name + RULES}], [], {}, 0
    for q in QUESTIONS:
        messages.append({"role": "user", "content": q})
        start = time.monotonic()
        status, reply = server.post(CHAT, body_of(messages), timeout=timeout)
        slowest = max(slowest, time.monotonic() - start)
        if status != 200:
            raise RuntimeError(reply)
        choices.append(reply["choices"][0])
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        for key, n in reply["usage"]["prompt_tokens_details"].items():
            if key.endswith("_tokens"):
                tiers[key] = tiers.get(key, 0) + n
    return choices, tiers, slowest


def everybody(server):
    """All talkers once. Returns (names with a wrong answer, tiers, slowest)."""
    wrong, sums, slowest = [], {}, 0
    for name in truth:
        choices, tiers, s = talk(server, name)
        slowest = max(slowest, s)
        if choices != truth[name]:
            wrong.append((name, [c["message"]["content"] for c in choices]))
        for k, n in tiers.items():
            sums[k] = sums.get(k, 0) + n
    return wrong, sums, slowest


def alone():
    with Arled(settings={"kv.prefix_cache": "no"}) as s:
        for i in range(TALKERS):
            truth["%c" % (65 + i)] = talk(s, "%c" % (65 + i))[0]
    ok(len(truth) == TALKERS, "answers without any cache")


def secret():
    f = tempfile.NamedTemporaryFile()
    f.write(bytes(range(32)))
    f.flush()
    os.chmod(f.name, 0o600)
    return f


# ---- more sequences than pages

def oversubscription():
    """200 requests at once where the pages hold about 40 of them. One arithmetic on every machine: pages of f32 hold half as much."""
    sets = ["backend-cpu.compute=bf16"]
    n, prompts = 200, ["%s %d" % (q, i) for i in range(50) for q in ("Tell me a story about a fox.", "Count from", "My name is Rosa", "Say")]
    make = lambda text: {"model": "tiny", "temperature": 0, "max_tokens": 100, "ignore_eos": True, "return_token_ids": True,
                         "logprobs": True, "messages": [{"role": "user", "content": text}]}
    want = {}
    with Arled(sets=sets, settings={"kv.prefix_cache": "no", "scheduler.max_queue": "512"}) as s:
        for p in prompts[:n]:       # each alone
            status, reply = s.post(CHAT, make(p))
            want[p] = reply["choices"][0]
        tokens = reply["usage"]["total_tokens"]
    for tier, settings in (("no host tier", {}), ("host tier", {"kv.host_bytes": "512MiB"})):
        with Arled(sets=sets,
                   settings=dict({"scheduler.max_queue": "512", "scheduler.max_seqs": "200", "kv.device_bytes": OVER_BYTES,
                                  "kv.snapshot_bytes": "8MiB", "server.max_connections": "512"}, **settings)) as s:
            pages = s.metric("arle_kv_pages")
            holds = pages * 16 / (tokens + 15)
            ok(30 <= holds <= 50, "%s: the pages hold %.0f of %d sequences" % (tier, holds, n), pages)
            wrong, lock, start = [], threading.Lock(), time.monotonic()

            def one(p):
                try:
                    status, reply = s.post(CHAT, make(p), timeout=300)
                    if status != 200 or reply["choices"][0] != want[p]:
                        with lock:
                            wrong.append((p, reply if status != 200 else reply["choices"][0]["message"]))
                except Exception as e:
                    with lock:
                        wrong.append((p, repr(e)))

            threads = [threading.Thread(target=one, args=(p,)) for p in prompts[:n]]
            for t in threads:
                t.start()
            most = 0
            while any(t.is_alive() for t in threads):
                most = max(most, s.metric("arle_engine_running"))
                time.sleep(0.1)
            took = time.monotonic() - start
            ok(not wrong, "%s: all %d answers are those that each gets alone" % (tier, n), wrong[:3])
            preempted, parked = s.metric("arle_engine_preempted_total"), s.metric("arle_kv_parked_total")
            ok(preempted > 0, "%s: somebody had to make room" % tier, preempted)
            if settings:
                ok(parked > 0, "%s: sequences were moved away whole" % tier, parked)
            gap = s.metric("arle_engine_longest_gap_seconds")
            note("%s: %.1f s for all, at most %d running, %d preempted, %d parked, longest stall %.2f s" % (tier, took, most, preempted, parked, gap))
            ok(gap < took, "%s: no stall as long as the run" % tier, (gap, took))
            s.wait_idle()
            end = time.monotonic() + 20         # moves that are under way hold pages
            while s.metric("arle_kv_pages_free") + s.metric("arle_kv_pages_cached") != pages and time.monotonic() < end:
                time.sleep(0.1)
            equal(s.metric("arle_kv_pages_free") + s.metric("arle_kv_pages_cached"), pages, "%s: all pages returned" % tier)


OVER_BYTES = os.environ.get("ARLE_KV_OVER_BYTES", "324MiB")


# ---- the cluster server fails

def cluster(name, fault, errors=True, options=(), repair=None):
    """fault(redis) happens when half of the talkers have been served; two servers, so that there is something to read."""
    with secret() as key, Redis(*options) as r:
        settings = {"kv.store": "kv-redis", "plugin kv-redis.address": r.address, "kv.secret_file": key.name, "kv.host_bytes": "64MiB"}
        with Arled(settings=settings) as s:
            wrong, _, _ = everybody(s)
            ok(not wrong, "cluster %s: right before it" % name, wrong)
            end, last = time.monotonic() + 20, -1
            while s.metric("arle_kv_store_puts_total") != last and time.monotonic() < end:
                last = s.metric("arle_kv_store_puts_total")
                time.sleep(0.5)
        with Arled(settings=settings) as s:
            names = list(truth)
            choices, tiers, _ = talk(s, names[0])
            ok(choices == truth[names[0]], "cluster %s: the first one is right" % name)
            ok(name == "full" or tiers["store_tokens"] > 0, "cluster %s: and came from the cluster" % name, tiers)
            fault(r)
            wrong, tiers, slowest = everybody(s)
            ok(not wrong, "cluster %s: all requests succeed with the right bytes" % name, wrong)
            wrong, _, slowest2 = everybody(s)
            ok(not wrong, "cluster %s: and again" % name, wrong)
            end = time.monotonic() + 10
            while errors and s.metric("arle_kv_store_errors_total") == 0 and time.monotonic() < end:
                time.sleep(0.1)
            counted = s.metric("arle_kv_store_errors_total")
            ok(counted > 0 or not errors, "cluster %s: errors are counted" % name, counted)
            note("cluster %s: %d errors, %d tokens from it afterwards, slowest request %.2f s" % (name, counted, tiers["store_tokens"],
                                                                                         max(slowest, slowest2)))
            equal(s.metric("arle_engine_errors_total"), 0, "cluster %s: no request failed" % name)
            if repair:
                repair(r)
            equal(s.stop(), 0, "cluster %s: arled ends cleanly" % name)


def killed_server():
    cluster("killed", lambda r: r.stop())


def stopped_server():
    cluster("stopped", lambda r: r.process.send_signal(signal.SIGSTOP), repair=lambda r: r.process.send_signal(signal.SIGCONT))


def full_server():
    cluster("full", lambda r: None, options=("--maxmemory", "2mb", "--maxmemory-policy", "noeviction"))


def lying_server():
    def corrupt(r):
        rnd, n = random.Random(1), 0
        for k in r.ask("KEYS", "*"):
            v = bytearray(r.ask("GET", k))
            v[rnd.randrange(len(v))] ^= 1 << rnd.randrange(8)
            r.ask("SET", k, bytes(v))
            n += 1
        ok(n > 50, "cluster corrupted: a bit of each of %d values" % n)

    cluster("corrupted", corrupt)


def mixed_up_server():
    def swap(r):
        keys = sorted(r.ask("KEYS", "*"))
        values = [r.ask("GET", k) for k in keys]
        for k, v in zip(keys, values[1:] + values[:1]):
            r.ask("SET", k, v)
        ok(len(keys) > 50, "cluster mixed up: %d values under each other's keys" % len(keys))

    cluster("mixed up", swap)


# ---- the disk tier

def disk_settings(folder, key):
    return {"kv.disk_dir": folder, "kv.secret_file": key.name, "kv.host_bytes": "32MiB"}


def killed_while_writing():
    rnd, kills = random.Random(7), int(os.environ.get("ARLE_KV_KILLS", "4"))
    with secret() as key, tempfile.TemporaryDirectory() as folder:
        from_disk = 0
        for k in range(kills):
            s = Arled(settings=disk_settings(folder, key))
            failed = []

            def client(name):
                try:
                    while True:
                        if talk(s, name)[0] != truth[name]:
                            failed.append(name)
                except (OSError, http.client.HTTPException, ValueError):
                    pass            # killed in the middle of an answer

            threads = [threading.Thread(target=client, args=(n,)) for n in truth]
            for t in threads:
                t.start()
            time.sleep(rnd.uniform(0.02, 0.8))
            s.process.kill()
            s.process.wait()
            for t in threads:
                t.join()
            ok(not failed, "kill %d: no wrong answer until then" % (k + 1), failed)
            with Arled(settings=disk_settings(folder, key)) as s:
                wrong, tiers, _ = everybody(s)
                ok(not wrong, "kill %d: right answers after the restart" % (k + 1), wrong)
                from_disk += tiers["disk_tokens"]
                equal(s.metric("arle_engine_errors_total"), 0, "kill %d: no request failed" % (k + 1))
        ok(from_disk > 0, "what was committed before a kill was used after it: %d tokens" % from_disk)


def flipped_bytes():
    rnd = random.Random(3)
    with secret() as key, tempfile.TemporaryDirectory() as folder:
        with Arled(settings=disk_settings(folder, key)) as s:
            everybody(s)
            equal(s.stop(), 0, "the disk tier is written")
        files = [f for f in glob.glob(folder + "/**", recursive=True) if os.path.isfile(f) and os.path.getsize(f) > 0]
        kept = tempfile.mkdtemp(dir=os.path.dirname(folder))
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        before = None
        for what, chosen, flips in (("no", [], 0), ("segments", [f for f in files if os.path.getsize(f) > 1 << 16], 200),
                                    ("every file", files, 40), ("torn", files, -1)):
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            for f in chosen:
                size = os.path.getsize(f)
                with open(f, "r+b") as h:
                    for _ in range(max(flips, 0)):
                        at = rnd.randrange(size)
                        h.seek(at)
                        b = h.read(1)[0] ^ (1 << rnd.randrange(8))
                        h.seek(at)
                        h.write(bytes([b]))
                    if flips < 0:
                        h.truncate(rnd.randrange(size))
            with Arled(settings=disk_settings(folder, key)) as s:
                wrong, tiers, _ = everybody(s)
                ok(not wrong, "disk, %s flipped: right answers" % what, wrong)
                note("disk, %s flipped: %d tokens from it" % (what, tiers["disk_tokens"]))
                if before is None:
                    before = tiers["disk_tokens"]
                    ok(before > 600 * TALKERS, "undamaged files are used for every talker", before)
                elif what == "segments":
                    ok(tiers["disk_tokens"] < before, "damaged data are a miss", (tiers["disk_tokens"], before))
                equal(s.stop(), 0, "disk, %s flipped: ends cleanly" % what)
        shutil.rmtree(kept)


case(oversubscription)
case(alone)
if shutil.which("redis-server") is not None and os.path.exists(os.path.join(PLUGINS, "kv-redis.so")):
    for fn in (killed_server, stopped_server, full_server, lying_server, mixed_up_server):
        case(fn)
else:
    skip("a cluster server that fails", "no redis-server, or built without kv-redis")
for fn in (killed_while_writing, flipped_bytes):
    case(fn)
done()
