"""ds4-nano: the DeepSeek V4 architecture for training, as functions over a dict of named tensors.

Names follow the checkpoint, except that the routed experts of a layer are stacked ([experts, out, in]).  `prepare` turns
the float32 master weights into the values that are stored (rounded straight-through); `forward` runs whole sequences.
Streams, norms, softmax, routing, compressors and hyper-connections run in float32; large products take the dtype of the weights.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import quant
from sinkhorn import sinkhorn


@dataclass(frozen=True)
class Config:
    vocab: int = 4096
    dim: int = 256
    ratios: tuple = (0, 0, 4, 128, 4, 128)
    hc: int = 4
    sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    eps: float = 1e-6
    heads: int = 4
    head_dim: int = 128
    rope_dim: int = 64
    q_lora: int = 128
    o_groups: int = 2
    o_lora: int = 64
    window: int = 64
    experts: int = 8
    experts_used: int = 4
    inter: int = 256
    hash_layers: int = 2
    idx_heads: int = 4
    idx_dim: int = 128
    idx_topk: int = 128
    swiglu_limit: float = 10.0
    route_scale: float = 1.5
    rope_base: float = 10000.0
    compress_rope_base: float = 160000.0
    yarn_factor: float = 16.0
    yarn_orig: int = 65536
    yarn_fast: float = 32.0
    yarn_slow: float = 1.0
    context: int = 65536
    mtp: bool = True
    # what a run simulates: cache rounding (A.9) and the selection of compressed rows
    round_cache: bool = True
    select: bool = True


# ---------------------------------------------------------------- parameters

def layer_shapes(c, ratio, hashed):
    d, hd = c.dim, c.head_dim
    mix = (2 + c.hc) * c.hc
    s = {"attn.wq_a.weight": (c.q_lora, d), "attn.q_norm.weight": (c.q_lora,),
         "attn.wq_b.weight": (c.heads * hd, c.q_lora), "attn.wkv.weight": (hd, d), "attn.kv_norm.weight": (hd,),
         "attn.wo_a.weight": (c.o_groups * c.o_lora, c.heads // c.o_groups * hd),
         "attn.wo_b.weight": (d, c.o_groups * c.o_lora), "attn.attn_sink": (c.heads,)}

    def compressor(p, width):
        n = width * (2 if ratio == 4 else 1)
        s.update({p + "wkv.weight": (n, d), p + "wgate.weight": (n, d), p + "ape": (ratio, n), p + "norm.weight": (width,)})

    if ratio:
        compressor("attn.compressor.", hd)
    if ratio == 4:
        s["attn.indexer.wq_b.weight"] = (c.idx_heads * c.idx_dim, c.q_lora)
        s["attn.indexer.weights_proj.weight"] = (c.idx_heads, d)
        compressor("attn.indexer.compressor.", c.idx_dim)
    s.update({"ffn.gate.weight": (c.experts, d),
              "ffn.experts.w1": (c.experts, c.inter, d), "ffn.experts.w3": (c.experts, c.inter, d),
              "ffn.experts.w2": (c.experts, d, c.inter), "ffn.shared_experts.w1.weight": (c.inter, d),
              "ffn.shared_experts.w3.weight": (c.inter, d), "ffn.shared_experts.w2.weight": (d, c.inter),
              "attn_norm.weight": (d,), "ffn_norm.weight": (d,)})
    if not hashed:
        s["ffn.gate.bias"] = (c.experts,)
    for site in ("hc_attn", "hc_ffn"):
        s.update({site + "_fn": (mix, c.hc * d), site + "_base": (mix,), site + "_scale": (3,)})
    return s


def head_shapes(c):
    return {"hc_head_fn": (c.hc, c.hc * c.dim), "hc_head_base": (c.hc,), "hc_head_scale": (1,), "norm.weight": (c.dim,)}


def shapes(c):
    s = {"embed.weight": (c.vocab, c.dim), "head.weight": (c.vocab, c.dim), **head_shapes(c)}
    for i, r in enumerate(c.ratios):
        s.update({f"layers.{i}.{k}": v for k, v in layer_shapes(c, r, i < c.hash_layers).items()})
    if c.mtp:
        m = {**layer_shapes(c, 0, False), **head_shapes(c), "e_proj.weight": (c.dim, c.dim), "h_proj.weight": (c.dim, c.dim),
             "enorm.weight": (c.dim,), "hnorm.weight": (c.dim,)}
        s.update({"mtp.0." + k: v for k, v in m.items()})
    return s


def hash_table(c, layer, seed):
    """Token id -> experts, fixed and balanced: rows come from shuffled permutations of the experts."""
    g = torch.Generator().manual_seed(seed * 1000 + layer)
    rows = []
    while len(rows) < c.vocab:
        p = torch.randperm(c.experts, generator=g)
        rows += [p[i:i + c.experts_used] for i in range(0, c.experts - c.experts_used + 1, c.experts_used)]
    return torch.stack(rows[:c.vocab])


def init_params(c, seed=1):
    g = torch.Generator().manual_seed(seed)
    p = {}
    for name, shape in shapes(c).items():
        leaf = name.split(".", 2)[-1] if name.startswith(("layers.", "mtp.")) else name
        layer = int(name.split(".")[1]) if name.startswith("layers.") else len(c.ratios)
        if leaf.endswith("norm.weight"):
            t = torch.ones(shape)
        elif leaf.endswith("_scale"):
            t = torch.full(shape, 0.2)
        elif leaf.endswith("_base"):
            t = 0.3 * torch.randn(shape, generator=g)
            if len(t) > c.hc:            # each sublayer mainly reads one stream; streams mostly keep to themselves
                pre = torch.full((c.hc,), -1.0)
                pre[(2 * layer + ("ffn" in leaf)) % c.hc] = 1.0
                t[:c.hc] = pre
                t[2 * c.hc:] = (4 * torch.eye(c.hc) - 2).flatten() + 0.1 * t[2 * c.hc:]
        elif leaf.endswith(("attn_sink", "ape", "gate.bias")):
            t = torch.zeros(shape)
        elif leaf.endswith("_fn"):
            t = 0.02 * torch.randn(shape, generator=g)
        elif leaf == "embed.weight":
            t = 0.5 * torch.randn(shape, generator=g)
        elif leaf == "head.weight":
            t = 0.02 * torch.randn(shape, generator=g)
        else:
            t = torch.randn(shape, generator=g) * shape[-1] ** -0.5
            if leaf.endswith(("wo_b.weight", "w2", "w2.weight")):
                t *= 0.3                 # sublayers start small beside the streams
        p[name] = t
    return p


def init_hash(c, seed=1):
    return {f"layers.{i}.ffn.gate.tid2eid": hash_table(c, i, seed) for i in range(c.hash_layers)}


def storage_class(name):
    """How a tensor is stored: experts FP4, dense projections FP8, sensitive matrices BF16, the rest F32."""
    if ".experts." in name:
        return "fp4"
    if name in ("embed.weight", "head.weight") or name.endswith(("weights_proj.weight", "ffn.gate.weight")) or \
            name.endswith(("wgate.weight", "compressor.wkv.weight")):
        return "bf16"
    if name.endswith((".wq_a.weight", ".wq_b.weight", ".wkv.weight", ".wo_a.weight", ".wo_b.weight", "_proj.weight")) or \
            "shared_experts" in name:
        return "fp8"
    return "f32"


ROUND = {"fp4": quant.round_expert, "fp8": quant.round_dense, "bf16": quant.round_bf16}
KEEP = ("ffn.gate.weight", "wgate.weight", "compressor.wkv.weight", "weights_proj.weight")    # bf16 values, f32 products


def prepare(p, rounded=True, dtype=torch.bfloat16):
    """Weights as the forward pass sees them."""
    out = {}
    for name, t in p.items():
        k = storage_class(name)
        if rounded and k != "f32":
            t = quant.straight(ROUND[k], t)
        if k != "f32" and not name.endswith(KEEP):
            t = t.to(dtype)
        out[name] = t
    return out


def prepare_layer(w, prefix):
    """One layer's weights; routed and shared experts joined into wide matrices, since all are computed for all tokens."""
    l = {k[len(prefix):]: v for k, v in w.items() if k.startswith(prefix)}
    for m in ("w1", "w3", "w2"):
        l["all_" + m] = torch.cat([l.pop(f"ffn.experts.{m}"), l.pop(f"ffn.shared_experts.{m}.weight")[None]])
    if "select" in w:
        l["select"] = w["select"]
    return l


