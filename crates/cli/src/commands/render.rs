//! `ds4 render`: conversations in the official encoder's form to prompts.

use super::lines;
use crate::Result;
use crate::args::RenderArgs;
use ds4_text::{Profile, official};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Serialize)]
#[serde(untagged)]
enum Rendered {
    Prompt { text: String, token_ids: Vec<u32> },
    Refused { error: String },
}

pub(crate) fn run(args: &RenderArgs) -> Result<ExitCode> {
    let (tokenizer, file) = lines::tokenizer(args.tokenizer.as_deref())?;
    let of_file = || file.map(|f| Profile::of_file(f.metadata())).unwrap_or_default();
    let profile = args.profile.unwrap_or_else(of_file);
    lines::each(&args.jsonl, |line| match official::render_input(line, profile) {
        Ok(prompt) => {
            Ok(Rendered::Prompt { text: prompt.to_text(), token_ids: prompt.to_tokens(&tokenizer)? })
        }
        // Part of the answer: the next line may be right.
        Err(e) => Ok(Rendered::Refused { error: e.to_string() }),
    })?;
    Ok(ExitCode::SUCCESS)
}
