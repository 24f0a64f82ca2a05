//! Writes a checkpoint of one layer of Flash at its full width, with all 256 experts, of random values: 3.6 GB, to measure `ds4 quantize`
//! with.
//!
//! ```text
//! cargo run --release -p ds4-quantize --example flash_layer -- FOLDER
//! ds4 quantize FOLDER out.gguf --recipe q2
//! ```
//!
//! The vocabulary is that of ds4-nano, so that the layer is nearly all there is.
#![allow(clippy::print_stderr)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Map, json};
use std::fs::File;
use std::io::{BufWriter, Error, Result, Write};
use std::path::Path;

const D: usize = 4096;
const I: usize = 2048;
const EXPERTS: usize = 256;
const VOCAB: usize = 4096;

/// Tensors to be written: name, type, shape.
#[derive(Default)]
struct Tensors(Vec<(String, &'static str, Vec<usize>)>);

impl Tensors {
    fn put(&mut self, name: impl Into<String>, ty: &'static str, shape: &[usize]) {
        self.0.push((name.into(), ty, shape.into()));
    }

    /// FP8 with a scale per 128 x 128.
    fn fp8(&mut self, name: &str, [rows, width]: [usize; 2]) {
        self.put(format!("{name}.weight"), "F8_E4M3", &[rows, width]);
        self.put(format!("{name}.scale"), "F8_E8M0", &[rows.div_ceil(128), width.div_ceil(128)]);
    }

    fn compressor(&mut self, name: &str, width: usize) {
        self.put(format!("{name}.wkv.weight"), "BF16", &[2 * width, D]);
        self.put(format!("{name}.wgate.weight"), "BF16", &[2 * width, D]);
        self.put(format!("{name}.ape"), "F32", &[4, 2 * width]);
        self.put(format!("{name}.norm.weight"), "F32", &[width]);
    }

    /// An indexed layer with score routing.
    fn layer(&mut self) {
        for part in ["attn", "ffn"] {
            self.put(format!("layers.0.hc_{part}_fn"), "F32", &[24, 4 * D]);
            self.put(format!("layers.0.hc_{part}_base"), "F32", &[24]);
            self.put(format!("layers.0.hc_{part}_scale"), "F32", &[3]);
            self.put(format!("layers.0.{part}_norm.weight"), "F32", &[D]);
        }
        let attention = [
            ("wq_a", [1024, D]),
            ("wq_b", [32768, 1024]),
            ("wkv", [512, D]),
            ("wo_a", [8192, D]),
            ("wo_b", [D, 8192]),
        ];
        attention.iter().for_each(|(name, shape)| self.fp8(&format!("layers.0.attn.{name}"), *shape));
        for (name, n) in [("q_norm.weight", 1024), ("kv_norm.weight", 512), ("attn_sink", 64)] {
            self.put(format!("layers.0.attn.{name}"), "F32", &[n]);
        }
        self.compressor("layers.0.attn.compressor", 512);
        self.fp8("layers.0.attn.indexer.wq_b", [8192, 1024]);
        self.put("layers.0.attn.indexer.weights_proj.weight", "BF16", &[64, D]);
        self.compressor("layers.0.attn.indexer.compressor", 128);
        self.put("layers.0.ffn.gate.weight", "BF16", &[EXPERTS, D]);
        self.put("layers.0.ffn.gate.bias", "F32", &[EXPERTS]);
        for (w, [rows, width]) in [("w1", [I, D]), ("w3", [I, D]), ("w2", [D, I])] {
            self.fp8(&format!("layers.0.ffn.shared_experts.{w}"), [rows, width]);
            for e in 0..EXPERTS {
                let name = format!("layers.0.ffn.experts.{e}.{w}");
                self.put(format!("{name}.weight"), "I8", &[rows, width / 2]);
                self.put(format!("{name}.scale"), "F8_E8M0", &[rows, width / 32]);
            }
        }
    }

    fn all() -> Self {
        let mut tensors = Tensors::default();
        tensors.put("embed.weight", "BF16", &[VOCAB, D]);
        tensors.put("head.weight", "BF16", &[VOCAB, D]);
        tensors.put("norm.weight", "F32", &[D]);
        tensors.put("hc_head_fn", "F32", &[4, 4 * D]);
        tensors.put("hc_head_base", "F32", &[4]);
        tensors.put("hc_head_scale", "F32", &[1]);
        tensors.layer();
        tensors
    }

    fn write(&self, path: &Path) -> Result<()> {
        let size = |ty: &str| match ty {
            "F32" => 4,
            "BF16" => 2,
            _ => 1,
        };
        let (mut header, mut at) = (Map::new(), 0);
        for (name, ty, shape) in &self.0 {
            let end = at + shape.iter().product::<usize>() * size(ty);
            header.insert(name.clone(), json!({"dtype": ty, "shape": shape, "data_offsets": [at, end]}));
            at = end;
        }
        let header = serde_json::to_vec(&header)?;
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for (_, ty, shape) in &self.0 {
            let values = shape.iter().product::<usize>();
            match *ty {
                "F32" => (0..values).try_for_each(|_| out.write_all(&unit(&mut random).to_le_bytes()))?,
                "BF16" => (0..values).try_for_each(|_| {
                    out.write_all(&half::bf16::from_f32(unit(&mut random)).to_le_bytes())
                })?,
                // Scales near 2^-7.
                "F8_E8M0" => {
                    (0..values).try_for_each(|_| out.write_all(&[118 + (random.next_u32() % 4) as u8]))?;
                }
                _ => {
                    let mut bytes = vec![0; values];
                    random.fill_bytes(&mut bytes);
                    // The largest exponent of FP8 holds codes that are no numbers.
                    if *ty == "F8_E4M3" {
                        bytes.iter_mut().for_each(|b| *b &= 0xf7);
                    }
                    out.write_all(&bytes)?;
                }
            }
        }
        out.flush()
    }
}

/// -0.03 to 0.03.
fn unit(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() as f32 / u32::MAX as f32 - 0.5) * 0.06
}

fn main() -> Result<()> {
    let Some(folder) = std::env::args().nth(1) else {
        return Err(Error::other("usage: flash_layer FOLDER"));
    };
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder)?;
    let config = json!({
        "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 64, "head_dim": 512,
        "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128,
        "compress_ratios": [4], "compress_rope_theta": 160_000.0, "rope_theta": 10000.0,
        "rope_scaling": {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
        "max_position_embeddings": 1_048_576, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 6, "num_hash_layers": 0, "moe_intermediate_size": I, "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/ds4-nano/tokenizer.json");
    std::fs::copy(nano, folder.join("tokenizer.json"))?;
    Tensors::all().write(&folder.join("model.safetensors"))?;
    eprintln!("{}: one layer of Flash", folder.display());
    Ok(())
}
