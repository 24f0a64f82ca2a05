//! Models with random weights: the shape of the published file without its 87 GB, for measuring speed.
//!
//! Tensors of equal type and dimensions share their data, so that a model of any number of layers takes the
//! memory of one layer of each kind. The values are scaled so that activations stay of ordinary size.

use ds4_gguf::{Error, Gguf, Metadata, Part, TensorType, Value};
use half::f16;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of random data of a tensor; larger ones repeat them.
const UNIQUE: usize = 16 << 20;

/// Dimensions of a model to make up; letters as in [`ds4_model::Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Synthetic {
    pub layers: usize,
    pub width: usize,
    pub vocab: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub q_rank: usize,
    pub out_groups: usize,
    pub out_rank: usize,
    pub experts: usize,
    pub experts_used: usize,
    pub expert_width: usize,
    pub index_heads: usize,
    pub index_top_k: usize,
}

/// Hyper-connection streams.
const STREAMS: u64 = 4;
/// Width of an indexer head.
const INDEX_DIM: u64 = 128;
/// Layers that route by token id.
const HASH_LAYERS: usize = 3;

impl Synthetic {
    /// DeepSeek V4 Flash; the published file has 43 layers.
    pub fn flash(layers: usize) -> Self {
        Synthetic {
            layers,
            width: 4096,
            vocab: 129_280,
            heads: 64,
            head_dim: 512,
            q_rank: 1024,
            out_groups: 8,
            out_rank: 1024,
            experts: 256,
            experts_used: 6,
            expert_width: 2048,
            index_heads: 64,
            index_top_k: 512,
        }
    }

    /// The same at widths that compute in no time.
    pub fn tiny(layers: usize) -> Self {
        Synthetic {
            layers,
            width: 256,
            vocab: 512,
            heads: 4,
            head_dim: 128,
            q_rank: 64,
            out_groups: 2,
            out_rank: 64,
            experts: 8,
            experts_used: 2,
            expert_width: 256,
            index_heads: 4,
            index_top_k: 16,
        }
    }

    /// Tokens per compressed row of a layer, 0 for none.
    fn ratio(layer: usize) -> u32 {
        match layer {
            0 | 1 => 0,
            l if l % 2 == 0 => 4,
            _ => 128,
        }
    }

