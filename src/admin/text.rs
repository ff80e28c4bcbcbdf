//! Texts of strangers and times, as they are shown.

use std::borrow::Cow;
use std::fmt::Write;

use crate::clock::Timestamp;
use crate::packet::Payload;

/// The longest value that is shown whole, in bytes.
const SHOWN: usize = 64 * 1024;

/// The text with everything made visible that could hide or reorder what is shown beside it: control characters, and the marks
/// of Unicode's bidirectional algorithm. Line ends and tabs stay.
pub(super) fn visible(text: &str) -> Cow<'_, str> {
    let hides = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    if !text.contains(hides) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if hides(c) {
            // Writing to a string cannot fail.
            let _ = write!(shown, "{}", c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// A value as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Value {
    /// A text as it is, anything else as JSON.
    pub text: String,
    /// Whether it is a text.
    pub is_text: bool,
    /// How many bytes are left out at the end.
    pub cut: usize,
}

impl Value {
    pub fn of(payload: &Payload) -> Self {
        let (text, is_text) = match &payload.0 {
            serde_json::Value::String(text) => (visible(text).into_owned(), true),
            other => {
                let text = serde_json::to_string_pretty(other).unwrap_or_default();
                (visible(&text).into_owned(), false)
            }
        };
        let end = (0..=SHOWN.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let cut = text.len() - end;
        let text = text.get(..end).unwrap_or_default().to_owned();
        Self { text, is_text, cut }
    }
}

/// A moment, and how long ago it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct When {
    /// Seconds since the epoch, for the script that keeps the age up to date.
    pub seconds: u64,
    /// RFC 3339.
    pub exact: String,
    /// In words.
    pub ago: String,
}

impl When {
    pub fn new(at: Timestamp, now: Timestamp) -> Self {
        let age = now.since(at).as_secs();
        Self { seconds: at.as_secs(), exact: at.to_string(), ago: format!("{} ago", span(age)) }
    }

    /// The same without an age, which would change all the time: the script puts it in.
    pub fn exactly(at: Timestamp) -> Self {
        let exact = at.to_string();
        Self { seconds: at.as_secs(), ago: exact.clone(), exact }
    }
}

/// A time in its largest unit.
pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A number with the word for what is counted.
pub(super) fn counted(count: u64, word: &str) -> String {
    if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_what_hides_or_reorders_is_made_visible() {
        assert_eq!(visible("plain <b>\n\t\u{e4}"), "plain <b>\n\t\u{e4}");
        assert_eq!(visible("a\u{202e}b\u{0}\u{1b}[m\u{200b}"), "a\\u{202e}b\\u{0}\\u{1b}[m\\u{200b}");
    }

    #[test]
    fn n20_values_are_text_or_json_and_cut_where_they_are_long() {
        let text = Value::of(&"a\nb".into());
        assert_eq!((text.text.as_str(), text.is_text, text.cut), ("a\nb", true, 0));
        let number = Value::of(&Payload(serde_json::json!({"a": 5})));
        assert_eq!((number.text.as_str(), number.is_text), ("{\n  \"a\": 5\n}", false));
        let long = Value::of(&Payload(serde_json::json!("\u{e4}".repeat(SHOWN))));
        assert_eq!((long.text.len(), long.cut), (SHOWN, SHOWN));
    }

    #[test]
    fn n20_ages_are_in_their_largest_unit() {
        let ago =
            |seconds: u64| When::new(Timestamp::from_secs(1_000_000 - seconds), Timestamp::from_secs(1_000_000)).ago;
        assert_eq!([0, 119, 120, 7_200, 172_800].map(ago), ["0 s ago", "119 s ago", "2 min ago", "2 h ago", "2 d ago"]);
        assert_eq!(When::new(Timestamp::from_secs(9), Timestamp::from_secs(5)).ago, "0 s ago");
    }
}
