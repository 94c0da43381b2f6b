//! Sequences into rows: best-fit decreasing, then shuffled.
//!
//! The longest sequence goes first, each into the fullest row that still has room for it. Rows are kept by the
//! room they have left, so n sequences take O(n log n). Johnson (1974) bounds the rows by 11/9 of the optimum;
//! with many short sequences it comes within a row of it.

use std::collections::BTreeMap;

/// Indices of `lengths` by row, the rows in an order that `seed` shuffles.
///
/// A length above `capacity` has no place: it must have been dealt with before, and is left out.
pub fn pack(lengths: &[usize], capacity: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> =
        (0..lengths.len()).filter(|at| (1..=capacity).contains(&lengths[*at])).collect();
    // Stable: equal lengths keep their order, so the result is a function of the input alone.
    longest_first.sort_by_key(|at| std::cmp::Reverse(lengths[*at]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room they have left; those that are full are not here.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for at in longest_first {
        let length = lengths[at];
        let (row, room) = take_fullest(&mut open, length).unwrap_or_else(|| {
            rows.push(Vec::new());
            (rows.len() - 1, capacity)
        });
        rows[row].push(at);
        if room > length {
            open.entry(room - length).or_default().push(row);
        }
    }
    shuffle(&mut rows, seed);
    rows
}

/// Takes the row with the least room that is still enough, with its room.
fn take_fullest(open: &mut BTreeMap<usize, Vec<usize>>, length: usize) -> Option<(usize, usize)> {
    let (room, rows) = open.range_mut(length..).next()?;
    let room = *room;
    let row = rows.pop()?;
    if rows.is_empty() {
        open.remove(&room);
    }
    Some((row, room))
}

/// Fisher and Yates, drawn from SplitMix64.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed;
    for at in (1..items.len()).rev() {
        // The high half of the product is uniform up to 2⁻⁶⁴ of bias, far below what a shuffle can show.
        let draw = (u128::from(next(&mut state)) * (at as u128 + 1)) >> 64;
        items.swap(at, draw as usize);
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: usize, longest: u64, seed: u64) -> Vec<usize> {
        let mut state = seed;
        // Products of two draws lean towards short ones, as texts do.
        (0..count)
            .map(|_| 1 + (next(&mut state) % longest * (next(&mut state) % longest) / longest) as usize)
            .collect()
    }

    #[test]
    fn every_sequence_has_one_place_and_no_row_overflows() {
        for (count, longest) in [(0, 5), (1, 5), (7, 100), (5000, 100), (3000, 60)] {
            let lengths = lengths(count, longest, 3);
            let rows = pack(&lengths, 100, 1);
            let mut places: Vec<usize> = rows.iter().flatten().copied().collect();
            places.sort_unstable();
            assert_eq!(places, (0..count).collect::<Vec<_>>());
            assert!(rows.iter().all(|row| row.iter().map(|at| lengths[*at]).sum::<usize>() <= 100));
        }
    }

    #[test]
    fn many_short_sequences_fill_their_rows() {
        let lengths = lengths(20_000, 1024, 5);
        let rows = pack(&lengths, 2048, 1);
        let efficiency = lengths.iter().sum::<usize>() as f64 / (rows.len() * 2048) as f64;
        assert!(efficiency > 0.998, "{efficiency}");
    }

    #[test]
    fn the_same_seed_gives_the_same_rows_and_another_another_order() {
        let lengths = lengths(500, 100, 9);
        assert_eq!(pack(&lengths, 100, 1), pack(&lengths, 100, 1));
        let (mut one, mut other) = (pack(&lengths, 100, 1), pack(&lengths, 100, 2));
        assert_ne!(one, other);
        one.sort();
        other.sort();
        assert_eq!(one, other);
    }

    #[test]
    fn lengths_without_a_place_are_left_out() {
        assert_eq!(pack(&[101, 0, 100], 100, 1), [[2]]);
    }
}
