//! Axes: which range a chart shows, and what stands beside it.

/// A range of values with round bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Axis {
    low: f64,
    high: f64,
    scale: Scale,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    /// Labels stand so far apart.
    Linear { step: f64 },
    /// A label at each power of ten.
    Decades,
}

impl Axis {
    /// A linear axis over values; numbers only.
    pub fn over(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = range(values).unwrap_or((0.0, 1.0));
        if high - low <= 1e-9 * high.abs() {
            // One value, or next to it: it lies in the middle.
            let half = if high == 0.0 { 0.5 } else { high.abs() / 2.0 };
            (low, high) = (low - half, high + half);
        }
        let step = round_step((high - low) / 5.0);
        Self {
            low: (low / step).floor() * step,
            high: (high / step).ceil() * step,
            scale: Scale::Linear { step },
        }
    }

    /// A logarithmic axis of whole decades over values; those that are not above 0 are passed over.
    pub fn decades(values: impl Iterator<Item = f64>) -> Self {
        let logs = values.filter(|value| *value > 0.0).map(f64::log10).filter(|log| log.is_finite());
        let (low, high) = range(logs).unwrap_or((0.0, 1.0));
        let low = low.floor();
        Self { low, high: high.ceil().max(low + 1.0), scale: Scale::Decades }
    }

    /// The smallest and the largest value shown.
    pub fn bounds(&self) -> (f64, f64) {
        match self.scale {
            Scale::Linear { .. } => (self.low, self.high),
            Scale::Decades => (10f64.powf(self.low), 10f64.powf(self.high)),
        }
    }

    /// Where a value lies between the bounds, in `[0, 1]`.
    pub fn share(&self, value: f64) -> f64 {
        let value = match self.scale {
            Scale::Linear { .. } => value,
            Scale::Decades => value.log10(),
        };
        (value - self.low) / (self.high - self.low)
    }

    /// Values and how they are written, ascending.
    pub fn labels(&self) -> Vec<(f64, String)> {
        let step = if let Scale::Linear { step } = self.scale { step } else { 1.0 };
        let count = ((self.high - self.low) / step).round() as usize;
        let places = (0..=count).map(|index| self.low + index as f64 * step);
        match self.scale {
            Scale::Linear { step } => places.map(|value| (value, text(value, step))).collect(),
            Scale::Decades => places.map(|log| (10f64.powf(log), power_of_ten(log))).collect(),
        }
    }
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    (low <= high).then_some((low, high))
}

fn power_of_ten(log: f64) -> String {
    format!("{:.1$}", 10f64.powf(log), (-log).max(0.0) as usize)
}

/// As many digits as tell two labels apart.
fn text(value: f64, step: f64) -> String {
    let digits = -step.log10().floor();
    // What is left of a difference of equal numbers is no value.
    let value = if value.abs() < step / 2.0 { 0.0 } else { value };
    if digits > 3.0 && value != 0.0 {
        format!("{value:.1e}")
    } else {
        format!("{value:.0$}", digits.clamp(0.0, 3.0) as usize)
    }
}

/// The first of 1, 2, 5 times a power of ten that is no smaller.
fn round_step(step: f64) -> f64 {
    let decade = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0]
        .map(|factor| factor * decade)
        .into_iter()
        .find(|one| *one >= step)
        .unwrap_or(10.0 * decade)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: Axis) -> Vec<String> {
        axis.labels().into_iter().map(|label| label.1).collect()
    }

    #[test]
    fn labels_are_round() {
        assert_eq!(
            texts(Axis::over([0.13, 1.02].into_iter())),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1.2"]
        );
        assert_eq!(
            texts(Axis::over([0.0, 2e-4].into_iter())),
            ["0.000", "5.0e-5", "1.0e-4", "1.5e-4", "2.0e-4"]
        );
        assert_eq!(texts(Axis::decades([0.25, 800.0].into_iter())), ["0.1", "1", "10", "100", "1000"]);
    }

    #[test]
    fn odd_values_have_axes_too() {
        assert_eq!(Axis::over(std::iter::empty()).bounds(), (0.0, 1.0));
        assert_eq!(Axis::decades([0.0, -3.0, f64::NAN].into_iter()).bounds(), (1.0, 10.0));
        assert_eq!(Axis::decades([10.0].into_iter()).bounds(), (10.0, 100.0));
    }

    #[test]
    fn decades_are_as_wide_as_each_other() {
        let axis = Axis::decades([0.1, 1000.0].into_iter());
        assert!((axis.share(1.0) - 0.25).abs() < 1e-12 && (axis.share(100.0) - 0.75).abs() < 1e-12);
    }
}
