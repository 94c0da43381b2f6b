//! Learning rates of every step against transformers (`scripts/oracle/optimizers.py`).

use granite::recipe::{Schedule, TrainSpec};
use granite::train::schedule::LearningRate;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    schedule: Schedule,
    total: u64,
    warmup: f64,
    lr: f64,
    rates: Vec<f64>,
}

#[test]
fn every_rate_is_that_of_transformers() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../fixtures/schedules.json")).unwrap();
    assert!(cases.len() >= 21);
    for Case { schedule, total, warmup, lr, rates } in cases {
        let ours = LearningRate::new(&TrainSpec { lr, schedule, warmup, ..TrainSpec::default() }, total);
        assert_eq!(rates.len() as u64, total);
        for (step, rate) in rates.into_iter().enumerate() {
            let found = ours.at(step as u64);
            // Two operations in another order may round differently in the last places.
            assert!(
                (found - rate).abs() <= 4.0 * f64::EPSILON * lr,
                "{schedule:?}, {total} steps, warm-up {warmup}, step {step}: {found}, expected {rate}"
            );
        }
    }
}
