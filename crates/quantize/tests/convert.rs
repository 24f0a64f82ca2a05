//! A small checkpoint of every form, made here, converted, and read back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use ds4_cpu::Cpu;
use ds4_gguf::{Gguf, TensorType};
use ds4_model::{Model, Shape};
use ds4_quant::{dequantize_row, e8m0_to_f32, fp4, fp8};
use ds4_quantize::{
    Checkpoint, Collector, Content, Error, Imatrix, Moments, Options, Override, Plan, Recipe, compare,
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const WIDTH: usize = 160; // more than one 128-block, and the second is cut
const VOCAB: usize = 320;
const EXPERTS: usize = 3;
const EXPERT_WIDTH: usize = 64;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

/// Tensors by name: type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

struct Maker {
    random: Random,
    tensors: Tensors,
}

impl Maker {
    fn put(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.insert(name.into(), (dtype, shape.into(), bytes));
    }

    fn f32(&mut self, name: &str, shape: &[usize]) {
        let bytes = (0..shape.iter().product()).flat_map(|_| self.random.unit().to_le_bytes()).collect();
        self.put(name, Dtype::F32, shape, bytes);
    }

    fn bf16(&mut self, name: &str, shape: &[usize]) {
        let bytes = (0..shape.iter().product())
            .flat_map(|_| half::bf16::from_f32(self.random.unit()).to_le_bytes())
            .collect();
        self.put(name, Dtype::BF16, shape, bytes);
    }

    fn scales(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| 118 + (self.random.next() % 6) as u8).collect()
    }

    fn fp8(&mut self, name: &str, shape: [usize; 2]) {
        let codes = (0..shape[0] * shape[1]).map(|_| fp8::f32_to_e4m3(100.0 * self.random.unit())).collect();
        self.put(&format!("{name}.weight"), Dtype::F8_E4M3, &shape, codes);
        let blocks = [shape[0].div_ceil(128), shape[1].div_ceil(128)];
        let scales = self.scales(blocks[0] * blocks[1]);
        self.put(&format!("{name}.scale"), Dtype::F8_E8M0, &blocks, scales);
    }

    fn fp4(&mut self, name: &str, shape: [usize; 2]) {
        let codes = (0..shape[0] * shape[1] / 2).map(|_| self.random.next() as u8).collect();
        self.put(&format!("{name}.weight"), Dtype::I8, &[shape[0], shape[1] / 2], codes);
        let scales = self.scales(shape[0] * shape[1] / 32);
        self.put(&format!("{name}.scale"), Dtype::F8_E8M0, &[shape[0], shape[1] / 32], scales);
    }

    fn hyper(&mut self, prefix: &str, rows: usize, scales: usize) {
        self.f32(&format!("{prefix}_fn"), &[rows, 4 * WIDTH]);
        self.f32(&format!("{prefix}_base"), &[rows]);
        self.f32(&format!("{prefix}_scale"), &[scales]);
    }

    fn compressor(&mut self, prefix: &str, n: usize, ratio: usize, width: usize) {
        self.bf16(&format!("{prefix}.wkv.weight"), &[n, WIDTH]);
        self.bf16(&format!("{prefix}.wgate.weight"), &[n, WIDTH]);
        self.f32(&format!("{prefix}.ape"), &[ratio, n]);
        self.f32(&format!("{prefix}.norm.weight"), &[width]);
    }

    fn layer(&mut self, p: &str, ratio: usize, hash: bool) {
        for part in ["attn", "ffn"] {
            self.hyper(&format!("{p}hc_{part}"), 24, 3);
            self.f32(&format!("{p}{part}_norm.weight"), &[WIDTH]);
        }
        for (name, shape) in [
            ("wq_a", [64, WIDTH]),
            ("wq_b", [128, 64]),
            ("wkv", [64, WIDTH]),
            ("wo_a", [64, 64]),
            ("wo_b", [WIDTH, 64]),
        ] {
            self.fp8(&format!("{p}attn.{name}"), shape);
        }
        self.f32(&format!("{p}attn.q_norm.weight"), &[64]);
        self.f32(&format!("{p}attn.kv_norm.weight"), &[64]);
        self.f32(&format!("{p}attn.attn_sink"), &[2]);
        match ratio {
            4 => {
                self.compressor(&format!("{p}attn.compressor"), 128, 4, 64);
                self.fp8(&format!("{p}attn.indexer.wq_b"), [64, 64]);
                self.bf16(&format!("{p}attn.indexer.weights_proj.weight"), &[2, WIDTH]);
                self.compressor(&format!("{p}attn.indexer.compressor"), 64, 4, 32);
            }
            0 => {}
            r => self.compressor(&format!("{p}attn.compressor"), 64, r, 64),
        }
        self.bf16(&format!("{p}ffn.gate.weight"), &[EXPERTS, WIDTH]);
        if hash {
            let ids = (0..VOCAB * 2).flat_map(|i| ((i % EXPERTS) as i64).to_le_bytes()).collect();
            self.put(&format!("{p}ffn.gate.tid2eid"), Dtype::I64, &[VOCAB, 2], ids);
        } else {
            self.f32(&format!("{p}ffn.gate.bias"), &[EXPERTS]);
        }
        for (w, shape) in
            [("w1", [EXPERT_WIDTH, WIDTH]), ("w3", [EXPERT_WIDTH, WIDTH]), ("w2", [WIDTH, EXPERT_WIDTH])]
        {
            for e in 0..EXPERTS {
                self.fp4(&format!("{p}ffn.experts.{e}.{w}"), shape);
            }
            self.fp8(&format!("{p}ffn.shared_experts.{w}"), shape);
        }
    }
}

