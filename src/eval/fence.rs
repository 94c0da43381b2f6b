//! Code in what a model says.

/// What stands in the first code fence; an answer without one is taken whole, and one that was cut at its limit
/// to its end. White space at the beginning stays: it may be indentation.
pub fn code(answer: &str) -> &str {
    let Some((_, inside)) = answer.split_once("```") else { return answer };
    let inside = inside.split_once("```").map_or(inside, |(inside, _)| inside);
    // The rest of the first line is the name of a language.
    match inside.split_once('\n') {
        Some((name, code)) if !name.trim().contains(char::is_whitespace) => code,
        _ => inside,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_taken_out_of_its_fence() {
        for (answer, expected) in [
            ("    return 1\n", "    return 1\n"),
            ("Here:\n```python\ndef f():\n    return 1\n```\nDone.", "def f():\n    return 1\n"),
            ("```\n    return 1\n```", "    return 1\n"),
            ("```py\nx = 1", "x = 1"),
            ("```x = 1```", "x = 1"),
            ("```", ""),
            ("", ""),
        ] {
            assert_eq!(code(answer), expected, "{answer:?}");
        }
    }
}
