//! The payload of a request: an argument or stdin, JSON where it parses, else text.

use std::io::{IsTerminal, Read};

use super::Global;
use super::error::{CliError, Exit};
use crate::packet::{MAX_PAYLOAD_DEPTH, Payload};
use crate::transport::MAX_BODY_BYTES;

/// The payload of an argument, or of stdin.
///
/// # Errors
/// [`CliError`] when what stdin holds is no payload.
pub(super) fn read(argument: Option<&str>, global: &Global) -> Result<Payload, CliError> {
    let text = match argument {
        None => return Ok(Payload::default()),
        Some("-") => {
            let stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                global.note("reading the payload from the terminal; end it with Ctrl-D");
            }
            read_text(stdin)?
        }
        Some(text) => text.to_owned(),
    };
    if let Some(why) = looks_like_broken_json(&text) {
        global.note(&format!("the payload is not JSON ({why}): it is sent as text"));
    }
    Ok(Payload::from_text(&text))
}

fn read_text(input: impl Read) -> Result<String, CliError> {
    let wrong = |what: String| CliError::new(Exit::Usage, format!("the payload on stdin {what}"));
    let mut bytes = Vec::new();
    let limit = MAX_BODY_BYTES as u64;
    input.take(limit + 1).read_to_end(&mut bytes).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(wrong(format!("is longer than {limit} bytes"))
            .help("put large data elsewhere, and its place in the payload"));
    }
    let mut text = String::from_utf8(bytes).map_err(|_| {
        wrong("is neither JSON nor text".into()).help("encode bytes as text, for example with `base64`")
    })?;
    // The line end that `echo` and editors add is not meant.
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// What is wrong with a text that begins as JSON and is none.
fn looks_like_broken_json(text: &str) -> Option<String> {
    let error = match serde_json::from_str::<Payload>(text) {
        Ok(_) => return None,
        Err(error) => error,
    };
    if !text.trim_start().starts_with(['{', '[', '"']) {
        return None;
    }
    Some(match error.classify() {
        serde_json::error::Category::Data => {
            format!("line {}: a key stands twice, or more than {MAX_PAYLOAD_DEPTH} levels", error.line())
        }
        _ => error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_a_payload_is_json_where_it_parses_and_a_broken_one_is_told() {
        assert_eq!(looks_like_broken_json(r#"{"a":1}"#), None);
        assert_eq!(looks_like_broken_json("hello"), None);
        assert_eq!(looks_like_broken_json("-5x"), None);
        assert!(looks_like_broken_json(r#"{"a":1"#).unwrap().contains("EOF"));
        assert!(looks_like_broken_json(r#"{"a":1,"a":2}"#).unwrap().contains("twice"));
        assert_eq!(read_text(&b"hi\n"[..]).unwrap(), "hi");
        assert!(read_text(&b"\xff"[..]).unwrap_err().message().contains("neither JSON nor text"));
    }
}
