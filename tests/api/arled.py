"""Helper of the API tests: a real arled on a free port, HTTP without packages, and TAP."""
import http.client, json, os, re, signal, socket, subprocess, sys, tempfile, time, traceback

BUILD = os.environ.get("top_builddir", "build")
SOURCE = os.environ.get("top_srcdir", ".")
PLUGINS = os.environ.get("ARLE_TEST_PLUGINS", os.path.join(BUILD, ".plugins"))
MODELS = os.environ.get("ARLE_TEST_MODELS", os.path.join(SOURCE, "models"))
TINY = os.path.join(MODELS, "qwen35-tiny")


def program(name):
    return os.path.join(BUILD, name)


class Arled:
    """One daemon. models: {name: folder}; settings: {"server.x": "y"}."""

    def __init__(self, models=None, sets=(), settings=None, wait=True, env=None):
        self.dir = tempfile.TemporaryDirectory(prefix="arle-api-")
        self.ini = os.path.join(self.dir.name, "arle.ini")
        self.control = os.path.join(self.dir.name, "control.sock")
        self.log_path = os.path.join(self.dir.name, "log")
        self.models = models or {"tiny": TINY}
        self.sets = list(sets)
        self.env = dict(os.environ, **(env or {}))
        self.write_ini(settings or {})
        self.start(wait)

    def write_ini(self, settings):
        sections = {"server": {"listen": "127.0.0.1:0", "control": self.control}, "plugins": {"dir": PLUGINS}}
        for name, folder in self.models.items():
            sections["model " + name] = {"path": folder}
        for key, value in settings.items():
            section, name = key.rsplit(".", 1)
            sections.setdefault(section, {})[name] = value
        with open(self.ini, "w") as f:
            for section, keys in sections.items():
                f.write("[%s]\n" % section + "".join("%s = %s\n" % kv for kv in keys.items()))
        os.chmod(self.ini, 0o600)

    def start(self, wait=True):
        args = [program("arled"), "--config", self.ini]
        for s in self.sets:
            args += ["--set", s]
        self.log_from = os.path.getsize(self.log_path) if os.path.exists(self.log_path) else 0
        self.started = time.monotonic()
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(args, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env)
        if wait:
            self.wait_ready()

    def log(self):
        with open(self.log_path, errors="replace") as f:
            f.seek(self.log_from)
            return f.read()

    def wait_ready(self, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            m = re.search(r"daemon ready url=http://([0-9.]+):(\d+)", self.log())
            if m:
                self.host, self.port = m.group(1), int(m.group(2))
                return
            if self.process.poll() is not None:
                raise RuntimeError("arled ended with %d:\n%s" % (self.process.returncode, self.log()))
            time.sleep(0.003)
        raise RuntimeError("arled is not ready:\n" + self.log())

    def stop(self, sig=signal.SIGTERM, seconds=60):
        """Returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "did not end: " + self.log()[-2000:]

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.stop()

    # ---- requests

    def raw(self, method, path, body=None, headers=None, timeout=120):
        c = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
        c.request(method, path, body, dict({"Content-Type": "application/json"} if body is not None else {}, **(headers or {})))
        r = c.getresponse()
        data = r.read()
        c.close()
        return r.status, dict((k.lower(), v) for k, v in r.getheaders()), data

    def get(self, path, **kw):
        status, headers, data = self.raw("GET", path, **kw)
        return status, json.loads(data) if headers.get("content-type", "").startswith("application/json") else data.decode()

    def post(self, path, body, **kw):
        status, headers, data = self.raw("POST", path, body, **kw)
        return status, json.loads(data)

    def open_stream(self, path, body, timeout=120):
        """A socket on which the request was sent; for tests that cut it off."""
        s = socket.create_connection((self.host, self.port), timeout=timeout)
        data = json.dumps(dict(body, stream=True)).encode()
        s.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                  % (path.encode(), len(data)) + data)
        return s

    def stream(self, path, body, timeout=120):
        """All chunks of a streamed reply, and whether it ended with [DONE]."""
        status, headers, data = self.raw("POST", path, dict(body, stream=True), timeout=timeout)
        if status != 200:
            return [dict(json.loads(data), status=status)], False
        events = [l[6:] for l in data.decode().split("\n") if l.startswith("data: ")]
        done = bool(events) and events[-1] == "[DONE]"
        return [json.loads(e) for e in events if e != "[DONE]"], done

    def chat(self, text, **kw):
        body = dict({"model": next(iter(self.models)), "temperature": 0, "messages": [{"role": "user", "content": text}]}, **kw)
        return self.post("/v1/chat/completions", body)

    def metric(self, name):
        status, text = self.get("/metrics")
        total = 0.0
        for line in text.split("\n"):
            if line.startswith(name) and line[len(name):len(name) + 1] in ("{", " "):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def wait_idle(self, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric("arle_http_running") == 0 and self.metric("arle_engine_running") == 0 \
                    and self.metric("arle_engine_waiting") == 0:
                return True
            time.sleep(0.05)
        return False


def join_chunks(chunks):
    """The message that a streamed chat makes, per choice."""
    out = {}
    for c in chunks:
        for ch in c.get("choices", []):
            m = out.setdefault(ch["index"], {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None,
                                             "text": "", "token_ids": []})
            d = ch.get("delta", {})
            m["content"] += d.get("content") or ""
            m["reasoning_content"] += d.get("reasoning_content") or ""
            m["text"] += ch.get("text") or ""
            m["token_ids"] += ch.get("token_ids") or []
            for t in d.get("tool_calls", []):
                while len(m["tool_calls"]) <= t["index"]:
                    m["tool_calls"].append({"id": "", "name": "", "arguments": ""})
                call = m["tool_calls"][t["index"]]
                call["id"] += t.get("id") or ""
                call["name"] += t["function"].get("name") or ""
                call["arguments"] += t["function"].get("arguments") or ""
            if ch.get("finish_reason"):
                m["finish_reason"] = ch["finish_reason"]
    return out


class Redis:
    """A real redis-server of our own on a free port."""

    def __init__(self, *options):
        self.options = options
        with socket.socket() as x:
            x.bind(("127.0.0.1", 0))
            self.port = x.getsockname()[1]
        self.address = "127.0.0.1:%d" % self.port
        self.dir = tempfile.TemporaryDirectory(prefix="arle-redis-")
        self.start()

    def start(self):
        self.process = subprocess.Popen(["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.dir.name,
                                         "--save", "", "--appendonly", "no", *self.options], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if self.ask("PING") == b"PONG":
                    return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("redis-server did not start")

    def ask(self, *words):
        """One command; the reply's payload, or a list of payloads."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as s:
            words = [w if isinstance(w, bytes) else str(w).encode() for w in words]
            s.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
            with s.makefile("rb") as f:
                return self._reply(f)

    def _reply(self, f):
        line = f.readline()[:-2]
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return f.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
        if kind == b"*":
            return [self._reply(f) for _ in range(int(rest))]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        return rest

    def stop(self, sig=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(sig)
            self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.stop()


# ---- TAP

_count = _failed = 0


def ok(good, name, why=""):
    global _count, _failed
    _count += 1
    _failed += not good
    print("%sok %d - %s" % ("" if good else "not ", _count, name))
    if not good and why != "":
        for line in str(why)[:3000].split("\n"):
            print("# " + line)
    sys.stdout.flush()
    return good


def equal(got, want, name):
    return ok(got == want, name, "got      %r\nexpected %r" % (got, want))


def note(text):
    print("# " + text)
    sys.stdout.flush()


def skip(name, why):
    global _count
    _count += 1
    print("ok %d - %s # SKIP %s" % (_count, name, why))


def case(fn):
    """Runs a function as a block of tests; an exception is a failure and not the end."""
    try:
        fn()
    except Exception:
        ok(False, fn.__name__, traceback.format_exc())


def done():
    print("1..%d" % _count)
    sys.exit(1 if _failed else 0)


def need_model(folder=TINY):
    if not os.path.exists(os.path.join(folder, "config.json")):
        print("1..0 # SKIP no model in " + folder)
        sys.exit(0)
