#!/usr/bin/env python3
"""The programs around the daemon: arlectl, reload, --check-config, arle serve, run, chat, tokenize."""
import os, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *

need_model()
CHAT = "/v1/chat/completions"
LONG = {"model": "tiny", "max_tokens": 4000, "ignore_eos": True, "messages": [{"role": "user", "content": "Tell me a story about a fox."}]}


def sh(*args, **kw):
    return subprocess.run([program(args[0])] + list(args[1:]), capture_output=True, text=True, timeout=120, **kw)


def arlectl():
    with Arled() as s:
        ctl = lambda *a: sh("arlectl", "--socket", s.control, *a)
        j = lambda *a: json.loads(ctl("--json", *a).stdout)
        ok(j("status")["pid"] == s.process.pid and j("status")["state"] == "running", "status", ctl("status"))
        ok(j("models")[0]["name"] == "tiny" and j("models")[0]["context"] == 8192, "models")
        ok(any(p["name"] == "backend-cpu" and p["state"] == "open" for p in j("plugins")), "plugins", ctl("plugins"))
        ok(j("kv")[0]["pages"] > 0, "kv")
        ok("[server]" in ctl("config").stdout, "config", ctl("config"))
        ok("uptime_s" in ctl("top", "-n", "1").stdout, "top")
        ok(ctl("nonsense").returncode == 2, "an unknown command is a usage error")
        ok(ctl("cancel", "nobody").returncode == 1, "cancel of an unknown id fails")
        ok(sh("arlectl", "--socket", s.dir.name + "/none").returncode == 1, "no daemon is a failure")
        equal(oct(os.stat(s.control).st_mode & 0o777), "0o600", "the socket is the user's own")

        sock = s.open_stream(CHAT, LONG)
        sock.recv(1000)
        gen = j("status")["generations"]
        ok(len(gen) == 1 and gen[0]["path"] == CHAT, "status lists the generation", gen)
        equal(ctl("cancel", gen[0]["id"]).returncode, 0, "cancel by id")
        data = b""
        while b"[DONE]" not in data:
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
        ok(b'"code":"cancelled"' in data, "the client is told", data[-300:])
        ok(s.wait_idle(), "and it has stopped")

        raw = socket.socket(socket.AF_UNIX)
        raw.connect(s.control)
        raw.sendall(b"2 status\n")
        ok(b"error" in raw.recv(200) and raw.sendall(b"1 status\n") is None and raw.recv(200).startswith(b"1 ok "),
           "another version is refused, and the connection goes on")
        raw.close()

        equal(ctl("drain").returncode, 0, "drain")
        equal(s.process.wait(30), 0, "ends the daemon")
        ok(not os.path.exists(s.control), "and removes its socket")


def reload():
    with Arled(settings={"server.max_body": "1MiB"}) as s:
        big = {"model": "tiny", "prompt": "x" * 300000}
        equal(s.post("/tokenize", big)[0], 200, "before the reload a large body is fine")
        s.write_ini({"server.max_body": "64KiB", "auth.keys": "k", "scheduler.max_seqs": "3"})
        r = json.loads(sh("arlectl", "--socket", s.control, "--json", "reload").stdout)
        ok("server.max_body" in r["applied"] and "scheduler.max_seqs" in r["needs_restart"], "reload says what it did", r)
        equal(s.raw("POST", "/tokenize", big, headers={"x-api-key": "k"})[0], 413, "and did it")
        equal(s.raw("GET", "/v1/models")[0], 401, "keys too")
        s.write_ini({"server.max_body": "much"})
        ok(sh("arlectl", "--socket", s.control, "reload").returncode == 1, "a broken file is refused")
        equal(s.raw("GET", "/v1/models", headers={"x-api-key": "k"})[0], 200, "and the old one stays in force")
        s.write_ini({"server.max_body": "1MiB"})
        s.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 10
        while s.raw("GET", "/v1/models")[0] != 200 and time.monotonic() < end:
            time.sleep(0.02)
        equal(s.raw("GET", "/v1/models")[0], 200, "SIGHUP reloads")


def check_config():
    with Arled() as s:
        r = sh("arled", "--config", s.ini, "--check-config")
        ok(r.returncode == 0 and "ok" in r.stdout, "--check-config", r)
        ok(sh("arled", "--config", s.ini, "--check-config", "--set", "server.lisen=x").returncode == 1, "unknown key")
        ok(sh("arled", "--config", s.dir.name + "/no.ini").returncode == 1, "no file")
        ok(sh("arled", "--nonsense").returncode == 2, "unknown option")
        r = sh("arled", "--config", s.ini, "--set", "server.control=", "--set", "server.listen=127.0.0.1:%d" % s.port)
        ok(r.returncode == 1 and "cannot listen" in r.stderr, "a port in use is a start failure", r)
        r = sh("arled", "--config", s.ini, "--set", "model.path=" + s.dir.name)
        ok(r.returncode == 1 and s.dir.name in r.stderr, "a folder without a model is a start failure", r)