fn tensors() -> Tensors {
    let mut m = Maker { random: Random(9), tensors: Tensors::new() };
    m.bf16("embed.weight", &[VOCAB, WIDTH]);
    m.bf16("head.weight", &[VOCAB, WIDTH]);
    m.f32("norm.weight", &[WIDTH]);
    m.hyper("hc_head", 4, 1);
    m.layer("layers.0.", 0, true);
    m.layer("layers.1.", 4, false);
    m.layer("layers.2.", 128, false);
    m.fp8("mtp.0.e_proj", [WIDTH, WIDTH]);
    m.fp8("mtp.0.h_proj", [WIDTH, WIDTH]);
    for norm in ["enorm", "hnorm", "norm"] {
        m.f32(&format!("mtp.0.{norm}.weight"), &[WIDTH]);
    }
    m.hyper("mtp.0.hc_head", 4, 1);
    m.layer("mtp.0.", 0, false);
    m.tensors
}

fn config() -> serde_json::Value {
    json!({
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 64,
        "qk_rope_head_dim": 32, "q_lora_rank": 64, "o_groups": 2, "o_lora_rank": 32, "sliding_window": 16,
        "compress_ratios": [0, 4, 128, 0], "compress_rope_theta": 160000.0, "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
        "max_position_embeddings": 4096, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2, "num_hash_layers": 1, "moe_intermediate_size": EXPERT_WIDTH,
        "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_nextn_predict_layers": 1, "unknown": [1, 2]
    })
}

/// Byte tokens and the markers.
fn tokenizer() -> serde_json::Value {
    let mut alphabet = Vec::new();
    let mut extra = 0x100;
    for b in 0..=255u32 {
        alphabet.push(match b {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => b,
            _ => {
                extra += 1;
                extra - 1
            }
        });
    }
    let vocab: serde_json::Map<_, _> = alphabet
        .iter()
        .enumerate()
        .map(|(i, c)| (char::from_u32(*c).unwrap().to_string(), json!(i + 3)))
        .collect();
    let markers = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"];
    let added: Vec<_> =
        markers.iter().enumerate().map(|(i, m)| json!({"id": i, "content": m, "special": true})).collect();
    json!({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}})
}

