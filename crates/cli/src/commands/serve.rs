//! `ds4 serve`: the model over HTTP.

use crate::args::{LogFormat, ServeArgs};
use crate::device::{Description, Device};
use crate::load::{self, Wants, WithEngine};
use crate::{Result, kv, ui};
use ds4_engine::scheduler::{Limits, Scheduler, Worker};
use ds4_engine::{Disk, Engine, EngineOptions, Script};
use ds4_gguf::Gguf;
use ds4_kvstore::{Fingerprint, Section};
use ds4_model::Backend;
use ds4_server::{App, Options};
use ds4_testkit::Idle;
use ds4_text::{Profile, Replay, Tokenizer};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Rows of a prefill chunk where nothing is computed.
const SCRIPT_ROWS: usize = 256;

pub(crate) fn run(args: &ServeArgs) -> Result<ExitCode> {
    logs(args.log_format);
    let script = args.script.as_deref().map(read_script).transpose()?;
    let file = load::open(args.model.model.as_deref())?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(file.metadata())?);
    let limits = Limits { parallel: args.parallel, queue: args.queue, context: args.ctx };
    let wants = Wants { sessions: limits.sessions(), ..Wants::session(args.ctx) };
    let disk = disk(args, &file, wants, script.is_some())?;
    let (scheduler, worker) = Scheduler::new(limits, script.clone());
    let profile = Profile::of_file(file.metadata());
    let replay = replay(disk.as_ref());
    let app = App::new(options(args, &file)?, Arc::clone(&tokenizer), profile, scheduler, replay)
        .map_err(|e| e.to_string())?;
    let http = Http::start(args, &app, disk.clone())?;
    let server = Server { app, worker, tokenizer, disk, http };
    if script.is_some() {
        let options = EngineOptions { max_rows: SCRIPT_ROWS, ..EngineOptions::default() };
        return server.serve(Engine::load(Idle, &file, None, options)?);
    }
    load::with_engine(&file, &args.model, wants, server)
}

fn read_script(path: &std::path::Path) -> Result<Script> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Script::parse(&text).map_err(|e| format!("{}: {e}", path.display()))?)
}

fn logs(format: LogFormat) {
    let logs = tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false);
    let logs = logs.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
}

/// Where state is kept. What a script says is no state of a model: it is kept only where the user says so, and apart.
fn disk(args: &ServeArgs, file: &Gguf, wants: Wants, is_script: bool) -> Result<Option<Disk>> {
    if !is_script {
        return kv::open(&args.kv, file, args.model.mtp.as_deref(), wants);
    }
    if args.kv.kv_dir.is_none() {
        return Ok(None);
    }
    let disk = kv::open(&args.kv, file, None, wants)?;
    Ok(disk.map(|disk| Disk { fingerprint: Fingerprint(*b"scripted, no model.."), ..disk }))
}

/// Tool calls of conversations that are on disk, as they were sampled.
fn replay(disk: Option<&Disk>) -> Replay {
    let mut replay = Replay::default();
    let Some(disk) = disk else { return replay };
    let mut blocks = disk.store.list();
    blocks.retain(|b| b.fingerprint == disk.fingerprint && b.len_of(Section::Notes) > 0);
    // The newest last, so that they are the last to be forgotten.
    blocks.sort_by_key(|b| b.used);
    for block in blocks {
        if let Ok(notes) = disk.store.read(&block, Section::Notes) {
            replay.learn(&notes);
        }
    }
    replay
}

fn options(args: &ServeArgs, file: &Gguf) -> Result<Options> {
    let keys = match &args.api_key_file {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            let keys: Vec<String> =
                text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
            if keys.is_empty() {
                return Err(format!("{}: no key in it, expected one a line", path.display()).into());
            }
            keys
        }
        None => Vec::new(),
    };
    let name = file.metadata().opt_str("general.name").ok().flatten().unwrap_or("DeepSeek V4 Flash");
    Ok(Options {
        model: args.name.clone(),
        display_name: name.to_owned(),
        max_tokens: args.max_tokens,
        keys,
        cors: args.cors,
        trace: args.trace.clone(),
    })
}

async fn bind(args: &ServeArgs) -> Result<TcpListener> {
    // `[::1]` is how addresses write it.
    let host = args.host.trim_start_matches('[').trim_end_matches(']');
    let bound = TcpListener::bind((host, args.port)).await;
    Ok(bound.map_err(|e| format!("{host}, port {}: {e}; name another with --port", args.port))?)
}

/// Everything but the engine.
struct Server {
    app: Arc<App>,
    worker: Worker,
    tokenizer: Arc<Tokenizer>,
    disk: Option<Disk>,
    http: Http,
}

impl Server {
    /// Computes in this thread until somebody ends the program.
    fn serve<B: Backend>(self, mut engine: Engine<B>) -> Result<ExitCode> {
        load::check_vocabulary(&engine, &self.tokenizer)?;
        if let Some(disk) = self.disk {
            engine.set_disk(disk);
        }
        let cache = engine.layout(self.app.limits().context).bytes() * self.app.limits().sessions() as u64;
        let address = self.http.address;
        let done = self.worker.run(&mut engine, &self.tokenizer, || {
            self.app.set_ready(cache);
            ui::note(&format!("serving at http://{address} (Ctrl-C ends it)"));
        });
        self.http.end();
        done?;
        Ok(ExitCode::SUCCESS)
    }
}

impl WithEngine for Server {
    fn run<B: Device>(self, engine: Engine<B>, _: Description) -> Result<ExitCode> {
        self.serve(engine)
    }
}

/// The threads that talk.
struct Http {
    runtime: Runtime,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    serving: JoinHandle<()>,
}

impl Http {
    /// Talks from now on, to say that the model is being loaded.
    fn start(args: &ServeArgs, app: &Arc<App>, disk: Option<Disk>) -> Result<Self> {
        // The port before the model: that it is taken should not come after minutes of loading.
        let runtime = Runtime::new()?;
        let listener = runtime.block_on(bind(args))?;
        let address = listener.local_addr()?;
        let (stop, stopped) = watch::channel(false);
        let grace = Duration::from_secs(args.grace);
        let serving = runtime.spawn(ds4_server::serve(Arc::clone(app), listener, stopped, grace));
        runtime.spawn(wait_for_signals(stop.clone()));
        runtime.spawn(report_problems(disk));
        Ok(Http { runtime, address, stop, serving })
    }

    fn end(self) {
        let _ = self.stop.send(true);
        // What it could not say any more it could not say.
        let _ = self.runtime.block_on(self.serving);
    }
}

/// The first signal lets answers end, the second does not.
async fn wait_for_signals(stop: watch::Sender<bool>) {
    signal().await;
    ui::note("ending; answers that run may finish (again to end at once)");
    let _ = stop.send(true);
    signal().await;
    std::process::exit(130);
}

/// Waits for somebody to end the program.
async fn signal() {
    let interrupt = async { tokio::signal::ctrl_c().await.is_ok() };
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    interrupt.await;
}

/// Says what goes wrong on disk.
async fn report_problems(disk: Option<Disk>) {
    let Some(disk) = disk else { return };
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        for problem in disk.store.take_problems() {
            tracing::warn!("{problem}");
        }
    }
}
