//! `ds4 agents`: how coding agents are told of a server.

use crate::args::{AgentsAction, AgentsArgs, Client};
use crate::{Result, ui};
use serde::Serialize;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use toml_edit::{DocumentMut, Item, Table, TableLike};

/// What the server is called in the clients' configurations.
const PROVIDER: &str = "local";
/// Clients must send a key even where the server wants none.
const NO_KEY: &str = "local";
/// Where Codex looks for its key.
const KEY_VARIABLE: &str = "LOCAL_API_KEY";
/// Context where neither the command line nor the server says one: that of a server without `--ctx`.
const CONTEXT: u32 = 32_768;
/// How long a server may take to connect, and to say anything.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most bytes that are read of its answer.
const MOST: u64 = 1 << 20;

/// What a client is told.
struct Setup {
    /// Without a path or slash at the end.
    url: String,
    model: String,
    ctx: u32,
    key: Option<String>,
}

impl Setup {
    fn key(&self) -> &str {
        self.key.as_deref().unwrap_or(NO_KEY)
    }

    /// Most tokens of an answer: clients keep so much of the context free.
    fn output(&self) -> u32 {
        (self.ctx / 3).clamp(1, 32_000)
    }
}

pub(crate) fn run(args: &AgentsArgs) -> Result<ExitCode> {
    let AgentsAction::Setup { client, write, url, model, ctx, key } = &args.action;
    let url = base(url)?;
    if key.as_ref().is_some_and(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic())) {
        return Err("--key: a key consists of visible ASCII characters".into());
    }
    let ctx = ctx.unwrap_or_else(|| context(&url, key.as_deref()));
    let setup = Setup { url, model: model.clone(), ctx, key: key.clone() };
    let user = directories::BaseDirs::new().ok_or("there is no home folder, where clients have their files")?;
    let file = file(*client, user.home_dir(), |name| std::env::var_os(name));
    let mut out = if *write {
        report(&file, &install(&file, *client, &setup)?)
    } else {
        shown(*client, &setup, &file)?
    };
    out += &then(*client, &setup);
    let overruling = file.with_extension("jsonc");
    if *client == Client::Opencode && overruling.exists() {
        ui::note(&format!("{} is there too: what it says wins", overruling.display()));
    }
    io::stdout().write_all(out.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// A server's address as clients want it: without `/v1` or a slash at the end.
fn base(url: &str) -> Result<String> {
    let trimmed = url.trim_end_matches('/');
    let trimmed = trimmed.strip_suffix("/v1").unwrap_or(trimmed).trim_end_matches('/');
    let host = trimmed.strip_prefix("http://").or_else(|| trimmed.strip_prefix("https://"));
    let good = |host: &str| host.chars().all(|c| c.is_ascii_graphic() && !"?#@\"'\\".contains(c));
    match host {
        Some(host) if !host.is_empty() && good(host) => Ok(trimmed.to_owned()),
        _ => Err(format!("{url:?} is no address of a server: expected http://HOST:PORT").into()),
    }
}

/// The file that a client reads, in a home folder. Each client has a variable that moves its folder.
fn file(client: Client, home: &Path, variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let (name, folder, file) = match client {
        Client::Claude => ("CLAUDE_CONFIG_DIR", ".claude", "settings.json"),
        Client::Codex => ("CODEX_HOME", ".codex", "config.toml"),
        Client::Opencode => ("XDG_CONFIG_HOME", ".config", "opencode/opencode.json"),
        Client::Pi => ("PI_CODING_AGENT_DIR", ".pi/agent", "models.json"),
    };
    let moved = variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    moved.unwrap_or_else(|| home.join(folder)).join(file)
}

/// The command that starts a client.
fn command(client: Client, setup: &Setup) -> String {
    match client {
        Client::Claude => "claude".into(),
        Client::Codex => "codex".into(),
        Client::Opencode => "opencode".into(),
        Client::Pi => format!("pi --provider {PROVIDER} --model {}", quoted(&setup.model)),
    }
}

/// What to do when the configuration is in place.
fn then(client: Client, setup: &Setup) -> String {
    let command = command(client, setup);
    match (client, &setup.key) {
        (Client::Claude, _) => {
            format!("\nThen start it, without ANTHROPIC_API_KEY in the environment or in that file:\n\n{command}\n")
        }
        (Client::Codex, Some(key)) => {
            format!("\nThen start it with the key, which is not in the file:\n\n{KEY_VARIABLE}={} {command}\n", quoted(key))
        }
        _ => format!("\nThen start it:\n\n{command}\n"),
    }
}

/// The configuration to paste, as a file and, where a client can do without one, as exports for a shell.
fn shown(client: Client, setup: &Setup, file: &Path) -> Result<String> {
    let mut out = format!("In {}:\n\n{}", file.display(), merged(client, "", setup)?);
    let exports = exports(client, setup);
    if !exports.is_empty() {
        out += "\nOr in the shell:\n\n";
    }
    for (name, value) in exports {
        out += &format!("export {name}={}\n", quoted(&value));
    }
    Ok(out)
}

fn exports(client: Client, setup: &Setup) -> Vec<(String, String)> {
    match client {
        Client::Claude => {
            claude(setup).into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        }
        Client::Opencode => vec![("OPENCODE_CONFIG_CONTENT".into(), wanted(client, setup).to_string())],
        Client::Codex | Client::Pi => Vec::new(),
    }
}

/// A word for a shell.
fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

// ---- What each client needs

/// Claude Code's environment.
fn claude(setup: &Setup) -> Vec<(&'static str, String)> {
    let model = || setup.model.clone();
    vec![
        ("ANTHROPIC_BASE_URL", setup.url.clone()),
        ("ANTHROPIC_AUTH_TOKEN", setup.key().to_owned()),
        ("ANTHROPIC_MODEL", model()),
        ("ANTHROPIC_DEFAULT_OPUS_MODEL", model()),
        ("ANTHROPIC_DEFAULT_SONNET_MODEL", model()),
        ("ANTHROPIC_DEFAULT_HAIKU_MODEL", model()),
        ("CLAUDE_CODE_SUBAGENT_MODEL", model()),
        ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", setup.ctx.to_string()),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".into()),
        ("DISABLE_AUTOUPDATER", "1".into()),
        ("CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK", "1".into()),
        ("API_TIMEOUT_MS", "3000000".into()),
    ]
}

