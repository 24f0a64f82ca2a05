"""Conversations of ds4-nano's kind as lines of {"text": ...}: `python texts.py SPLIT SEED COUNT > FILE`.

SPLIT train: what an importance matrix is taken over. SPLIT eval: held-out values, for scoring.
"""
import json
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"))
from make import document

split, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
r = random.Random(f"texts/{split}/{seed}")
for i in range(count):
    # Every tenth is a long text with questions about it.
    pieces = document(r, split, long=1200 if i % 10 == 9 else 0)
    print(json.dumps({"text": "".join(text for text, _ in pieces)}, ensure_ascii=False))
