#!/usr/bin/env python3
"""Writes a checkpoint for the trigram model that counts: after token n comes n + 1.

usage: make_checkpoint.py DIR TOKENIZER.json     (any tokenizer; its vocabulary must not exceed --vocab)
"""
import argparse
import array
import json
import os
import random
import shutil
import struct

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("dir")
parser.add_argument("tokenizer")
parser.add_argument("--vocab", type=int, default=4096)
parser.add_argument("--hidden", type=int, default=64)
args = parser.parse_args()
os.makedirs(args.dir, exist_ok=True)
rng = random.Random(1)
n, h = args.vocab, args.hidden
embed = [[rng.gauss(0, 1) for _ in range(h)] for _ in range(n)]
# Rows of random vectors are nearly orthogonal: row i of `now` answers to the embedding of i - 1, row i of `before` to i - 2.
now = [embed[(i - 1) % n] for i in range(n)]
before = [[v / 2 for v in embed[(i - 2) % n]] for i in range(n)]
tensors = {"before.weight": before, "embed.weight": embed, "norm.weight": [[1.0] * h], "now.weight": now}

header, blobs, at = {}, [], 0
for name, rows in tensors.items():
    data = array.array("f", [v for row in rows for v in row]).tobytes()
    shape = [h] if name == "norm.weight" else [len(rows), h]
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
    blobs.append(data)
    at += len(data)
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(os.path.join(args.dir, "model.safetensors"), "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))
with open(os.path.join(args.dir, "config.json"), "w") as f:
    json.dump({"architectures": ["TinyTrigramForCausalLM"], "model_type": "tiny_trigram", "vocab_size": n, "hidden_size": h,
               "max_position_embeddings": 1024}, f, indent=1)
shutil.copy(args.tokenizer, os.path.join(args.dir, "tokenizer.json"))
