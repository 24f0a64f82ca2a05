//! Conversations as clients send them, brought into the order that the model was trained on, and that a later request
//! repeats: what is said stays where it was said, so that the state of a long prompt can be used again.

use ds4_text::{Assistant, Body, Instructions, Json, Message, ResponseFormat, ToolResult};

/// Collects the messages of a conversation.
#[derive(Default)]
pub(crate) struct Conversation {
    system: Vec<String>,
    messages: Vec<Message>,
    /// System texts between a call and its result: they follow the results.
    held: Vec<String>,
}

impl Conversation {
    /// Instructions. Those before all else are the system text; later ones become part of the user's turn next to them,
    /// because the first tokens of a prompt must not change while it grows.
    pub(crate) fn system(&mut self, text: &str) {
        // A client's line for its own accounts, another one in each session.
        if text.starts_with("x-anthropic-") || text.is_empty() {
            return;
        }
        match self.messages.last().map(|m| &m.body) {
            None => self.system.push(text.to_owned()),
            Some(Body::Assistant(a)) if !a.calls.is_empty() => self.held.push(text.to_owned()),
            Some(_) => self.messages.push(Message::user(text)),
        }
    }

    /// What the person says.
    pub(crate) fn user(&mut self, text: &str) {
        self.release();
        self.messages.push(Message::user(text));
    }

    /// What the model said. Pieces of one turn may come one by one.
    pub(crate) fn assistant(&mut self, turn: Assistant) {
        self.release();
        if let Some(Body::Assistant(last)) = self.messages.last_mut().map(|m| &mut m.body) {
            last.reasoning.push_str(&turn.reasoning);
            last.content.push_str(&turn.content);
            last.calls.extend(turn.calls);
        } else {
            self.messages.push(turn.into());
        }
    }

    /// What a tool gave.
    pub(crate) fn result(&mut self, result: ToolResult) {
        self.messages.push(Body::ToolResult(result).into());
    }

    fn release(&mut self) {
        self.messages.extend(self.held.drain(..).map(Message::user));
    }

    /// Whether the conversation contains a call of this name.
    pub(crate) fn has_call(&self, id: &str) -> bool {
        let mut turns = self
            .messages
            .iter()
            .filter_map(|m| if let Body::Assistant(a) = &m.body { Some(a) } else { None });
        turns.any(|turn| turn.calls.iter().any(|call| call.id.as_deref() == Some(id)))
    }

    /// Whether the last turn is one of the model that calls tools: nothing can go on from there.
    pub(crate) fn ends_with_calls(&self) -> bool {
        matches!(self.messages.last().map(|m| &m.body), Some(Body::Assistant(a)) if !a.calls.is_empty())
    }

    /// The messages, instructions first.
    pub(crate) fn finish(
        mut self,
        tools: Vec<Json>,
        response_format: Option<ResponseFormat>,
    ) -> Vec<Message> {
        self.release();
        // Some text to answer to there must be.
        if self.messages.is_empty() {
            self.messages.push(Message::user(""));
        }
        if let Some(Body::Assistant(last)) = self.messages.last_mut().map(|m| &mut m.body) {
            last.open = true;
        }
        let text = self.system.join("\n\n");
        if !text.is_empty() || !tools.is_empty() || response_format.is_some() {
            let instructions = Instructions { text, tools, response_format };
            self.messages.insert(0, Body::System(instructions).into());
        }
        self.messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_text::{RenderOptions, ResultPart, ToolCall, render};

    fn text(conversation: Conversation) -> String {
        let messages = conversation.finish(Vec::new(), None);
        render(&messages, &RenderOptions::default(), &mut ds4_text::Replay::default()).unwrap().to_text()
    }

    fn call() -> Assistant {
        let call = ToolCall { id: Some("c".into()), name: "f".into(), arguments: "{}".into() };
        Assistant { calls: vec![call], ..Assistant::default() }
    }

    #[test]
    fn late_instructions_join_the_user_turn_beside_them() {
        let mut c = Conversation::default();
        for system in ["x-anthropic-billing: 1", "A", "B"] {
            c.system(system);
        }
        c.user("hello");
        c.system("env");
        let first =
            text(Conversation { system: c.system.clone(), messages: c.messages.clone(), held: Vec::new() });
        assert!(first.contains("A\n\nB<｜User｜>hello\n\nenv<｜Assistant｜>"), "{first}");
        c.assistant(call());
        // Between a call and its result.
        c.system("late");
        c.result(ToolResult { call: "c".into(), parts: vec![ResultPart::Text("r".into())] });
        c.user("go on");
        let next = text(c);
        assert!(next.starts_with(&first[..first.len() - "</think>".len()]));
        assert!(
            next.contains("<｜User｜><tool_result>r</tool_result>\n\nlate\n\ngo on<｜Assistant｜>"),
            "{next}"
        );
    }

    #[test]
    fn pieces_of_a_turn_are_one_turn() {
        let mut c = Conversation::default();
        c.user("u");
        c.assistant(Assistant { content: "I look. ".into(), ..Assistant::default() });
        c.assistant(call());
        assert!(c.has_call("c") && !c.has_call("d") && c.ends_with_calls());
        let text = text(c);
        assert_eq!(text.matches("<｜Assistant｜>").count(), 1);
        assert!(text.contains("I look. \n\n<｜DSML｜tool_calls>") && text.ends_with("tool_calls>"), "{text}");
    }
}
