//! Which types tensors get.

use crate::Error;
use crate::names::{Class, Item};
use ds4_gguf::TensorType;
use regex_lite::Regex;

/// Which types the tensors get: experts as the recipe says, other large matrices Q8_0, the embedding and control matrices
/// F16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Experts' gate and up IQ2_XXS, down Q2_K, those of the draft block Q4_K: the published file.
    Q2,
    /// The same, but for the last seventh of the layers, whose experts are Q4_K.
    Q2Q4,
    /// Experts Q4_K.
    Q4,
    /// Experts Q8_0.
    Q8,
    /// All matrices BF16, which holds every value of a checkpoint: the yardstick.
    Bf16,
}

/// The part of the layers that the mixed recipe encodes better: 37 to 42 of 43.
const BETTER_LAYERS: usize = 7;

impl Recipe {
    /// Its name, as flags and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Recipe::Q2 => "q2",
            Recipe::Q2Q4 => "q2-q4",
            Recipe::Q4 => "q4",
            Recipe::Q8 => "q8",
            Recipe::Bf16 => "bf16",
        }
    }

    /// What the common tools call a file of it (`general.file_type`).
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Recipe::Q2 | Recipe::Q2Q4 => 19,
            Recipe::Q4 => 14,
            Recipe::Q8 => 7,
            Recipe::Bf16 => 32,
        }
    }

    pub(crate) fn ty(self, item: &Item, layers: usize) -> TensorType {
        match item.class {
            Class::Vector => TensorType::F32,
            Class::Table => TensorType::I32,
            Class::Offsets => TensorType::F16,
            _ if self == Recipe::Bf16 => TensorType::Bf16,
            Class::Control | Class::Embedding => TensorType::F16,
            Class::Dense => TensorType::Q8_0,
            Class::Experts => self.experts(&item.to, layers),
        }
    }

    fn experts(self, name: &str, layers: usize) -> TensorType {
        let layer = name.strip_prefix("blk.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
        // The draft block has no number. It is small, and what it guesses wrong is lost.
        let better = match (self, layer) {
            (_, None) => true,
            (Recipe::Q2Q4, Some(layer)) => layer >= layers - (layers / BETTER_LAYERS).max(1),
            _ => false,
        };
        match self {
            Recipe::Bf16 => TensorType::Bf16,
            Recipe::Q8 => TensorType::Q8_0,
            Recipe::Q4 => TensorType::Q4K,
            Recipe::Q2 | Recipe::Q2Q4 if better => TensorType::Q4K,
            Recipe::Q2 | Recipe::Q2Q4 if name.contains("ffn_down") => TensorType::Q2K,
            Recipe::Q2 | Recipe::Q2Q4 => TensorType::Iq2Xxs,
        }
    }
}

/// Another type for the tensors whose names a pattern is found in.
#[derive(Clone, Debug)]
pub struct Override {
    text: String,
    pattern: Regex,
    ty: TensorType,
}

/// Types that matrices may be given, by the names flags use.
const TYPES: [(&str, TensorType); 7] = [
    ("f32", TensorType::F32),
    ("f16", TensorType::F16),
    ("bf16", TensorType::Bf16),
    ("q8_0", TensorType::Q8_0),
    ("q4_k", TensorType::Q4K),
    ("q2_k", TensorType::Q2K),
    ("iq2_xxs", TensorType::Iq2Xxs),
];

impl std::str::FromStr for Override {
    type Err = String;

    /// `PATTERN=TYPE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, ty) = text.rsplit_once('=').ok_or("expected PATTERN=TYPE")?;
        let known = TYPES.iter().find(|(name, _)| name.eq_ignore_ascii_case(ty));
        let Some((_, ty)) = known else {
            return Err(format!("type {ty:?}: expected one of {}", TYPES.map(|(name, _)| name).join(", ")));
        };
        let pattern = Regex::new(pattern).map_err(|e| format!("pattern {pattern:?}: {e}"))?;
        Ok(Override { text: text.into(), pattern, ty: *ty })
    }
}

impl Override {
    /// As it was written.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The type it gives a tensor, if it is about it.
    pub(crate) fn ty(&self, item: &Item) -> Option<Result<TensorType, Error>> {
        let plain = matches!(self.ty, TensorType::F32 | TensorType::F16 | TensorType::Bf16);
        let possible = match item.class {
            Class::Table => false,
            Class::Vector => plain,
            _ => true,
        };
        self.pattern.is_match(&item.to).then(|| match possible {
            true => Ok(self.ty),
            false => Err(Error::Plan(format!("{}: {} cannot be {}", self.text, item.to, self.ty))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_are_checked() {
        let parse = |text: &str| text.parse::<Override>();
        assert_eq!(parse("blk\\.[01]\\..*exps=Q4_K").unwrap().ty, TensorType::Q4K);
        assert_eq!(parse("a=b=f16").unwrap().pattern.as_str(), "a=b");
        for (bad, message) in [("x", "PATTERN=TYPE"), ("x=q3_k", "one of"), ("(=f16", "pattern")] {
            assert!(parse(bad).unwrap_err().contains(message), "{bad}");
        }
    }
}