def notify_socket():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        n = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        n.bind(d + "/notify")
        n.settimeout(60)
        with Arled(env={"NOTIFY_SOCKET": d + "/notify"}) as s:
            equal(n.recv(100), b"READY=1", "the service manager hears READY")
            s.stop()
            equal(n.recv(100), b"STOPPING=1", "and STOPPING")
        n.close()


def unix_listener():
    with Arled(wait=False, settings={"server.listen": "unix:/tmp/arle-test-%d.sock" % os.getpid()}) as s:
        path = "/tmp/arle-test-%d.sock" % os.getpid()
        end = time.monotonic() + 60
        while "daemon ready" not in s.log() and time.monotonic() < end:
            time.sleep(0.02)
        c = socket.socket(socket.AF_UNIX)
        c.connect(path)
        c.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        ok(c.recv(100).startswith(b"HTTP/1.0 200") or c.recv(100), "HTTP over a Unix socket")
        c.close()
        equal(s.stop(), 0, "ends cleanly")
        ok(not os.path.exists(path), "and removes its socket")


def serve():
    p = subprocess.Popen([program("arle"), "serve", "--model", TINY, "--backend", "cpu", "--listen", "127.0.0.1:0", "--plugin-dir",
                          PLUGINS, "--set", "server.control="], stderr=subprocess.PIPE, text=True)
    url = None
    for line in p.stderr:
        m = re.search(r"serving on http://([0-9.]+):(\d+)", line)
        if m:
            url = m
            break
    ok(url is not None, "arle serve says where")
    c = http.client.HTTPConnection(url.group(1), int(url.group(2)), timeout=60)
    c.request("POST", CHAT, json.dumps({"model": "qwen35-tiny", "temperature": 0,
                                        "messages": [{"role": "user", "content": "What is the capital of Japan?"}]}))
    ok("Tokyo" in c.getresponse().read().decode(), "and serves the folder's name")
    c.close()
    p.send_signal(signal.SIGINT)
    equal(p.wait(60), 0, "Ctrl-C ends it")
    p.stderr.close()


def run():
    base = ("arle", "run", "--model", TINY, "--plugin-dir", PLUGINS, "--temperature", "0")
    r = sh(*base, "--prompt", "What is the capital of Japan?")
    equal((r.returncode, r.stdout, r.stderr), (0, "The capital of Japan is Tokyo.\n", ""), "arle run")
    r = sh(*base, "--json", "--set", "backend-cpu.compute=f32", "--max-tokens", "3", "What is the capital of Japan?")
    j = json.loads(r.stdout)
    ok(j["finish_reason"] == "length" and j["usage"]["completion_tokens"] == 3 and j["content"], "arle run --json", j)
    r = sh(*base, input="What is the capital of Japan?\n")
    equal(r.stdout, "The capital of Japan is Tokyo.\n", "the question on standard input")
    r = sh(*base, "--think", "--prompt", "What is 48 + 37?")
    ok(r.stdout.count("85") >= 2, "--think", r.stdout)
    equal(sh(*base, "--prompt", "x", "--max-tokens", "none").returncode, 2, "a bad option is a usage error")
    r = sh("arle", "run", "--model", "/nowhere", "--plugin-dir", PLUGINS, "--prompt", "x")
    ok(r.returncode == 1 and "/nowhere" in r.stderr, "no such model", r)
    r = sh("arle", "run", "--plugin-dir", PLUGINS, "--prompt", "What is the capital of Japan?", "--temperature", "0",
           env=dict(os.environ, ARLE_MODELS=MODELS))
    ok(r.stdout.startswith("The capital of Japan") or os.path.exists("/etc/arle.ini"), "the shipped model without --model", r)


def interrupted():
    p = subprocess.Popen([program("arle"), "run", "--model", TINY, "--plugin-dir", PLUGINS, "--prompt", "Tell me a story about a fox.",
                          "--temperature", "2", "--max-tokens", "7000"], stdout=subprocess.PIPE)
    first = os.read(p.stdout.fileno(), 1)       # the answer has begun
    p.send_signal(signal.SIGINT)
    rest = p.stdout.read()
    p.stdout.close()
    equal(p.wait(60), 0, "Ctrl-C stops the answer and ends arle run with 0")
    ok(rest.endswith(b"\n") and len(first + rest) < 20000, "what there was is printed", first + rest[-200:])


def chat():
    r = sh("arle", "chat", "--model", TINY, "--plugin-dir", PLUGINS, "--temperature", "0",
           input="What is the capital of Japan?\n/new\n/help\nHello\n/quit\n")
    ok(r.returncode == 0 and "Tokyo" in r.stdout and "/new" in r.stdout, "arle chat", r)
    r = sh("arle", "--model", TINY, "--plugin-dir", PLUGINS, "--temperature", "0", input="What is the capital of Japan?\n")
    ok(r.returncode == 0 and "Tokyo" in r.stdout, "arle alone is a chat", r)


