//! The command line.

mod weights;

pub(crate) use weights::{CompareArgs, ImatrixArgs, PerplexityArgs, QuantizeArgs, TextArgs};

use clap::builder::TypedValueParser;
use clap::{Args, Parser, Subcommand};
use ds4_testkit::Synthetic;
use ds4_text::Profile;
use std::path::PathBuf;

/// Runs DeepSeek V4 Flash on hardware you own.
///
/// With -p, or with a prompt on standard input, it answers once; alone it starts a conversation. Without -m it runs ./ds4flash.gguf if that
/// exists, else the small ds4-nano that is part of this program.
#[derive(Parser)]
#[command(name = "ds4", version, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) chat: ChatArgs,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show a file's metadata, tensors and memory needs
    Inspect(InspectArgs),
    /// Serve the model over HTTP: OpenAI's and Anthropic's interfaces
    Serve(ServeArgs),
    /// Point coding agents at a server
    Agents(AgentsArgs),
    /// Measure prefill and decode speed
    Bench(BenchArgs),
    /// List devices, what fits on them, and prove that each computes right
    Doctor(DoctorArgs),
    /// Score a model on cases with checkable answers
    Eval(EvalArgs),
    /// Make a model file from a checkpoint
    Quantize(QuantizeArgs),
    /// Find out which columns of the weights matter, for quantize
    Imatrix(ImatrixArgs),
    /// Measure how well a model predicts a text
    Perplexity(PerplexityArgs),
    /// Measure how far a model's predictions are from another's
    Compare(CompareArgs),
    /// Look after the state that is kept on disk
    Cache(CacheArgs),
    /// Encode lines of JSON {"text": ..., "plain": bool} to token ids
    Tokenize(TokenizeArgs),
    /// Render conversations, lines of JSON, to prompts
    Render(RenderArgs),
    /// Parse answers, lines of JSON, to messages
    Parse(ParseArgs),
    /// Compute the logits of every position of a token sequence
    Logits(LogitsArgs),
    /// Compare two folders of named intermediate results
    Diff(DiffArgs),
}

/// Which model, and how it is computed.
#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// Model file (GGUF)
    #[arg(short, long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Draft block file (GGUF), where the model file has none
    #[arg(long, value_name = "FILE")]
    pub(crate) mtp: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// What computes.
#[derive(Args, Clone)]
pub(crate) struct ComputeArgs {
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) threads: usize,
    /// What computes; auto is the first GPU on which the model fits, else the CPU
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// GPU that computes, as `ds4 doctor` numbers them [default: the first]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub(crate) device: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BackendArg {
    Auto,
    Cpu,
    Cuda,
    Metal,
    Vulkan,
}

#[derive(Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Answer this prompt and end
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Answer the prompt in this file and end
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// System text
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Most tokens of an answer [default: as many as fit]
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) max_tokens: Option<usize>,
    /// Context in tokens
    #[arg(long, value_name = "N", default_value_t = 32768)]
    pub(crate) ctx: usize,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Say where the state after a prompt came from
    #[arg(long)]
    pub(crate) verbose: bool,
    /// Think before answering
    #[arg(long, conflicts_with_all = ["nothink", "think_max"])]
    pub(crate) think: bool,
    /// Answer directly (the default)
    #[arg(long, conflicts_with = "think_max")]
    pub(crate) nothink: bool,
    /// Think as thoroughly as possible
    #[arg(long)]
    pub(crate) think_max: bool,
}

#[derive(Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Address to listen at: 0.0.0.0 or :: for all
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen at; 0 for any that is free
    #[arg(long, value_name = "N", default_value_t = 8000)]
    pub(crate) port: u16,
    /// Context of a conversation in tokens
    #[arg(long, value_name = "N", default_value_t = 32768)]
    pub(crate) ctx: usize,
    /// Requests that are computed at once; two more conversations than these are kept in memory
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64).map(usize::from))]
    pub(crate) parallel: usize,
    /// Requests that may wait; more are refused
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) queue: usize,
    /// Most tokens of an answer where the client names no limit [default: as many as fit]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize))]
    pub(crate) max_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    /// Ask for one of the keys in this file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Let web pages of other origins use the server
    #[arg(long)]
    pub(crate) cors: bool,
    /// Write requests, prompts and answers to this file, lines of JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// Name of the model for clients
    #[arg(long, value_name = "NAME", default_value = "deepseek-v4-flash")]
    pub(crate) name: String,
    /// Seconds that answers may take to finish when the server is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) grace: u64,
    /// Give the answers in this file by rule instead of computing any, to test clients
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct AgentsArgs {
    #[command(subcommand)]
    pub(crate) action: AgentsAction,
}

