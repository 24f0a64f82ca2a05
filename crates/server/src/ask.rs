//! What a client asks for, whatever its dialect, and how it becomes a job for the scheduler.

use crate::app::App;
use crate::conversation::Conversation;
use crate::error::ApiError;
use ds4_engine::Sampling;
use ds4_engine::scheduler::{Job, Rules};
use ds4_text::{
    Block, Callable, Effort, Json, Mode, ParserOptions, Prompt, RenderOptions, ResponseFormat, Start,
    Thinking, Wanted, render,
};
use serde_json::{Value, json};
use std::sync::Arc;

/// A request, understood.
pub(crate) struct Ask {
    /// The model's name as the client wrote it, or the server's.
    pub(crate) model: String,
    pub(crate) input: Input,
    pub(crate) tools: Vec<Tool>,
    pub(crate) choice: Choice,
    /// Several tools may be called at once.
    pub(crate) parallel: bool,
    pub(crate) format: Format,
    pub(crate) thinking: Thinking,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) stream: bool,
    /// How the names of tool calls begin.
    pub(crate) call_prefix: &'static str,
}

/// What is to be continued.
pub(crate) enum Input {
    Conversation(Conversation),
    /// Text as it is.
    Raw(String),
}

/// A tool that the model may call.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    /// Its name, as the model sees it.
    pub(crate) name: String,
    /// What the model reads of it.
    pub(crate) shown: Json,
    /// Schema of its arguments.
    pub(crate) schema: Option<Value>,
    pub(crate) strict: bool,
    /// Not shown before it is searched for.
    pub(crate) deferred: bool,
    pub(crate) kind: ToolKind,
}

/// How a tool is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolKind {
    Function,
    /// By text without form, which the model writes as the parameter `input`.
    Custom,
    /// By a name in a name space.
    Member {
        namespace: String,
        name: String,
    },
}

/// Which tools must be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Auto,
    None,
    Required,
    Named(String),
    /// Any of these; `true` if one of them must be.
    Among(Vec<String>, bool),
}

/// What the answer's text must be.
#[derive(Clone, Debug, Default)]
pub(crate) enum Format {
    #[default]
    Text,
    JsonObject,
    Schema(Value),
}

/// Names of an answer's tool calls, which nobody can guess.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallIds {
    prefix: &'static str,
    seed: u128,
}

impl CallIds {
    pub(crate) fn nth(&self, n: usize) -> String {
        format!("{}{:032x}", self.prefix, self.seed.wrapping_add(n as u128))
    }
}

/// A job, and what has to be known of it when its answer comes.
pub(crate) struct Prepared {
    pub(crate) job: Job,
    pub(crate) ids: CallIds,
    pub(crate) prompt_tokens: usize,
    pub(crate) max_tokens: usize,
    pub(crate) stream: bool,
}

/// Numbers that nobody can guess.
pub(crate) fn random() -> Result<u128, ApiError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| {
        ApiError::new(crate::error::Kind::Inside, format!("the system gives no random numbers: {e}"))
    })?;
    Ok(u128::from_ne_bytes(bytes))
}

impl Ask {
    /// The prompt of a conversation.
    fn render(&self, conversation: Conversation, app: &App) -> Result<Prompt, ApiError> {
        let shown = self.tools.iter().filter(|t| !t.deferred).map(|t| t.shown.clone()).collect();
        let format = match &self.format {
            Format::Text => None,
            Format::JsonObject => Some(ResponseFormat::JsonObject),
            Format::Schema(schema) => {
                let schema = Json::parse(&schema.to_string());
                Some(ResponseFormat::Schema(
                    schema.map_err(|e| ApiError::invalid(format!("the schema: {e}")))?,
                ))
            }
        };
        let messages = conversation.finish(shown, format);
        let options =
            RenderOptions { thinking: self.thinking, profile: app.profile, ..RenderOptions::default() };
        render(&messages, &options, &mut app.replay()).map_err(|e| ApiError::invalid(e.to_string()))
    }

    /// Tokens of the prompt, and what they are of.
    pub(crate) fn tokens(&mut self, app: &App) -> Result<(Prompt, Vec<u32>), ApiError> {
        match std::mem::replace(&mut self.input, Input::Raw(String::new())) {
            Input::Raw(text) => {
                let mut tokens = vec![app.tokenizer.bos()];
                app.tokenizer.encode_into(&text, Mode::Special, &mut tokens);
                Ok((Prompt::raw(text), tokens))
            }
            Input::Conversation(conversation) => {
                let prompt = self.render(conversation, app)?;
                let tokens =
                    prompt.to_tokens(&app.tokenizer).map_err(|e| ApiError::invalid(e.to_string()))?;
                Ok((prompt, tokens))
            }
        }
    }

