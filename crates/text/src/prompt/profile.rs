//! What differs between releases of the weights (`prompt.md` section 8).

use ds4_gguf::Metadata;

const THOROUGH: &str = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n\
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n\
Explicitly write out your entire deliberation process, documenting every intermediate step, considered \
alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

const RELENTLESS: &str = "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n\
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose \
the problem into its most fundamental components, trace every causal chain to its root, and resolve the \
underlying cause rather than any surface symptom.\n\
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain \
that no assumption remains unchecked and no error remains undiscovered.\n\n";

/// A release of the weights, as far as prompts depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// The preview of April 2026.
    #[default]
    April,
    /// The weights of 31 July 2026.
    July,
}

/// How hard the model thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Less than usual; weights of April have no such level.
    Low,
    /// As usual.
    High,
    /// As hard as it can.
    Max,
}

/// Whether and how hard the model thinks before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// It answers directly.
    Off,
    /// It thinks first.
    On(Effort),
}

impl Profile {
    /// The profile of a model file: that of the weights of July where its name, version or base model says so, else
    /// that of April.
    pub fn of_file(meta: &Metadata) -> Self {
        let keys = ["general.version", "general.name", "general.basename", "general.base_model.0.name"];
        let says_july =
            |key: &&str| meta.opt_str(key).ok().flatten().is_some_and(|text| text.contains("0731"));
        if keys.iter().any(says_july) { Profile::July } else { Profile::April }
    }

    /// The profile of a name; `later_2026` and `april_2026` are what others call their effort tables.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "april" | "april_2026" => Some(Profile::April),
            "0731" | "later_2026" => Some(Profile::July),
            _ => None,
        }
    }

    /// The effort that a level's official name means to these weights; other levels are errors to the official encoder.
    pub fn effort(self, name: &str) -> Option<Effort> {
        match (self, name) {
            (Profile::July, "low") => Some(Effort::Low),
            (_, "high") => Some(Effort::High),
            (_, "max") => Some(Effort::Max),
            _ => None,
        }
    }

    /// The same for every level that clients know: the nearest one that these weights have.
    pub fn nearest_effort(self, name: &str) -> Option<Effort> {
        match (self, name) {
            (Profile::July, "minimal" | "low") => Some(Effort::Low),
            (_, "minimal" | "low" | "medium" | "high" | "xhigh") => Some(Effort::High),
            (_, "max" | "ultra") => Some(Effort::Max),
            _ => None,
        }
    }

    /// What stands before everything else.
    pub(super) fn prefix(self, effort: Effort) -> &'static str {
        match (self, effort) {
            (Profile::April, Effort::Low | Effort::High) | (Profile::July, Effort::Low) => "",
            (Profile::April, Effort::Max) | (Profile::July, Effort::High) => THOROUGH,
            (Profile::July, Effort::Max) => RELENTLESS,
        }
    }
}
