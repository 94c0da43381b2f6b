//! Rotary embedding of the leading heads of packed rows.

use anyhow::{Context as _, Result};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::inputs::{Flavour, TOKENS};
use super::tolerance::{Framed, Layout, Reference};
use super::{Checks, Outcome};
use crate::kernels::rope::{RotaryAngles, RotaryTable, rotate_in_place};

pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("rope", rope);
}

const THETA: f64 = 10_000.0;

/// Tokens, heads, elements of a head.
const SHAPES: [[i64; 3]; 10] = [
    [1, 1, 64],
    [3, 12, 64],
    [127, 40, 64],
    [1000, 40, 128],
    [3, 49, 128],
    [5, 97, 128],
    [127, 65, 64],
    [127, 5, 80],
    [3, 7, 2],
    [3, 3, 30],
];

fn rope(device: Device) -> Result<Outcome> {
    let mut cases = 0;
    for [tokens, heads, head_dim] in SHAPES {
        let dense = Layout::dense(tokens, heads * head_dim);
        let packed = dense.strided(dense.columns + 8 * head_dim).at(8);
        for layout in [dense, packed, dense.at(1), dense.strided(dense.columns + 3)] {
            for flavour in [Flavour::Normal, Flavour::Large, Flavour::Constant, Flavour::NoNumber] {
                for backward in [false, true] {
                    case(device, layout, [heads, head_dim], flavour, backward).with_context(|| {
                        format!("{layout:?}, heads of {head_dim}, {flavour:?}, backward: {backward}")
                    })?;
                    cases += 1;
                }
            }
        }
    }
    Ok(Outcome::near(cases).timed(move || rate(device)))
}

fn case(device: Device, layout: Layout, heads: [i64; 2], flavour: Flavour, backward: bool) -> Result<()> {
    let [heads, head_dim] = heads;
    let tokens = layout.rows;
    let by_head = |x: &Tensor| x.view([tokens, heads, head_dim]);
    let values = flavour.matrix(tokens, heads * head_dim, device);
    let positions = Tensor::randint(8192, [tokens], (Kind::Int64, device));
    let table = RotaryTable::new(&positions, head_dim, THETA)?;
    let x = Framed::input(&values, layout)?;
    rotate_in_place(&by_head(&x.view()), &table, backward)?;
    x.intact("x")?;

    let x = by_head(&x.view());
    let (value, terms) = exact(&by_head(&values), &table, backward);
    // With angles in f32, as the kernel has them.
    let angles = RotaryAngles::new(&positions, head_dim, THETA, Kind::Float);
    let wide = by_head(&values).to_kind(Kind::Float);
    let twin = if backward { angles.rotate_backward(&wide) } else { angles.rotate(&wide) };
    Reference { value: &value, twin: &twin, terms: Some(&terms), halves: 1.0 }.judge("x", &x)
}

/// The rotation by the table's angles in f64, and the magnitudes that make up each element.
fn exact(x: &Tensor, table: &RotaryTable, backward: bool) -> (Tensor, Tensor) {
    let wide = |x: &Tensor| x.to_kind(Kind::Double);
    let halves = wide(x).chunk(2, -1);
    let (a, b) = (&halves[0], &halves[1]); // [tokens, heads, half]
    let (cos, sin) = (wide(&table.cos).unsqueeze(1), wide(&table.sin).unsqueeze(1));
    let sin = if backward { -sin } else { sin };
    let [ac, bs, bc, as_] = [a * &cos, b * &sin, b * &cos, a * &sin];
    let value = Tensor::cat(&[&ac - &bs, &bc + &as_], -1);
    let terms = Tensor::cat(&[ac.abs() + bs.abs(), bc.abs() + as_.abs()], -1);
    (value, terms)
}

/// The query and key heads of Granite-3.1-8B's packed rows: 40 of 48.
pub(super) fn rate(device: Device) -> Result<f64> {
    let (turned, all, head_dim) = (40, 48, 128);
    let table =
        RotaryTable::new(&Tensor::f_arange(TOKENS, (Kind::Int64, device))?.remainder(2048), head_dim, THETA)?;
    let rows = || Flavour::Normal.matrix(TOKENS, all * head_dim, device).view([TOKENS, all, head_dim]);
    let sets: Vec<Tensor> = (0..3).map(|_| rows().narrow(1, 0, turned)).collect();
    // Read and written in bf16, and cosine and sine in f32.
    let bytes = TOKENS * turned * head_dim * 4 + TOKENS * head_dim * 4;
    bandwidth(device, bytes, sets.len(), |set| rotate_in_place(&sets[set], &table, false))
}