/// Writes the checkpoint in two shards.
fn write(folder: &Path, tensors: &Tensors) {
    std::fs::write(folder.join("config.json"), config().to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    for shard in 0..2 {
        let views = tensors.iter().enumerate().filter(|(i, _)| i % 2 == shard).map(
            |(_, (name, (dtype, shape, bytes)))| {
                (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
            },
        );
        safetensors::serialize_to_file(views, None, &folder.join(format!("model-{shard}.safetensors")))
            .unwrap();
    }
}

/// By a recipe, with nothing else said.
fn options(recipe: Recipe) -> Options<'static> {
    Options { name: "test", recipe, overrides: &[], imatrix: None, content: Content::Whole }
}

fn convert(checkpoint: &Checkpoint, out: &Path, options: &Options<'_>) -> Result<(), Error> {
    Plan::new(checkpoint, options)?.write(out, &mut |_| {}).map(drop)
}

fn values(file: &Gguf, name: &str) -> Vec<f32> {
    let t = file.tensor(name).unwrap();
    let mut values = vec![0.0; t.dims().iter().product::<u64>() as usize];
    dequantize_row(t.ty(), t.bytes(), &mut values).unwrap();
    values
}

#[test]
fn converts_and_loads() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors();
    write(folder.path(), &tensors);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("model.gguf");
    let plan = Plan::new(&checkpoint, &options(Recipe::Q8)).unwrap();
    let (mut last, mut behind) = ((0, 0), 0);
    let tallies = plan
        .write(&out, &mut |p| {
            behind += usize::from(p.done < last.0);
            last = (p.done, p.total);
        })
        .unwrap();
    assert_eq!((last.0, behind), (last.1, 0));
    assert_eq!(tallies.values().map(|t| t.weights).sum::<u64>(), last.1);
    let file = Gguf::open(&out).unwrap();

    // An FP8 matrix: value = code * scale of its 128x128 block, within half a Q8_0 step.
    let (_, _, codes) = &tensors["layers.1.attn.wo_b.weight"];
    let (_, _, scales) = &tensors["layers.1.attn.wo_b.scale"];
    let got = values(&file, "blk.1.attn_output_b.weight");
    for r in 0..WIDTH {
        let row: Vec<f32> =
            (0..64).map(|c| fp8::e4m3_to_f32(codes[64 * r + c]) * e8m0_to_f32(scales[r / 128])).collect();
        near(&got[64 * r..64 * r + 64], &row);
    }
    // An expert: two codes a byte, low nibble first, a scale per 32 inputs; experts one behind the other.
    let (_, _, codes) = &tensors["layers.2.ffn.experts.2.w1.weight"];
    let (_, _, scales) = &tensors["layers.2.ffn.experts.2.w1.scale"];
    let got = values(&file, "blk.2.ffn_gate_exps.weight");
    for r in 0..EXPERT_WIDTH {
        let at = |c: usize| {
            let byte = codes[(r * WIDTH + c) / 2];
            let code = if c.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            fp4::e2m1_to_f32(code) * e8m0_to_f32(scales[(r * WIDTH + c) / 32])
        };
        let row: Vec<f32> = (0..WIDTH).map(at).collect();
        let start = (2 * EXPERT_WIDTH + r) * WIDTH;
        near(&got[start..start + WIDTH], &row);
    }
    assert_eq!(file.tensor("blk.0.ffn_gate_tid2eid.weight").unwrap().ty(), TensorType::I32);
    assert_eq!(file.tensor("blk.1.attn_compressor_ape.weight").unwrap().dims(), [128, 4]);
    assert_eq!(file.tensor("token_embd.weight").unwrap().ty(), TensorType::F16);

    // The engine takes it, draft block included.
    let shape = Shape::from_gguf(&file).unwrap();
    let mut cpu = Cpu::new(&shape, ds4_cpu::Options::default()).unwrap();
    let model = Model::load(&mut cpu, &file, None).unwrap();
    assert!(model.weights.mtp.is_some());
    let tokenizer = ds4_text::Tokenizer::from_gguf(file.metadata()).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode("héllo", ds4_text::Mode::Plain)), "héllo".as_bytes());
}

/// Equal within half a step of Q8_0 and the rounding of its scale, block by block.
fn near(got: &[f32], want: &[f32]) {
    for (got, want) in got.chunks(32).zip(want.chunks(32)) {
        let max = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= max / 254.0 + w.abs() / 1000.0 + 1e-7, "{g} vs {w}");
        }
    }
}

fn nano() -> Checkpoint {
    Checkpoint::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano"))).unwrap()
}

