//! Which blocks to keep.

use crate::{Meta, Name};
use std::collections::HashMap;

/// Seconds after which a use counts half.
const HALF_LIFE: f64 = 7.0 * 24.0 * 3600.0;

/// What a block is worth a byte: how often it is used, the more recently the more, times the tokens that need not be
/// computed.
fn value(meta: &Meta, now: u64) -> f64 {
    let age = now.saturating_sub(meta.used) as f64;
    let hits = f64::from(meta.hits.saturating_add(1)) * (-age / HALF_LIFE).exp2();
    hits * meta.end as f64 / meta.bytes() as f64
}

/// The blocks to give up, in order, so that `bytes` of them are free: the least valuable first, never one on which a kept
/// one builds, and never `protected` ones. `None` if that does not suffice.
pub(crate) fn victims(
    blocks: &HashMap<Name, Meta>,
    bytes: u64,
    protected: &[Name],
    now: u64,
) -> Option<Vec<Name>> {
    let mut children: HashMap<Name, usize> = HashMap::new();
    for meta in blocks.values().filter(|m| m.start > 0) {
        *children.entry(meta.parent).or_default() += 1;
    }
    let is_free = |name: &Name, children: &HashMap<Name, usize>| {
        !protected.contains(name) && children.get(name).is_none_or(|&n| n == 0)
    };
    let (mut victims, mut freed) = (Vec::new(), 0);
    let mut leaves: Vec<&Meta> = blocks.values().filter(|m| is_free(&m.name, &children)).collect();
    while freed < bytes {
        let by_value =
            |a: &&Meta, b: &&Meta| value(a, now).total_cmp(&value(b, now)).then(a.name.cmp(&b.name));
        let (i, _) = leaves.iter().enumerate().min_by(|(_, a), (_, b)| by_value(a, b))?;
        let victim = leaves.swap_remove(i);
        freed += victim.bytes();
        victims.push(victim.name);
        if let Some(parent) = blocks.get(&victim.parent).filter(|_| victim.start > 0) {
            children.entry(parent.name).and_modify(|n| *n -= 1);
            if is_free(&parent.name, &children) {
                leaves.push(parent);
            }
        }
    }
    Some(victims)
}
