//! The model's tensors, bound by name and checked against the shape once (`gguf.md` section 3).

use crate::{Backend, Error, LayerKind, Shape};
use ds4_gguf::{Gguf, Tensor, TensorType};
use ds4_quant::{dequantize_row, is_supported};

/// A model ready to run on a backend.
pub struct Model<B: Backend> {
    /// Dimensions.
    pub shape: Shape,
    /// Tensors.
    pub weights: Weights<B>,
}

/// All tensors.
pub struct Weights<B: Backend> {
    /// Token embedding `[V, D]`.
    pub embed: B::Matrix,
    /// The layers.
    pub layers: Vec<Layer<B>>,
    /// Mix of the streams before the head.
    pub head: HeadMix<B>,
    /// Norm before the output matrix.
    pub output_norm: B::Vector,
    /// Output matrix `[V, D]`.
    pub output: B::Matrix,
    /// The draft block, if the file or a companion has it.
    pub mtp: Option<Mtp<B>>,
}

/// One layer.
pub struct Layer<B: Backend> {
    /// What it attends to.
    pub kind: LayerKind,
    /// Hyper-connection around attention.
    pub attn_hc: HyperConnection<B>,
    /// Norm before attention.
    pub attn_norm: B::Vector,
    /// Attention.
    pub attn: Attention<B>,
    /// Hyper-connection around the feed-forward part.
    pub ffn_hc: HyperConnection<B>,
    /// Norm before the feed-forward part.
    pub ffn_norm: B::Vector,
    /// Feed-forward part.
    pub ffn: FeedForward<B>,
}

/// Control of a hyper-connection (A.3).
pub struct HyperConnection<B: Backend> {
    /// `[(2+N)*N, N*D]`.
    pub mix: B::Matrix,
    /// Scales of pre, post and comb; then the offsets: N pre, N post, N*N comb.
    pub affine: B::Vector,
}

/// Mix of the streams before a head (A.3).
pub struct HeadMix<B: Backend> {
    /// `[N, N*D]`.
    pub mix: B::Matrix,
    /// Its scale, then N offsets.
    pub affine: B::Vector,
}

/// Attention weights (A.5).
pub struct Attention<B: Backend> {
    /// Query, low rank `[QL, D]`.
    pub q_a: B::Matrix,
    /// Norm of the low-rank query.
    pub q_a_norm: B::Vector,
    /// Query heads `[H*d, QL]`.
    pub q_b: B::Matrix,
    /// Key/value row `[d, D]`.
    pub kv: B::Matrix,
    /// Its norm.
    pub kv_norm: B::Vector,
    /// Sink logit of each head.
    pub sinks: B::Vector,
    /// Output projection, low rank, in groups `[G*OL, H/G*d]`.
    pub out_a: B::Matrix,
    /// Output projection `[D, G*OL]`.
    pub out_b: B::Matrix,
    /// Compressor of KV rows, where the layer compresses.
    pub compressor: Option<Compressor<B>>,
    /// Indexer, where the layer selects.
    pub indexer: Option<Indexer<B>>,
}

/// What a compressor's rows are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Rows that are attended to.
    Rows,
    /// Keys by which the indexer scores those rows.
    Keys,
}

/// Compressor weights (A.6); `n` is twice the row width where windows overlap.
pub struct Compressor<B: Backend> {
    /// Values `[n, D]`.
    pub kv: B::Matrix,
    /// Gates `[n, D]`.
    pub gate: B::Matrix,
    /// Gate offset by place in the window, `[ratio, n]`.
    pub ape: B::Vector,
    /// Norm of a row.
    pub norm: B::Vector,
}

/// Indexer weights (A.7).
pub struct Indexer<B: Backend> {
    /// Query heads `[IH*ID, QL]`.
    pub q: B::Matrix,
    /// Weight of each head `[IH, D]`.
    pub weights: B::Matrix,
    /// Compressor of keys.
    pub compressor: Compressor<B>,
}

/// Feed-forward weights (A.8).
pub struct FeedForward<B: Backend> {
    /// Router `[E, D]`.
    pub router: B::Matrix,
    /// How experts are chosen.
    pub choice: Choice<B>,
    /// Gate `[E, I, D]`.
    pub gate: B::Experts,
    /// Up `[E, I, D]`.
    pub up: B::Experts,
    /// Down `[E, D, I]`.
    pub down: B::Experts,
    /// The expert every token uses.
    pub shared: SharedExpert<B>,
    /// SwiGLU clamp.
    pub clamp: f32,
}

