//! Small texts for people: counts, and what strangers wrote made fit for a terminal.

use std::borrow::Cow;
use std::fmt::Write;

/// A number with the word for what is counted: `1 agent`, `2 agents`.
pub(super) fn counted(count: usize, word: &str) -> String {
    if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") }
}

/// The text with everything escaped that could steer a terminal or reorder what is shown: control characters and those that
/// change the direction of writing. Line ends and tabs are kept when `lines` says so.
pub(super) fn printable(text: &str, lines: bool) -> Cow<'_, str> {
    let steers = |c: char| (c.is_control() && !(lines && matches!(c, '\n' | '\t'))) || reorders(c);
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers(c) {
            // Writing to a string cannot fail.
            let _ = write!(shown, "{}", c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// JSON with the same meaning in which nothing steers a terminal: of control characters, JSON itself escapes only those of ASCII,
/// without the last.
pub(super) fn escaped_json(json: &str) -> Cow<'_, str> {
    let steers = |c: char| (c.is_control() && c != '\n') || reorders(c);
    if !json.contains(steers) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if steers(c) {
            // They are all in strings, and of four digits. Writing to a string cannot fail.
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// The marks of Unicode's bidirectional algorithm.
fn reorders(c: char) -> bool {
    matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text with every `user:password@` of a URL in it made `user:***@`: for messages that repeat what they did not understand.
pub(super) fn without_passwords(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        shown.push_str(before);
        shown.push_str("://");
        rest = after;
        // The user information ends at the last @ before a blank or a quote, whatever stands in the password.
        let end = after.find(|c: char| c.is_whitespace() || matches!(c, '"' | '`')).unwrap_or(after.len());
        let (url, _) = after.split_at(end);
        if let Some((info, _)) = url.rsplit_once('@')
            && let Some((user, _)) = info.split_once(':')
        {
            shown.push_str(user);
            shown.push_str(":***");
            rest = after.get(info.len()..).unwrap_or_default();
        }
    }
    shown.push_str(rest);
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_nothing_from_a_stranger_steers_the_terminal() {
        assert_eq!(printable("plain, ünïcode", false), "plain, ünïcode");
        assert_eq!(printable("\x1b[2Jhi\x07", true), "\\u{1b}[2Jhi\\u{7}");
        assert_eq!(printable("a\nb\tc", true), "a\nb\tc");
        assert_eq!(printable("a\nb", false), "a\\nb");
        assert_eq!(printable("evil\u{202e}gpj", true), "evil\\u{202e}gpj");
        assert_eq!(printable("\u{9b}31m", true), "\\u{9b}31m", "C1 controls are controls, too");
    }

    #[test]
    fn u02_json_says_the_same_without_steering() {
        let value = serde_json::json!({"a\u{202e}": "\u{9b}31m\u{7f}\x1b ünï"});
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = escaped_json(&text);
        assert!(!shown.contains(['\u{202e}', '\u{9b}', '\u{7f}', '\x1b']) && shown.contains("ünï"), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    #[test]
    fn s14_passwords_in_urls_are_not_repeated() {
        for (text, shown) in [
            ("amqp://u:secret@h:1/v", "amqp://u:***@h:1/v"),
            ("invalid `amqp://u:secret@h`, expected", "invalid `amqp://u:***@h`, expected"),
            ("amqp://u:sec@ret@h and amqp://v:secret@h", "amqp://u:***@h and amqp://v:***@h"),
            ("amqp://u:secret/@h", "amqp://u:***@h"),
            ("amqp://u@h", "amqp://u@h"),
            ("no url: a@b", "no url: a@b"),
            ("amqp://h:1", "amqp://h:1"),
        ] {
            assert_eq!(without_passwords(text), shown);
        }
    }

    #[test]
    fn counts_agree_with_their_word() {
        assert_eq!((counted(0, "agent"), counted(1, "agent")), ("0 agents".into(), "1 agent".into()));
    }
}
