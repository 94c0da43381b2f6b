//! Hashes in writing.

/// Digits of a hash that a person is shown.
const SHORT: usize = 12;

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first digits of a hash: enough to tell two apart in a message.
pub fn short(hash: &str) -> &str {
    hash.get(..SHORT).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::{hex, short};

    #[test]
    fn a_hash_in_writing() {
        assert_eq!(hex(&[0, 15, 16, 255]), "000f10ff");
        assert_eq!(short("0123456789abcdef"), "0123456789ab");
        assert_eq!(short("0123"), "0123");
    }
}
