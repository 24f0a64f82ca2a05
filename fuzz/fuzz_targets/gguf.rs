//! Any bytes: an error or a file whose every tensor and shape can be looked at.
#![no_main]

use ds4_gguf::Gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = Gguf::from_bytes(bytes.to_vec()) {
        for t in file.tensors() {
            let tensor = file.tensor(&t.name).expect("listed");
            assert_eq!(tensor.bytes().len() as u64, t.bytes);
        }
        let _ = ds4_model::Shape::from_gguf(&file);
        let _ = ds4_text::Tokenizer::from_gguf(file.metadata());
    }
});
