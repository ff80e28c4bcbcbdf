//! A line of the console, cut into words as a person means them: JSON stays whole, with its quotes and blanks.

/// Cuts a line at its blanks. A word that begins with `{`, `[` or `"` is JSON and goes to where that ends, or to the end of the line
/// when it does not; one in single quotes is what stands between them.
pub(super) fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while let Some(first) = rest.chars().next() {
        let (word, after) = match first {
            '\'' => quoted(rest),
            '{' | '[' | '"' => rest.split_at(json_length(rest)),
            _ => rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len())),
        };
        words.push(word.to_owned());
        rest = after.trim_start();
    }
    words
}

/// What stands between single quotes, and what follows.
fn quoted(text: &str) -> (&str, &str) {
    let inner = text.strip_prefix('\'').unwrap_or(text);
    inner.split_once('\'').unwrap_or((inner, ""))
}

/// How long the JSON value at the beginning of a text is.
fn json_length(text: &str) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            '{' | '[' if !in_string => depth += 1,
            '}' | ']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 && !in_string {
            return at + c.len_utf8();
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n21_json_is_one_word_and_blanks_part_others() {
        for (line, words) in [
            ("", &[][..]),
            ("  agents\t", &["agents"]),
            ("request /a/b hello --tag big", &["request", "/a/b", "hello", "--tag", "big"]),
            (r#"/a/b {"a": [1, "x y}"]} --json"#, &["/a/b", r#"{"a": [1, "x y}"]}"#, "--json"]),
            (r#"/a/b [1, 2] x"#, &["/a/b", "[1, 2]", "x"]),
            (r#"/a/b "a \" b" x"#, &["/a/b", r#""a \" b""#, "x"]),
            ("/a/b 'two words' x", &["/a/b", "two words", "x"]),
            ("/a/b '{\"a\": 1}'", &["/a/b", "{\"a\": 1}"]),
            ("/a/b {\"a\": 1 --json", &["/a/b", "{\"a\": 1 --json"]),
            ("/a/b 'open x", &["/a/b", "open x"]),
            ("/a/b ünï \"ü\"x", &["/a/b", "ünï", "\"ü\"", "x"]),
            ("/a/b {\"a\":1}{\"b\":2}", &["/a/b", "{\"a\":1}", "{\"b\":2}"]),
        ] {
            assert_eq!(split(line), words, "{line:?}");
        }
    }
}
