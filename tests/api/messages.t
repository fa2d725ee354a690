#!/usr/bin/env python3
"""Anthropic's message dialect: answers, named events, tools, thinking, stop sequences, counting, errors in its shape."""
import os, sys
sys.path.insert(0, os.path.join(os.environ.get("top_srcdir", "."), "tests/api"))
sys.dont_write_bytecode = True
from arled import *

need_model()
server = Arled()
URL = "/v1/messages"
TOOL = [{"name": "shell", "description": "Run a command",
         "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}]


def body(text, **kw):
    return dict({"model": "tiny", "max_tokens": 100, "temperature": 0, "messages": [{"role": "user", "content": text}]}, **kw)


def events(b):
    status, headers, data = server.raw("POST", URL, dict(b, stream=True))
    out = []
    for block in data.decode().strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("event: "):
            e = json.loads(lines[1][6:])
            if e["type"] != lines[0][7:]:
                raise RuntimeError(block)
            out.append(e)
    return out


def joined(evs):
    """The message that a stream makes."""
    msg = None
    for e in evs:
        if e["type"] == "message_start":
            msg = e["message"]
        elif e["type"] == "content_block_start":
            msg["content"].append(dict(e["content_block"], json=""))
        elif e["type"] == "content_block_delta":
            d, b = e["delta"], msg["content"][e["index"]]
            if d["type"] == "input_json_delta":
                b["json"] += d["partial_json"]
            else:
                key = d["type"].split("_")[0]
                b[key] += d[key]
        elif e["type"] == "content_block_stop":
            b = msg["content"][e["index"]]
            text = b.pop("json")
            if b["type"] == "tool_use":
                b["input"] = json.loads(text)
        elif e["type"] == "message_delta":
            msg.update(e["delta"])
            msg["usage"] = e["usage"]
    return msg


def plain():
    status, m = server.post(URL, body("What is the capital of Japan?"))
    equal((status, m["type"], m["role"], m["stop_reason"]), (200, "message", "assistant", "end_turn"), "a message")
    equal(m["content"], [{"type": "text", "text": "The capital of Japan is Tokyo."}], "its text")
    equal(m["usage"]["input_tokens"] + m["usage"]["cache_read_input_tokens"], 19, "usage: input")
    equal(m["usage"]["output_tokens"], 10, "usage: output")
    status, m = server.post(URL, body("What is the capital of Japan?", max_tokens=2))
    equal(m["stop_reason"], "max_tokens", "max_tokens")
    status, m = server.post(URL, body("What is the capital of Japan?", stop_sequences=["zz", " is"]))
    equal((m["stop_reason"], m["stop_sequence"], m["content"][0]["text"]), ("stop_sequence", " is", "The capital of Japan"), "stop_sequences")
    status, m = server.post(URL, body("x", system=[{"type": "text", "text": "Answer briefly."}],
                                      messages=[{"role": "user", "content": [{"type": "text", "text": "What sound does a cow make?"}]}]))
    ok(status == 200 and "oo" in m["content"][0]["text"].lower(), "system and text blocks", m)


def streamed():
    for name, b in (("text", body("What is the capital of Japan?")), ("thinking", body("What is 48 + 37?", thinking={"type": "enabled", "budget_tokens": 1024})),
                    ("tool", body("How many files are in /tmp?", tools=TOOL))):
        status, whole = server.post(URL, b)
        evs = events(b)
        m = joined(evs)
        for block in m["content"] + whole["content"]:
            if "id" in block:
                ok(block["id"].startswith("call_"), "%s: a call has an id" % name)
                block["id"] = ""
        equal((m["content"], m["stop_reason"]), (whole["content"], whole["stop_reason"]), "%s: streamed equals whole" % name)
        equal(m["usage"]["output_tokens"], whole["usage"]["output_tokens"], "%s: usage" % name)
        kinds = [e["type"] for e in evs]
        ok(kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], "%s: order of events" % name, kinds)
        if name != "text":
            ok(whole["content"][0]["type"] in ("thinking", "tool_use"), "%s: block type" % name, whole)


def tool_loop():
    status, m = server.post(URL, body("How many files are in /tmp?", tools=TOOL))
    call = m["content"][-1]
    ok(m["stop_reason"] == "tool_use" and call["type"] == "tool_use" and call["name"] == "shell" and "command" in call["input"], "tool_use", m)
    status, m = server.post(URL, body("x", tools=TOOL, messages=[
        {"role": "user", "content": "How many files are in /tmp?"}, {"role": "assistant", "content": m["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "7"}]}]}]))
    ok(status == 200 and m["stop_reason"] == "end_turn" and m["content"], "tool_result is answered", m)
    # A call that comes back is what was sampled, whichever dialect it went out in.
    ask = body("How many files are in /tmp?", tools=TOOL)
    chat = {"temperature": 0, "max_tokens": 100, "messages": ask["messages"], "return_token_ids": True, "logit_bias": {"4093": -100},
            "tools": [{"type": "function", "function": {"name": "shell", "description": "Run a command", "parameters": TOOL[0]["input_schema"]}}]}
    first = server.post("/v1/chat/completions", chat)[1]
    call = first["choices"][0]["message"]["tool_calls"][0]
    said = first["choices"][0]["message"]["content"]
    use = {"type": "tool_use", "id": call["id"], "name": "shell", "input": json.loads(call["function"]["arguments"])}
    back = lambda use: server.post(URL + "/count_tokens", {"tools": TOOL, "messages": ask["messages"] + [
        {"role": "assistant", "content": [{"type": "text", "text": said}, use]}, {"role": "user", "content": "x"}]})[1]["input_tokens"]
    regular = back(dict(use, id="call_0"))
    whole = len(first["prompt_token_ids"]) + len(first["choices"][0]["token_ids"])
    ok(back(use) != regular and back(dict(use, input={"command": "ls"})) < regular, "tool_use that is known renders as sampled", (whole, regular))
    for streamed in (False, True):
        b = body("How many files are in /tmp?", tools=TOOL)
        m = joined(events(b)) if streamed else server.post(URL, b)[1]
        kept = server.metric("arle_calls_recalled_total")
        after = dict(b, messages=b["messages"] + [{"role": "assistant", "content": m["content"]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": m["content"][-1]["id"], "content": "7"}]}])
        m = server.post(URL, after)[1]
        ok(server.metric("arle_calls_recalled_total") == kept + 1 and m["usage"]["cache_read_input_tokens"] > 200,
           "a history of tool_use, %s" % ("streamed" if streamed else "whole"), m["usage"])


def prefill():
    """An assistant's message at the end is gone on with."""
    ask = body("x", messages=[{"role": "user", "content": "What is the capital of Japan?"}, {"role": "assistant", "content": "The capital of"}])
    status, m = server.post(URL, ask)
    equal((status, m["content"][0]["text"]), (200, " Japan is Tokyo."), "a last message of the assistant's is continued")
    ask["messages"][1]["content"] = [{"type": "tool_use", "id": "a", "name": "shell", "input": {}}]
    status, e = server.post(URL, ask)
    equal((status, e["error"]["param"]), (400, "messages[1].content"), "but not a tool_use without its result")


def counting():
    status, c = server.post(URL + "/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of Japan?"}]})
    equal((status, c), (200, {"input_tokens": 19}), "count_tokens")


def refusals():
    user = [{"role": "user", "content": "hi"}]
    rows = [
        ("max_tokens missing", {"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ("messages empty", {"messages": []}, 400, "invalid_request_error", "messages"),
        ("unknown model", {"model": "other"}, 404, "not_found_error", "model"),
        ("unknown field", {"max_token": 3}, 400, "invalid_request_error", "max_token"),
        ("role system", {"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
        ("image", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "messages[0].content[0]"),
        ("tool_result without id", {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, 400, "invalid_request_error",
         "messages[0].content[0]"),
        ("tool_choice any", {"tools": TOOL, "tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice.type"),
        ("budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": "many"}}, 400, "invalid_request_error", "thinking.budget_tokens"),
        ("description", {"tools": [dict(TOOL[0], description=5)]}, 400, "invalid_request_error", "tools[0]"),
        ("metadata", {"metadata": 1}, 400, "invalid_request_error", "metadata"),
        ("service_tier", {"service_tier": "gold"}, 400, "invalid_request_error", "service_tier"),
        ("temperature", {"temperature": 3}, 400, "invalid_request_error", "temperature"),
        ("stop_sequences", {"stop_sequences": "x"}, 400, "invalid_request_error", "stop_sequences"),
        ("stop sequence empty", {"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        ("thinking", {"thinking": {"type": "perhaps"}}, 400, "invalid_request_error", "thinking.type"),
        ("tool of the server's", {"tools": [{"type": "web_search_20250305", "name": "w"}]}, 400, "invalid_request_error", "tools[0]"),
        ("over-long", {"messages": [{"role": "user", "content": "a b c d " * 9000}]}, 400, "invalid_request_error", "messages"),
    ]
    for name, fields, status, kind, param in rows:
        got, e = server.post(URL, dict({"model": "tiny", "max_tokens": 5, "messages": user}, **fields))
        good = got == status and e["type"] == "error" and e["error"]["type"] == kind and e["error"]["param"] == param and e["error"]["message"]
        ok(good, "refused: " + name, (got, e))
    got, e = server.post(URL, "{")
    ok(got == 400 and e["type"] == "error", "refused: not JSON", e)


for fn in (plain, streamed, tool_loop, prefill, counting, refusals):
    case(fn)
equal(server.stop(), 0, "ends cleanly")
done()
