//! What a file will hold: every tensor with its type, before anything is read but names and shapes.

use crate::imatrix::Importances;
use crate::names::{Class, Item, items};
use crate::{Checkpoint, Error, Imatrix, Override, Recipe};
use ds4_gguf::{TensorType, Value, Writer};

/// Where the draft block goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// Model and draft block.
    #[default]
    Whole,
    /// Without the draft block.
    Model,
    /// The draft block alone.
    Draft,
}

/// How a file is to be made.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Name in its metadata.
    pub name: &'a str,
    /// Types.
    pub recipe: Recipe,
    /// Other types for some; of several for one tensor the last counts.
    pub overrides: &'a [Override],
    /// Importances of columns, and the name of their file.
    pub imatrix: Option<(&'a Imatrix, &'a str)>,
    /// Which tensors.
    pub content: Content,
}

/// A tensor to be made.
pub struct Planned<'a> {
    pub(crate) item: Item,
    /// Its type.
    pub ty: TensorType,
    /// Dimensions, the contiguous one first.
    pub dims: Vec<u64>,
    /// Bytes of its data.
    pub bytes: u64,
    pub(crate) importances: Option<Importances<'a>>,
}

impl Planned<'_> {
    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.item.to
    }

    /// Values.
    pub fn weights(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Whether an importance matrix has a say in it.
    pub fn is_weighted(&self) -> bool {
        self.importances.is_some()
    }
}

/// A file to be made.
pub struct Plan<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) writer: Writer,
    tensors: Vec<Planned<'a>>,
}

impl<'a> Plan<'a> {
    /// Plans a file of `checkpoint`.
    ///
    /// # Errors
    /// If an override is about no tensor or not possible, a row is not whole blocks of its type, or the importance matrix is of
    /// another model.
    pub fn new(checkpoint: &'a Checkpoint, options: &Options<'a>) -> Result<Self, Error> {
        let config = checkpoint.config();
        let mut writer = Writer::new("deepseek4");
        describe(&mut writer, checkpoint, options)?;
        let mut tensors = Vec::new();
        // Of the whole model: others' matrices know nothing of draft blocks.
        let mut weighted = false;
        let mut used = vec![false; options.overrides.len()];
        for item in items(config) {
            let mut ty = options.recipe.ty(&item, config.num_hidden_layers as usize);
            for (other, used) in options.overrides.iter().zip(&mut used) {
                if let Some(other) = other.ty(&item) {
                    (ty, *used) = (other?, true);
                }
            }
            let importances = importances(options.imatrix, &item, ty, config.n_routed_experts)?;
            weighted |= importances.is_some();
            let is_draft = item.to.starts_with("mtp.");
            if options.content == if is_draft { Content::Model } else { Content::Draft } {
                continue;
            }
            let dims = dims(&item, config.n_routed_experts);
            let bytes = writer.tensor(&item.to, &dims, ty)?;
            tensors.push(Planned { item, ty, dims, bytes, importances });
        }
        if let Some((other, _)) = options.overrides.iter().zip(&used).find(|(_, used)| !**used) {
            return Err(Error::Plan(format!("{}: no tensor's name has that pattern", other.text())));
        }
        if let Some((_, file)) = options.imatrix.filter(|_| !weighted) {
            let what = "none of its tensors is one that is encoded by importance here";
            return Err(Error::Imatrix { path: file.into(), what: what.into() });
        }
        Ok(Plan { checkpoint, writer, tensors })
    }

    /// The tensors, in file order.
    pub fn tensors(&self) -> &[Planned<'a>] {
        &self.tensors
    }
}

/// Metadata: the model's, and what the file was made by.
fn describe(writer: &mut Writer, checkpoint: &Checkpoint, options: &Options<'_>) -> Result<(), Error> {
    writer.set("general.name", Value::String(options.name.into()));
    writer.set("general.quantized_by", Value::String("ds4".into()));
    writer.set("general.quantization_version", Value::U32(2));
    writer.set("general.file_type", Value::U32(options.recipe.file_type()));
    writer.set("ds4.quantize.recipe", Value::String(options.recipe.name().into()));
    if !options.overrides.is_empty() {
        let overrides = options.overrides.iter().map(|o| o.text().to_owned()).collect();
        writer.set("ds4.quantize.overrides", Value::ArrayString(overrides));
    }
    if let Some((imatrix, file)) = options.imatrix {
        writer.set("quantize.imatrix.file", Value::String(file.into()));
        writer.set("quantize.imatrix.dataset", Value::String(imatrix.datasets.join(", ")));
        writer.set("quantize.imatrix.entries_count", Value::U32(imatrix.tensors.len() as u32));
        writer.set("quantize.imatrix.chunks_count", Value::U32(imatrix.chunks));
    }
    for (key, value) in checkpoint.config().metadata() {
        writer.set(&key, value);
    }
    // A draft block is used beside a model, which has the vocabulary.
    if options.content != Content::Draft {
        for (key, value) in ds4_text::gguf_metadata(&checkpoint.file("tokenizer.json")?)? {
            writer.set(key, value);
        }
    }
    Ok(())
}

/// Dimensions in the file, fastest first.
fn dims(item: &Item, experts: u32) -> Vec<u64> {
    let own = item.shape.iter().rev().map(|&n| n as u64);
    own.chain((item.class == Class::Experts).then_some(u64::from(experts))).collect()
}

/// What an importance matrix knows of a tensor whose encoder can use it.
fn importances<'a>(
    imatrix: Option<(&'a Imatrix, &str)>,
    item: &Item,
    ty: TensorType,
    experts: u32,
) -> Result<Option<Importances<'a>>, Error> {
    let weighs = matches!(ty, TensorType::Q2K | TensorType::Q4K | TensorType::Iq2Xxs);
    let Some((imatrix, file)) = imatrix.filter(|_| weighs) else { return Ok(None) };
    let Some(found) = imatrix.importances(&item.to) else { return Ok(None) };
    let matrices = if item.class == Class::Experts { experts as usize } else { 1 };
    let expected = (matrices, item.shape.last().copied().unwrap_or(1));
    if found.dims() == expected {
        return Ok(Some(found));
    }
    let ((n, width), (matrices, columns)) = (found.dims(), expected);
    let what = format!(
        "tensor {}: {n} x {width} columns, the model has {matrices} x {columns}: it is of another model",
        item.to
    );
    Err(Error::Imatrix { path: file.into(), what })
}
