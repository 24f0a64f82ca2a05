//! `config.json`, the fields that the architecture needs.

use crate::Error;
use ds4_gguf::Value;
use serde::Deserialize;

/// The official configuration; unknown fields are ignored.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: u32,
    pub hidden_size: u32,
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub head_dim: u32,
    pub qk_rope_head_dim: u32,
    pub q_lora_rank: u32,
    pub o_groups: u32,
    pub o_lora_rank: u32,
    pub sliding_window: u32,
    pub compress_ratios: Vec<u32>,
    pub compress_rope_theta: f32,
    pub rope_theta: f32,
    pub rope_scaling: RopeScaling,
    pub max_position_embeddings: u32,
    pub index_n_heads: u32,
    pub index_head_dim: u32,
    pub index_topk: u32,
    pub hc_mult: u32,
    pub hc_sinkhorn_iters: u32,
    pub hc_eps: f32,
    pub rms_norm_eps: f32,
    pub n_routed_experts: u32,
    pub num_experts_per_tok: u32,
    #[serde(default)]
    pub num_hash_layers: u32,
    pub moe_intermediate_size: u32,
    #[serde(default = "one")]
    pub routed_scaling_factor: f32,
    pub swiglu_limit: f32,
    #[serde(default)]
    pub num_nextn_predict_layers: u32,
}

/// YaRN.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs)]
pub struct RopeScaling {
    pub factor: f32,
    pub original_max_position_embeddings: u32,
    pub beta_fast: f32,
    pub beta_slow: f32,
}

fn one() -> f32 {
    1.0
}

impl Config {
    /// Checks what the conversion relies on; the engine checks the rest when it loads the file.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let layers = self.num_hidden_layers as usize;
        if layers == 0 || layers > 4096 || self.compress_ratios.len() < layers {
            return Err(Error::Config(format!(
                "num_hidden_layers is {layers}, compress_ratios has {} entries",
                self.compress_ratios.len()
            )));
        }
        let dims = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("head_dim", self.head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("o_groups", self.o_groups),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("n_routed_experts", self.n_routed_experts),
            ("hc_mult", self.hc_mult),
        ];
        match dims.iter().find(|(_, v)| *v == 0 || *v > 1 << 24) {
            Some((name, v)) => Err(Error::Config(format!("{name} is {v}"))),
            None => Ok(()),
        }
    }

    /// The model's metadata (`gguf.md` section 2).
    pub(crate) fn metadata(&self) -> Vec<(String, Value)> {
        let layers = self.num_hidden_layers as usize;
        let ratios = self.compress_ratios.iter().map(|&r| r as i32).collect();
        let u = Value::U32;
        let f = Value::F32;
        let keys = [
            ("block_count", u(self.num_hidden_layers)),
            ("context_length", u(self.max_position_embeddings)),
            ("embedding_length", u(self.hidden_size)),
            ("vocab_size", u(self.vocab_size)),
            ("attention.head_count", u(self.num_attention_heads)),
            ("attention.head_count_kv", u(1)),
            ("attention.key_length", u(self.head_dim)),
            ("attention.value_length", u(self.head_dim)),
            ("rope.dimension_count", u(self.qk_rope_head_dim)),
            ("attention.q_lora_rank", u(self.q_lora_rank)),
            ("attention.output_lora_rank", u(self.o_lora_rank)),
            ("attention.output_group_count", u(self.o_groups)),
            ("attention.sliding_window", u(self.sliding_window)),
            ("attention.indexer.head_count", u(self.index_n_heads)),
            ("attention.indexer.key_length", u(self.index_head_dim)),
            ("attention.indexer.top_k", u(self.index_topk)),
            ("attention.compress_ratios", Value::ArrayI32(ratios)),
            ("attention.compress_rope_freq_base", f(self.compress_rope_theta)),
            ("attention.layer_norm_rms_epsilon", f(self.rms_norm_eps)),
            ("rope.freq_base", f(self.rope_theta)),
            ("rope.scaling.type", Value::String("yarn".into())),
            ("rope.scaling.factor", f(self.rope_scaling.factor)),
            ("rope.scaling.original_context_length", u(self.rope_scaling.original_max_position_embeddings)),
            ("rope.scaling.yarn_beta_fast", f(self.rope_scaling.beta_fast)),
            ("rope.scaling.yarn_beta_slow", f(self.rope_scaling.beta_slow)),
            ("expert_count", u(self.n_routed_experts)),
            ("expert_used_count", u(self.num_experts_per_tok)),
            ("expert_shared_count", u(1)),
            ("expert_feed_forward_length", u(self.moe_intermediate_size)),
            ("expert_weights_scale", f(self.routed_scaling_factor)),
            ("expert_weights_norm", Value::Bool(true)),
            ("expert_gating_func", u(4)),
            ("hash_layer_count", u(self.num_hash_layers)),
            ("swiglu_clamp_exp", Value::ArrayF32(vec![self.swiglu_limit; layers])),
            ("hyper_connection.count", u(self.hc_mult)),
            ("hyper_connection.sinkhorn_iterations", u(self.hc_sinkhorn_iters)),
            ("hyper_connection.epsilon", f(self.hc_eps)),
        ];
        keys.into_iter().map(|(k, v)| (format!("deepseek4.{k}"), v)).collect()
    }
}
