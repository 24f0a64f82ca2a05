//! The sampled text of tool calls, so that a conversation that comes back is rendered to the very text that the model
//! wrote and that its cache holds (`prompt.md` section 13).
//!
//! Clients send calls back as JSON: keys in another order, other spaces, other escapes. Each call therefore has a name
//! that nobody can guess, and the text of its block is kept under it. A client that has changed a call gets what it
//! changed: the kept text is used only for the same calls.

use crate::{Block, Part, ToolCall};
use lru::LruCache;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use std::collections::HashMap;

/// What is kept at the most. What was used longest ago goes first.
#[derive(Clone, Copy, Debug)]
pub struct ReplayLimits {
    /// Blocks.
    pub blocks: usize,
    /// Bytes of their text and calls.
    pub bytes: usize,
}

impl Default for ReplayLimits {
    fn default() -> Self {
        ReplayLimits { blocks: 100_000, bytes: 512 << 20 }
    }
}

/// Sampled blocks of tool calls, by the names of their calls. Serialised as the list of them.
pub struct Replay {
    limits: ReplayLimits,
    /// Number of the block that a call is in.
    of_call: HashMap<String, u64>,
    blocks: LruCache<u64, Entry>,
    bytes: usize,
    next: u64,
}

#[derive(Clone, Serialize, Deserialize)]
struct Entry {
    calls: Vec<KeptCall>,
    parts: Vec<Part>,
}

#[derive(Clone, Serialize, Deserialize)]
struct KeptCall {
    id: String,
    name: String,
    arguments: String,
}

impl Entry {
    fn bytes(&self) -> usize {
        let text = |part: &Part| if let Part::Text(text) = part { text.len() } else { 0 };
        let of_calls = self.calls.iter().map(|c| 2 * c.id.len() + c.name.len() + c.arguments.len());
        size_of::<Self>()
            + self.parts.iter().map(|p| size_of::<Part>() + text(p)).sum::<usize>()
            + of_calls.sum::<usize>()
    }
}

impl Default for Replay {
    fn default() -> Self {
        Replay::new(ReplayLimits::default())
    }
}

impl Replay {
    /// An empty map.
    pub fn new(limits: ReplayLimits) -> Self {
        Replay { limits, of_call: HashMap::new(), blocks: LruCache::unbounded(), bytes: 0, next: 0 }
    }

    /// A new name for a call: the prefix and 32 random hexadecimal digits.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn fresh_id(&self, prefix: &str) -> Result<String, getrandom::Error> {
        loop {
            let mut random = [0; 16];
            getrandom::fill(&mut random)?;
            let id = format!("{prefix}{:032x}", u128::from_ne_bytes(random));
            if !self.of_call.contains_key(&id) {
                return Ok(id);
            }
        }
    }

    /// Keeps a block under the names of its calls. Does nothing unless every call has one.
    pub fn remember(&mut self, block: &Block, ids: &[String]) {
        if ids.len() != block.calls.len() {
            return;
        }
        let named = block.calls.iter().zip(ids);
        let calls = named.map(|(call, id)| KeptCall {
            id: id.clone(),
            name: call.name.clone(),
            arguments: call.arguments.clone(),
        });
        self.insert(Entry { calls: calls.collect(), parts: block.parts.clone() });
    }

    /// A line that [`Replay::learn`] reads, for a block that was just kept: to be saved with the conversation.
    pub fn note(&self, ids: &[String]) -> Vec<u8> {
        let entry = ids.first().and_then(|id| self.of_call.get(id)).and_then(|n| self.blocks.peek(n));
        let Some(mut line) = entry.and_then(|entry| serde_json::to_vec(entry).ok()) else {
            return Vec::new();
        };
        line.push(b'\n');
        line
    }

    /// Keeps the blocks of lines that [`Replay::note`] made; others are ignored.
    pub fn learn(&mut self, notes: &[u8]) {
        let lines = notes.split(|&b| b == b'\n').filter(|line| !line.is_empty());
        lines.filter_map(|line| serde_json::from_slice(line).ok()).for_each(|entry| self.insert(entry));
    }

    fn insert(&mut self, entry: Entry) {
        if entry.calls.is_empty() || entry.bytes() > self.limits.bytes || self.limits.blocks == 0 {
            return;
        }
        let number = self.next;
        self.next += 1;
        for call in &entry.calls {
            self.of_call.insert(call.id.clone(), number);
        }
        self.bytes += entry.bytes();
        self.blocks.put(number, entry);
        while self.blocks.len() > self.limits.blocks || self.bytes > self.limits.bytes {
            let Some((number, oldest)) = self.blocks.pop_lru() else { break };
            self.bytes -= oldest.bytes();
            for call in &oldest.calls {
                // A later block may have taken the name.
                if self.of_call.get(&call.id) == Some(&number) {
                    self.of_call.remove(&call.id);
                }
            }
        }
    }

    /// The sampled text of these calls: of all calls of a block and no others, with the arguments that the model wrote.
    pub fn find(&mut self, calls: &[ToolCall]) -> Option<&[Part]> {
        let number = *self.of_call.get(calls.first()?.id.as_deref()?)?;
        let entry = self.blocks.get(&number)?;
        let is_kept = |call: &ToolCall| {
            let kept = entry.calls.iter().find(|k| Some(k.id.as_str()) == call.id.as_deref());
            kept.is_some_and(|k| k.name == call.name && same_json(&k.arguments, &call.arguments))
        };
        (calls.len() == entry.calls.len() && calls.iter().all(is_kept)).then_some(&entry.parts)
    }

    /// Blocks that are kept.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether none are.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

