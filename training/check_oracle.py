"""Compares model.py with the numpy reference's fixture: python check_oracle.py ORACLE_DIR FIXTURE_DIR"""
import json
import sys

import numpy as np
import torch

oracle, fixture = sys.argv[1:3]
sys.path.insert(0, oracle)
import reference_numpy as ref
import model as M

NAMES = {"attn_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight", "attn_q_a": "attn.wq_a.weight",
         "attn_q_a_norm": "attn.q_norm.weight", "attn_q_b": "attn.wq_b.weight", "attn_kv": "attn.wkv.weight",
         "attn_kv_a_norm": "attn.kv_norm.weight", "attn_sinks": "attn.attn_sink", "attn_output_a": "attn.wo_a.weight",
         "attn_output_b": "attn.wo_b.weight", "indexer.attn_q_b": "attn.indexer.wq_b.weight",
         "indexer.proj": "attn.indexer.weights_proj.weight", "ffn_gate_inp": "ffn.gate.weight",
         "exp_probs_b": "ffn.gate.bias", "ffn_gate_exps": "ffn.experts.w1", "ffn_up_exps": "ffn.experts.w3",
         "ffn_down_exps": "ffn.experts.w2", "ffn_gate_shexp": "ffn.shared_experts.w1.weight",
         "ffn_up_shexp": "ffn.shared_experts.w3.weight", "ffn_down_shexp": "ffn.shared_experts.w2.weight"}
for site in ("hc_attn", "hc_ffn", "hc_head"):
    for n in ("fn", "base", "scale"):
        NAMES[f"{site}_{n}"] = f"{site}_{n}"
for a, b in (("attn_compressor_", "attn.compressor."), ("indexer_compressor_", "attn.indexer.compressor.")):
    NAMES.update({a + "kv": b + "wkv.weight", a + "gate": b + "wgate.weight", a + "ape": b + "ape", a + "norm": b + "norm.weight"})
TOP = {"token_embd.weight": "embed.weight", "output.weight": "head.weight", "output_norm.weight": "norm.weight",
       **{f"output_hc_{n}.weight": f"hc_head_{n}" for n in ("fn", "base", "scale")}}


def ours(name):
    if name in TOP:
        return TOP[name]
    prefix, leaf = ("mtp.0.", name[6:]) if name.startswith("mtp.0.") else ("layers.%s." % name.split(".")[1], name.split(".", 2)[2])
    leaf = leaf.rsplit(".", 1)[0]
    return prefix + NAMES.get(leaf, leaf + ".weight")


def load(dtype):
    c = json.load(open(fixture + "/meta.json"))["config"]
    cfg = dict(vocab=c["vocab"], dim=c["hidden"], ratios=tuple(c["ratios"]), heads=c["heads"], head_dim=c["head_dim"],
               rope_dim=c["rope_dim"], q_lora=c["q_lora"], o_groups=c["o_groups"], o_lora=c["o_lora"], window=c["window"],
               experts=c["experts"], experts_used=c["experts_used"], inter=c["inter"], hash_layers=c["hash_layers"],
               idx_heads=c["idx_heads"], idx_dim=c["idx_dim"], idx_topk=c["idx_topk"], yarn_orig=c["yarn_orig_ctx"])
    p, table = {}, {}
    for f in ("model.gguf", "mtp.gguf"):
        g = ref.Gguf(fixture + "/" + f)
        for name in g.info:
            if "tid2eid" in name:
                table["layers.%s.ffn.gate.tid2eid" % name.split(".")[1]] = torch.tensor(np.array(g.tensor(name))).long()
            else:
                p[ours(name)] = torch.tensor(np.array(g.tensor(name))).to(dtype)
    return cfg, p, table


tokens = torch.tensor(np.load(fixture + "/tokens.npy")).long()[None]
rows, mrows = (torch.tensor(np.load(f"{fixture}/{n}.npy")).long() for n in ("logit_positions", "mtp_positions"))
want = {n: torch.tensor(np.load(f"{fixture}/{n}.npy")).double() for n in ("logits", "logits_qat", "mtp_logits")}
for dtype in (torch.float64, torch.float32):
    kw, p, table = load(dtype)
    for rounded in (False, True):
        c = M.Config(**kw, round_cache=rounded)
        missing = set(M.shapes(c)) ^ set(p)
        assert not missing, missing
        masks = {k: v.to(dtype) for k, v in M.hash_masks(c, table).items()}
        tables = M.rope_tables(c, tokens.shape[1], "cpu", dtype)
        w = M.prepare(p, rounded=False, dtype=dtype)
        with torch.no_grad():
            h, _, _ = M.forward(c, w, masks, tokens, tables)
            got = M.logits(c, w, h)[0, rows].double()
            ref_l = want["logits_qat" if rounded else "logits"]
            err = (got - ref_l).abs().amax(-1)
            line = f"{str(dtype):14} rounding={rounded}: max {err.max():.2e} median {err.median():.2e} argmax {(got.argmax(-1) == ref_l.argmax(-1)).double().mean():.3f}"
            if not rounded:
                t2 = M.rope_tables(c, tokens.shape[1] - 1, "cpu", dtype)
                s, _ = M.mtp_streams(c, w, h[:, :-1], tokens[:, 1:], t2)
                line += f"  mtp max {(M.mtp_logits(c, w, s)[0, mrows].double() - want['mtp_logits']).abs().max():.2e}"
            print(line)
        assert err.median() < (5e-3 if rounded else 1e-4)
print("ok")
