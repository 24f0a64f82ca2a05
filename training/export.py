"""Checkpoint files: export(params, hash tables) -> model.safetensors + config.json, and reading them back.

    python export.py random DIR     writes a randomly initialised checkpoint of the final form
"""
import json
import os
import struct
import sys

import numpy as np
import torch

import model as M
import quant

E2M1_CODES = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])


def e8m0(scale):
    """Power-of-two float32 scales as E8M0 bytes (the biased exponent)."""
    return ((scale.contiguous().view(torch.int32) >> 23) & 255).to(torch.uint8)


def pack_expert(w):
    s = quant.expert_scales(w)
    v = (quant.blocks(w, 32) / s[..., None]).clamp(-6, 6)
    q = quant.e2m1(v).reshape(w.shape)
    code = torch.bucketize(q.abs(), E2M1_CODES).to(torch.uint8) | ((q < 0).to(torch.uint8) << 3)
    return code[:, 0::2] | (code[:, 1::2] << 4), e8m0(s)


def pack_dense(w):
    s = quant.dense_scales(w)
    full = s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:w.shape[0], :w.shape[1]]
    return (w / full).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), e8m0(s)


def tensors(p, table):
    """name -> (dtype, shape, bytes) in the checkpoint's form."""
    out = {}

    def put(name, dtype, t, raw=None):
        out[name] = (dtype, list(t.shape), (raw if raw is not None else t.contiguous().numpy()).tobytes())

    for name, t in sorted(p.items()):
        t = t.detach().float().cpu().contiguous()
        k = M.storage_class(name)
        if k == "fp4":
            base, leaf = name.rsplit(".", 1)
            for e in range(t.shape[0]):
                q, s = pack_expert(t[e])
                put(f"{base}.{e}.{leaf}.weight", "I8", q)
                put(f"{base}.{e}.{leaf}.scale", "F8_E8M0", s)
        elif k == "fp8":
            q, s = pack_dense(t)
            put(name, "F8_E4M3", q)
            put(name.replace(".weight", ".scale"), "F8_E8M0", s)
        elif k == "bf16":
            b = t.bfloat16()
            put(name, "BF16", b, b.view(torch.int16).numpy())
        else:
            put(name, "F32", t)
    for name, t in table.items():
        put(name, "I64", t.cpu().long())
    return out


def write_safetensors(path, items):
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for n, (dt, shape, raw) in items.items():
        head[n] = {"dtype": dt, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    h = json.dumps(head, separators=(",", ":")).encode()
    h += b" " * (-len(h) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h)
        for _, _, raw in items.values():
            f.write(raw)


def config_json(c):
    return {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": c.vocab, "hidden_size": c.dim,
        "num_hidden_layers": len(c.ratios), "num_attention_heads": c.heads, "num_key_value_heads": 1, "head_dim": c.head_dim,
        "qk_rope_head_dim": c.rope_dim, "q_lora_rank": c.q_lora, "o_groups": c.o_groups, "o_lora_rank": c.o_lora,
        "sliding_window": c.window, "compress_ratios": list(c.ratios) + [0], "compress_rope_theta": c.compress_rope_base,
        "rope_theta": c.rope_base,
        "rope_scaling": {"type": "yarn", "factor": c.yarn_factor, "original_max_position_embeddings": c.yarn_orig,
                         "beta_fast": c.yarn_fast, "beta_slow": c.yarn_slow},
        "max_position_embeddings": c.context, "index_n_heads": c.idx_heads, "index_head_dim": c.idx_dim,
        "index_topk": c.idx_topk, "hc_mult": c.hc, "hc_sinkhorn_iters": c.sinkhorn_iters, "hc_eps": c.hc_eps,
        "rms_norm_eps": c.eps, "n_routed_experts": c.experts, "n_shared_experts": 1, "num_experts_per_tok": c.experts_used,
        "num_hash_layers": c.hash_layers, "moe_intermediate_size": c.inter, "routed_scaling_factor": c.route_scale,
        "norm_topk_prob": True, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "swiglu_limit": c.swiglu_limit,
        "num_nextn_predict_layers": 1, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "torch_dtype": "bfloat16", "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
                                "activation_scheme": "dynamic"}}


def export(folder, c, p, table):
    os.makedirs(folder, exist_ok=True)
    write_safetensors(folder + "/model.safetensors", tensors(p, table))
    with open(folder + "/config.json", "w") as f:
        json.dump(config_json(c), f, indent=2)
        f.write("\n")


def read(folder):
    """Decodes a checkpoint back into (parameters as float32, hash tables)."""
    raw = open(folder + "/model.safetensors", "rb").read()
    n = struct.unpack_from("<Q", raw)[0]
    head = json.loads(raw[8:8 + n])
    head.pop("__metadata__")
    base, t = 8 + n, {}
    for name, i in head.items():
        b = np.frombuffer(raw, np.uint8, i["data_offsets"][1] - i["data_offsets"][0], base + i["data_offsets"][0]).copy()
        b = torch.from_numpy(b)
        kind = {"F32": torch.float32, "I64": torch.int64, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}.get(i["dtype"])
        t[name] = (b if kind is None else b.view(kind)).view(i["shape"])
    p, table, experts = {}, {}, {}
    for name, v in t.items():
        if name.endswith(".scale"):
            continue
        if "tid2eid" in name:
            table[name] = v
            continue
        s = t.get(name.replace(".weight", ".scale")) if name.endswith(".weight") else None
        if s is not None:
            s = torch.exp2(s.float() - 127)
        if ".experts." in name and "shared" not in name:
            code = torch.stack([v & 15, v >> 4], -1).flatten(1).long()
            val = E2M1_CODES[code & 7] * torch.where(code >= 8, -1.0, 1.0)
            val = (quant.blocks(val, 32) * s[..., None]).reshape(val.shape)
            base_name, e, leaf, _ = name.rsplit(".", 3)
            experts.setdefault(f"{base_name}.{leaf}", {})[int(e)] = val
        elif s is not None:
            p[name] = v.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:v.shape[0], :v.shape[1]]
        else:
            p[name] = v.float()
    for name, es in experts.items():
        p[name] = torch.stack([es[i] for i in range(len(es))])
    return p, table


if __name__ == "__main__":
    c = M.Config()
    folder = sys.argv[2]
    p = M.init_params(c, 7)
    for k in p:                              # nothing degenerate in a test checkpoint
        if k.endswith(("attn_sink", "ape", "gate.bias")):
            p[k] = torch.randn(p[k].shape) * 0.1
    t = M.init_hash(c)
    export(folder, c, p, t)
    q, t2 = read(folder)
    ref = M.prepare(p, True, torch.float32)
    assert set(q) == set(ref) and all(torch.equal(q[k], ref[k]) for k in q), [k for k in q if not torch.equal(q[k], ref[k])]
    assert all(torch.equal(t[k], t2[k]) for k in t)
    print(sum(v.numel() for v in p.values()), "parameters,", os.path.getsize(folder + "/model.safetensors"), "bytes; round trip exact")
