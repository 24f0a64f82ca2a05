//! Puts configurations into the clients' files.

use super::Setup;
use super::clients::merged;
use crate::Result;
use crate::args::Client;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All was there already.
    Same,
    New,
    /// Changed; the old one is here.
    Changed(PathBuf),
}

pub(super) fn report(file: &Path, outcome: &Outcome) -> String {
    let file = file.display();
    match outcome {
        Outcome::Same => format!("{file} says all this already\n"),
        Outcome::New => format!("wrote {file}\n"),
        Outcome::Changed(backup) => format!("wrote {file}\nas it was before: {}\n", backup.display()),
    }
}

/// Writes what a client must have into its file. A file that is not understood stays as it is.
pub(super) fn install(file: &Path, client: Client, setup: &Setup) -> Result<Outcome> {
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
pub(super) fn beside(file: &Path, suffix: &str) -> PathBuf {
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
