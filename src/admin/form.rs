//! Fields of a form or a query, read strictly: each at most once, and UTF-8.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;

/// The most fields that are read.
const MAX_FIELDS: usize = 32;

/// What a form or a query holds.
#[derive(Debug, Default)]
pub(super) struct Fields(BTreeMap<String, String>);

/// It is no form, or a field stands twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Fields {
    /// Reads `name=value&name=value` (application/x-www-form-urlencoded).
    pub fn read(text: &[u8]) -> Result<Self, Malformed> {
        let text = std::str::from_utf8(text).map_err(|_| Malformed)?;
        let mut fields = BTreeMap::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if fields.len() >= MAX_FIELDS || fields.insert(decoded(name)?, decoded(value)?).is_some() {
                return Err(Malformed);
            }
        }
        Ok(Self(fields))
    }

    /// A field; empty when it is not there.
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }
}

fn decoded(text: &str) -> Result<String, Malformed> {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8().map(|text| text.into_owned()).map_err(|_| Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_fields_are_read_as_they_were_written() {
        let fields = Fields::read(b"a=1+2&b=%C3%A4%26&c&d=x=y&").unwrap();
        let read: Vec<&str> = ["a", "b", "c", "d", "e"].iter().map(|name| fields.text(name)).collect();
        assert_eq!(read, ["1 2", "\u{e4}&", "", "x=y", ""]);
    }

    #[test]
    fn n20_what_could_be_read_in_two_ways_is_refused() {
        let many: Vec<u8> = (0..=MAX_FIELDS).flat_map(|n| format!("f{n}=1&").into_bytes()).collect();
        for bad in [&b"a=1&a=2"[..], b"a=%ff", b"\xff=1", b"a=%C3", &many] {
            assert_eq!(Fields::read(bad).unwrap_err(), Malformed);
        }
    }
}
