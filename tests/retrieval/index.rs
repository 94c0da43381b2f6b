//! The index: exact, folded to documents, cached by content.

use std::fs;

use granite::retrieval::documents::Document;
use granite::retrieval::encoder::Encoder;
use granite::retrieval::index::{Index, Passage, Work};
use tch::Device;

use crate::{fixture, folder};

fn document(id: &str, content: &str) -> Document {
    Document {
        id: id.to_string(),
        title: format!("Title of {id}"),
        content: content.to_string(),
        category: String::new(),
        metadata: serde_json::Map::new(),
    }
}

fn encoder() -> Encoder {
    Encoder::open(&fixture("encoder-tiny"), Device::Cpu).unwrap()
}

fn documents() -> Vec<Document> {
    let long = "Net present value is the sum of cash flow over the rate. ".repeat(12);
    vec![
        document("a", "What is a bond price?"),
        document("b", &long),
        document("c", "select count from list"),
    ]
}

#[test]
fn hits_are_folded_to_documents_and_ties_keep_their_order() {
    let passage = |document| Passage { document, range: 0..1 };
    let documents = ["a", "b", "c"].map(|id| document(id, "text")).to_vec();
    let passages = vec![passage(0), passage(1), passage(1), passage(1), passage(2)];
    let vectors = vec![0.6, 0.8, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.6, 0.8];
    let index = Index::new(documents, passages, vectors, 2).unwrap();
    let tell = |query: &[f32], k| -> Vec<(usize, usize, f32)> {
        let hits = index.search(query, k).unwrap();
        hits.iter().map(|hit| (hit.document, hit.passage, hit.score)).collect()
    };
    assert_eq!(tell(&[1.0, 0.0], 9), [(1, 2, 1.0), (0, 0, 0.6), (2, 4, 0.6)]);
    assert_eq!(tell(&[0.0, 1.0], 2), [(1, 1, 1.0), (0, 0, 0.8)]);
    assert_eq!(tell(&[0.0, 1.0], 0), []);
    assert!(index.search(&[1.0], 1).is_err());
}

#[test]
fn sizes_that_do_not_agree_are_refused() {
    let passage = Passage { document: 0, range: 0..9 };
    assert!(Index::new(vec![document("a", "text")], vec![passage.clone()], vec![1.0, 0.0], 2).is_err());
    assert!(Index::new(vec![], vec![passage], vec![1.0, 0.0], 2).is_err());
    assert!(Index::new(vec![], vec![], vec![1.0], 2).is_err());
}

