//! Stop strings: text is held back while it may be the beginning of one.

/// Watches a text that arrives in pieces.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// Stops at the first of `stops`; empty ones are never met.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes a piece; gives what may be told, and whether a stop string was met: it and what follows is not told.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let rest = self.held.split_off(self.told());
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back and turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes that cannot belong to a stop string any more.
    fn told(&self) -> usize {
        let may_begin = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        self.held.char_indices().map(|(at, _)| at).find(may_begin).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut told = Vec::new();
        for piece in pieces {
            let (text, stopped) = matcher.push(piece);
            told.push(text);
            if stopped {
                return (told, true);
            }
        }
        told.push(matcher.finish());
        (told, false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_met_and_not_told() {
        assert_eq!(run(&["\n\nQ:"], &["a\n", "\nQ", ": b"]), (vec!["a".into(), "".into(), "".into()], true));
    }

    #[test]
    fn what_only_looked_like_one_is_told() {
        assert_eq!(run(&["abc"], &["ab", "abd"]), (vec!["".into(), "ababd".into(), "".into()], false));
        assert_eq!(run(&["abc"], &["xab"]), (vec!["x".into(), "ab".into()], false));
    }

    #[test]
    fn the_earliest_of_several_counts() {
        assert_eq!(run(&["later", "b"], &["ab later"]), (vec!["a".into()], true));
        assert_eq!(run(&["bcd", "c"], &["abcd"]), (vec!["a".into()], true));
    }

    #[test]
    fn characters_are_not_split() {
        assert_eq!(run(&["é!"], &["aé", "é!"]), (vec!["a".into(), "é".into()], true));
        assert_eq!(run(&["", "€"], &["$"]), (vec!["$".into(), "".into()], false));
    }
}
