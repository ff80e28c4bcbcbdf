//! How much memory the values of a message may take once they are decoded. One byte can become a value of 32 bytes, and a map of one
//! entry takes hundreds: so the values are counted in the encoded bytes, before anything is decoded.
//!
//! The numbers are upper bounds of what the values take in [`serde_json::Value`] and in the buffers of serde.

/// The most memory that the values of one message may take as counted here: 128 MiB, eight times the longest message. Decoding may
/// take twice as much for a moment.
pub const MAX_DECODED_BYTES: usize = 128 * 1024 * 1024;

/// Every value, as an element of a list that grows by doubling.
const VALUE: usize = 64;
/// A string, in addition to its length.
const STRING: usize = 32;
/// A list that is not empty: it has room for four values at least.
const LIST: usize = 96;
/// A map that is not empty: its first node.
const MAP: usize = 640;

/// The values take more memory than allowed, or the bytes are malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    TooLarge,
    #[cfg_attr(not(feature = "msgpack"), expect(dead_code, reason = "JSON is checked when it is decoded"))]
    Malformed,
}

/// Counts up to the limit.
#[derive(Default)]
struct Count(usize);

impl Count {
    fn add(&mut self, bytes: usize) -> Result<(), Rejected> {
        self.0 = self.0.saturating_add(bytes);
        if self.0 > MAX_DECODED_BYTES { Err(Rejected::TooLarge) } else { Ok(()) }
    }
}

/// Counts the values of a JSON text. It need not be valid: as far as a parser accepts it, every value is counted.
pub(super) fn check_json(bytes: &[u8]) -> Result<(), Rejected> {
    // Any text that is short enough passes: a pair of brackets is the most expensive.
    if bytes.len() < MAX_DECODED_BYTES / (MAP + 2 * VALUE) {
        return Ok(());
    }
    let mut count = Count::default();
    count.add(VALUE + bytes.len())?;
    let mut rest = bytes.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => {
                count.add(STRING)?;
                while let Some(byte) = rest.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => drop(rest.next()),
                        _ => {}
                    }
                }
            }
            // A value follows: the first of a list or map, the next one, or that of a key.
            b'[' => count.add(LIST + VALUE)?,
            b'{' => count.add(MAP + VALUE)?,
            b',' | b':' => count.add(VALUE)?,
            _ => {}
        }
    }
    Ok(())
}

/// Counts the values of MessagePack.
#[cfg(feature = "msgpack")]
pub(super) fn check_msgpack(bytes: &[u8]) -> Result<(), Rejected> {
    if bytes.len() < MAX_DECODED_BYTES / (MAP + 2 * VALUE) {
        return Ok(());
    }
    let mut count = Count::default();
    let mut rest = bytes;
    // How many values are still to come.
    let mut missing: u64 = 1;
    while missing > 0 {
        missing -= 1;
        count.add(VALUE)?;
        let marker = take(&mut rest, 1)?;
        let (skipped, elements) = match marker {
            0x80..=0x8f => (0, 2 * (marker & 0x0f)),
            0x90..=0x9f => (0, marker & 0x0f),
            0xa0..=0xbf => (marker & 0x1f, 0),
            0xc4 | 0xd9 => (take(&mut rest, 1)?, 0),
            0xc5 | 0xda => (take(&mut rest, 2)?, 0),
            0xc6 | 0xdb => (take(&mut rest, 4)?, 0),
            // Extensions have a type.
            0xc7 => (take(&mut rest, 1)? + 1, 0),
            0xc8 => (take(&mut rest, 2)? + 1, 0),
            0xc9 => (take(&mut rest, 4)? + 1, 0),
            0xd4..=0xd8 => ((1 << (marker - 0xd4)) + 1, 0),
            0xcc | 0xd0 => (1, 0),
            0xcd | 0xd1 => (2, 0),
            0xca | 0xce | 0xd2 => (4, 0),
            0xcb | 0xcf | 0xd3 => (8, 0),
            0xdc => (0, take(&mut rest, 2)?),
            0xdd => (0, take(&mut rest, 4)?),
            0xde => (0, 2 * take(&mut rest, 2)?),
            0xdf => (0, 2 * take(&mut rest, 4)?),
            // Small numbers, null, booleans; the one unused marker is refused by the decoder.
            _ => (0, 0),
        };
        if skipped > 0 {
            let skipped = usize::try_from(skipped).map_err(|_| Rejected::Malformed)?;
            count.add(STRING + skipped)?;
            rest = rest.get(skipped..).ok_or(Rejected::Malformed)?;
        }
        if elements > 0 {
            let is_map = matches!(marker, 0x80..=0x8f | 0xde | 0xdf);
            count.add(if is_map { MAP } else { LIST })?;
            missing = missing.saturating_add(elements);
        }
    }
    Ok(())
}

