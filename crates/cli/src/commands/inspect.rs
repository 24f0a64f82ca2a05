//! `ds4 inspect`: what is in a file, and what it needs.

use crate::Result;
use crate::args::InspectArgs;
use crate::load;
use crate::ui::bytes;
use ds4_gguf::{Gguf, TensorInfo, Value};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{LayerKind, Shape};
use std::collections::BTreeMap;
use std::process::ExitCode;

pub(crate) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let file = load::open(args.file.as_deref())?;
    println!("{}: {}, {} tensors\n", file.source(), bytes(file.file_len()), file.tensors().len());
    metadata(&file);
    classes(&file);
    if args.tensors {
        println!("\ntensors");
        for t in file.tensors() {
            println!(
                "  {:40} {:8} {:24} {:>10}",
                t.name,
                t.ty.name(),
                format!("{:?}", t.dims),
                bytes(t.bytes)
            );
        }
    }
    match Shape::from_gguf(&file) {
        Ok(shape) => memory(&file, &shape),
        Err(e) => println!("\nnot a model this program runs: {e}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn metadata(file: &Gguf) {
    println!("metadata");
    for (key, value) in file.metadata().iter() {
        println!("  {key:48} {}", short(value));
    }
}

/// A value on one line.
fn short(value: &Value) -> String {
    fn list<T: std::fmt::Debug>(v: &[T]) -> String {
        const SHOWN: usize = 8;
        let first: Vec<String> = v.iter().take(SHOWN).map(|x| format!("{x:?}")).collect();
        let more = if v.len() > SHOWN { ", ..." } else { "" };
        format!("[{}{more}] ({})", first.join(", "), v.len())
    }
    match value {
        Value::String(s) if s.chars().count() > 60 => {
            format!("{:?}...", s.chars().take(60).collect::<String>())
        }
        Value::String(s) => format!("{s:?}"),
        Value::U8(v) => v.to_string(),
        Value::I8(v) => v.to_string(),
        Value::U16(v) => v.to_string(),
        Value::I16(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::I32(v) => v.to_string(),
        Value::U64(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        Value::ArrayU8(v) => list(v),
        Value::ArrayI8(v) => list(v),
        Value::ArrayU16(v) => list(v),
        Value::ArrayI16(v) => list(v),
        Value::ArrayU32(v) => list(v),
        Value::ArrayI32(v) => list(v),
        Value::ArrayF32(v) => list(v),
        Value::ArrayBool(v) => list(v),
        Value::ArrayString(v) => list(v),
        Value::ArrayU64(v) => list(v),
        Value::ArrayI64(v) => list(v),
        Value::ArrayF64(v) => list(v),
        Value::Nested(v) => format!("{} arrays", v.len()),
    }
}

/// What a tensor is for, by its name.
fn class(t: &TensorInfo) -> &'static str {
    let has = |part: &str| t.name.contains(part);
    match () {
        () if has("mtp.") => "draft block",
        () if has("_exps.") => "routed experts",
        () if has("_shexp.") => "shared experts",
        () if has("tid2eid") => "hash tables",
        () if has("indexer") => "indexer",
        () if has("compressor") => "compressors",
        () if has("hc_") => "hyper-connections",
        () if has("ffn_gate_inp") || has("exp_probs") => "router",
        () if has("token_embd") => "token embedding",
        () if t.name == "output.weight" => "output head",
        () if has("norm") || has("sinks") => "norms, sinks",
        () if has("attn_") => "attention projections",
        () => "other",
    }
}

fn classes(file: &Gguf) {
    let mut sums: BTreeMap<(&str, &str), (u64, u64, usize)> = BTreeMap::new();
    for t in file.tensors() {
        let sum = sums.entry((class(t), t.ty.name())).or_default();
        sum.0 += t.dims.iter().product::<u64>();
        sum.1 += t.bytes;
        sum.2 += 1;
    }
    println!("\n{:24} {:8} {:>7} {:>14} {:>12}", "class", "type", "tensors", "parameters", "bytes");
    for ((class, ty), (params, size, count)) in &sums {
        println!("{class:24} {ty:8} {count:7} {params:14} {:>12}", bytes(*size));
    }
}

fn memory(file: &Gguf, shape: &Shape) {
    let count = |f: fn(&LayerKind) -> bool| shape.layers.iter().filter(|k| f(k)).count();
    println!(
        "\n{} layers: {} window, {} indexed (ratio 4), {} pooled; trained context {}",
        shape.layers.len(),
        count(|k| *k == LayerKind::Window),
        count(|k| *k == LayerKind::Indexed),
        count(|k| matches!(k, LayerKind::Pooled { .. })),
        shape.context
    );
    let weights: u64 = file.tensors().iter().map(|t| t.bytes).sum();
    let mtp = file.tensor("mtp.0.e_proj.weight").is_some();
    println!("\n{:>10} {:>12} {:>12} {:>12}", "context", "KV cache", "KV in f32", "with weights");
    for context in [32_768, 100_000, 250_000, 1_000_000] {
        let size = |format| Layout::new(shape, format, mtp, context, 256).bytes();
        let packed = size(KvFormat::Packed);
        println!(
            "{context:10} {:>12} {:>12} {:>12}",
            bytes(packed),
            bytes(size(KvFormat::Rounded)),
            bytes(packed + weights)
        );
    }
}