#[derive(Subcommand)]
pub(crate) enum AgentsAction {
    /// Show what a client needs in its configuration, or write it there
    Setup {
        /// Client
        #[arg(value_enum)]
        client: Client,
        /// Write it into the client's own file; what is there stays, and a copy of it is kept in FILE.bak
        #[arg(long)]
        write: bool,
        /// Where the server is
        #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
        url: String,
        /// Model that the client asks for
        #[arg(long, value_name = "NAME", default_value = "deepseek-v4-flash")]
        model: String,
        /// Context in tokens that the client reckons with [default: as the server says]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        ctx: Option<u32>,
        /// Key that the server wants
        #[arg(long, value_name = "KEY")]
        key: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Client {
    /// Claude Code
    Claude,
    /// Codex
    Codex,
    /// opencode
    Opencode,
    /// Pi
    Pi,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// State on disk.
#[derive(Args)]
pub(crate) struct KvArgs {
    /// Keep what prompts cost to compute on disk, and go on from there
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub(crate) kv: Switch,
    /// Folder to keep it in [default: in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) kv_dir: Option<PathBuf>,
    /// Bytes it may take: 8GiB, 500MB, ...; what is of least use goes first
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = size)]
    pub(crate) kv_budget: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// A number of bytes, perhaps with a unit.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 10] = [
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
        ("kb", 1000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("tb", 1_000_000_000_000),
        ("b", 1),
        ("", 1),
    ];
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = UNITS.iter().find(|(name, _)| *name == &lower[digits.len()..]);
    match (digits.trim().parse::<f64>(), unit) {
        (Ok(n), Some((_, unit))) if n >= 0.0 && n * *unit as f64 <= 1e18 => Ok((n * *unit as f64) as u64),
        _ => Err("expected a number of bytes, as 8GiB or 500MB".into()),
    }
}

#[derive(Args)]
pub(crate) struct CacheArgs {
    #[command(subcommand)]
    pub(crate) action: CacheAction,
    /// Folder [default: in the user's cache folder]
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) kv_dir: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum CacheAction {
    /// List what is kept
    Ls {
        /// Model file whose tokens to show as text [default: ./ds4flash.gguf, else the embedded model]
        #[arg(short, long, value_name = "FILE")]
        model: Option<PathBuf>,
    },
    /// Check every byte; what is no good is moved aside
    Verify,
    /// Remove what is of least use until the rest takes no more than a size
    Prune {
        /// Bytes that may stay
        #[arg(value_name = "SIZE", value_parser = size)]
        budget: u64,
    },
    /// Remove a block and those that build on it, or all
    Rm {
        /// Its name, or the beginning of it; all for everything
        name: String,
    },
}

#[derive(Args)]
pub(crate) struct SamplingArgs {
    /// Temperature; 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    pub(crate) temp: f32,
    /// Keep the most probable tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Keep tokens with at least this fraction of the best one's probability
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub(crate) min_p: f32,
    /// Keep the K most probable tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Seed; the same seed gives the same text [default: from the clock]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// Model file (GGUF) [default: the embedded model]
    pub(crate) file: Option<PathBuf>,
    /// List every tensor
    #[arg(long)]
    pub(crate) tensors: bool,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) prompt: usize,
    /// Tokens decoded after it
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) gen_tokens: usize,
    /// Measure at many contexts and batch sizes instead
    #[arg(long, conflicts_with = "prompt")]
    pub(crate) table: bool,
    /// Prompts to prefill for --table
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', requires = "table")]
    #[arg(default_values_t = [2048, 8192, 32_768])]
    pub(crate) prefills: Vec<usize>,
    /// Contexts at which to decode for --table
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', requires = "table")]
    #[arg(default_values_t = [2048, 32_768, 131_072])]
    pub(crate) contexts: Vec<usize>,
    /// Sessions to decode together, at a context of 2,048 tokens, for --table
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', requires = "table")]
    #[arg(default_values_t = [1, 4, 16])]
    pub(crate) batches: Vec<usize>,
    /// Send so many requests at once through the scheduler of `ds4 serve` instead
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', conflicts_with = "table")]
    pub(crate) streams: Vec<usize>,
    /// Show the time of each kernel of a GPU instead, for the prompt and for a decode step
    #[arg(long, conflicts_with = "table")]
    pub(crate) kernels: bool,
    /// Random weights instead of a file: flash or tiny, and perhaps :LAYERS
    #[arg(long, value_name = "SHAPE[:LAYERS]", value_parser = synthetic)]
    #[arg(conflicts_with_all = ["model", "mtp"])]
    pub(crate) synthetic: Option<Synthetic>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Layers of Flash.
const FLASH_LAYERS: usize = 43;

fn synthetic(text: &str) -> Result<Synthetic, String> {
    let (name, layers) = match text.split_once(':') {
        Some((name, layers)) => {
            (name, layers.parse().map_err(|_| format!("{layers:?} is no number of layers"))?)
        }
        None => (text, FLASH_LAYERS),
    };
    if !(1..=1024).contains(&layers) {
        return Err(format!("{layers} layers, expected 1 to 1024"));
    }
    match name {
        "flash" => Ok(Synthetic::flash(layers)),
        "tiny" => Ok(Synthetic::tiny(layers)),
        _ => Err(format!("no shape {name:?}, expected flash or tiny")),
    }
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// Model file (GGUF) whose needs to compare [default: ./ds4flash.gguf, or the published file's figures]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// List only
    #[arg(long)]
    pub(crate) no_tests: bool,
    /// Run only one group of one GPU's checks: doctor starts itself so, several at once
    #[arg(long, hide = true, num_args = 2, value_names = ["GPU", "GROUP"])]
    pub(crate) part: Option<Vec<usize>>,
}

