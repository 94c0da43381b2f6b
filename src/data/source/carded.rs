//! Any further source: a card maps its fields.

use anyhow::{Result, anyhow};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::instruction::{self, Siblings};
use super::{Outcome, Reason, Source, folded};
use crate::data::example::{Example, Message, Role};
use crate::error::user_error;

/// Which field of a record is what. A dotted name leads into a nested object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fields {
    /// What to do.
    pub instruction: Option<String>,
    /// On what.
    #[serde(alias = "input")]
    pub context: Option<String>,
    /// What is answered.
    pub response: Option<String>,
    /// The system message.
    pub system: Option<String>,
    /// A list of turns, in place of instruction, context and response.
    pub messages: Option<String>,
    /// Within a turn, who speaks; `role` or `from` unless it is named.
    pub role: Option<String>,
    /// Within a turn, what is said; `content` or `value` unless it is named.
    pub content: Option<String>,
    /// What records of one document share: they never part between splits.
    pub document: Option<String>,
}

impl Fields {
    /// Whether they make an example.
    ///
    /// # Errors
    /// When a field is missing, or one excludes another.
    pub fn check(&self) -> Result<()> {
        let named = [
            ("instruction", &self.instruction),
            ("context", &self.context),
            ("response", &self.response),
            ("system", &self.system),
            ("messages", &self.messages),
            ("role", &self.role),
            ("content", &self.content),
            ("document", &self.document),
        ];
        if let Some((key, _)) = named.iter().find(|(_, name)| name.as_deref() == Some("")) {
            return Err(user_error(
                format!("in `[fields]`, `{key}` is empty"),
                "name a field of the records",
            ));
        }
        let has = |wanted: &str| named.iter().any(|(key, name)| *key == wanted && name.is_some());
        let (excluded, with) = if has("messages") {
            (["instruction", "context", "response"].as_slice(), "messages")
        } else {
            (["role", "content"].as_slice(), "instruction")
        };
        if let Some(key) = excluded.iter().find(|key| has(key)) {
            return Err(user_error(
                format!("`[fields]` names both `{with}` and `{key}`"),
                "name either `messages`, or `instruction` and `response`",
            ));
        }
        match ["instruction", "response"].into_iter().find(|key| !has("messages") && !has(key)) {
            Some(missing) => Err(user_error(
                format!("`[fields]` names no `{missing}`"),
                "name `instruction` and `response`, or `messages`",
            )),
            None => Ok(()),
        }
    }
}

/// A source with a card.
pub(super) struct Carded {
    pub fields: Fields,
    /// The card's file, for errors.
    pub card: String,
    pub separator: &'static str,
}

type Record = Map<String, Value>;

impl Source for Carded {
    type Record = Record;

    fn example(&self, number: u32, record: Record) -> Result<Outcome> {
        let made = if self.fields.messages.is_some() {
            self.conversation(number, &record)?
        } else {
            self.instruction(number, &record)?
        };
        let Ok(mut example) = made else { return Ok(made) };
        if let Some(system) = self.text("system", self.fields.system.as_deref(), &record)? {
            add_system(&mut example, &system);
        }
        if let Some(document) = self.text("document", self.fields.document.as_deref(), &record)? {
            example.document = document;
        }
        Ok(Ok(example))
    }
}

impl Carded {
    fn instruction(&self, number: u32, record: &Record) -> Result<Outcome> {
        let part = |key, name: &Option<String>| {
            Ok::<_, anyhow::Error>(self.text(key, name.as_deref(), record)?.unwrap_or_default())
        };
        let instruction = part("instruction", &self.fields.instruction)?;
        let context = part("context", &self.fields.context)?;
        let response = part("response", &self.fields.response)?;
        let parts = [instruction.as_str(), &context, &response];
        Ok(instruction::example(number, parts, self.separator, Siblings::ShareContext))
    }

    fn conversation(&self, number: u32, record: &Record) -> Result<Outcome> {
        let name = self.fields.messages.as_deref().unwrap_or_default();
        let turns = match self.value("messages", name, record)? {
            Value::Array(turns) => turns,
            Value::Null => return Ok(Err(Reason::EmptyQuestion)),
            other => return Err(self.not_as_expected(name, other, "a list of turns")),
        };
        let mut messages = Vec::with_capacity(turns.len());
        for turn in turns {
            let Value::Object(turn) = turn else {
                return Err(self.not_as_expected(name, turn, "turns that are objects"));
            };
            let role = self.turn_part("role", self.fields.role.as_deref(), ["role", "from"], turn)?;
            let content =
                self.turn_part("content", self.fields.content.as_deref(), ["content", "value"], turn)?;
            let Some(role) = role_of(&role) else { return Ok(Err(Reason::OddTurns)) };
            messages.push(Message::new(role, content.trim()));
        }
        // A last question that nobody answered teaches nothing.
        while messages.last().is_some_and(|message| message.role != Role::Assistant) {
            messages.pop();
        }
        Ok(conversation_of(number, messages))
    }

