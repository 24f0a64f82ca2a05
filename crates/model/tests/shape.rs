//! What a file must say, and how it is told when it does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use ds4_cpu::{Cpu, Options};
use ds4_gguf::{Gguf, Metadata, Value, Writer};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, LayerKind, Shape};

/// Metadata with the dimensions of Flash.
fn flash() -> Metadata {
    let mut m = Metadata::default();
    m.set("general.architecture", Value::String("deepseek4".into()));
    let ratios = (0..44)
        .map(|l| {
            if l < 2 || l == 43 {
                0
            } else if l % 2 == 0 {
                4
            } else {
                128
            }
        })
        .collect();
    for (key, value) in [
        ("block_count", Value::U32(43)),
        ("context_length", Value::U64(1 << 20)),
        ("embedding_length", Value::U32(4096)),
        ("vocab_size", Value::U32(129_280)),
        ("attention.head_count", Value::U32(64)),
        ("attention.head_count_kv", Value::U32(1)),
        ("attention.key_length", Value::U32(512)),
        ("attention.value_length", Value::U32(512)),
        ("rope.dimension_count", Value::U32(64)),
        ("attention.q_lora_rank", Value::U32(1024)),
        ("attention.output_lora_rank", Value::U32(1024)),
        ("attention.output_group_count", Value::U32(8)),
        ("attention.sliding_window", Value::U32(128)),
        ("attention.indexer.head_count", Value::U32(64)),
        ("attention.indexer.key_length", Value::U32(128)),
        ("attention.indexer.top_k", Value::U32(512)),
        ("attention.compress_ratios", Value::ArrayI32(ratios)),
        ("attention.compress_rope_freq_base", Value::F32(160_000.0)),
        ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("rope.freq_base", Value::F64(10_000.0)),
        ("rope.scaling.factor", Value::U32(16)),
        ("rope.scaling.original_context_length", Value::U64(65536)),
        ("rope.scaling.yarn_beta_fast", Value::F32(32.0)),
        ("rope.scaling.yarn_beta_slow", Value::F32(1.0)),
        ("expert_count", Value::U32(256)),
        ("expert_used_count", Value::U32(6)),
        ("expert_shared_count", Value::U32(1)),
        ("expert_feed_forward_length", Value::U32(2048)),
        ("expert_weights_scale", Value::F32(1.5)),
        ("expert_weights_norm", Value::Bool(true)),
        ("expert_gating_func", Value::U32(4)),
        ("hash_layer_count", Value::U32(3)),
        ("swiglu_clamp_exp", Value::ArrayF32(vec![10.0; 43])),
        ("hyper_connection.count", Value::U32(4)),
        ("hyper_connection.sinkhorn_iterations", Value::U32(20)),
        ("hyper_connection.epsilon", Value::F32(1e-6)),
    ] {
        m.set(&format!("deepseek4.{key}"), value);
    }
    m
}

fn shape(meta: &Metadata, without: &[&str]) -> Result<Shape, String> {
    let mut writer = Writer::new("deepseek4");
    for (key, value) in meta.iter().filter(|(k, _)| !without.contains(k)) {
        writer.set(key, value.clone());
    }
    let mut bytes = Vec::new();
    writer.write(&mut bytes, &mut |_, _| Ok(())).unwrap();
    Shape::from_gguf(&Gguf::from_bytes(bytes).unwrap()).map_err(|e| e.to_string())
}

#[test]
fn flash_is_accepted() {
    let s = shape(&flash(), &[]).unwrap();
    let count = |k: fn(&LayerKind) -> bool| s.layers.iter().filter(|l| k(l)).count();
    assert_eq!(s.layers.len(), 43);
    assert_eq!(count(|k| *k == LayerKind::Window), 2);
    assert_eq!(count(|k| *k == LayerKind::Indexed), 21);
    assert_eq!(count(|k| *k == LayerKind::Pooled { ratio: 128 }), 20);
    assert_eq!((s.q_width(), s.out_low_width(), s.streams_width(), s.hc_mix()), (32768, 8192, 16384, 24));
}

/// About 3.5 GB for a million tokens (architecture A.13), and a session allocates just that.
#[test]
fn flash_cache_at_a_million_tokens() {
    let shape = shape(&flash(), &[]).unwrap();
    let layout = Layout::new(&shape, KvFormat::Packed, false, 1_000_000, 256);
    let bytes = layout.bytes();
    assert!((3_500_000_000..3_560_000_000).contains(&bytes), "{bytes}");
    let mut cpu = Cpu::new(&shape, Options { max_rows: 1, ..Options::default() }).unwrap();
    let store = cpu.store(&layout).unwrap();
    assert_eq!(store.bytes() as u64, bytes);
}