def tokenize():
    g = json.load(open(os.path.join(TINY, "golden.json")))["multi_turn"]
    r = sh("arle", "tokenize", "--model", TINY, input=g["text"])
    equal(json.loads(r.stdout), g["ids"], "arle tokenize")
    equal(sh("arle", "tokenize", "--model", TINY, input="").stdout, "[]\n", "of nothing")
    equal(sh("arle", "tokenize", "--model", "/nowhere", input="x").returncode, 1, "without a model")


def kv_commands():
    with tempfile.TemporaryDirectory() as folder:
        key = os.path.join(folder, "key")
        with open(key, "wb") as f:
            f.write(bytes(range(32)))
        os.chmod(key, 0o600)
        tier = os.path.join(folder, "tier")
        with Arled(settings={"kv.disk_dir": tier, "kv.secret_file": key, "kv.host_bytes": "64MiB"}) as s:
            ctl = lambda *a: sh("arlectl", "--socket", s.control, *a)
            j = lambda *a: json.loads(ctl("--json", *a).stdout)
            body = {"temperature": 0, "max_tokens": 8, "messages": [
                {"role": "system", "content": "You are a careful assistant who answers in short and plain sentences. " * 12},
                {"role": "user", "content": "What is the capital of Japan?"}]}
            cached = lambda: s.post(CHAT, body)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
            path = os.path.join(folder, "body.json")
            with open(path, "w") as f:
                json.dump(body, f)
            ok(j("kv", "warm", path)["prompt_tokens"] > 128, "kv warm", ctl("kv", "warm", path))
            ok(cached() >= 128, "a warmed prompt hits")
            ok(j("kv", "stat")[0]["hit_tokens"] >= 128, "kv stat", ctl("kv", "stat"))
            end = time.monotonic() + 20
            while j("kv")[0]["disk_user_bytes"] == 0 and time.monotonic() < end:
                time.sleep(0.05)
            ok(j("kv", "verify")[0]["pages"] > 0 and all(f["damaged"] == 0 for f in j("kv", "verify")), "kv verify", ctl("kv", "verify"))
            s.wait_idle()
            equal(ctl("kv", "flush").returncode, 0, "kv flush")
            end = time.monotonic() + 20         # what was being moved at that moment goes with the next one
            while j("kv")[0]["pages_cached"] + j("kv")[0]["host_bytes"] > 0 and time.monotonic() < end:
                ctl("kv", "flush")
                time.sleep(0.05)
            k = j("kv")[0]
            equal((k["pages_cached"], k["host_bytes"]), (0, 0), "nothing is kept after it")
            equal(cached(), 0, "a flushed prompt is computed again")
            ok(j("kv", "pin", path)["pinned_tokens"] >= 128, "kv pin computes what is missing", ctl("kv", "pin", path))
            equal((j("kv")[0]["pins"], s.metric("arle_kv_pins")), (1, 1), "kv stat and /metrics count it")
            ok(json.loads(ctl("--json", "kv", "flush").stdout)["pinned_pages"] > 0, "a flush leaves it, and says so")
            ok(cached() >= 128, "a pinned prompt hits after a flush")
            ok(s.metric("arle_kv_pins_yielded_total") == 0, "pins_yielded is a metric")
            equal(j("kv", "unpin", path)["pins"], 0, "kv unpin")
            ok("not pinned" in ctl("kv", "unpin", path).stderr, "what is not pinned cannot be unpinned", ctl("kv", "unpin", path))
            equal(j("kv", "pin", path, "someone")["pins"], 1, "kv pin for a tenant")
            equal(ctl("kv", "unpin", "all").returncode, 0, "kv unpin all")
            equal(j("kv")[0]["pinned_pages"], 0, "nothing is pinned after it")
            for bad in (("kv", "pin"), ("kv", "pin", "relative"), ("kv", "unpin"), ("kv", "unpin", "some"), ("kv", "pin", folder + "/none"),
                        ("kv", "nonsense"), ("kv", "warm"), ("kv", "warm", "relative"), ("kv", "warm", folder + "/none")):
                ok(ctl(*bad).returncode == 1, "refused: " + " ".join(bad[:3])[:20], ctl(*bad))
            s.stop()
        said = sh("arle", "kv", "verify", tier)
        ok(said.returncode == 0 and "damaged=0" in said.stdout, "arle kv verify", said)
        said = sh("arle", "kv", "stat", tier)
        ok(said.returncode == 0 and "pages=" in said.stdout, "arle kv stat", said)


for fn in (kv_commands, arlectl, reload, check_config, notify_socket, unix_listener, serve, run, interrupted, chat, tokenize):
    case(fn)
done()
