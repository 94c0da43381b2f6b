//! Projections that share an input, and so one product: query, key and value; gate and up.
//!
//! The weights of a group stand below each other, and the adapters beside and under them:
//!
//! ```text
//!             in         ranks
//!  outputs [  W_1    |  B_1      ]        forward   Y  = [X | s·X·Aᵀ] · upper rowsᵀ
//!          [  W_2    |      B_2  ]        backward  dX = [dY | s·dY·B] · left columns
//!  ranks   [  A_1                ]
//!          [  A_2                ]
//! ```
//!
//! The adapter's part is thus rounded together with the base's, not after it. A rank that is no multiple of 8 is filled
//! up with zeros, for cuBLAS wants rows that begin at 16 bytes.

use crate::model::config::ModelConfig;
use crate::recipe::{LoraSpec, Projection};

/// Which projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupName {
    /// Query, key and value.
    Qkv,
    /// Output of attention.
    O,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
}

impl GroupName {
    /// In the order of the forward pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// The projections, in the order of their rows.
    pub fn members(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::QProj, Projection::KProj, Projection::VProj],
            Self::O => &[Projection::OProj],
            Self::GateUp => &[Projection::GateProj, Projection::UpProj],
            Self::Down => &[Projection::DownProj],
        }
    }
}

/// The sizes of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Which.
    pub name: GroupName,
    /// Width of the input.
    pub input: i64,
    /// The members.
    pub members: Vec<Member>,
}

/// One projection's place in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub projection: Projection,
    /// Rows before it.
    pub row: i64,
    /// Its rows: the width of its output.
    pub rows: i64,
    /// Adapter columns before its own.
    pub column: i64,
    /// Rank of its adapter; 0 without one.
    pub rank: i64,
}

impl Member {
    /// Its adapter columns, filled up.
    pub fn columns(&self) -> i64 {
        padded(self.rank)
    }
}

impl Group {
    /// The group of a model whose projections have adapters as `lora` says.
    pub fn new(name: GroupName, config: &ModelConfig, lora: &LoraSpec) -> Self {
        let (mut row, mut column, mut input) = (0, 0, 0);
        let members = name
            .members()
            .iter()
            .map(|projection| {
                let [rows, columns] = config.projection_shape(*projection);
                let rank = if lora.targets.contains(projection) { lora.rank as i64 } else { 0 };
                let member = Member { projection: *projection, row, rows, column, rank };
                (row, column, input) = (row + rows, column + padded(rank), columns);
                member
            })
            .collect();
        Self { name, input, members }
    }

    /// Width of all outputs together.
    pub fn output(&self) -> i64 {
        self.members.iter().map(|member| member.rows).sum()
    }

    /// Adapter columns of all members together, filled up.
    pub fn ranks(&self) -> i64 {
        self.members.iter().map(|member| padded(member.rank)).sum()
    }

    /// Whether adapter columns are filled up with zeros.
    pub fn is_padded(&self) -> bool {
        self.members.iter().any(|member| member.rank != padded(member.rank))
    }
}

/// The next multiple of 8.
fn padded(rank: i64) -> i64 {
    rank.div_euclid(8) * 8 + if rank % 8 == 0 { 0 } else { 8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_filled_up() {
        assert_eq!([0, 1, 8, 12, 64].map(padded), [0, 8, 8, 16, 64]);
    }
}
