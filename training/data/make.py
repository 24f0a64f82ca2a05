"""Documents -> token sequences.  `python make.py sample N` prints documents; `sequences` packs them for the trainer."""
import random
import sys
import os

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import skills
from chatfmt import BOS, EOS, render

NAMES, WEIGHTS = list(skills.MIX), list(skills.MIX.values())
PROMPT_WEIGHT = 0.06          # a little loss on prompts helps the embeddings and copying; answers count fully


def document(r, split="train", long=0):
    """[(text, weight)] of one conversation, or of a plain story."""
    if long:
        conv = skills.recall(r, split, long)
    else:
        k = r.random()
        if k < 0.02:
            return [(BOS + skills.story_text(r) + EOS, 0.5)]
        s = r.choices(NAMES, WEIGHTS)[0]
        conv = skills.recall(r, split, r.choice([20, 60, 120, 250, 400, 700])) if s == "recall" else skills.SKILLS[s](r, split)
    return [(t, 1.0 if ans else 0.004 if long else PROMPT_WEIGHT) for t, ans in render(conv, r.random() < 0.45)]


def encode(tok, docs):
    """Token ids and weights (as bytes, 255 = 1) per document."""
    flat = [t for d in docs for t, _ in d]
    enc = tok.encode_batch(flat, add_special_tokens=False)
    i, out = 0, []
    for d in docs:
        ids, w = [], []
        for _, weight in d:
            ids += enc[i].ids
            w += [max(1, int(weight * 255))] * len(enc[i].ids)
            i += 1
        out.append((ids, w))
    return out


def sequences(tok, r, length, count):
    """[count, length + 2] ids and weights.  Documents are packed whole; only the last of a sequence may be cut."""
    n = length + 2
    ids, ws = np.full((count, n), 2, np.uint16), np.zeros((count, n), np.uint8)
    pool, row = [], 0
    while row < count:
        room, at = n, 0
        while room > 8:
            if length > 4096 and room > 1500:
                # one long recall document takes most of what is left; short ones fill the rest
                words = int(room * r.uniform(0.25, 0.72))
                d = encode(tok, [document(r, long=words)])[0]
            else:
                if not pool:
                    pool = encode(tok, [document(r) for _ in range(200)])
                d = pool.pop()
            if len(d[0]) > room and length > 4096 and room > 1500:
                continue
            k = min(room, len(d[0]))
            ids[row, at:at + k], ws[row, at:at + k] = d[0][:k], d[1][:k]
            at, room = at + k, room - k
        row += 1
    return ids, ws


def worker(folder, tok_path, seed, index, workers, long_share, shards):
    """Writes numbered shards of about a million tokens until told to stop (a file named stop) or `shards` are made."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(tok_path)
    k = 0
    while not os.path.exists(folder + "/stop") and k < shards:
        r = random.Random(f"{seed}/{index}/{k}")
        long = r.random() < long_share
        length, count = (16384, 32) if long else (2048, 256)
        ids, ws = sequences(tok, r, length, count)
        name = f"{folder}/{'long' if long else 'short'}-{index:02d}-{k:04d}"
        np.save(name + ".tmp.npy", np.stack([ids, ws.astype(np.uint16)]))
        os.rename(name + ".tmp.npy", name + ".npy")
        k += 1


if __name__ == "__main__":
    if sys.argv[1] == "sample":
        r = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
        for _ in range(int(sys.argv[2])):
            print("".join(t if w < 1 else "\x1b[32m" + t + "\x1b[0m" for t, w in document(r)))
            print("-" * 80)
    elif sys.argv[1] == "workers":           # workers FOLDER TOKENIZER SEED COUNT LONG_SHARE SHARDS_EACH
        import multiprocessing as mp
        folder, tok, seed, n, share, shards = sys.argv[2:8]
        os.makedirs(folder, exist_ok=True)
        ps = [mp.Process(target=worker, args=(folder, tok, int(seed), i, int(n), float(share), int(shards))) for i in range(int(n))]
        [p.start() for p in ps]
        [p.join() for p in ps]
