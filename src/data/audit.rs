//! What the rows teach: which share of a source is supervised, and whether every response teaches its own end.

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::error::user_error;

/// The mask of a source's examples, as it lies in the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MaskAudit {
    /// Responses of all turns.
    pub responses: usize,
    /// Of these, how many have their end token supervised: all of them, or the command fails.
    pub supervised_ends: usize,
}

impl MaskAudit {
    /// Adds what another part of the source has.
    pub fn add(&mut self, responses: usize) {
        self.responses += responses;
        self.supervised_ends += responses;
    }
}

/// The number of supervised responses of an example; each is a run of supervised tokens that closes with an end token.
///
/// # Errors
/// When there is another number of them than of assistant turns, or one does not close with an end token.
pub fn responses(ids: &[u32], loss_mask: &[bool], turns: usize, end_tokens: &[u32]) -> Result<usize> {
    let (mut found, mut at) = (0, 0);
    for run in loss_mask.chunk_by(|one, other| one == other) {
        at += run.len();
        if run.first() != Some(&true) {
            continue;
        }
        found += 1;
        let last = ids.get(at - 1).ok_or_else(|| anyhow!("the mask is longer than the tokens"))?;
        if !end_tokens.contains(last) {
            return Err(user_error(
                format!("response {found} closes with token {last}, expected an end token of {end_tokens:?}"),
                "the chat template and the model's end token do not belong together",
            ));
        }
    }
    if found != turns {
        return Err(anyhow!("{found} responses are supervised, expected {turns}"));
    }
    Ok(found)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    fn audit(ids: &[u32], mask: &str, turns: usize) -> Result<usize> {
        let mask: Vec<bool> = mask.chars().map(|c| c == '1').collect();
        responses(ids, &mask, turns, &[0])
    }

    #[test]
    fn every_response_must_close_with_an_end_token() {
        assert_eq!(audit(&[5, 6, 0, 7, 8, 0, 9], "0110110", 2).unwrap(), 2);
        let text = crate::error::render(&audit(&[5, 6, 7, 0], "0110", 1).unwrap_err());
        assert!(text.contains("closes with token 7, expected an end token of [0]"), "{text}");
        let text = audit(&[5, 6, 0, 0], "0110", 2).unwrap_err().to_string();
        assert!(text.contains("1 responses are supervised, expected 2"), "{text}");
        assert!(audit(&[5, 6], "00", 1).is_err());
    }
}
