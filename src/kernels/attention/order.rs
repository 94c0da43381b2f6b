//! In which order the backward pass takes its key tiles, so that adding up the queries' gradient in a fixed order costs little.
//!
//! Parts of a block of dq are added in the order of the list (cuda/include/attention.cuh). A tile whose forerunner is behind
//! it waits, and idles. Within a group the last tile goes first, so tiles of a group that start together never wait; groups
//! come one after the other, so that the longest tiles are not left for the end. The first groups of all sequences hold the
//! longest tiles, some multiple of what runs at a time; the groups after them are small. Which multiple and how small depends
//! on the batch, so each candidate is played through on a model of the GPU, where a worker takes a block at every tick, and
//! the list that ends first is taken. In a simulation block by block the order so found costs 1–2 % over lists without
//! any, where one size of group for all costs 10–25 %.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::lists::{Span, Tile};

/// Candidates: how many of the longest tiles are in first groups, over the tiles that run at a time.
const FIRST: [f64; 14] = [0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0, 6.0, 1e9];

/// Candidates: tiles of the groups after the first.
const LATER: [i32; 3] = [1, 2, 4];

/// Ticks of a block of queries, and of the start of a tile.
const BLOCK_TICKS: i64 = 2;
const START_TICKS: i64 = 1;

/// How a sequence's key tiles are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Grouping {
    first: i32,
    later: i32,
}

/// Key tiles `first..=last` of a sequence.
#[derive(Debug, Clone, Copy)]
struct Group {
    span: usize,
    first: i32,
    last: i32,
    /// Query blocks that its longest tile visits.
    cost: i32,
}

/// A tile of a list: its sequence and group.
#[derive(Debug, Clone, Copy)]
struct Entry {
    group: Group,
    number: i32,
}

/// The list for the backward pass.
pub(super) fn backward(spans: &[Span], kv_heads: usize, workers: usize) -> Vec<Tile> {
    let (_, entries) = best(spans, kv_heads, workers);
    let tile =
        |entry: &Entry| spans[entry.group.span].tile(entry.number, [entry.group.first, entry.group.last]);
    entries.iter().map(tile).collect()
}

/// The list that ends first, the first of those where several do, and its ticks.
fn best(spans: &[Span], kv_heads: usize, workers: usize) -> (i64, Vec<Entry>) {
    let by_cost = spans_by_tile_cost(spans);
    let at_a_time = workers as f64 / kv_heads.max(1) as f64;
    let mut tried: Vec<Vec<Grouping>> = Vec::new();
    let mut best: Option<(i64, Vec<Entry>)> = None;
    for share in FIRST {
        let longest = ((at_a_time * share) as usize).min(by_cost.len());
        for later in LATER {
            let groupings = groupings(spans.len(), &by_cost[..longest], later);
            if tried.contains(&groupings) {
                continue;
            }
            let entries = list(spans, &groupings);
            let ticks = play(spans, &entries, kv_heads, workers);
            if best.as_ref().is_none_or(|(least, _)| ticks < *least) {
                best = Some((ticks, entries));
            }
            tried.push(groupings);
        }
    }
    best.unwrap_or_default()
}

/// For each tile, the costliest first, the sequence that it belongs to.
fn spans_by_tile_cost(spans: &[Span]) -> Vec<usize> {
    let costs = |(index, span): (usize, &Span)| {
        let span = *span;
        (0..span.tiles()).map(move |number| (Reverse(span.blocks() - 2 * number), index))
    };
    let mut tiles: Vec<(Reverse<i32>, usize)> = spans.iter().enumerate().flat_map(costs).collect();
    tiles.sort_unstable();
    tiles.into_iter().map(|(_, index)| index).collect()
}

/// First groups hold the tiles of which `longest` names the sequences.
fn groupings(spans: usize, longest: &[usize], later: i32) -> Vec<Grouping> {
    let mut groupings = vec![Grouping { first: 0, later }; spans];
    for index in longest {
        groupings[*index].first += 1;
    }
    for grouping in &mut groupings {
        grouping.first = grouping.first.max(1);
    }
    groupings
}

/// Groups by descending cost of their longest tile, each from its last tile to its first. Of groups that cost the same, one
/// tile each in turn, so that what waits for each other runs together.
fn list(spans: &[Span], groupings: &[Grouping]) -> Vec<Entry> {
    let mut groups: Vec<Group> = spans
        .iter()
        .zip(groupings)
        .enumerate()
        .flat_map(|(index, (span, grouping))| groups_of(index, *span, *grouping))
        .collect();
    groups.sort_by_key(|group| -group.cost);
    let mut entries = Vec::new();
    for equals in groups.chunk_by(|a, b| a.cost == b.cost) {
        let longest = equals.iter().map(|group| group.last - group.first).max().unwrap_or(0);
        for back in 0..=longest {
            let there = equals.iter().filter(|group| group.last - back >= group.first);
            entries.extend(there.map(|group| Entry { group: *group, number: group.last - back }));
        }
    }
    entries
}

