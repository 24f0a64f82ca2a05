//! The widths of DeepSeek V4 Flash: most kernels are specialised by widths, and those of the small models of the other
//! checks are not the ones that users run.

use super::invariance::Loaded;
use super::{MakeBackend, Outcome};
use crate::Synthetic;
use ds4_model::NoTap;
use ds4_model::cache::KvFormat;

/// Tokens of a pass: more than there are in one that takes weights row by row.
const TOKENS: usize = 24;

/// How far the default mode may be from the exact one, root mean square over that of the logits. Activations of eight
/// bits are about 1 % off in each product; what a kernel gets wrong is off by as much as the logits are large.
const NEAR: f64 = 0.06;

/// The default mode against the exact one on layers of all kinds with random weights, all tokens at once and one by one.
pub(super) fn default_near_exact<M: MakeBackend>(maker: &M) -> Outcome {
    // Few experts: decoded for the exact mode, all together have to fit one buffer of any device.
    let file = Synthetic { vocab: 512, experts: 4, experts_used: 4, ..Synthetic::flash(4) }.model()?;
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 97 % 512).collect();
    let load = |exact: bool| Loaded::of(maker, &file, None, exact, KvFormat::Packed, TOKENS);
    let exact = load(true)?.run(&tokens, &[TOKENS], &mut NoTap)?;
    let mut loaded = load(false)?;
    let mut measured = Vec::new();
    for (what, chunks) in [("one by one", [1]), ("at once", [TOKENS])] {
        let off = distance(&exact, &loaded.run(&tokens, &chunks, &mut NoTap)?);
        if off.is_nan() || off > NEAR {
            return Err(format!("tokens {what}: logits are off by {:.1} % of their size", 100.0 * off).into());
        }
        measured.push(format!("{what} {:.1} %", 100.0 * off));
    }
    Ok(format!("logits off by {}", measured.join(", ")))
}

/// Root mean square of the differences over that of the values.
fn distance(want: &[f32], got: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let differences = squares(&mut want.iter().zip(got).map(|(a, b)| a - b));
    (differences / squares(&mut want.iter().copied())).sqrt()
}
