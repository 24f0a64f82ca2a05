//! One answer: prefill, sampling, printing.

use crate::Result;
use crate::args::SamplingArgs;
use crate::device::Device;
use crate::load::Loaded;
use crate::ui;
use ds4_engine::{Error, Event, Finish, Generation, Limits, Sampler, Sampling, Session};
use ds4_text::{Message, Thinking, Tokenizer, render};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

/// Set by Ctrl-C; stops the answer, not the program.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What a turn of the model was.
pub(crate) struct Reply {
    pub(crate) message: Message,
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
        let reused =
            if self.reused > 0 { format!(" ({} more from cache)", self.reused) } else { String::new() };
        format!(
            "prefill: {} tokens, {:.1} t/s{reused}; decode: {} tokens, {:.1} t/s",
            self.prefill.0,
            rate(self.prefill),
            self.decode.0,
            rate(self.decode)
        )
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
    thinking: Thinking,
    sampling: Sampling,
    max_tokens: Option<usize>,
) -> Result<Reply> {
    let prompt = render(messages, thinking, false);
    let tokens = prompt.to_tokens(&loaded.tokenizer)?;
    INTERRUPTED.store(false, Ordering::Relaxed);
    let start = Instant::now();
    let bar = ui::tokens("prefill", tokens.len());
    let synced = loaded.engine.sync(session, &tokens, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if INTERRUPTED.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let synced = match synced {
        Err(Error::Cancelled) => {
            let message = Message::new(ds4_text::Role::Assistant, "");
            return Ok(Reply { message, finish: None });
        }
        other => other?,
    };
    let prefill = (synced.computed, start.elapsed().as_secs_f64());
    let start = Instant::now();
    let limits = Limits { max_tokens: max_tokens.unwrap_or(usize::MAX), stop: Vec::new() };
    let mut generation = Generation::new(Sampler::new(sampling), limits);
    let mut printer = Printer::new(prompt.starts_thinking(), &loaded.tokenizer);
    let finish = loop {
        if INTERRUPTED.load(Ordering::Relaxed) {
            break None;
        }
        match generation.next(&mut loaded.engine, session, &loaded.tokenizer)? {
            Event::Token { id, text } => printer.token(id, &text)?,
            Event::End { text, finish } => {
                printer.text(&text)?;
                break Some(finish);
            }
        }
    };
    let message = printer.finish()?;
    let decode = (generation.generated(), start.elapsed().as_secs_f64());
    ui::note(&Timing { reused: synced.reused, prefill, decode }.line());
    match &finish {
        Some(Finish::EndOfSentence) => {}
        Some(finish) => ui::note(reason(finish)),
        None => ui::note("stopped"),
    }
    Ok(Reply { message, finish })
}

fn reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndOfSentence => "the model ended its answer",
        Finish::Stop(_) => "ended by a stop string",
        Finish::Length => "ended by -n",
        Finish::ContextFull => "the context is full: raise --ctx, or /quit and start over",
        Finish::Repetition => "stopped: the text fell into a loop",
    }
}

/// Prints an answer as it comes and collects it.
struct Printer {
    thinking: bool,
    think_end: Option<u32>,
    terminal: bool,
    message: Message,
    out: std::io::Stdout,
}

impl Printer {
    fn new(thinking: bool, tokenizer: &Tokenizer) -> Self {
        Printer {
            thinking,
            think_end: tokenizer.id_of("</think>"),
            terminal: std::io::stdout().is_terminal(),
            message: Message::new(ds4_text::Role::Assistant, ""),
            out: std::io::stdout(),
        }
    }

    fn token(&mut self, id: u32, text: &str) -> Result<()> {
        if self.thinking && Some(id) == self.think_end {
            self.thinking = false;
            writeln!(self.out)?;
            return Ok(());
        }
        self.text(text)
    }

    fn text(&mut self, text: &str) -> Result<()> {
        if self.thinking {
            self.message.reasoning.push_str(text);
            write!(self.out, "{}", ui::dim(text, self.terminal))?;
        } else {
            self.message.content.push_str(text);
            write!(self.out, "{text}")?;
        }
        Ok(self.out.flush()?)
    }

    fn finish(mut self) -> Result<Message> {
        writeln!(self.out)?;
        self.out.flush()?;
        Ok(self.message)
    }
}