impl Serialize for Replay {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The oldest first, so that reading them in order keeps the order of use.
        serializer.collect_seq(self.blocks.iter().rev().map(|(_, entry)| entry))
    }
}

impl<'de> Deserialize<'de> for Replay {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut replay = Replay::default();
        Vec::<Entry>::deserialize(deserializer)?.into_iter().for_each(|entry| replay.insert(entry));
        Ok(replay)
    }
}

/// Whether two JSON texts mean the same to a client that reads numbers as doubles; other texts must be equal.
fn same_json(a: &str, b: &str) -> bool {
    let read = |text| serde_json::from_str::<Value>(text);
    a == b || matches!((read(a), read(b)), (Ok(a), Ok(b)) if same_value(&a, &b))
}

fn same_value(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_value(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same_value(a, b)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Marker;

    fn block(n: usize, text: &str) -> Block {
        let call =
            |i| ToolCall { id: None, name: format!("tool{i}"), arguments: r#"{"b": 1.0, "a": "è"}"#.into() };
        Block {
            calls: (0..n).map(call).collect(),
            parts: vec![Part::Marker(Marker::Dsml), Part::Text(text.into())],
        }
    }

    fn calls(ids: &[String], arguments: &str) -> Vec<ToolCall> {
        let call = |(i, id): (usize, &String)| ToolCall {
            id: Some(id.clone()),
            name: format!("tool{i}"),
            arguments: arguments.into(),
        };
        ids.iter().enumerate().map(call).collect()
    }

    #[test]
    fn found_by_all_calls_and_no_others() {
        let mut replay = Replay::default();
        let ids: Vec<String> = (0..2).map(|_| replay.fresh_id("call_").unwrap()).collect();
        assert!(ids[0] != ids[1] && ids[0].len() == 5 + 32);
        let block = block(2, "x");
        replay.remember(&block, &ids);
        let again = r#"{"a":"\u00e8","b":1}"#;
        assert_eq!(replay.find(&calls(&ids, again)), Some(&block.parts[..]));
        let mut swapped = calls(&ids, again);
        swapped.swap(0, 1);
        assert!(replay.find(&swapped).is_some());
        assert!(replay.find(&calls(&ids[..1], again)).is_none(), "a call is missing");
        assert!(replay.find(&calls(&ids, r#"{"a":"e","b":1}"#)).is_none(), "a call was changed");
        let mut renamed = calls(&ids, again);
        renamed[1].name = "other".into();
        assert!(replay.find(&renamed).is_none());
        assert!(replay.find(&[]).is_none());
        assert!(replay.find(&block.calls).is_none(), "calls without names");
    }

    #[test]
    fn bounded_and_kept_on_disk() {
        let mut replay = Replay::new(ReplayLimits { blocks: 3, ..ReplayLimits::default() });
        let ids: Vec<String> = (0..5).map(|i| format!("call_{i}")).collect();
        let arguments = block(1, "").calls[0].arguments.clone();
        for (i, id) in ids.iter().enumerate() {
            replay.remember(&block(1, &i.to_string()), std::slice::from_ref(id));
            // The first is used all the time.
            assert!(replay.find(&calls(&ids[..1], &arguments)).is_some());
        }
        let kept = |replay: &mut Replay| -> Vec<bool> {
            ids.iter().map(|id| replay.find(&calls(std::slice::from_ref(id), &arguments)).is_some()).collect()
        };
        let expected = [true, false, false, true, true];
        let text = serde_json::to_string(&replay).unwrap();
        assert_eq!(kept(&mut replay), expected);
        let mut read: Replay = serde_json::from_str(&text).unwrap();
        assert_eq!(kept(&mut read), expected);
        assert_eq!((read.len(), read.of_call.len()), (3, 3));
        // And as notes.
        let mut learnt = Replay::default();
        for id in &ids {
            learnt.learn(&replay.note(std::slice::from_ref(id)));
        }
        learnt.learn(b"other notes\n{}\n");
        assert_eq!(kept(&mut learnt), expected);
        // By bytes.
        let mut small = Replay::new(ReplayLimits { bytes: 2000, ..ReplayLimits::default() });
        for id in &ids {
            small.remember(&block(1, &"x".repeat(600)), std::slice::from_ref(id));
            assert!(small.bytes <= 2000);
        }
        assert_eq!(small.len(), 2);
        small.remember(&block(1, &"x".repeat(2000)), &ids[..1]);
        assert_eq!(small.len(), 2, "larger than all there is room for");
    }
}
