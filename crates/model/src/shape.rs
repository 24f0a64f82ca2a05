//! Every dimension of the model (A.0), from metadata, validated once.

use crate::{Error, Rope};
use ds4_gguf::{Gguf, Metadata};

/// What a layer attends to besides its sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// The window only (ratio 0).
    Window,
    /// Overlapping compression of 4 tokens a row, of which an indexer picks the best rows.
    Indexed,
    /// Plain compression of `ratio` tokens a row; every row is attended to.
    Pooled {
        /// Tokens per compressed row, 128 in Flash.
        ratio: usize,
    },
}

impl LayerKind {
    /// Tokens per compressed row, if the layer compresses.
    pub fn ratio(self) -> Option<usize> {
        match self {
            LayerKind::Window => None,
            LayerKind::Indexed => Some(4),
            LayerKind::Pooled { ratio } => Some(ratio),
        }
    }

    fn from_ratio(ratio: u32) -> Self {
        match ratio {
            0 => LayerKind::Window,
            4 => LayerKind::Indexed,
            r => LayerKind::Pooled { ratio: r as usize },
        }
    }
}

/// All dimensions and constants; letters in brackets are those of the specification.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Kind of each layer [L].
    pub layers: Vec<LayerKind>,
    /// Model width [D].
    pub width: usize,
    /// Vocabulary [V].
    pub vocab: usize,
    /// Hyper-connection streams [N].
    pub streams: usize,
    /// Query heads [H].
    pub heads: usize,
    /// Width of a head; of keys and values too [d].
    pub head_dim: usize,
    /// Rotary channels, the last of a head [R].
    pub rotary: usize,
    /// Query low-rank width [QL].
    pub q_rank: usize,
    /// Groups of the output projection [G].
    pub out_groups: usize,
    /// Output low-rank width of a group [OL].
    pub out_rank: usize,
    /// Sliding window in tokens [W].
    pub window: usize,
    /// Routed experts [E].
    pub experts: usize,
    /// Experts per token [K].
    pub experts_used: usize,
    /// Hidden width of an expert, routed or shared [I].
    pub expert_width: usize,
    /// Layers `0..hash_layers` route by token id [NH].
    pub hash_layers: usize,
    /// Indexer heads [IH].
    pub index_heads: usize,
    /// Width of an indexer head [ID].
    pub index_dim: usize,
    /// Compressed rows an indexed layer attends to [TK].
    pub index_top_k: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Epsilon of the hyper-connections.
    pub hc_eps: f32,
    /// Column normalisations of the Sinkhorn iteration.
    pub sinkhorn: usize,
    /// Scale of the routed experts' weights.
    pub route_scale: f32,
    /// SwiGLU clamp of each layer; the MTP block uses the last entry.
    pub clamp: Vec<f32>,
    /// Rotary embedding.
    pub rope: Rope,
    /// Context in which the model was trained, tokens.
    pub context: usize,
}

/// Reads keys of the `deepseek4.` namespace and words the errors.
struct Keys<'a> {
    meta: &'a Metadata,
}

impl Keys<'_> {
    fn key(name: &str) -> String {
        format!("deepseek4.{name}")
    }

    /// A count within `1..=limit`; the limits are far beyond any real model and keep products of two
    /// dimensions inside 64 bits.
    fn count(&self, name: &str, limit: u64) -> Result<usize, Error> {
        let value = self.meta.u64(&Self::key(name))?;
        if (1..=limit).contains(&value) {
            return Ok(value as usize);
        }
        Err(Self::bad(name, value, format!("1 to {limit}")))
    }

    /// A finite positive number, or `default` where the key is absent.
    fn positive(&self, name: &str, default: Option<f32>) -> Result<f32, Error> {
        let key = Self::key(name);
        let value = match (self.meta.opt_f32(&key)?, default) {
            (Some(value), _) => value,
            (None, Some(default)) => default,
            (None, None) => self.meta.f32(&key)?,
        };
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(Self::bad(name, value, "a positive number"))
    }

    fn bad(name: &str, found: impl ToString, expected: impl ToString) -> Error {
        Error::Shape { key: Self::key(name), found: found.to_string(), expected: expected.to_string() }
    }
}