/// The embedded model by each recipe: the types are as named, experts are near the checkpoint's, the model loads, and the
/// number of threads changes nothing.
#[test]
fn recipes() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = nano();
    let (gate, down) = ("ffn_gate_exps.weight", "ffn_down_exps.weight");
    let made = |recipe: Recipe| {
        let out = folder.path().join(format!("{recipe:?}.gguf"));
        convert(&checkpoint, &out, &options(recipe)).unwrap();
        Gguf::open(&out).unwrap()
    };
    let exact = values(&made(Recipe::Q8), &format!("blk.1.{gate}"));
    let types = |file: &Gguf, layer: &str| {
        [gate, down].map(|name| file.tensor(&format!("{layer}{name}")).unwrap().ty())
    };
    let q2 = [TensorType::Iq2Xxs, TensorType::Q2K];
    let q4 = [TensorType::Q4K; 2];
    for (recipe, first, last, draft, most) in
        [(Recipe::Q2, q2, q2, q4, 0.40), (Recipe::Q2Q4, q2, q4, q4, 0.40), (Recipe::Q4, q4, q4, q4, 0.09)]
    {
        let file = made(recipe);
        assert_eq!(
            (types(&file, "blk.0."), types(&file, "blk.5."), types(&file, "mtp.0.")),
            (first, last, draft)
        );
        assert_eq!(file.tensor("output.weight").unwrap().ty(), TensorType::Q8_0);
        let got = values(&file, &format!("blk.1.{gate}"));
        let square =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let share = (square(&got, &exact) / square(&exact, &vec![0.0; exact.len()])).sqrt();
        assert!(share < most, "{recipe:?}: {share}");
        let shape = Shape::from_gguf(&file).unwrap();
        Model::load(&mut Cpu::new(&shape, ds4_cpu::Options::default()).unwrap(), &file, None).unwrap();
    }
    let before = std::fs::read(folder.path().join("Q2.gguf")).unwrap();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    drop(one.install(|| made(Recipe::Q2)));
    assert!(before == std::fs::read(folder.path().join("Q2.gguf")).unwrap());
}

/// The yardstick holds every value of the checkpoint, and the comparison of two files says what is closer to it.
#[test]
fn bf16_is_exact_and_files_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &tensors());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let [exact, q8] = [Recipe::Bf16, Recipe::Q8].map(|recipe| {
        let out = folder.path().join(recipe.name());
        convert(&checkpoint, &out, &options(recipe)).unwrap();
        Gguf::open(&out).unwrap()
    });
    let mut seen = 0;
    compare(&checkpoint, [&exact, &q8], &mut |c| {
        seen += 1;
        match c.types {
            [Some(TensorType::Bf16), Some(TensorType::Q8_0)] => {
                assert_eq!(c.errors[0], Some(0.0), "{}", c.name);
                assert!(c.errors[1].is_some_and(|e| e > 1e-4 && e < 0.02), "{}: {:?}", c.name, c.errors);
            }
            // F32 in the checkpoint: the only values that BF16 and F16 round.
            [Some(TensorType::Bf16), Some(TensorType::F16)] => {
                assert!(c.errors[0] < Some(4e-3), "{}", c.name);
            }
            [Some(TensorType::I32), _] => assert!(c.same && c.errors == [None, None]),
            _ => assert!(c.same, "{}: {:?}", c.name, c.types),
        }
    })
    .unwrap();
    assert_eq!(seen, exact.tensors().len());
}

#[test]
fn overrides_and_the_draft_block() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = nano();
    let parse = |list: &[&str]| list.iter().map(|o| o.parse().unwrap()).collect::<Vec<Override>>();
    let overrides =
        parse(&["_exps=q4_k", "blk\\.0\\.ffn_(gate|up)_exps=q2_k", "^output\\.weight=f16", "_ape=q8_0"]);
    let own = Options { overrides: &overrides, content: Content::Model, ..options(Recipe::Q2) };
    let (model, draft) = (folder.path().join("model.gguf"), folder.path().join("draft.gguf"));
    convert(&checkpoint, &model, &own).unwrap();
    convert(&checkpoint, &draft, &Options { content: Content::Draft, ..own.clone() }).unwrap();
    let (model, draft) = (Gguf::open(&model).unwrap(), Gguf::open(&draft).unwrap());
    let ty = |file: &Gguf, name: &str| file.tensor(name).map(|t| t.ty());
    assert_eq!(ty(&model, "blk.0.ffn_up_exps.weight"), Some(TensorType::Q2K));
    assert_eq!(ty(&model, "blk.1.ffn_up_exps.weight"), Some(TensorType::Q4K));
    assert_eq!(ty(&model, "output.weight"), Some(TensorType::F16));
    // As other tools write it.
    assert_eq!(ty(&model, "blk.2.attn_compressor_ape.weight"), Some(TensorType::Q8_0));
    assert_eq!(ty(&model, "mtp.0.e_proj.weight"), None);
    assert_eq!(ty(&draft, "mtp.0.ffn_up_exps.weight"), Some(TensorType::Q4K));
    assert!(draft.tensors().iter().all(|t| t.name.starts_with("mtp.0.")));
    assert_eq!(model.metadata().str("ds4.quantize.recipe").unwrap(), "q2");
    assert_eq!(model.metadata().str_array("ds4.quantize.overrides").unwrap()[0], "_exps=q4_k");
    let shape = Shape::from_gguf(&model).unwrap();
    let mut cpu = Cpu::new(&shape, ds4_cpu::Options::default()).unwrap();
    assert!(Model::load(&mut cpu, &model, Some(&draft)).unwrap().weights.mtp.is_some());

    for (bad, message) in
        [("nothing=f16", "no tensor"), ("attn_norm=q8_0", "cannot be Q8_0"), ("tid2eid=f16", "cannot be F16")]
    {
        let overrides = parse(&[bad]);
        let error =
            Plan::new(&checkpoint, &Options { overrides: &overrides, ..options(Recipe::Q2) }).err().unwrap();
        assert!(error.to_string().contains(message), "{error}");
    }
}

