//! How long each kernel takes, for `ds4 bench --kernels`.

use cubecl::client::Client;
use cubecl::future::block_on;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Times launches by name, if it is on.
#[derive(Default)]
pub(crate) struct Timer {
    on: bool,
    seen: RefCell<BTreeMap<&'static str, (usize, f64)>>,
}

impl Timer {
    pub(crate) fn switch(&mut self, on: bool) {
        self.on = on;
        if on {
            self.seen.get_mut().clear();
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Launches, and takes the time if it is on.
    pub(crate) fn time(&self, client: &Client, name: &'static str, launch: impl FnOnce()) {
        if !self.on {
            return launch();
        }
        let Ok(window) = client.profile_start() else { return launch() };
        launch();
        if let Ok(duration) = client.profile_end(window) {
            let Some(ticks) = block_on(duration.resolve()) else { return };
            let mut seen = self.seen.borrow_mut();
            let entry = seen.entry(name).or_default();
            entry.0 += 1;
            entry.1 += ticks.duration().as_secs_f64();
        }
    }

    pub(crate) fn times(&self) -> Vec<(&'static str, usize, f64)> {
        let mut all: Vec<_> = self.seen.borrow().iter().map(|(&name, &(n, s))| (name, n, s)).collect();
        all.sort_by(|a, b| b.2.total_cmp(&a.2));
        all
    }
}
