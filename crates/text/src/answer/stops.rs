//! Stop strings in a stream of text.

/// Finds the first stop string in text that arrives in pieces, and holds back what may be the start of one.
#[derive(Debug, Default)]
pub(super) struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Stops { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes text; returns what is certain not to be part of a stop string, and the stop string if one is
    /// complete (the text ends before it).
    pub(super) fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|s| self.held.find(s.as_str()).map(|at| (at, s)));
        // The earliest; of several at one place the longest.
        if let Some((at, stop)) = found.min_by_key(|(at, s)| (*at, std::cmp::Reverse(s.len()))) {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.stops.iter().map(|s| longest_start(&self.held, s)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, tail), None)
    }

    /// The text held back, when no more comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest proper prefix of `stop` that `text` ends with.
fn longest_start(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(i, _)| i).skip(1);
    starts.filter(|&n| text.ends_with(&stop[..n])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn earliest_stop_wins_and_nothing_of_it_leaks() {
        let mut s = Stops::new(vec!["END".into(), "\n\n".into()]);
        assert_eq!(s.push("one E"), ("one ".into(), None));
        assert_eq!(s.push("N"), (String::new(), None));
        assert_eq!(s.push("x\n"), ("ENx".into(), None));
        assert_eq!(s.push("\nEND"), (String::new(), Some("\n\n".into())));
    }

    proptest! {
        /// However the text is cut, what comes out is the same.
        #[test]
        fn cuts_do_not_matter(text in "[abé]{0,40}", cuts in prop::collection::vec(0usize..8, 1..40)) {
            let stops = vec!["abé".to_string(), "éé".into(), "aabb".into()];
            let mut whole = Stops::new(stops.clone());
            let (mut want, mut want_stop) = whole.push(&text);
            if want_stop.is_none() {
                want.push_str(&whole.finish());
            }
            let (mut got, mut got_stop) = (String::new(), None);
            let mut parts = Stops::new(stops);
            let chars: Vec<char> = text.chars().collect();
            let (mut at, mut cuts) = (0, cuts.iter().cycle());
            while at < chars.len() && got_stop.is_none() {
                let end = (at + cuts.next().unwrap()).min(chars.len());
                let end = if end == at { at + 1 } else { end };
                let (out, stop) = parts.push(&chars[at..end].iter().collect::<String>());
                got.push_str(&out);
                got_stop = stop;
                at = end;
            }
            if got_stop.is_none() {
                got.push_str(&parts.finish());
            }
            // A piecewise reader may stop at an earlier-ending stop string than the whole text shows first.
            prop_assert_eq!(got_stop.is_some(), want_stop.take().is_some());
            prop_assert!(want.starts_with(&got) || got.starts_with(&want));
        }
    }
}
