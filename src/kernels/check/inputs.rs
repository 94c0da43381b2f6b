//! Inputs that a sum, an exponential or a rounding could get wrong.

use tch::{Device, Kind, Tensor};

/// Tokens at which bandwidth is measured: a micro-step of training.
pub(super) const TOKENS: i64 = 8192;

/// What a matrix of activations holds; bf16 and new at every call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Flavour {
    /// Of mean 0 and variance 1.
    Normal,
    /// As `Normal`, times 10⁴.
    Large,
    /// As `Normal`, times 10⁻⁴.
    Small,
    /// One value throughout.
    Constant,
    /// As `Normal`, with one element of each row, anywhere in it, a thousand times larger: a sum that forgets a column
    /// shows.
    Spiked,
    /// As `Normal`, with no number in one element of every second row.
    NoNumber,
}

impl Flavour {
    /// Each once.
    pub const ALL: [Self; 6] =
        [Self::Normal, Self::Large, Self::Small, Self::Constant, Self::Spiked, Self::NoNumber];

    /// `[rows, columns]` bf16.
    pub fn matrix(self, rows: i64, columns: i64, device: Device) -> Tensor {
        let options = (Kind::Float, device);
        let normal = || Tensor::randn([rows, columns], options);
        let values = match self {
            Self::Normal => normal(),
            Self::Large => normal() * 1e4,
            Self::Small => normal() * 1e-4,
            Self::Constant => Tensor::full([rows, columns], -1.7, options),
            Self::Spiked => {
                let spike = normal().slice(1, 0, 1, 1) * 1e3;
                normal().scatter(1, &anywhere(rows, columns, device), &spike)
            }
            Self::NoNumber => {
                let nan = Tensor::full([(rows + 1) / 2, 1], f64::NAN, options);
                let values = normal();
                let every_second = values.slice(0, 0, rows, 2);
                every_second.shallow_clone().copy_(&every_second.scatter(
                    1,
                    &anywhere((rows + 1) / 2, columns, device),
                    &nan,
                ));
                values
            }
        };
        values.to_kind(Kind::BFloat16)
    }
}

/// One column of each row, `[rows, 1]` i64.
fn anywhere(rows: i64, columns: i64, device: Device) -> Tensor {
    Tensor::randint(columns, [rows, 1], (Kind::Int64, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(mask: &Tensor) -> i64 {
        mask.sum(Kind::Int64).int64_value(&[])
    }

    #[test]
    fn inputs_are_what_they_are_called() {
        let matrix = |flavour: Flavour| flavour.matrix(5, 100, Device::Cpu);
        for flavour in Flavour::ALL {
            assert_eq!((matrix(flavour).size(), matrix(flavour).kind()), (vec![5, 100], Kind::BFloat16));
        }
        assert_eq!(count(&matrix(Flavour::NoNumber).isnan()), 3);
        assert!(matrix(Flavour::Large).abs().max().double_value(&[]) > 1e4);
        assert!(matrix(Flavour::Small).abs().max().double_value(&[]) < 1e-3);
        let spiked = matrix(Flavour::Spiked).abs();
        let share = spiked.max().double_value(&[]) / spiked.median().double_value(&[]);
        assert!(share > 100.0, "{share}");
    }
}
