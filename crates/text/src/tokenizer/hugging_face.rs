//! Reads a Hugging Face `tokenizer.json`.

use super::{Entries, Error, Kind};
use serde::Deserialize;
use std::collections::HashMap;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

/// Older files join the pair by a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

/// No vocabulary is larger; bounds what a wrong id can make us allocate.
const MAX_VOCAB: usize = 1 << 24;

pub(crate) fn entries(json: &[u8]) -> Result<Entries, Error> {
    let file: File = serde_json::from_slice(json)?;
    if let Some(kind) = file.model.kind.filter(|k| k != "BPE") {
        return Err(Error::Vocabulary(format!("the model is {kind}, expected BPE")));
    }
    let ids = file.model.vocab.values().chain(file.added_tokens.iter().map(|a| &a.id));
    let n = ids.max().map_or(0, |&id| id as usize + 1);
    // Ids may have gaps, but not so many that they outnumber the tokens by far.
    if n > MAX_VOCAB.min(16 * (file.model.vocab.len() + file.added_tokens.len())) {
        return Err(Error::Vocabulary(format!("an id of {} is out of proportion to the vocabulary", n - 1)));
    }
    let mut tokens: Vec<Option<(String, Kind)>> = vec![None; n];
    for (text, id) in file.model.vocab {
        if let Some((other, _)) = tokens[id as usize].replace((text, Kind::Normal)) {
            return Err(Error::Vocabulary(format!("id {id} is given twice, once for {other:?}")));
        }
    }
    for added in file.added_tokens {
        // Also listed in the vocabulary or not: the added entry counts.
        tokens[added.id as usize] = Some((added.content, Kind::Added { special: added.special }));
    }
    let unused = |id: usize| (format!("<unused {id}>"), Kind::Unused);
    let tokens = tokens.into_iter().enumerate().map(|(id, t)| t.unwrap_or_else(|| unused(id))).collect();
    let merges = file.model.merges.into_iter().enumerate().map(|(i, m)| match m {
        Merge::Pair(a, b) => Ok((a, b)),
        Merge::Joined(joined) => match joined.split_once(' ') {
            Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
            None => {
                Err(Error::Vocabulary(format!("merge {i} is {joined:?}, expected two symbols and a space")))
            }
        },
    });
    Ok(Entries { tokens, merges: merges.collect::<Result<_, _>>()? })
}