    fn metadata(&self) -> Metadata {
        let mut m = Metadata::default();
        m.set("general.architecture", Value::String("deepseek4".into()));
        let ratios = (0..self.layers).map(Self::ratio).collect();
        let number = |n: usize| Value::U32(n as u32);
        for (key, value) in [
            ("block_count", number(self.layers)),
            ("context_length", Value::U32(1 << 20)),
            ("embedding_length", number(self.width)),
            ("vocab_size", number(self.vocab)),
            ("attention.head_count", number(self.heads)),
            ("attention.key_length", number(self.head_dim)),
            ("rope.dimension_count", Value::U32(64)),
            ("attention.q_lora_rank", number(self.q_rank)),
            ("attention.output_lora_rank", number(self.out_rank)),
            ("attention.output_group_count", number(self.out_groups)),
            ("attention.sliding_window", Value::U32(128)),
            ("attention.indexer.head_count", number(self.index_heads)),
            ("attention.indexer.key_length", Value::U32(INDEX_DIM as u32)),
            ("attention.indexer.top_k", number(self.index_top_k)),
            ("attention.compress_ratios", Value::ArrayU32(ratios)),
            ("attention.compress_rope_freq_base", Value::F32(160_000.0)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
            ("rope.freq_base", Value::F32(10_000.0)),
            ("rope.scaling.factor", Value::F32(16.0)),
            ("rope.scaling.original_context_length", Value::U32(65_536)),
            ("expert_count", number(self.experts)),
            ("expert_used_count", number(self.experts_used)),
            ("expert_feed_forward_length", number(self.expert_width)),
            ("expert_weights_scale", Value::F32(1.5)),
            ("hash_layer_count", number(HASH_LAYERS.min(self.layers))),
            ("swiglu_clamp_exp", Value::ArrayF32(vec![10.0; self.layers])),
            ("hyper_connection.count", Value::U32(STREAMS as u32)),
            ("hyper_connection.sinkhorn_iterations", Value::U32(20)),
            ("hyper_connection.epsilon", Value::F32(1e-6)),
        ] {
            m.set(&format!("deepseek4.{key}"), value);
        }
        m
    }

    /// Names, types and dimensions of the published 2-bit file.
    fn tensors(&self) -> Vec<(String, TensorType, Vec<u64>)> {
        use TensorType::{F16, F32, I32, Iq2Xxs, Q2K, Q8_0};
        let [d, v, h, hd] = [self.width, self.vocab, self.heads, self.head_dim].map(|n| n as u64);
        let [qr, e, f, used] =
            [self.q_rank, self.experts, self.expert_width, self.experts_used].map(|n| n as u64);
        let (groups, low) = (self.out_groups as u64, (self.out_groups * self.out_rank) as u64);
        let index_heads = self.index_heads as u64;
        let (streams, mix) = (STREAMS * d, (2 + STREAMS) * STREAMS);
        let mut out: Vec<(String, TensorType, Vec<u64>)> = Vec::new();
        let mut add = |prefix: &str, list: &[(&str, TensorType, &[u64])]| {
            out.extend(list.iter().map(|(name, ty, dims)| (format!("{prefix}{name}"), *ty, dims.to_vec())));
        };
        add(
            "",
            &[
                ("token_embd.weight", F16, &[d, v]),
                ("output_hc_base.weight", F32, &[STREAMS]),
                ("output_hc_fn.weight", F16, &[streams, STREAMS]),
                ("output_hc_scale.weight", F32, &[1]),
                ("output_norm.weight", F32, &[d]),
                ("output.weight", Q8_0, &[d, v]),
            ],
        );
        for layer in 0..self.layers {
            let ratio = u64::from(Self::ratio(layer));
            let p = format!("blk.{layer}.");
            for part in ["attn", "ffn"] {
                add(
                    &p,
                    &[
                        (&format!("hc_{part}_fn.weight"), F16, &[streams, mix]),
                        (&format!("hc_{part}_scale.weight"), F32, &[3]),
                        (&format!("hc_{part}_base.weight"), F32, &[mix]),
                        (&format!("{part}_norm.weight"), F32, &[d]),
                    ],
                );
            }
            add(
                &p,
                &[
                    ("attn_q_a.weight", Q8_0, &[d, qr]),
                    ("attn_q_a_norm.weight", F32, &[qr]),
                    ("attn_q_b.weight", Q8_0, &[qr, h * hd]),
                    ("attn_kv.weight", Q8_0, &[d, hd]),
                    ("attn_kv_a_norm.weight", F32, &[hd]),
                    ("attn_sinks.weight", F32, &[h]),
                    ("attn_output_a.weight", Q8_0, &[h * hd / groups, low]),
                    ("attn_output_b.weight", Q8_0, &[low, d]),
                    ("ffn_gate_inp.weight", F16, &[d, e]),
                    ("exp_probs_b.bias", F32, &[e]),
                    ("ffn_gate_exps.weight", Iq2Xxs, &[d, f, e]),
                    ("ffn_up_exps.weight", Iq2Xxs, &[d, f, e]),
                    ("ffn_down_exps.weight", Q2K, &[f, d, e]),
                    ("ffn_gate_shexp.weight", Q8_0, &[d, f]),
                    ("ffn_up_shexp.weight", Q8_0, &[d, f]),
                    ("ffn_down_shexp.weight", Q8_0, &[f, d]),
                ],
            );
            let mut compressor = |p: &str, row: u64| {
                let n = if ratio == 4 { 2 * row } else { row };
                add(
                    p,
                    &[
                        ("_ape.weight", F16, &[n, ratio]),
                        ("_kv.weight", F16, &[d, n]),
                        ("_gate.weight", F16, &[d, n]),
                        ("_norm.weight", F32, &[row]),
                    ],
                );
            };
            if ratio > 0 {
                compressor(&format!("{p}attn_compressor"), hd);
            }
            if ratio == 4 {
                compressor(&format!("{p}indexer_compressor"), INDEX_DIM);
                add(
                    &p,
                    &[
                        ("indexer.attn_q_b.weight", F16, &[qr, index_heads * INDEX_DIM]),
                        ("indexer.proj.weight", F16, &[d, index_heads]),
                    ],
                );
            }
            if layer < HASH_LAYERS {
                add(&p, &[("ffn_gate_tid2eid.weight", I32, &[used, v])]);
            }
        }
        out
    }

    /// The model without its tensors, from which its shape can be read.
    pub fn header(&self) -> Result<Gguf, Error> {
        Gguf::from_parts("synthetic model", self.metadata(), Vec::new())
    }

    /// Bytes that all tensors would take in a file.
    pub fn bytes(&self) -> u64 {
        self.bytes_as(|_, ty, dims| ty.bytes_of(dims.iter().product()))
    }

    /// The same where one of a name, type and dimensions takes `size`.
    pub fn bytes_as(&self, size: impl Fn(&str, TensorType, &[u64]) -> u64) -> u64 {
        self.tensors().iter().map(|(name, ty, dims)| size(name, *ty, dims)).sum()
    }

    /// The model.
    pub fn model(&self) -> Result<Gguf, Error> {
        let mut blocks: HashMap<_, Arc<Vec<u8>>> = HashMap::new();
        let parts = self.tensors().into_iter().map(|(name, ty, dims)| {
            let content = Content::of(&name, ty);
            let key = (content, ty, dims.clone());
            let seed = blocks.len() as u64;
            let block = blocks
                .entry(key)
                .or_insert_with(|| Arc::new(fill(content, ty, &dims, self.experts, &mut Random::new(seed))));
            let data = Arc::clone(block);
            Part { name, dims, ty, data }
        });
        let parts = parts.collect();
        Gguf::from_parts("synthetic model", self.metadata(), parts)
    }
}

/// What the values of a tensor are like.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Content {
    /// A norm: ones.
    Ones,
    /// Offsets and scales: small numbers.
    Small,
    /// The embedding.
    Embedding,
    /// A matrix: scaled by its input width.
    Matrix,
    /// Experts of tokens.
    Table,
}

