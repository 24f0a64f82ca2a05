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
    let user =
        directories::BaseDirs::new().ok_or("there is no home folder, where clients have their files")?;
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
            format!(
                "\nThen start it, without ANTHROPIC_API_KEY in the environment or in that file:\n\n{command}\n"
            )
        }
        (Client::Codex, Some(key)) => {
            format!(
                "\nThen start it with the key, which is not in the file:\n\n{KEY_VARIABLE}={} {command}\n",
                quoted(key)
            )
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
        Client::Claude => claude(setup).into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
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
    let new = merged(client, old.as_deref().unwrap_or_default(), setup)
        .map_err(|e| left_alone(&file.display().to_string(), client, &e.to_string()))?;
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

/// Why a file was not touched, and what to do.
fn left_alone(file: &str, client: Client, why: &str) -> String {
    let comments = if client == Client::Opencode { " (comments are not understood here)" } else { "" };
    format!("{file} is left as it is: {why}{comments}; add by hand what is printed without --write")
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
        ui::note(&format!(
            "{url} does not say how large its context is ({why}): taking {CONTEXT}, --ctx names another"
        ));
        CONTEXT
    })
}

fn ask(url: &str, key: Option<&str>) -> Result<u32> {
    let place = url.strip_prefix("http://").ok_or("only http:// can be asked here")?;
    let (host, path) = place.split_at(place.find('/').unwrap_or(place.len()));
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let request = format!(
        "GET {path}/v1/models HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n{key}Connection: close\r\n\r\n"
    );
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    const ALL: [Client; 4] = [Client::Claude, Client::Codex, Client::Opencode, Client::Pi];

    fn setup() -> Setup {
        Setup { url: "http://127.0.0.1:8000".into(), model: "flash".into(), ctx: 100_000, key: None }
    }

    fn json(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    /// A server for one request: what it was asked, and what came of it.
    fn asked(answer: &'static str, key: Option<&str>) -> (String, Result<u32>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut request, mut bytes) = (String::new(), [0; 1024]);
            while !request.ends_with("\r\n\r\n") {
                let n = stream.read(&mut bytes).unwrap();
                request += str::from_utf8(&bytes[..n]).unwrap();
            }
            stream.write_all(answer.as_bytes()).unwrap();
            request
        });
        let outcome = ask(&url, key);
        (server.join().unwrap(), outcome)
    }

    #[test]
    fn addresses() {
        for url in ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"] {
            assert_eq!(base(url).unwrap(), "http://a:1");
        }
        assert_eq!(base("https://a/ds4/v1").unwrap(), "https://a/ds4");
        for bad in ["", "a:1", "http://", "http://a b", "ftp://a", "http://a\r\nX: y", "http://a?b"] {
            assert!(base(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn places() {
        let home = Path::new("/home/me");
        let at = |client| file(client, home, |_| None);
        assert_eq!(at(Client::Claude), Path::new("/home/me/.claude/settings.json"));
        assert_eq!(at(Client::Codex), Path::new("/home/me/.codex/config.toml"));
        assert_eq!(at(Client::Opencode), Path::new("/home/me/.config/opencode/opencode.json"));
        assert_eq!(at(Client::Pi), Path::new("/home/me/.pi/agent/models.json"));
        let folder = if cfg!(windows) { r"C:\x" } else { "/x" };
        let moved = |name: &str| (name == "XDG_CONFIG_HOME").then(|| folder.into());
        assert_eq!(file(Client::Opencode, home, moved), Path::new(folder).join("opencode/opencode.json"));
        assert_eq!(
            file(Client::Opencode, home, |_| Some("x".into())),
            at(Client::Opencode),
            "a relative one"
        );
    }

    #[test]
    fn other_settings_stay() {
        let old = "{\n\t\"theme\": \"dark\",\n\t\"env\": {\"A\": \"1\", \"ANTHROPIC_MODEL\": \"opus\"},\n\
                   \t\"z\": [1.0]\n}";
        let text = merged(Client::Claude, old, &setup()).unwrap();
        assert!(text.starts_with("{\n\t\"theme\": \"dark\",\n\t\"env\": {\n\t\t\"A\": \"1\","), "{text}");
        let new = json(&text);
        assert_eq!(new["z"], json!([1.0]));
        assert_eq!(new["env"]["ANTHROPIC_MODEL"], "flash");
        assert_eq!(new["env"]["ANTHROPIC_BASE_URL"], "http://127.0.0.1:8000");
        assert_eq!(new["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"], "100000");

        let old = r#"{"provider":{"other":{"npm":"x"},"local":{"models":{"old":{}}}},"model":"other/m"}"#;
        let new = json(&merged(Client::Opencode, old, &setup()).unwrap());
        assert_eq!((&new["model"], &new["small_model"]), (&json!("local/flash"), &json!("local/flash")));
        assert_eq!(new["provider"]["other"]["npm"], "x");
        let local = &new["provider"]["local"];
        assert_eq!((&local["models"]["old"], &local["options"]["apiKey"]), (&json!({}), &json!("local")));
        let limit = json!({"context": 100_000, "output": 32_000});
        assert_eq!(local["models"]["flash"]["limit"], limit);

        let new = json(&merged(Client::Pi, r#"{"providers":{"other":{}},"x":1}"#, &setup()).unwrap());
        assert_eq!((&new["providers"]["other"], &new["x"]), (&json!({}), &json!(1)));
        assert_eq!(new["providers"]["local"]["models"][0]["id"], "flash");
    }

    #[test]
    fn codex_keeps_comments() {
        let old = "# mine\nmodel = \"gpt\" # favourite\n\n[tools]\nx = 1 # one\n\n# here\n[model_providers.local]\n\
                   base_url = \"http://old\" # where\nquery_params = {}\n\n\
                   [model_providers.local.http_headers]\na = \"b\"\n\n\
                   [model_providers.other]\nname = \"o\"\n";
        let text = merged(Client::Codex, old, &setup()).unwrap();
        assert!(text.starts_with("# mine\nmodel = \"flash\" # favourite\n"), "{text}");
        for kept in [
            "[tools]\nx = 1 # one\n",
            "# here\n[model_providers.local]",
            "[model_providers.other]\nname = \"o\"\n",
        ] {
            assert!(text.contains(kept), "{text}");
        }
        assert!(text.contains("base_url = \"http://127.0.0.1:8000/v1\" # where"), "{text}");
        let doc: DocumentMut = text.parse().unwrap();
        let local = doc["model_providers"][PROVIDER].as_table_like().unwrap();
        let keys: Vec<&str> = local.iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["base_url", "name", "wire_api", "stream_idle_timeout_ms"]);
        assert_eq!(doc["model_context_window"].as_integer(), Some(100_000));
    }

    #[test]
    fn codex_shapes() {
        let olds = [
            "",
            "[a]\nb = 1\n[c]\n[a.d]\n",
            "# nothing but this",
            "[model_providers]\n[z]\n",
            "model_providers = { other = { name = \"o\" } }\n[z]\n",
            "model_providers = { local = { name = \"o\" } }\n",
            "model_providers.other.name = \"o\"\n[z]\n",
            "model_providers.local.name = \"o\"\nx = 1\n[[z]]\n",
        ];
        for old in olds {
            let text = merged(Client::Codex, old, &setup()).unwrap();
            let doc: DocumentMut = text.parse().unwrap();
            assert_eq!(doc["model_provider"].as_str(), Some("local"), "{text}");
            let local = &doc["model_providers"]["local"];
            assert_eq!(local["base_url"].as_str(), Some("http://127.0.0.1:8000/v1"), "{text}");
            assert_eq!(doc.contains_key("z"), old.contains('z'), "{text}");
            assert_eq!(merged(Client::Codex, &text, &setup()).unwrap(), text, "twice");
        }
        assert!(merged(Client::Codex, "model_providers = 1", &setup()).is_err());
        assert!(merged(Client::Codex, "[model_providers]\nlocal = 1", &setup()).is_err());
    }

    #[test]
    fn keys_go_where_they_belong() {
        let with_key = Setup { key: Some("s3cret'".into()), ..setup() };
        for client in ALL {
            let (text, end) = (merged(client, "", &with_key).unwrap(), then(client, &with_key));
            let (in_file, in_shell) = (text.contains("s3cret"), end.contains("s3cret"));
            assert_eq!((in_file, in_shell), (client != Client::Codex, client == Client::Codex));
            assert!(!merged(client, "", &setup()).unwrap().contains("s3cret"));
        }
        assert!(merged(Client::Codex, "", &with_key).unwrap().contains("env_key = \"LOCAL_API_KEY\""));
        assert!(then(Client::Codex, &with_key).contains(r"LOCAL_API_KEY='s3cret'\''' codex"));
        let page = shown(Client::Claude, &with_key, Path::new("/f")).unwrap();
        assert!(page.contains(r"export ANTHROPIC_AUTH_TOKEN='s3cret'\'''"), "{page}");
        assert!(then(Client::Pi, &setup()).contains("pi --provider local --model flash\n"));
    }

    #[test]
    fn a_small_context_leaves_room_for_the_prompt() {
        let output = |ctx| Setup { ctx, ..setup() }.output();
        assert_eq!([output(1), output(32_768), output(1_000_000)], [1, 10_922, 32_000]);
    }

    #[test]
    fn files_are_made_kept_and_left() {
        for client in ALL {
            let home = tempfile::tempdir().unwrap();
            let path = file(client, home.path(), |_| None);
            assert_eq!(install(&path, client, &setup()).unwrap(), Outcome::New);
            let first = fs::read_to_string(&path).unwrap();
            assert_eq!(first, merged(client, "", &setup()).unwrap());
            assert_eq!(install(&path, client, &setup()).unwrap(), Outcome::Same);

            let changed = |ctx| install(&path, client, &Setup { ctx, ..setup() }).unwrap();
            let backups = [".bak", ".bak.1", ".bak.2"].map(|suffix| beside(&path, suffix));
            for (i, backup) in backups.iter().enumerate() {
                assert_eq!(changed(i as u32 + 1), Outcome::Changed(backup.clone()));
            }
            assert_eq!(fs::read_to_string(&backups[0]).unwrap(), first);
            let third = merged(client, &first, &Setup { ctx: 2, ..setup() }).unwrap();
            assert_eq!(fs::read_to_string(&backups[2]).unwrap(), third);
            assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 4, "and no other file");
        }
    }

    #[test]
    fn bad_files_are_left_alone() {
        let cases: [(Client, &[u8]); 7] = [
            (Client::Claude, b"{\"env\": "),
            (Client::Claude, b"{\"env\": []}"),
            (Client::Claude, b"[]"),
            (Client::Codex, b"model = \n"),
            (Client::Opencode, b"{\n  // mine\n  \"model\": \"x\",\n}"),
            (Client::Pi, b"{\"providers\": null}"),
            (Client::Pi, b"{\"a\": \"\xff\"}"),
        ];
        for (client, bytes) in cases {
            let home = tempfile::tempdir().unwrap();
            let path = file(client, home.path(), |_| None);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            let error = install(&path, client, &setup()).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
            assert_eq!(error.contains("comments"), client == Client::Opencode, "{error}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
            assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_and_permissions_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let home = tempfile::tempdir().unwrap();
        let (real, link) = (home.path().join("real.json"), home.path().join("link.json"));
        install(&real, Client::Pi, &setup()).unwrap();
        assert_eq!(mode(&real), 0o600, "there may be a key in it");
        fs::set_permissions(&real, Permissions::from_mode(0o640)).unwrap();
        symlink(&real, &link).unwrap();
        let outcome = install(&link, Client::Pi, &Setup { ctx: 7, ..setup() }).unwrap();
        let Outcome::Changed(backup) = outcome else { panic!("{outcome:?}") };
        assert!(link.is_symlink());
        assert_eq!([mode(&real), mode(&backup)], [0o640, 0o640]);
        assert_eq!(
            json(&fs::read_to_string(&link).unwrap())["providers"]["local"]["models"][0]["contextWindow"],
            7
        );
    }

    #[test]
    fn servers_say_their_context() {
        let plain = "HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{\"data\":[{\"max_model_len\":100000}]}";
        assert!(asked(plain, None).1.is_err(), "a length that is too small");
        let plain =
            "HTTP/1.1 200 OK\r\ncontent-length: 35\r\n\r\n{\"data\":[{\"max_model_len\":100000}]} and more";
        let (request, outcome) = asked(plain, Some("k"));
        assert_eq!(outcome.unwrap(), 100_000);
        assert!(request.starts_with("GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:"), "{request}");
        assert!(request.contains("\r\nAuthorization: Bearer k\r\n"), "{request}");

        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                       A\r\n{\"data\":[{\r\n19;x=y\r\n\"max_model_len\":100000}]} \r\n0\r\n\r\n";
        let (request, outcome) = asked(chunked, None);
        assert_eq!(outcome.unwrap(), 100_000);
        assert!(!request.contains("Authorization"), "{request}");

        let to_the_end = "HTTP/1.0 200 OK\r\n\r\n{\"data\":[{\"max_model_len\":5},{\"max_model_len\":6}]}";
        assert_eq!(asked(to_the_end, None).1.unwrap(), 5);
    }

    #[test]
    fn servers_that_do_not() {
        let cases = [
            ("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "--key"),
            ("HTTP/1.1 503 Loading\r\n\r\n", "503"),
            ("SSH-2.0-x\r\n", "no HTTP server"),
            ("", "no HTTP server"),
            ("HTTP/1.1 200 OK\r\n\r\n{\"data\":[]}", "max_model_len"),
            ("HTTP/1.1 200 OK\r\n\r\n{\"data\":[{\"max_model_len\":-1}]}", "max_model_len"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "not whole"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", "not whole"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "not whole"),
        ];
        for (answer, why) in cases {
            let error = asked(answer, None).1.unwrap_err().to_string();
            assert!(error.contains(why), "{answer:?}: {error}");
        }
        let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(context(&format!("http://{unused}"), None), CONTEXT);
    }
}
