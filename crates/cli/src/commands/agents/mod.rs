//! `ds4 agents`: how coding agents are told of a server.

mod ask;
mod clients;
mod install;
#[cfg(test)]
mod tests;

use crate::args::{AgentsAction, AgentsArgs, Client};
use crate::{Result, ui};
use ask::context;
use clients::{claude, merged, wanted};
use install::{install, report};
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

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