    fn turn_part(&self, key: &str, name: Option<&str>, usual: [&str; 2], turn: &Record) -> Result<String> {
        let name = match name {
            Some(name) => name,
            None => usual.into_iter().find(|name| turn.contains_key(*name)).unwrap_or(usual[0]),
        };
        Ok(self.text(key, Some(name), turn)?.unwrap_or_default())
    }

    /// The text of a field; `None` where the card names none or it is null.
    fn text(&self, key: &str, name: Option<&str>, record: &Record) -> Result<Option<String>> {
        let Some(name) = name else { return Ok(None) };
        match self.value(key, name, record)? {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            Value::Number(number) => Ok(Some(number.to_string())),
            Value::Bool(flag) => Ok(Some(flag.to_string())),
            other => Err(self.not_as_expected(name, other, "text")),
        }
    }

    fn value<'a>(&self, key: &str, name: &str, record: &'a Record) -> Result<&'a Value> {
        let nested = || {
            let mut parts = name.split('.');
            let first = record.get(parts.next()?)?;
            parts.try_fold(first, |value, part| value.get(part))
        };
        record.get(name).or_else(nested).ok_or_else(|| {
            let there: Vec<String> = record.keys().map(|key| format!("`{key}`")).collect();
            user_error(
                format!("it has no field `{name}`; its fields are {}", there.join(", ")),
                format!("mend `{key}` in `[fields]` of `{}`", self.card),
            )
        })
    }

    fn not_as_expected(&self, name: &str, value: &Value, wanted: &str) -> anyhow::Error {
        let kind = match value {
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
            Value::String(_) => "text",
            _ => "a number or a flag",
        };
        anyhow!("its field `{name}` is {kind}, expected {wanted} (card `{}`)", self.card)
    }
}

/// Roles as dumps spell them.
fn role_of(name: &str) -> Option<Role> {
    match name.trim().to_ascii_lowercase().as_str() {
        "system" => Some(Role::System),
        "user" | "human" | "prompter" => Some(Role::User),
        "assistant" | "gpt" | "model" | "bot" | "chatgpt" => Some(Role::Assistant),
        _ => None,
    }
}

/// A system message perhaps, then question and answer in turn.
fn conversation_of(record: u32, messages: Vec<Message>) -> Outcome {
    let start = usize::from(messages.first().is_some_and(|message| message.role == Role::System));
    let turns = messages.get(start..).unwrap_or_default();
    let Some(first) = turns.first() else { return Err(Reason::EmptyResponse) };
    let in_turn = turns.iter().zip([Role::User, Role::Assistant].into_iter().cycle());
    if in_turn.into_iter().any(|(message, role)| message.role != role) {
        return Err(Reason::OddTurns);
    }
    if let Some(empty) = turns.iter().find(|message| message.content.is_empty()) {
        return Err(if empty.role == Role::User { Reason::EmptyQuestion } else { Reason::EmptyResponse });
    }
    let (document, question) = (folded(&first.content), 0..first.content.len());
    let is_empty = start == 1 && messages.first().is_some_and(|message| message.content.is_empty());
    let messages = if is_empty { messages.into_iter().skip(1).collect() } else { messages };
    Ok(Example { messages, document, file: 0, record, question, cuts: Vec::new() })
}

