//! Any bytes as a model's answer, in any pieces: the same comes of them, and no text is lost.
#![no_main]

use ds4_text::{Answer, End, Parser, ParserOptions, Spelling, Start};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&[kind, step], text)) = data.split_first_chunk() else { return };
    let options = ParserOptions {
        start: [Start::Content, Start::Reasoning, Start::Calls][usize::from(kind % 3)],
        tools: kind & 4 == 0,
        spelling: if kind & 8 == 0 { Spelling::Marker } else { Spelling::Loose },
        stop: if kind & 16 == 0 { Vec::new() } else { vec!["STOP".into(), "\n\n".into()] },
    };
    let end = if kind & 32 == 0 { End::Turn } else { End::Cut };
    let read = |step: usize| {
        let (mut parser, mut folded) = (Parser::new(options.clone()), Answer::default());
        for piece in text.chunks(step) {
            parser.push_bytes(piece).iter().for_each(|delta| folded.apply(delta));
            let _ = parser.hint();
        }
        parser.finish(end).iter().for_each(|delta| folded.apply(delta));
        assert_eq!(folded, *parser.answer());
        (folded, parser.flaw(), parser.block().cloned())
    };
    assert_eq!(read(usize::from(step) + 1), read(usize::MAX));
});
