//! `ds4 -p TEXT`, and `ds4` alone: a conversation.

use crate::Result;
use crate::args::ChatArgs;
use crate::device::{Description, Device};
use crate::kv;
use crate::load::{self, Loaded, Wants, WithEngine};
use crate::reply::{INTERRUPTED, reply, sampling};
use crate::ui;
use ds4_engine::{Disk, Engine, Finish, Session};
use ds4_text::{Effort, Message, Profile, RenderOptions, Thinking, Tokenizer};
use reedline::{DefaultPrompt, DefaultPromptSegment, FileBackedHistory, Reedline, Signal};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

const HELP: &str = "\
/think, /nothink  think before answering, or not
/ctx N            start over with a context of N tokens
/read FILE        send a file
/quit             end (Ctrl-D)
Ctrl-C stops an answer.";

pub(crate) fn run(args: &ChatArgs) -> Result<ExitCode> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(path)) => Some(read(path)?),
        // `... | ds4`: nobody is there to talk to.
        (None, None) if !std::io::stdin().is_terminal() => Some(std::io::read_to_string(std::io::stdin())?),
        (None, None) => None,
    };
    let file = load::open(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_gguf(file.metadata())?;
    let profile = Profile::of_file(file.metadata());
    // Opened before the model: what is wrong with the folder should not come after minutes of loading.
    let disk = kv::open(&args.kv, &file, args.model.mtp.as_deref(), Wants::session(args.ctx))?;
    let chat = Chat { tokenizer, profile, prompt, disk, args };
    load::with_engine(&file, &args.model, Wants::session(args.ctx), chat)
}

/// What is left to do when the engine is there.
struct Chat<'a> {
    tokenizer: Tokenizer,
    profile: Profile,
    disk: Option<Disk>,
    /// The only thing to say; a conversation without one.
    prompt: Option<String>,
    args: &'a ChatArgs,
}

impl WithEngine for Chat<'_> {
    fn run<B: Device>(self, engine: Engine<B>, _: Description) -> Result<ExitCode> {
        let args = self.args;
        let mut loaded = Loaded::new(engine, self.tokenizer)?;
        if let Some(disk) = self.disk {
            loaded.engine.set_disk(disk);
        }
        let session = loaded.engine.session(args.ctx)?;
        let thinking = match (args.think, args.think_max) {
            (_, true) => Thinking::On(Effort::Max),
            (true, _) => Thinking::On(Effort::High),
            _ => Thinking::Off,
        };
        let options = RenderOptions { thinking, profile: self.profile, ..RenderOptions::default() };
        ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))?;
        let mut conversation = Conversation { loaded, session, messages: Vec::new(), options, args };
        conversation.start_over();
        match self.prompt {
            Some(prompt) => conversation.once(prompt),
            None => conversation.talk(),
        }
    }
}

fn read(path: &std::path::Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()).into())
}

struct Conversation<'a, B: Device> {
    loaded: Loaded<B>,
    session: Session<B>,
    messages: Vec<Message>,
    options: RenderOptions,
    args: &'a ChatArgs,
}

impl<B: Device> Conversation<'_, B> {
    fn start_over(&mut self) {
        self.messages = self.args.system.iter().map(Message::system).collect();
    }

    /// Says `text`, prints the answer, keeps both in the conversation.
    fn say(&mut self, text: String) -> Result<Option<Finish>> {
        self.messages.push(Message::user(text));
        let sampling = sampling(&self.args.sampling);
        let answer = reply(
            &mut self.loaded,
            &mut self.session,
            &self.messages,
            &self.options,
            sampling,
            self.args.max_tokens,
            self.args.verbose,
        );
        match answer {
            Ok(reply) => {
                self.messages.push(reply.message.into());
                Ok(reply.finish)
            }
            Err(e) => {
                self.messages.pop();
                Err(e)
            }
        }
    }

    fn once(&mut self, prompt: String) -> Result<ExitCode> {
        Ok(match self.say(prompt)? {
            Some(_) => ExitCode::SUCCESS,
            // The shell's convention for Ctrl-C.
            None => ExitCode::from(130),
        })
    }

    fn talk(&mut self) -> Result<ExitCode> {
        ui::note("/help for commands");
        let mut editor = editor();
        let prompt =
            DefaultPrompt::new(DefaultPromptSegment::Basic(String::new()), DefaultPromptSegment::Empty);
        loop {
            let line = match editor.read_line(&prompt)? {
                Signal::Success(line) => line,
                Signal::CtrlD => return Ok(ExitCode::SUCCESS),
                _ => continue,
            };
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let said = match line.strip_prefix('/') {
                Some("quit" | "exit") => return Ok(ExitCode::SUCCESS),
                Some(command) => self.command(command),
                None => self.say(line.to_owned()).map(|_| ()),
            };
            if let Err(e) = said {
                eprintln!("{e}");
            }
        }
    }

    fn command(&mut self, line: &str) -> Result<()> {
        let (name, argument) = line.split_once(' ').map_or((line, ""), |(n, a)| (n, a.trim()));
        match name {
            "help" => eprintln!("{HELP}"),
            "think" => self.options.thinking = Thinking::On(Effort::High),
            "nothink" => self.options.thinking = Thinking::Off,
            "ctx" => {
                let context = argument
                    .parse()
                    .map_err(|_| format!("/ctx takes a number of tokens, not {argument:?}"))?;
                self.session = self.loaded.engine.session(context)?;
                self.start_over();
                ui::note(&format!("a new conversation of up to {context} tokens"));
            }
            "read" => {
                let text = read(argument.as_ref())?;
                self.say(text)?;
            }
            _ => return Err(format!("no command /{name}; /help lists them").into()),
        }
        Ok(())
    }
}

/// A line editor with history, in the user's data folder where there is one.
fn editor() -> Reedline {
    let editor = Reedline::create();
    let history = directories::ProjectDirs::from("", "", "ds4").and_then(|dirs| {
        std::fs::create_dir_all(dirs.data_dir()).ok()?;
        FileBackedHistory::with_file(10_000, dirs.data_dir().join("history.txt")).ok()
    });
    match history {
        Some(history) => editor.with_history(Box::new(history)),
        None => editor,
    }
}
