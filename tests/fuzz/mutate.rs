//! Damage to real files: flipped bits, lying numbers, cuts, repeats, pieces of other files and of the format's own words.
//!
//! What is done follows from a seed alone, so an input is found again by its number.

/// Numbers that lengths, counts and offsets break at.
const NUMBERS: [u64; 16] = [
    0,
    1,
    7,
    63,
    64,
    255,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 33,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX,
];

/// The same as text.
const DIGITS: [&str; 10] = [
    "0",
    "-1",
    "1e999",
    "4294967296",
    "9223372036854775807",
    "18446744073709551616",
    "0.1",
    "null",
    "[]",
    "\"x\"",
];

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`; 0 where there is nothing below.
    pub fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.next() % end as u64) as usize }
    }

    pub fn pick<'a, T: ?Sized>(&mut self, list: &'a [&'a T]) -> Option<&'a T> {
        list.get(self.below(list.len())).copied()
    }
}

/// One of `seeds` with one to eight changes; `words` are pieces that the format knows.
pub fn mutated(seeds: &[Vec<u8>], words: &[&str], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(8) {
        change(&mut bytes, seeds, words, random);
    }
    bytes
}

/// Longest input: what grows by repeats stays small enough to be quick.
const LONGEST: usize = 1 << 20;

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let at = place(bytes.len(), random);
    match random.below(10) {
        0 | 1 => flip(bytes, at, random),
        2 | 3 => number(bytes, at, random),
        4 => bytes.truncate(at),
        5 => remove(bytes, at, random),
        6 => repeat(bytes, at, random),
        7 => splice(bytes, at, seeds, random),
        8 => insert(bytes, at, random.pick(words).unwrap_or("\u{0}").as_bytes()),
        _ => digits(bytes, at, random),
    }
    bytes.truncate(LONGEST);
}

/// Half of all changes go to the first kilobyte, where headers lie.
fn place(length: usize, random: &mut Random) -> usize {
    let reach = if random.below(2) == 0 { length.min(1024) } else { length };
    random.below(reach)
}

fn flip(bytes: &mut [u8], at: usize, random: &mut Random) {
    let mask = 1u8 << random.below(8);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= mask;
    }
}

fn number(bytes: &mut [u8], at: usize, random: &mut Random) {
    let length = bytes.len() as u64;
    let value = match random.below(NUMBERS.len() + 2) {
        0 => length,
        1 => length.wrapping_sub(at as u64),
        index => NUMBERS[index - 2],
    };
    let width = 1 << random.below(4);
    let little = value.to_le_bytes();
    for (byte, new) in bytes.iter_mut().skip(at).zip(&little[..width]) {
        *byte = *new;
    }
}

fn remove(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let end = (at + 1 + random.below(64)).min(bytes.len());
    bytes.drain(at.min(end)..end);
}

fn repeat(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let end = (at + 1 + random.below(64)).min(bytes.len());
    let piece = bytes[at.min(end)..end].to_vec();
    // Now and then so often that what nests nests deep.
    let times = if random.below(16) == 0 { 2000 } else { 1 + random.below(4) };
    insert(bytes, at, &piece.repeat(times));
}

fn splice(bytes: &mut Vec<u8>, at: usize, seeds: &[Vec<u8>], random: &mut Random) {
    let other = &seeds[random.below(seeds.len())];
    let start = random.below(other.len());
    let end = (start + 1 + random.below(512)).min(other.len());
    if random.below(2) == 0 {
        insert(bytes, at, &other[start..end]);
    } else {
        for (byte, new) in bytes.iter_mut().skip(at).zip(&other[start..end]) {
            *byte = *new;
        }
    }
}

/// Another number in place of one that stands as text.
fn digits(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(start) = bytes.iter().skip(at).position(u8::is_ascii_digit).map(|ahead| at + ahead) else {
        return;
    };
    let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let new = DIGITS[random.below(DIGITS.len())].bytes();
    bytes.splice(start..start + length, new);
}

fn insert(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let at = at.min(bytes.len());
    bytes.splice(at..at, piece.iter().copied());
}