fn opencode(setup: &Setup) -> Value {
    let model = json!({
        "name": setup.model,
        "reasoning": true,
        "tool_call": true,
        "interleaved": {"field": "reasoning_content"},
        "limit": {"context": setup.ctx, "output": setup.output()},
    });
    let name = format!("{PROVIDER}/{}", setup.model);
    json!({
        "provider": {PROVIDER: {
            "name": PROVIDER,
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": format!("{}/v1", setup.url), "apiKey": setup.key()},
            "models": {&setup.model: model},
        }},
        "model": name,
        "small_model": name,
    })
}

fn pi(setup: &Setup) -> Value {
    let model = json!({
        "id": setup.model,
        "name": setup.model,
        "reasoning": true,
        "input": ["text"],
        "contextWindow": setup.ctx,
        "maxTokens": setup.output(),
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
    });
    let compat = json!({
        "supportsStore": false,
        "supportsDeveloperRole": true,
        "supportsReasoningEffort": true,
        "supportsUsageInStreaming": true,
        "maxTokensField": "max_tokens",
        "supportsStrictMode": false,
        "thinkingFormat": "deepseek",
        "requiresReasoningContentOnAssistantMessages": true,
    });
    json!({"providers": {PROVIDER: {
        "name": PROVIDER,
        "baseUrl": format!("{}/v1", setup.url),
        "api": "openai-completions",
        "apiKey": setup.key(),
        "compat": compat,
        "models": [model],
    }}})
}

/// What must be in the file of a client that reads JSON.
fn wanted(client: Client, setup: &Setup) -> Value {
    match client {
        Client::Opencode => opencode(setup),
        Client::Pi => pi(setup),
        Client::Claude | Client::Codex => {
            let env = claude(setup).into_iter().map(|(name, value)| (name.to_owned(), value.into()));
            json!({"env": Value::Object(env.collect())})
        }
    }
}

/// A client's file with what it must have, and with everything else that is in it.
fn merged(client: Client, old: &str, setup: &Setup) -> Result<String> {
    match client {
        Client::Codex => codex(old, setup),
        Client::Claude | Client::Opencode | Client::Pi => merged_json(old, wanted(client, setup)),
    }
}

fn merged_json(old: &str, new: Value) -> Result<String> {
    let mut all = if old.trim().is_empty() { json!({}) } else { serde_json::from_str(old)? };
    merge(&mut all, new, "the whole")?;
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(indent(old).as_bytes());
    all.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))?;
    text.push(b'\n');
    Ok(String::from_utf8(text)?)
}