/// Puts a system message first, unless the conversation has one.
fn add_system(example: &mut Example, system: &str) {
    let has_one = example.messages.first().is_some_and(|message| message.role == Role::System);
    if has_one || system.trim().is_empty() {
        return;
    }
    example.messages.insert(0, Message::new(Role::System, system.trim()));
    example.cuts.iter_mut().for_each(|cut| cut.message += 1);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(fields: &str) -> Carded {
        let fields: Fields = toml::from_str(fields).unwrap();
        fields.check().unwrap();
        Carded { fields, card: "my.toml".to_string(), separator: "\n\n" }
    }

    fn outcome(fields: &str, record: Value) -> Result<Outcome> {
        source(fields).example(3, serde_json::from_value(record)?)
    }

    fn said(example: &Example) -> Vec<(Role, &str)> {
        example.messages.iter().map(|message| (message.role, message.content.as_str())).collect()
    }

    const PLAIN: &str =
        "instruction = \"q\"\ninput = \"page.text\"\nresponse = \"a\"\nsystem = \"s\"\ndocument = \"id\"";

    #[test]
    fn fields_become_turns_by_the_card() {
        let record =
            json!({"q": " Why? ", "page": {"text": "A page."}, "a": 7, "s": "Be brief.", "id": 12, "x": []});
        let found = outcome(PLAIN, record).unwrap().unwrap();
        assert_eq!(
            said(&found),
            [(Role::System, "Be brief."), (Role::User, "Why?\n\nA page."), (Role::Assistant, "7")]
        );
        assert_eq!((found.document.as_str(), found.record), ("12", 3));
        assert_eq!(&found.messages[found.cuts[0].message].content[found.cuts[0].bytes.clone()], "A page.");
        let record = json!({"q": "Why?", "page": {"text": null}, "a": "So.", "s": null, "id": null});
        let found = outcome(PLAIN, record).unwrap().unwrap();
        assert_eq!(said(&found), [(Role::User, "Why?"), (Role::Assistant, "So.")]);
        assert_eq!(found.document, "why?");
        let record = json!({"q": "Why?", "page": {"text": ""}, "a": " ", "s": "", "id": ""});
        assert_eq!(outcome(PLAIN, record).unwrap(), Err(Reason::EmptyResponse));
    }

    #[test]
    fn conversations_are_read_in_either_spelling() {
        for (role, content) in [("role", "content"), ("from", "value")] {
            let turn = |who: &str, what: &str| json!({role: who, content: what});
            let turns =
                [turn("human", "q 1"), turn("gpt", " a 1 "), turn("user", "q 2"), turn("assistant", "a 2")];
            let wanted = [
                (Role::User, "q 1"),
                (Role::Assistant, "a 1"),
                (Role::User, "q 2"),
                (Role::Assistant, "a 2"),
            ];
            let found = outcome("messages = \"m\"", json!({"m": turns})).unwrap().unwrap();
            assert_eq!(said(&found), wanted);
            let more = [&[turn("system", "s")], &turns[..], &[turn("user", "unanswered")]].concat();
            let found = outcome("messages = \"m\"", json!({"m": more})).unwrap().unwrap();
            assert_eq!(said(&found)[0], (Role::System, "s"));
            assert_eq!(said(&found)[1..], wanted);
            assert_eq!(found.asked(), "q 1\nq 2");
            let odd = |turns: &[Value]| outcome("messages = \"m\"", json!({"m": turns})).unwrap();
            assert_eq!(odd(&turns[1..]), Err(Reason::OddTurns));
            assert_eq!(odd(&[turn("tool", "x"), turn("gpt", "y")]), Err(Reason::OddTurns));
            assert_eq!(odd(&turns[..1]), Err(Reason::EmptyResponse));
            assert_eq!(odd(&[turn("user", ""), turn("gpt", "y")]), Err(Reason::EmptyQuestion));
        }
        let named = "messages = \"m\"\nrole = \"who\"\ncontent = \"what\"";
        let found = outcome(named, json!({"m": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}]}));
        assert_eq!(said(&found.unwrap().unwrap()), [(Role::User, "q"), (Role::Assistant, "a")]);
    }

    #[test]
    fn a_field_that_is_not_there_is_told_with_those_that_are() {
        let told = |fields, record| crate::error::render(&outcome(fields, record).unwrap_err());
        let text = told(PLAIN, json!({"question": "q", "answer": "a"}));
        assert!(text.contains("it has no field `q`; its fields are `question`, `answer`"), "{text}");
        assert!(text.contains("hint: mend `instruction` in `[fields]` of `my.toml`"), "{text}");
        let text = told("instruction = \"q\"\nresponse = \"a\"", json!({"q": "q", "a": ["x"]}));
        assert!(text.contains("`a` is a list, expected text"), "{text}");
        let text = told("messages = \"m\"", json!({"m": "text"}));
        assert!(text.contains("`m` is text, expected a list of turns"), "{text}");
        let text = told("messages = \"m\"", json!({"m": [{"role": "user", "text": "q"}]}));
        assert!(text.contains("no field `content`; its fields are `role`, `text`"), "{text}");
    }
}
