//! The payload of requests and answers: any JSON-like value, deserialized strictly.

use std::fmt;
use std::ops::Deref;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

/// The deepest nesting of a payload, in levels.
pub const MAX_PAYLOAD_DEPTH: usize = 64;

/// The value of a request or an answer, of any shape.
///
/// It is deserialized strictly in every format: at most [`MAX_PAYLOAD_DEPTH`] levels, no duplicate keys, only finite numbers.
///
/// ```
/// use nanite::packet::Payload;
///
/// let payload: Payload = serde_json::json!({"text": "hello"}).into();
/// assert_eq!(payload["text"], "hello");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Payload(pub Value);

impl Payload {
    /// Serializes a value into a payload.
    ///
    /// # Errors
    /// When the value has no JSON form, for example a map whose keys are not strings.
    ///
    /// ```
    /// use nanite::packet::Payload;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// assert_eq!(Payload::new(vec![1, 2])?.to_string(), "[1,2]");
    /// # Ok(())
    /// # }
    /// ```
    pub fn new<T: Serialize>(value: T) -> Result<Self, serde_json::Error> {
        serde_json::to_value(value).map(Payload)
    }

    /// Deserializes the payload into a type.
    ///
    /// # Errors
    /// When the value has another shape.
    ///
    /// ```
    /// use nanite::packet::Payload;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let numbers: Vec<u32> = Payload::from_text("[1, 2]").parse()?;
    /// assert_eq!(numbers, [1, 2]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn parse<T: de::DeserializeOwned>(self) -> Result<T, serde_json::Error> {
        serde_json::from_value(self.0)
    }

    /// Its approximate size when encoded, in bytes.
    pub(crate) fn approximate_bytes(&self) -> usize {
        fn size(value: &Value) -> usize {
            match value {
                Value::Null | Value::Bool(_) | Value::Number(_) => 4,
                Value::String(text) => text.len(),
                Value::Array(values) => values.iter().map(size).sum(),
                Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + size(value)).sum(),
            }
        }
        size(&self.0)
    }

    /// About how much memory it takes, in bytes.
    pub(crate) fn memory(&self) -> usize {
        fn size(value: &Value) -> usize {
            size_of::<Value>()
                + match value {
                    Value::Null | Value::Bool(_) | Value::Number(_) => 0,
                    Value::String(text) => text.len(),
                    Value::Array(values) => values.iter().map(size).sum(),
                    // The first node of a map has room for eleven entries.
                    Value::Object(fields) if fields.is_empty() => 0,
                    Value::Object(fields) => {
                        let entry = |(name, value): (&String, &Value)| size_of::<String>() + name.len() + size(value);
                        11 * size_of::<(String, Value)>() + fields.iter().map(entry).sum::<usize>()
                    }
                }
        }
        size(&self.0)
    }

    /// Parses a text as JSON; a text that is not JSON becomes a string.
    ///
    /// ```
    /// use nanite::packet::Payload;
    ///
    /// assert!(Payload::from_text("[1]").is_array());
    /// assert!(Payload::from_text("hello").is_string());
    /// ```
    pub fn from_text(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|_| Payload(Value::String(text.to_owned())))
    }
}

impl Deref for Payload {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.0
    }
}

impl From<Value> for Payload {
    fn from(value: Value) -> Self {
        Payload(value)
    }
}

impl From<&str> for Payload {
    fn from(text: &str) -> Self {
        Payload(Value::String(text.to_owned()))
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        StrictValue { depth: 0 }.deserialize(deserializer).map(Payload)
    }
}

/// Deserializes one value at a nesting depth.
#[derive(Clone, Copy)]
struct StrictValue {
    depth: usize,
}

impl StrictValue {
    fn deeper<E: de::Error>(self) -> Result<StrictValue, E> {
        if self.depth >= MAX_PAYLOAD_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_PAYLOAD_DEPTH} levels")));
        }
        Ok(StrictValue { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for StrictValue {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null, a boolean, a number, a string, a list or a map with string keys")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("the number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom("duplicate key in a map"));
            }
            map.insert(key, entries.next_value_seed(inner)?);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Payload, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn json_values_round_trip() {
        let text = r#"{"a":[1,-2,2.5,null,true,"x"],"b":{}}"#;
        assert_eq!(read(text).unwrap().to_string(), text);
    }

    #[test]
    fn rejects_duplicate_keys_and_deep_nesting() {
        assert!(read(r#"{"a":1,"a":2}"#).unwrap_err().to_string().contains("duplicate"));
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(read(&nested(MAX_PAYLOAD_DEPTH)).is_ok());
        assert!(read(&nested(MAX_PAYLOAD_DEPTH + 1)).unwrap_err().to_string().contains("deeper"));
    }

    #[test]
    fn text_that_is_not_json_becomes_a_string() {
        assert_eq!(Payload::from_text("[1]").0, serde_json::json!([1]));
        assert_eq!(Payload::from_text("hello").0, serde_json::json!("hello"));
    }
}
