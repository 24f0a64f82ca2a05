//! One answer: prefill, sampling, printing.

use crate::Result;
use crate::args::SamplingArgs;
use crate::device::Device;
use crate::kv;
use crate::load::Loaded;
use crate::ui;
use ds4_engine::{Error, Event, Finish, Generation, Sampler, Sampling, Session, Synced};
use ds4_kvstore::Missing;
use ds4_text::{
    Assistant, Delta, End, Message, Parser, ParserOptions, Prompt, RenderOptions, Replay, Tokenizer, render,
};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

/// Set by Ctrl-C; stops the answer, not the program.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What a turn of the model was.
pub(crate) struct Reply {
    pub(crate) message: Assistant,
    /// What ended it; `None` if the person did.
    pub(crate) finish: Option<Finish>,
}

/// How long things took.
struct Timing {
    reused: usize,
    prefill: (usize, f64),
    decode: (usize, f64),
}

impl Timing {
    fn line(&self) -> String {
        let rate = |(tokens, seconds): (usize, f64)| tokens as f64 / seconds.max(1e-9);
        let prefill = match (self.prefill, self.reused) {
            ((0, seconds), reused) => format!("{reused} tokens from cache in {seconds:.2} s"),
            ((tokens, _), 0) => format!("{tokens} tokens, {:.1} t/s", rate(self.prefill)),
            ((tokens, _), reused) => {
                format!("{tokens} tokens, {:.1} t/s ({reused} more from cache)", rate(self.prefill))
            }
        };
        format!("prefill: {prefill}; decode: {} tokens, {:.1} t/s", self.decode.0, rate(self.decode))
    }
}

/// The sampling options that the flags mean.
pub(crate) fn sampling(args: &SamplingArgs) -> Sampling {
    let clock =
        || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    Sampling {
        temperature: args.temp,
        top_p: args.top_p,
        min_p: args.min_p,
        top_k: args.top_k,
        seed: args.seed.unwrap_or_else(clock),
        ..Sampling::default()
    }
}

/// Answers a conversation, printing as it goes: the answer on stdout, thinking dimmed, figures on stderr.
pub(crate) fn reply<B: Device>(
    loaded: &mut Loaded<B>,
    session: &mut Session<B>,
    messages: &[Message],
    options: &RenderOptions,
    sampling: Sampling,
    max_tokens: Option<usize>,
    verbose: bool,
) -> Result<Reply> {
    let prompt = render(messages, options, &mut Replay::default())?;
    let tokens = prompt.to_tokens(&loaded.tokenizer)?;
    INTERRUPTED.store(false, Ordering::Relaxed);
    let start = Instant::now();
    let bar = ui::tokens("prefill", tokens.len());
    session.keep_at(Prompt::forks(&tokens, &loaded.tokenizer));
    let synced = loaded.engine.sync(session, &tokens, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if INTERRUPTED.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let synced = match synced {
        Err(Error::Cancelled) => {
            return Ok(Reply { message: Assistant::default(), finish: None });
        }
        other => other?,
    };
    if verbose {
        ui::note(&origin(&synced, &tokens, &loaded.tokenizer));
    }
    let prefill = (synced.computed, start.elapsed().as_secs_f64());
    let start = Instant::now();
    let mut generation = Generation::new(Sampler::new(sampling), max_tokens.unwrap_or(usize::MAX));
    let mut parser = Parser::new(ParserOptions { start: prompt.start(), ..ParserOptions::default() });
    let mut printer = Printer::new();
    let finish = loop {
        if INTERRUPTED.load(Ordering::Relaxed) {
            break None;
        }
        match generation.next(&mut loaded.engine, session, &loaded.tokenizer, parser.hint())? {
            Event::Token(id) => printer.print(&parser.push_token(id, &loaded.tokenizer))?,
            Event::End(finish) => break Some(finish),
        }
    };
    let end = if finish == Some(Finish::EndOfSentence) { End::Turn } else { End::Cut };
    printer.print(&parser.finish(end))?;
    printer.finish()?;
    let message = parser.into_answer().into();
    if finish.is_some() {
        // The next turn goes on from here, perhaps in another process.
        loaded.engine.keep(session)?;
    }
    kv::report(loaded.engine.disk());
    let decode = (generation.generated(), start.elapsed().as_secs_f64());
    ui::note(&Timing { reused: synced.reused(), prefill, decode }.line());
    match &finish {
        Some(Finish::EndOfSentence) => {}
        Some(finish) => ui::note(reason(*finish)),
        None => ui::note("stopped"),
    }
    Ok(Reply { message, finish })
}

/// Where the state after a prompt came from, and why the rest had to be computed.
fn origin(synced: &Synced, prompt: &[u32], tokenizer: &Tokenizer) -> String {
    let Synced { live, kept, disk, computed, differs_at, missing } = *synced;
    let why = match differs_at {
        Some(at) => {
            let text = tokenizer.decode_text(&prompt[at..(at + 8).min(prompt.len())], false);
            format!("; from token {at} on, {text:?}, it is another text than the one before")
        }
        None => String::new(),
    };
    let disk_why = match missing.filter(|_| computed > 0) {
        Some(Missing::Evicted) => "; it was on disk and made room for other state",
        Some(Missing::Broken) => "; it was on disk and was no good",
        Some(Missing::OtherModel) => "; what is on disk is of other models",
        Some(Missing::New) | None => "",
    };
    format!(
        "state of {live} tokens was live, of {kept} kept in memory, of {disk} on disk; {computed} computed{why}{disk_why}"
    )
}

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfSentence => "the model ended its answer",
        Finish::Length => "ended by -n",
        Finish::ContextFull => "the context is full: raise --ctx, or /quit and start over",
        Finish::Repetition => "stopped: the text fell into a loop",
    }
}

/// Prints an answer as it comes: thinking dimmed, a line end between it and the answer.
struct Printer {
    thinking: bool,
    terminal: bool,
    out: std::io::Stdout,
}

impl Printer {
    fn new() -> Self {
        Printer { thinking: false, terminal: std::io::stdout().is_terminal(), out: std::io::stdout() }
    }

    fn print(&mut self, deltas: &[Delta]) -> Result<()> {
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => {
                    self.thinking = true;
                    write!(self.out, "{}", ui::dim(text, self.terminal))?;
                }
                Delta::Content(text) | Delta::Trailing(text) => {
                    if std::mem::take(&mut self.thinking) {
                        writeln!(self.out)?;
                    }
                    write!(self.out, "{text}")?;
                }
                // Without tools there are no calls.
                Delta::Call { .. } | Delta::Arguments(_) | Delta::CallEnd | Delta::CallDropped => {}
            }
        }
        Ok(self.out.flush()?)
    }

    fn finish(mut self) -> Result<()> {
        writeln!(self.out)?;
        Ok(self.out.flush()?)
    }
}
