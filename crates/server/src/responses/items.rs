//! Items of past responses, for clients that send the name of an item instead of the item.

use lru::LruCache;
use serde_json::Value;

/// Bytes of items that are remembered; what was used longest ago goes first.
const MOST_BYTES: usize = 64 << 20;

/// Items by their names.
pub(crate) struct Items {
    items: LruCache<String, (Value, usize)>,
    bytes: usize,
}

impl Default for Items {
    fn default() -> Self {
        Items { items: LruCache::unbounded(), bytes: 0 }
    }
}

impl Items {
    /// Remembers the items of a response.
    pub(crate) fn remember(&mut self, output: &[Value]) {
        for item in output {
            let Some(id) = item["id"].as_str() else { continue };
            let size = 2 * id.len() + item.to_string().len();
            if let Some((_, old)) = self.items.put(id.to_owned(), (item.clone(), size)) {
                self.bytes -= old;
            }
            self.bytes += size;
            while self.bytes > MOST_BYTES {
                let Some((_, (_, size))) = self.items.pop_lru() else { break };
                self.bytes -= size;
            }
        }
    }

    /// The item of a name.
    pub(crate) fn get(&mut self, id: &str) -> Option<Value> {
        self.items.get(id).map(|(item, _)| item.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bounded() {
        let mut items = Items::default();
        let text = "x".repeat(MOST_BYTES / 4);
        for i in 0..8 {
            items.remember(&[json!({"id": format!("i{i}"), "text": text}), json!({"no": "name"})]);
            assert!(items.bytes <= MOST_BYTES);
        }
        assert!(items.get("i0").is_none() && items.get("i7").is_some());
        items.remember(&[json!({"id": "i7", "text": "short"})]);
        assert_eq!(items.get("i7").unwrap()["text"], "short");
        assert!(items.items.len() < 4 && items.bytes < MOST_BYTES);
    }
}