#[test]
fn the_scan_is_the_plain_inner_product() {
    let dim = 19; // no multiple of the lanes
    let value = |at: usize| ((at * 2654435761) % 1000) as f32 / 1000.0 - 0.5;
    let vectors: Vec<f32> = (0..500 * dim).map(value).collect();
    let passages = (0..500).map(|document| Passage { document, range: 0..1 }).collect();
    let documents = (0..500).map(|at| document(&at.to_string(), "x")).collect();
    let query: Vec<f32> = (0..dim).map(|at| value(at * 7 + 3)).collect();
    let score =
        |row: &[f32]| -> f64 { row.iter().zip(&query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let mut expected: Vec<(usize, f64)> = vectors.chunks_exact(dim).map(score).enumerate().collect();
    expected.sort_by(|a, b| b.1.total_cmp(&a.1));
    let hits = Index::new(documents, passages, vectors.clone(), dim).unwrap().search(&query, 20).unwrap();
    assert_eq!(hits.len(), 20);
    for (hit, (document, score)) in hits.iter().zip(expected) {
        assert!((f64::from(hit.score) - score).abs() < 1e-6);
        assert_eq!(hit.document, document);
    }
}

#[test]
fn every_passage_is_read_whole_by_the_encoder() {
    let encoder = encoder();
    let odd = format!(
        "{} {} 純利益は前年比で増加した。{}",
        "x".repeat(300),
        "value ".repeat(100),
        "a.b,c;d ".repeat(60)
    );
    let (index, work) = Index::build(vec![document("odd", &odd)], &encoder, None).unwrap();
    assert_eq!(work, Work { encoded: 1, reused: 0 });
    assert!(index.passages().len() > 5);
    for passage in index.passages() {
        let text = &odd[passage.range.clone()];
        let tokens = encoder.token_spans(text).unwrap().len();
        assert!(tokens <= encoder.max_tokens(), "{tokens} tokens in {text:?}");
    }
}

#[test]
fn a_passage_finds_its_own_document() {
    let encoder = encoder();
    let (index, _) = Index::build(documents(), &encoder, None).unwrap();
    for document in 0..index.documents().len() {
        let title = &index.documents()[document].title;
        let passage = index.passages().iter().find(|passage| passage.document == document).unwrap();
        let text = format!("{title}\n{}", &index.documents()[document].content[passage.range.clone()]);
        let hits = index.search(&encoder.encode(&[&text], |_| ()).unwrap(), 1).unwrap();
        assert_eq!(hits[0].document, document);
        assert!(hits[0].score > 0.9999);
        assert!(text.ends_with(index.text(&hits[0])));
    }
}

#[test]
fn only_what_changed_is_encoded_again() {
    let (encoder, cache) = (encoder(), folder(&[]));
    let cache = cache.path().join("index");
    let build = |documents| Index::build(documents, &encoder, Some(&cache)).unwrap();
    let (first, work) = build(documents());
    assert_eq!(work, Work { encoded: 3, reused: 0 });
    let written = fs::metadata(cache.join("vectors.safetensors")).unwrap().modified().unwrap();

    let (again, work) = build(documents());
    assert_eq!((work, &again), (Work { encoded: 0, reused: 3 }, &first));
    assert_eq!(fs::metadata(cache.join("vectors.safetensors")).unwrap().modified().unwrap(), written);

    let mut moved = documents();
    moved.reverse();
    moved[1].id = "renamed".to_string();
    moved[0].content.push_str(" order by");
    let (index, work) = build(moved.clone());
    assert_eq!(work, Work { encoded: 1, reused: 2 });
    let anew = Index::build(moved, &encoder, None).unwrap().0;
    assert_eq!((index.documents(), index.passages()), (anew.documents(), anew.passages()));
    let query = encoder.encode(&["cash flow"], |_| ()).unwrap();
    for (a, b) in index.search(&query, 9).unwrap().iter().zip(anew.search(&query, 9).unwrap()) {
        // Batches of another make-up round the last bit differently.
        assert!(a.document == b.document && (a.score - b.score).abs() < 1e-5);
    }

    let (_, work) = build(documents()[..1].to_vec());
    assert_eq!(work, Work { encoded: 0, reused: 1 });
    let (_, work) = build(documents());
    assert_eq!(work, Work { encoded: 2, reused: 1 });
}

#[test]
fn a_damaged_or_foreign_cache_is_made_anew() {
    let (encoder, cache) = (encoder(), folder(&[]));
    let cache = cache.path().join("index");
    let (expected, _) = Index::build(documents(), &encoder, Some(&cache)).unwrap();
    let table = cache.join("index.json");
    let vectors = cache.join("vectors.safetensors");
    let damage: [&dyn Fn(); 6] = [
        &|| fs::write(&table, "{").unwrap(),
        &|| {
            fs::write(&table, fs::read_to_string(&table).unwrap().replace("\"format\":1", "\"format\":0"))
                .unwrap()
        },
        &|| {
            fs::write(&table, fs::read_to_string(&table).unwrap().replace(encoder.identity(), "other"))
                .unwrap()
        },
        &|| fs::write(&table, fs::read_to_string(&table).unwrap().replace("\"end\":", "\"end\":9")).unwrap(),
        &|| {
            let mut bytes = fs::read(&vectors).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&vectors, bytes).unwrap();
        },
        &|| fs::remove_file(&vectors).unwrap(),
    ];
    for (at, damage) in damage.iter().enumerate() {
        damage();
        let (index, work) = Index::build(documents(), &encoder, Some(&cache)).unwrap();
        assert_eq!((work, &index), (Work { encoded: 3, reused: 0 }, &expected), "damage {at}");
        let (_, work) = Index::build(documents(), &encoder, Some(&cache)).unwrap();
        assert_eq!(work.reused, 3, "damage {at} is not mended");
    }
}

#[test]
fn the_real_encoder_finds_the_right_document() {
    let Ok(model) = std::env::var("GRANITE_MINILM") else {
        eprintln!("skipped: GRANITE_MINILM does not name the folder of all-MiniLM-L6-v2");
        return;
    };
    let encoder = Encoder::open(std::path::Path::new(&model), Device::Cpu).unwrap();
    let documents = vec![
        document("npv", "Net present value discounts each cash flow to today and subtracts what was paid."),
        document(
            "join",
            "A LEFT JOIN keeps every row of the first table, with NULL where the second has none.",
        ),
        document(
            "list",
            "A list comprehension builds a Python list from an expression and a loop in one line.",
        ),
    ];
    let (index, _) = Index::build(documents, &encoder, None).unwrap();
    let questions = [
        ("How do I value money that arrives in three years?", 0),
        ("rows without a match disappear in SQL", 1),
        ("shorter loop in python", 2),
    ];
    for (question, document) in questions {
        let hits = index.search(&encoder.encode(&[question], |_| ()).unwrap(), 3).unwrap();
        assert_eq!(hits[0].document, document, "{question}: {hits:?}");
    }
}
