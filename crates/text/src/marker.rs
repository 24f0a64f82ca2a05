//! The marker tokens of the prompt format (`prompt.md` section 1).

use serde::{Deserialize, Serialize};

macro_rules! markers {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A token that is structure, not text.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Marker {
            $($(#[$doc])* $name,)*
        }

        impl Marker {
            /// All of them.
            pub const ALL: [Marker; [$($text),*].len()] = [$(Marker::$name),*];

            /// How the vocabulary spells it.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Marker::$name => $text,)*
                }
            }
        }
    };
}

markers! {
    /// Begin of sentence: before every conversation.
    Bos = "<｜begin▁of▁sentence｜>",
    /// End of sentence: behind every turn of the model.
    Eos = "<｜end▁of▁sentence｜>",
    /// Padding.
    Pad = "<｜▁pad▁｜>",
    /// Before a user turn.
    User = "<｜User｜>",
    /// Before a turn of the model.
    Assistant = "<｜Assistant｜>",
    /// Opens the model's reasoning.
    Think = "<think>",
    /// Ends the model's reasoning, or says that there is none.
    ThinkEnd = "</think>",
    /// Part of every tag of the tool-call language.
    Dsml = "｜DSML｜",
    /// Before a reminder.
    Reminder = "<｜latest_reminder｜>",
    /// Asks whether to act.
    Action = "<｜action｜>",
    /// Asks for search queries.
    Query = "<｜query｜>",
    /// Asks for a judgement of authority.
    Authority = "<｜authority｜>",
    /// Asks for a domain.
    Domain = "<｜domain｜>",
    /// Asks for a title.
    Title = "<｜title｜>",
    /// Asks whether to read an address.
    ReadUrl = "<｜read_url｜>",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_by_place() {
        for (i, marker) in Marker::ALL.into_iter().enumerate() {
            assert_eq!(marker as usize, i);
        }
    }
}
