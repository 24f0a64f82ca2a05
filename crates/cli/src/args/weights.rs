//! Flags of what makes and judges weights.

use super::{ComputeArgs, ModelArgs};
use clap::Args;
use clap::builder::TypedValueParser;
use ds4_quantize::{Override, Recipe};
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct QuantizeArgs {
    /// Folder of the checkpoint: safetensors, config.json, tokenizer.json
    pub(crate) checkpoint: PathBuf,
    /// Model file to write (GGUF); if a run is interrupted, the same command goes on where it stopped
    #[arg(required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    /// Types of the tensors
    #[arg(long, value_enum, default_value_t = RecipeArg::Q8)]
    pub(crate) recipe: RecipeArg,
    /// Another type for the tensors in whose names a pattern (a regular expression) is found, such as
    /// 'blk\.[0-2]\..*_exps=q4_k'; of several the last counts
    #[arg(long = "tensor-type", value_name = "PATTERN=TYPE")]
    pub(crate) overrides: Vec<Override>,
    /// Importance matrix (GGUF), as `ds4 imatrix` writes it
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,
    /// Write the draft block to a file of its own instead of into the model's
    #[arg(long, value_name = "FILE")]
    pub(crate) mtp_out: Option<PathBuf>,
    /// Only print what would be written
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Then print how far each tensor is from the checkpoint, in the file written and in this one
    #[arg(long, value_name = "GGUF", conflicts_with = "dry_run")]
    pub(crate) compare: Option<PathBuf>,
    /// Name in the file's metadata [default: the folder's]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum RecipeArg {
    /// Experts' gate and up IQ2_XXS, down Q2_K, the draft block's Q4_K; other large matrices Q8_0, the embedding and control
    /// matrices F16
    Q2,
    /// The same, but Q4_K for the experts of the last seventh of the layers
    #[value(name = "q2-q4", alias = "q2q4")]
    Q2Q4,
    /// Experts Q4_K
    Q4,
    /// Experts Q8_0
    Q8,
    /// All matrices BF16, which holds a checkpoint's values exactly
    Bf16,
}

impl From<RecipeArg> for Recipe {
    fn from(arg: RecipeArg) -> Self {
        match arg {
            RecipeArg::Q2 => Recipe::Q2,
            RecipeArg::Q2Q4 => Recipe::Q2Q4,
            RecipeArg::Q4 => Recipe::Q4,
            RecipeArg::Q8 => Recipe::Q8,
            RecipeArg::Bf16 => Recipe::Bf16,
        }
    }
}

/// How texts are read.
#[derive(Args)]
pub(crate) struct TextArgs {
    /// Most tokens of a sequence; longer texts are cut
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..).map(|n| n as usize))]
    pub(crate) ctx: usize,
    /// Most tokens in all; of more, sequences evenly spread over the texts are taken
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..).map(|n| n as usize))]
    pub(crate) max_tokens: Option<usize>,
    /// f32 activations against decoded weights instead of int8 activations
    #[arg(long)]
    pub(crate) exact: bool,
}

#[derive(Args)]
pub(crate) struct ImatrixArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to run the model over: a file or a folder of files, of plain text (.txt) or JSON lines (.jsonl) of {"text": ...} or
    /// {"messages": [...]}; conversations are rendered with and without thinking
    #[arg(long, value_name = "FILE")]
    pub(crate) dataset: PathBuf,
    /// Importance matrix to write (GGUF)
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) text: TextArgs,
}

#[derive(Args)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to predict: a file or a folder of files, of plain text (.txt) or JSON lines (.jsonl) of {"text": ...} or {"messages":
    /// [...]}
    #[arg(long = "text", value_name = "FILE", required_unless_present = "continuations")]
    pub(crate) file: Option<PathBuf>,
    /// Instead, answers to score, JSON lines of {"prompt": text or "messages": [...], "continuation": text or "tokens": [ids],
    /// "logprobs": [reference, for each token]}
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub(crate) continuations: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) text: TextArgs,
}

#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Model file that is measured against (GGUF)
    pub(crate) base: PathBuf,
    /// Model file that is measured
    pub(crate) other: PathBuf,
    /// Text to predict, as for `ds4 perplexity`
    #[arg(long = "text", value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) text: TextArgs,
}