/// How experts are chosen (A.8).
pub enum Choice<B: Backend> {
    /// By token id, from a table `[V, K]`.
    Hash(B::Table),
    /// By score plus a bias that only counts for the choice.
    Score(B::Vector),
}

/// Shared expert (A.8).
pub struct SharedExpert<B: Backend> {
    /// Gate `[I, D]`.
    pub gate: B::Matrix,
    /// Up `[I, D]`.
    pub up: B::Matrix,
    /// Down `[D, I]`.
    pub down: B::Matrix,
}

/// The draft block (A.11).
pub struct Mtp<B: Backend> {
    /// Embedding projection `[D, D]`.
    pub e_proj: B::Matrix,
    /// Stream projection `[D, D]`.
    pub h_proj: B::Matrix,
    /// Norm of the embedding.
    pub e_norm: B::Vector,
    /// Norm of each stream.
    pub h_norm: B::Vector,
    /// The block.
    pub layer: Layer<B>,
    /// Mix of the streams before the head.
    pub head: HeadMix<B>,
    /// Norm before the output matrix.
    pub norm: B::Vector,
}

impl<B: Backend> Model<B> {
    /// Binds the tensors of `file` to `backend`, and the draft block of `mtp` or of the file itself.
    pub fn load(backend: &mut B, file: &Gguf, mtp: Option<&Gguf>) -> Result<Self, Error> {
        Self::load_with(backend, file, mtp, &mut |_| {})
    }

    /// The same; `progress` is told the bytes of every matrix that the backend has taken.
    pub fn load_with(
        backend: &mut B,
        file: &Gguf,
        mtp: Option<&Gguf>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, Error> {
        let shape = Shape::from_gguf(file)?;
        let (d, n) = (shape.width, shape.streams_width());
        let mut bind = Binder { backend, shape: &shape, file, progress };
        let embed = bind.matrix("token_embd.weight", shape.vocab, d)?;
        let layers = (0..shape.layers.len()).map(|l| bind.layer(l)).collect::<Result<_, _>>()?;
        let head = bind.head_mix("output_hc", n)?;
        let output_norm = bind.vector("output_norm.weight", d)?;
        let output = bind.matrix("output.weight", shape.vocab, d)?;
        let mtp_file = mtp.or_else(|| file.tensor("mtp.0.e_proj.weight").map(|_| file));
        let mtp = match mtp_file {
            Some(file) => Some(Binder { backend, shape: &shape, file, progress }.mtp()?),
            None => None,
        };
        let weights = Weights { embed, layers, head, output_norm, output, mtp };
        Ok(Model { shape, weights })
    }
}

const TYPES: &str = "one of F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4";

struct Binder<'a, B: Backend> {
    backend: &'a mut B,
    shape: &'a Shape,
    file: &'a Gguf,
    progress: &'a mut dyn FnMut(u64),
}

