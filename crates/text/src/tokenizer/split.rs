//! Pre-tokenization: three splits in sequence, each applied to every piece of the one before
//! (`tokenizer.md` section 4). Matches become pieces, and so do the gaps between them.

use super::unicode::{Class, class, is_space};

/// Calls `piece` with every pre-token of `text`, in order; together they are `text`.
pub(crate) fn split(text: &str, piece: &mut impl FnMut(&str)) {
    numbers(text, &mut |text| cjk(text, &mut |text| words(text, piece)));
}

/// `\p{N}{1,3}`
fn numbers(text: &str, next: &mut impl FnMut(&str)) {
    let is_number = |c| class(c) == Class::Number;
    let mut rest = text;
    while let Some(start) = rest.find(is_number) {
        let (gap, from) = rest.split_at(start);
        if !gap.is_empty() {
            next(gap);
        }
        let end = from
            .char_indices()
            .take(3)
            .take_while(|(_, c)| is_number(*c))
            .map(|(i, c)| i + c.len_utf8())
            .last();
        let (run, after) = from.split_at(end.unwrap_or(from.len()));
        next(run);
        rest = after;
    }
    if !rest.is_empty() {
        next(rest);
    }
}

/// Runs of the common ideographs, hiragana and katakana.
fn cjk(text: &str, next: &mut impl FnMut(&str)) {
    let is_cjk = |c: char| matches!(c, '\u{4E00}'..='\u{9FA5}' | '\u{3040}'..='\u{30FF}');
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let inside = is_cjk(c);
        let end = rest.find(|c| is_cjk(c) != inside).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        next(run);
        rest = after;
    }
}

/// The third split, by its procedural form: at each place the first rule that matches wins, and characters
/// that nothing matches are joined into gap pieces.
fn words(text: &str, piece: &mut impl FnMut(&str)) {
    let (mut at, mut gap) = (0, 0);
    while at < text.len() {
        let len = match_len(&text[at..]);
        if len == 0 {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
            continue;
        }
        if gap < at {
            piece(&text[gap..at]);
        }
        piece(&text[at..at + len]);
        at += len;
        gap = at;
    }
    if gap < at {
        piece(&text[gap..at]);
    }
}

fn is_letter(c: char) -> bool {
    c.is_ascii_alphabetic() || (!c.is_ascii() && matches!(class(c), Class::Letter | Class::Mark))
}

fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || (!c.is_ascii() && matches!(class(c), Class::Punctuation | Class::Symbol))
}

fn run(text: &str, inside: impl Fn(char) -> bool) -> usize {
    text.find(|c| !inside(c)).unwrap_or(text.len())
}

/// Bytes of the match at the start of `text`; 0 if no rule matches.
fn match_len(text: &str) -> usize {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return 0 };
    let after = chars.as_str();
    let second = chars.next();
    let len = first.len_utf8();
    if first.is_ascii_punctuation() && second.is_some_and(|c| c.is_ascii_alphabetic()) {
        return len + run(after, |c| c.is_ascii_alphabetic());
    }
    if is_letter(first) && class(first) != Class::Mark {
        return run(text, is_letter);
    }
    if !matches!(first, '\r' | '\n') && !is_punctuation(first) && second.is_some_and(is_letter) {
        return len + run(after, is_letter);
    }
    if is_letter(first) {
        return run(text, is_letter);
    }
    let lead = usize::from(first == ' ');
    let marks = run(&text[lead..], is_punctuation);
    if marks > 0 {
        let end = lead + marks;
        return end + run(&text[end..], |c| matches!(c, '\r' | '\n'));
    }
    spaces(text)
}

/// Whitespace: up to its last newline; else all but the last character, which goes with the word that
/// follows, unless nothing follows in the piece.
fn spaces(text: &str) -> usize {
    let end = run(text, is_space);
    let space = &text[..end];
    if let Some(newline) = space.rfind(['\r', '\n']) {
        return newline + 1;
    }
    if end == text.len() {
        return end;
    }
    match space.char_indices().next_back() {
        Some((last, _)) if last > 0 => last,
        _ => end,
    }
}