/// The number in the next bytes, at most eight.
#[cfg(feature = "msgpack")]
fn take(rest: &mut &[u8], length: usize) -> Result<u64, Rejected> {
    let (number, behind) = rest.split_at_checked(length).ok_or(Rejected::Malformed)?;
    *rest = behind;
    Ok(number.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of this many elements, all different from a string.
    fn json_list(element: &str, count: usize) -> Vec<u8> {
        format!("[{}]", vec![element; count].join(",")).into_bytes()
    }

    #[test]
    fn s18_values_of_json_are_counted() {
        let most = MAX_DECODED_BYTES / (VALUE + 2);
        assert_eq!(check_json(&json_list("0", most - 10)), Ok(()));
        assert_eq!(check_json(&json_list("0", most + 10)), Err(Rejected::TooLarge));
        assert_eq!(check_json(&json_list("{\"\":0}", most / 4)), Err(Rejected::TooLarge));
        // What is inside of a string is no value.
        let text = |inside: &str| format!("\"{}\"", inside.repeat(5_000_000)).into_bytes();
        assert_eq!(check_json(&text("[,]")), Ok(()));
        assert_eq!(check_json(&text("\\\"")), Ok(()));
        assert_eq!(check_json(&text("\",\"")), Err(Rejected::TooLarge), "strings that end");
    }

    #[cfg(feature = "msgpack")]
    #[test]
    fn s18_values_of_messagepack_are_counted() {
        let list = |element: &[u8], count: usize| {
            let mut bytes = vec![0xdd];
            bytes.extend(u32::try_from(count).unwrap().to_be_bytes());
            bytes.extend(element.repeat(count));
            bytes
        };
        let most = MAX_DECODED_BYTES / VALUE;
        assert_eq!(check_msgpack(&list(&[0xc0], most - 10)), Ok(()));
        assert_eq!(check_msgpack(&list(&[0xc0], most + 10)), Err(Rejected::TooLarge));
        assert_eq!(check_msgpack(&list(&[0x81, 0xa0, 0xc0], most / 4)), Err(Rejected::TooLarge));
        assert_eq!(check_msgpack(&list(&[0xd9, 0x03, 0x91, 0x91, 0x91], 400_000)), Ok(()), "strings are skipped");
        let mut cut = list(&[0xc0], most - 10);
        cut.pop();
        assert_eq!(check_msgpack(&cut), Err(Rejected::Malformed));
    }

    /// Each kind of value has the length that the encoder gives it: otherwise the count loses its place.
    #[cfg(feature = "msgpack")]
    #[test]
    fn s18_all_values_of_messagepack_are_skipped_right() {
        let numbers = [0, 127, 128, 255, 256, 65_535, 65_536, u64::from(u32::MAX), u64::MAX];
        let negative = [-1_i64, -32, -33, -128, -129, -32_768, -32_769, i64::MIN];
        let texts = [0, 31, 32, 255, 256, 65_535, 65_536].map(|length| "x".repeat(length));
        let lists = [0, 15, 16, 70_000].map(|length| vec![true; length]);
        let map =
            |length: u32| (0..length).map(|key| (key.to_string(), 1.5)).collect::<std::collections::BTreeMap<_, _>>();
        let all = (numbers, negative, texts, lists, [0, 15, 16, 70_000].map(map), 1.5_f32);
        let mut bytes = rmp_serde::to_vec_named(&all).unwrap();
        assert!(bytes.len() > MAX_DECODED_BYTES / MAP, "long enough to be counted");
        assert_eq!(check_msgpack(&bytes), Ok(()));
        bytes.pop();
        assert_eq!(check_msgpack(&bytes), Err(Rejected::Malformed));
    }
}
