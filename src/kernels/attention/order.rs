//! In which order the backward pass takes its key tiles.
//!
//! Every key tile adds a part to the sums of dq of the queries after it, in f32: four times the bytes that are read for it.
//! Where these sums leave the L2 cache between two parts the pass is bound by memory: on an H100 one order of the same tiles
//! took 1.4 times as long as another (cuda/NOTES.md). So whole sequences of a key head run together, as many at a time as
//! fill the GPU: first the longer half of their tiles, then the shorter one, so that whoever had the longest tile first has
//! the shortest then.
//!
//! Parts of a block are added in the order of the list (cuda/include/attention.cuh), and a tile whose forerunner is behind it
//! waits. A tile begins with the block on its own diagonal. In the longer half, from the last tile to the first, each tile
//! is a step behind the one that it follows, for as long as both run; when the shorter half begins, in ascending order,
//! those that it follows are far ahead. So nobody waits who keeps pace.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::lists::{BLOCK, Span, Tile};

/// A sequence and one of its key heads.
#[derive(Debug, Clone, Copy)]
struct Pair<'a> {
    span: &'a Span,
    kv_head: i32,
}

impl Pair<'_> {
    /// Tiles of the longer half.
    fn half(self) -> i32 {
        (self.span.tiles() + 1) / 2
    }

    fn tile(self, number: i32, group: [i32; 2]) -> Tile {
        Tile { kv_head: self.kv_head, ..self.span.tile(number, group) }
    }
}

/// The list for the backward pass, for so many blocks of the kernel at a time.
pub(super) fn backward(spans: &[Span], kv_heads: i32, workers: usize) -> Vec<Tile> {
    let mut by_length: Vec<&Span> = spans.iter().collect();
    by_length.sort_by_key(|span| -span.length);
    let pairs: Vec<Pair<'_>> = by_length
        .into_iter()
        .flat_map(|span| (0..kv_heads).map(move |kv_head| Pair { span, kv_head }))
        .collect();
    let lists = LAST.map(|last| list(&pairs, workers, workers * last / 2));
    lists.into_iter().min_by_key(|tiles| busiest(tiles, workers)).unwrap_or_default()
}

/// Candidates: a last run of pairs that fills less than so many halves of the GPU joins the one before it. Which evens the
/// work out best depends on the lengths. Runs that fill more never join: what it costs in the cache is more.
const LAST: [usize; 2] = [0, 1];

fn list(pairs: &[Pair<'_>], workers: usize, last: usize) -> Vec<Tile> {
    let mut tiles = Vec::new();
    let mut rest = pairs;
    while !rest.is_empty() {
        let mut count = at_a_time(rest, workers);
        if rest[count..].iter().map(|pair| pair.half() as usize).sum::<usize>() < last {
            count = rest.len();
        }
        let (together, later) = rest.split_at(count);
        tiles.extend(longer_half(together));
        tiles.extend(shorter_half(together));
        rest = later;
    }
    tiles
}

/// Blocks of queries that the busiest of `workers` goes through, when nobody waits.
fn busiest(tiles: &[Tile], workers: usize) -> i32 {
    let mut busy: BinaryHeap<Reverse<i32>> = (0..workers.max(1)).map(|_| Reverse(0)).collect();
    let mut most = 0;
    for tile in tiles {
        if let Some(mut least) = busy.peek_mut() {
            least.0 += (tile.length - tile.row - 1) / BLOCK as i32 + 1;
            most = most.max(least.0);
        }
    }
    most
}

/// How many of the first pairs fill `workers` with the longer half of their tiles, at least one.
fn at_a_time(pairs: &[Pair<'_>], workers: usize) -> usize {
    let sums = pairs.iter().scan(0, |sum, pair| {
        *sum += pair.half() as usize;
        Some(*sum)
    });
    sums.take_while(|sum| *sum <= workers).count().max(1)
}

/// As one group of each pair, from its last tile to its first.
fn longer_half(pairs: &[Pair<'_>]) -> impl Iterator<Item = Tile> {
    in_turn(pairs, |pair| {
        let half = pair.half();
        (0..half).rev().map(|number| pair.tile(number, [0, half - 1])).collect()
    })
}

/// Each tile as a group of its own, in ascending order.
fn shorter_half(pairs: &[Pair<'_>]) -> impl Iterator<Item = Tile> {
    in_turn(pairs, |pair| {
        (pair.half()..pair.span.tiles()).map(|number| pair.tile(number, [number; 2])).collect()
    })
}

/// The first tiles of all pairs, then the second ones, and so on: what waits for each other starts together.
fn in_turn(pairs: &[Pair<'_>], tiles: impl Fn(Pair<'_>) -> Vec<Tile>) -> impl Iterator<Item = Tile> {
    let mut numbered: Vec<(usize, Tile)> =
        pairs.iter().flat_map(|pair| tiles(*pair).into_iter().enumerate()).collect();
    numbered.sort_by_key(|(number, _)| *number);
    numbered.into_iter().map(|(_, tile)| tile)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(lengths: &[i32]) -> Vec<Span> {
        let (mut start, mut spans) = (0, Vec::new());
        for (index, length) in lengths.iter().enumerate() {
            spans.push(Span { start, length: *length, first_block: start / 64 + index as i32 });
            start += length;
        }
        spans
    }

    fn order(lengths: &[i32], kv_heads: i32, workers: usize) -> Vec<(i32, i32, i32)> {
        let tiles = backward(&spans(lengths), kv_heads, workers);
        tiles.iter().map(|tile| (tile.start, tile.kv_head, tile.row / 128)).collect()
    }

    #[test]
    fn the_longer_half_goes_back_and_the_shorter_one_on() {
        let expected =
            [(0, 0, 1), (0, 1, 1), (0, 0, 0), (0, 1, 0), (0, 0, 2), (0, 1, 2), (0, 0, 3), (0, 1, 3)];
        assert_eq!(order(&[512], 2, 4), expected);
    }

    #[test]
    fn as_many_run_together_as_fill_the_gpu() {
        // Two tiles in the longer half of each pair: with three workers one pair at a time.
        let expected = [(0, 0, 1), (0, 0, 0), (0, 0, 2), (0, 1, 1), (0, 1, 0), (0, 1, 2)];
        assert_eq!(order(&[300], 2, 3), expected);
        assert_eq!(order(&[300], 2, 1), expected);
    }

    #[test]
    fn the_longest_sequences_come_first() {
        let starts: Vec<i32> = order(&[100, 1000, 300], 1, 1).iter().map(|tile| tile.0).collect();
        assert_eq!(starts, [[100; 8].as_slice(), [1100; 3].as_slice(), [0].as_slice()].concat());
    }

    #[test]
    fn work_is_spread_evenly_at_the_sizes_of_training() {
        for lengths in [vec![2048; 4], vec![4096; 2], vec![8192], vec![1024; 8]] {
            let tiles = backward(&spans(&lengths), 8, 132);
            let all: i32 = tiles.iter().map(|tile| (tile.length - tile.row + 63) / 64).sum();
            let imbalance = f64::from(busiest(&tiles, 132)) * 132.0 / f64::from(all);
            assert!(imbalance < 1.1, "{lengths:?}: {imbalance}");
        }
    }
}
