//! Any bytes as the official encoder's input.
#![no_main]

use ds4_text::{Profile, official};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = official::render_input(text, Profile::April).map(|prompt| prompt.to_text());
});
