//! The tokenizer: a byte-level BPE vocabulary with added tokens.

mod bpe;
mod hugging_face;
mod metadata;
mod split;
mod unicode;
mod utf8;

pub use metadata::gguf_metadata;
pub use utf8::Utf8Stream;

use crate::Marker;
use aho_corasick::{AhoCorasick, MatchKind};
use bpe::Merges;
use ds4_gguf::Metadata;
use rustc_hash::{FxHashMap, FxHashSet};
use split::split;

/// Why a vocabulary cannot be used, or a text cannot be encoded with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Metadata.
    #[error(transparent)]
    Gguf(#[from] ds4_gguf::Error),
    /// Not a `tokenizer.json` this engine reads.
    #[error("tokenizer.json: {0}")]
    Json(#[from] serde_json::Error),
    /// The vocabulary contradicts itself or lacks something.
    #[error("tokenizer: {0}")]
    Vocabulary(String),
    /// A marker that the prompt format needs is not in the vocabulary.
    #[error("the vocabulary has no token {0:?}: the file is not of the DeepSeek V4 family")]
    Marker(&'static str),
}

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Added tokens are recognised: template text.
    Special,
    /// Nothing is: client text, in which a marker is just characters.
    Plain,
}

/// What a token is besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Part of the BPE vocabulary; its text is in the byte alphabet.
    Normal,
    /// Added; its text is literal. `special` ones are dropped by decoders that skip special tokens.
    Added { special: bool },
    /// Takes an id, but is never produced by encoding.
    Unused,
}

/// A vocabulary as the loaders find it.
pub(crate) struct Entries {
    /// (text, kind) by id.
    pub(crate) tokens: Vec<(String, Kind)>,
    /// Pairs, by rank.
    pub(crate) merges: Vec<(String, String)>,
}

/// Encodes and decodes text. Equal to the official tokenizer in both modes.
pub struct Tokenizer {
    /// All tokens' bytes, one behind the other.
    bytes: Vec<u8>,
    /// Token `i` is `bytes[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
    special: Vec<bool>,
    byte_ids: [u32; 256],
    merges: Merges,
    added: AhoCorasick,
    added_ids: Vec<u32>,
    by_text: FxHashMap<String, u32>,
    /// In the order of [`Marker::ALL`].
    markers: [Option<u32>; Marker::ALL.len()],
    bos: u32,
    eos: u32,
}

impl Tokenizer {
    /// The tokenizer in a model file's metadata (`tokenizer.md` section 6).
    pub fn from_gguf(meta: &Metadata) -> Result<Self, Error> {
        let texts = meta.str_array("tokenizer.ggml.tokens")?;
        let types = meta.opt_i32_array("tokenizer.ggml.token_type")?;
        if types.as_ref().is_some_and(|t| t.len() != texts.len()) {
            return Err(Error::Vocabulary("tokenizer.ggml.token_type and .tokens differ in length".into()));
        }
        let merges = meta.str_array("tokenizer.ggml.merges")?;
        let made = types.is_none().then(|| made(merges));
        let kind = |i: usize, text: &str| match types.as_ref().map(|t| t[i]) {
            Some(3) => Kind::Added { special: is_special_text(text) },
            Some(4) => Kind::Added { special: false },
            Some(1) => Kind::Normal,
            Some(_) => Kind::Unused,
            // Without types: what is neither a byte nor made by a merge can only have been added.
            None if made.as_ref().is_some_and(|m| m.contains(text)) => Kind::Normal,
            None => Kind::Added { special: is_special_text(text) },
        };
        let tokens = texts.iter().enumerate().map(|(i, t)| (t.clone(), kind(i, t))).collect();
        let merges = merges.iter().enumerate().map(|(i, m)| match m.split_once(' ') {
            Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
            None => Err(Error::Vocabulary(format!("merge {i} is {m:?}, expected two symbols and a space"))),
        });
        Self::build(Entries { tokens, merges: merges.collect::<Result<_, _>>()? })
    }

