//! Any bytes as tokenizer.json.
#![no_main]

use ds4_text::{Mode, Tokenizer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::from_json(bytes) {
        let text = String::from_utf8_lossy(bytes);
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text, Mode::Plain)), text.as_bytes());
    }
});