# ---------------------------------------------------------------- pieces

def mm(x, w):
    return F.linear(x.to(w.dtype), w)


def rms(x, w=None, eps=1e-6):
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if w is None else y * w


def inv_freq(c, ratio):
    n = c.rope_dim
    base = c.compress_rope_base if ratio else c.rope_base
    inv = 1 / torch.tensor([base ** (i / n) for i in range(0, n, 2)], dtype=torch.float64).float()
    if not ratio:
        return inv
    corr = lambda rot: n * math.log(c.yarn_orig / (rot * 2 * math.pi)) / (2 * math.log(base))
    lo, hi = max(math.floor(corr(c.yarn_fast)), 0), min(math.ceil(corr(c.yarn_slow)), n - 1)
    ramp = ((torch.arange(n // 2).float() - lo) / max(hi - lo, 0.001)).clamp(0, 1)
    keep = 1 - ramp
    return inv / c.yarn_factor * (1 - keep) + inv * keep


def rope_tables(c, n, device, dtype=torch.float32):
    """(cos, sin) per kind of layer; angles are float32 products, as in the reference."""
    out = {}
    for kind, r in (("plain", 0), ("compress", 4)):
        ang = (torch.arange(n).float()[:, None] * inv_freq(c, r)[None]).double()
        out[kind] = (ang.cos().to(device, dtype), ang.sin().to(device, dtype))
    return out


def rope(x, cos, sin):
    """x [B, S, ..., d]: rotate adjacent pairs of the last channels.  cos, sin [S, R/2]."""
    n = 2 * cos.shape[-1]
    shape = (1, cos.shape[0]) + (1,) * (x.dim() - 3) + (cos.shape[1],)
    cos, sin = cos.view(shape), sin.view(shape)
    keep, rot = x[..., :-n], x[..., -n:].unflatten(-1, (-1, 2))
    a, b = rot[..., 0], rot[..., 1]
    rot = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([keep, rot], -1)


def round_row(c, x, dtype):
    if not c.round_cache:
        return x.to(dtype)
    n = c.rope_dim
    return torch.cat([quant.straight(quant.round_fp8, x[..., :-n]), x[..., -n:]], -1).to(dtype)


def round_index(c, x, dtype):
    return (quant.straight(quant.round_fp4, quant.hadamard(x)) if c.round_cache else x).to(dtype)


def hc_split(c, h, fn, base, scale):
    n = c.hc
    flat = h.flatten(-2)
    m = F.linear(flat, fn) * torch.rsqrt((flat * flat).mean(-1, keepdim=True) + c.eps)
    pre = torch.sigmoid(m[..., :n] * scale[0] + base[:n]) + c.hc_eps
    post = 2 * torch.sigmoid(m[..., n:2 * n] * scale[1] + base[n:2 * n])
    a = (m[..., 2 * n:] * scale[2] + base[2 * n:]).unflatten(-1, (n, n))
    return (pre.unsqueeze(-1) * h).sum(-2), post, sinkhorn(a, c.sinkhorn_iters, c.hc_eps)


def hc_join(y, h, post, mix):
    return post.unsqueeze(-1) * y.unsqueeze(-2) + (mix.unsqueeze(-1) * h.unsqueeze(-2)).sum(-3)


def hc_head(c, h, fn, base, scale, norm):
    flat = h.flatten(-2)
    m = F.linear(flat, fn) * torch.rsqrt((flat * flat).mean(-1, keepdim=True) + c.eps)
    pre = torch.sigmoid(m * scale[0] + base) + c.hc_eps
    return rms((pre.unsqueeze(-1) * h).sum(-2), norm, c.eps)


def compress(c, x, w, p, ratio, tables):
    """Rows of all complete windows, rotated at the position of their first token."""
    n = x.shape[1] // ratio
    x = x[:, :n * ratio]
    kv = F.linear(x, w[p + "wkv.weight"]).unflatten(1, (n, ratio))
    gate = F.linear(x, w[p + "wgate.weight"]).unflatten(1, (n, ratio)) + w[p + "ape"]
    if ratio == 4:
        # the first half of a token's channels belongs to the next window, the second half to its own
        d = kv.shape[-1] // 2
        back = lambda t, fill: F.pad(t[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=fill)
        kv = torch.cat([back(kv, 0.0), kv[..., d:]], 2)
        gate = torch.cat([back(gate, -1e30), gate[..., d:]], 2)
    rows = rms((kv * gate.softmax(2)).sum(2), w[p + "norm.weight"], c.eps)
    cos, sin = tables
    return rope(rows, cos[:n * ratio:ratio], sin[:n * ratio:ratio])


def index_scores(c, x, qr, w, tables, dtype):
    """Scores of compressed rows [B, S, T].  The caller detaches x and qr: only the divergence loss trains the indexer."""
    p = "attn.indexer."
    keys = round_index(c, compress(c, x, w, p + "compressor.", 4, tables), dtype)
    q = mm(qr, w[p + "wq_b.weight"]).unflatten(-1, (c.idx_heads, c.idx_dim)).to(x.dtype)
    q = round_index(c, rope(q, *tables), dtype)
    a = F.linear(x, w[p + "weights_proj.weight"]) * (c.idx_dim * c.idx_heads) ** -0.5
    dots = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, (x.shape[1], c.idx_heads))
    return (dots.to(x.dtype).relu() * a.unsqueeze(-1)).sum(2)


def attention(c, x, w, ratio, tables):
    """Window rows and compressed rows under one softmax with a sink.  Returns the output and the indexer's loss."""
    B, S, _ = x.shape
    W, H, d = c.window, c.heads, c.head_dim
    f, dt = x.dtype, w["attn.wq_b.weight"].dtype
    qr = rms(mm(x, w["attn.wq_a.weight"]).to(f), w["attn.q_norm.weight"], c.eps)
    q = rms(mm(qr, w["attn.wq_b.weight"]).to(f).unflatten(-1, (H, d)), None, c.eps)
    q = rope(q, *tables).to(dt)
    kv = rms(mm(x, w["attn.wkv.weight"]).to(f), w["attn.kv_norm.weight"], c.eps)
    kv = round_row(c, rope(kv, *tables), dt)
    # window: blocks of W queries against their own and the previous block of rows
    nb = -(-S // W)
    pad = nb * W - S
    kb = F.pad(kv, (0, 0, 0, pad)).unflatten(1, (nb, W))
    keys = torch.cat([F.pad(kb[:, :-1], (0, 0, 0, 0, 1, 0)), kb], 2)
    qb = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (nb, W))
    sw = torch.matmul(qb.flatten(2, 3), keys.transpose(2, 3)).view(B, nb, W, H, 2 * W).to(f) * d ** -0.5
    i, j = torch.arange(W, device=x.device)[:, None], torch.arange(2 * W, device=x.device)[None]
    ok = (i + W - j >= 0) & (i + W - j < W)
    ok = ok[None] & ((torch.arange(nb, device=x.device)[:, None, None] > 0) | (j >= W)[None])
    sw = sw.masked_fill(~ok[None, :, :, None, :], -1e30)
    sink = w["attn.attn_sink"].view(1, 1, H)
    top = torch.maximum(sw.flatten(1, 2)[:, :S].amax(-1), sink)
    loss = x.new_zeros(())
    ratio = ratio if S >= ratio else 0          # too short for a single compressed row
    if ratio:
        rows = round_row(c, compress(c, x, w, "attn.compressor.", ratio, tables), dt)
        T = rows.shape[1]
        seen = torch.arange(T, device=x.device)[None] < ((torch.arange(S, device=x.device) + 1) // ratio)[:, None]
        sc = torch.matmul(q.flatten(1, 2), rows.transpose(1, 2)).view(B, S, H, T).to(f) * d ** -0.5
        sc = sc.masked_fill(~seen[None, :, None, :], -1e30)
        top = torch.maximum(top, sc.amax(-1))
    top = top.detach()
    ew = torch.exp(sw - F.pad(top, (0, 0, 0, pad)).view(B, nb, W, H, 1))
    den = ew.sum(-1).flatten(1, 2)[:, :S] + torch.exp(sink - top)
    o = torch.matmul(ew.to(dt).flatten(2, 3), keys).view(B, nb * W, H, d)[:, :S].to(f)
    if ratio:
        ec = torch.exp(sc - top.unsqueeze(-1))
        if ratio == 4:
            score = index_scores(c, x.detach(), qr.detach(), w, tables, dt).masked_fill(~seen[None], -1e30)
            with torch.no_grad():        # target: the attention all visible rows would get, summed over heads
                p = (ec / (den + ec.sum(-1)).unsqueeze(-1)).sum(2)
                p = p / p.sum(-1, keepdim=True).clamp_min(1e-9)
                entropy = -(p * p.clamp_min(1e-9).log()).sum(-1)
            some = seen[:, :1].to(f)[None, :, 0]
            kl = torch.logsumexp(score, -1) - (p * score).sum(-1) - entropy
            loss = (kl * some).mean()
            if c.select and T > c.idx_topk:
                with torch.no_grad():
                    kth = score.topk(c.idx_topk, -1).values[..., -1:]
                    keep = score >= kth
                    if "select" in w:                # a switch that needs no recompilation
                        keep = keep | (w["select"] < 0.5)
                ec = ec * keep.unsqueeze(2)
        den = den + ec.sum(-1)
        o = o + torch.matmul(ec.to(dt).flatten(1, 2), rows).view(B, S, H, d).to(f)
    o = o / den.unsqueeze(-1)
    cos, sin = tables
    o = rope(o, cos, -sin).to(dt).view(B, S, c.o_groups, -1)
    low = torch.einsum("bsgk,grk->bsgr", o, w["attn.wo_a.weight"].view(c.o_groups, c.o_lora, -1))
    return mm(low.flatten(2), w["attn.wo_b.weight"]).to(f), loss


def ffn(c, x, w, chosen):
    """All experts for all tokens (they are few and small), weighted by the router; the shared expert has weight 1."""
    f, dt = x.dtype, w["all_w1"].dtype
    p = torch.sqrt(F.softplus(F.linear(x, w["ffn.gate.weight"])))
    if chosen is None:
        z = (p + w["ffn.gate.bias"]).detach()
        e = torch.arange(c.experts, device=x.device)
        ahead = (z.unsqueeze(-2) > z.unsqueeze(-1)) | ((z.unsqueeze(-2) == z.unsqueeze(-1)) & (e[None] < e[:, None]))
        chosen = (ahead.sum(-1) < c.experts_used).to(f)
    g = p * chosen
    g = c.route_scale * g / g.sum(-1, keepdim=True)
    g = torch.cat([g, torch.ones_like(g[..., :1])], -1)
    gate, up = mm(x, w["all_w1"].flatten(0, 1)).to(f), mm(x, w["all_w3"].flatten(0, 1)).to(f)
    mid = F.silu(gate.clamp(max=c.swiglu_limit)) * up.clamp(-c.swiglu_limit, c.swiglu_limit)
    mid = (mid.unflatten(-1, (c.experts + 1, c.inter)) * g.unsqueeze(-1)).flatten(-2)
    down = w["all_w2"].permute(1, 0, 2).flatten(1)
    return F.linear(mid.to(dt), down).to(f), chosen.detach().mean((0, 1))


def block(c, ratio, h, w, tables, chosen):
    """One layer.  Returns streams, the indexer loss and the share of tokens each expert received."""
    u, post, mix = hc_split(c, h, w["hc_attn_fn"], w["hc_attn_base"], w["hc_attn_scale"])
    y, loss = attention(c, rms(u, w["attn_norm.weight"], c.eps), w, ratio, tables)
    h = hc_join(y, h, post, mix)
    u, post, mix = hc_split(c, h, w["hc_ffn_fn"], w["hc_ffn_base"], w["hc_ffn_scale"])
    y, load = ffn(c, rms(u, w["ffn_norm.weight"], c.eps), w, chosen)
    return hc_join(y, h, post, mix), loss, load


@functools.lru_cache(None)
def compiled_block(c, ratio, hashed):
    """A separate compiled function per kind of layer, so that each is specialised once per sequence length."""
    def fn(h, w, tables, chosen):
        return block(c, ratio, h, w, tables, chosen)
    return torch.compile(fn, dynamic=False)


# ---------------------------------------------------------------- whole model

def hash_masks(c, table):
    """tid2eid as a [vocab, experts] table of zeros and ones per hash layer."""
    return {k: torch.zeros(t.shape[0], c.experts, device=t.device).scatter_(1, t, 1.0) for k, t in table.items()}


def run_block(c, ratio, h, w, tables, chosen, compiled):
    kind = tables["compress" if ratio else "plain"]
    if compiled:
        return compiled_block(c, ratio, chosen is not None)(h, w, kind, chosen)
    return block(c, ratio, h, w, kind, chosen)


def forward(c, w, masks, tokens, tables, compiled=False):
    """Final streams [B, S, streams, D], summed indexer loss, and expert shares per layer."""
    x = F.embedding(tokens, w["embed.weight"]).to(w["norm.weight"].dtype)
    h = x.unsqueeze(2).expand(-1, -1, c.hc, -1).contiguous()
    losses, loads = x.new_zeros(()), {}
    for i, r in enumerate(c.ratios):
        p = f"layers.{i}."
        mask = masks.get(p + "ffn.gate.tid2eid")
        chosen = None if mask is None else F.embedding(tokens, mask).to(h.dtype)
        h, loss, load = run_block(c, r, h, prepare_layer(w, p), tables, chosen, compiled)
        losses = losses + loss
        if chosen is None:
            loads[p + "ffn.gate.bias"] = load
    return h, losses, loads


def logits(c, w, h):
    z = hc_head(c, h, w["hc_head_fn"], w["hc_head_base"], w["hc_head_scale"], w["norm.weight"])
    return mm(z, w["head.weight"])


def mtp_streams(c, w, h, next_tokens, tables, compiled=False):
    """Draft block: streams at t and token t+1 give streams for token t+2."""
    m = {k[6:]: v for k, v in w.items() if k.startswith("mtp.0.")}
    e = F.embedding(next_tokens, w["embed.weight"]).to(h.dtype)
    e = mm(rms(e, m["enorm.weight"], c.eps), m["e_proj.weight"]).to(h.dtype)
    s = mm(rms(h, m["hnorm.weight"], c.eps), m["h_proj.weight"]).to(h.dtype) + e.unsqueeze(2)
    s, _, load = run_block(c, 0, s, prepare_layer(w, "mtp.0."), tables, None, compiled)
    return s, {"mtp.0.ffn.gate.bias": load}


def mtp_logits(c, w, s):
    p = "mtp.0."
    z = hc_head(c, s, w[p + "hc_head_fn"], w[p + "hc_head_base"], w[p + "hc_head_scale"], w[p + "norm.weight"])
    return mm(z, w["head.weight"])
