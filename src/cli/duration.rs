//! Durations on the command line and in files: a number and a unit, such as `15s`, `5m`, `12h` or `30d`.

use std::time::Duration;

/// The longest that is accepted: 100 years of 365 days.
const MAX_SECONDS: u64 = 100 * 365 * 86_400;

/// Reads a duration: a whole number and one of `ms`, `s`, `m`, `h`, `d`, `w`. There is no default unit, because `30` could
/// mean seconds or days.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let bad = || format!("'{text}' is no duration: give a whole number and a unit, such as 15s, 5m, 12h or 30d");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).ok_or_else(bad)?;
    let number: u64 = number.parse().map_err(|_| bad())?;
    let seconds = match unit {
        "ms" => return Ok(Duration::from_millis(number)).and_then(|duration| limit(text, duration)),
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(bad()),
    };
    limit(text, Duration::from_secs(number.checked_mul(seconds).ok_or_else(|| too_long(text))?))
}

fn limit(text: &str, duration: Duration) -> Result<Duration, String> {
    if duration.as_secs() > MAX_SECONDS { Err(too_long(text)) } else { Ok(duration) }
}

fn too_long(text: &str) -> String {
    format!("'{text}' is too long: at most 36500d are possible")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, seconds) in [("15s", 15), ("5m", 300), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600)] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse("36500d"), Ok(Duration::from_secs(MAX_SECONDS)));
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in ["", "30", "d", "-1s", "1.5h", "1 s", "1S", "5 minutes", "é", "1é", "+5s", "1sm"] {
            assert!(parse(text).unwrap_err().contains("is no duration"), "{text:?}");
        }
        for text in ["36501d", "18446744073709551615w", "18446744073709551615ms"] {
            assert!(parse(text).unwrap_err().contains("too long"), "{text:?}");
        }
        assert!(parse("18446744073709551616s").unwrap_err().contains("is no duration"));
    }
}