/// Second moments of everything: an expert that was never hit leans on the others, what is of another model is refused, and
/// the error counts where the importances are.
#[test]
fn importances_steer_the_errors() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = nano();
    let name = "blk.1.ffn_down_exps.weight";
    // Every fourth column matters a hundred times more.
    let sums: Vec<f32> = (0..8 * 256).map(|i| if i % 4 == 0 { 1e5 } else { 1e3 }).collect();
    let imatrix = |name: &str, matrices: usize| Imatrix {
        datasets: vec!["text".into()],
        chunks: 3,
        chunk_size: 512,
        tensors: [(
            name.to_owned(),
            Moments { sums: sums[..matrices * 256].to_vec(), counts: vec![1e3; matrices] },
        )]
        .into(),
    };
    let path = folder.path().join("imatrix.gguf");
    imatrix(name, 8).write(&path).unwrap();
    let read = Imatrix::read(&path).unwrap();
    assert_eq!(read, imatrix(name, 8));

    let made = |imatrix: Option<&Imatrix>| {
        let out = folder.path().join("m.gguf");
        let imatrix = imatrix.map(|m| (m, "imatrix.gguf"));
        convert(&checkpoint, &out, &Options { imatrix, ..options(Recipe::Q2) }).unwrap();
        Gguf::open(&out).unwrap()
    };
    let exact_path = folder.path().join("exact.gguf");
    convert(&checkpoint, &exact_path, &options(Recipe::Bf16)).unwrap();
    let exact = values(&Gguf::open(&exact_path).unwrap(), name);
    let errors = |file: &Gguf| {
        let mut errors = [0f64; 2];
        for (i, (a, b)) in values(file, name).iter().zip(&exact).enumerate() {
            errors[usize::from(i % 4 > 0)] += f64::from(a - b).powi(2);
        }
        errors
    };
    let (without, with) = (made(None), made(Some(&read)));
    let (plain, weighted) = (errors(&without), errors(&with));
    assert!(weighted[0] < 0.7 * plain[0], "{weighted:?} {plain:?}");
    let other = "blk.2.ffn_down_exps.weight";
    assert_eq!(without.tensor(other).unwrap().bytes(), with.tensor(other).unwrap().bytes());
    assert_eq!(with.metadata().str("quantize.imatrix.file").unwrap(), "imatrix.gguf");
    assert_eq!(with.metadata().u32("quantize.imatrix.chunks_count").unwrap(), 3);

    // It knows nothing of the draft block, which is made without it.
    let draft = Options { imatrix: Some((&read, "i.gguf")), content: Content::Draft, ..options(Recipe::Q2) };
    let draft = Plan::new(&checkpoint, &draft).unwrap();
    assert!(!draft.tensors().is_empty() && draft.tensors().iter().all(|t| !t.is_weighted()));

    let refused = |imatrix: &Imatrix| {
        let options = Options { imatrix: Some((imatrix, "i.gguf")), ..options(Recipe::Q2) };
        Plan::new(&checkpoint, &options).err().unwrap().to_string()
    };
    assert!(refused(&imatrix(name, 4)).contains("i.gguf: tensor blk.1.ffn_down_exps.weight: 4 x 256"));
    assert!(refused(&imatrix("blk.77.ffn_down_exps.weight", 8)).contains("none of its tensors"));
}

