//! Folders of documents, the good and the odd ones.

use granite::error::render;
use granite::retrieval::documents::{Document, load_folder};

use crate::folder;

fn error(files: &[(&str, &str)]) -> String {
    render(&load_folder(folder(files).path()).unwrap_err())
}

fn ids(documents: &[Document]) -> Vec<&str> {
    documents.iter().map(|document| document.id.as_str()).collect()
}

#[test]
fn text_files_tell_their_title_category_and_id() {
    let folder = folder(&[
        (
            "finance/npv.md",
            "\u{feff}intro\r\n```sh\r\n# not a title\r\n```\r\n## Net present value ##\r\nBody.\r\n",
        ),
        ("finance/deep/bond.TXT", "No heading here, #1 of its kind."),
        ("finance/.hidden.md", "# no"),
        ("image.png", "not text"),
        ("readme.txt", "#hashtag\n####### seven\n# Read me"),
    ]);
    let documents = load_folder(folder.path()).unwrap();
    assert_eq!(ids(&documents), ["finance/deep/bond.TXT", "finance/npv.md", "readme.txt"]);
    let tell = |at: usize| (documents[at].title.as_str(), documents[at].category.as_str());
    assert_eq!(tell(0), ("bond", "deep"));
    assert_eq!(tell(1), ("Net present value", "finance"));
    assert_eq!(tell(2).0, "Read me");
    assert_eq!(tell(2).1, folder.path().file_name().unwrap().to_str().unwrap());
    assert_eq!(documents[1].content, "intro\n```sh\n# not a title\n```\n## Net present value ##\nBody.\n");
}

#[test]
fn json_files_hold_one_document_or_many() {
    let folder = folder(&[
        (
            "a/one.json",
            r##"{"content": "# Heading\nText", "url": "u", "metadata": {"year": 2020, "url": "kept"}}"##,
        ),
        (
            "a/many.json",
            r#"[{"id": 7, "title": "T", "content": "x", "category": "c"}, {"content": "y", "title": null}]"#,
        ),
    ]);
    let documents = load_folder(folder.path()).unwrap();
    assert_eq!(ids(&documents), ["7", "a/many.json#2", "a/one.json"]);
    assert_eq!((documents[0].title.as_str(), documents[0].category.as_str()), ("T", "c"));
    assert_eq!((documents[1].title.as_str(), documents[1].category.as_str()), ("many", "a"));
    assert_eq!(documents[2].title, "Heading");
    assert_eq!(
        serde_json::to_value(&documents[2].metadata).unwrap(),
        serde_json::json!({"year": 2020, "url": "kept"})
    );
}

#[test]
fn documents_without_text_are_left_out() {
    let folder = folder(&[("a.txt", " \n"), ("b.txt", "b"), ("c.json", "[]")]);
    assert_eq!(ids(&load_folder(folder.path()).unwrap()), ["b.txt"]);
}

#[test]
fn errors_name_the_file_and_the_record() {
    let cases: [(&str, &str, &[&str]); 7] = [
        (
            "x.json",
            "[{\"content\": \"a\"}, 3]",
            &["x.json`, record 2: expected a JSON object, found a number"],
        ),
        (
            "x.json",
            "[{\"content\": \"a\"}, {\"title\": \"t\"}]",
            &["x.json`, record 2", "`content` is missing"],
        ),
        ("x.json", "{\"content\": [1]}", &["x.json`", "`content` is an array, expected a string"]),
        ("x.json", "{\"content\": \"a\", \"metadata\": []}", &["`metadata` is an array, expected an object"]),
        ("x.json", "{\"content\": \"a\", \"id\": \"\"}", &["`id` is an empty string"]),
        ("x.json", "{\"content\": \"a\"", &["x.json` is no JSON", "line 1"]),
        ("x.json", "", &["x.json` is no JSON"]),
    ];
    for (name, text, parts) in cases {
        let error = error(&[(name, text)]);
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in:\n{error}");
        }
    }
}

#[test]
fn two_documents_may_not_share_an_id() {
    let error = error(&[("a.json", r#"{"id": "b.txt", "content": "x"}"#), ("b.txt", "y")]);
    assert!(error.contains("two documents have the id `b.txt`") && error.contains("a.json"), "{error}");
}

#[test]
fn an_empty_or_absent_folder_is_an_error() {
    assert!(error(&[]).contains("no document in"));
    assert!(error(&[("a.png", "x")]).contains("hint: put `.txt`"));
    let error = render(&load_folder(std::path::Path::new("/no/such/folder")).unwrap_err());
    assert!(error.contains("cannot read the documents folder `/no/such/folder`"), "{error}");
}

#[test]
fn bytes_that_are_not_utf8_are_an_error() {
    let folder = folder(&[]);
    std::fs::write(folder.path().join("a.txt"), b"abc\xff").unwrap();
    let error = render(&load_folder(folder.path()).unwrap_err());
    assert!(error.contains("a.txt` is not UTF-8 at byte 3"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_linked_file_is_read_and_a_linked_folder_is_not() {
    let folder = folder(&[("data/a.txt", "a")]);
    std::os::unix::fs::symlink(folder.path().join("data/a.txt"), folder.path().join("b.txt")).unwrap();
    std::os::unix::fs::symlink(folder.path(), folder.path().join("data/loop")).unwrap();
    std::os::unix::fs::symlink("/no/such/file", folder.path().join("c.txt")).unwrap();
    assert_eq!(ids(&load_folder(folder.path()).unwrap()), ["b.txt", "data/a.txt"]);
}