#[test]
fn informative_keys_may_be_absent() {
    let optional = [
        "deepseek4.context_length",
        "deepseek4.attention.head_count_kv",
        "deepseek4.attention.value_length",
        "deepseek4.expert_gating_func",
        "deepseek4.expert_shared_count",
        "deepseek4.expert_weights_norm",
    ];
    shape(&flash(), &optional).unwrap();
}

#[test]
fn next_token_layers_of_other_converters_are_no_layers() {
    let mut m = flash();
    m.set("deepseek4.block_count", Value::U32(44));
    m.set("deepseek4.nextn_predict_layers", Value::U32(1));
    assert_eq!(shape(&m, &[]).unwrap().layers.len(), 43);
}

#[test]
fn errors_name_key_found_and_expected() {
    let error = |key: &str, value: Value| {
        let mut m = flash();
        m.set(key, value);
        shape(&m, &[]).unwrap_err()
    };
    assert!(
        shape(&flash(), &["deepseek4.block_count"]).unwrap_err().contains("deepseek4.block_count is missing")
    );
    for (key, value, want) in [
        ("general.architecture", Value::String("llama".into()), "found llama, expected deepseek4"),
        ("deepseek4.block_count", Value::U32(0), "found 0, expected 1 to 4096"),
        ("deepseek4.block_count", Value::U32(100), "found 44 entries, expected at least 100"),
        ("deepseek4.embedding_length", Value::I32(-4), "is i32 -4, expected"),
        ("deepseek4.embedding_length", Value::U64(u64::MAX), "expected 1 to"),
        ("deepseek4.rope.dimension_count", Value::U32(63), "found 63, expected an even number"),
        ("deepseek4.rope.dimension_count", Value::U32(1024), "expected 1 to 512"),
        ("deepseek4.attention.output_group_count", Value::U32(7), "expected a divisor of head_count 64"),
        ("deepseek4.attention.value_length", Value::U32(256), "found 256, expected 512"),
        ("deepseek4.attention.head_count_kv", Value::U32(8), "found 8, expected 1"),
        ("deepseek4.attention.indexer.key_length", Value::U32(96), "found 96, expected a power of two"),
        ("deepseek4.expert_used_count", Value::U32(300), "expected at most expert_count 256"),
        ("deepseek4.expert_gating_func", Value::U32(2), "found 2, expected 4"),
        ("deepseek4.expert_group_count", Value::U32(8), "no group-limited routing"),
        ("deepseek4.expert_weights_norm", Value::Bool(false), "found false, expected true"),
        ("deepseek4.hash_layer_count", Value::U32(44), "at most block_count 43"),
        (
            "deepseek4.swiglu_clamp_exp",
            Value::ArrayF32(vec![10.0; 5]),
            "found 5 entries, expected at least 43",
        ),
        ("deepseek4.swiglu_clamp_exp", Value::ArrayF32(vec![f32::NAN; 43]), "expected positive numbers"),
        ("deepseek4.rope.scaling.factor", Value::F32(0.0), "found 0, expected a positive number"),
        (
            "deepseek4.attention.compress_ratios",
            Value::ArrayI32(vec![-1; 43]),
            "expected an array of integers",
        ),
    ] {
        let got = error(key, value);
        assert!(got.contains(want) && got.contains("key "), "{key}: {got:?} should contain {want:?}");
    }
}

#[test]
fn missing_and_mistyped_tensors_are_named() {
    // Binding is tested on a whole file elsewhere; here, that an empty one says what it lacks.
    let mut writer = Writer::new("deepseek4");
    for (key, value) in flash().iter() {
        writer.set(key, value.clone());
    }
    let mut bytes = Vec::new();
    writer.write(&mut bytes, &mut |_, _| Ok(())).unwrap();
    let file = Gguf::from_bytes(bytes).unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let mut cpu = Cpu::new(&shape, Options { max_rows: 1, ..Options::default() }).unwrap();
    let error = ds4_model::Model::load(&mut cpu, &file, None).err().unwrap().to_string();
    assert!(error.starts_with("tensor token_embd.weight is missing from file in memory"), "{error}");
}
