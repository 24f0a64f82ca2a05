//! Recorded passes: a decode step is some six hundred launches, which the device replays as one.

use crate::buffer::device_error;
use cubecl::client::{Client, Graph};
use ds4_model::BackendError;
use std::collections::HashMap;

/// What passes must have in common to share a recording: all else is read from buffers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) draft: bool,
    /// Rows.
    pub(crate) n: usize,
    /// Positions that the launches cover.
    pub(crate) reach: usize,
    /// Whether compressed rows are selected.
    pub(crate) selects: bool,
    /// The buffers of the pass, by the one its layers share.
    pub(crate) streams: u64,
    /// The memory of the sessions.
    pub(crate) arena: u64,
    /// That of index scores, which grows with the longest session.
    pub(crate) scores: u64,
}

/// What the present pass is.
#[derive(Default)]
enum State {
    /// Computed step by step.
    #[default]
    Plain,
    /// The same, as the warm run that a recording needs.
    Warm(Key),
    /// Recorded; computed at its end.
    Recording(Key),
}

/// Recordings kept; more are forgotten all at once, since forms change seldom.
const MOST: usize = 32;

/// Records passes that come again.
#[derive(Default)]
pub(crate) struct Recorder {
    graphs: HashMap<Key, Graph>,
    /// The form whose warm run was the pass before.
    warm: Option<Key>,
    state: State,
    /// The device cannot record.
    unable: bool,
}

impl Recorder {
    /// Ends a preparation that the coming pass does not continue.
    pub(crate) fn settle(&mut self, client: &Client, key: Option<&Key>) {
        if self.warm.is_some() && self.warm.as_ref() != key {
            self.warm = None;
            // There was nothing to record, which is what the error says.
            let _ = client.stop_capture();
        }
    }

    /// Whether passes of a form have been recorded.
    pub(crate) fn has(&self, key: &Key) -> bool {
        self.graphs.contains_key(key)
    }

    /// Computes a pass of a form that has been recorded.
    pub(crate) fn replay(&self, key: &Key) -> Result<(), BackendError> {
        self.graphs.get(key).map_or(Ok(()), replay)
    }

    /// Starts the steps of a pass, of a form if it can be recorded.
    pub(crate) fn begin(&mut self, client: &Client, key: Option<Key>) -> Result<(), BackendError> {
        self.state = State::Plain;
        let Some(key) = key.filter(|k| !self.unable && !self.has(k)) else { return Ok(()) };
        if self.warm.take().as_ref() == Some(&key) {
            client.start_capture().map_err(device_error)?;
            self.state = State::Recording(key);
        } else if client.graph_prepare().is_ok() {
            self.state = State::Warm(key);
        } else {
            self.unable = true;
        }
        Ok(())
    }

    /// Ends the steps of a pass.
    pub(crate) fn end(&mut self, client: &Client) -> Result<(), BackendError> {
        match std::mem::take(&mut self.state) {
            State::Plain => {}
            State::Warm(key) => self.warm = Some(key),
            State::Recording(key) => {
                let graph = client.stop_capture().map_err(device_error)?;
                if self.graphs.len() >= MOST {
                    self.graphs.clear();
                }
                replay(&graph)?;
                self.graphs.insert(key, graph);
            }
        }
        Ok(())
    }
}

#[allow(unsafe_code)]
fn replay(graph: &Graph) -> Result<(), BackendError> {
    // SAFETY: the buffers of the recorded launches live as long as the backend or are named in the key, and the
    // one queue keeps replays and other work in order.
    unsafe { graph.replay() }.map_err(device_error)
}