const MAX_WIDTH: u64 = 1 << 20;

impl Shape {
    /// Reads and validates the shape of a model file.
    pub fn from_gguf(file: &Gguf) -> Result<Self, Error> {
        let meta = file.metadata();
        let arch = meta.str("general.architecture")?;
        if arch != "deepseek4" {
            return Err(Error::Shape {
                key: "general.architecture".into(),
                found: arch.into(),
                expected: "deepseek4".into(),
            });
        }
        let keys = Keys { meta };
        let layers = layers(&keys)?;
        let head_dim = keys.count("attention.key_length", MAX_WIDTH)?;
        let shape = Shape {
            clamp: clamps(&keys, layers.len())?,
            width: keys.count("embedding_length", MAX_WIDTH)?,
            vocab: vocab(&keys, file)?,
            streams: keys.count("hyper_connection.count", 16)?,
            heads: keys.count("attention.head_count", 4096)?,
            head_dim,
            rotary: keys.count("rope.dimension_count", head_dim as u64)?,
            q_rank: keys.count("attention.q_lora_rank", MAX_WIDTH)?,
            out_groups: keys.count("attention.output_group_count", 4096)?,
            out_rank: keys.count("attention.output_lora_rank", MAX_WIDTH)?,
            window: keys.count("attention.sliding_window", MAX_WIDTH)?,
            experts: keys.count("expert_count", 65536)?,
            experts_used: keys.count("expert_used_count", 1024)?,
            expert_width: keys.count("expert_feed_forward_length", MAX_WIDTH)?,
            hash_layers: meta.opt_u64("deepseek4.hash_layer_count")?.unwrap_or(0) as usize,
            index_heads: keys.count("attention.indexer.head_count", 4096)?,
            index_dim: keys.count("attention.indexer.key_length", MAX_WIDTH)?,
            index_top_k: keys.count("attention.indexer.top_k", 1 << 16)?,
            norm_eps: keys.positive("attention.layer_norm_rms_epsilon", None)?,
            hc_eps: keys.positive("hyper_connection.epsilon", None)?,
            sinkhorn: keys.count("hyper_connection.sinkhorn_iterations", 1000)?,
            route_scale: keys.positive("expert_weights_scale", Some(1.0))?,
            rope: Rope {
                base: keys.positive("rope.freq_base", None)?,
                compress_base: keys.positive("attention.compress_rope_freq_base", None)?,
                factor: keys.positive("rope.scaling.factor", None)?,
                original_context: keys.count("rope.scaling.original_context_length", 1 << 32)?,
                beta_fast: keys.positive("rope.scaling.yarn_beta_fast", Some(32.0))?,
                beta_slow: keys.positive("rope.scaling.yarn_beta_slow", Some(1.0))?,
            },
            context: match meta.opt_u64("deepseek4.context_length")? {
                Some(0) => return Err(Keys::bad("context_length", 0, "at least 1")),
                Some(n) => n.min(u64::from(u32::MAX)) as usize,
                None => 1 << 20,
            },
            layers,
        };
        shape.check(&keys)?;
        Ok(shape)
    }

