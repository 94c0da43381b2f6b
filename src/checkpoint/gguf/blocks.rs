//! ggml's packed formats, unpacked to f32.
//!
//! A row is a sequence of blocks; a block holds one or two half-precision scales `d` (and `m`, or `dmin`)
//! and its weights as small integers. `K` formats have 256 weights a block in groups that have a scale of
//! their own. Bytes are little-endian; products and sums are rounded to f32 one after the other, as in
//! ggml's reference.

use anyhow::{Result, bail};
use half::{bf16, f16};

use crate::error::user_error;

/// How the numbers of a tensor are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are ggml's")]
#[expect(non_camel_case_types, reason = "the names are ggml's")]
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Weights of a block of the `K` formats.
const QK_K: usize = 256;

impl BlockType {
    /// The format of ggml's number.
    ///
    /// # Errors
    /// When this program does not unpack that format.
    pub fn from_ggml(number: u32) -> Result<Self> {
        Ok(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            other => bail!(user_error(
                format!("ggml format {other} is not supported"),
                "take a file in F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1 or Q4_0",
            )),
        })
    }

    /// Weights of a block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => QK_K,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 2 + 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 2 + 2 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4_K => 2 + 2 + 12 + 128,
            Self::Q5_K => 2 + 2 + 12 + 32 + 128,
            Self::Q6_K => 128 + 64 + 16 + 2,
        }
    }

    /// Unpacks whole blocks: `out` has [`block_len`](Self::block_len) values for each
    /// [`block_bytes`](Self::block_bytes) of `packed`.
    pub fn unpack(self, packed: &[u8], out: &mut [f32]) {
        let blocks = packed.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len()));
        let unpack: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => unpack_f32,
            Self::F16 => |block, out| out[0] = f16_at(block, 0),
            Self::BF16 => |block, out| out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Self::Q4_0 => unpack_q4_0,
            Self::Q4_1 => unpack_q4_1,
            Self::Q5_0 => unpack_q5_0,
            Self::Q5_1 => unpack_q5_1,
            Self::Q8_0 => unpack_q8_0,
            Self::Q4_K => unpack_q4_k,
            Self::Q5_K => unpack_q5_k,
            Self::Q6_K => unpack_q6_k,
        };
        for (block, out) in blocks {
            unpack(block, out);
        }
    }
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn unpack_f32(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
}

/// `d`, 16 bytes: low nibbles are the first half of the block, high nibbles the second. `w = d · (q − 8)`.
fn unpack_q4_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    let (first, second) = out.split_at_mut(16);
    for ((first, second), byte) in first.iter_mut().zip(second).zip(&block[2..]) {
        *first = d * (f32::from(byte & 15) - 8.0);
        *second = d * (f32::from(byte >> 4) - 8.0);
    }
}

/// `d`, `m`, 16 bytes as in `Q4_0`. `w = d · q + m`.
fn unpack_q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    let (first, second) = out.split_at_mut(16);
    for ((first, second), byte) in first.iter_mut().zip(second).zip(&block[4..]) {
        *first = d * f32::from(byte & 15) + m;
        *second = d * f32::from(byte >> 4) + m;
    }
}

/// The fifth bits of 32 weights, then their nibbles as in `Q4_0`: the weight at each index as 0 to 31.
fn five_bits(packed: &[u8]) -> impl Fn(usize) -> u8 + '_ {
    move |index| {
        let high = packed[index / 8] >> (index % 8) & 1;
        let byte = packed[4 + index % 16];
        let low = if index < 16 { byte & 15 } else { byte >> 4 };
        low | high << 4
    }
}

/// `d`, 4 bytes of fifth bits, 16 bytes of nibbles. `w = d · (q − 16)`.
fn unpack_q5_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    let weight = five_bits(&block[2..]);
    for (index, out) in out.iter_mut().enumerate() {
        *out = d * (f32::from(weight(index)) - 16.0);
    }
}

/// `d`, `m`, then as `Q5_0`. `w = d · q + m`.
fn unpack_q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    let weight = five_bits(&block[4..]);
    for (index, out) in out.iter_mut().enumerate() {
        *out = d * f32::from(weight(index)) + m;
    }
}

/// `d`, 32 signed bytes. `w = d · q`.
fn unpack_q8_0(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (out, byte) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(byte.cast_signed()) * d;
    }
}

/// Scale and minimum of group `group` (of 8) as 6-bit numbers: the first four groups lie whole in bytes
/// 0 to 7, the others have their low nibbles in bytes 8 to 11 and their high bits atop the first ones.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        ((low & 15) | (packed[group - 4] >> 6) << 4, (low >> 4) | (packed[group] >> 6) << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// `d`, `dmin`, 12 bytes of scales, 128 bytes: 32 bytes hold two groups, low nibbles first.
/// `w = (d · scale) · q − dmin · minimum`.
fn unpack_q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], group);
        let (scale, minimum) = (d * scale, dmin * minimum);
        let bytes = &block[16 + group / 2 * 32..][..32];
        for (out, byte) in out.iter_mut().zip(bytes) {
            let weight = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            *out = scale * f32::from(weight) - minimum;
        }
    }
}

/// As `Q4_K`, with 32 bytes of fifth bits before the nibbles: bit `g` of byte `i` belongs to weight `i` of group `g`.
fn unpack_q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let high = &block[16..48];
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], group);
        let (scale, minimum) = (d * scale, dmin * minimum);
        let bytes = &block[48 + group / 2 * 32..][..32];
        for ((out, byte), high) in out.iter_mut().zip(bytes).zip(high) {
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            *out = scale * f32::from(low | (high >> group & 1) << 4) - minimum;
        }
    }
}

/// 128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, `d`. `w = (d · scale) · (q − 32)`.
/// Each half of the block has 64 bytes of nibbles and 32 of pairs for its four runs of 32 weights.
fn unpack_q6_k(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 208);
    for (index, out) in out.iter_mut().enumerate() {
        let (half, run, at) = (index / 128, index % 128 / 32, index % 32);
        let nibbles = block[half * 64 + run % 2 * 32 + at];
        let low = if run < 2 { nibbles & 15 } else { nibbles >> 4 };
        let high = block[128 + half * 32 + at] >> (2 * run) & 3;
        let scale = f32::from(block[192 + index / 16].cast_signed());
        *out = (d * scale) * (f32::from(low | high << 4) - 32.0);
    }
}
