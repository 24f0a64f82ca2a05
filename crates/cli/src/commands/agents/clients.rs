//! What each client needs, and its file with that in it.

use super::{KEY_VARIABLE, PROVIDER, Setup};
use crate::Result;
use crate::args::Client;
use serde::Serialize;
use serde_json::{Value, json};
use toml_edit::{DocumentMut, Item, Table, TableLike};

/// Claude Code's environment.
pub(super) fn claude(setup: &Setup) -> Vec<(&'static str, String)> {
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
pub(super) fn wanted(client: Client, setup: &Setup) -> Value {
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
pub(super) fn merged(client: Client, old: &str, setup: &Setup) -> Result<String> {
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