    /// Makes a job of the request.
    pub(crate) fn prepare(mut self, app: &Arc<App>) -> Result<Prepared, ApiError> {
        let is_raw = matches!(self.input, Input::Raw(_));
        let (prompt, tokens) = self.tokens(app)?;
        let most = app.context();
        if tokens.len() >= most {
            return Err(ApiError::too_long(tokens.len(), most));
        }
        let max_tokens =
            self.max_tokens.or(app.options.max_tokens).unwrap_or(usize::MAX).min(most - tokens.len());
        let ids = CallIds { prefix: self.call_prefix, seed: random()? };
        let may_call = !is_raw && !self.tools.is_empty() && self.choice != Choice::None;
        let rules = self.rules(app, may_call)?;
        // Without a choice the tools stay in the prompt, whose state is worth more: the model just cannot begin a call.
        let start = if is_raw { Start::Content } else { prompt.start() };
        let parser = ParserOptions { start, tools: may_call, stop: self.stop, ..ParserOptions::default() };
        let replay = Arc::clone(app);
        let on_block = move |block: &Block| {
            let ids: Vec<String> = (0..block.calls.len()).map(|n| ids.nth(n)).collect();
            let mut replay = replay.replay();
            replay.remember(block, &ids);
            replay.note(&ids)
        };
        let prompt_tokens = tokens.len();
        let job = Job {
            prompt,
            tokens,
            sampling: self.sampling,
            max_tokens,
            raw: is_raw,
            parser,
            rules,
            logprobs: self.logprobs,
            on_block: may_call.then(|| Box::new(on_block) as _),
        };
        Ok(Prepared { job, ids, prompt_tokens, max_tokens, stream: self.stream })
    }

    /// The grammars that the answer is held to.
    fn rules(&self, app: &App, may_call: bool) -> Result<Rules, ApiError> {
        let (names, must_call) = match &self.choice {
            Choice::Named(name) => (Some(std::slice::from_ref(name)), true),
            Choice::Among(names, must) => (Some(names.as_slice()), *must),
            Choice::Required => (None, true),
            Choice::Auto | Choice::None => (None, false),
        };
        let is_chosen = |t: &&Tool| names.is_none_or(|names| names.contains(&t.name));
        let chosen: Vec<&Tool> = self.tools.iter().filter(is_chosen).collect();
        if let Some(missing) = names.into_iter().flatten().find(|n| !self.tools.iter().any(|t| t.name == **n))
        {
            return Err(ApiError {
                param: Some("tool_choice".into()),
                ..ApiError::invalid(format!("there is no tool {missing:?}"))
            });
        }
        if must_call && chosen.is_empty() {
            return Err(ApiError {
                param: Some("tool_choice".into()),
                ..ApiError::invalid("a tool must be called, and there is none")
            });
        }
        let calls = chosen.iter().filter(|_| may_call).map(|t| Callable {
            name: &t.name,
            // Where the model is free to choose, only strict tools bind it.
            schema: t.schema.as_ref().filter(|_| t.strict || must_call),
            strict: t.strict,
        });
        let calls: Vec<Callable<'_>> = calls.collect();
        let json = match &self.format {
            Format::Text => None,
            Format::JsonObject => Some(json!({"type": "object"})),
            Format::Schema(schema) => Some(schema.clone()),
        };
        let wanted =
            Wanted { calls: &calls, one_call: !self.parallel, json: json.as_ref().filter(|_| !must_call) };
        let mut rules = Rules::default();
        if wanted.json.is_some() {
            rules.answer = Some(app.constraint(&wanted, "response_format")?);
        } else if !calls.is_empty() {
            rules.calls = Some(app.constraint(&wanted, "tools")?);
        }
        if must_call {
            rules.opening = app.tokenizer.encode("\n\n<｜DSML｜tool_calls>\n", Mode::Special);
        }
        Ok(rules)
    }
}

/// How hard to think, by the name of a level that clients know.
pub(crate) fn effort(app: &App, name: &str) -> crate::read::Read<Thinking> {
    match name {
        "none" => Ok(Thinking::Off),
        _ => match app.profile.nearest_effort(name) {
            Some(effort) => Ok(Thinking::On(effort)),
            None => Err(crate::read::Bad::new(format!(
                "must be one of none, minimal, low, medium, high, xhigh, max, is {name:?}"
            ))),
        },
    }
}

/// Whether to think where the request does not say: as the model's name says, else as usual.
pub(crate) fn thinking_by_name(model: &str, usual: Thinking) -> Thinking {
    match model {
        "deepseek-chat" => Thinking::Off,
        "deepseek-reasoner" => Thinking::On(Effort::High),
        _ => usual,
    }
}

/// What a client says of sampling; where the model thinks, the model's own way is taken, as its makers do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<usize>,
    pub(crate) min_p: Option<f32>,
    pub(crate) seed: Option<u64>,
}

impl Wishes {
    pub(crate) fn sampling(&self, thinking: Thinking) -> Result<Sampling, ApiError> {
        let usual = Sampling::default();
        // Whoever asks for no chance at all gets the same answer each time.
        let seed = match (self.seed, self.temperature) {
            (Some(seed), _) => seed,
            (None, Some(0.0)) => 0,
            _ => random()? as u64,
        };
        if thinking != Thinking::Off {
            return Ok(Sampling { seed, ..usual });
        }
        Ok(Sampling {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_p: self.top_p.unwrap_or(usual.top_p),
            top_k: self.top_k.unwrap_or(usual.top_k),
            min_p: self.min_p.unwrap_or(usual.min_p),
            seed,
            ..usual
        })
    }
}