#[derive(Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// File of cases (JSON lines), or a folder of such files
    #[arg(value_name = "CASES")]
    pub(crate) cases: PathBuf,
    /// Print every answer
    #[arg(long)]
    pub(crate) verbose: bool,
}

#[derive(Args)]
pub(crate) struct TokenizeArgs {
    /// Vocabulary: a GGUF file or a tokenizer.json
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: PathBuf,
    /// Lines of {"text": ..., "plain": bool}; - for standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) jsonl: PathBuf,
}

#[derive(Args)]
pub(crate) struct RenderArgs {
    /// Lines of {"messages": [...], "thinking_mode": "chat" or "thinking", ...}; - for standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) jsonl: PathBuf,
    /// Weights to render for: april or 0731 [default: as the tokenizer's file says, else april]
    #[arg(long, value_name = "PROFILE", value_parser = profile)]
    pub(crate) profile: Option<Profile>,
    /// Vocabulary: a GGUF file or a tokenizer.json [default: that of ./ds4flash.gguf, else of the embedded model]
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

fn profile(name: &str) -> Result<Profile, String> {
    Profile::named(name).ok_or_else(|| "expected april or 0731".into())
}

#[derive(Args)]
pub(crate) struct ParseArgs {
    /// Lines of {"text": ..., "thinking_mode": "chat" or "thinking"}; - for standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) jsonl: PathBuf,
    /// Give the parser so many bytes at a time [default: all at once]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) stream: Option<u32>,
    /// Accept tool calls without the marker too: <DSML｜tool_calls> and <tool_calls>
    #[arg(long)]
    pub(crate) loose: bool,
}

#[derive(Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Token ids, a JSON array
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens: PathBuf,
    /// Result: float32 [tokens, vocab]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// f32 activations against decoded weights instead of int8 activations
    #[arg(long)]
    pub(crate) exact: bool,
    /// Round KV rows and index keys as the model was trained, or not at all
    #[arg(long, value_enum, default_value_t = Rounding::Model)]
    pub(crate) rounding: Rounding,
    /// Tokens per pass; 1 is token by token
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) chunk: u32,
    /// Write every named intermediate result to this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) taps: Option<PathBuf>,
    /// Also write the draft block's logits: float32 [tokens - 1, vocab]
    #[arg(long, value_name = "FILE")]
    pub(crate) mtp_out: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Rounding {
    /// As the model was trained
    Model,
    /// None
    Off,
}

#[derive(Args)]
pub(crate) struct DiffArgs {
    /// Folder written with `ds4 logits --taps`
    pub(crate) a: PathBuf,
    /// Another
    pub(crate) b: PathBuf,
    /// Largest absolute difference that counts as equal
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) tolerance: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, String> {
        Cli::try_parse_from([&["ds4"], args].concat()).map_err(|e| e.to_string())
    }

    fn bench(args: &[&str]) -> Result<BenchArgs, String> {
        match parse(&[&["bench"], args].concat())?.command {
            Some(Command::Bench(args)) => Ok(args),
            _ => Err("not bench".into()),
        }
    }

    #[test]
    fn devices() {
        let compute =
            parse(&["--backend", "cuda", "--device", "0,2", "--device", "5"]).unwrap().chat.model.compute;
        assert_eq!((compute.backend, compute.device), (BackendArg::Cuda, vec![0, 2, 5]));
        let compute = parse(&[]).unwrap().chat.model.compute;
        assert_eq!((compute.backend, compute.device), (BackendArg::Auto, vec![]));
        assert!(parse(&["--backend", "rocm"]).is_err_and(|e| e.contains("vulkan")));
    }

    #[test]
    fn sizes() {
        let gib = 1u64 << 30;
        let good = [("8GiB", 8 * gib), ("1.5 gib", 3 * gib / 2), ("500MB", 500_000_000), ("7", 7), ("0b", 0)];
        for (text, bytes) in good {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GiB", "8 apples", "-1GB", "1e300TB", "é"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bench_modes() {
        let args = bench(&["--table", "--contexts", "64,128"]).unwrap();
        assert_eq!((args.contexts, args.batches), (vec![64, 128], vec![1, 4, 16]));
        assert!(bench(&["--contexts", "64"]).is_err(), "only with --table");
        assert!(bench(&["--kernels", "--prompt", "9"]).unwrap().kernels);
        assert!(bench(&["--kernels", "--table"]).is_err());
        assert_eq!(bench(&["--synthetic", "flash"]).unwrap().synthetic, Some(Synthetic::flash(43)));
        assert_eq!(bench(&["--synthetic", "tiny:2"]).unwrap().synthetic, Some(Synthetic::tiny(2)));
        for bad in ["huge", "flash:0", "flash:x", "flash:9999"] {
            assert!(bench(&["--synthetic", bad]).is_err(), "{bad}");
        }
        assert!(bench(&["--synthetic", "tiny", "-m", "x"]).is_err());
    }
}
