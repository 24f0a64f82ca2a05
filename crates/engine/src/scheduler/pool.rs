//! Which session a request gets.

use crate::{Engine, Error, Session};
use ds4_model::Backend;
use std::time::{Duration, Instant};

/// Sessions beyond those that may run at once, for small requests only.
pub(super) const RESERVED: usize = 2;
/// Tokens of a prompt up to which a request is small: a title, a probe, the beginning of a chat.
pub(super) const SMALL: usize = 4096;
/// Tokens that a session must have in common with a prompt to be worth more than an empty one.
const WORTH: usize = 32;
/// Tokens of the end of a conversation that another may cost it: its last answer is being asked for anew.
const EDIT: usize = 64;
/// Time in which what a session holds loses half its worth.
const HALF_LIFE: Duration = Duration::from_secs(600);

/// A session, and who uses it.
pub(super) struct Slot<B: Backend> {
    pub(super) session: Session<B>,
    pub(super) busy: bool,
    /// Only small requests may take it anew.
    reserved: bool,
    used: Instant,
}

/// What to do to get a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Go on with this one.
    Own(usize),
    /// Copy so many tokens of the first to the second.
    Copy { from: usize, to: usize, len: usize },
}

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
struct View {
    tokens: usize,
    /// Tokens from which it could go on.
    usable: usize,
    busy: bool,
    reserved: bool,
    idle: Duration,
}

/// All sessions.
pub(super) struct Pool<B: Backend> {
    pub(super) slots: Vec<Slot<B>>,
}

impl<B: Backend> Pool<B> {
    pub(super) fn new(engine: &mut Engine<B>, count: usize, context: usize) -> Result<Self, Error> {
        let slot = |i: usize| {
            let session = engine.session(context)?;
            Ok(Slot { session, busy: false, reserved: i < RESERVED, used: Instant::now() })
        };
        Ok(Pool { slots: (0..count).map(slot).collect::<Result<_, Error>>()? })
    }

    /// The place for a prompt; `None` where it has to wait.
    pub(super) fn place(&self, prompt: &[u32]) -> Option<Place> {
        let view = |s: &Slot<B>| View {
            tokens: s.session.tokens().len(),
            usable: s.session.usable(prompt),
            busy: s.busy,
            reserved: s.reserved,
            idle: s.used.elapsed(),
        };
        let views: Vec<View> = self.slots.iter().map(view).collect();
        place(&views, prompt.len())
    }

    /// Gives a place to somebody; returns the session's number.
    pub(super) fn take(&mut self, engine: &mut Engine<B>, place: Place) -> Result<usize, Error> {
        let slot = match place {
            Place::Own(slot) => slot,
            Place::Copy { from, to, len } => {
                if let Ok([from, to]) = self.slots.get_disjoint_mut([from, to]) {
                    engine.fork(&from.session, &mut to.session, len)?;
                }
                to
            }
        };
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.busy = true;
        }
        Ok(slot)
    }

    /// Takes a session back.
    pub(super) fn give_back(&mut self, slot: usize) {
        let is_large = |s: &Slot<B>| s.session.tokens().len() > SMALL;
        self.slots[slot].busy = false;
        self.slots[slot].used = Instant::now();
        if !self.slots[slot].reserved || !is_large(&self.slots[slot]) {
            return;
        }
        // A small conversation has grown: another session serves the small ones from now on.
        let others = self.slots.iter().enumerate().filter(|(_, s)| !s.busy && !s.reserved);
        let least =
            others.min_by(|(_, a), (_, b)| loss(a, Instant::now()).total_cmp(&loss(b, Instant::now())));
        if let Some((other, _)) = least {
            self.slots[other].reserved = true;
            self.slots[slot].reserved = false;
        }
    }
}

fn loss<B: Backend>(slot: &Slot<B>, now: Instant) -> f64 {
    worth(slot.session.tokens().len(), now.duration_since(slot.used))
}

