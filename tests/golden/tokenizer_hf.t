#!/usr/bin/env python3
"""Random Unicode through tok_pipe and through the reference library: ids must be equal.

100,000 strings with the shipped tokenizer.json, then fewer with each variant of it (other pre-tokenisers, no normaliser,
added tokens with flags), so that every matcher is compared. Deterministic. Skips when `tokenizers` is not installed.
Usage: tokenizer_hf.t [N_STRINGS [SEED]]
"""
import array
import copy
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

try:
    import tokenizers
except ImportError:
    print("1..0 # SKIP python package tokenizers is not installed")
    sys.exit(0)

SRC = os.environ.get("top_srcdir", ".")
PIPE = os.path.join(os.environ.get("top_builddir", "."), "tests/golden/tok_pipe")
N = int(sys.argv[1]) if len(sys.argv) > 1 else 100000
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 20240607
ALLOW_SPECIAL = 1

with open(os.path.join(SRC, "models/qwen35-tiny/tokenizer.json"), encoding="utf-8") as f:
    BASE = json.load(f)
LITERALS = [t["content"] for t in BASE["added_tokens"]]
WORDS = ("the quick brown fox jumps over a lazy dog and I'm sure we'll see don't WE'LL THEY'VE it's you're she'd can't "
         "O'Clock naïve façade Straße Привет мир καλημέρα 你好世界 こんにちは 안녕하세요 שלום مرحبا हिन्दी ไทย Việt").split()
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\n ", "\u00a0", "\u0085", "\u2028", "\u2003", "\u3000",
          "\u1680", "\u202f", "\x0b", "\x0c", " \t \n  ", "\r\n\r\n", "\u200b", "\u180e", "\x1c", "\x1f"]
MARKS = [chr(c) for c in list(range(0x300, 0x370)) + [0x334, 0x345, 0x591, 0x5bf, 0x64b, 0x670, 0x93c, 0x94d, 0xe38, 0x3099,
         0x309a, 0x20d0, 0x1dca, 0x1ab0, 0x8d0, 0x10f46, 0x1e8d0, 0xfe20, 0x302a]]
CONTRACT = ["'s", "'S", "'\u017f", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'vE", "'m", "'M", "'ll", "'lL", "'d", "'D", "'",
            "\u2019s", "''s", "'l", "'r", "'v", "'\u212a", "\u212a", "\u017f", "'sS", "' s"]
NFC = ["e\u0301", "a\u0323\u0302", "\u212b", "\u2126", "\u1100\u1161", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u0958", "\u0344",
       "\u0b47\u0b3e", "\ufb1d", "\u0f73", "\u2000", "\u2001", "\u304b\u3099", "\U0001d15e", "\u1e9b\u0323", "\u0390",
       "\u03b9\u0308\u0301", "\U000110ab", "\U00011935\U00011930", "\u00e9\u0327", "q\u0307\u0323", "\u2add\u0338", "\uf900",
       "\U0002f800", "\u0cc6\u0cc2\u0cd5", "\u0dd9\u0dcf\u0dca"]
DIGITS = ["0", "1", "42", "123", "1234", "1,234.56", "\u0663", "\u00bd", "\u2163", "\u3007", "\u2460", "\U0001d7d8", "x1", "1x",
          "\u0967\u0968\u0969\u096a"]
PUNCT = ["!", "...", "(", ")", "\"", "`", "~", "~~", "$", "^", "+", "=", "<", ">", "|", "<|", "|>", "</", "\u2014", "\u201c", "\u3002",
         "\uff01", "\u20ac", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u30fb", "\u30a0", "\u309b", "#include",
         "a.b", "_x", "\\n", "//", "<think", "<|im_start", "<tool_", "\u00ad", "\ufffd", "\ufeff", "\x00", "\x01", "\x7f", "\ue000"]
RANGES = [(0x20, 0x7f), (0x20, 0x7f), (0x00, 0x20), (0x80, 0x100), (0x100, 0x250), (0x250, 0x600), (0x600, 0x1000),
          (0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x3100), (0x3040, 0xa000), (0xa000, 0xd7a4), (0xe000, 0x10000),
          (0x10000, 0x12000), (0x1d000, 0x1e000), (0x1f000, 0x20000), (0x2f800, 0x2fa20), (0x10000, 0x110000)]


def random_char(rng):
    a, b = rng.choice(RANGES)
    return chr(rng.randrange(a, b))


def random_text(rng):
    parts = []
    kind = rng.randrange(6)
    for _ in range(rng.randrange(1, 14)):
        k = rng.randrange(12) if kind else rng.choice((0, 1, 0))
        if k == 0:
            parts.append(rng.choice(WORDS))
        elif k == 1:
            parts.append(rng.choice(SPACES) if rng.randrange(3) == 0 else " ")
        elif k == 2:
            parts.append("".join(random_char(rng) for _ in range(rng.randrange(1, 6))))
        elif k == 3:
            parts.append(rng.choice(CONTRACT))
        elif k == 4:
            parts.append(rng.choice(DIGITS))
        elif k == 5:
            parts.append(rng.choice(PUNCT))
        elif k == 6:
            parts.append(rng.choice(NFC))
        elif k == 7:
            parts.append("".join(rng.choice(MARKS) for _ in range(rng.choice((1, 1, 2, 3, 5, 40)))))
        elif k == 8:
            parts.append(rng.choice(LITERALS))
        elif k == 9:
            parts.append(rng.choice(SPACES) * rng.choice((1, 2, 3, 9, 70)))
        elif k == 10:
            parts.append(rng.choice((rng.choice(WORDS), random_char(rng))) * rng.choice((1, 2, 5, 30)))
        else:
            lo = rng.randrange(0x110000 - 64)
            lo = 0xe000 if 0xd7c0 <= lo < 0xe000 else lo
            parts.append("".join(chr(lo + rng.randrange(64)) for _ in range(4)))
    return "".join(parts)


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps):
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": list(steps) + [last]}


