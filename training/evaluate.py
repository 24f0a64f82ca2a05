"""Held-out cases and their scores.

    python evaluate.py cases OUT_DIR                     writes the case files (prompts are rendered text with markers)
    python evaluate.py run MODEL_DIR CASES_DIR [OUT]     greedy decoding with the exported weights, scores per file
"""
import glob
import json
import os
import random
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "data"))
import skills
from chatfmt import D, EOS, ETHINK, render

TOK = os.path.join(HERE, "../models/ds4-nano/tokenizer.json")
MAX = {"story": 320, "chat": 100, "ds4": 120, "maths": 160, "dates": 140, "tools": 240, "tool_answer": 120, "extract": 220, "files": 220,
       "lists": 140, "recall": 60, "mode": 160}


def cases(out):
    os.makedirs(out, exist_ok=True)
    tok = None
    for skill in list(skills.SKILLS) + ["mode"]:
        r = random.Random("eval/" + skill)
        sizes = [("", 50)] if skill != "recall" else [("-1k", 30), ("-4k", 15), ("-8k", 15), ("-16k", 8)]
        for tag, n in sizes:
            want = {"": 0, "-1k": 1000, "-4k": 4000, "-8k": 8000, "-16k": 15800}[tag]
            rows, seen, tries = [], set(), 0
            while len(rows) < n and tries < 5000:
                tries += 1
                think = len(rows) % 2 == 1
                name = r.choice(["chat", "maths", "lists", "ds4", "story"]) if skill == "mode" else skill
                if name == "recall":
                    from tokenizers import Tokenizer
                    tok = tok or Tokenizer.from_file(TOK)
                    conv = skills.recall(r, "eval", int(want * 0.66))
                else:
                    conv = skills.SKILLS[name](r, "eval")
                prompt = render(conv, think, prompt_only=True)
                if name == "recall" and not 0.8 * want < len(tok.encode(prompt).ids) <= want * 1.02:
                    continue
                if prompt in seen:
                    continue
                seen.add(prompt)
                row = {"skill": skill + tag, "prompt": prompt, "think": think, "max_tokens": MAX[skill], "check": conv["check"]}
                if skill == "mode":
                    row["check"] = {"kind": "think"}
                rows.append(row)
            with open(f"{out}/{skill}{tag}.jsonl", "w") as f:
                for row in rows:
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(skill + tag, len(rows))


def parse_calls(text):
    """Calls of a tool block, or None where it is malformed."""
    m = re.fullmatch(rf"\s*<{D}tool_calls>\n(.*)</{D}tool_calls>", text, re.S)
    if not m:
        return None
    calls, rest = [], m.group(1)
    for c in re.finditer(rf'<{D}invoke name="([^"\n]*)">\n(.*?)</{D}invoke>\n', rest, re.S):
        args = {}
        for q in re.finditer(rf'<{D}parameter name="([^"\n]*)" string="(true|false)">(.*?)</{D}parameter>\n', c.group(2), re.S):
            try:
                args[q.group(1)] = q.group(3) if q.group(2) == "true" else json.loads(q.group(3))
            except ValueError:
                return None
        calls.append({"name": c.group(1), "arguments": args})
    return calls


def judge(case, text):
    """text: the completion without EOS."""
    k = case["check"]
    if case["think"]:
        if ETHINK not in text:
            return False
        reason, text = text.split(ETHINK, 1)
        if k["kind"] == "think":
            return bool(reason.strip()) and ETHINK not in text and bool(text.strip())
    elif k["kind"] == "think":
        return ETHINK not in text and "<think>" not in text and bool(text.strip())
    if k["kind"] == "exact":
        return text.strip() == k["value"]
    if k["kind"] == "contains":
        return re.search(rf"(?<!\w){re.escape(k['value'])}(?!\w)", text) is not None
    if k["kind"] == "json":
        try:
            return json.loads(text) == k["value"]
        except ValueError:
            return False
    return parse_calls(text) == k["calls"]


def run(folder, cases_dir, out=None):
    import torch
    from tokenizers import Tokenizer
    import export
    import model as M
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    dt = torch.bfloat16 if dev == "cuda" else torch.float32
    c = M.Config()
    p, table = export.read(folder)
    w = {k: v.to(dev) for k, v in M.prepare(p, rounded=False, dtype=dt).items()}      # the file holds rounded values
    masks = M.hash_masks(c, {k: v.to(dev) for k, v in table.items()})
    tok = Tokenizer.from_file(TOK)
    tables = M.rope_tables(c, 17000, dev)
    scores, samples = {}, []
    for path in sorted(glob.glob(cases_dir + "/*.jsonl")):
        rows = [json.loads(l) for l in open(path)]
        ids = [tok.encode(r["prompt"], add_special_tokens=False).ids for r in rows]
        order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
        done, t0 = {}, time.time()
        size = max(1, 65536 // (len(ids[order[-1]]) + 64))
        for at in range(0, len(order), size):
            part = order[at:at + size]
            seqs = {i: list(ids[i]) for i in part}
            live = list(part)
            for _ in range(max(rows[i]["max_tokens"] for i in part)):
                n = -(-max(len(seqs[i]) for i in live) // 64) * 64
                x = torch.full((len(live), n), 2)
                for q, i in enumerate(live):
                    x[q, :len(seqs[i])] = torch.tensor(seqs[i])
                with torch.no_grad():
                    h, _, _ = M.forward(c, w, masks, x.to(dev), {k: (a[:n], b[:n]) for k, (a, b) in tables.items()})
                    last = torch.tensor([len(seqs[i]) - 1 for i in live], device=dev)
                    nxt = M.logits(c, w, h[torch.arange(len(live), device=dev), last][:, None])[:, 0].argmax(-1).tolist()
                for i, t in zip(list(live), nxt):
                    if t != 1:
                        seqs[i].append(t)
                    if t == 1 or len(seqs[i]) - len(ids[i]) >= rows[i]["max_tokens"]:
                        live.remove(i)
                if not live:
                    break
            done.update({i: tok.decode(seqs[i][len(ids[i]):], skip_special_tokens=False) for i in part})
        good = [judge(r, done[i]) for i, r in enumerate(rows)]
        name = os.path.basename(path)[:-6]
        scores[name] = {"right": sum(good), "cases": len(rows), "think": sum(g for g, r in zip(good, rows) if r["think"]), "chat": sum(g for g, r in zip(good, rows) if not r["think"])}
        print(f"{name:14} {sum(good):3}/{len(rows)}  think {scores[name]['think']}  chat {scores[name]['chat']}  {time.time() - t0:.0f}s", flush=True)
        samples += [{"file": name, "prompt": rows[i]["prompt"][-300:], "check": rows[i]["check"], "output": done[i], "good": good[i]} for i in range(min(16, len(rows)))]
        if out:
            json.dump(scores, open(out + "/scores.json", "w"), indent=1)
            with open(out + "/samples.jsonl", "w") as f:
                for s in samples:
                    f.write(json.dumps(s, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cases(sys.argv[2]) if sys.argv[1] == "cases" else run(*sys.argv[2:])
