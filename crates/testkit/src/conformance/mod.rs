//! What every backend must do: the same checks for each, run by its tests and by `ds4 doctor`.
//!
//! A backend's crate names itself once, `backend_conformance!(Maker)`; the macro makes a test of every check
//! and fixture.

mod invariance;
mod reference;
mod timeline;
mod widths;

use crate::Fixture;
use ds4_model::{Backend, BackendError, Shape};

/// Makes the backend under test.
pub trait MakeBackend {
    /// The backend.
    type Backend: Backend;

    /// A backend for passes of up to `max_rows` rows of models of a shape.
    fn make(&self, shape: &Shape, exact: bool, max_rows: usize) -> Result<Self::Backend, BackendError>;

    /// Rows of the largest passes to try.
    fn max_rows(&self) -> usize {
        256
    }

    /// How far logits and activations of the exact mode may be from the reference.
    fn exact_tolerance(&self) -> f32 {
        1e-4
    }

    /// In the default mode, passes of up to so many rows give the same bits as each other, and so do larger ones; one
    /// kind agrees with the other only as a distribution. Without such a border all agree, as all do in exact mode.
    fn few_rows(&self) -> Option<usize> {
        None
    }
}

/// What was measured, or what is wrong.
pub type Outcome = Result<String, Box<dyn std::error::Error>>;

/// A check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Exact mode without rounding against the reference: logits, activations, routes, selected rows.
    Exact,
    /// Exact mode, rounding as trained, against the reference: logits.
    Rounding,
    /// Default mode against the reference: logits, as a distribution.
    Default,
    /// The draft block in exact mode against the reference: logits.
    Draft,
    /// Exact mode: chunks of any size against whole passes.
    ChunksExact,
    /// The same in default mode.
    ChunksDefault,
    /// Exact mode: sessions in a batch against each alone.
    BatchesExact,
    /// The same in default mode.
    BatchesDefault,
    /// Default mode against exact mode at the widths of DeepSeek V4 Flash.
    Widths,
    /// A pass without rows changes nothing.
    EmptyPass,
    /// A session restored from a snapshot goes on as if nothing had happened, bit for bit.
    Restore,
    /// A session put back to a frontier goes on as it did the first time, bit for bit.
    Rewind,
}

impl Check {
    /// All checks, the most telling first.
    pub const ALL: [Check; 12] = [
        Check::Exact,
        Check::Rounding,
        Check::Default,
        Check::Draft,
        Check::ChunksExact,
        Check::ChunksDefault,
        Check::BatchesExact,
        Check::BatchesDefault,
        Check::Widths,
        Check::EmptyPass,
        Check::Restore,
        Check::Rewind,
    ];

    /// What the check is about, for people.
    pub fn name(self) -> &'static str {
        match self {
            Check::Exact => "exact mode equals the reference",
            Check::Rounding => "rounding equals the reference",
            Check::Default => "default mode is near the reference",
            Check::Draft => "draft block equals the reference",
            Check::ChunksExact => "chunks, exact mode",
            Check::ChunksDefault => "chunks, default mode",
            Check::BatchesExact => "batches, exact mode",
            Check::BatchesDefault => "batches, default mode",
            Check::Widths => "the widths of Flash, default mode near exact mode",
            Check::EmptyPass => "a pass without rows",
            Check::Restore => "restoring a snapshot",
            Check::Rewind => "rewinding to a frontier",
        }
    }

    /// Runs it.
    pub fn run<M: MakeBackend>(self, maker: &M, fixture: &Fixture) -> Outcome {
        match self {
            Check::Exact => reference::exact(maker, fixture),
            Check::Rounding => reference::rounding(maker, fixture),
            Check::Default => reference::default_mode(maker, fixture),
            Check::Draft => reference::draft(maker, fixture),
            Check::ChunksExact => invariance::chunks(maker, fixture, true),
            Check::ChunksDefault => invariance::chunks(maker, fixture, false),
            Check::BatchesExact => invariance::batches(maker, fixture, true),
            Check::BatchesDefault => invariance::batches(maker, fixture, false),
            Check::Widths => widths::default_near_exact(maker),
            Check::EmptyPass => invariance::empty_pass(maker, fixture),
            Check::Restore => timeline::restore(maker, fixture),
            Check::Rewind => timeline::rewind(maker, fixture),
        }
    }
}

/// Tests of a backend: `backend_conformance!(maker)`, where `maker` is a [`MakeBackend`].
#[macro_export]
macro_rules! backend_conformance {
    ($maker:expr) => {
        $crate::backend_conformance! {
            @tests $maker, dev_f16 "dev-f16";
            exact_equals_the_reference Exact,
            rounding_equals_the_reference Rounding,
            default_mode_is_near Default,
            draft_equals_the_reference Draft,
            chunks_in_exact_mode ChunksExact,
            chunks_in_default_mode ChunksDefault,
            batches_in_exact_mode BatchesExact,
            batches_in_default_mode BatchesDefault,
            default_mode_at_the_widths_of_flash Widths,
            a_pass_without_rows_changes_nothing EmptyPass,
            restored_sessions_go_on Restore,
            rewound_sessions_go_on Rewind,
        }
        $crate::backend_conformance! {
            @tests $maker, dev_q2mix "dev-q2mix";
            exact_equals_the_reference Exact,
            rounding_equals_the_reference Rounding,
            default_mode_is_near Default,
            chunks_in_exact_mode ChunksExact,
            chunks_in_default_mode ChunksDefault,
            batches_in_exact_mode BatchesExact,
            batches_in_default_mode BatchesDefault,
            restored_sessions_go_on Restore,
            rewound_sessions_go_on Rewind,
        }
    };
    (@tests $maker:expr, $module:ident $fixture:literal; $($test:ident $check:ident,)*) => {
        mod $module {
            use super::*;

            $(#[test]
            fn $test() {
                let fixture = $crate::Fixture::shipped($fixture);
                match $crate::conformance::Check::$check.run(&$maker, &fixture) {
                    Ok(measured) => println!("{measured}"),
                    Err(e) => panic!("{e}"),
                }
            })*
        }
    };
}
