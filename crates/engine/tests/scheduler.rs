//! Many requests on one engine: each gets what it would get alone, none waits longer than it must, and nothing is lost.
#![allow(clippy::unwrap_used, clippy::panic)]

use ds4_cpu::{Cpu, Options};
use ds4_engine::scheduler::{Done, Failure, Job, Limits, Refused, Rules, Scheduler, Update};
use ds4_engine::{Disk, Engine, EngineOptions, Finish, Grammars, Sampling, Script, Synced, fingerprint};
use ds4_gguf::Gguf;
use ds4_kvstore::Store;
use ds4_model::Shape;
use ds4_model::cache::KvFormat;
use ds4_testkit::Idle;
use ds4_text::{
    Answer, Effort, Message, ParserOptions, Prompt, RenderOptions, Replay, Thinking, Tokenizer, Wanted,
    grammar, render,
};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;

fn nano() -> Gguf {
    Gguf::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano/ds4-nano.gguf")).unwrap()
}

/// A scheduler whose worker computes in a thread.
struct Running {
    scheduler: Scheduler,
    tokenizer: Arc<Tokenizer>,
    thread: JoinHandle<()>,
}

const LIMITS: Limits = Limits { parallel: 4, queue: 8, context: 6000 };

fn computing(limits: Limits, exact: bool, disk: Option<&Path>) -> Running {
    let file = nano();
    let shape = Shape::from_gguf(&file).unwrap();
    let max_rows = 64;
    let cpu = Cpu::new(&shape, Options { exact, max_rows, ..Options::default() }).unwrap();
    let mut engine = Engine::load(
        cpu,
        &file,
        None,
        EngineOptions { max_rows, keep_every: 128, ..EngineOptions::default() },
    )
    .unwrap();
    if let Some(folder) = disk {
        let store = Store::open(folder, ds4_kvstore::Options { budget: 1 << 30 }).unwrap();
        let fingerprint = fingerprint(&file, None, KvFormat::Packed, exact);
        engine.set_disk(Disk { store: Arc::new(store), fingerprint, save_every: 128 });
    }
    start(limits, engine, &file, None)
}

/// One that says what a script says, and computes nothing.
fn scripted(limits: Limits, script: &str) -> Running {
    let file = nano();
    let engine = Engine::load(Idle, &file, None, EngineOptions::default()).unwrap();
    start(limits, engine, &file, Some(Script::parse(script).unwrap()))
}

fn start<B: ds4_model::Backend + 'static>(
    limits: Limits,
    mut engine: Engine<B>,
    file: &Gguf,
    script: Option<Script>,
) -> Running {
    let tokenizer = Arc::new(Tokenizer::from_gguf(file.metadata()).unwrap());
    let (scheduler, worker) = Scheduler::new(limits, script);
    let for_worker = Arc::clone(&tokenizer);
    let thread = std::thread::spawn(move || worker.run(&mut engine, &for_worker, || {}).unwrap());
    Running { scheduler, tokenizer, thread }
}

impl Running {
    fn prompt(&self, text: &str, thinking: Thinking) -> (Prompt, Vec<u32>) {
        let options = RenderOptions { thinking, ..RenderOptions::default() };
        let prompt = render(&[Message::user(text)], &options, &mut Replay::default()).unwrap();
        let tokens = prompt.to_tokens(&self.tokenizer).unwrap();
        (prompt, tokens)
    }

    fn job(&self, text: &str, max_tokens: usize) -> Job {
        self.job_thinking(text, max_tokens, Thinking::Off)
    }

    fn job_thinking(&self, text: &str, max_tokens: usize, thinking: Thinking) -> Job {
        let (prompt, tokens) = self.prompt(text, thinking);
        Job {
            parser: ParserOptions { start: prompt.start(), ..ParserOptions::default() },
            prompt,
            tokens,
            sampling: Sampling::greedy(),
            max_tokens,
            raw: false,
            rules: Rules::default(),
            logprobs: Some(5),
            on_block: None,
        }
    }

    fn ask(&self, job: Job) -> Ended {
        collect(self.scheduler.submit(job).unwrap())
    }

