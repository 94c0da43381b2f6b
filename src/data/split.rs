//! Which documents are held out.
//!
//! The split is a function of the document and the fraction alone: another seed, a grown dump or another
//! mixture never moves an example, and the examples of one document stay together.

use sha2::{Digest as _, Sha256};

use super::store::Split;

/// The split of a source's document.
pub fn split_of(source: &str, document: &str, validation_fraction: f64) -> Split {
    let mut hash = Sha256::new();
    hash.update(b"split");
    hash.update((source.len() as u64).to_le_bytes());
    hash.update(source);
    hash.update(document);
    let digest: [u8; 32] = hash.finalize().into();
    let mut leading = [0; 8];
    leading.copy_from_slice(&digest[..8]);
    // 53 bits make a double in [0, 1) exactly.
    let place = (u64::from_be_bytes(leading) >> 11) as f64 / (1_u64 << 53) as f64;
    if place < validation_fraction { Split::Validation } else { Split::Train }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn about_the_fraction_is_held_out_and_a_larger_one_holds_out_the_same_and_more() {
        let held_out = |fraction: f64| -> Vec<u32> {
            (0..20_000_u32)
                .filter(|at| split_of("s", &at.to_string(), fraction) == Split::Validation)
                .collect()
        };
        let (some, more) = (held_out(0.02), held_out(0.1));
        assert!((300..500).contains(&some.len()), "{}", some.len());
        assert!((1800..2200).contains(&more.len()), "{}", more.len());
        assert!(some.iter().all(|at| more.contains(at)));
        assert!(held_out(0.0).is_empty());
    }

    #[test]
    fn sources_are_split_independently() {
        let differs =
            (0..1000).any(|at| split_of("a", &at.to_string(), 0.5) != split_of("b", &at.to_string(), 0.5));
        assert!(differs);
    }
}
