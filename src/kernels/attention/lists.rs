//! The tiles of a batch: what each block of the kernels works on, and in which order.

use anyhow::{Result, ensure};

use super::order;

/// Query rows, and key rows, of a tile.
pub(super) const TILE: i64 = 128;

/// Query rows of a block of the queries' gradient.
pub(super) const BLOCK: i64 = 64;

/// One entry of a list of tiles, field by field as in cuda/include/attention.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// The sequence's first token.
    pub start: i32,
    /// The sequence's tokens.
    pub length: i32,
    /// The tile's first row in the sequence.
    pub row: i32,
    /// Number of the sequence's first block.
    pub first_block: i32,
    /// First and last key tile of the group in a list for the backward pass.
    pub group_first: i32,
    pub group_last: i32,
    /// The key head of a tile in a list for the backward pass.
    pub kv_head: i32,
    pub reserved: i32,
}

/// Up to 64 query rows of a sequence; `rows` is 0 for a number that no sequence uses.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Block {
    /// The first row's token.
    pub token: i32,
    /// Rows that count.
    pub rows: i32,
    pub reserved: [i32; 2],
}

const _: () = assert!(size_of::<Tile>() == 32 && size_of::<Block>() == 16, "attention.cuh asserts the same");

impl Tile {
    pub(super) fn words(self) -> [i32; 8] {
        let Self { start, length, row, first_block, group_first, group_last, kv_head, reserved } = self;
        [start, length, row, first_block, group_first, group_last, kv_head, reserved]
    }
}

impl Block {
    pub(super) fn words(self) -> [i32; 4] {
        let Self { token, rows, reserved: [a, b] } = self;
        [token, rows, a, b]
    }
}

/// A sequence that has tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub start: i32,
    pub length: i32,
    pub first_block: i32,
}

impl Span {
    /// Tiles of 128 rows, the last perhaps in part.
    pub(super) fn tiles(self) -> i32 {
        (self.length - 1) / TILE as i32 + 1
    }

    /// Blocks of 64 rows.
    pub(super) fn blocks(self) -> i32 {
        (self.length - 1) / BLOCK as i32 + 1
    }

    pub(super) fn tile(self, number: i32, [group_first, group_last]: [i32; 2]) -> Tile {
        let Self { start, length, first_block } = self;
        let row = number * TILE as i32;
        Tile { start, length, row, first_block, group_first, group_last, kv_head: 0, reserved: 0 }
    }
}

/// All lists of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lists {
    /// Query tiles, the longest first.
    pub forward: Vec<Tile>,
    /// Key tiles of every key head, in an order in which none waits for one behind it.
    pub backward: Vec<Tile>,
    /// By their numbers.
    pub blocks: Vec<Block>,
}

impl Lists {
    /// The lists of sequences that lie between the numbers of `cu_seqlens`, for `workers` blocks of the backward kernel at
    /// a time.
    ///
    /// # Errors
    /// When the numbers do not ascend from 0, or there are too many tokens.
    pub(super) fn new(cu_seqlens: &[i64], kv_heads: i64, workers: usize) -> Result<Self> {
        let (spans, kv_heads) = (spans(cu_seqlens)?, i32::try_from(kv_heads)?);
        let total = cu_seqlens.last().map_or(0, |last| *last as i32);
        Ok(Self {
            forward: forward(&spans),
            backward: order::backward(&spans, kv_heads, workers),
            blocks: blocks(&spans, total),
        })
    }
}

/// How many numbers blocks have at most.
pub(super) fn block_count(tokens: i64, sequences: i64) -> i64 {
    tokens / BLOCK + sequences
}

fn spans(cu_seqlens: &[i64]) -> Result<Vec<Span>> {
    ensure!(cu_seqlens.first() == Some(&0), "the bounds of sequences do not begin with 0: {cu_seqlens:?}");
    let mut spans: Vec<Span> = Vec::new();
    for (index, pair) in cu_seqlens.windows(2).enumerate() {
        let (start, end) = (pair[0], pair[1]);
        ensure!(start <= end, "sequence {index} begins at token {start} and ends at {end}");
        // Numbers of blocks and ends of tiles must fit as well.
        ensure!(
            end + spans.len() as i64 * BLOCK <= i64::from(i32::MAX) - TILE,
            "attention takes at most 2³¹ tokens at a time, a sequence ends at {end}"
        );
        if start < end {
            let first_block = block_count(start, spans.len() as i64) as i32;
            spans.push(Span { start: start as i32, length: (end - start) as i32, first_block });
        }
    }
    Ok(spans)
}

/// Query tiles by descending number of key tiles to visit, in the order of tokens where it is the same.
fn forward(spans: &[Span]) -> Vec<Tile> {
    let mut tiles: Vec<Tile> =
        spans.iter().flat_map(|span| (0..span.tiles()).map(|number| span.tile(number, [0; 2]))).collect();
    tiles.sort_by_key(|tile| -tile.row);
    tiles
}