    fn end(self) {
        self.scheduler.shut_down(Duration::ZERO);
        self.thread.join().unwrap();
    }
}

/// All that came of a job.
#[derive(Default)]
struct Ended {
    synced: Synced,
    answer: Answer,
    /// Logarithms of probabilities, as bits.
    logprobs: Vec<(u32, u32)>,
    /// When tokens came.
    times: Vec<Instant>,
    done: Option<Done>,
    failure: Option<Failure>,
}

fn collect(mut updates: Receiver<Update>) -> Ended {
    let mut ended = Ended::default();
    while let Some(update) = updates.blocking_recv() {
        match update {
            Update::Started(synced) => ended.synced = synced,
            Update::Prefill { done, total } => assert!(done <= total),
            Update::Answer { deltas, logprobs, .. } => {
                deltas.iter().for_each(|d| ended.answer.apply(d));
                ended.times.push(Instant::now());
                for l in logprobs {
                    ended
                        .logprobs
                        .extend(l.top.iter().chain([&l.chosen]).map(|l| (l.token, l.logprob.to_bits())));
                }
            }
            Update::Done(done) => ended.done = Some(done),
            Update::Failed(failure) => ended.failure = Some(failure),
        }
    }
    ended
}

fn filler(words: usize, seed: usize) -> String {
    (0..words).map(|i| format!("word{} ", (i * 7 + seed * 13) % 97)).collect()
}

/// Eight answers at once are, to the bit of every probability, what they are one after the other.
#[test]
fn together_as_alone() {
    for exact in [true, false] {
        let limits = Limits { parallel: 8, ..LIMITS };
        let texts: Vec<String> =
            (0..8).map(|i| format!("{} What is {i} plus {}?", filler(20 * i, i), i + 3)).collect();
        let alone = computing(limits, exact, None);
        let one_by_one: Vec<Ended> = texts.iter().map(|t| alone.ask(alone.job(t, 24))).collect();
        alone.end();
        let together = computing(limits, exact, None);
        let jobs: Vec<_> =
            texts.iter().map(|t| together.scheduler.submit(together.job(t, 24)).unwrap()).collect();
        let at_once: Vec<Ended> = jobs.into_iter().map(collect).collect();
        for (a, b) in one_by_one.iter().zip(&at_once) {
            assert!(!a.logprobs.is_empty() && a.failure.is_none());
            assert_eq!(a.answer, b.answer);
            assert_eq!(a.logprobs, b.logprobs);
        }
        together.end();
    }
}

/// While a long prompt is computed, a running answer goes on.
#[test]
fn a_long_prompt_does_not_stop_the_others() {
    let running = computing(LIMITS, false, None);
    let talking = running.scheduler.submit(running.job("Tell me a long story.", 400)).unwrap();
    let reader = std::thread::spawn(move || collect(talking));
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    let long = running.ask(running.job(&filler(1500, 1), 1));
    let ended = Instant::now();
    assert!(long.synced.computed > 3000 && long.failure.is_none());
    let story = reader.join().unwrap();
    let meanwhile = story.times.iter().filter(|t| (begun..ended).contains(t)).count();
    // A chunk beside answers is an eighth of 64 rows: there are more than 300 of them.
    let all_before = story.times.last().is_some_and(|last| *last < begun);
    assert!(meanwhile >= 20 || all_before, "{meanwhile} tokens while {:?} passed", ended - begun);
    running.end();
}

/// Who goes away is not computed for any longer, and what was computed stays.
#[test]
fn cancelled_in_prefill_and_resumed() {
    let running = computing(LIMITS, false, None);
    let text = filler(1500, 2);
    let mut updates = running.scheduler.submit(running.job(&text, 4)).unwrap();
    loop {
        match updates.blocking_recv().unwrap() {
            Update::Prefill { done, .. } if done >= 640 => break,
            _ => {}
        }
    }
    drop(updates);
    let again = running.ask(running.job(&text, 4));
    assert!(again.synced.reused() >= 640, "{:?}", again.synced);
    assert!(again.failure.is_none());
    assert_eq!(running.scheduler.queued(), 0);
    running.end();
}