    /// Relations between dimensions, and variants of the architecture that this engine does not have.
    fn check(&self, keys: &Keys<'_>) -> Result<(), Error> {
        let require = |ok: bool, name: &str, found: &dyn ToString, expected: String| {
            if ok { Ok(()) } else { Err(Keys::bad(name, found.to_string(), expected)) }
        };
        let d = self.head_dim;
        let even = |n: usize| n.is_multiple_of(2);
        require(even(self.rotary), "rope.dimension_count", &self.rotary, "an even number".into())?;
        let groups = &self.out_groups;
        require(
            self.heads.is_multiple_of(*groups),
            "attention.output_group_count",
            groups,
            format!("a divisor of head_count {}", self.heads),
        )?;
        require(
            self.experts_used <= self.experts,
            "expert_used_count",
            &self.experts_used,
            format!("at most expert_count {}", self.experts),
        )?;
        require(
            self.hash_layers <= self.layers.len(),
            "hash_layer_count",
            &self.hash_layers,
            format!("at most block_count {}", self.layers.len()),
        )?;
        if self.layers.contains(&LayerKind::Indexed) {
            let id = self.index_dim;
            require(
                id.is_power_of_two() && id.is_multiple_of(32) && id >= self.rotary,
                "attention.indexer.key_length",
                &id,
                format!("a power of two, at least 32 and rope.dimension_count {}", self.rotary),
            )?;
        }
        for (name, want) in [
            ("attention.value_length", d as u64),
            ("attention.head_count_kv", 1),
            ("expert_shared_count", 1),
            ("expert_gating_func", 4),
        ] {
            let found = keys.meta.opt_u64(&Keys::key(name))?.unwrap_or(want);
            require(found == want, name, &found, want.to_string())?;
        }
        for name in ["expert_group_count", "expert_group_used_count"] {
            let found = keys.meta.opt_u64(&Keys::key(name))?.unwrap_or(0);
            require(found <= 1, name, &found, "absent, 0 or 1 (no group-limited routing)".into())?;
        }
        let norm = keys.meta.opt_bool("deepseek4.expert_weights_norm")?.unwrap_or(true);
        require(norm, "expert_weights_norm", &norm, "true".into())
    }

    /// Width of all streams of a token together.
    pub fn streams_width(&self) -> usize {
        self.streams * self.width
    }

    /// Control numbers of a hyper-connection: pre, post and the mixing matrix.
    pub fn hc_mix(&self) -> usize {
        (2 + self.streams) * self.streams
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the grouped output projection's low-rank side.
    pub fn out_low_width(&self) -> usize {
        self.out_groups * self.out_rank
    }

    /// Clamp of a layer, or of the MTP block for `layer == layers.len()`.
    pub fn clamp_of(&self, layer: usize) -> f32 {
        self.clamp[layer.min(self.clamp.len() - 1)]
    }
}

fn layers(keys: &Keys<'_>) -> Result<Vec<LayerKind>, Error> {
    let blocks = keys.count("block_count", 4096)?;
    // Some converters count next-token layers as blocks; they are no part of the main stack.
    let next = keys.meta.opt_u64("deepseek4.nextn_predict_layers")?.unwrap_or(0) as usize;
    let count = match blocks.checked_sub(next) {
        Some(n) if n > 0 => n,
        _ => return Err(Keys::bad("nextn_predict_layers", next, format!("less than block_count {blocks}"))),
    };
    let ratios = keys.meta.u32_array("deepseek4.attention.compress_ratios")?;
    if ratios.len() < count {
        let found = format!("{} entries", ratios.len());
        return Err(Keys::bad("attention.compress_ratios", found, format!("at least {count}")));
    }
    if let Some(&r) = ratios.iter().find(|&&r| r > 1 << 16) {
        return Err(Keys::bad("attention.compress_ratios", r, "at most 65536"));
    }
    Ok(ratios[..count].iter().map(|&r| LayerKind::from_ratio(r)).collect())
}

fn clamps(keys: &Keys<'_>, layers: usize) -> Result<Vec<f32>, Error> {
    let clamp = keys.meta.f32_array("deepseek4.swiglu_clamp_exp")?;
    if clamp.len() < layers {
        let found = format!("{} entries", clamp.len());
        return Err(Keys::bad("swiglu_clamp_exp", found, format!("at least {layers}")));
    }
    match clamp.iter().find(|c| !(c.is_finite() && **c > 0.0)) {
        Some(bad) => Err(Keys::bad("swiglu_clamp_exp", bad, "positive numbers")),
        None => Ok(clamp),
    }
}

/// The vocabulary size may be absent; the embedding has one row per token then.
fn vocab(keys: &Keys<'_>, file: &Gguf) -> Result<usize, Error> {
    if keys.meta.get("deepseek4.vocab_size").is_some() {
        return keys.count("vocab_size", 1 << 24);
    }
    match file.tensor("token_embd.weight").and_then(|t| t.dims().get(1).copied()) {
        Some(rows) if rows > 0 && rows <= 1 << 24 => Ok(rows as usize),
        _ => keys.count("vocab_size", 1 << 24),
    }
}
