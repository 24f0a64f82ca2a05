//! Looking at intermediate results by name.

/// Receives named intermediate results of a pass, one call per step and pass; the head's come a few rows at a time.
pub trait Tap {
    /// Whether results are wanted at all; steps are not read back otherwise.
    fn on(&self) -> bool {
        true
    }
    /// Whether the result of a name is wanted; others are not read back.
    fn wants(&self, _name: &str) -> bool {
        self.on()
    }
    /// The step of a name is done, whether its result is wanted or not.
    fn passed(&mut self, _name: &str) {}
    /// `values` is row-major, `width` values a row.
    fn rows(&mut self, name: &str, width: usize, values: &[f32]);
}

/// Looks at nothing.
pub struct NoTap;

impl Tap for NoTap {
    fn on(&self) -> bool {
        false
    }
    fn rows(&mut self, _: &str, _: usize, _: &[f32]) {}
}
