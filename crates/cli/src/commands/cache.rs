//! `ds4 cache`: what is kept on disk.

use crate::args::{CacheAction, CacheArgs};
use crate::kv::folder;
use crate::load;
use crate::ui::bytes;
use crate::{Result, ui};
use ds4_kvstore::{Meta, Options, Section, Store};
use ds4_text::Tokenizer;
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn run(args: &CacheArgs) -> Result<ExitCode> {
    let folder = folder(args.kv_dir.as_deref())?;
    if !folder.exists() {
        println!("nothing is kept in {}", folder.display());
        return Ok(ExitCode::SUCCESS);
    }
    let store = Store::open(&folder, Options { budget: u64::MAX })?;
    let mut code = ExitCode::SUCCESS;
    match &args.action {
        CacheAction::Ls { model } => list(&store, &folder, model.as_deref())?,
        CacheAction::Verify => {
            let all = store.list().len();
            let good = store.verify();
            println!("{good} of {all} blocks are good");
            if good < all {
                code = ExitCode::FAILURE;
            }
        }
        CacheAction::Prune { budget } => {
            let removed = store.prune(*budget);
            let left: u64 = store.list().iter().map(Meta::bytes).sum();
            println!("{removed} blocks removed; {} are left", bytes(left));
        }
        CacheAction::Rm { name } => println!("{} blocks removed", remove(&store, name)?),
    }
    for problem in store.take_problems() {
        ui::note(&problem.to_string());
    }
    Ok(code)
}

fn list(store: &Store, folder: &Path, model: Option<&Path>) -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(load::open(model)?.metadata())?;
    let all = store.list();
    println!(
        "{:10} {:10} {:>9} {:>9} {:>10} {:>5} {:>8}  ends with",
        "model", "block", "from", "to", "size", "hits", "used"
    );
    for meta in &all {
        println!(
            "{:.10} {:.10} {:9} {:9} {:>10} {:5} {:>8}  {}",
            meta.fingerprint.to_string(),
            meta.name.to_string(),
            meta.start,
            meta.end,
            bytes(meta.bytes()),
            meta.hits,
            ago(meta.used),
            preview(store, meta, &tokenizer)
        );
    }
    let total: u64 = all.iter().map(Meta::bytes).sum();
    println!("{} blocks, {} in {}", all.len(), bytes(total), folder.display());
    Ok(())
}

fn ago(seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match now.saturating_sub(seconds) {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

/// The last words of a block.
fn preview(store: &Store, meta: &Meta, tokenizer: &Tokenizer) -> String {
    let Ok(tokens) = store.read(meta, Section::Tokens) else { return "?".into() };
    let (ids, _) = tokens.as_chunks::<4>();
    let ids: Vec<u32> = ids.iter().map(|id| u32::from_le_bytes(*id)).collect();
    let text = tokenizer.decode_text(&ids[ids.len().saturating_sub(24)..], false);
    let mut last: Vec<char> = text.chars().rev().take(48).collect();
    last.reverse();
    format!("{:?}", last.into_iter().collect::<String>())
}

/// Removes the block whose name begins so, with what builds on it.
fn remove(store: &Store, name: &str) -> Result<usize> {
    if name == "all" {
        return Ok(store.prune(0));
    }
    let all = store.list();
    let named: Vec<&Meta> = all.iter().filter(|m| m.name.to_string().starts_with(name)).collect();
    match named[..] {
        [meta] if !name.is_empty() => Ok(store.remove(meta.name)),
        [] => Err(format!("no block's name begins with {name:?}; ds4 cache ls lists them").into()),
        _ => Err(format!("the names of {} blocks begin with {name:?}: say more of it", named.len()).into()),
    }
}