fn blocks(spans: &[Span], total: i32) -> Vec<Block> {
    let count = block_count(i64::from(total), spans.len() as i64);
    let mut blocks = vec![Block::default(); count as usize];
    for span in spans {
        for number in 0..span.blocks() {
            let row = number * BLOCK as i32;
            let rows = (span.length - row).min(BLOCK as i32);
            blocks[(span.first_block + number) as usize] =
                Block { token: span.start + row, rows, reserved: [0; 2] };
        }
    }
    blocks
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % bound
        }

        /// Lengths of some sequences: empty ones, ones of a token, at the bounds of tiles, and any up to 5,000.
        fn pack(&mut self) -> Vec<i64> {
            let count = 1 + self.below(12);
            (0..count)
                .map(|_| match self.below(6) {
                    0 => 0,
                    1 => 1,
                    2 => (self.below(8) * 64 + self.below(3)) as i64,
                    3 => self.below(300) as i64,
                    _ => self.below(5001) as i64,
                })
                .collect()
        }
    }

    fn bounds(lengths: &[i64]) -> Vec<i64> {
        let mut at = 0;
        std::iter::once(0)
            .chain(lengths.iter().map(|length| {
                at += length;
                at
            }))
            .collect()
    }

    fn spans_of(lengths: &[i64]) -> BTreeMap<i32, i32> {
        let bounds = bounds(lengths);
        let pairs = bounds.windows(2).map(|pair| (pair[0] as i32, (pair[1] - pair[0]) as i32));
        pairs.filter(|(_, length)| *length > 0).collect()
    }

    /// For every sequence each tile once, of this key head.
    fn check_tiles(tiles: &[Tile], spans: &BTreeMap<i32, i32>, kv_head: i32) {
        let tiles: Vec<&Tile> = tiles.iter().filter(|tile| tile.kv_head == kv_head).collect();
        let mut found: Vec<(i32, i32)> = tiles.iter().map(|tile| (tile.start, tile.row)).collect();
        found.sort_unstable();
        let rows = |(start, length): (&i32, &i32)| {
            let start = *start;
            (0..*length).step_by(128).map(move |row| (start, row)).collect::<Vec<_>>()
        };
        assert_eq!(found, spans.iter().flat_map(rows).collect::<Vec<_>>());
        assert!(tiles.iter().all(|tile| spans[&tile.start] == tile.length));
    }

    fn check_forward(lists: &Lists) {
        let key = |tile: &Tile| (-tile.row / 128, tile.start);
        assert!(lists.forward.is_sorted_by_key(key), "longest first, then by token");
    }

    fn check_blocks(lists: &Lists, spans: &BTreeMap<i32, i32>) {
        let mut counted = Vec::new();
        for block in lists.blocks.iter().filter(|block| block.rows > 0) {
            assert!(block.rows <= 64);
            counted.extend(block.token..block.token + block.rows);
        }
        let tokens: Vec<i32> = spans.iter().flat_map(|(start, length)| *start..start + length).collect();
        assert_eq!(counted, tokens, "each token is in one block, in order");
        for tile in &lists.forward {
            let block = lists.blocks[(tile.first_block + tile.row / 64) as usize];
            assert_eq!(
                block.token,
                tile.start + tile.row,
                "a tile's rows have a block of their own sequence"
            );
        }
    }

    /// Goes through the list as one worker would, with the semaphores and turns of attention.cuh, for one key head.
    fn check_turns(lists: &Lists, kv_head: i32) {
        let mut added = vec![0; lists.blocks.len()];
        for tile in lists.backward.iter().filter(|tile| tile.kv_head == kv_head) {
            let n = tile.row / 128;
            assert!((tile.group_first..=tile.group_last).contains(&n));
            // The tile sees the queries from its own diagonal on: with each key tile once, each pair once.
            for m in 2 * n..(tile.length - 1) / 64 + 1 {
                let turn = tile.group_first + tile.group_last.min(m / 2) - n;
                let semaphore = &mut added[(tile.first_block + m) as usize];
                assert_eq!(*semaphore, turn, "block {m} of {tile:?} waits for a tile behind it, or for none");
                *semaphore += 1;
                assert!(turn <= m / 2);
            }
        }
        for tile in &lists.forward {
            for m in tile.row / 64..((tile.row + 128).min(tile.length) - 1) / 64 + 1 {
                assert_eq!(added[(tile.first_block + m) as usize], m / 2 + 1, "the last turn is m / 2");
            }
        }
    }

    #[test]
    fn lists_cover_every_pair_once_and_never_wait_for_what_comes_later() {
        let mut random = Random(2024);
        for case in 0..200 {
            let lengths = random.pack();
            let (kv_heads, workers) = (1 + random.below(9) as i64, 1 + random.below(140) as usize);
            let lists = Lists::new(&bounds(&lengths), kv_heads, workers).unwrap();
            let spans = spans_of(&lengths);
            assert_eq!(lists.blocks.len() as i64, lengths.iter().sum::<i64>() / 64 + spans.len() as i64);
            check_tiles(&lists.forward, &spans, 0);
            check_forward(&lists);
            check_blocks(&lists, &spans);
            for kv_head in 0..kv_heads as i32 {
                check_tiles(&lists.backward, &spans, kv_head);
                check_turns(&lists, kv_head);
            }
            assert_eq!(lists.backward.len(), lists.forward.len() * kv_heads as usize);
            assert!(case > 0 || !spans.is_empty());
        }
    }

    #[test]
    fn batches_without_tokens_have_no_tiles() {
        for bounds in [vec![0], vec![0, 0, 0]] {
            let lists = Lists::new(&bounds, 8, 132).unwrap();
            assert_eq!((lists.forward.len(), lists.backward.len(), lists.blocks.len()), (0, 0, 0));
        }
    }

    #[test]
    fn bounds_that_are_none_are_refused() {
        let told = |bounds: &[i64]| Lists::new(bounds, 1, 1).unwrap_err().to_string();
        assert!(told(&[]).contains("begin with 0") && told(&[3, 5]).contains("begin with 0"));
        assert_eq!(told(&[0, 5, 4]), "sequence 1 begins at token 5 and ends at 4");
        assert!(told(&[0, i64::from(i32::MAX)]).contains("at most 2³¹ tokens"));
        assert!(told(&[0, i64::MAX / 2]).contains("at most 2³¹ tokens"));
    }
}
