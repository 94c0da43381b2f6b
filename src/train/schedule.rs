//! The learning rate of each step, as transformers' schedules with warm-up define it.

use crate::recipe::{Schedule, TrainSpec};

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    peak: f64,
    shape: Schedule,
    warmup: f64,
    total: f64,
}

impl LearningRate {
    /// The schedule of `spec` over `total` optimiser steps.
    pub fn new(spec: &TrainSpec, total: u64) -> Self {
        let total = total as f64;
        // Below one it is a share of all steps, rounded up as transformers does.
        let warmup = if spec.warmup < 1.0 { (spec.warmup * total).ceil() } else { spec.warmup };
        Self { peak: spec.lr, shape: spec.schedule, warmup, total }
    }

    /// Steps of warm-up.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup as u64
    }

    /// The learning rate of `step`, counted from 0: with warm-up the first step has rate zero.
    pub fn at(&self, step: u64) -> f64 {
        self.peak * self.factor(step as f64)
    }

    fn factor(&self, step: f64) -> f64 {
        if step < self.warmup {
            return step / self.warmup.max(1.0);
        }
        let rest = (self.total - self.warmup).max(1.0);
        let progress = (step - self.warmup) / rest;
        match self.shape {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::LearningRate;
    use crate::recipe::{Schedule, TrainSpec};

    fn rate(schedule: Schedule, warmup: f64) -> LearningRate {
        LearningRate::new(&TrainSpec { lr: 2.0, schedule, warmup, ..TrainSpec::default() }, 100)
    }

    #[test]
    fn warm_up_starts_at_zero_and_ends_at_the_peak() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let rate = rate(schedule, 10.0);
            assert_eq!(rate.at(0), 0.0);
            assert_eq!(rate.at(5), 1.0);
            assert_eq!(rate.at(10), 2.0);
        }
    }

    #[test]
    fn shapes_after_warm_up() {
        assert_eq!(rate(Schedule::Constant, 10.0).at(99), 2.0);
        assert!((rate(Schedule::Linear, 10.0).at(55) - 1.0).abs() < 1e-12);
        assert!((rate(Schedule::Cosine, 10.0).at(55) - 1.0).abs() < 1e-12);
        assert!(rate(Schedule::Cosine, 10.0).at(100) < 1e-12);
    }

    #[test]
    fn a_share_is_rounded_up_and_zero_means_none() {
        assert_eq!(rate(Schedule::Linear, 0.031).warmup_steps(), 4);
        assert_eq!(rate(Schedule::Linear, 0.0).at(0), 2.0);
    }
}
