//! Names and shapes of the tensors, in the checkpoint and in the file.

use crate::Config;

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A small vector or table of offsets: F32.
    Vector,
    /// Positional offsets of a compressor, `[ratio, n]`.
    Offsets,
    /// A matrix that a compressor, the indexer, the router or a hyper-connection multiplies with.
    Control,
    /// The token embedding.
    Embedding,
    /// A large dense matrix.
    Dense,
    /// All experts' matrices of one kind.
    Experts,
    /// Expert ids by token.
    Table,
}

/// One tensor of the file.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// Name in the file.
    pub(crate) to: String,
    /// Name in the checkpoint; for experts with `{}` in the place of the expert's number.
    pub(crate) from: String,
    pub(crate) class: Class,
    /// Shape in the checkpoint, slowest dimension first: of one expert, for experts.
    pub(crate) shape: Vec<usize>,
}

/// Every tensor of a model, in file order.
pub(crate) fn items(c: &Config) -> Vec<Item> {
    let (d, v) = (c.hidden_size as usize, c.vocab_size as usize);
    let n = c.hc_mult as usize;
    let mut list = List::default();
    list.push("token_embd.weight", "embed.weight", Class::Embedding, &[v, d]);
    list.push("output.weight", "head.weight", Class::Dense, &[v, d]);
    list.push("output_norm.weight", "norm.weight", Class::Vector, &[d]);
    list.head_mix("output_hc_", "hc_head_", n, d);
    for l in 0..c.num_hidden_layers as usize {
        let hash = l < c.num_hash_layers as usize;
        block(&mut list, c, &format!("blk.{l}."), &format!("layers.{l}."), c.compress_ratios[l], hash);
    }
    if c.num_nextn_predict_layers > 0 {
        let p = "mtp.0.";
        list.push("mtp.0.e_proj.weight", "mtp.0.e_proj.weight", Class::Dense, &[d, d]);
        list.push("mtp.0.h_proj.weight", "mtp.0.h_proj.weight", Class::Dense, &[d, d]);
        for norm in ["enorm", "hnorm", "norm"] {
            list.push(format!("{p}{norm}.weight"), format!("{p}{norm}.weight"), Class::Vector, &[d]);
        }
        list.head_mix("mtp.0.hc_head_", "mtp.0.hc_head_", n, d);
        block(&mut list, c, p, p, 0, false);
    }
    list.0
}

#[derive(Default)]
struct List(Vec<Item>);

impl List {
    fn push(&mut self, to: impl Into<String>, from: impl Into<String>, class: Class, shape: &[usize]) {
        self.0.push(Item { to: to.into(), from: from.into(), class, shape: shape.into() });
    }

    fn head_mix(&mut self, to: &str, from: &str, n: usize, d: usize) {
        self.push(format!("{to}fn.weight"), format!("{from}fn"), Class::Control, &[n, n * d]);
        self.push(format!("{to}scale.weight"), format!("{from}scale"), Class::Vector, &[1]);
        self.push(format!("{to}base.weight"), format!("{from}base"), Class::Vector, &[n]);
    }

    fn compressor(&mut self, to: &str, from: &str, ratio: usize, width: usize, d: usize) {
        let n = if ratio == 4 { 2 * width } else { width };
        self.push(format!("{to}_kv.weight"), format!("{from}.wkv.weight"), Class::Control, &[n, d]);
        self.push(format!("{to}_gate.weight"), format!("{from}.wgate.weight"), Class::Control, &[n, d]);
        self.push(format!("{to}_ape.weight"), format!("{from}.ape"), Class::Offsets, &[ratio, n]);
        self.push(format!("{to}_norm.weight"), format!("{from}.norm.weight"), Class::Vector, &[width]);
    }
}

