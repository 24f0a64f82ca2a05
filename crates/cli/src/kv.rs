//! State on disk, as the flags say.

use crate::args::{KvArgs, Switch};
use crate::load::Wants;
use crate::{Result, ui};
use ds4_engine::{Disk, fingerprint};
use ds4_gguf::Gguf;
use ds4_kvstore::{Options, Store};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens by which a place on disk is ahead of the one before: each costs some megabytes for the full model.
const SAVE_EVERY: usize = 128;

/// The folder that is meant.
pub(crate) fn folder(named: Option<&Path>) -> Result<PathBuf> {
    match (named, directories::ProjectDirs::from("", "", "ds4")) {
        (Some(path), _) => Ok(path.to_owned()),
        (None, Some(user)) => Ok(user.cache_dir().join("kv")),
        (None, None) => {
            Err("there is no home folder to keep state in: name one with --kv-dir, or say --kv off".into())
        }
    }
}

/// Where state of a model's sessions is kept, if it is; a folder that cannot be used costs a warning, not the answer.
pub(crate) fn open(args: &KvArgs, file: &Gguf, mtp: Option<&Path>, wants: Wants) -> Result<Option<Disk>> {
    if args.kv == Switch::Off {
        return Ok(None);
    }
    let mtp = mtp.map(Gguf::open).transpose()?;
    let opened = match folder(args.kv_dir.as_deref()) {
        Ok(folder) => Store::open(&folder, Options { budget: args.kv_budget }).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    match opened {
        Ok(store) => {
            let fingerprint = fingerprint(file, mtp.as_ref(), wants.kv, wants.exact);
            let disk = Disk { store: Arc::new(store), fingerprint, save_every: SAVE_EVERY };
            report(Some(&disk));
            Ok(Some(disk))
        }
        Err(why) => {
            ui::note(&why);
            Ok(None)
        }
    }
}

/// Says what went wrong on disk, once.
pub(crate) fn report(disk: Option<&Disk>) {
    for problem in disk.iter().flat_map(|d| d.store.take_problems()) {
        ui::note(&problem.to_string());
    }
}
