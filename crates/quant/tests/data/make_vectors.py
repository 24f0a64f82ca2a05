#!/usr/bin/env python3
"""Writes vectors.bin: blocks of every format and their values as decoded by the PyPI package `gguf`.

Per format: u32 type id, u32 bytes, u32 values, the bytes, the values as float32; little endian."""
import pathlib
import struct

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

rng = np.random.default_rng(5)
out = bytearray()
for t in (T.Q8_0, T.Q2_K, T.Q4_K, T.IQ2_XXS, T.MXFP4, T.BF16):
    if t == T.BF16:
        raw = (rng.standard_normal(64).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(1, -1)
    else:
        size = quants.GGML_QUANT_SIZES[t][1]
        raw = rng.integers(0, 256, (8, size), dtype=np.uint8)
        half = lambda n: (0.02 * rng.standard_normal((n, 1))).astype(np.float16).view(np.uint8)
        places = {T.Q8_0: [0], T.Q2_K: [80, 82], T.Q4_K: [0, 2], T.IQ2_XXS: [0], T.MXFP4: []}[t]
        for p in places:
            raw[:, p:p + 2] = half(len(raw))
        if t == T.MXFP4:
            raw[:, 0] = rng.integers(100, 140, len(raw))
    values = quants.dequantize(raw, t).astype(np.float32).ravel()
    out += struct.pack("<III", int(t), raw.size, values.size) + raw.tobytes() + values.tobytes()
pathlib.Path(__file__).with_name("vectors.bin").write_bytes(out)