/// Puts the members of `new` into `old`, level by level.
fn merge(old: &mut Value, new: Value, name: &str) -> Result<()> {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in new {
                match old.get_mut(&key) {
                    Some(old) => merge(old, value, &key)?,
                    None => drop(old.insert(key, value)),
                }
            }
        }
        (_, Value::Object(_)) => return Err(format!("{name} is no JSON object").into()),
        (old, new) => *old = new,
    }
    Ok(())
}

/// How far the first level of a file is indented.
fn indent(text: &str) -> &str {
    let mut lines = text.lines().filter(|line| line.starts_with([' ', '\t']) && !line.trim().is_empty());
    lines.next().map_or("  ", |line| &line[..line.len() - line.trim_start().len()])
}

fn codex(old: &str, setup: &Setup) -> Result<String> {
    let mut file: DocumentMut = old.parse()?;
    set(file.as_table_mut(), "model", setup.model.as_str().into());
    set(file.as_table_mut(), "model_provider", PROVIDER.into());
    set(file.as_table_mut(), "model_context_window", i64::from(setup.ctx).into());
    let mut unseen = Table::new();
    unseen.set_implicit(true);
    let providers = file.entry("model_providers").or_insert(Item::Table(unseen));
    let providers = providers.as_table_like_mut().ok_or("model_providers is no table")?;
    if !providers.contains_key(PROVIDER) {
        providers.insert(PROVIDER, Item::Table(Table::new()));
    }
    let local = providers.get_mut(PROVIDER).and_then(Item::as_table_like_mut);
    codex_provider(local.ok_or("model_providers.local is no table")?, setup);
    Ok(file.to_string())
}

/// Makes a table of Codex's the one of the server, with nothing else in it.
fn codex_provider(table: &mut dyn TableLike, setup: &Setup) {
    let mut wanted: Vec<(&str, toml_edit::Value)> = vec![
        ("name", PROVIDER.into()),
        ("base_url", format!("{}/v1", setup.url).into()),
        ("wire_api", "responses".into()),
        ("stream_idle_timeout_ms", 1_000_000.into()),
    ];
    if setup.key.is_some() {
        wanted.push(("env_key", KEY_VARIABLE.into()));
    }
    let all: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    for stale in all.iter().filter(|key| wanted.iter().all(|(name, _)| name != key)) {
        table.remove(stale);
    }
    for (key, value) in wanted {
        set(table, key, value);
    }
}

/// Sets a value; comments beside the old one stay.
fn set(table: &mut dyn TableLike, key: &str, mut value: toml_edit::Value) {
    match table.get_mut(key) {
        Some(item) => {
            if let Some(old) = item.as_value() {
                *value.decor_mut() = old.decor().clone();
            }
            *item = Item::Value(value);
        }
        None => drop(table.insert(key, Item::Value(value))),
    }
}

// ---- Files

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// All was there already.
    Same,
    New,
    /// Changed; the old one is here.
    Changed(PathBuf),
}

fn report(file: &Path, outcome: &Outcome) -> String {
    let file = file.display();
    match outcome {
        Outcome::Same => format!("{file} says all this already\n"),
        Outcome::New => format!("wrote {file}\n"),
        Outcome::Changed(backup) => format!("wrote {file}\nas it was before: {}\n", backup.display()),
    }
}

/// Writes what a client must have into its file. A file that is not understood stays as it is.
fn install(file: &Path, client: Client, setup: &Setup) -> Result<Outcome> {
    let named = |e: io::Error| format!("{}: {e}", file.display());
    // Behind a link is the file itself, and there it stays.
    let target = if file.is_symlink() { file.canonicalize().map_err(named)? } else { file.to_owned() };
    let old = match fs::read_to_string(&target) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(named(e).into()),
    };
    let new = merged(client, old.as_deref().unwrap_or_default(), setup).map_err(|e| {
        let comments = if client == Client::Opencode { " (comments in it are not supported here)" } else { "" };
        let file = file.display();
        format!("{file} cannot be merged and stays as it is: {e}{comments}; without --write the part to add by hand is printed")
    })?;
    if old.as_ref() == Some(&new) {
        return Ok(Outcome::Same);
    }
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    let backup = old.map(|old| back_up(&target, &old)).transpose().map_err(named)?;
    replace(&target, &new).map_err(named)?;
    Ok(backup.map_or(Outcome::New, Outcome::Changed))
}