def variant(**changes):
    doc = copy.deepcopy(BASE)
    doc.update(changes)
    return doc


def flagged():
    """Added tokens with strip flags, some of them matched on normalised text, one the prefix of another."""
    doc = copy.deepcopy(BASE)
    more = [("<mask>", True, False, False), ("<right>", False, True, False), ("<both>", True, True, True), ("<bo", False, False, True),
            ("dog", False, False, True), ("42", False, False, False), ("fa\u00e7ade", False, False, True), ("<|im_start|> x", False, False, False)]
    first = max(t["id"] for t in doc["added_tokens"]) + 1
    for i, (text, left, right, normal) in enumerate(more):
        doc["added_tokens"].append({"id": first + i, "content": text, "single_word": False, "lstrip": left, "rstrip": right,
                                    "normalized": normal, "special": False})
    return doc, [m[0] for m in more]


def whole():
    doc = copy.deepcopy(BASE)
    doc["model"]["ignore_merges"] = True
    # Entries no merge leads to, which only ignore_merges can produce. The reference numbers added tokens after the vocabulary.
    vocab = doc["model"]["vocab"]
    new = [w for w in ("\u0120quick", "brown", "\u0120lazy", "\u0120jumps", "O'Clock") if w not in vocab]
    vocab.update({w: len(vocab) + i for i, w in enumerate(new)})
    for t in doc["added_tokens"]:
        t["id"] += len(new)
    return doc


DEEPSEEK = sequence(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""))
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
N3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
OWN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGGED, FLAG_LITERALS = flagged()
VARIANTS = [  # name, document, expected matcher, literals
    ("shipped", BASE, "split-lm", LITERALS),
    ("letters without marks", variant(pre_tokenizer=sequence(split(QWEN2))), "split-l", LITERALS),
    ("three digits", variant(pre_tokenizer=sequence(split(N3))), "split-l-n3", LITERALS),
    ("byte-level's own pattern, no normaliser", variant(pre_tokenizer=OWN, normalizer=None), "bytelevel", LITERALS),
    ("digits, CJK, punctuation in sequence", variant(pre_tokenizer=DEEPSEEK, normalizer={"type": "Sequence", "normalizers": []}),
     "digits3-cjk-ps", LITERALS),
    ("unknown pattern", variant(pre_tokenizer=sequence(split(r"[A-Za-z]{1,4}|[0-9]+|[一-龥]{2}|[^\S\n]+"))), "pcre2", LITERALS),
    ("known then unknown pattern", variant(pre_tokenizer=sequence(split(r"\p{N}{1,3}"), split(r"[a-z]+(?=[A-Z ])|ab?"))), "pcre2", LITERALS),
    ("no split at all", variant(pre_tokenizer=sequence()), "none", LITERALS),
    ("added tokens with flags", FLAGGED, "split-lm", LITERALS + FLAG_LITERALS * 3),
    ("whole words before merges", whole(), "split-lm", LITERALS),
]


def ours(model_dir, flags, texts):
    raw = [t.encode() for t in texts]
    stdin = b"".join(struct.pack("=I", len(r)) + r for r in raw)
    done = subprocess.run([PIPE, model_dir, str(flags)], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode())
    out = array.array("i")
    out.frombytes(done.stdout)
    ids, at = [], 0
    for _ in texts:
        n = out[at]
        ids.append(list(out[at + 1:at + 1 + n]))
        at += 1 + n
    return ids, done.stderr.decode()


def compare(number, name, doc, matcher, flags, texts):
    with tempfile.TemporaryDirectory() as d:
        with open(os.path.join(d, "tokenizer.json"), "w", encoding="utf-8") as f:
            json.dump(doc, f, ensure_ascii=False)
        got, log = ours(d, flags, texts)
    reference = copy.deepcopy(doc)
    if not flags & ALLOW_SPECIAL:
        reference["added_tokens"] = []
    ref = tokenizers.Tokenizer.from_str(json.dumps(reference))
    bad = 0
    for i in range(0, len(texts), 5000):
        for k, e in enumerate(ref.encode_batch(texts[i:i + 5000], add_special_tokens=False)):
            if e.ids != got[i + k]:
                bad += 1
                if bad <= 5:
                    print("# %a\n#   got      %s\n#   expected %s" % (texts[i + k], got[i + k], e.ids))
    right = "pre-tokeniser %s\n" % matcher in log
    if not right:
        print("# expected matcher %s, %s" % (matcher, log.strip()))
    print("%sok %d - %s: %d strings, flags %d" % ("" if not bad and right else "not ", number, name, len(texts), flags))
    sys.stdout.flush()
    return bad == 0 and right


def main():
    global LITERALS
    fine = True
    print("# reference: tokenizers %s" % tokenizers.__version__)
    number = 0
    for i, (name, doc, matcher, literals) in enumerate(VARIANTS):
        rng = random.Random(SEED + i)
        LITERALS = literals
        texts = [random_text(rng) for _ in range(N if i == 0 else max(N // 10, 1))]
        texts += ["a" * 3000, " " * 3000, "\n" * 500, "ab" * 2000 + "!" * 999, "\u0301\u0334" * 400, "e" + "\u0323\u0301" * 300]
        for flags in (ALLOW_SPECIAL, 0):
            number += 1
            fine &= compare(number, name, doc, matcher, flags, texts if flags else texts[:max(len(texts) // 4, 10)])
    print("1..%d" % number)
    return 0 if fine else 1


sys.exit(main())
