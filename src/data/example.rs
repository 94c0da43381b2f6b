//! One training example, whatever its source.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::hex::hex;

/// Bytes of a document's text that lineage keeps; the ids of the sources are shorter.
const LONGEST_ID: usize = 96;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions of the deployer.
    System,
    /// The question.
    User,
    /// The response: what training supervises.
    Assistant,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::System, Self::User, Self::Assistant];

    /// As chat templates spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// Which end of a text is given up first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// Its beginning.
    Head,
    /// Its end.
    Tail,
}

/// A part of a message that may be shortened when the example is too long: context, never the question or the response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Index of the message.
    pub message: usize,
    /// Bytes of its content.
    pub bytes: Range<usize>,
    /// Which end goes first.
    pub edge: Edge,
}

/// One conversation of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The turns; the last one is the assistant's.
    pub messages: Vec<Message>,
    /// What it was made from, within its source: examples of one document never part between splits.
    pub document: String,
    /// The file of the source, counted from 0.
    pub file: u32,
    /// The record of that file, counted from 1.
    pub record: u32,
    /// Bytes of the first user turn that ask: what stands around them is a schema, a page or other context.
    ///
    /// Later user turns ask with all they say.
    pub question: Range<usize>,
    /// What may be shortened, in the order in which it is given up.
    ///
    /// Within a message, a part that is given up earlier lies behind one that is given up later, so that
    /// shortening the first moves nothing of the second.
    pub cuts: Vec<Cut>,
}

impl Example {
    /// The place of the first user turn.
    pub fn question_message(&self) -> Option<usize> {
        self.messages.iter().position(|message| message.role == Role::User)
    }

    /// What is asked, turn by turn, without schema, page or other context.
    pub fn asked(&self) -> String {
        let first = self.question_message();
        let asked = |(at, message): (usize, &Message)| {
            let content = message.content.as_str();
            if Some(at) == first { content.get(self.question.clone()).unwrap_or(content) } else { content }
                .to_string()
        };
        let turns = self.messages.iter().enumerate().filter(|(_, message)| message.role == Role::User);
        turns.map(asked).collect::<Vec<_>>().join("\n")
    }

    /// What is answered, turn by turn.
    pub fn answered(&self) -> String {
        let turns = self.messages.iter().filter(|message| message.role == Role::Assistant);
        turns.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// What the question is about: the first user turn around the question.
    pub fn context(&self) -> String {
        let Some(message) = self.question_message().and_then(|at| self.messages.get(at)) else {
            return String::new();
        };
        let part = |bytes: Range<usize>| message.content.get(bytes).unwrap_or_default().trim();
        let (before, after) = (part(0..self.question.start), part(self.question.end..message.content.len()));
        format!("{before}\n{after}").trim().to_string()
    }

    /// The document's name for lineage: itself where it is short, else a hash that stays the same from run to run.
    ///
    /// Some sources know their documents by nothing but their text, pages of it; `record` leads back to that.
    pub fn document_id(&self) -> String {
        if self.document.len() <= LONGEST_ID {
            return self.document.clone();
        }
        let hash = hex(&Sha256::digest(&self.document));
        format!("sha256:{}", hash.get(..32).unwrap_or(&hash))
    }

    /// A hash of what is said: equal for copies, whatever their place in the dump.
    pub fn identity(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for message in &self.messages {
            hash.update(message.role.as_str());
            hash.update((message.content.len() as u64).to_le_bytes());
            hash.update(&message.content);
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(document: &str) -> Example {
        Example {
            messages: Vec::new(),
            document: document.to_string(),
            file: 0,
            record: 1,
            question: 0..0,
            cuts: Vec::new(),
        }
    }

    #[test]
    fn a_document_is_known_by_a_short_name_that_stays_the_same() {
        assert_eq!(of("ABC/2014/page_9.pdf").document_id(), "ABC/2014/page_9.pdf");
        let text = "a passage of an encyclopaedia, ".repeat(200);
        let id = of(&text).document_id();
        // Of `sha256sum`: a change would lose the way back from datasets that lie on disks.
        assert_eq!(id, "sha256:204f27efd7c1a5b80f6aacf2b385d67e");
        assert_ne!(id, of(&text[1..]).document_id());
    }
}