/// The path with something behind the file's name.
fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Keeps what is in a file, under the first name that is free.
fn back_up(file: &Path, text: &str) -> io::Result<PathBuf> {
    let permissions = fs::metadata(file)?.permissions();
    let mut n = 0;
    loop {
        let suffix = if n == 0 { ".bak".to_owned() } else { format!(".bak.{n}") };
        let backup = beside(file, &suffix);
        match create(&backup, text, Some(permissions.clone())) {
            Ok(()) => return Ok(backup),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => n += 1,
            Err(e) => return Err(e),
        }
    }
}

/// Writes a file as a whole or not at all.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let permissions = fs::metadata(file).ok().map(|m| m.permissions());
    let temporary = beside(file, &format!(".ds4-{}", std::process::id()));
    let done = create(&temporary, text, permissions).and_then(|()| fs::rename(&temporary, file));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}

/// A new file, for its owner alone where nobody said otherwise: there may be a key in it.
fn create(file: &Path, text: &str, permissions: Option<Permissions>) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(file)?;
    file.write_all(text.as_bytes())?;
    if let Some(permissions) = permissions {
        file.set_permissions(permissions)?;
    }
    file.sync_all()
}

// ---- The server's context

/// The context of the server that runs at an address, or one to begin with.
fn context(url: &str, key: Option<&str>) -> u32 {
    ask(url, key).unwrap_or_else(|e| {
        let why = match e.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(ErrorKind::WouldBlock | ErrorKind::TimedOut) => "no answer in time".to_owned(),
            _ => e.to_string(),
        };
        ui::note(&format!("{url} does not say how large its context is ({why}): taking {CONTEXT}, --ctx names another"));
        CONTEXT
    })
}

fn ask(url: &str, key: Option<&str>) -> Result<u32> {
    let place = url.strip_prefix("http://").ok_or("only http:// can be asked here")?;
    let (host, path) = place.split_at(place.find('/').unwrap_or(place.len()));
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let request =
        format!("GET {path}/v1/models HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n{key}Connection: close\r\n\r\n");
    let mut stream = connect(host)?;
    stream.write_all(request.as_bytes())?;
    let models: Value = serde_json::from_slice(&body(&mut BufReader::new(stream.take(MOST)))?)?;
    let context = models["data"][0]["max_model_len"].as_u64().and_then(|n| u32::try_from(n).ok());
    context.filter(|n| *n > 0).ok_or_else(|| "its list of models has no max_model_len".into())
}

fn connect(host: &str) -> Result<TcpStream> {
    let port = host.rsplit_once(':').map(|(_, port)| port).unwrap_or_default();
    let default = if port.parse::<u16>().is_ok() { "" } else { ":80" };
    let mut outcome = Err("it has no address".into());
    for address in format!("{host}{default}").to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(e) => outcome = Err(e.into()),
        }
    }
    outcome
}

/// The body of an HTTP answer that says all is well.
fn body(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = match line.strip_prefix("HTTP/1.") {
        Some(rest) => rest.split_whitespace().nth(1).unwrap_or_default().to_owned(),
        None => return Err("that is no HTTP server".into()),
    };
    let (mut length, mut chunked) = (None, false);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else { break };
        match (name.to_ascii_lowercase().as_str(), value.trim()) {
            ("content-length", value) => length = Some(value.parse::<u64>()?),
            ("transfer-encoding", value) => chunked = value.to_ascii_lowercase().ends_with("chunked"),
            _ => {}
        }
    }
    match (status.as_str(), length) {
        ("200", _) if chunked => chunks(reader),
        ("200", Some(length)) => exactly(reader, length),
        ("200", None) => {
            let mut all = Vec::new();
            reader.read_to_end(&mut all)?;
            Ok(all)
        }
        ("401", _) => Err("it wants a key: --key names it".into()),
        (status, _) => Err(format!("it answers with status {status}").into()),
    }
}

fn chunks(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut line = String::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = u64::from_str_radix(size, 16).map_err(|_| "its answer is not whole")?;
        if size == 0 {
            return Ok(all);
        }
        all.append(&mut exactly(reader, size)?);
        reader.read_line(&mut line)?;
    }
}

fn exactly(reader: &mut impl BufRead, length: u64) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    reader.by_ref().take(length).read_to_end(&mut all)?;
    if all.len() as u64 == length { Ok(all) } else { Err("its answer is not whole".into()) }
}
