//! Prompts that fit a budget.

use granite::data::example::{Message, Role};
use granite::retrieval::prompt::{Prompt, Source, build};

const SOURCES: [Source<'_>; 2] =
    [Source { title: "Alpha", text: "first text" }, Source { title: "Beta", text: "second text" }];

fn within(characters: usize) -> impl FnMut(&[Message]) -> anyhow::Result<bool> {
    move |messages| Ok(messages.iter().map(|message| message.content.len()).sum::<usize>() <= characters)
}

fn user(prompt: &Prompt) -> &str {
    let last = prompt.messages.last().unwrap();
    assert_eq!(last.role, Role::User);
    &last.content
}

#[test]
fn documents_are_numbered_before_the_question() {
    let prompt = build("Why?", &SOURCES, within(usize::MAX)).unwrap().unwrap();
    assert_eq!(prompt.shown, 2);
    assert_eq!(prompt.messages.len(), 1);
    assert!(
        user(&prompt)
            .ends_with("Document 1: Alpha\nfirst text\n\nDocument 2: Beta\nsecond text\n\nQuestion: Why?")
    );
}

#[test]
fn without_documents_the_question_stands_alone() {
    let prompt = build("Why?", &[], within(4)).unwrap().unwrap();
    assert_eq!(prompt.messages, [Message::new(Role::User, "Why?")]);
    assert_eq!(build("Why?", &[], within(3)).unwrap(), None);
}

#[test]
fn the_last_documents_go_first() {
    let whole = build("Why?", &SOURCES, within(usize::MAX)).unwrap().unwrap();
    let one = build("Why?", &SOURCES, within(user(&whole).len() - 1)).unwrap().unwrap();
    assert_eq!(one.shown, 1);
    assert!(user(&one).contains("first text") && !user(&one).contains("Beta"));
}

#[test]
fn the_only_document_is_cut_short_on_a_character() {
    let text = "é".repeat(500);
    let source = [Source { title: "T", text: &text }];
    let bare =
        user(&build("Q", &[Source { title: "T", text: "" }], within(usize::MAX)).unwrap().unwrap()).len();
    for room in [100, 333, 999] {
        let prompt = build("Q", &source, within(bare + room)).unwrap().unwrap();
        let shown = user(&prompt).matches('é').count();
        assert_eq!(prompt.shown, 1);
        assert!(shown * 2 <= room && shown * 2 + 64 >= room, "{shown} characters in {room} bytes");
    }
    let none = build("Q", &source, within(bare)).unwrap().unwrap();
    assert_eq!((none.shown, user(&none)), (0, "Q"));
}

#[test]
fn an_error_of_the_budget_is_told() {
    assert!(build("Q", &SOURCES, |_| anyhow::bail!("no tokenizer")).is_err());
}