/// What tokens are worth that nobody used for a while.
fn worth(tokens: usize, idle: Duration) -> f64 {
    tokens as f64 * (-idle.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
}

fn place(views: &[View], prompt: usize) -> Option<Place> {
    let is_small = prompt <= SMALL;
    let all = || views.iter().enumerate();
    let best = all().max_by_key(|(i, v)| (v.usable, !v.busy, std::cmp::Reverse(*i)));
    let best = best.filter(|(_, v)| v.usable >= WORTH.min(prompt));
    // The session whose loss costs least, of those that this request may take.
    let may_take = |v: &View| !v.busy && if is_small { v.reserved || v.tokens <= SMALL } else { !v.reserved };
    let cost = |v: &View| worth(v.tokens, v.idle);
    let victim =
        all().filter(|(i, v)| may_take(v) && best.is_none_or(|(b, _)| b != *i)).min_by(|(_, a), (_, b)| {
            // Small requests leave the others' sessions alone while they can.
            let order = |v: &View| is_small && !v.reserved;
            order(a).cmp(&order(b)).then(cost(a).total_cmp(&cost(b)))
        });
    match (best, victim) {
        (Some((own, v)), victim) if !v.busy => {
            let tail = v.tokens - v.usable;
            let lost = worth(tail, v.idle);
            match victim {
                // Another conversation that begins alike: each gets its own.
                Some((to, other)) if tail > EDIT && lost > cost(other) => {
                    Some(Place::Copy { from: own, to, len: v.usable })
                }
                None if is_small && tail > SMALL => None,
                _ => Some(Place::Own(own)),
            }
        }
        (Some((from, v)), Some((to, _))) => Some(Place::Copy { from, to, len: v.usable }),
        (None, Some((slot, _))) => Some(Place::Own(slot)),
        (_, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(tokens: usize, usable: usize, busy: bool, reserved: bool, idle: u64) -> View {
        View { tokens, usable, busy, reserved, idle: Duration::from_secs(idle) }
    }

    const SMALL_ONE: usize = 100;
    const LARGE: usize = 30_000;

    #[test]
    fn empty_ones_first() {
        let empty = view(0, 0, false, false, 9);
        let side = view(0, 0, false, true, 9);
        assert_eq!(place(&[side, empty], LARGE), Some(Place::Own(1)));
        assert_eq!(place(&[side, empty], SMALL_ONE), Some(Place::Own(0)));
        assert_eq!(place(&[view(0, 0, true, true, 0), empty], SMALL_ONE), Some(Place::Own(1)));
        assert_eq!(place(&[side, view(0, 0, true, false, 0)], LARGE), None);
    }

    #[test]
    fn goes_on_where_it_was() {
        let own = view(20_000, 20_000, false, false, 5);
        let other = view(25_000, 8000, false, false, 1);
        assert_eq!(place(&[view(0, 0, false, true, 0), other, own], LARGE), Some(Place::Own(2)));
        // The last answer is edited.
        let edited = view(20_000, 19_950, false, false, 5);
        assert_eq!(place(&[view(0, 0, false, false, 0), edited], LARGE), Some(Place::Own(1)));
    }

    #[test]
    fn copies_what_is_busy_or_anothers() {
        let busy = view(20_000, 12_000, true, false, 0);
        let free = view(0, 0, false, false, 0);
        assert_eq!(place(&[busy, free], LARGE), Some(Place::Copy { from: 0, to: 1, len: 12_000 }));
        let idle = view(40_000, 12_000, false, false, 3);
        assert_eq!(place(&[idle, free], LARGE), Some(Place::Copy { from: 0, to: 1, len: 12_000 }));
        // Where the other would cost more, the tail goes.
        let dear = view(60_000, 0, false, false, 3);
        assert_eq!(place(&[idle, dear], LARGE), Some(Place::Own(0)));
    }

    #[test]
    fn small_requests_never_cost_a_large_session() {
        let large = view(50_000, 0, false, false, 100_000);
        let side = view(300, 0, false, true, 1);
        assert_eq!(place(&[large, side], SMALL_ONE), Some(Place::Own(1)));
        let busy_side = view(300, 0, true, true, 1);
        assert_eq!(place(&[large, busy_side], SMALL_ONE), None);
        assert_eq!(place(&[view(3000, 0, false, false, 1), busy_side], SMALL_ONE), Some(Place::Own(0)));
        // Not even one that begins alike.
        let alike = view(50_000, 90, false, false, 1);
        assert_eq!(place(&[alike, busy_side], SMALL_ONE), None);
        assert_eq!(place(&[alike, side], SMALL_ONE), Some(Place::Copy { from: 0, to: 1, len: 90 }));
        // What is reserved is theirs, whatever it holds: nobody waits for ever.
        let grown = view(50_000, 0, false, true, 1);
        assert_eq!(place(&[large, grown], SMALL_ONE), Some(Place::Own(1)));
        // And a large one leaves them their place.
        assert_eq!(place(&[large, side], LARGE), Some(Place::Own(0)));
    }

    #[test]
    fn of_large_ones_the_least_used_goes() {
        let old = view(50_000, 0, false, false, 7200);
        let new = view(30_000, 0, false, false, 10);
        assert_eq!(place(&[new, old], LARGE), Some(Place::Own(1)));
    }
}