#[test]
fn the_queue_is_bounded_and_those_who_leave_it_make_room() {
    let limits = Limits { parallel: 1, queue: 2, ..LIMITS };
    let running = computing(limits, false, None);
    let job = || running.job(&filler(1200, 3), 64);
    let first = running.scheduler.submit(job()).unwrap();
    while running.scheduler.running() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = running.scheduler.submit(job()).unwrap();
    let third = running.scheduler.submit(job()).unwrap();
    assert_eq!(running.scheduler.submit(job()).err(), Some(Refused::QueueFull(2)));
    drop(second);
    let begun = Instant::now();
    let fourth = loop {
        match running.scheduler.submit(job()) {
            Ok(updates) => break updates,
            Err(_) => assert!(begun.elapsed() < Duration::from_secs(5)),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    drop((first, third));
    assert!(collect(fourth).done.is_some());
    running.end();
}

/// The second turn of a conversation goes on from the first; another that begins alike gets a copy.
#[test]
fn conversations_go_on_and_fork() {
    let running = computing(LIMITS, false, None);
    let system = filler(300, 4);
    let first = running.ask(running.job(&format!("{system} first"), 8));
    let options = RenderOptions::default();
    let answer = Message::from(ds4_text::Assistant::from(first.answer.clone()));
    let turns = [Message::user(format!("{system} first")), answer, Message::user("and more")];
    let prompt = render(&turns, &options, &mut Replay::default()).unwrap();
    let tokens = prompt.to_tokens(&running.tokenizer).unwrap();
    let length = tokens.len();
    let second = running.ask(Job { prompt, tokens, ..running.job("", 8) });
    assert!(second.synced.computed < 16, "{:?} of {length}", second.synced);
    // The same beginning, another end: the places that were kept before it are used.
    let other = running.ask(running.job(&format!("{system} second"), 8));
    assert!(other.synced.reused() >= 512, "{:?}", other.synced);
    // And the first conversation is still there.
    let again = running.ask(running.job(&format!("{system} first"), 8));
    assert!(again.synced.computed == 0, "{:?}", again.synced);
    assert_eq!(again.answer, first.answer);
    running.end();
}

/// What the model thought is left out of the next prompt, and what is before it is still used; so is the system text of
/// another conversation.
#[test]
fn goes_on_where_prompts_fork() {
    let running = computing(LIMITS, false, None);
    let thinking = Thinking::On(Effort::High);
    let options = RenderOptions { thinking, ..RenderOptions::default() };
    let system = Message::system(filler(150, 8));
    let ask = |turns: &[Message]| {
        let prompt = render(turns, &options, &mut Replay::default()).unwrap();
        let tokens = prompt.to_tokens(&running.tokenizer).unwrap();
        let parser = ParserOptions { start: prompt.start(), ..ParserOptions::default() };
        (tokens.len(), running.ask(Job { prompt, tokens, parser, ..running.job("", 24) }))
    };
    let (length, first) = ask(&[system.clone(), Message::user("first")]);
    assert!(!first.answer.reasoning.is_empty());
    let answer = Message::from(ds4_text::Assistant { content: "well".into(), ..Default::default() });
    let (_, second) = ask(&[system.clone(), Message::user("first"), answer, Message::user("and more")]);
    assert_eq!(second.synced.reused(), length - 1);
    let (length, other) = ask(&[system.clone(), Message::user("other")]);
    assert!(other.synced.computed < 12, "{:?} of {length}", other.synced);
    running.end();
}

/// Two requests with the same long beginning, at the same time: it is computed once.
#[test]
fn the_same_beginning_is_computed_once() {
    let running = computing(LIMITS, false, None);
    let system = filler(600, 5);
    let jobs: Vec<_> =
        (0..3).map(|i| running.scheduler.submit(running.job(&format!("{system} {i}"), 2)).unwrap()).collect();
    let ended: Vec<Ended> = jobs.into_iter().map(collect).collect();
    let computed: usize = ended.iter().map(|e| e.synced.computed).sum();
    let whole = ended.iter().map(|e| e.synced.computed).max().unwrap();
    assert!(computed < whole + 2 * 300, "{computed} tokens computed, the prompt has {whole}");
    running.end();
}

/// A restart goes on from what is on disk, also of an answer that was cut off by it.
#[test]
fn shutting_down_keeps_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let text = filler(800, 6);
    let running = computing(LIMITS, false, Some(folder.path()));
    let updates = running.scheduler.submit(running.job(&text, 2000)).unwrap();
    let reader = std::thread::spawn(move || collect(updates));
    std::thread::sleep(Duration::from_millis(100));
    while running.scheduler.live_tokens() < 1000 {
        std::thread::sleep(Duration::from_millis(5));
    }
    running.end();
    let cut = reader.join().unwrap();
    assert!(matches!(cut.failure, Some(Failure::ShuttingDown)) || cut.done.is_some());
    let running = computing(LIMITS, false, Some(folder.path()));
    let again = running.ask(running.job(&text, 2));
    assert!(again.synced.disk >= 512, "{:?}", again.synced);
    running.end();
}

/// Whatever the model would say, it says what the grammar wants, and thinks before as it likes.
#[test]
fn answers_follow_their_grammar() {
    let running = computing(LIMITS, false, None);
    let schema = serde_json::json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
        "additionalProperties": false});
    let grammars = Grammars::new(&running.tokenizer).unwrap();
    // Eight at once, so that answers with and without reasoning share passes.
    let ask = |i: u64| {
        let thinking = if i.is_multiple_of(2) { Thinking::Off } else { Thinking::On(Effort::High) };
        let wanted = Wanted { calls: &[], one_call: false, json: Some(&schema) };
        let constraint = grammars.constraint(grammar(&wanted, &running.tokenizer).unwrap()).unwrap();
        let mut job = running.job_thinking("What is 3 plus 4?", 400, thinking);
        job.sampling = Sampling { seed: i, ..Sampling::default() };
        job.rules = Rules { answer: Some(constraint), ..Rules::default() };
        (thinking, running.scheduler.submit(job).unwrap())
    };
    let jobs: Vec<_> = (0..8).map(ask).collect();
    for (thinking, updates) in jobs {
        let ended = collect(updates);
        let done = ended.done.unwrap();
        if done.finish == Finish::EndOfSentence {
            let value: serde_json::Value = serde_json::from_str(&ended.answer.content).unwrap();
            assert!(value["n"].is_number(), "{value}");
        }
        assert_eq!(done.reasoning > 0, thinking != Thinking::Off);
    }
    running.end();
}

