//! What the instruction sets have in common: an instruction, perhaps context, a response.

use serde::Deserialize;

use super::{Outcome, Reason, folded};
use crate::data::example::{Cut, Edge, Example, Message, Role};

/// A record of an Alpaca-like dump.
#[derive(Debug, Deserialize)]
pub struct AlpacaRecord {
    /// What to do.
    pub instruction: String,
    /// On what; often empty.
    #[serde(default)]
    pub input: Option<String>,
    /// The response.
    pub output: String,
}

/// Which part of a record makes two records siblings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// The same context, where there is one; else the same instruction.
    ShareContext,
    /// The same instruction on the same context: other answers to one question.
    ShareQuestion,
}

/// Makes the example of one question, with its context behind `separator`.
pub fn example(
    record: u32,
    [instruction, context, response]: [&str; 3],
    separator: &str,
    siblings: Siblings,
) -> Outcome {
    let [instruction, context, response] = [instruction.trim(), context.trim(), response.trim()];
    // Some dumps spell an absent context out.
    let context = if context.eq_ignore_ascii_case("<noinput>") { "" } else { context };
    if instruction.is_empty() {
        return Err(Reason::EmptyQuestion);
    }
    if response.is_empty() {
        return Err(Reason::EmptyResponse);
    }
    let mut content = instruction.to_string();
    let mut cuts = Vec::new();
    if !context.is_empty() {
        content.push_str(separator);
        let start = content.len();
        content.push_str(context);
        cuts.push(Cut { message: 0, bytes: start..content.len(), edge: Edge::Tail });
    }
    // What the instruction is about may be a passage; where siblings share both, it is part of what is asked.
    let question = match siblings {
        Siblings::ShareContext => 0..instruction.len(),
        Siblings::ShareQuestion => 0..content.len(),
    };
    let document = match siblings {
        Siblings::ShareContext if !context.is_empty() => folded(context),
        Siblings::ShareContext => folded(instruction),
        Siblings::ShareQuestion => folded(&content),
    };
    let messages = vec![Message::new(Role::User, content), Message::new(Role::Assistant, response)];
    Ok(Example { messages, document, file: 0, record, question, cuts })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    #[test]
    fn context_follows_the_instruction_and_is_what_may_be_cut() {
        let found = example(3, [" Sum up. ", " A text. ", " B. "], "\n\n", Siblings::ShareContext).unwrap();
        assert_eq!(found.messages[0].content, "Sum up.\n\nA text.");
        assert_eq!(found.messages[1].content, "B.");
        assert_eq!(&found.messages[0].content[found.cuts[0].bytes.clone()], "A text.");
        assert_eq!((found.record, found.document.as_str()), (3, "a text."));
    }

    #[test]
    fn siblings_share_a_document_whatever_case_and_spaces() {
        let document = |record: [&str; 3], siblings| example(1, record, " ", siblings).unwrap().document;
        let one = document(["Who  is It?", "", "x"], Siblings::ShareContext);
        assert_eq!(one, document(["who is it?", " ", "y"], Siblings::ShareContext));
        assert_eq!(
            document(["a", "Same  text", "x"], Siblings::ShareContext),
            document(["b", "same text", "y"], Siblings::ShareContext)
        );
        assert_ne!(
            document(["a", "same", "x"], Siblings::ShareQuestion),
            document(["b", "same", "x"], Siblings::ShareQuestion)
        );
    }

    #[test]
    fn what_says_nothing_is_dropped_with_its_reason() {
        let outcome = |record: [&str; 3]| example(1, record, " ", Siblings::ShareQuestion);
        assert_eq!(outcome(["q", "", " \n"]), Err(Reason::EmptyResponse));
        assert_eq!(outcome([" ", "c", "r"]), Err(Reason::EmptyQuestion));
        assert!(outcome(["q", "<noinput>", "r"]).unwrap().cuts.is_empty());
    }
}
