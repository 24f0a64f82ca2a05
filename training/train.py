"""Trains ds4-nano on one GPU for a fixed time: python train.py --data FOLDER --out FOLDER --seconds N

The schedule is a function of elapsed time.  Stage 1: sequences of 2k, attention over all compressed rows, while the indexer
learns to predict that attention.  Stage 2: real top-k selection, and part of the steps on sequences of 16k.
"""
import argparse
import glob
import json
import os
import queue
import random
import threading
import time
import traceback

import numpy as np
import torch
import torch.nn.functional as F

import export
import model as M

a = argparse.ArgumentParser()
a.add_argument("--data", required=True)
a.add_argument("--out", required=True)
a.add_argument("--seconds", type=float, default=900)
a.add_argument("--wall", type=float, default=1e9, help="upper limit including compilation")
a.add_argument("--stage2", type=float, default=0.55, help="share of the time after which selection and long sequences start")
a.add_argument("--long-every", type=int, default=3, help="one step in N of stage 2 uses long sequences")
a.add_argument("--batch", type=int, default=24, help="short sequences per step")
a.add_argument("--decay", type=float, default=0.5, help="share of the time at the end over which the rate falls to zero")
a.add_argument("--muon", type=float, default=0.02)
a.add_argument("--adam", type=float, default=2e-3)
a.add_argument("--seed", type=int, default=1)
a.add_argument("--init", help="folder to continue from: with master.pt, else an exported checkpoint")
a.add_argument("--toy", action="store_true", help="tiny CPU run")
args = a.parse_args()
dev = "cpu" if args.toy else "cuda"
torch.manual_seed(args.seed)
torch.set_float32_matmul_precision("high")
torch._dynamo.config.cache_size_limit = 64
c = M.Config()
os.makedirs(args.out, exist_ok=True)
start = time.time()


# ---------------------------------------------------------------- data

def feeder(kind, batch, length, out):
    """Reads shards as they appear; repeats old ones only if the makers fall behind."""
    r, used = random.Random(args.seed), set()
    while True:
        files = sorted(f for f in glob.glob(f"{args.data}/{kind}-*.npy") if not f.endswith(".tmp.npy"))
        fresh = [f for f in files if f not in used]
        if not files:
            time.sleep(0.2)
            continue
        f = r.choice(fresh or files)
        used.add(f)
        d = np.load(f)
        order = np.random.default_rng(len(used)).permutation(d.shape[1])
        for i in range(0, len(order) - batch + 1, batch):
            x = torch.from_numpy(d[:, order[i:i + batch], :length + 2].astype(np.int32))
            out.put((x if args.toy else x.pin_memory(), len(fresh)))


short_len, long_len = (128, 256) if args.toy else (2048, 16384)
short_batch, long_batch = (2, 1) if args.toy else (args.batch, 2)
queues = {k: queue.Queue(24) for k in ("short", "long")}
threading.Thread(target=feeder, args=("short", short_batch, short_len, queues["short"]), daemon=True).start()
threading.Thread(target=feeder, args=("long", long_batch, long_len, queues["long"]), daemon=True).start()

# ---------------------------------------------------------------- parameters and optimiser

p, table = M.init_params(c, args.seed), M.init_hash(c, args.seed)
if args.init:
    full = args.init + "/master.pt"
    p = torch.load(full, map_location="cpu") if os.path.exists(full) else export.read(args.init)[0]
p = {k: v.to(dev).requires_grad_(not k.endswith("gate.bias")) for k, v in p.items()}
masks = M.hash_masks(c, {k: v.to(dev) for k, v in table.items()})
MUON = ("wq_a.weight", "wq_b.weight", "attn.wkv.weight", "wo_a.weight", "wo_b.weight", "w1", "w2", "w3", "w1.weight", "w2.weight",
        "w3.weight", "e_proj.weight", "h_proj.weight")
muon = {k: v for k, v in p.items() if k.endswith(MUON)}
adam = {k: v for k, v in p.items() if k not in muon and v.requires_grad}