impl Content {
    fn of(name: &str, ty: TensorType) -> Self {
        match ty {
            TensorType::I32 => Content::Table,
            TensorType::F32 if name.ends_with("norm.weight") => Content::Ones,
            TensorType::F32 => Content::Small,
            _ if name.contains("token_embd") => Content::Embedding,
            _ => Content::Matrix,
        }
    }
}

/// Splitmix64: fast, and good enough for noise.
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills `out`.
    pub fn bytes(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }

    /// Uniform, of mean 0 and standard deviation `std`.
    pub fn value(&mut self, std: f32) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1 << 24) as f32;
        (2.0 * unit - 1.0) * std * 3f32.sqrt()
    }
}

/// Random blocks of a tensor, repeated to its size.
fn fill(content: Content, ty: TensorType, dims: &[u64], experts: usize, random: &mut Random) -> Vec<u8> {
    let total = ty.bytes_of(dims.iter().product()) as usize;
    // A table repeats after whole rows.
    let unit = if content == Content::Table { 4 * dims[0] as usize } else { ty.block_bytes() as usize };
    let unique = total.min(UNIQUE / unit * unit);
    let mut out = vec![0u8; unique];
    let std = match content {
        Content::Embedding => 0.5,
        Content::Small => 0.05,
        _ => 1.0 / (dims[0] as f32).sqrt(),
    };
    for block in out.chunks_mut(unit) {
        match content {
            Content::Ones => block.copy_from_slice(&1f32.to_le_bytes()),
            Content::Table => table_row(block, experts, random),
            _ => random_block(ty, block, std, random),
        }
    }
    out.reserve_exact(total - unique);
    while out.len() < total {
        out.extend_from_within(..unique.min(total - out.len()));
    }
    out
}

/// Different experts for one token.
fn table_row(row: &mut [u8], experts: usize, random: &mut Random) {
    let used = row.len() / 4;
    let start = random.next() as usize % experts;
    let stride = 1 + random.next() as usize % (experts / used).max(1);
    for (i, value) in row.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *value = (((start + i * stride) % experts) as u32).to_le_bytes();
    }
}

/// One block of values of standard deviation `std`, about.
fn random_block(ty: TensorType, block: &mut [u8], std: f32, random: &mut Random) {
    let half = |v: f32| f16::from_f32(v).to_le_bytes();
    match ty {
        TensorType::F32 => block.copy_from_slice(&random.value(std).to_le_bytes()),
        TensorType::F16 => block.copy_from_slice(&half(random.value(std))),
        TensorType::Q8_0 => {
            random.bytes(block);
            block[..2].copy_from_slice(&half(std / 74.0));
        }
        TensorType::Iq2Xxs => {
            random.bytes(block);
            block[..2].copy_from_slice(&half(std / 32.0));
        }
        TensorType::Q2K => {
            random.bytes(block);
            // Scale 8 and minimum 5 in every part; the minimum puts the mean of 0 to 3 at zero.
            block[..16].fill(0x58);
            block[80..82].copy_from_slice(&half(std / 8.0));
            block[82..84].copy_from_slice(&half(std * 1.5 / 5.0));
        }
        // No other type is declared above.
        _ => {}
    }
}