#[test]
fn what_is_no_importance_matrix() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let good = Moments { sums: vec![1.0; 4], counts: vec![1.0; 2] };
    let error = |moments: Moments| {
        let imatrix = Imatrix { tensors: [("a.weight".to_owned(), moments)].into(), ..Imatrix::default() };
        imatrix.write(&path).unwrap();
        Imatrix::read(&path).map(drop).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(error(good.clone()), "");
    assert!(error(Moments { sums: vec![1.0, -1.0, 0.0, 0.0], ..good.clone() }).contains("holds -1"));
    assert!(error(Moments { counts: vec![f32::NAN, 1.0], ..good }).contains("holds NaN"));
    convert(&nano(), &path, &options(Recipe::Q2)).unwrap();
    assert!(Imatrix::read(&path).err().unwrap().to_string().contains("no importance matrix"));
}

/// What the collector sums up is what a pass shows, tensor by tensor and expert by expert.
#[test]
fn moments_of_a_pass() {
    let file =
        Gguf::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano/ds4-nano.gguf")).unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let options = ds4_cpu::Options { exact: true, max_rows: 32, ..Default::default() };
    let mut cpu = Cpu::new(&shape, options).unwrap();
    let model = Model::load(&mut cpu, &file, None).unwrap();
    let mut pass = ds4_model::Pass::new(&mut cpu, &shape, 32).unwrap();
    let layout = ds4_model::cache::Layout::new(&shape, ds4_model::cache::KvFormat::Packed, true, 64, 32);
    let tokens: Vec<u32> = (0..50).map(|i| (i * 37) % 4000).collect();
    let mut run = |tap: &mut (dyn ds4_model::Tap + Send)| {
        let mut store = ds4_model::Backend::store(&mut cpu, &layout).unwrap();
        let mut logits = ds4_model::Logits::default();
        for (i, part) in tokens.chunks(32).enumerate() {
            let want = ds4_model::Want::All;
            let mut runs = [ds4_model::Run { store: &mut store, start: 32 * i, tokens: part, want }];
            pass.forward(&model, &mut cpu, &layout, &mut runs, &mut logits, tap).unwrap();
        }
    };
    let (mut collector, mut taps) = (Collector::new(&shape), ds4_testkit::Taps::default());
    run(&mut collector);
    run(&mut taps);
    let imatrix = collector.finish(|name| file.tensor(name).is_some());
    let close =
        |got: f32, want: f64| assert!((f64::from(got) - want).abs() <= 1e-5 * want + 1e-9, "{got} vs {want}");
    let square = |v: f32| f64::from(v) * f64::from(v);

    let x = &taps.seen["blk.3.attn_in"].1;
    for name in ["blk.3.attn_q_a.weight", "blk.3.attn_compressor_kv.weight"] {
        let moments = &imatrix.tensors[name];
        assert_eq!(moments.counts, [50.0]);
        (0..256).for_each(|c| close(moments.sums[c], (0..50).map(|r| square(x[256 * r + c])).sum()));
    }
    let heads = &taps.seen["blk.3.heads"].1;
    let moments = &imatrix.tensors["blk.3.attn_output_a.weight"];
    assert_eq!((moments.counts[0], moments.sums.len()), (100.0, 256), "two groups of two heads");
    close(moments.sums[7], (0..50).map(|r| square(heads[512 * r + 7]) + square(heads[512 * r + 263])).sum());

    let (ids, x, hidden) =
        (&taps.seen["blk.4.router_ids"].1, &taps.seen["blk.4.ffn_in"].1, &taps.seen["blk.4.hidden"].1);
    let (up, down) =
        (&imatrix.tensors["blk.4.ffn_up_exps.weight"], &imatrix.tensors["blk.4.ffn_down_exps.weight"]);
    for e in 0..8 {
        let pairs: Vec<usize> = (0..200).filter(|&pair| ids[pair] as usize == e).collect();
        assert_eq!((up.counts[e], down.counts[e]), (pairs.len() as f32, pairs.len() as f32));
        for c in [0, 100, 255] {
            close(up.sums[256 * e + c], pairs.iter().map(|pair| square(x[pair / 4 * 256 + c])).sum());
            let at = |pair: &usize| (pair / 4 * 5 + pair % 4) * 256 + c;
            close(down.sums[256 * e + c], pairs.iter().map(|pair| square(hidden[at(pair)])).sum());
        }
    }
    assert_eq!(imatrix.tensors["blk.4.ffn_down_shexp.weight"].counts, [50.0]);
    close(
        imatrix.tensors["blk.4.ffn_down_shexp.weight"].sums[9],
        (0..50).map(|r| square(hidden[(5 * r + 4) * 256 + 9])).sum(),
    );
    // The hidden activations are what the down projections met: with them the sublayer's output can be computed.
    let out = &taps.seen["blk.4.ffn_out"].1;
    let (routed, shared) =
        (values(&file, "blk.4.ffn_down_exps.weight"), values(&file, "blk.4.ffn_down_shexp.weight"));
    for r in [0, 31, 49] {
        let product = |w: &[f32], h: &[f32]| w.iter().zip(h).map(|(w, h)| f64::from(w * h)).sum::<f64>();
        let mut y = product(&shared[..256], &hidden[(5 * r + 4) * 256..(5 * r + 5) * 256]);
        for slot in 0..4 {
            let e = ids[4 * r + slot] as usize;
            y += product(
                &routed[e * 65536..e * 65536 + 256],
                &hidden[(5 * r + slot) * 256..(5 * r + slot + 1) * 256],
            );
        }
        assert!((y - f64::from(out[256 * r])).abs() < 1e-3, "{y} vs {}", out[256 * r]);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors();
        change(&mut tensors);
        write(folder.path(), &tensors);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let out = folder.path().join("x.gguf");
        let e = convert(&checkpoint, &out, &options(Recipe::Q8)).unwrap_err().to_string();
        assert!(!out.exists(), "a failed conversion leaves no file");
        e
    };
    let missing = error(&|t| drop(t.remove("layers.1.attn.wq_b.scale")));
    assert_eq!(missing, "tensor layers.1.attn.wq_b.scale is in none of the checkpoint's files");
    let shape = error(&|t| {
        let (_, shape, bytes) = t.get_mut("norm.weight").unwrap();
        shape[0] -= 1;
        bytes.truncate(4 * (WIDTH - 1));
    });
    assert_eq!(shape, "tensor norm.weight: found shape [159], expected [160]");
    let table = error(&|t| t.get_mut("layers.0.ffn.gate.tid2eid").unwrap().2[0] = 9);
    assert_eq!(table, "tensor layers.0.ffn.gate.tid2eid: found value 9, expected 0 to 2");
    let nan = error(&|t| t.get_mut("layers.0.attn.wkv.weight").unwrap().2[0] = 0x7f);
    assert!(nan.starts_with("tensor layers.0.attn.wkv.weight: found NaN in row 0, expected"), "{nan}");
    // The scale that stands for no number; what it decodes to besides is not finite.
    let scale = error(&|t| t.get_mut("layers.0.attn.wkv.scale").unwrap().2[0] = 0xff);
    assert!(scale.starts_with("tensor layers.0.attn.wkv.weight: found "), "{scale}");
    assert!(scale.contains("in row 0, expected numbers within"), "{scale}");
    let large = error(&|t| {
        let large = half::bf16::from_f32(1e5).to_le_bytes();
        t.get_mut("embed.weight").unwrap().2[..2].copy_from_slice(&large);
    });
    assert!(large.starts_with("tensor embed.weight: found 99840 in row 0, expected"), "{large}");
    write(folder.path(), &tensors());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("x.gguf");
    let narrow = convert(&checkpoint, &out, &options(Recipe::Q2)).unwrap_err().to_string();
    assert!(narrow.contains("ffn_gate_exps") && narrow.contains("IQ2_XXS"), "{narrow}");
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert!(
        Checkpoint::open(folder.path()).err().unwrap().to_string().contains("missing field `vocab_size`")
    );
    std::fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
    std::fs::write(folder.path().join("model-0.safetensors"), [255; 40]).unwrap();
    assert!(Checkpoint::open(folder.path()).err().unwrap().to_string().contains("model-0.safetensors"));
}