const STORY: &str = r#"{"rules": [{"name": "story", "all": ["story"], "think": "hm", "text": "once upon a time there was a king"}]}"#;

/// A reader who reads nothing holds up nobody else.
#[test]
fn slow_readers_wait_alone() {
    let many = format!(r#"{{"rules": [{{"name": "x", "text": "{}"}}]}}"#, filler(800, 7));
    let running = scripted(LIMITS, &many);
    let mut stuck = running.scheduler.submit(running.job("a", 5000)).unwrap();
    for _ in 0..20 {
        assert!(running.ask(running.job("b", 50)).done.is_some());
    }
    // When it reads at last, it gets everything.
    let mut tokens = 0;
    let done = loop {
        match stuck.blocking_recv().unwrap() {
            Update::Answer { generated, .. } => tokens = generated,
            Update::Done(done) => break done,
            _ => {}
        }
    };
    assert!(done.generated >= tokens && tokens > 1000);
    running.end();
}

#[test]
fn scripts_answer_by_rule() {
    let running = scripted(LIMITS, STORY);
    let ended = running.ask(running.job_thinking("a story", 100, Thinking::On(Effort::High)));
    assert_eq!(
        (ended.answer.reasoning.as_str(), ended.answer.content.as_str()),
        ("hm", "once upon a time there was a king")
    );
    assert_eq!(running.ask(running.job("other", 100)).answer.content, "OK.");
    let mut job = running.job("a story", 100);
    job.parser.stop = vec![" there".into()];
    let ended = running.ask(job);
    assert_eq!(ended.answer.content, "once upon a time");
    assert_eq!(ended.done.unwrap().stop.as_deref(), Some(" there"));
    let cut = running.ask(running.job("a story", 3));
    assert_eq!((cut.done.unwrap().finish, cut.answer.content.len() < 20), (Finish::Length, true));
    running.end();
}
