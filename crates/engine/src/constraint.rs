//! Grammars that the tokens of an answer must follow.

use ds4_text::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use std::sync::Arc;

/// A set of tokens.
pub type TokenSet = llguidance::toktrie::SimpleVob;

/// Makes constraints for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
}

/// First byte of what the grammar's tokens call special: no text can match it.
const SPECIAL: u8 = 0xff;

impl Grammars {
    /// For the vocabulary of a tokenizer.
    ///
    /// # Errors
    /// What llguidance says.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        let word = |id: u32| match tokenizer.marker_of(id) {
            // Markers are structure: only a grammar's own `<[id]>` means them.
            Some(marker) => [&[SPECIAL], marker.text().as_bytes()].concat(),
            None if tokenizer.is_special(id) => [&[SPECIAL], tokenizer.token_bytes(id)].concat(),
            None => tokenizer.token_bytes(id).to_vec(),
        };
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_len() as u32).map(word).collect();
        let info = TokRxInfo::new(words.len() as u32, tokenizer.eos());
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(|e| e.to_string())?;
        factory.quiet();
        Ok(Grammars { factory })
    }

    /// A constraint from a grammar in Lark's notation.
    ///
    /// # Errors
    /// Why there is no such text, or the grammar is too large, or says something that is not supported.
    pub fn constraint(&self, lark: String) -> Result<Constraint, String> {
        let parser = self.factory.create_parser(TopLevelGrammar::from_lark(lark));
        let mut matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(reason(&error));
        }
        // A grammar without any text shows here.
        match matcher.compute_mask() {
            Ok(allowed) if !allowed.is_zero() => Ok(Constraint { matcher }),
            Err(e) if !e.to_string().starts_with("NoExtension") => Err(reason(&e.to_string())),
            _ => Err("no text satisfies it".into()),
        }
    }
}

/// The part of an error that is for people: behind it comes the parser's state.
fn reason(error: &str) -> String {
    error.split("\n<state>").next().unwrap_or(error).trim().to_owned()
}

/// A grammar, and the place in it that an answer has reached.
pub struct Constraint {
    matcher: Matcher,
}

impl Constraint {
    /// The tokens that may come next: the end marker where the text is whole, and only that where nothing else may follow.
    ///
    /// # Errors
    /// The grammar has become too large to follow.
    pub fn allowed(&mut self) -> Result<TokenSet, String> {
        self.matcher.compute_mask_or_eos().map_err(|e| reason(&e.to_string()))
    }

    /// Takes the token that came.
    ///
    /// # Errors
    /// A token that was not allowed.
    pub fn take(&mut self, token: u32) -> Result<(), String> {
        if self.matcher.is_stopped() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|e| reason(&e.to_string()))
    }

    /// Whether the text is whole.
    pub fn is_whole(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }
}