fn block(list: &mut List, c: &Config, to: &str, from: &str, ratio: u32, hash: bool) {
    let (d, n) = (c.hidden_size as usize, c.hc_mult as usize);
    for part in ["attn", "ffn"] {
        let mix = (2 + n) * n;
        list.push(
            format!("{to}hc_{part}_fn.weight"),
            format!("{from}hc_{part}_fn"),
            Class::Control,
            &[mix, n * d],
        );
        list.push(
            format!("{to}hc_{part}_scale.weight"),
            format!("{from}hc_{part}_scale"),
            Class::Vector,
            &[3],
        );
        list.push(
            format!("{to}hc_{part}_base.weight"),
            format!("{from}hc_{part}_base"),
            Class::Vector,
            &[mix],
        );
        list.push(
            format!("{to}{part}_norm.weight"),
            format!("{from}{part}_norm.weight"),
            Class::Vector,
            &[d],
        );
    }
    attention(list, c, to, from, ratio as usize);
    feed_forward(list, c, to, from, hash);
}

fn attention(list: &mut List, c: &Config, to: &str, from: &str, ratio: usize) {
    let (d, ql, hd) = (c.hidden_size as usize, c.q_lora_rank as usize, c.head_dim as usize);
    let (heads, groups) = (c.num_attention_heads as usize, c.o_groups as usize);
    let low = groups * c.o_lora_rank as usize;
    let mut dense = |to_name: &str, from_name: &str, shape: &[usize]| {
        list.push(
            format!("{to}{to_name}.weight"),
            format!("{from}attn.{from_name}.weight"),
            Class::Dense,
            shape,
        );
    };
    dense("attn_q_a", "wq_a", &[ql, d]);
    dense("attn_q_b", "wq_b", &[heads * hd, ql]);
    dense("attn_kv", "wkv", &[hd, d]);
    dense("attn_output_a", "wo_a", &[low, heads / groups * hd]);
    dense("attn_output_b", "wo_b", &[d, low]);
    list.push(format!("{to}attn_q_a_norm.weight"), format!("{from}attn.q_norm.weight"), Class::Vector, &[ql]);
    list.push(
        format!("{to}attn_kv_a_norm.weight"),
        format!("{from}attn.kv_norm.weight"),
        Class::Vector,
        &[hd],
    );
    list.push(format!("{to}attn_sinks.weight"), format!("{from}attn.attn_sink"), Class::Vector, &[heads]);
    if ratio > 0 {
        list.compressor(&format!("{to}attn_compressor"), &format!("{from}attn.compressor"), ratio, hd, d);
    }
    if ratio == 4 {
        let (ih, id) = (c.index_n_heads as usize, c.index_head_dim as usize);
        let from = format!("{from}attn.indexer");
        list.push(
            format!("{to}indexer.attn_q_b.weight"),
            format!("{from}.wq_b.weight"),
            Class::Control,
            &[ih * id, ql],
        );
        list.push(
            format!("{to}indexer.proj.weight"),
            format!("{from}.weights_proj.weight"),
            Class::Control,
            &[ih, d],
        );
        list.compressor(&format!("{to}indexer_compressor"), &format!("{from}.compressor"), ratio, id, d);
    }
}

fn feed_forward(list: &mut List, c: &Config, to: &str, from: &str, hash: bool) {
    let (d, i, e) = (c.hidden_size as usize, c.moe_intermediate_size as usize, c.n_routed_experts as usize);
    list.push(format!("{to}ffn_gate_inp.weight"), format!("{from}ffn.gate.weight"), Class::Control, &[e, d]);
    if hash {
        let shape = [c.vocab_size as usize, c.num_experts_per_tok as usize];
        list.push(
            format!("{to}ffn_gate_tid2eid.weight"),
            format!("{from}ffn.gate.tid2eid"),
            Class::Table,
            &shape,
        );
    } else {
        list.push(format!("{to}exp_probs_b.bias"), format!("{from}ffn.gate.bias"), Class::Vector, &[e]);
    }
    for (kind, w, shape) in [("gate", "w1", [i, d]), ("up", "w3", [i, d]), ("down", "w2", [d, i])] {
        list.push(
            format!("{to}ffn_{kind}_exps.weight"),
            format!("{from}ffn.experts.{{}}.{w}.weight"),
            Class::Experts,
            &shape,
        );
        list.push(
            format!("{to}ffn_{kind}_shexp.weight"),
            format!("{from}ffn.shared_experts.{w}.weight"),
            Class::Dense,
            &shape,
        );
    }
}
