"""Trains the 4096-id byte-level BPE on generated text: python tokenizer.py OFFICIAL_TOKENIZER_JSON OUT_DIR

The pre-tokenizer is the official one, copied from the official tokenizer.json.  During training digits are split singly,
so no merge ever joins two digits and sums can be learned digit by digit.
"""
import json
import os
import random
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"))
import make
from chatfmt import ASSISTANT, BOS, D, EOS, ETHINK, PAD, THINK, USER

SPECIAL = [BOS, EOS, PAD]
MARKERS = [USER, ASSISTANT, THINK, ETHINK, D, "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>",
           "<｜title｜>", "<｜read_url｜>", "<｜extracted_url｜>"]
VOCAB = 4096


def texts(count):
    r = random.Random("tokenizer")
    for _ in range(count):
        t = "".join(t for t, _ in make.document(r))
        for m in SPECIAL + MARKERS:
            t = t.replace(m, "\x00")
        yield from t.split("\x00")
    yield from ["ds4 ds4-rs ds4-nano GGUF gguf DeepSeek V4 Flash"] * 50


def main(official, out):
    pre = json.load(open(official))["pre_tokenizer"]
    t = Tokenizer(models.BPE())
    from tokenizers import Regex
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")] +
        [pre_tokenizers.Split(Regex(p["pattern"]["Regex"]), "isolated") for p in pre["pretokenizers"][1:3]] +
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    size = VOCAB - len(SPECIAL) - len(MARKERS)
    t.train_from_iterator(texts(30000), trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    j = json.loads(t.to_str())
    order = sorted(j["model"]["vocab"], key=j["model"]["vocab"].get)
    vocab = {w: i for i, w in enumerate(SPECIAL + order)}
    at = len(vocab)
    # if the data offered fewer merges than asked for, the rest of the range is filled with placeholders below the markers
    added = [(w, i, True) for i, w in enumerate(SPECIAL)]
    while at < VOCAB - len(MARKERS):
        added.append((f"<｜place▁holder▁no▁{at}｜>", at, True))
        at += 1
    added += [(w, VOCAB - len(MARKERS) + i, False) for i, w in enumerate(MARKERS)]
    j["model"]["vocab"] = vocab
    j["pre_tokenizer"] = pre
    j["normalizer"] = {"type": "Sequence", "normalizers": []}
    j["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    j["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    j["added_tokens"] = [{"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": not special, "special": special} for w, i, special in added]
    # the three special tokens are also in the BPE vocabulary; the markers lie behind its end, as in the official file
    for w, i, _ in added[3:]:
        vocab.pop(w, None)
    os.makedirs(out, exist_ok=True)
    json.dump(j, open(out + "/tokenizer.json", "w"), ensure_ascii=False, indent=1)
    tok = lambda s: {"__type": "AddedToken", "content": s, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    json.dump({"add_bos_token": False, "add_eos_token": False, "bos_token": tok(BOS), "clean_up_tokenization_spaces": False,
               "eos_token": tok(EOS), "legacy": True, "model_max_length": 65536, "pad_token": tok(PAD), "sp_model_kwargs": {},
               "unk_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}, open(out + "/tokenizer_config.json", "w"), ensure_ascii=False, indent=2)
    t = Tokenizer.from_file(out + "/tokenizer.json")
    assert t.get_vocab_size() == VOCAB and len(j["model"]["vocab"]) + len(added) - 3 == VOCAB, (t.get_vocab_size(), len(vocab), len(added))
    assert all(t.token_to_id(w) == i for w, i, _ in added)
    digits = set("0123456789")
    assert not any(len(digits & set(w)) and len(w) > 1 for w in vocab), "a merge holds a digit"
    s = "Hello, 4817! <think> naïve 日本 {\"a\": 1}"
    assert t.decode(t.encode(s).ids, skip_special_tokens=False) == s
    print(len(vocab), len(j["model"]["merges"]), [t.id_to_token(i) for i in t.encode("The access code of the blue tower is 4817.").ids])


if __name__ == "__main__":
    main(*sys.argv[1:])