    /// The tokenizer of a Hugging Face `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        Self::build(hugging_face::entries(json)?)
    }

    fn build(entries: Entries) -> Result<Self, Error> {
        let n = entries.tokens.len();
        let alphabet = byte_alphabet();
        let (mut bytes, mut starts) = (Vec::with_capacity(8 * n), Vec::with_capacity(n + 1));
        let mut by_text: FxHashMap<String, u32> =
            FxHashMap::with_capacity_and_hasher(n, rustc_hash::FxBuildHasher);
        let (mut special, mut added, mut added_ids) = (Vec::with_capacity(n), Vec::new(), Vec::new());
        starts.push(0);
        for (id, (text, kind)) in entries.tokens.into_iter().enumerate() {
            let decoded = if kind == Kind::Normal { from_alphabet(&alphabet, &text) } else { None };
            bytes.extend_from_slice(decoded.as_deref().unwrap_or(text.as_bytes()));
            starts.push(bytes.len());
            special.push(kind == Kind::Added { special: true });
            if let Kind::Added { .. } = kind
                && !text.is_empty()
            {
                added.push(text.clone());
                added_ids.push(id as u32);
            }
            if let Some(other) = by_text.insert(text, id as u32) {
                return Err(Error::Vocabulary(format!("tokens {other} and {id} have the same text")));
            }
        }
        let mut byte_ids = [0; 256];
        for (byte, symbol) in alphabet.iter().enumerate() {
            let id = by_text.get(symbol.encode_utf8(&mut [0; 4]) as &str);
            byte_ids[byte] =
                *id.ok_or_else(|| Error::Vocabulary(format!("no token for byte {byte:#04x}")))?;
        }
        let find = |text: &'static str| by_text.get(text).copied().ok_or(Error::Marker(text));
        let added = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&added);
        let markers = Marker::ALL.map(|m| by_text.get(m.text()).copied());
        Ok(Tokenizer {
            merges: merges(&entries.merges, &by_text),
            added: added.map_err(|e| Error::Vocabulary(format!("added tokens: {e}")))?,
            bos: find(Marker::Bos.text())?,
            eos: find(Marker::Eos.text())?,
            bytes,
            starts,
            special,
            byte_ids,
            added_ids,
            by_text,
            markers,
        })
    }

    /// Token ids of a text. Nothing is added at either end.
    pub fn encode(&self, text: &str, mode: Mode) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, mode, &mut ids);
        ids
    }

    /// The same, appended to `ids`.
    pub fn encode_into(&self, text: &str, mode: Mode, ids: &mut Vec<u32>) {
        let mut rest = 0;
        if mode == Mode::Special {
            // The reference cuts out its two sets of added tokens one after the other. One pass over both gives
            // the same ids: where tokens of the two sets overlap (one pair does), the leftmost is of the first.
            for m in self.added.find_iter(text) {
                self.encode_plain(&text[rest..m.start()], ids);
                ids.push(self.added_ids[m.pattern().as_usize()]);
                rest = m.end();
            }
        }
        self.encode_plain(&text[rest..], ids);
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols = Vec::new();
        split(text, &mut |piece| {
            symbols.clear();
            symbols.extend(piece.bytes().map(|b| self.byte_ids[usize::from(b)]));
            self.merges.apply(&mut symbols);
            ids.extend_from_slice(&symbols);
        });
    }

    /// Bytes of a token; none for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..id as usize + 2) {
            Some(&[start, end]) => &self.bytes[start..end],
            _ => &[],
        }
    }

    /// Bytes of a sequence of tokens.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect()
    }

    /// Text of a sequence of tokens, invalid UTF-8 replaced; `skip_special` drops begin, end and placeholders.
    pub fn decode_text(&self, ids: &[u32], skip_special: bool) -> String {
        let kept = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let bytes: Vec<u8> = kept.flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether a decoder that skips special tokens drops this one.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The token whose text is exactly `text`.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).copied()
    }

    /// The token of a marker.
    pub fn marker(&self, marker: Marker) -> Result<u32, Error> {
        self.markers[marker as usize].ok_or(Error::Marker(marker.text()))
    }

    /// The marker that a token is.
    pub fn marker_of(&self, id: u32) -> Option<Marker> {
        self.markers.iter().position(|&m| m == Some(id)).map(|i| Marker::ALL[i])
    }

    /// Number of ids.
    pub fn vocab_len(&self) -> usize {
        self.special.len()
    }

    /// Begin of sentence.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// End of sentence.
    pub fn eos(&self) -> u32 {
        self.eos
    }
}

/// All texts that the byte alphabet and the merges give.
fn made(merges: &[String]) -> FxHashSet<String> {
    let bytes = byte_alphabet().into_iter().map(String::from);
    bytes.chain(merges.iter().map(|m| m.replacen(' ', "", 1))).collect()
}

/// Merges by the ids of their parts. One whose parts or result are no tokens can never apply, as in files with a cut
/// vocabulary: it is left out.
fn merges(pairs: &[(String, String)], ids: &FxHashMap<String, u32>) -> Merges {
    let mut merges = Merges::with_capacity(pairs.len());
    let mut merged = String::new();
    for (rank, (a, b)) in pairs.iter().enumerate() {
        merged.clear();
        merged.push_str(a);
        merged.push_str(b);
        if let (Some(&a), Some(&b), Some(&both)) = (ids.get(a), ids.get(b), ids.get(&merged)) {
            merges.add((a, b), rank as u32, both);
        }
    }
    merges
}

/// Whether an added token is special. The flag is not in the metadata, so this is the official list.
fn is_special_text(text: &str) -> bool {
    const INNER: [&str; 12] = [
        "end_of_query",
        "rl_image_pad",
        "rl_image_start",
        "image",
        "polygon",
        "/polygon",
        "point",
        "/point",
        "box",
        "/box",
        "ref",
        "/ref",
    ];
    let inner = text.strip_prefix("<｜").and_then(|t| t.strip_suffix("｜>"));
    [Marker::Bos, Marker::Eos, Marker::Pad].iter().any(|m| m.text() == text)
        || inner.is_some_and(|t| INNER.contains(&t) || t.starts_with("place▁holder▁no"))
        || text.starts_with("<|place_holder_")
}

/// The printable character that stands for each byte.
pub(crate) fn byte_alphabet() -> [char; 256] {
    let mut alphabet = ['\0'; 256];
    let mut extra = 0;
    for (byte, symbol) in alphabet.iter_mut().enumerate() {
        *symbol = match byte as u8 {
            b @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => char::from(b),
            _ => {
                extra += 1;
                char::from_u32(0x100 + extra - 1).unwrap_or_default()
            }
        };
    }
    alphabet
}

/// Bytes of a text in the byte alphabet; `None` if it has other characters.
fn from_alphabet(alphabet: &[char; 256], text: &str) -> Option<Vec<u8>> {
    text.chars()
        .map(|c| match c as u32 {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(c as u32).ok(),
            0x100..=0x143 => alphabet.iter().position(|&a| a == c).map(|b| b as u8),
            _ => None,
        })
        .collect()
}