def orthogonalise(g):
    """Newton-Schulz iteration towards the nearest orthogonal matrix, batched, in bf16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum plus orthogonalised updates; matrices of one shape are handled as one batch."""

    def __init__(self, params):
        groups = {}
        for k, v in params.items():
            views = v.shape[-2:]
            if k.endswith("wo_a.weight"):
                views = (c.o_lora, v.shape[-1])          # one matrix per output group
            groups.setdefault(views, []).append(v)
        self.groups = [(s, vs, torch.zeros(sum(v.numel() for v in vs) // (s[0] * s[1]), *s, device=dev)) for s, vs in groups.items()]
        self.ns = orthogonalise if args.toy else torch.compile(orthogonalise, dynamic=False)

    @torch.no_grad()
    def step(self, lr, decay=0.01):
        for s, vs, m in self.groups:
            g = torch.cat([v.grad.view(-1, *s) for v in vs])
            m.lerp_(g, 0.05)
            u = self.ns(g.lerp(m, 0.95)) * max(1, s[0] / s[1]) ** 0.5
            for v, d in zip(vs, u.split([v.numel() // (s[0] * s[1]) for v in vs])):
                v.mul_(1 - lr * decay).sub_(d.reshape(v.shape), alpha=lr)


slow = [v for k, v in adam.items() if "hc_" in k or k.endswith("attn_sink")]
wide = [adam["embed.weight"]]
rest = [v for v in adam.values() if not any(v is s for s in slow + wide)]
opt_a = torch.optim.AdamW([{"params": rest, "f": 1.0}, {"params": slow, "f": 0.7}, {"params": wide, "f": 3.0}], lr=args.adam,
                          betas=(0.9, 0.97), eps=1e-10, weight_decay=0, fused=not args.toy)
opt_m = Muon(muon)


# ---------------------------------------------------------------- loss

def cross_entropy(cfg, h, w, names, y, weight):
    z = M.hc_head(cfg, h, *names)
    l = M.mm(z, w).float()
    return (F.cross_entropy(l.flatten(0, 1), y.flatten(), reduction="none") * weight.flatten()).sum() / weight.sum().clamp_min(1)


ce = cross_entropy if args.toy else torch.compile(cross_entropy, dynamic=False)
HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight")
prep = M.prepare if args.toy else torch.compile(M.prepare, dynamic=False)
tables = {n: M.rope_tables(c, n, dev) for n in (short_len, long_len)}


def step_loss(cfg, batch, n, select):
    ids, wt = batch[0].long(), batch[1].float() / 255
    w = dict(prep(p), select=select)
    x, y1, y2 = ids[:, :n], ids[:, 1:n + 1], ids[:, 2:n + 2]
    h, idx, loads = M.forward(cfg, w, masks, x, tables[n], compiled=not args.toy)
    main = ce(cfg, h, w["head.weight"], [w[k] for k in HEAD], y1, wt[:, 1:n + 1])
    s, more = M.mtp_streams(cfg, w, h, y1, tables[n], compiled=not args.toy)
    draft = ce(cfg, s, w["head.weight"], [w["mtp.0." + k] for k in HEAD], y2, wt[:, 2:n + 2])
    return main, draft, idx, {**loads, **more}


def save(name):
    folder = f"{args.out}/{name}"
    cpu = {k: v.detach().float().cpu() for k, v in p.items()}
    export.export(folder, c, cpu, table)
    torch.save({k: v for k, v in cpu.items()}, args.out + "/master.pt.tmp")
    os.replace(args.out + "/master.pt.tmp", args.out + "/master.pt")


log = open(args.out + "/log.jsonl", "a")
begin, step, tokens, last, skipped = None, 0, 0, time.time(), 0
sums = {}
saved = time.time()
while True:
    t = 0.0 if begin is None else (time.time() - begin) / args.seconds
    if t >= 1:
        break
    stage2 = t >= args.stage2
    kind = "long" if stage2 and step % args.long_every == 0 or begin is None and step == 1 else "short"
    batch, fresh = queues[kind].get()
    batch = batch.to(dev, non_blocking=True)
    rate = min(1, (step + 1) / 150) * min(1, (1 - t) / args.decay) if args.decay else 1
    rate = max(rate, 0.01)
    n = long_len if kind == "long" else short_len
    main, draft, idx, loads = step_loss(c, batch, n, torch.full((), float(stage2), device=dev))
    total = main + 0.2 * draft + 0.3 * idx
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(adam.values()), 1.0, foreach=True)
    for g in opt_a.param_groups:
        g["lr"] = args.adam * rate * g["f"]
    opt_a.step()
    opt_m.step(args.muon * rate)
    for v in p.values():
        v.grad = None
    with torch.no_grad():
        for k, load in loads.items():          # balancing without an auxiliary loss
            p[k] += 1e-3 * torch.sign(load.mean() - load)
    step += 1
    tokens += batch.shape[1] * n
    if step == 3 and begin is None:
        begin = time.time()                    # compilation is not part of the schedule
        args.seconds = min(args.seconds, args.wall - (begin - start))
        print("first steps took", round(begin - start, 1), "s", flush=True)
    sums.setdefault(kind, []).append(torch.stack([main.detach(), draft.detach(), idx.detach(), norm]))
    if step % (2 if args.toy else 100) == 0 or step == 10:
        for k, v in sums.items():
            m = torch.stack(v).mean(0).tolist()
            row = dict(step=step, kind=k, t=round(t, 4), loss=round(m[0], 4), mtp=round(m[1], 4), index=round(m[2], 4), norm=round(m[3], 3),
                       tokens=tokens, tps=int(tokens / (time.time() - (begin or start))), lr=round(rate, 4), fresh=fresh,
                       balance=round(max(float(l.max()) for l in loads.values()), 3))
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            if not np.isfinite(m[0]):
                raise SystemExit("loss is not finite")
        sums = {}
    if time.time() - saved > 100 and not args.toy:
        saved = time.time()
        save("now")
        os.replace(f"{args.out}/now", f"{args.out}/latest") if not os.path.exists(f"{args.out}/latest") else os.system(f"rm -rf {args.out}/latest; mv {args.out}/now {args.out}/latest")
    if args.toy and step >= 30:
        break
save("final")
open(args.out + "/done", "w").write(f"{step} steps, {tokens} tokens\n")
print("done", step, tokens, flush=True)