fn groups_of(index: usize, span: Span, grouping: Grouping) -> Vec<Group> {
    let (tiles, blocks) = (span.tiles(), span.blocks());
    let (mut groups, mut first, mut size) = (Vec::new(), 0, grouping.first);
    while first < tiles {
        let last = first.saturating_add(size).min(tiles) - 1;
        groups.push(Group { span: index, first, last, cost: blocks - 2 * first });
        (first, size) = (last + 1, grouping.later);
    }
    groups
}

/// Ticks until the last tile is done, when `workers` take tiles of the list in turn, each for every head.
///
/// Once it runs a tile takes a block at a time, as its forerunners do, so it is enough to hold back its start: until it
/// stays behind the tile after it in its group, and at its first block behind the group before.
fn play(spans: &[Span], entries: &[Entry], kv_heads: usize, workers: usize) -> i64 {
    let mut free: BinaryHeap<Reverse<i64>> = (0..workers.max(1)).map(|_| Reverse(0)).collect();
    let mut offsets = vec![0];
    for span in spans {
        offsets.push(offsets.last().copied().unwrap_or(0) + span.tiles() as usize);
    }
    let at = |span: usize, number: i32, head: usize| (offsets[span] + number as usize) * kv_heads + head;
    let mut began = vec![0i64; offsets.last().copied().unwrap_or(0) * kv_heads];
    // The first tile of the group before, by a group's own first tile.
    let mut before = vec![0; offsets.last().copied().unwrap_or(0) + 1];
    for entry in entries {
        before[offsets[entry.group.span] + entry.group.last as usize + 1] = entry.group.first;
    }
    let mut end = 0;
    for Entry { group, number } in entries {
        for head in 0..kv_heads {
            let mut start = free.pop().map_or(0, |Reverse(ticks)| ticks) + START_TICKS;
            if group.first > 0 {
                let other = before[offsets[group.span] + group.first as usize];
                let blocks = i64::from(2 * (number - other) + 1);
                start = start.max(began[at(group.span, other, head)] + blocks * BLOCK_TICKS);
            }
            if *number < group.last {
                start = start.max(began[at(group.span, number + 1, head)] - BLOCK_TICKS);
            }
            began[at(group.span, *number, head)] = start;
            let done = start + i64::from(spans[group.span].blocks() - 2 * number) * BLOCK_TICKS;
            end = end.max(done);
            free.push(Reverse(done));
        }
    }
    end
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

    /// Ticks over those of workers that are never idle.
    fn price(lengths: &[i32], kv_heads: usize, workers: usize) -> f64 {
        let spans = spans(lengths);
        let (ticks, entries) = best(&spans, kv_heads, workers);
        let work = |entry: &Entry| {
            i64::from(spans[entry.group.span].blocks() - 2 * entry.number) * BLOCK_TICKS + START_TICKS
        };
        let work = entries.iter().map(work).sum::<i64>() * kv_heads as i64;
        ticks as f64 * workers as f64 / work as f64
    }

    #[test]
    fn a_group_goes_from_its_last_tile_to_its_first() {
        let spans = spans(&[640, 640]);
        let entries = list(&spans, &[Grouping { first: 3, later: 1 }; 2]);
        let order: Vec<(usize, i32)> = entries.iter().map(|one| (one.group.span, one.number)).collect();
        assert_eq!(order, [(0, 2), (1, 2), (0, 1), (1, 1), (0, 0), (1, 0), (0, 3), (1, 3), (0, 4), (1, 4)]);
    }

    #[test]
    fn one_tile_after_the_other_has_the_ticks_of_all() {
        let spans = spans(&[300]);
        let (ticks, entries) = best(&spans, 1, 1);
        assert_eq!(entries.len(), 3);
        assert_eq!(ticks, (5 + 3 + 1) * BLOCK_TICKS + 3 * START_TICKS);
        assert_eq!(best(&[], 8, 132).0, 0);
    }

    /// A tile that begins with one that it must follow is held back.
    #[test]
    fn waiting_costs_ticks() {
        let spans = spans(&[512]);
        let alone = |first| play(&spans, &list(&spans, &[Grouping { first, later: 1 }]), 1, 4);
        assert_eq!(alone(4), START_TICKS + 8 * BLOCK_TICKS);
        assert!(alone(1) > alone(4));
    }

    #[test]
    fn the_order_costs_little_at_the_sizes_of_training() {
        for (lengths, most) in [
            (vec![2048; 4], 1.06),
            (vec![4096; 2], 1.07),
            (vec![8192], 1.07),
            (vec![16_384], 1.03),
            (vec![1024; 8], 1.07),
            (vec![4096, 2048, 1024, 512, 256, 128, 96, 32], 1.05),
        ] {
            let price = price(&lengths, 8, 132);
            assert!(price < most, "{lengths:?}: {price}");
        }
    }
}
