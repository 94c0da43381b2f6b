//! Generation with the cache is the uncached model, token by token and in chunks.

use granite::model::batch::Batch;
use granite::model::continuation::Continuation;
use granite::model::decoder::Decoder;
use granite::model::kv_cache::KvCache;
use granite::recipe::Quantization;
use tch::{Device, Kind, Tensor};

use super::fixture;
use super::oracle::whole_step;
use super::packing::sequence;
use super::tolerance::{assert_close, distance};
use super::twin::Twin;

fn cache(decoder: &Decoder, capacity: i64) -> KvCache {
    KvCache::new(decoder.config(), capacity, decoder.kind(), decoder.device()).unwrap()
}

#[test]
fn chunks_do_not_matter() {
    for fixture in fixture::all() {
        let decoder = fixture.adapted(Quantization::None, 0.0);
        let whole = sequence(29, 5, true);
        let batch = Batch::pack([&whole], Device::Cpu);
        let reference = Twin::new(&fixture, 0.0, Kind::Double).pass(&batch, &whole_step(&batch)).logits;
        let yardstick = distance(
            &Twin::new(&fixture, 0.0, Kind::Float).pass(&batch, &whole_step(&batch)).logits,
            &reference,
        );
        for chunks in [vec![29], vec![1; 29], vec![13, 1, 1, 7, 2, 5], vec![28, 1]] {
            let mut cache = cache(&decoder, 29);
            assert!(cache.is_empty());
            let mut end = 0;
            for chunk in &chunks {
                let logits = decoder.forward_cached(&whole.input_ids[end..end + chunk], &mut cache).unwrap();
                end += chunk;
                assert_eq!(cache.len(), end as i64);
                let what = format!("{} after {end} tokens in chunks of {chunks:?}", fixture.name);
                assert_close(&what, &logits, &reference.get(end as i64 - 1), yardstick);
            }
        }
    }
}

#[test]
fn greedy_generation_is_the_oracles() {
    for fixture in fixture::all() {
        let decoder = fixture.adapted(Quantization::None, 0.0);
        let ids = |name: &str| -> Vec<u32> {
            let list = fixture.notes["generation"][name].as_array().unwrap();
            list.iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let (prompt, expected) = (ids("prompt"), ids("tokens"));
        let mut cache = cache(&decoder, (prompt.len() + expected.len()) as i64);
        let mut logits = decoder.forward_cached(&prompt, &mut cache).unwrap();
        let mut tokens = Vec::new();
        while tokens.len() < expected.len() {
            let token = logits.argmax(0, false).int64_value(&[]) as u32;
            tokens.push(token);
            logits = decoder.forward_cached(&[token], &mut cache).unwrap();
        }
        assert_eq!(tokens, expected, "{}", fixture.name);
    }
}

#[test]
fn sequences_go_side_by_side_as_each_alone() {
    for fixture in fixture::all() {
        let decoder = fixture.adapted(Quantization::None, 0.0);
        let wholes: Vec<_> =
            [1, 29, 7, 2, 16, 30, 11].map(|length| sequence(length, length as u32, true)).into();
        let references: Vec<(Tensor, f64)> = wholes
            .iter()
            .map(|whole| {
                let batch = Batch::pack([whole], Device::Cpu);
                let logits = |kind| Twin::new(&fixture, 0.0, kind).pass(&batch, &whole_step(&batch)).logits;
                let reference = logits(Kind::Double);
                let yardstick = distance(&logits(Kind::Float), &reference);
                (reference, yardstick)
            })
            .collect();
        let mut caches: Vec<KvCache> = wholes.iter().map(|_| cache(&decoder, 30)).collect();
        // Of all together: that of a sequence of one token is a noisy sample.
        let yardstick = references.iter().map(|(_, yardstick)| *yardstick).fold(0.0, f64::max);
        // Each brings parts of another length, and those that are through leave.
        for step in 0.. {
            let mut here = Vec::new();
            let mut batch = Vec::new();
            for (at, (whole, cache)) in wholes.iter().zip(&mut caches).enumerate() {
                let left = &whole.input_ids[cache.len() as usize..];
                let part = &left[..left.len().min(1 + (at * 5 + step * 3) % 8)];
                if !part.is_empty() {
                    here.push((at, cache.len() as usize + part.len()));
                    batch.push(Continuation { input_ids: part, cache });
                }
            }
            if batch.is_empty() {
                break;
            }
            let logits = decoder.forward_cached_batch(&mut batch).unwrap();
            assert_eq!(logits.size(), [here.len() as i64, fixture.config.vocab_size]);
            for (row, (at, end)) in here.into_iter().enumerate() {
                let reference = &references[at].0;
                let what = format!("{}, sequence {at} after {end} tokens in step {step}", fixture.name);
                assert_close(&what, &logits.get(row as i64), &reference.get(end as i64 - 1), yardstick);
            }
        }
        assert!(caches.iter().zip(&wholes).all(|(cache, whole)| cache.len() == whole.input_ids.len() as i64));
    }
}

#[test]
fn a_batch_that_does_not_fit_changes_no_cache() {
    let decoder = fixture::all()[0].decoder(Quantization::None);
    let (mut fits, mut small) = (cache(&decoder, 8), cache(&decoder, 2));
    let both = [(&[1, 2, 3][..], &mut fits), (&[4, 5, 6][..], &mut small)];
    let mut batch = both.map(|(input_ids, cache)| Continuation { input_ids, cache });
    let error = decoder.forward_cached_batch(&mut batch).unwrap_err().to_string();
    assert!(error.contains("the cache holds 2 tokens, 3 are needed"), "{error}");
    assert!(decoder.forward_cached_batch(&mut []).is_err());
    assert!(fits.is_empty() && small.is_empty());
}

#[test]
fn sequences_have_caches_of_their_own() {
    let fixture = &fixture::all()[0];
    let decoder = fixture.decoder(Quantization::Nf4);
    let (one, other) = (sequence(6, 1, true).input_ids, sequence(8, 2, true).input_ids);
    let run = |ids: &[u32]| decoder.forward_cached(ids, &mut cache(&decoder, 16)).unwrap();
    let expected: [Tensor; 2] = [run(&one), run(&other)];
    let mut caches = [cache(&decoder, 16), cache(&decoder, 16)];
    let _ = decoder.forward_cached(&one[..5], &mut caches[0]).unwrap();
    let _ = decoder.forward_cached(&other[..7], &mut caches[1]).unwrap();
    let last = [
        decoder.forward_cached(&one[5..], &mut caches[0]).unwrap(),
        decoder.forward_cached(&other[7..], &mut caches[1]).unwrap(),
    ];
    for (last, expected) in last.iter().zip(&expected) {
        let token = |logits: &Tensor| logits.argmax(0, false).int64_value(&[]);
        assert_eq!(token(last), token(expected));
    }
}
