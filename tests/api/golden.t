#!/usr/bin/env python3
"""The trained checkpoints through HTTP with token-id prompts, against the reference outputs in models/*/golden.*, in both
arithmetics. f32: last logprobs within 2e-3, argmax wherever its lead exceeds 0.02, mean NLL within 1e-3, greedy tokens up to
the first margin under 0.02, drafts equal. bf16: mean NLL within 0.01, greedy up to the first margin under 0.1."""
import math, os, struct, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *

need_model()
FOLDERS = [f for f in ("qwen35-tiny", "qwen35-micro", "qwen35-moe-tiny", "deepseek-v4-tiny") if os.path.exists(os.path.join(MODELS, f, "golden.json"))]


def read_safetensors(path):
    """{name: (shape, bytes)} of f32 tensors."""
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        head = json.loads(f.read(n))
        data = f.read()
    return {k: (v["shape"], data[v["data_offsets"][0]:v["data_offsets"][1]]) for k, v in head.items() if k != "__metadata__"}


def log_softmax(row):
    m = max(row)
    z = m + math.log(sum(math.exp(x - m) for x in row))
    return [x - z for x in row]


def row_of(tensor, i):
    (rows, cols), data = tensor
    i = i + rows if i < 0 else i
    return struct.unpack("<%df" % cols, data[i * cols * 4:(i + 1) * cols * 4])


def key_id(key):
    return int(key[len("token_id:"):])


def ask(server, model, ids, **kw):
    status, body = server.post("/v1/completions", dict({"model": model, "prompt": ids, "temperature": 0, "return_token_ids": True,
                                                        "return_tokens_as_token_ids": True}, **kw))
    if status != 200:
        raise RuntimeError(body)
    return body["choices"][0]


def safe_length(margins, lead):
    for i, m in enumerate(margins):
        if m < lead:
            return i
    return len(margins)


def prompt_figures(server, model, g):
    """(mean NLL, best id per position, lead of the best per position)"""
    lp = ask(server, model, g["ids"], max_tokens=0, echo=True, logprobs=2)["logprobs"]
    nll = [-x for x in lp["token_logprobs"][1:]]
    best, lead = [], []
    for top in lp["top_logprobs"][1:]:
        order = sorted(top.items(), key=lambda kv: -kv[1])
        best.append(key_id(order[0][0]))
        lead.append(order[0][1] - order[1][1])
    return sum(nll) / len(nll), best, lead


def check_f32(server, model, name, g, tensor):
    nll, best, lead = prompt_figures(server, model, g)
    ok(abs(nll - g["mean_nll"]) < 1e-3, "%s %s: mean NLL" % (model, name), (nll, g["mean_nll"]))
    wrong = [(i, best[i], g["argmax_per_position"][i], lead[i]) for i in range(len(best))
             if lead[i] > 0.02 and best[i] != g["argmax_per_position"][i]]
    ok(not wrong, "%s %s: argmax of %d positions" % (model, name, len(best)), wrong)
    answer = ask(server, model, g["ids"], max_tokens=48, logprobs=20)
    got = {key_id(k): v for k, v in answer["logprobs"]["top_logprobs"][0].items()}
    check_last(model, name, g, tensor, got)
    n = safe_length(g["greedy_margin"], 0.02)
    equal(answer["token_ids"][:n], g["greedy_ids"][:n], "%s %s: %d greedy tokens" % (model, name, n))
    if n == len(g["greedy_ids"]):
        equal(answer["token_ids"], g["greedy_ids"], "%s %s: and they end there" % (model, name))
    if "mtp_draft_argmax_per_position" in g:
        check_drafts(server, model, name, g, n)


def check_last(model, name, g, tensor, got):
    """The 20 best of the last position. Where the whole row is at hand, as logprobs; else the 20 logits relative to the best."""
    if tensor is not None:
        want = log_softmax(row_of(tensor, -1))
        base = 0
        limit = sorted(want, reverse=True)[19]
        want = {i: v for i, v in enumerate(want) if v > limit - 4e-3}
    else:
        want = dict(zip(g["last_top20_ids"], g["last_top20_logits"]))
        base = want[g["last_top20_ids"][0]] - got[g["last_top20_ids"][0]]
        limit = min(want.values())
    missing = [i for i, v in want.items() if v > limit + 4e-3 and i not in got]
    shared = [i for i in got if i in want]
    off = max(abs(got[i] + base - want[i]) for i in shared)
    ok(len(shared) >= 19 and off < 2e-3 and not missing, "%s %s: last position, off by %.1e" % (model, name, off), (got, missing))


def check_drafts(server, model, name, g, n_safe):
    want = g["mtp_draft_argmax_per_position"][:max(len(g["ids"]) + n_safe - 1, 0)]
    got = ask(server, model, g["ids"], max_tokens=len(g["greedy_ids"]), return_drafts=True)["draft_token_ids"]
    n = min(len(got), len(want))
    ok(n >= len(want) - 2 and got[:n] == want[:n], "%s %s: %d drafts" % (model, name, n),
       "lengths %d %d, first difference %s" % (len(got), len(want), next(((i, a, b) for i, (a, b) in enumerate(zip(got, want)) if a != b), None)))


def check_bf16(server, model, name, g):
    nll = prompt_figures(server, model, g)[0]
    ok(abs(nll - g["mean_nll"]) < 0.01, "bf16 %s %s: mean NLL" % (model, name), (nll, g["mean_nll"]))
    n = safe_length(g["greedy_margin"], 0.1)
    got = ask(server, model, g["ids"], max_tokens=48)["token_ids"]
    equal(got[:n], g["greedy_ids"][:n], "bf16 %s %s: %d greedy tokens" % (model, name, n))


def run(compute):
    with Arled(models={f: os.path.join(MODELS, f) for f in FOLDERS}, sets=["backend-cpu.compute=" + compute]) as server:
        if "deepseek-v4-tiny" in FOLDERS:       # the default page is smaller than an entry of its widest layer
            ok("model=deepseek-v4-tiny from=16 to=32" in server.log(), compute + ": page size fitted to the model")
        for folder in FOLDERS:
            golden = json.load(open(os.path.join(MODELS, folder, "golden.json")))
            tensors = read_safetensors(os.path.join(MODELS, folder, "golden.safetensors"))
            for name, g in golden.items():
                if compute == "f32":
                    case(lambda: check_f32(server, folder, name, g, tensors.get(name + ".logits")))
                else:
                    case(lambda: check_bf16(server, folder, name, g))
        equal(server.stop(), 0, "%s: ends cleanly" % compute)


case(lambda: run("f32"))
case(lambda: run("bf16"))
done()
