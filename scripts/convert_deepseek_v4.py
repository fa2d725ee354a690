#!/usr/bin/env python3
"""Converts a bf16 DeepSeek-V4 checkpoint as transformers saves it into the published layout: official tensor names,
E4M3 dense weights with E8M0 scales per 128 x 128 block, E2M1 experts with E8M0 scales per 32 columns, float32 mixing
parameters. Standard library only.

    convert_deepseek_v4.py SOURCE_DIR TARGET_DIR
"""
import array
import json
import math
import os
import shutil
import struct
import sys

FP8 = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b", "ffn.shared_experts.")
RENAME = (("model.", "", 1), ("embed_tokens.", "embed.", 1), ("attn.norm.", "attn.kv_norm.", 1), ("hc_head.hc_", "hc_head_", 1))


def read(path):
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(n))
        body = f.read()
    header.pop("__metadata__", None)
    return {k: (v["dtype"], v["shape"], body[v["data_offsets"][0]:v["data_offsets"][1]]) for k, v in header.items()}


def official(name):
    for old, new, count in RENAME:
        if old == "attn.norm." and ".compressor." in name:
            continue
        if name.startswith(old) or old in ("attn.norm.", "hc_head.hc_"):
            name = name.replace(old, new, count)
    return name


def floats(dtype, raw):
    if dtype == "F32":
        return array.array("f", raw)
    half = array.array("H", raw)
    out = array.array("I", bytes(4 * len(half)))
    for i, h in enumerate(half):
        out[i] = h << 16
    return array.array("f", out.tobytes())


def pow2_exponent(amax, top):
    """Smallest e with amax <= top * 2^e."""
    m, e = math.frexp(amax / top)
    return e - 1 if m == 0.5 else e


def e4m3(x):
    a = min(abs(x), 448.0)
    sign = 0x80 if x < 0 or (x == 0 and math.copysign(1, x) < 0) else 0
    if a < 2.0 ** -6:
        return sign | round(a * 512)        # subnormals; 8 is the smallest normal
    m, e = math.frexp(a)                    # a = m * 2^e, m in [0.5, 1)
    q = round(m * 16)                       # 8..16, three mantissa bits
    if q == 16:
        q, e = 8, e + 1
    return sign | (e - 1 + 7) << 3 | (q - 8)


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def e2m1(x):
    a = min(abs(x), 6.0)
    step = 0.5 if a < 2 else 1.0 if a < 4 else 2.0
    return (8 if x < 0 else 0) | E2M1.index(round(a / step) * step)


def quant_fp8(w, rows, cols):
    br, bc = -(-rows // 128), -(-cols // 128)
    out, scale = bytearray(rows * cols), bytearray(br * bc)
    for bi in range(br):
        for bj in range(bc):
            rs, cs = range(bi * 128, min(rows, bi * 128 + 128)), (bj * 128, min(cols, bj * 128 + 128))
            amax = max(max(abs(v) for v in w[r * cols + cs[0]:r * cols + cs[1]]) for r in rs)
            e = pow2_exponent(max(amax, 1e-4), 448.0)
            scale[bi * bc + bj] = e + 127
            inv = 2.0 ** -e
            for r in rs:
                for c in range(*cs):
                    out[r * cols + c] = e4m3(w[r * cols + c] * inv)
    return [("F8_E4M3", [rows, cols], bytes(out)), ("F8_E8M0", [br, bc], bytes(scale))]


def quant_fp4(w, rows, cols):
    groups = cols // 32
    out, scale = bytearray(rows * cols // 2), bytearray(rows * groups)
    for r in range(rows):
        for g in range(groups):
            at = r * cols + g * 32
            block = w[at:at + 32]
            e = pow2_exponent(max(max(abs(v) for v in block), 6 * 2.0 ** -126), 6.0)
            scale[r * groups + g] = e + 127
            inv = 2.0 ** -e
            for j in range(16):
                out[at // 2 + j] = e2m1(block[2 * j] * inv) | e2m1(block[2 * j + 1] * inv) << 4
    return [("I8", [rows, cols // 2], bytes(out)), ("F8_E8M0", [rows, groups], bytes(scale))]


def convert(name, dtype, shape, raw):
    """Yields (name, dtype, shape, bytes) in the published layout."""
    name = official(name)
    stem = name[:-len(".weight")] if name.endswith(".weight") else name
    if ".ffn.experts." in name and len(shape) == 2:
        weight, scale = quant_fp4(floats(dtype, raw), *shape)
    elif any(k in name for k in FP8) and name.endswith(".weight") and len(shape) == 2:
        weight, scale = quant_fp8(floats(dtype, raw), *shape)
    elif dtype == "BF16" and ("hc_" in name or name.endswith((".ape", "attn_sink", "gate.bias"))):
        yield name, "F32", shape, floats(dtype, raw).tobytes()
        return
    else:
        yield name, dtype, shape, raw
        return
    yield (name, *weight)
    yield (stem + ".scale", *scale)


def write(path, tensors):
    header, at = {}, 0
    for name, dtype, shape, raw in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            f.write(tensor[3])


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = sys.argv[1:]
    os.makedirs(target, exist_ok=True)
    out = []
    for name, (dtype, shape, raw) in sorted(read(os.path.join(source, "model.safetensors")).items()):
        out.extend(convert(name, dtype, shape, raw))
    write(os.path.join(target, "model.safetensors"), out)
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    config["expert_dtype"] = "fp4"
    config["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
                                     "weight_block_size": [128, 128]}
    with open(os.path.join(target, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    for extra in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if os.path.exists(os.path.join(source, extra)):
            shutil.copy(os.path.join(source, extra), target)


if __name__ == "__main__":
    main()