impl<B: Backend> Binder<'_, B> {
    fn find(&self, name: &str, dims: &[usize]) -> Result<Tensor, Error> {
        let tensor = self.file.tensor(name).ok_or_else(|| Error::MissingTensor {
            name: name.into(),
            file: self.file.source().to_string(),
        })?;
        let expected: Vec<u64> = dims.iter().map(|&d| d as u64).collect();
        if tensor.dims() == expected {
            return Ok(tensor);
        }
        Err(Error::TensorDims { name: name.into(), found: tensor.dims().to_vec(), expected })
    }

    fn typed(
        &self,
        name: &str,
        dims: &[usize],
        expected: &'static str,
        ok: impl Fn(TensorType) -> bool,
    ) -> Result<Tensor, Error> {
        let tensor = self.find(name, dims)?;
        if ok(tensor.ty()) {
            return Ok(tensor);
        }
        Err(Error::TensorType { name: name.into(), found: tensor.ty(), expected })
    }

    fn matrix(&mut self, name: &str, out: usize, input: usize) -> Result<B::Matrix, Error> {
        let tensor = self.typed(name, &[input, out], TYPES, is_supported)?;
        let matrix = self.backend.matrix(&tensor, out, input)?;
        (self.progress)(tensor.bytes().len() as u64);
        Ok(matrix)
    }

    fn experts(&mut self, name: &str, out: usize, input: usize) -> Result<B::Experts, Error> {
        let count = self.shape.experts;
        let tensor = self.typed(name, &[input, out, count], TYPES, is_supported)?;
        let experts = self.backend.experts(&tensor, count, out, input)?;
        (self.progress)(tensor.bytes().len() as u64);
        Ok(experts)
    }

    /// Decoded values of a small tensor. Others' tools quantize the compressors' offsets, which are tables, too.
    fn values(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>, Error> {
        let tensor = self.typed(name, dims, TYPES, is_supported)?;
        let mut values = vec![0.0; dims.iter().product()];
        dequantize_row(tensor.ty(), tensor.bytes(), &mut values).map_err(|_| Error::TensorType {
            name: name.into(),
            found: tensor.ty(),
            expected: TYPES,
        })?;
        Ok(values)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector, Error> {
        let values = self.values(name, &[len])?;
        Ok(self.backend.vector(values)?)
    }

    fn hyper(&mut self, prefix: &str) -> Result<HyperConnection<B>, Error> {
        let (mix, width) = (self.shape.hc_mix(), self.shape.streams_width());
        Ok(HyperConnection {
            mix: self.matrix(&format!("{prefix}_fn.weight"), mix, width)?,
            affine: self.affine(prefix, 3, mix)?,
        })
    }

    fn head_mix(&mut self, prefix: &str, width: usize) -> Result<HeadMix<B>, Error> {
        let n = self.shape.streams;
        Ok(HeadMix {
            mix: self.matrix(&format!("{prefix}_fn.weight"), n, width)?,
            affine: self.affine(prefix, 1, n)?,
        })
    }

    /// Scales and offsets of control numbers.
    fn affine(&mut self, prefix: &str, scales: usize, offsets: usize) -> Result<B::Vector, Error> {
        let mut values = self.values(&format!("{prefix}_scale.weight"), &[scales])?;
        values.extend(self.values(&format!("{prefix}_base.weight"), &[offsets])?);
        Ok(self.backend.vector(values)?)
    }

    fn layer(&mut self, l: usize) -> Result<Layer<B>, Error> {
        let hash = l < self.shape.hash_layers;
        self.block(&format!("blk.{l}."), self.shape.layers[l], hash, self.shape.clamp_of(l))
    }

    fn block(&mut self, p: &str, kind: LayerKind, hash: bool, clamp: f32) -> Result<Layer<B>, Error> {
        let d = self.shape.width;
        Ok(Layer {
            kind,
            attn_hc: self.hyper(&format!("{p}hc_attn"))?,
            attn_norm: self.vector(&format!("{p}attn_norm.weight"), d)?,
            attn: self.attention(p, kind)?,
            ffn_hc: self.hyper(&format!("{p}hc_ffn"))?,
            ffn_norm: self.vector(&format!("{p}ffn_norm.weight"), d)?,
            ffn: self.feed_forward(p, hash, clamp)?,
        })
    }

    fn attention(&mut self, p: &str, kind: LayerKind) -> Result<Attention<B>, Error> {
        let s = self.shape;
        let compressor = match kind.ratio() {
            Some(ratio) => Some(self.compressor(&format!("{p}attn_compressor"), kind, ratio, s.head_dim)?),
            None => None,
        };
        let indexer = match kind {
            LayerKind::Indexed => Some(Indexer {
                q: self.matrix(
                    &format!("{p}indexer.attn_q_b.weight"),
                    s.index_heads * s.index_dim,
                    s.q_rank,
                )?,
                weights: self.matrix(&format!("{p}indexer.proj.weight"), s.index_heads, s.width)?,
                compressor: self.compressor(&format!("{p}indexer_compressor"), kind, 4, s.index_dim)?,
            }),
            _ => None,
        };
        Ok(Attention {
            q_a: self.matrix(&format!("{p}attn_q_a.weight"), s.q_rank, s.width)?,
            q_a_norm: self.vector(&format!("{p}attn_q_a_norm.weight"), s.q_rank)?,
            q_b: self.matrix(&format!("{p}attn_q_b.weight"), s.q_width(), s.q_rank)?,
            kv: self.matrix(&format!("{p}attn_kv.weight"), s.head_dim, s.width)?,
            kv_norm: self.vector(&format!("{p}attn_kv_a_norm.weight"), s.head_dim)?,
            sinks: self.vector(&format!("{p}attn_sinks.weight"), s.heads)?,
            out_a: self.matrix(
                &format!("{p}attn_output_a.weight"),
                s.out_low_width(),
                s.q_width() / s.out_groups,
            )?,
            out_b: self.matrix(&format!("{p}attn_output_b.weight"), s.width, s.out_low_width())?,
            compressor,
            indexer,
        })
    }

    fn compressor(
        &mut self,
        p: &str,
        kind: LayerKind,
        ratio: usize,
        row: usize,
    ) -> Result<Compressor<B>, Error> {
        let n = if kind == LayerKind::Indexed { 2 * row } else { row };
        let ape = self.values(&format!("{p}_ape.weight"), &[n, ratio])?;
        Ok(Compressor {
            kv: self.matrix(&format!("{p}_kv.weight"), n, self.shape.width)?,
            gate: self.matrix(&format!("{p}_gate.weight"), n, self.shape.width)?,
            ape: self.backend.vector(ape)?,
            norm: self.vector(&format!("{p}_norm.weight"), row)?,
        })
    }

    fn feed_forward(&mut self, p: &str, hash: bool, clamp: f32) -> Result<FeedForward<B>, Error> {
        let (d, i, e) = (self.shape.width, self.shape.expert_width, self.shape.experts);
        let choice = if hash { self.hash_table(p)? } else { self.score_bias(p)? };
        Ok(FeedForward {
            router: self.matrix(&format!("{p}ffn_gate_inp.weight"), e, d)?,
            choice,
            gate: self.experts(&format!("{p}ffn_gate_exps.weight"), i, d)?,
            up: self.experts(&format!("{p}ffn_up_exps.weight"), i, d)?,
            down: self.experts(&format!("{p}ffn_down_exps.weight"), d, i)?,
            shared: SharedExpert {
                gate: self.matrix(&format!("{p}ffn_gate_shexp.weight"), i, d)?,
                up: self.matrix(&format!("{p}ffn_up_shexp.weight"), i, d)?,
                down: self.matrix(&format!("{p}ffn_down_shexp.weight"), d, i)?,
            },
            clamp,
        })
    }

    /// The bias is optional: without it the scores alone decide.
    fn score_bias(&mut self, p: &str) -> Result<Choice<B>, Error> {
        let name = format!("{p}exp_probs_b.bias");
        let experts = self.shape.experts;
        let bias = match self.file.tensor(&name) {
            Some(_) => self.values(&name, &[experts])?,
            None => vec![0.0; experts],
        };
        Ok(Choice::Score(self.backend.vector(bias)?))
    }

    fn hash_table(&mut self, p: &str) -> Result<Choice<B>, Error> {
        let name = format!("{p}ffn_gate_tid2eid.weight");
        let (used, experts) = (self.shape.experts_used, self.shape.experts);
        let tensor = self.typed(&name, &[used, self.shape.vocab], "I32", |ty| ty == TensorType::I32)?;
        let values: Vec<i32> =
            tensor.bytes().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        match values.iter().find(|&&v| v < 0 || v as usize >= experts) {
            Some(&value) => Err(Error::TableValue { name, value: i64::from(value), limit: experts }),
            None => Ok(Choice::Hash(self.backend.table(values, used)?)),
        }
    }

    fn mtp(&mut self) -> Result<Mtp<B>, Error> {
        let d = self.shape.width;
        let clamp = self.shape.clamp_of(self.shape.layers.len());
        Ok(Mtp {
            e_proj: self.matrix("mtp.0.e_proj.weight", d, d)?,
            h_proj: self.matrix("mtp.0.h_proj.weight", d, d)?,
            e_norm: self.vector("mtp.0.enorm.weight", d)?,
            h_norm: self.vector("mtp.0.hnorm.weight", d)?,
            layer: self.block("mtp.0.", LayerKind::Window, false, clamp)?,
            head: self.head_mix("mtp.0.hc_head", self.shape.streams_width())?,
            norm: self.vector("mtp.0.norm.weight", d)?,
        })
    }
}
